//! The state in which a guest's vCPUs start: 64-bit ring 0 with paging on.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::layout::{AREA_BYTES, GDT, IDT, PML4, TSS, area};

/// How to start a guest's vCPUs; all of them are to be made runnable by the VMM.
#[derive(Debug, Clone)]
pub struct Entry {
    /// One for each vCPU, in order.
    pub vcpus: Vec<VcpuEntry>,
}

/// How to start one vCPU.
#[derive(Debug, Clone)]
pub struct VcpuEntry {
    /// To be set with KVM_SET_REGS.
    pub regs: kvm_regs,
}

impl VcpuEntry {
    /// Changes what KVM_GET_SREGS answers for a fresh vCPU into what KVM_SET_SREGS is to set.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        // 16-byte descriptors' and segments' types: SDM volume 3, 3.4.5.1 and 7.2.3.
        let data = kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector: SELECTOR_DATA,
            type_: 0x3,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = kvm_segment { selector: SELECTOR_CODE, type_: 0xb, l: 1, db: 0, ..data };
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: TSS_LIMIT,
            selector: SELECTOR_TASK,
            type_: 0xb,
            present: 1,
            ..Default::default()
        };
        sregs.ldt = kvm_segment { type_: 0x2, unusable: 1, ..Default::default() };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, GDT_LIMIT);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        sregs.cr0 = CR0;
        sregs.cr3 = PML4;
        sregs.cr4 = CR4;
        sregs.efer = EFER;
    }
}

/// Protected mode, coprocessor monitored, extension type, numeric errors, write protection, paging.
pub(super) const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1 << 1 | 1;
/// Physical address extension, FXSAVE, SIMD exceptions.
pub(super) const CR4: u64 = 1 << 5 | 1 << 9 | 1 << 10;
/// Long mode enabled and active, SYSCALL enabled.
pub(super) const EFER: u64 = 1 << 10 | 1 << 8 | 1;
pub(super) const SELECTOR_CODE: u16 = 0x08;
const SELECTOR_DATA: u16 = 0x10;
const SELECTOR_TASK: u16 = 0x18;
const TSS_LIMIT: u32 = 0x67;
const GDT_LIMIT: u16 = 5 * 8 - 1;

/// The registers of `vcpu` at `start`.
pub(super) fn vcpu_entry(vcpu: u8, start: u64) -> VcpuEntry {
    VcpuEntry {
        regs: kvm_regs {
            rip: start,
            rsp: area(vcpu) + AREA_BYTES,
            rbp: area(vcpu),
            rdi: vcpu.into(),
            rflags: 2,
            ..Default::default()
        },
    }
}

/// The descriptor table that [`VcpuEntry::apply`] stands for.
pub(super) fn gdt() -> [u64; 5] {
    // Base, limit and flags in their scattered places: SDM volume 3, figures 3-8 and 8-4. Accessed and busy
    // bits are set, so that nobody has to write here.
    let task = u64::from(TSS_LIMIT) | (TSS & 0xff_ffff) << 16 | 0x8b << 40;
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, task, 0]
}
