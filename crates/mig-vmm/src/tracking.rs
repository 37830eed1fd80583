//! How a machine's writes are found when it moves: chosen when it is made, since KVM gives a VM dirty rings only
//! before it has vCPUs.

use mig_kvm::dirty::{self, MOST_RING_ENTRIES};
use mig_kvm::{Caps, RingSize};

use crate::error::VmmError;
use crate::platform::open_kvm;

/// Where KVM notes what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tracking {
    /// In a bitmap of each memory slot.
    #[default]
    Bitmap,
    /// In a ring of each vCPU, so that it is known which of them write.
    Ring {
        /// How many pages a vCPU may write before it has to stop for a moment: rounded up to a power of two,
        /// 1024 to 65,536. Each takes 16 bytes of the kernel's memory.
        entries: u32,
    },
}

impl Tracking {
    /// The largest rings.
    pub const RING: Self = Self::Ring { entries: MOST_RING_ENTRIES };

    /// Whether this host can do it.
    ///
    /// # Errors
    /// [`VmmError::State`] names what KVM lacks; what is wrong with KVM.
    pub fn check(self) -> Result<(), VmmError> {
        match self {
            Self::Bitmap => Ok(()),
            Self::Ring { .. } => {
                let kvm = open_kvm()?;
                let vm = kvm.create_vm().map_err(VmmError::kvm("creating a VM"))?;
                Ok(dirty::rings_supported(&Caps::probe(&kvm, &vm)?)?)
            }
        }
    }

    /// Gives a VM without vCPUs what it needs for it.
    pub(crate) fn enable(self, vm: &kvm_ioctls::VmFd, caps: &Caps) -> Result<Option<RingSize>, VmmError> {
        match self {
            Self::Bitmap => Ok(None),
            Self::Ring { entries } => Ok(Some(RingSize::enable(vm, caps, entries)?)),
        }
    }
}
