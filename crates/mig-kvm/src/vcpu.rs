//! A vCPU's whole state: saving it, and restoring it into a vCPU that has never run.
//!
//! Invariant: state is saved and restored in the orders of [`SAVE_ORDER`] and [`RESTORE_ORDER`], and every
//! piece is in both. What a piece needs before it is said there.

#![allow(unsafe_code)]

pub(crate) mod msr;
pub mod saved;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_lapic_state, kvm_mp_state};
use kvm_ioctls::{Kvm, VcpuFd};
use mig::Section;

pub use saved::VcpuState;

use crate::cap::Caps;
use crate::error::{Call, KvmError};
use crate::ioctl;
use crate::time::{self, TimePlan};
use saved::{CpuidEntry, DebugRegs, Events, Regs, Sregs, Tsc};

/// The name of a vCPU's section; its instance is the vCPU's index.
pub const NAME: &str = "kvm.vcpu";
/// The schema of [`VcpuState`].
pub const SCHEMA: u16 = 1;

/// A part of a vCPU's state that is read and written by a call of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Piece {
    Cpuid,
    FeatureMsrs,
    Sregs,
    Nested,
    TscKhz,
    TscOffset,
    Regs,
    Xsave,
    Xcrs,
    Lapic,
    Msrs,
    Events,
    MpState,
    TscDeadline,
    DebugRegs,
}

impl Piece {
    /// The piece's name in errors.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpuid => "cpuid",
            Self::FeatureMsrs => "feature msrs",
            Self::Sregs => "segment and control registers",
            Self::Nested => "nested state",
            Self::TscKhz => "tsc frequency",
            Self::TscOffset => "tsc offset",
            Self::Regs => "general registers",
            Self::Xsave => "xsave area",
            Self::Xcrs => "extended control registers",
            Self::Lapic => "local apic",
            Self::Msrs => "msrs",
            Self::Events => "pending events",
            Self::MpState => "mp state",
            Self::TscDeadline => "tsc deadline",
            Self::DebugRegs => "debug registers",
        }
    }
}

/// The order of saving. MP_STATE first, because reading it applies a pending INIT or SIPI and so changes
/// everything else; events last, because the other calls may still turn a pending one into an injected one.
pub const SAVE_ORDER: [Piece; 15] = [
    Piece::MpState,
    Piece::Regs,
    Piece::Xsave,
    Piece::Xcrs,
    Piece::Sregs,
    Piece::FeatureMsrs,
    Piece::Msrs,
    Piece::TscDeadline,
    Piece::Lapic,
    Piece::DebugRegs,
    Piece::Nested,
    Piece::Cpuid,
    Piece::TscKhz,
    Piece::TscOffset,
    Piece::Events,
];

/// The order of restoring. CPUID and feature MSRs decide what the others may hold. The APIC base (SREGS)
/// precedes the APIC's registers, which reset with it. The TSC's frequency precedes its offset, both precede
/// the APIC, whose timer counts in them. The deadline comes after the APIC and its timer mode. Events come
/// after everything that could clear one.
pub const RESTORE_ORDER: [Piece; 15] = [
    Piece::Cpuid,
    Piece::FeatureMsrs,
    Piece::Sregs,
    Piece::Nested,
    Piece::TscKhz,
    Piece::TscOffset,
    Piece::Regs,
    Piece::Xsave,
    Piece::Xcrs,
    Piece::Lapic,
    Piece::Msrs,
    Piece::Events,
    Piece::MpState,
    Piece::TscDeadline,
    Piece::DebugRegs,
];

/// What saving needs to know, found out once, before the guest runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveContext {
    /// What this KVM can do.
    pub caps: Caps,
    /// This kernel's boot id.
    pub boot_id: Option<[u8; 16]>,
    /// The frequency of this host's TSC in kHz.
    pub host_tsc_khz: u32,
    feature_msrs: Vec<u32>,
    msrs: Vec<u32>,
}

impl SaveContext {
    /// Finds out on a vCPU that has its CPUID and has never run; good for all vCPUs of the guest.
    ///
    /// # Errors
    /// The kernel's refusal to list its MSRs.
    pub fn probe(kvm: &Kvm, vcpu: &VcpuFd, caps: &Caps) -> Result<Self, KvmError> {
        let (feature_msrs, msrs) = msr::readable(kvm, vcpu)?;
        let host_tsc_khz = vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")?;
        let boot_id = time::boot_id().ok();
        Ok(Self { caps: caps.clone(), boot_id, host_tsc_khz, feature_msrs, msrs })
    }

    pub(crate) fn feature_msrs(&self) -> &[u32] {
        &self.feature_msrs
    }
}

