//! A vCPU's whole state: saving it, and restoring it into a vCPU that has never run.
//!
//! Invariant: state is saved and restored in the orders of [`SAVE_ORDER`] and [`RESTORE_ORDER`], and every
//! piece is in both. What a piece needs before it is said there.
//!
//! Both are inside the guest's pause, and what costs there is the number of calls: each loads the vCPU and
//! puts it away again. So MSRs go in one call, what only the VMM can change is read before the guest runs
//! ([`Given`]), and what a vCPU that has never run holds already is not written again ([`KEPT`]).

mod compare;
pub(crate) mod cpuid;
pub(crate) mod msr;
mod pieces;
pub mod saved;
pub(crate) mod tsc;

use std::ops::Deref;

use kvm_ioctls::{Kvm, VcpuFd};
use mig::Section;

pub use saved::VcpuState;

#[cfg(test)]
pub(crate) use compare::difference;

use crate::cap::Caps;
use crate::error::{Call, KvmError};
use crate::ioctl;
use crate::time::{self, TimePlan};
use saved::{CpuidEntry, Msr};

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

    /// Whether it is saved as MSRs and restored as such.
    fn is_msrs(self) -> bool {
        matches!(self, Self::FeatureMsrs | Self::Msrs | Self::TscDeadline)
    }
}

/// The order of saving. MP_STATE first, because reading it applies a pending INIT or SIPI and so changes
/// everything else; events last, because the other calls may still turn a pending one into an injected one.
/// MSRs that stand together are read by one call.
pub const SAVE_ORDER: [Piece; 15] = [
    Piece::MpState,
    Piece::Regs,
    Piece::Xsave,
    Piece::Xcrs,
    Piece::Sregs,
    Piece::Cpuid,
    Piece::TscKhz,
    Piece::FeatureMsrs,
    Piece::Msrs,
    Piece::TscDeadline,
    Piece::TscOffset,
    Piece::Lapic,
    Piece::DebugRegs,
    Piece::Nested,
    Piece::Events,
];

/// The order of restoring. CPUID and feature MSRs decide what the others may hold. The APIC base (SREGS)
/// precedes the APIC's registers, which reset with it. The TSC's frequency precedes its offset, both precede
/// the APIC, whose timer counts in them. The deadline is the last of the MSRs, after the APIC and its timer
/// mode. Events come after everything that could clear one. MSRs that stand together are written by one call.
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
    Piece::TscDeadline,
    Piece::Events,
    Piece::MpState,
    Piece::DebugRegs,
];

/// What is not written to a vCPU that holds it already and has never run: pieces of which no other piece's
/// restoring changes anything, and whose writing does nothing else. Where CPUID or the feature MSRs are
/// written, which decide what the others may hold, everything is.
///
/// Never the others: writing segment registers, the APIC, MSRs or events has KVM look at all it has.
pub const KEPT: [Piece; 7] = [
    Piece::Cpuid,
    Piece::FeatureMsrs,
    Piece::TscKhz,
    Piece::Xsave,
    Piece::Xcrs,
    Piece::MpState,
    Piece::DebugRegs,
];

/// What restoring a guest has to write as a rule: not what was given before, nor what guests hardly ever change.
/// The TSC stays where it is.
pub(crate) const REHEARSED: [Piece; 8] = [
    Piece::Sregs,
    Piece::Regs,
    Piece::Xsave,
    Piece::Xcrs,
    Piece::Lapic,
    Piece::Msrs,
    Piece::TscDeadline,
    Piece::Events,
];

/// What of a vCPU only its VMM can change. Its CPUID as KVM reports it, not as it was once given; the few
/// bits of it that follow the guest's registers are brought up to date by KVM wherever those are restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    cpuid: Vec<CpuidEntry>,
    tsc_khz: u32,
}

impl Given {
    /// Reads it.
    ///
    /// # Errors
    /// The first call that fails.
    pub fn read(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        Ok(Self { cpuid: cpuid::read(vcpu)?, tsc_khz: vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")? })
    }

    pub(crate) fn cpuid(&self) -> &[CpuidEntry] {
        &self.cpuid
    }

    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }
}

/// What saving needs to know, found out once, before the guest runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaveContext {
    /// What this KVM can do.
    pub caps: Caps,
    /// This kernel's boot id.
    pub boot_id: Option<[u8; 16]>,
    /// The frequency of this host's TSC in kHz.
    pub host_tsc_khz: u32,
    /// What each vCPU was given, by index.
    pub given: Vec<Given>,
    tsc_attribute: bool,
    feature_msrs: Vec<u32>,
    msrs: Vec<u32>,
}

