//! What CPUID tells a vCPU: all that KVM supports, and the vCPU's own place among the others.
//!
//! One package, a core for each vCPU, a thread for each core; APIC id = vCPU index.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use mig_kvm::vcpu::saved::CpuidEntry;

use crate::layout::MAX_VCPUS;

const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const MULTITHREADING: u32 = 1 << 28;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// CPUID of vCPU `index` of `vcpus`. `tsc_deadline`: whether KVM's local APIC has that timer mode, which its
/// list of what it supports leaves out.
pub(crate) fn of(supported: &CpuId, index: u8, vcpus: u8, tsc_deadline: bool) -> Vec<kvm_cpuid_entry2> {
    debug_assert!(vcpus <= MAX_VCPUS && index < vcpus);
    let (id, count) = (u32::from(index), u32::from(vcpus));
    let mut entries: Vec<_> =
        supported.as_slice().iter().filter(|e| !matches!(e.function, 0xb | 0x1f)).copied().collect();
    for entry in &mut entries {
        match entry.function {
            0 => entry.eax = entry.eax.clamp(0xb, 0x1e),
            1 => {
                entry.ebx = entry.ebx & 0xffff | count.next_power_of_two() << 16 | id << 24;
                entry.ecx |= HYPERVISOR | X2APIC | if tsc_deadline { TSC_DEADLINE } else { 0 };
                entry.edx = entry.edx & !MULTITHREADING | if vcpus > 1 { MULTITHREADING } else { 0 };
            }
            // Caches: threads that share one, cores in the package. The last level is shared by all.
            4 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1) << 26;
            }
            // AMD: the width of a core's id, the number of cores; the place of this one.
            0x8000_0008 => entry.ecx = core_bits(count) << 12 | (count - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0),
            _ => {}
        }
    }
    let topology = |level: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: level,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: level | kind,
        edx: id,
        ..Default::default()
    };
    entries.push(topology(0, 0, 1, LEVEL_THREAD));
    entries.push(topology(1, core_bits(count), count, LEVEL_CORE));
    entries.push(topology(2, 0, 0, 0));
    entries
}

/// Makes a leaf of the first vCPU's CPUID, as [`of`] made it, the leaf of vCPU `index`.
pub(crate) fn place(index: usize, leaf: &mut CpuidEntry) {
    let id = u32::try_from(index).expect("a few vCPUs");
    match leaf.function {
        1 => leaf.ebx = leaf.ebx & 0xff_ffff | id << 24,
        0xb => leaf.edx = id,
        0x8000_001e => (leaf.eax, leaf.ebx) = (id, id & 0xff),
        _ => {}
    }
}

/// Bits that hold the ids of this many cores.
fn core_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_vcpu_has_its_own_apic_id_in_all_leaves() {
        let leaf = |function| kvm_cpuid_entry2 { function, ebx: 0xffff_ffff, ..Default::default() };
        let supported = CpuId::from_entries(&[leaf(0), leaf(1), leaf(4), leaf(0xb), leaf(0x1f)]).unwrap();
        let entries = of(&supported, 5, 6, true);
        let find =
            |function, index| entries.iter().find(|e| e.function == function && e.index == index).unwrap();
        assert_eq!(find(1, 0).ebx, 5 << 24 | 8 << 16 | 0xffff);
        assert_eq!(find(1, 0).ecx & TSC_DEADLINE, TSC_DEADLINE);
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).edx), (3, 6, 5));
        assert!(entries.iter().all(|e| e.function != 0x1f) && find(0, 0).eax == 0xb);
    }

    #[test]
    fn a_vcpu_that_is_placed_has_the_cpuid_it_would_have_been_made_with() {
        let leaf = |function| kvm_cpuid_entry2 { function, ebx: 0xffff_ffff, ..Default::default() };
        let leaves = [0, 1, 4, 7, 0xb, 0xd, 0x8000_0008, 0x8000_001e].map(leaf);
        let supported = CpuId::from_entries(&leaves).unwrap();
        let made = |index| of(&supported, index, 6, true).iter().map(CpuidEntry::from).collect::<Vec<_>>();
        for index in 0..6 {
            let mut placed = made(0);
            placed.iter_mut().for_each(|leaf| place(index.into(), leaf));
            assert_eq!(placed, made(index));
        }
    }
}
