//! All of a guest's KVM state at once, in the one order that is right: VM and vCPUs depend on each other.

use std::ops::Deref;

use kvm_ioctls::{VcpuFd, VmFd};
use mig::{Section, body};
use serde::de::DeserializeOwned;

use crate::cap::Caps;
use crate::error::{Call, KvmError};
use crate::time::{GuestTime, TimePlan};
use crate::vcpu::tsc::Mover;
use crate::vcpu::{self, Given, REHEARSED, RestoreContext, SaveContext, VcpuState};
use crate::vm::{self, VmState};

/// The KVM side of a guest, saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmState {
    /// Chips and clock.
    pub vm: VmState,
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuState>,
}

/// Saves vCPUs and VM. Every vCPU is out of KVM_RUN ([`crate::Gate::close`]); `vcpus` are its vCPUs by index,
/// locked: references, or the mutexes' guards.
///
/// # Errors
/// The first call that fails; nothing is ever left out.
pub fn save<V: Deref<Target = VcpuFd>>(
    vm: &VmFd,
    vcpus: &[V],
    context: &SaveContext,
) -> Result<KvmState, KvmError> {
    same_count(context.given.len(), vcpus.len())?;
    let one = |(vcpu, given): (&V, &Given)| vcpu::save(vcpu, given, context);
    let vcpus = vcpus.iter().zip(&context.given).map(one).collect::<Result<_, _>>()?;
    // The clock last: what passed since it was read is what the guest's time advances by.
    Ok(KvmState { vm: vm::save(vm, context)?, vcpus })
}

/// What the vCPUs hold that wait for a guest's state, read before it comes, so that it need not be written
/// again while the guest is paused.
#[derive(Debug, Clone)]
pub struct Prepared {
    fresh: Vec<VcpuState>,
    mover: Mover,
}

impl Prepared {
    /// Reads vCPUs that have never run, and never do before their state is restored; all that can be given to
    /// them before that they have ([`crate::compat::adopt`]).
    ///
    /// # Errors
    /// The first call that fails.
    pub fn read<V: Deref<Target = VcpuFd>>(vcpus: &[V], context: &SaveContext) -> Result<Self, KvmError> {
        same_count(context.given.len(), vcpus.len())?;
        let first = vcpus.first().ok_or(KvmError::NoSuchVcpu { vcpu: 0 })?;
        let mover = Mover::probe(first)?;
        vcpus.iter().try_for_each(|vcpu| mover.rejoin(vcpu))?;
        let one = |(vcpu, given): (&V, &Given)| vcpu::save(vcpu, given, context);
        let fresh = vcpus.iter().zip(&context.given).map(one).collect::<Result<_, _>>()?;
        Ok(Self { fresh, mover })
    }
}

/// Restores them into a VM and vCPUs that have never run, guest memory in place; returns how time went on.
/// `context` is brought up to date with what the vCPUs were given.
///
/// # Errors
/// The first call that fails; the guest is of no use afterwards.
pub fn restore<V: Deref<Target = VcpuFd>>(
    vm: &VmFd,
    vcpus: &[V],
    state: &KvmState,
    prepared: &Prepared,
    context: &mut SaveContext,
    choice: GuestTime,
) -> Result<TimePlan, KvmError> {
    same_count(state.vcpus.len(), vcpus.len())?;
    same_count(prepared.fresh.len(), vcpus.len())?;
    let saved = &state.vm.clock;
    let time = TimePlan::new(choice, saved.host, saved.host_tsc_khz, context.boot_id);
    vm::restore_clock(vm, &state.vm, &time)?;
    let (host_tsc_khz, mover) = (context.host_tsc_khz, prepared.mover);
    let restoring = RestoreContext { caps: &context.caps, host_tsc_khz, mover, time };
    let each = vcpus.iter().zip(&state.vcpus).zip(&prepared.fresh).zip(&mut context.given);
    for (((vcpu, state), fresh), given) in each {
        if vcpu::restore(vcpu, state, fresh, &restoring)? {
            *given = Given::read(vcpu)?;
        }
    }
    vm::restore_chips(vm, &state.vm, &time)?;
    for (vcpu, _) in vcpus.iter().zip(&state.vcpus).filter(|(_, state)| state.has_kvmclock()) {
        tell(vcpu, &context.caps)?;
    }
    Ok(time)
}

