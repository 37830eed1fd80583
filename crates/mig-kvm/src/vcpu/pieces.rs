//! Saving and restoring a piece: one call each.

#![allow(unsafe_code)]

use kvm_bindings::{kvm_lapic_state, kvm_mp_state};
use kvm_ioctls::VcpuFd;

use super::saved::{self, DebugRegs, Events, Msr, Regs, Sregs, VcpuState};
use super::{Given, Piece, RestoreContext, SaveContext, cpuid, msr, tsc};
use crate::cap::Caps;
use crate::error::{Call, KvmError};
use crate::ioctl;

/// The MSRs that a piece is read from, if it is.
pub(super) fn listed_msrs(piece: Piece, context: &SaveContext) -> Option<&[u32]> {
    match piece {
        Piece::FeatureMsrs => Some(&context.feature_msrs),
        Piece::Msrs => Some(&context.msrs),
        Piece::TscDeadline => Some(&[msr::TSC_DEADLINE]),
        // Where there is no attribute to read; the last of a call, so that it was read a moment ago.
        Piece::TscOffset if !context.tsc_attribute => Some(&[msr::TSC]),
        _ => None,
    }
}

/// Reads pieces that are MSRs, all by one call if there are not too many.
pub(super) fn save_msrs(
    vcpu: &VcpuFd,
    pieces: &[Piece],
    context: &SaveContext,
    state: &mut VcpuState,
) -> Result<(), KvmError> {
    let lists = pieces.iter().filter_map(|piece| Some((*piece, listed_msrs(*piece, context)?)));
    let indices: Vec<u32> = lists.clone().flat_map(|(_, list)| list).copied().collect();
    let mut found = msr::read(vcpu, &indices)?;
    let mut left = found.drain(..);
    for (piece, list) in lists {
        let mut its_own = left.by_ref().take(list.len());
        match piece {
            Piece::FeatureMsrs => state.feature_msrs = its_own.collect(),
            Piece::Msrs => state.msrs = its_own.collect(),
            Piece::TscDeadline => state.tsc_deadline = its_own.next().map_or(0, |m| m.data),
            _ => {
                let guest = its_own.next().map_or(0, |m| m.data);
                state.tsc.offset = tsc::offset_now(guest, state.tsc.khz, context.host_tsc_khz);
            }
        }
    }
    Ok(())
}

/// Saves a piece that is not read from MSRs.
pub(super) fn save(
    vcpu: &VcpuFd,
    piece: Piece,
    given: &Given,
    context: &SaveContext,
    state: &mut VcpuState,
) -> Result<(), KvmError> {
    match piece {
        Piece::Cpuid => state.cpuid = given.cpuid().into(),
        Piece::TscKhz => state.tsc.khz = given.tsc_khz(),
        Piece::FeatureMsrs | Piece::Msrs | Piece::TscDeadline => {
            save_msrs(vcpu, &[piece], context, state)?;
        }
        Piece::TscOffset => state.tsc.offset = ioctl::tsc_offset(vcpu)?,
        Piece::Sregs => state.sregs = Sregs::from(ioctl::sregs2(vcpu)?),
        Piece::Nested => {
            state.nested = match context.caps.nested_state_bytes {
                0 => None,
                bytes => Some(ioctl::nested_state(vcpu, bytes)?),
            }
        }
        Piece::Regs => state.regs = Regs::from(vcpu.get_regs().call("KVM_GET_REGS")?),
        Piece::Xsave => state.xsave = xsave(vcpu, &context.caps)?,
        Piece::Xcrs => state.xcrs = saved::xcrs_from(&vcpu.get_xcrs().call("KVM_GET_XCRS")?),
        Piece::Lapic => {
            let lapic = vcpu.get_lapic().call("KVM_GET_LAPIC")?;
            state.lapic = lapic.regs.iter().map(|r| r.cast_unsigned()).collect();
        }
        Piece::Events => {
            state.events = Events::from(vcpu.get_vcpu_events().call("KVM_GET_VCPU_EVENTS")?);
        }
        Piece::MpState => state.mp_state = vcpu.get_mp_state().call("KVM_GET_MP_STATE")?.mp_state,
        Piece::DebugRegs => {
            state.debug = DebugRegs::from(vcpu.get_debug_regs().call("KVM_GET_DEBUGREGS")?);
        }
    }
    Ok(())
}

