//! Where a built-in guest's things lie in guest-physical memory, which it maps one to one.
//!
//! Everything up to 640 KiB is at a fixed address; the VGA hole is left alone; from 1 MiB on come the page
//! directories of memory above 4 GiB, then a dirtier's schedule, then its working set.

pub(super) const PAGE_BYTES: u64 = 4096;

/// Which guest this is: read by the host only.
pub(super) const IDENTITY: u64 = 0x1000;
/// The descriptors, and at `TSS` the task state segment that 64-bit mode wants.
pub(super) const GDT: u64 = 0x2000;
pub(super) const TSS: u64 = GDT + 0x100;
pub(super) const IDT: u64 = 0x3000;
pub(super) const CODE: u64 = 0x4000;
pub(super) const CODE_END: u64 = PML4;
pub(super) const PML4: u64 = 0x1_0000;
pub(super) const PDPT: u64 = 0x1_1000;
/// Four page directories: 4 GiB, so that the PCI hole with the IOAPIC is mapped in every guest.
pub(super) const LOW_DIRECTORIES: u64 = 0x1_2000;
/// What all vCPUs share and some guest writes.
pub(super) const SHARED: u64 = 0x1_6000;
/// An area for each vCPU: first its control page, then its stack, which grows down from the area's end. An
/// interrupt handler finds the area by rounding the stack pointer down.
pub(super) const AREAS: u64 = 0x2_0000;
pub(super) const AREA_BYTES: u64 = 0x2000;
/// One page directory for each GiB above 4 GiB.
pub(super) const HIGH_DIRECTORIES: u64 = 0x10_0000;
pub(super) const GIB: u64 = 1 << 30;

/// The area of a vCPU.
pub(super) const fn area(vcpu: u8) -> u64 {
    AREAS + vcpu as u64 * AREA_BYTES
}

/// The first address that the fixed layout leaves free, in a guest whose memory ends at `end`.
pub(super) const fn free_from(end: u64) -> u64 {
    HIGH_DIRECTORIES + end.div_ceil(GIB).saturating_sub(4) * PAGE_BYTES
}

/// Fields of a vCPU's control page, as offsets.
pub(super) mod control {
    /// The vCPU's index, four bytes that only the host writes.
    pub(in super::super) const VCPU: u64 = 0x00;
    /// Timer interrupts handled.
    pub(in super::super) const TICKS: u64 = 0x08;
    /// Writes of a dirtier, eight bytes.
    pub(in super::super) const WRITTEN: u64 = 0x10;
    /// The rest is each guest's own.
    pub(in super::super) const OWN: u64 = 0x40;
}

const _: () = assert!(area(super::MAX_VCPUS) <= 0xa_0000);