/// Restores into vCPUs that have never run what they were just saved with, to see what restoring a guest will
/// cost: the calls are made, and change nothing.
///
/// # Errors
/// The first call that fails.
pub fn rehearse_restore<V: Deref<Target = VcpuFd>>(
    vcpus: &[V],
    state: &KvmState,
    context: &SaveContext,
) -> Result<(), KvmError> {
    same_count(state.vcpus.len(), vcpus.len())?;
    let SaveContext { caps, host_tsc_khz, .. } = context;
    let saved = &state.vm.clock;
    let time = TimePlan::new(GuestTime::Advance, saved.host, saved.host_tsc_khz, context.boot_id);
    let mover = Mover::Stuck { attribute: false };
    let restoring = RestoreContext { caps, host_tsc_khz: *host_tsc_khz, mover, time };
    vcpus
        .iter()
        .zip(&state.vcpus)
        .try_for_each(|(vcpu, state)| vcpu::restore_pieces(vcpu, state, state, &restoring, &REHEARSED))
}

/// Has a guest with kvmclock know that it was stopped, so that its watchdogs stay quiet: before it runs again
/// after a pause, however it came to that. Without kvmclock, in KVM or in the guest, there is nothing to tell.
///
/// # Errors
/// KVM_KVMCLOCK_CTRL's.
pub fn tell_stopped<V: Deref<Target = VcpuFd>>(vcpus: &[V], caps: &Caps) -> Result<(), KvmError> {
    vcpus.iter().try_for_each(|vcpu| tell(vcpu, caps))
}

fn tell(vcpu: &VcpuFd, caps: &Caps) -> Result<(), KvmError> {
    if !caps.kvmclock_ctrl {
        return Ok(());
    }
    match vcpu.kvmclock_ctrl() {
        // The guest has no kvmclock (yet).
        Err(e) if e.errno() == libc::EINVAL => Ok(()),
        result => result.call("KVM_KVMCLOCK_CTRL"),
    }
}

fn same_count(state: usize, vcpus: usize) -> Result<(), KvmError> {
    match state == vcpus {
        true => Ok(()),
        false => Err(KvmError::DoesNotFit { why: format!("state of {state} vcpus for a guest of {vcpus}") }),
    }
}

impl KvmState {
    /// One section for the VM and one for each vCPU.
    pub fn to_sections(&self) -> Vec<Section> {
        let vcpus = self.vcpus.iter().zip(0u32..).map(|(state, index)| state.to_section(index));
        std::iter::once(self.vm.to_section()).chain(vcpus).collect()
    }

    /// Picks its sections out of all that came; others are for other devices.
    ///
    /// # Errors
    /// [`KvmError::DoesNotFit`] when one is missing or there twice, or what reading it says.
    pub fn from_sections(sections: &[Section], vcpus: usize) -> Result<Self, KvmError> {
        let only = |name: &'static str, instance: usize| {
            let mut found =
                sections.iter().filter(|s| s.name == name && usize::try_from(s.instance) == Ok(instance));
            match (found.next(), found.next()) {
                (Some(section), None) => Ok(section),
                (first, _) => {
                    let how = if first.is_some() { "there twice" } else { "missing" };
                    Err(KvmError::DoesNotFit { why: format!("section {name} {instance} is {how}") })
                }
            }
        };
        let vm = VmState::from_section(only(vm::NAME, 0)?)?;
        let count = sections.iter().filter(|s| s.name == vcpu::NAME).count();
        same_count(count, vcpus)?;
        let vcpus =
            (0..vcpus).map(|i| VcpuState::from_section(only(vcpu::NAME, i)?)).collect::<Result<_, _>>()?;
        Ok(Self { vm, vcpus })
    }
}

/// Reads a section of the name and version that are known.
pub(crate) fn decode<T: DeserializeOwned>(
    section: &Section,
    name: &'static str,
    known: u16,
) -> Result<T, KvmError> {
    if section.name != name {
        return Err(KvmError::Name { expected: name, found: section.name.clone() });
    }
    if section.version != known {
        return Err(KvmError::Version { name: name.into(), version: section.version, known });
    }
    Ok(body::decode(name, &section.body)?)
}

#[cfg(test)]
mod tests;
