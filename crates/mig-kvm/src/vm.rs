//! The VM's own state: the interrupt controllers, the PIT, the clock.

#![allow(unsafe_code)]

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_ioapic_state,
    kvm_irqchip, kvm_irqchip__bindgen_ty_1, kvm_pic_state, kvm_pit_channel_state, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use mig::Section;
use serde::{Deserialize, Serialize};

use crate::error::{Call, KvmError};
use crate::time::{HostClocks, TimePlan};
use crate::vcpu::SaveContext;

/// The name of the VM's section.
pub const NAME: &str = "kvm.vm";
/// The schema of [`VmState`].
pub const SCHEMA: u16 = 1;

/// What a VM holds beside its vCPUs and memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VmState {
    pub clock: Clock,
    /// Primary and secondary.
    pub pics: [Pic; 2],
    pub ioapic: Ioapic,
    pub pit: Pit,
}

/// The guest's clock and the host's at the moment it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Clock {
    pub kvmclock_ns: u64,
    pub host: HostClocks,
    pub host_tsc_khz: u32,
}

/// An 8259, all of `struct kvm_pic_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Pic {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// The I/O APIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Ioapic {
    pub base_address: u64,
    pub ioregsel: u32,
    pub id: u32,
    pub irr: u32,
    pub redirections: [u64; 24],
}

/// The programmable interval timer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Pit {
    pub channels: [PitChannel; 3],
    pub flags: u32,
}

/// A channel of the PIT, all of `struct kvm_pit_channel_state` but the time of its last load, which is in
/// the host's clock and set afresh by KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct PitChannel {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
}

/// A part of a VM's state that is read and written by a call of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Piece {
    PicPrimary,
    PicSecondary,
    Ioapic,
    Pit,
    Clock,
}

/// The chips, restored after the vCPUs: the I/O APIC delivers what is pending as it is restored, and the
/// local APICs must be there to take it.
pub const CHIPS: [Piece; 4] = [Piece::PicPrimary, Piece::PicSecondary, Piece::Ioapic, Piece::Pit];

/// Saves the VM; all vCPUs are out of KVM_RUN.
///
/// # Errors
/// The first call that fails.
pub fn save(vm: &VmFd, context: &SaveContext) -> Result<VmState, KvmError> {
    let pics = [read_pic(vm, KVM_IRQCHIP_PIC_MASTER)?, read_pic(vm, KVM_IRQCHIP_PIC_SLAVE)?];
    let ioapic = read_ioapic(vm)?;
    let pit = Pit::from(vm.get_pit2().call("KVM_GET_PIT2")?);
    let kvmclock_ns = vm.get_clock().call("KVM_GET_CLOCK")?.clock;
    let host = HostClocks::read(context.boot_id);
    let clock = Clock { kvmclock_ns, host, host_tsc_khz: context.host_tsc_khz };
    Ok(VmState { clock, pics, ioapic, pit })
}

/// Sets the guest's clock: before any vCPU is restored (writing its wall-clock MSR uses it) or runs.
///
/// # Errors
/// KVM_SET_CLOCK's.
pub fn restore_clock(vm: &VmFd, state: &VmState, time: &TimePlan) -> Result<(), KvmError> {
    restore_pieces(vm, state, time, &[Piece::Clock])
}

/// Restores interrupt controllers and PIT: after the vCPUs, before any of them runs.
///
/// # Errors
/// The first call that fails.
pub fn restore_chips(vm: &VmFd, state: &VmState, time: &TimePlan) -> Result<(), KvmError> {
    restore_pieces(vm, state, time, &CHIPS)
}

impl VmState {
    /// The state as a section.
    pub fn to_section(&self) -> Section {
        Section::critical(NAME, 0, SCHEMA, self)
    }

    /// Reads what [`VmState::to_section`] made.
    ///
    /// # Errors
    /// [`KvmError::Name`], [`KvmError::Version`] or [`KvmError::Section`].
    pub fn from_section(section: &Section) -> Result<Self, KvmError> {
        crate::state::decode(section, NAME, SCHEMA)
    }
}

