//! The time stamp counter of a vCPU: its frequency, and what it is ahead of the host's.

use kvm_ioctls::VcpuFd;

use super::saved::{Msr, Tsc};
use super::{RestoreContext, msr};
use crate::error::{Call, KvmError};
use crate::{ioctl, time};

/// How a vCPU's TSC is moved against the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mover {
    /// By the attribute that holds the offset: exact.
    Attribute,
    /// By writing the counter: as exact as the time between two instructions.
    Counter,
    /// Not at all: guest code reads the host's counter (kvm_pvm), whatever the attribute or the counter are
    /// set to. Whether there is the attribute, by which the offset is known exactly.
    Stuck { attribute: bool },
}

impl Mover {
    /// Tries on a vCPU that has never run, and puts its offset back.
    pub(crate) fn probe(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let khz = vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")?;
        let here = if ioctl::has_tsc_offset(vcpu) { Self::Attribute } else { Self::Counter };
        let offset = here.offset(vcpu, khz, khz)?;
        let moved = offset.wrapping_add(1 << 45);
        here.set_offset(vcpu, moved, khz, khz)?;
        let apart = distance(here.offset(vcpu, khz, khz)?, moved);
        here.set_offset(vcpu, offset, khz, khz)?;
        let took = if here == Self::Attribute { apart == 0 } else { apart < tolerance(khz) };
        Ok(if took { here } else { Self::Stuck { attribute: here == Self::Attribute } })
    }

    /// Has KVM find again that the TSCs of all vCPUs are one: the probe of one alone set it apart, by which the
    /// guest's clock loses its master (kvm_arch_tsc_set_attr in arch/x86/kvm/x86.c). For each vCPU; where TSCs are
    /// moved, restoring does so.
    pub(crate) fn rejoin(self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        match self {
            Self::Stuck { attribute: true } => ioctl::set_tsc_offset(vcpu, ioctl::tsc_offset(vcpu)?),
            Self::Stuck { attribute: false } | Self::Attribute | Self::Counter => Ok(()),
        }
    }

    /// Whether it moves a TSC at all.
    pub(crate) fn moves(self) -> bool {
        !matches!(self, Self::Stuck { .. })
    }

    /// Guest TSC minus (scaled) host TSC.
    fn offset(self, vcpu: &VcpuFd, guest_khz: u32, host_khz: u32) -> Result<u64, KvmError> {
        match self {
            Self::Attribute | Self::Stuck { attribute: true } => ioctl::tsc_offset(vcpu),
            Self::Counter | Self::Stuck { attribute: false } => {
                let guest = msr::read(vcpu, &[msr::TSC])?[0].data;
                Ok(offset_now(guest, guest_khz, host_khz))
            }
        }
    }

    fn set_offset(self, vcpu: &VcpuFd, offset: u64, guest_khz: u32, host_khz: u32) -> Result<(), KvmError> {
        match self {
            Self::Attribute | Self::Stuck { attribute: true } => ioctl::set_tsc_offset(vcpu, offset),
            // Without the attribute KVM makes vCPUs whose TSC is written within a second of each other equal
            // (kvm_synchronize_tsc), which takes the cycles between the reading and the write away again.
            Self::Counter | Self::Stuck { attribute: false } => {
                let data = time::scaled(time::rdtsc(), guest_khz, host_khz).wrapping_add(offset);
                msr::write_as_is(vcpu, Msr { index: msr::TSC, data })
            }
        }
    }
}

/// The offset of a guest whose TSC was `guest` a moment ago.
pub(super) fn offset_now(guest: u64, guest_khz: u32, host_khz: u32) -> u64 {
    guest.wrapping_sub(time::scaled(time::rdtsc(), guest_khz, host_khz))
}

pub(super) fn set_khz(vcpu: &VcpuFd, khz: u32, context: &RestoreContext) -> Result<(), KvmError> {
    if !context.caps.tsc_control && !time::within_tolerance(khz, context.host_tsc_khz) {
        let host_khz = context.host_tsc_khz;
        let why = format!("its tsc counts {khz} kHz, this host's {host_khz} kHz, and kvm cannot scale it");
        return Err(KvmError::DoesNotFit { why });
    }
    vcpu.set_tsc_khz(khz).call("KVM_SET_TSC_KHZ")
}

/// Moves the TSC to where the guest's goes on. One that cannot be moved must be there already: as far as
/// `fresh`, the offset that the vCPU was found to have.
pub(super) fn set_offset(
    vcpu: &VcpuFd,
    tsc: &Tsc,
    fresh: u64,
    context: &RestoreContext,
) -> Result<(), KvmError> {
    let offset = tsc.offset.wrapping_add(context.time.tsc_shift(tsc.khz, context.host_tsc_khz));
    match context.mover {
        Mover::Stuck { attribute } => {
            let apart = distance(offset, fresh);
            let there = if attribute { apart == 0 } else { apart < tolerance(tsc.khz) };
            let what = "a tsc of the guest's own: the host's would jump under it";
            if there { Ok(()) } else { Err(KvmError::Missing { what }) }
        }
        mover => mover.set_offset(vcpu, offset, tsc.khz, context.host_tsc_khz),
    }
}

/// A second's cycles: the most by which KVM moves a TSC to make it equal to another vCPU's.
fn tolerance(khz: u32) -> u64 {
    u64::from(khz) * 1000
}

fn distance(a: u64, b: u64) -> u64 {
    a.wrapping_sub(b).cast_signed().unsigned_abs()
}