/// What restoring needs to know.
#[derive(Debug, Clone)]
pub struct RestoreContext {
    /// What this KVM can do.
    pub caps: Caps,
    /// The frequency of this host's TSC in kHz.
    pub host_tsc_khz: u32,
    /// How time goes on; one plan for the whole guest.
    pub time: TimePlan,
}

/// Saves a vCPU that is out of KVM_RUN with nothing half done.
///
/// # Errors
/// The first call that fails; nothing is ever left out.
pub fn save(vcpu: &VcpuFd, context: &SaveContext) -> Result<VcpuState, KvmError> {
    let mut state = empty();
    for piece in SAVE_ORDER {
        save_piece(vcpu, piece, context, &mut state)?;
    }
    Ok(state)
}

/// Restores a vCPU that has never run; guest memory is in place. In debug builds reads back and compares.
///
/// # Errors
/// The first call that fails; the vCPU is of no use afterwards.
pub fn restore(vcpu: &VcpuFd, state: &VcpuState, context: &RestoreContext) -> Result<(), KvmError> {
    restore_pieces(vcpu, state, context, &RESTORE_ORDER)?;
    if cfg!(debug_assertions) { compare(vcpu, state, context) } else { Ok(()) }
}

impl VcpuState {
    /// The state as the section of vCPU `index`.
    pub fn to_section(&self, index: u32) -> Section {
        Section::critical(NAME, index, SCHEMA, self)
    }

    /// Reads what [`VcpuState::to_section`] made.
    ///
    /// # Errors
    /// [`KvmError::Name`], [`KvmError::Version`] or [`KvmError::Section`].
    pub fn from_section(section: &Section) -> Result<Self, KvmError> {
        crate::state::decode(section, NAME, SCHEMA)
    }
}

fn empty() -> VcpuState {
    let events = kvm_bindings::kvm_vcpu_events::default();
    VcpuState {
        cpuid: Vec::new(),
        feature_msrs: Vec::new(),
        sregs: kvm_bindings::kvm_sregs2::default().into(),
        nested: None,
        tsc: Tsc { khz: 0, offset: 0 },
        regs: kvm_bindings::kvm_regs::default().into(),
        xsave: Vec::new(),
        xcrs: Vec::new(),
        lapic: Vec::new(),
        msrs: Vec::new(),
        events: events.into(),
        mp_state: 0,
        tsc_deadline: 0,
        debug: kvm_bindings::kvm_debugregs::default().into(),
    }
}

fn save_piece(
    vcpu: &VcpuFd,
    piece: Piece,
    context: &SaveContext,
    state: &mut VcpuState,
) -> Result<(), KvmError> {
    match piece {
        Piece::Cpuid => state.cpuid = cpuid_of(vcpu)?,
        Piece::FeatureMsrs => state.feature_msrs = msr::read(vcpu, &context.feature_msrs)?,
        Piece::Sregs => state.sregs = Sregs::from(ioctl::sregs2(vcpu)?),
        Piece::Nested => {
            state.nested = match context.caps.nested_state_bytes {
                0 => None,
                bytes => Some(ioctl::nested_state(vcpu, bytes)?),
            }
        }
        Piece::TscKhz => state.tsc.khz = vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")?,
        Piece::TscOffset => state.tsc.offset = tsc_offset(vcpu, state.tsc.khz, context.host_tsc_khz)?,
        Piece::Regs => state.regs = Regs::from(vcpu.get_regs().call("KVM_GET_REGS")?),
        Piece::Xsave => state.xsave = xsave(vcpu, &context.caps)?,
        Piece::Xcrs => state.xcrs = saved::xcrs_from(&vcpu.get_xcrs().call("KVM_GET_XCRS")?),
        Piece::Lapic => {
            let lapic = vcpu.get_lapic().call("KVM_GET_LAPIC")?;
            state.lapic = lapic.regs.iter().map(|r| r.cast_unsigned()).collect();
        }
        Piece::Msrs => state.msrs = msr::read(vcpu, &context.msrs)?,
        Piece::Events => {
            state.events = Events::from(vcpu.get_vcpu_events().call("KVM_GET_VCPU_EVENTS")?);
        }
        Piece::MpState => state.mp_state = vcpu.get_mp_state().call("KVM_GET_MP_STATE")?.mp_state,
        Piece::TscDeadline => state.tsc_deadline = msr::read(vcpu, &[msr::TSC_DEADLINE])?[0].data,
        Piece::DebugRegs => {
            state.debug = DebugRegs::from(vcpu.get_debug_regs().call("KVM_GET_DEBUGREGS")?);
        }
    }
    Ok(())
}

