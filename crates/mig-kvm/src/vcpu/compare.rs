//! When two states of a vCPU are the same, free-running clocks aside.

use kvm_ioctls::VcpuFd;

use super::saved::{Msr, VcpuState};
use super::{Given, Piece, RESTORE_ORDER, RestoreContext, SaveContext, cpuid};
use crate::error::KvmError;
use crate::{ioctl, time};

/// Whether a piece of two states is the same to the bit, but for what KVM derives.
pub(super) fn is_same(piece: Piece, wanted: &VcpuState, found: &VcpuState) -> bool {
    match piece {
        Piece::Cpuid => cpuid::is_same(&wanted.cpuid, &found.cpuid),
        // Another kernel may list more of them, or in another order.
        Piece::FeatureMsrs => wanted.feature_msrs.iter().all(|msr| found.feature_msrs.contains(msr)),
        Piece::TscKhz => wanted.tsc.khz == found.tsc.khz,
        // An area that is longer here holds further components: in their initial state, or not the same.
        Piece::Xsave => wanted.xsave == found.xsave,
        Piece::Xcrs => wanted.xcrs == found.xcrs,
        Piece::MpState => wanted.mp_state == found.mp_state,
        Piece::DebugRegs => wanted.debug == found.debug,
        _ => difference(piece, wanted, found).is_none(),
    }
}

/// Reads the vCPU back and compares, free-running clocks aside.
pub(super) fn read_back(
    vcpu: &VcpuFd,
    wanted: &VcpuState,
    context: &RestoreContext<'_>,
) -> Result<(), KvmError> {
    let indices = |msrs: &[Msr]| msrs.iter().map(|m| m.index).collect();
    let save_context = SaveContext {
        caps: context.caps.clone(),
        boot_id: None,
        host_tsc_khz: context.host_tsc_khz,
        given: Vec::new(),
        tsc_attribute: ioctl::has_tsc_offset(vcpu),
        feature_msrs: indices(&wanted.feature_msrs),
        msrs: indices(&wanted.msrs),
    };
    let found = super::save(vcpu, &Given::read(vcpu)?, &save_context)?;
    // A deadline that has passed may have become an interrupt already, in the APIC's registers.
    let host = time::scaled(time::rdtsc(), found.tsc.khz, context.host_tsc_khz);
    let fired = found.tsc_deadline == 0 && wanted.tsc_deadline <= host.wrapping_add(found.tsc.offset);
    let checked = |piece: &Piece| !(fired && matches!(piece, Piece::TscDeadline | Piece::Lapic));
    for piece in RESTORE_ORDER.into_iter().filter(checked) {
        if let Some(difference) = difference(piece, wanted, &found) {
            return Err(KvmError::ReadBack { piece: piece.name(), difference });
        }
    }
    Ok(())
}

/// How a piece of two states differs; `None` when it does not, free-running clocks aside.
pub(crate) fn difference(piece: Piece, wanted: &VcpuState, found: &VcpuState) -> Option<String> {
    fn differ<T: PartialEq + std::fmt::Debug>(wanted: &T, found: &T) -> Option<String> {
        (wanted != found).then(|| format!("wanted {wanted:x?}, found {found:x?}"))
    }
    fn differ_in<T: PartialEq + std::fmt::Debug>(wanted: &[T], found: &[T]) -> Option<String> {
        let at = wanted.iter().zip(found).position(|(w, f)| w != f);
        match at {
            Some(at) => differ(&(at, &wanted[at]), &(at, &found[at])),
            None => differ(&wanted.len(), &found.len()),
        }
    }
    match piece {
        Piece::Cpuid if cpuid::is_same(&wanted.cpuid, &found.cpuid) => None,
        Piece::Cpuid => differ_in(&wanted.cpuid, &found.cpuid),
        Piece::FeatureMsrs => differ_in(&wanted.feature_msrs, &found.feature_msrs),
        Piece::Sregs => differ(&wanted.sregs, &found.sregs),
        Piece::Nested => differ(&wanted.nested, &found.nested),
        Piece::TscKhz => differ(&wanted.tsc.khz, &found.tsc.khz),
        Piece::TscOffset => None, // Shifted by the time plan.
        Piece::Regs => differ(&wanted.regs, &found.regs),
        Piece::Xsave => differ_in(&wanted.xsave, &found.xsave[..wanted.xsave.len().min(found.xsave.len())]),
        Piece::Xcrs => differ_in(&wanted.xcrs, &found.xcrs),
        Piece::Lapic => differ_in(&still(&wanted.lapic), &still(&found.lapic)),
        Piece::Msrs => differ_in(&wanted.msrs, &found.msrs),
        Piece::Events => differ(&wanted.events, &found.events),
        Piece::MpState => differ(&wanted.mp_state, &found.mp_state),
        Piece::TscDeadline => differ(&wanted.tsc_deadline, &found.tsc_deadline),
        Piece::DebugRegs => differ(&wanted.debug, &found.debug),
    }
}

/// The APIC's registers without those that run by themselves or that KVM derives: version (it depends on
/// KVM), processor priority, the timer's current count.
fn still(lapic: &[u8]) -> Vec<(usize, u8)> {
    const MOVING: [usize; 3] = [0x30, 0xa0, 0x390];
    lapic.iter().copied().enumerate().filter(|(at, _)| !MOVING.contains(&(at & !0xf))).collect()
}
