//! The plain log: KVM_GET_DIRTY_LOG tells, and re-arms the whole slot as it does.
//!
//! For kernels before 5.0. Pages written between the read and the moment they are sent are reported, and so
//! sent, a second time.

use kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
use kvm_ioctls::VmFd;

use crate::cap;
use crate::error::KvmError;

/// Has the VM's logs work this way, where there is another one.
pub(super) fn choose(vm: &VmFd, manual_supported: u64) -> Result<(), KvmError> {
    if manual_supported == 0 {
        return Ok(());
    }
    cap::enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2")
}
