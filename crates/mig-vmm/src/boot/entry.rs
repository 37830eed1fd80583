//! 32-bit protected mode with flat segments and no paging: how both PVH and the Linux boot protocol enter.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{BOOT_GDT, BOOT_STACK};
use crate::memory::Ram;

/// Selectors of Linux' boot protocol (`__BOOT_CS`, `__BOOT_DS`), and a task for virtual-mode hardware.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;
/// Null, unused, flat code, flat data, a busy 32-bit task of 104 bytes at 0.
const GDT: [u64; 5] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];
/// Protected mode; extension type, which is always 1.
const CR0: u64 = 1 | 1 << 4;

pub(super) fn write_gdt(memory: &Ram) -> Result<(), vm_memory::GuestMemoryError> {
    let bytes: Vec<u8> = GDT.iter().flat_map(|d| d.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(BOOT_GDT))
}

/// The registers at `entry`; the protocols add their argument.
pub(super) fn registers(entry: u64) -> kvm_regs {
    kvm_regs { rip: entry, rsp: BOOT_STACK, rflags: 2, ..Default::default() }
}

pub(super) fn apply(sregs: &mut kvm_sregs) {
    // Segment types: SDM volume 3, 3.4.5.1 and 3.5.
    let data = kvm_segment {
        limit: 0xffff_ffff,
        selector: DATA,
        type_: 0x3,
        present: 1,
        s: 1,
        db: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: CODE, type_: 0xb, ..data };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, selector: TASK, type_: 0xb, present: 1, ..Default::default() };
    sregs.ldt = kvm_segment { unusable: 1, ..Default::default() };
    (sregs.gdt.base, sregs.gdt.limit) = (BOOT_GDT, (size_of_val(&GDT) - 1) as u16);
    (sregs.idt.base, sregs.idt.limit) = (0, 0);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, 0, 0, 0);
}