/// Restores only the given pieces, in their order: [`restore`] without one is how a test shows that the
/// piece matters.
pub(crate) fn restore_pieces(
    vcpu: &VcpuFd,
    state: &VcpuState,
    context: &RestoreContext,
    pieces: &[Piece],
) -> Result<(), KvmError> {
    pieces.iter().try_for_each(|piece| restore_piece(vcpu, *piece, context, state))
}

fn restore_piece(
    vcpu: &VcpuFd,
    piece: Piece,
    context: &RestoreContext,
    state: &VcpuState,
) -> Result<(), KvmError> {
    match piece {
        Piece::Cpuid => set_cpuid(vcpu, &state.cpuid),
        Piece::FeatureMsrs => msr::write(vcpu, &state.feature_msrs),
        Piece::Sregs => ioctl::set_sregs2(vcpu, &(&state.sregs).into()),
        Piece::Nested => match &state.nested {
            Some(nested) if context.caps.nested_state_bytes > 0 => ioctl::set_nested_state(vcpu, nested),
            // Never entered a guest of its own: there is nothing but the header.
            Some(nested) if nested.len() > NESTED_HEADER_BYTES => {
                Err(KvmError::Missing { what: "KVM_CAP_NESTED_STATE" })
            }
            _ => Ok(()),
        },
        Piece::TscKhz => set_tsc_khz(vcpu, state.tsc.khz, context),
        Piece::TscOffset => set_tsc_offset(vcpu, &state.tsc, context),
        Piece::Regs => vcpu.set_regs(&(&state.regs).into()).call("KVM_SET_REGS"),
        Piece::Xsave => set_xsave(vcpu, &state.xsave, &context.caps),
        Piece::Xcrs => vcpu.set_xcrs(&saved::xcrs_into(&state.xcrs)?).call("KVM_SET_XCRS"),
        Piece::Lapic => {
            let mut lapic = kvm_lapic_state::default();
            if state.lapic.len() != lapic.regs.len() {
                return Err(KvmError::DoesNotFit { why: format!("{} bytes of apic", state.lapic.len()) });
            }
            lapic.regs.iter_mut().zip(&state.lapic).for_each(|(to, from)| *to = from.cast_signed());
            vcpu.set_lapic(&lapic).call("KVM_SET_LAPIC")
        }
        Piece::Msrs => msr::write(vcpu, &state.msrs),
        Piece::Events => vcpu.set_vcpu_events(&(&state.events).into()).call("KVM_SET_VCPU_EVENTS"),
        Piece::MpState => {
            let mp_state = kvm_mp_state { mp_state: state.mp_state };
            vcpu.set_mp_state(mp_state).call("KVM_SET_MP_STATE")
        }
        Piece::TscDeadline => {
            let deadline = saved::Msr { index: msr::TSC_DEADLINE, data: state.tsc_deadline };
            msr::write(vcpu, &[deadline])
        }
        Piece::DebugRegs => vcpu.set_debug_regs(&(&state.debug).into()).call("KVM_SET_DEBUGREGS"),
    }
}

/// `struct kvm_nested_state` without its data.
const NESTED_HEADER_BYTES: usize = 128;

pub(crate) fn cpuid_of(vcpu: &VcpuFd) -> Result<Vec<CpuidEntry>, KvmError> {
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_CPUID2")?;
    Ok(cpuid.as_slice().iter().map(CpuidEntry::from).collect())
}

/// Gives a vCPU its CPUID, unless it was given the same when it was made: on a host that is a guest itself
/// the call costs a tenth of a millisecond, inside the pause.
pub(crate) fn set_cpuid(vcpu: &VcpuFd, wanted: &[CpuidEntry]) -> Result<(), KvmError> {
    if is_same_cpu(wanted, &cpuid_of(vcpu)?) {
        return Ok(());
    }
    let entries: Vec<_> = wanted.iter().map(Into::into).collect();
    let cpuid = CpuId::from_entries(&entries)
        .map_err(|_| KvmError::DoesNotFit { why: format!("{} cpuid entries", entries.len()) })?;
    vcpu.set_cpuid2(&cpuid).call("KVM_SET_CPUID2")
}

/// Whether two CPUIDs differ only in what KVM keeps up to date from CR4 and XCR0 (kvm_update_cpuid_runtime
/// in arch/x86/kvm/cpuid.c): OSXSAVE, OSPKE, the current size of the XSAVE area.
fn is_same_cpu(a: &[CpuidEntry], b: &[CpuidEntry]) -> bool {
    let lasting = |entry: &CpuidEntry| match (entry.function, entry.index) {
        (1, _) => CpuidEntry { ecx: entry.ecx & !(1 << 27), ..*entry },
        (7, 0) => CpuidEntry { ecx: entry.ecx & !(1 << 4), ..*entry },
        (0xd, 0 | 1) => CpuidEntry { ebx: 0, ..*entry },
        _ => *entry,
    };
    a.iter().map(lasting).eq(b.iter().map(lasting))
}