impl SaveContext {
    /// Finds out on vCPUs, all of the guest's by index, that have their CPUID and have never run; which MSRs
    /// there are on the first of them. `host_tsc_khz` is what [`host_tsc_khz`] said.
    ///
    /// # Errors
    /// The kernel's refusal to list its MSRs; [`KvmError::NoSuchVcpu`] when there is no vCPU.
    pub fn probe<V: Deref<Target = VcpuFd>>(
        kvm: &Kvm,
        vcpus: &[V],
        caps: &Caps,
        host_tsc_khz: u32,
    ) -> Result<Self, KvmError> {
        let first = vcpus.first().ok_or(KvmError::NoSuchVcpu { vcpu: 0 })?;
        let (feature_msrs, msrs) = msr::readable(kvm, first)?;
        let given = vcpus.iter().map(|v| Given::read(v)).collect::<Result<_, _>>()?;
        let (tsc_attribute, boot_id) = (ioctl::has_tsc_offset(&**first), time::boot_id().ok());
        let caps = caps.clone();
        Ok(Self { caps, boot_id, host_tsc_khz, given, tsc_attribute, feature_msrs, msrs })
    }

    pub(crate) fn feature_msrs(&self) -> &[u32] {
        &self.feature_msrs
    }
}

/// The frequency of the host's TSC in kHz, which a vCPU has that was given no other.
///
/// # Errors
/// KVM_GET_TSC_KHZ's.
pub fn host_tsc_khz(vcpu: &VcpuFd) -> Result<u32, KvmError> {
    vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")
}

/// What restoring needs to know.
#[derive(Debug, Clone)]
pub(crate) struct RestoreContext<'a> {
    /// What this KVM can do.
    pub(crate) caps: &'a Caps,
    /// The frequency of this host's TSC in kHz.
    pub(crate) host_tsc_khz: u32,
    /// How the TSC is moved.
    pub(crate) mover: tsc::Mover,
    /// How time goes on; one plan for the whole guest.
    pub(crate) time: TimePlan,
}

/// Saves a vCPU that is out of KVM_RUN with nothing half done, and was given this.
///
/// # Errors
/// The first call that fails; nothing is ever left out.
pub fn save(vcpu: &VcpuFd, given: &Given, context: &SaveContext) -> Result<VcpuState, KvmError> {
    let mut state = VcpuState::default();
    let listed = |piece: &Piece| pieces::listed_msrs(*piece, context).is_some();
    for together in SAVE_ORDER.chunk_by(|a, b| listed(a) && listed(b)) {
        match together {
            [piece] if !listed(piece) => pieces::save(vcpu, *piece, given, context, &mut state)?,
            msrs => pieces::save_msrs(vcpu, msrs, context, &mut state)?,
        }
    }
    Ok(state)
}

/// Restores a vCPU that has never run and holds what `fresh` says; guest memory is in place. In debug builds
/// reads back and compares. Says whether the vCPU was given another CPUID than it had.
///
/// # Errors
/// The first call that fails; the vCPU is of no use afterwards.
pub(crate) fn restore(
    vcpu: &VcpuFd,
    state: &VcpuState,
    fresh: &VcpuState,
    context: &RestoreContext<'_>,
) -> Result<bool, KvmError> {
    let there = |piece: Piece| compare::is_same(piece, state, fresh);
    let same_cpu = there(Piece::Cpuid) && there(Piece::FeatureMsrs);
    let kept = |piece: &Piece| same_cpu && KEPT.contains(piece) && there(*piece);
    let order: Vec<Piece> = RESTORE_ORDER.into_iter().filter(|p| !kept(p)).collect();
    restore_pieces(vcpu, state, fresh, context, &order)?;
    if cfg!(debug_assertions) {
        compare::read_back(vcpu, state, context)?;
    }
    Ok(!(same_cpu && there(Piece::TscKhz)))
}

/// Restores only the given pieces, in their order: [`RESTORE_ORDER`] without one is how a test shows that the
/// piece matters.
pub(crate) fn restore_pieces(
    vcpu: &VcpuFd,
    state: &VcpuState,
    fresh: &VcpuState,
    context: &RestoreContext<'_>,
    order: &[Piece],
) -> Result<(), KvmError> {
    for together in order.chunk_by(|a, b| a.is_msrs() && b.is_msrs()) {
        match together {
            [piece] if !piece.is_msrs() => pieces::restore(vcpu, *piece, context, state, fresh)?,
            msrs => {
                let all: Vec<Msr> = msrs.iter().flat_map(|p| pieces::saved_msrs(*p, state)).collect();
                msr::write(vcpu, &all)?;
            }
        }
    }
    Ok(())
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

    /// Whether the guest has a kvmclock, which alone can be told that it was stopped: the enable bit of
    /// MSR_KVM_SYSTEM_TIME_NEW or its older number (kvm_set_guest_paused in arch/x86/kvm/x86.c).
    pub(crate) fn has_kvmclock(&self) -> bool {
        const SYSTEM_TIME: [u32; 2] = [0x4b56_4d01, 0x12];
        self.msrs.iter().any(|m| SYSTEM_TIME.contains(&m.index) && m.data & 1 == 1)
    }
}

#[cfg(test)]
mod tests;
