//! Guest-physical addresses: what lies where.
//!
//! ```text
//! 0x0000_0000  RAM, with the places below for the boot protocols' tables
//! 0x000a_0000  RAM behind the VGA text page and where a PC has ROMs; reserved in every memory map
//! 0x0010_0000  RAM
//! 0xc000_0000  PCI hole: IOAPIC, local APICs, KVM's own pages; up to 4 GiB
//! 0x1_0000_0000  RAM, what is left of it
//! ```

use mig::describe::Region;
use mig::domain::PAGE_BYTES;

/// The least memory a machine has.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// The most memory a machine has: 1 TiB.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// The most vCPUs a machine has.
pub const MAX_VCPUS: u8 = 32;

/// Where the PCI hole starts.
pub const HOLE_START: u64 = 3 << 30;
/// One past the PCI hole.
pub const HOLE_END: u64 = 4 << 30;

/// The descriptor table that kernels are entered with.
pub(crate) const BOOT_GDT: u64 = 0x500;
/// PVH: `hvm_start_info`, behind it the module list, then the memory map.
pub(crate) const PVH_START_INFO: u64 = 0x6000;
pub(crate) const PVH_MODULES: u64 = 0x6100;
pub(crate) const PVH_MEMORY_MAP: u64 = 0x6200;
/// Linux boot protocol: `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x7000;
/// A stack, in case a kernel pushes before it sets its own.
pub(crate) const BOOT_STACK: u64 = 0x1_8000;
/// The kernel's command line, zero-terminated.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The most bytes of it: Linux on x86 takes 2048 with the zero (COMMAND_LINE_SIZE in asm/setup.h), and cuts off
/// the rest without a word.
pub(crate) const CMDLINE_MAX_BYTES: usize = 2047;
/// Base memory ends here, 639 KiB: what follows is reserved and holds the MP table, where kernels look.
pub(crate) const BASE_END: u64 = 0x9_fc00;
/// The VGA text page: 25 rows of 80 characters, each with an attribute.
pub(crate) const VGA_TEXT: u64 = 0xb_8000;
/// Where memory above the first MiB starts.
pub(crate) const HIGH_START: u64 = 0x10_0000;

/// KVM's page for the identity map, with its three for the task state segment behind it (Intel hosts without
/// unrestricted guests need them).
pub(crate) const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub(crate) const KVM_TSS: u64 = KVM_IDENTITY_MAP + PAGE_BYTES;

pub(crate) const IOAPIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;

/// The regions of a machine with this much memory.
pub fn regions(memory_bytes: u64) -> Vec<Region> {
    let low = Region { guest_address: 0, bytes: memory_bytes.min(HOLE_START) };
    let high = Region { guest_address: HOLE_END, bytes: memory_bytes.saturating_sub(HOLE_START) };
    [low, high].into_iter().filter(|r| r.bytes > 0).collect()
}

/// A range of a memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapEntry {
    pub(crate) start: u64,
    pub(crate) bytes: u64,
    pub(crate) usable: bool,
}

/// What a kernel is told of memory.
pub(crate) fn memory_map(memory_bytes: u64) -> Vec<MapEntry> {
    let entry = |start: u64, end: u64, usable| MapEntry { start, bytes: end - start, usable };
    let mut map = vec![
        entry(0, BASE_END, true),
        entry(BASE_END, HIGH_START, false),
        entry(HIGH_START, memory_bytes.min(HOLE_START), true),
    ];
    if memory_bytes > HOLE_START {
        map.push(entry(HOLE_END, HOLE_END + memory_bytes - HOLE_START, true));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_3_gib_continues_at_4_gib() {
        assert_eq!(regions(2 << 20), [Region { guest_address: 0, bytes: 2 << 20 }]);
        assert_eq!(regions(3 << 30), [Region { guest_address: 0, bytes: 3 << 30 }]);
        assert_eq!(
            regions(5 << 30),
            [Region { guest_address: 0, bytes: 3 << 30 }, Region { guest_address: 4 << 30, bytes: 2 << 30 }]
        );
    }

    #[test]
    fn a_memory_map_offers_all_memory_but_the_last_of_the_first_mib() {
        for memory_bytes in [2 << 20, 32 << 20, 3 << 30, 5 << 30] {
            let usable: u64 = memory_map(memory_bytes).iter().filter(|e| e.usable).map(|e| e.bytes).sum();
            assert_eq!(usable, memory_bytes - (HIGH_START - BASE_END), "{memory_bytes}");
        }
    }
}
