//! A small VM for tests: memory, chips, vCPUs in flat 32-bit protected mode, and code of a few bytes.

#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, kvm_mp_state, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use mig::describe::Region;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::cap::Caps;
use crate::dirty::{DirtyLog, RingSize, Rings, Slot, WrittenPages};
use crate::vcpu::{self, SaveContext};

pub(crate) const PAGE: u64 = 4096;
/// Two regions: one that ends inside a chunk and inside a word, and one apart from it.
pub(crate) const REGIONS: [(u64, u64); 2] = [(0, 1027), (32 << 20, 700)];
/// Where [`Machine::load`] puts code; its page is written by the VMM only.
pub(crate) const CODE: u64 = 0x1000;
/// Where [`Machine::load_native_writer`] puts three pages of tables.
pub(crate) const TABLES: u64 = 0x4000;
/// The port that guests end by.
pub(crate) const END_PORT: u16 = 0x10;

pub(crate) struct Machine {
    pub(crate) kvm: Kvm,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) memory: Arc<GuestMemoryMmap<WrittenPages>>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) caps: Caps,
    pub(crate) context: SaveContext,
    /// Its dirty rings, if it was made with some.
    pub(crate) ring_size: Option<RingSize>,
    /// Those of them that a log was made over.
    pub(crate) rings: Option<Arc<Rings>>,
}

/// KVM, or `None` (loudly) where a test may be skipped for want of it.
pub(crate) fn kvm() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(e) if std::env::var_os("MIG_REQUIRE_KVM").is_some_and(|v| v == "1") => {
            panic!("no /dev/kvm, and MIG_REQUIRE_KVM=1: {e}")
        }
        Err(e) => {
            eprintln!("SKIPPED: no /dev/kvm ({e})");
            None
        }
    }
}

impl Machine {
    pub(crate) fn new(vcpus: u64) -> Option<Self> {
        Self::with_regions(vcpus, &REGIONS)
    }

    pub(crate) fn with_regions(vcpus: u64, regions: &[(u64, u64)]) -> Option<Self> {
        Self::with_rings(vcpus, regions, None)
    }

    /// With dirty rings of so many entries, if any.
    pub(crate) fn with_rings(vcpus: u64, regions: &[(u64, u64)], entries: Option<u32>) -> Option<Self> {
        let mut machine = Self::bare_with_rings(vcpus, regions, entries)?;
        let supported = machine.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        for (id, vcpu) in machine.vcpus.iter().enumerate() {
            let mut cpuid = supported.clone();
            for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 1) {
                entry.ebx = entry.ebx & 0xff_ffff | (id as u32) << 24;
                // x2apic and the TSC-deadline timer, which KVM's own APIC has.
                entry.ecx |= 1 << 21 | 1 << 24;
            }
            vcpu.set_cpuid2(&cpuid).unwrap();
            vcpu.set_mp_state(kvm_mp_state::default()).unwrap();
            flat(vcpu);
        }
        machine.context = machine.probe();
        Some(machine)
    }

    /// Without CPUID: what a state is restored into.
    pub(crate) fn bare(vcpus: u64, regions: &[(u64, u64)]) -> Option<Self> {
        Self::bare_with_rings(vcpus, regions, None)
    }

    fn bare_with_rings(vcpus: u64, regions: &[(u64, u64)], entries: Option<u32>) -> Option<Self> {
        let kvm = kvm()?;
        let vm = Arc::new(kvm.create_vm().unwrap());
        let caps = Caps::probe(&kvm, &vm).unwrap();
        caps.enable(&vm).unwrap();
        let ring_size = entries.map(|entries| RingSize::enable(&vm, &caps, entries).unwrap());
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let ranges: Vec<_> =
            regions.iter().map(|(start, pages)| (GuestAddress(*start), (pages * PAGE) as usize)).collect();
        let memory = Arc::new(GuestMemoryMmap::<WrittenPages>::from_ranges(&ranges).unwrap());
        let slots: Vec<Slot> =
            memory.iter().zip(0..).map(|(region, slot)| slot_of(&memory, region, slot)).collect();
        for slot in &slots {
            let region = kvm_userspace_memory_region {
                slot: slot.slot,
                flags: 0,
                guest_phys_addr: slot.region.guest_address,
                memory_size: slot.region.bytes,
                userspace_addr: slot.host_address,
            };
            // SAFETY: `memory` maps the region and outlives every use of the VM in a test.
            unsafe { vm.set_user_memory_region(region).unwrap() };
        }
        let vcpus: Vec<VcpuFd> = (0..vcpus).map(|id| vm.create_vcpu(id).unwrap()).collect();
        let host_tsc_khz = vcpu::host_tsc_khz(&vcpus[0]).unwrap();
        let refs: Vec<&VcpuFd> = vcpus.iter().collect();
        let context = SaveContext::probe(&kvm, &refs, &caps, host_tsc_khz).unwrap();
        Some(Self { kvm, vm, vcpus, memory, slots, caps, context, ring_size, rings: None })
    }

    pub(crate) fn refs(&self) -> Vec<&VcpuFd> {
        self.vcpus.iter().collect()
    }

    /// A log that is kept in its rings.
    pub(crate) fn ring_log(&mut self) -> DirtyLog {
        let (vm, slots, memory) = (self.vm.clone(), self.slots.clone(), self.memory.clone());
        let size = self.ring_size.expect("it was made with rings");
        let log = DirtyLog::with_rings(vm, slots, memory, &self.caps, &self.refs(), size).unwrap();
        self.rings = log.rings().cloned();
        log
    }

    /// What saving needs to know of the vCPUs as they are.
    pub(crate) fn probe(&self) -> SaveContext {
        SaveContext::probe(&self.kvm, &self.refs(), &self.caps, self.context.host_tsc_khz).unwrap()
    }

    pub(crate) fn load(&self, code: &[u8]) {
        self.memory.write_slice(code, GuestAddress(CODE)).unwrap();
    }

    /// Loads the guest of [`Machine::guest_writes`].
    pub(crate) fn load_writer(&self) {
        // again: mov [edi], eax; add edi, ebx; dec ecx; jnz again; out END_PORT, al
        self.load(&[0x89, 0x07, 0x01, 0xdf, 0x49, 0x75, 0xf9, 0xe6, END_PORT as u8]);
    }

    /// The same guest in ring 3 of long mode, which runs natively even where KVM interprets the rest. The first
    /// 1 GiB is mapped as it is; tables from [`TABLES`] on.
    pub(crate) fn load_native_writer(&self) {
        // again: mov [rdi], eax; add edi, ebx; dec ecx; jnz again; out END_PORT, al
        self.load(&[0x89, 0x07, 0x01, 0xdf, 0xff, 0xc9, 0x75, 0xf8, 0xe6, END_PORT as u8]);
        // Present, writable, for ring 3, accessed; dirty and large below. Nobody needs to write to them any more.
        let table = |at: u64, entry: u64| self.memory.write_obj(entry, GuestAddress(at)).unwrap();
        table(TABLES, (TABLES + PAGE) | 0x27);
        table(TABLES + PAGE, (TABLES + 2 * PAGE) | 0x27);
        (0..512).for_each(|n| table(TABLES + 2 * PAGE + 8 * n, n << 21 | 0xe7));
        for vcpu in &self.vcpus {
            let mut sregs = vcpu.get_sregs().unwrap();
            (sregs.cr0, sregs.cr3, sregs.cr4) = (0x8000_0033, TABLES, 0x620);
            sregs.efer = 0x500;
            (sregs.cs.l, sregs.cs.db) = (1, 0);
            let segments =
                [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss];
            for segment in segments {
                (segment.dpl, segment.selector) = (3, segment.selector | 3);
            }
            vcpu.set_sregs(&sregs).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            // Ports are ring 3's too.
            regs.rflags = 0x3002;
            vcpu.set_regs(&regs).unwrap();
        }
    }

    /// Has the guest write a word at `address` and at every `stride` bytes after it.
    pub(crate) fn guest_writes(&mut self, address: u64, stride: u64, count: u64) {
        vcpu_writes(
            &mut self.vcpus[0],
            self.rings.as_deref().map(|rings| (rings, 0)),
            address,
            stride,
            count,
            0x5a5a,
        );
    }
}

