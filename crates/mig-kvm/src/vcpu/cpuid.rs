//! CPUID: reading it, giving it, and when two are the same.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::VcpuFd;

use super::saved::CpuidEntry;
use crate::error::{Call, KvmError};

/// What the vCPU has, not what it was once given.
pub(crate) fn read(vcpu: &VcpuFd) -> Result<Vec<CpuidEntry>, KvmError> {
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_CPUID2")?;
    Ok(cpuid.as_slice().iter().map(CpuidEntry::from).collect())
}

/// Gives a vCPU its CPUID. On a host that is a guest itself the call costs a tenth of a millisecond, and is
/// better made before the pause.
pub(crate) fn write(vcpu: &VcpuFd, wanted: &[CpuidEntry]) -> Result<(), KvmError> {
    let entries: Vec<_> = wanted.iter().map(Into::into).collect();
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| KvmError::DoesNotFit { why: format!("{} cpuid entries", entries.len()) })?;
    vcpu.set_cpuid2(&cpuid).call("KVM_SET_CPUID2")
}

/// Whether two CPUIDs differ only in what KVM keeps up to date from other registers (kvm_update_cpuid_runtime
/// in arch/x86/kvm/cpuid.c): OSXSAVE and OSPKE from CR4, APIC from its base register, MONITOR from
/// MISC_ENABLE (unless KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT is on), the current size of the XSAVE area from XCR0 and XSS.
pub(super) fn is_same(a: &[CpuidEntry], b: &[CpuidEntry]) -> bool {
    a.iter().map(lasting).eq(b.iter().map(lasting))
}

fn lasting(entry: &CpuidEntry) -> CpuidEntry {
    match (entry.function, entry.index) {
        (1, _) => CpuidEntry { ecx: entry.ecx & !(1 << 27 | 1 << 3), edx: entry.edx & !(1 << 9), ..*entry },
        (7, 0) => CpuidEntry { ecx: entry.ecx & !(1 << 4), ..*entry },
        (0xd, 0 | 1) => CpuidEntry { ebx: 0, ..*entry },
        _ => *entry,
    }
}
