//! The log with manual protection: reading tells, KVM_CLEAR_DIRTY_LOG re-arms.
//!
//! With KVM_DIRTY_LOG_INITIALLY_SET starting costs nothing up front: no page is protected and every bit is
//! set, until a page's bit is cleared just before it is read. The kernel re-protects exactly the given
//! pages whose bit it has set, so clearing more than is sent would lose writes.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};
use kvm_ioctls::VmFd;

use crate::cap::{self, Caps};
use crate::error::KvmError;
use crate::ioctl;

pub(super) fn supported(caps: &Caps) -> bool {
    caps.manual_dirty_log & u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE) != 0
}

/// Has the VM's logs work this way; takes effect for logs switched on afterwards.
pub(super) fn choose(vm: &VmFd, supported: u64) -> Result<(), KvmError> {
    let wanted = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let call = "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2";
    cap::enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, wanted & supported, call)
}

/// Re-arms the pages of `words`, from page `first` of the slot, of which `left` pages are left from there.
pub(super) fn rearm(vm: &VmFd, slot: u32, first: u64, left: u64, words: &[u64]) -> Result<(), KvmError> {
    if words.iter().all(|w| *w == 0) {
        return Ok(());
    }
    // The kernel wants a multiple of 64 pages unless the window reaches the slot's end.
    let mut first = first;
    let mut left = left;
    // 2^31 pages (8 TiB) a call: the count is a u32.
    for words in words.chunks(1 << 25) {
        let pages = left.min(words.len() as u64 * 64);
        let count = u32::try_from(pages).expect("2^25 words hold 2^31 pages");
        ioctl::clear_dirty_log(vm, slot, first, count, words)?;
        first += pages;
        left -= pages;
    }
    Ok(())
}
