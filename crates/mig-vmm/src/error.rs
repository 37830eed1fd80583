//! What can go wrong with a machine.

use mig_kvm::KvmError;
use vmm_sys_util::errno;

use crate::boot::BootError;
use crate::layout::{MAX_MEMORY_BYTES, MAX_VCPUS, MIN_MEMORY_BYTES};
use crate::memory::MemoryError;
use crate::monitor::End;
use crate::workload::WorkloadError;

/// An error of the VMM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum VmmError {
    #[error("/dev/kvm is missing: load the kvm module, or enable virtualisation in the firmware")]
    NoKvm(#[source] errno::Error),
    #[error("/dev/kvm may not be opened: join the group kvm, or ask for access to it")]
    KvmDenied(#[source] errno::Error),
    #[error("{step} failed")]
    Kvm {
        step: &'static str,
        #[source]
        source: errno::Error,
    },
    #[error(
        "{bytes} bytes of memory: a machine has {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}, in whole pages of 4096"
    )]
    MemorySize { bytes: u64 },
    #[error("{vcpus} vCPUs: a machine has 1 to {MAX_VCPUS}")]
    Vcpus { vcpus: u32 },
    #[error("there is no memory for the guest: give it less, or free some")]
    Memory(#[from] MemoryError),
    #[error("loading the guest failed")]
    Boot(#[from] BootError),
    #[error("the state of KVM could not be handled")]
    State(#[from] KvmError),
    #[error("starting a vCPU's thread failed")]
    Thread(#[source] std::io::Error),
    #[error("it is too late: {0}")]
    Ended(End),
    #[error("the machine must be paused for this")]
    NotPaused,
    #[error("state section {name} {instance} of version {version} is unknown and critical")]
    UnknownSection { name: String, instance: u32, version: u16 },
    #[error("state section {name} is missing")]
    MissingSection { name: &'static str },
    #[error("state section {name} came twice")]
    DuplicateSection { name: String },
    #[error("state section {name} has version {version}, and {known} is known here")]
    SectionVersion { name: &'static str, version: u16, known: u16 },
    #[error("state section {name} cannot be read")]
    Section {
        name: &'static str,
        #[source]
        source: mig::WireError,
    },
    #[error("state section {name} cannot be: {why}")]
    SectionContent { name: &'static str, why: String },
    #[error("the guest's memory is not as it should be")]
    Verify(#[from] WorkloadError),
}

impl VmmError {
    /// For `map_err`: names the step that an errno came from.
    pub(crate) fn kvm(step: &'static str) -> impl FnOnce(errno::Error) -> Self {
        move |source| Self::Kvm { step, source }
    }
}