/// The MSRs that a piece is restored as; none for one that is restored otherwise.
pub(super) fn saved_msrs(piece: Piece, state: &VcpuState) -> Vec<Msr> {
    match piece {
        Piece::FeatureMsrs => state.feature_msrs.clone(),
        Piece::Msrs => state.msrs.clone(),
        Piece::TscDeadline => vec![Msr { index: msr::TSC_DEADLINE, data: state.tsc_deadline }],
        _ => Vec::new(),
    }
}

/// Restores a piece.
pub(super) fn restore(
    vcpu: &VcpuFd,
    piece: Piece,
    context: &RestoreContext<'_>,
    state: &VcpuState,
    fresh: &VcpuState,
) -> Result<(), KvmError> {
    match piece {
        Piece::Cpuid => cpuid::write(vcpu, &state.cpuid),
        Piece::FeatureMsrs | Piece::Msrs | Piece::TscDeadline => msr::write(vcpu, &saved_msrs(piece, state)),
        Piece::Sregs => ioctl::set_sregs2(vcpu, &(&state.sregs).into()),
        Piece::Nested => match &state.nested {
            Some(nested) if context.caps.nested_state_bytes > 0 => ioctl::set_nested_state(vcpu, nested),
            // Never entered a guest of its own: there is nothing but the header.
            Some(nested) if nested.len() > NESTED_HEADER_BYTES => {
                Err(KvmError::Missing { what: "KVM_CAP_NESTED_STATE" })
            }
            _ => Ok(()),
        },
        Piece::TscKhz => tsc::set_khz(vcpu, state.tsc.khz, context),
        Piece::TscOffset => tsc::set_offset(vcpu, &state.tsc, fresh.tsc.offset, context),
        Piece::Regs => vcpu.set_regs(&(&state.regs).into()).call("KVM_SET_REGS"),
        Piece::Xsave => set_xsave(vcpu, &state.xsave, context.caps),
        Piece::Xcrs => vcpu.set_xcrs(&saved::xcrs_into(&state.xcrs)?).call("KVM_SET_XCRS"),
        Piece::Lapic => {
            let mut lapic = kvm_lapic_state::default();
            if state.lapic.len() != lapic.regs.len() {
                return Err(KvmError::DoesNotFit { why: format!("{} bytes of apic", state.lapic.len()) });
            }
            lapic.regs.iter_mut().zip(&state.lapic).for_each(|(to, from)| *to = from.cast_signed());
            vcpu.set_lapic(&lapic).call("KVM_SET_LAPIC")
        }
        Piece::Events => vcpu.set_vcpu_events(&(&state.events).into()).call("KVM_SET_VCPU_EVENTS"),
        Piece::MpState => {
            let mp_state = kvm_mp_state { mp_state: state.mp_state };
            vcpu.set_mp_state(mp_state).call("KVM_SET_MP_STATE")
        }
        Piece::DebugRegs => vcpu.set_debug_regs(&(&state.debug).into()).call("KVM_SET_DEBUGREGS"),
    }
}

/// `struct kvm_nested_state` without its data.
pub(super) const NESTED_HEADER_BYTES: usize = 128;

pub(super) fn xsave(vcpu: &VcpuFd, caps: &Caps) -> Result<Vec<u32>, KvmError> {
    let mut area = vec![0; caps.xsave_bytes.div_ceil(4)];
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 reports.
    unsafe { ioctl::xsave(vcpu, caps.xsave2, &mut area)? };
    Ok(area)
}

pub(super) fn set_xsave(vcpu: &VcpuFd, saved: &[u32], caps: &Caps) -> Result<(), KvmError> {
    let words = caps.xsave_bytes.div_ceil(4);
    if saved.len() > words {
        let why = format!("{} bytes of xsave area, this host has {}", saved.len() * 4, caps.xsave_bytes);
        return Err(KvmError::DoesNotFit { why });
    }
    // A larger area here holds more components, which XSTATE_BV in the header says are initial.
    let mut area = vec![0; words];
    area[..saved.len()].copy_from_slice(saved);
    // SAFETY: as in `xsave`.
    unsafe { ioctl::set_xsave(vcpu, &area) }
}
