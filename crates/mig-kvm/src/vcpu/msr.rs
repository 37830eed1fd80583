//! Model-specific registers: which there are, and reading and writing many.
//!
//! Never a silent skip: what is saved is decided once, before the guest runs, by reading each; afterwards
//! each of them is saved and restored, or there is an error that names it.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::saved::Msr;
use crate::error::{Call, KvmError};

/// IA32_TSC: saved as an offset, never as a value.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: saved with the others, restored after all of them.
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// State that KVM keeps but does not list: MTRRs and machine-check banks.
fn unlisted() -> impl Iterator<Item = u32> {
    let mtrr_variable = 0x200..=0x20f;
    let mtrr_fixed = [0x250, 0x258, 0x259].into_iter().chain(0x268..=0x26f);
    let mtrr_default = std::iter::once(0x2ff);
    let bank_control2 = 0x280..=0x29f;
    let banks = 0x400..=0x47f;
    mtrr_variable.chain(mtrr_fixed).chain(mtrr_default).chain(bank_control2).chain(banks)
}

/// The feature MSRs and all other MSRs that can be read on this vCPU.
pub(super) fn readable(kvm: &Kvm, vcpu: &VcpuFd) -> Result<(Vec<u32>, Vec<u32>), KvmError> {
    let features = kvm.get_msr_feature_index_list().call("KVM_GET_MSR_FEATURE_INDEX_LIST")?;
    let listed = kvm.get_msr_index_list().call("KVM_GET_MSR_INDEX_LIST")?;
    let features: Vec<u32> = features.as_slice().iter().copied().filter(|i| can_read(vcpu, *i)).collect();
    let mut others: Vec<u32> = Vec::new();
    for index in listed.as_slice().iter().copied().chain(unlisted()) {
        let elsewhere = [TSC, TSC_DEADLINE].contains(&index) || features.contains(&index);
        if !elsewhere && !others.contains(&index) && can_read(vcpu, index) {
            others.push(index);
        }
    }
    Ok((features, others))
}

fn can_read(vcpu: &VcpuFd, index: u32) -> bool {
    read(vcpu, &[index]).is_ok()
}

/// The kernel's MAX_IO_MSRS is 256, and it wants fewer (msr_io in arch/x86/kvm/x86.c).
const CHUNK: usize = 255;

/// Reads every one of `indices`.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut msrs = Vec::with_capacity(indices.len());
    for indices in indices.chunks(CHUNK) {
        let entries: Vec<_> =
            indices.iter().map(|i| kvm_msr_entry { index: *i, ..Default::default() }).collect();
        let mut batch = Msrs::from_entries(&entries).expect("a chunk is not too large");
        let count = vcpu.get_msrs(&mut batch).call("KVM_GET_MSRS")?;
        if let Some(index) = indices.get(count) {
            return Err(KvmError::Msr { call: "KVM_GET_MSRS", index: *index, value: 0 });
        }
        msrs.extend(batch.as_slice().iter().map(Msr::from));
    }
    Ok(msrs)
}

/// What KVM could give a guest for a feature MSR.
pub(crate) fn read_system(kvm: &Kvm, index: u32) -> Option<Msr> {
    let entry = kvm_msr_entry { index, ..Default::default() };
    let mut one = Msrs::from_entries(&[entry]).expect("one is not too many");
    (kvm.get_msrs(&mut one) == Ok(1)).then(|| Msr::from(&one.as_slice()[0]))
}

/// Writes one MSR whose value does not stay what was written.
pub(super) fn write_as_is(vcpu: &VcpuFd, msr: Msr) -> Result<(), KvmError> {
    let one = Msrs::from_entries(&[(&msr).into()]).expect("one is not too many");
    match vcpu.set_msrs(&one).call("KVM_SET_MSRS")? {
        1 => Ok(()),
        _ => Err(KvmError::Msr { call: "KVM_SET_MSRS", index: msr.index, value: msr.data }),
    }
}

/// Writes every one of `msrs`, in order. One that KVM will not write is an error, unless it holds the value
/// already (registers that describe the CPU are read-only).
pub(crate) fn write(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), KvmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let chunk = &left[..left.len().min(CHUNK)];
        let entries: Vec<_> = chunk.iter().map(kvm_msr_entry::from).collect();
        let batch = Msrs::from_entries(&entries).expect("a chunk is not too large");
        let count = vcpu.set_msrs(&batch).call("KVM_SET_MSRS")?;
        left = &left[count.min(chunk.len())..];
        if count < chunk.len() {
            let refused = left[0];
            if read(vcpu, &[refused.index]).ok().as_deref() != Some(&[refused]) {
                let Msr { index, data } = refused;
                return Err(KvmError::Msr { call: "KVM_SET_MSRS", index, value: data });
            }
            left = &left[1..];
        }
    }
    Ok(())
}