/// What [`Machine::guest_writes`] does, with the vCPU (and its index, where it has a ring) and the word chosen.
pub(crate) fn vcpu_writes(
    vcpu: &mut VcpuFd,
    rings: Option<(&Rings, usize)>,
    address: u64,
    stride: u64,
    count: u64,
    word: u32,
) {
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rdi, regs.rbx, regs.rcx, regs.rax) = (CODE, address, stride, count, word.into());
    vcpu.set_regs(&regs).unwrap();
    run_to_end(vcpu, rings);
}

/// Runs until the guest writes to the end port, and completes that write.
fn run_to_end(vcpu: &mut VcpuFd, rings: Option<(&Rings, usize)>) {
    loop {
        match (vcpu.run(), rings) {
            (Ok(VcpuExit::IoOut(END_PORT, _)), _) => break,
            (Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)), Some((rings, index))) => {
                rings.make_room(index).unwrap();
            }
            (Ok(VcpuExit::Intr), _) => {}
            (Err(e), _) if e.errno() == libc::EINTR => {}
            (other, _) => panic!("the guest left with {other:?}"),
        }
    }
    vcpu.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
    vcpu.set_kvm_immediate_exit(0);
}

fn slot_of(memory: &GuestMemoryMmap<WrittenPages>, region: &impl GuestMemoryRegion, slot: u32) -> Slot {
    let guest_address = region.start_addr().0;
    let host_address = memory.get_host_address(region.start_addr()).unwrap() as u64;
    Slot { slot, region: Region { guest_address, bytes: region.len() }, host_address }
}

/// Flat 32-bit protected mode without paging, at [`CODE`].
pub(crate) fn flat(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr0 |= 1;
    for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss]
    {
        (segment.base, segment.limit, segment.g, segment.db) = (0, 0xffff_ffff, 1, 1);
        (segment.present, segment.s, segment.type_, segment.selector) = (1, 1, 3, 16);
    }
    (sregs.cs.type_, sregs.cs.selector) = (11, 8);
    vcpu.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rip, regs.rflags, regs.rsp) = (CODE, 2, 0x8000);
    vcpu.set_regs(&regs).unwrap();
}
