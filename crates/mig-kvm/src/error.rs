//! What can go wrong between this crate and KVM.

use std::time::Duration;

use mig::WireError;
use vmm_sys_util::errno;

/// An error of the KVM side of a migration.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum KvmError {
    #[error("{call} failed")]
    Ioctl {
        call: &'static str,
        #[source]
        source: errno::Error,
    },
    #[error("{call} failed for msr {index:#x} (value {value:#x})")]
    Msr { call: &'static str, index: u32, value: u64 },
    #[error("kvm lacks {what}")]
    Missing { what: &'static str },
    #[error("kvm lacks dirty rings (KVM_CAP_DIRTY_LOG_RING_ACQ_REL, or KVM_CAP_DIRTY_LOG_RING)")]
    NoDirtyRings,
    #[error("memory slot {slot} is not a region of guest memory: {why}")]
    Slot { slot: u32, why: &'static str },
    #[error("pages {first_page}..{end_page} do not lie within one memory slot")]
    Window { first_page: u64, end_page: u64 },
    #[error("a thread for the dirty rings cannot be started")]
    Thread {
        #[source]
        source: std::io::Error,
    },
    #[error("it is not known which entries of the dirty rings kvm freed")]
    RingsNotReset,
    #[error("the saved state does not fit: {why}")]
    DoesNotFit { why: String },
    #[error("{piece} reads back differently after it was restored: {difference}")]
    ReadBack { piece: &'static str, difference: String },
    #[error("vcpu {vcpu} did not leave KVM_RUN within {patience:?}")]
    NotPaused { vcpu: usize, patience: Duration },
    #[error("vcpu {vcpu} is driven by another thread or does not exist")]
    NoSuchVcpu { vcpu: usize },
    #[error("state section {name} has version {version}, only {known} is known")]
    Version { name: String, version: u16, known: u16 },
    #[error("expected a state section {expected}, got {found}")]
    Name { expected: &'static str, found: String },
    #[error("a state section cannot be read")]
    Section(#[from] WireError),
    #[error("guest memory cannot be laid out")]
    Domain(#[from] mig::domain::DomainError),
}

/// Names the call that an errno came from.
pub(crate) trait Call<T> {
    fn call(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> Call<T> for Result<T, errno::Error> {
    fn call(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Ioctl { call, source })
    }
}