fn xsave(vcpu: &VcpuFd, caps: &Caps) -> Result<Vec<u32>, KvmError> {
    let mut area = vec![0; caps.xsave_bytes.div_ceil(4)];
    // SAFETY: the area has the size that KVM_CAP_XSAVE2 reports.
    unsafe { ioctl::xsave(vcpu, caps.xsave2, &mut area)? };
    Ok(area)
}

fn set_xsave(vcpu: &VcpuFd, saved: &[u32], caps: &Caps) -> Result<(), KvmError> {
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

fn tsc_offset(vcpu: &VcpuFd, guest_khz: u32, host_khz: u32) -> Result<u64, KvmError> {
    if ioctl::has_tsc_offset(vcpu) {
        return ioctl::tsc_offset(vcpu);
    }
    let guest = msr::read(vcpu, &[msr::TSC])?[0].data;
    Ok(guest.wrapping_sub(time::scaled(time::rdtsc(), guest_khz, host_khz)))
}

fn set_tsc_khz(vcpu: &VcpuFd, khz: u32, context: &RestoreContext) -> Result<(), KvmError> {
    if !context.caps.tsc_control && !time::within_tolerance(khz, context.host_tsc_khz) {
        let host_khz = context.host_tsc_khz;
        let why = format!("its tsc counts {khz} kHz, this host's {host_khz} kHz, and kvm cannot scale it");
        return Err(KvmError::DoesNotFit { why });
    }
    vcpu.set_tsc_khz(khz).call("KVM_SET_TSC_KHZ")
}

fn set_tsc_offset(vcpu: &VcpuFd, tsc: &Tsc, context: &RestoreContext) -> Result<(), KvmError> {
    let offset = tsc.offset.wrapping_add(context.time.tsc_shift(tsc.khz, context.host_tsc_khz));
    if take_tsc_offset(vcpu, offset, tsc.khz, context.host_tsc_khz)? {
        return Ok(());
    }
    Err(KvmError::Missing { what: "a tsc of the guest's own: the host's would jump under it" })
}

/// Sets the TSC's offset and says whether KVM took it: one that cannot shift a guest's TSC (kvm_pvm, where
/// guest code reads the host's counter) answers as if it had.
fn take_tsc_offset(vcpu: &VcpuFd, offset: u64, guest_khz: u32, host_khz: u32) -> Result<bool, KvmError> {
    let exact = ioctl::has_tsc_offset(vcpu);
    if exact {
        ioctl::set_tsc_offset(vcpu, offset)?;
    } else {
        // Without the attribute KVM makes vCPUs whose TSC is written within a second of each other equal
        // (kvm_synchronize_tsc), which takes the cycles between the reading and the write away again.
        let guest = time::scaled(time::rdtsc(), guest_khz, host_khz).wrapping_add(offset);
        msr::write_as_is(vcpu, saved::Msr { index: msr::TSC, data: guest })?;
    }
    let apart = tsc_offset(vcpu, guest_khz, host_khz)?.wrapping_sub(offset).cast_signed().unsigned_abs();
    // A second's cycles: the most by which KVM moves a TSC to make it equal to another vCPU's.
    Ok(if exact { apart == 0 } else { apart < u64::from(guest_khz) * 1000 })
}

/// Whether KVM can shift a guest's TSC; leaves the vCPU's shifted.
pub(crate) fn can_shift_tsc(vcpu: &VcpuFd) -> Result<bool, KvmError> {
    let khz = vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")?;
    take_tsc_offset(vcpu, tsc_offset(vcpu, khz, khz)?.wrapping_add(1 << 45), khz, khz)
}

/// Reads the vCPU back and compares, free-running clocks aside.
fn compare(vcpu: &VcpuFd, wanted: &VcpuState, context: &RestoreContext) -> Result<(), KvmError> {
    let indices = |msrs: &[saved::Msr]| msrs.iter().map(|m| m.index).collect();
    let save_context = SaveContext {
        caps: context.caps.clone(),
        boot_id: None,
        host_tsc_khz: context.host_tsc_khz,
        feature_msrs: indices(&wanted.feature_msrs),
        msrs: indices(&wanted.msrs),
    };
    let found = save(vcpu, &save_context)?;
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

#[cfg(test)]
mod tests;