/// Restores only the given pieces.
pub(crate) fn restore_pieces(
    vm: &VmFd,
    state: &VmState,
    time: &TimePlan,
    pieces: &[Piece],
) -> Result<(), KvmError> {
    for piece in pieces {
        match piece {
            Piece::PicPrimary => write_pic(vm, KVM_IRQCHIP_PIC_MASTER, &state.pics[0])?,
            Piece::PicSecondary => write_pic(vm, KVM_IRQCHIP_PIC_SLAVE, &state.pics[1])?,
            Piece::Ioapic => write_ioapic(vm, &state.ioapic)?,
            Piece::Pit => vm.set_pit2(&(&state.pit).into()).call("KVM_SET_PIT2")?,
            Piece::Clock => {
                let clock = time.kvmclock_ns(state.clock.kvmclock_ns);
                vm.set_clock(&kvm_clock_data { clock, ..Default::default() }).call("KVM_SET_CLOCK")?;
            }
        }
    }
    Ok(())
}

fn read_chip(vm: &VmFd, chip_id: u32) -> Result<kvm_irqchip, KvmError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).call("KVM_GET_IRQCHIP")?;
    Ok(chip)
}

fn read_pic(vm: &VmFd, chip_id: u32) -> Result<Pic, KvmError> {
    // SAFETY: every bit pattern is a valid kvm_pic_state; it is what the kernel fills for this chip.
    Ok(Pic::from(unsafe { read_chip(vm, chip_id)?.chip.pic }))
}

fn write_pic(vm: &VmFd, chip_id: u32, pic: &Pic) -> Result<(), KvmError> {
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    chip.chip.pic = pic.into();
    vm.set_irqchip(&chip).call("KVM_SET_IRQCHIP")
}

fn read_ioapic(vm: &VmFd) -> Result<Ioapic, KvmError> {
    let chip = read_chip(vm, KVM_IRQCHIP_IOAPIC)?;
    // SAFETY: every bit pattern is a valid kvm_ioapic_state; it is what the kernel fills for this chip.
    let state: kvm_ioapic_state = unsafe { chip.chip.ioapic };
    let kvm_ioapic_state { base_address, ioregsel, id, irr, .. } = state;
    // SAFETY: `bits` covers all of the entry.
    let redirections = state.redirtbl.map(|r| unsafe { r.bits });
    Ok(Ioapic { base_address, ioregsel, id, irr, redirections })
}

fn write_ioapic(vm: &VmFd, ioapic: &Ioapic) -> Result<(), KvmError> {
    let Ioapic { base_address, ioregsel, id, irr, redirections } = *ioapic;
    let redirtbl = redirections.map(|bits| kvm_bindings::kvm_ioapic_state__bindgen_ty_1 { bits });
    let state = kvm_ioapic_state { base_address, ioregsel, id, irr, pad: 0, redirtbl };
    let chip = kvm_irqchip__bindgen_ty_1 { ioapic: state };
    vm.set_irqchip(&kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, pad: 0, chip }).call("KVM_SET_IRQCHIP")
}

macro_rules! same_fields {
    ($ours:ident, $theirs:ident, { $($field:ident),* }, { $($extra:tt)* }) => {
        impl From<$theirs> for $ours {
            fn from(theirs: $theirs) -> Self {
                Self { $($field: theirs.$field),* }
            }
        }
        impl From<&$ours> for $theirs {
            fn from(ours: &$ours) -> Self {
                Self { $($field: ours.$field,)* $($extra)* }
            }
        }
    };
}

same_fields!(Pic, kvm_pic_state, {
    last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
    auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask
}, {});

same_fields!(PitChannel, kvm_pit_channel_state, {
    count, latched_count, count_latched, status_latched, status, read_state, write_state, write_latch,
    rw_mode, mode, bcd, gate
}, { count_load_time: 0 });

impl From<kvm_pit_state2> for Pit {
    fn from(pit: kvm_pit_state2) -> Self {
        Self { channels: pit.channels.map(PitChannel::from), flags: pit.flags }
    }
}

impl From<&Pit> for kvm_pit_state2 {
    fn from(pit: &Pit) -> Self {
        let channels = pit.channels.each_ref().map(kvm_pit_channel_state::from);
        Self { channels, flags: pit.flags, reserved: [0; 9] }
    }
}

#[cfg(test)]
mod tests;
