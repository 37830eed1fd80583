//! A machine that runs here: booted here, or arrived from elsewhere.
//!
//! Its owner may pause and resume it, look at it through a [`Monitor`], or hand it to [`mig::migrate`], which
//! takes it as a [`SourceVm`].

use std::time::{Duration, Instant};

use mig::policy::Throttle;
use mig::{
    BoxError, Description, DirtyTracker, GuestRam, PauseCosts, RunPermit, SaveState, Section, SourceVm,
    VmControl,
};
use mig_kvm::{GuestTime, TimePlan, state, throttle, time};

use crate::boot::{self, Workload};
use crate::bus::lock;
use crate::console::Console;
use crate::error::VmmError;
use crate::layout;
use crate::monitor::{End, Monitor, RunState};
use crate::platform::{Platform, check_size};
use crate::sections;
use crate::tracking::Tracking;
use crate::workload::{Guest, Verified};

/// How long vCPUs may take to stop. They stop within a fraction of a millisecond, unless the host is
/// overcommitted.
const PAUSE_PATIENCE: Duration = Duration::from_secs(10);

/// What pausing takes as a rule: a kick, and each vCPU's way out of KVM_RUN and off the core (measured on two
/// cores: 0.1 to 0.2 ms with one or two that are busy, 0.5 ms with 16).
fn expected_pause(vcpus: usize) -> Duration {
    Duration::from_micros(160 + 20 * vcpus as u64)
}

/// How long a report waits for vCPUs to enter: the host may be busy, and the report is not to be late for that.
const ENTRY_PATIENCE: Duration = Duration::from_millis(1);

/// What to boot.
#[derive(Debug)]
pub struct MachineConfig {
    /// Bytes of memory: whole pages, [`layout::MIN_MEMORY_BYTES`] to [`layout::MAX_MEMORY_BYTES`].
    pub memory_bytes: u64,
    /// vCPUs, 1 to [`layout::MAX_VCPUS`].
    pub vcpus: u8,
    /// What it runs.
    pub workload: Workload,
    /// Where its serial output goes.
    pub console: Console,
    /// How its writes are found when it moves.
    pub tracking: Tracking,
}

/// A virtual machine. Dropping it ends it, whatever it is doing.
pub struct Machine {
    pub(crate) platform: Platform,
    /// What the guest was given, as the destination of the next move will want to know.
    cpu: Section,
    workload: String,
    /// It ran here and was paused: it is to be told before it runs again.
    interrupted: bool,
    /// What its time does in the next move.
    guest_time: GuestTime,
    /// How its time went on when it arrived here.
    arrival: Option<TimePlan>,
}

impl Machine {
    /// Makes a machine with its guest loaded: paused at its first instruction.
    ///
    /// # Errors
    /// What is wrong with the configuration, its files or the host, with a remedy.
    pub fn boot(config: MachineConfig) -> Result<Self, VmmError> {
        let MachineConfig { memory_bytes, vcpus, workload, console, tracking } = config;
        check_size(memory_bytes, vcpus.into())?;
        let mut platform = Platform::new(memory_bytes, vcpus.into(), console, tracking)?;
        platform.set_cpuid()?;
        let tsc_khz = lock(&platform.vcpus[0])
            .get_tsc_khz()
            .map_err(VmmError::kvm("asking for the TSC's frequency"))?;
        let start = boot::load(&workload, &platform.memory, memory_bytes, vcpus, tsc_khz)?;
        for (index, vcpu) in platform.vcpus.iter().enumerate() {
            let vcpu = lock(vcpu);
            let sregs = vcpu.get_sregs().map_err(VmmError::kvm("reading a vCPU's registers"))?;
            let Some((regs, sregs)) = start.registers(index, sregs) else { continue };
            vcpu.set_sregs(&sregs).map_err(VmmError::kvm("setting a vCPU's segments"))?;
            vcpu.set_regs(&regs).map_err(VmmError::kvm("setting a vCPU's registers"))?;
            let runnable = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_RUNNABLE };
            vcpu.set_mp_state(runnable).map_err(VmmError::kvm("making a vCPU runnable"))?;
        }
        let cpu = platform.describe_cpu()?;
        platform.save_cost = sections::rehearse_save(&platform)?;
        Ok(Self {
            platform,
            cpu,
            workload: workload.to_string(),
            interrupted: false,
            guest_time: GuestTime::Advance,
            arrival: None,
        })
    }

    /// A machine of parts whose vCPUs have all their state and do not run.
    pub(crate) fn arrived(platform: Platform, cpu: Section, workload: String, time: TimePlan) -> Self {
        let (interrupted, guest_time) = (false, GuestTime::Advance);
        Self { platform, cpu, workload, interrupted, guest_time, arrival: Some(time) }
    }

    /// Starts or continues the guest.
    ///
    /// # Errors
    /// [`VmmError::Ended`] when the guest is over.
    pub fn run(&mut self) -> Result<(), VmmError> {
        self.not_ended()?;
        if std::mem::take(&mut self.interrupted) {
            // A guest that is not told may complain; one that is not run is worse off.
            if let Err(error) = state::tell_stopped(&self.platform.locked_vcpus(), &self.platform.caps) {
                tracing::warn!(%error, "the guest does not know that it was paused");
            }
        }
        self.platform.status.set(RunState::Running);
        self.platform.gate.open();
        Ok(())
    }

    /// Stops the guest until [`Machine::run`]; returns when no vCPU runs.
    ///
    /// # Errors
    /// [`VmmError::Ended`] when the guest is over; [`VmmError::State`] when a vCPU does not stop, in which
    /// case the guest runs on.
    pub fn pause(&mut self) -> Result<(), VmmError> {
        if let Err(e) = self.platform.gate.close(PAUSE_PATIENCE) {
            self.platform.gate.open();
            return Err(e.into());
        }
        // Under the port's lock, as `Monitor::feed_serial` looks at it: from here on no input is taken from
        // anybody and no interrupt raised, so what was taken is in the state that is saved.
        let serial = lock(&self.platform.bus.serial);
        self.platform.status.set(RunState::Paused);
        drop(serial);
        self.interrupted = true;
        self.not_ended()
    }

    /// When its last vCPU was let in after it was started; `None` if that does not come soon.
    pub(crate) fn running_since(&self) -> Option<Instant> {
        self.platform.gate.await_entry(ENTRY_PATIENCE)
    }

    /// Ends the machine and gives its memory back.
    pub fn end(self) {
        drop(self);
    }

    /// A view for other threads.
    pub fn monitor(&self) -> Monitor {
        Monitor {
            status: self.platform.status.clone(),
            bus: self.platform.bus.clone(),
            memory: self.platform.memory.clone(),
            rings: self.platform.log.rings().cloned(),
            vcpus: self.platform.vcpus.len() as u8,
            memory_bytes: self.platform.memory_bytes,
        }
    }

    /// What it runs, for people.
    pub fn workload(&self) -> &str {
        &self.workload
    }

    /// Chooses what guest time does across the pause of the next move: it advances unless told otherwise. A
    /// destination whose KVM cannot let it stand still refuses the guest before a page moves.
    pub fn choose_guest_time(&mut self, choice: GuestTime) {
        self.guest_time = choice;
    }

    /// How guest time went on when the machine arrived here; `None` for one that was booted here.
    pub fn arrival(&self) -> Option<&TimePlan> {
        self.arrival.as_ref()
    }

    /// The built-in guest in its memory, if there is one.
    pub fn built_in(&self) -> Option<Guest> {
        Guest::in_memory(&self.platform.memory)
    }

    /// Has a built-in guest's memory checked from outside: `None` when something else runs here.
    ///
    /// # Errors
    /// [`VmmError::Verify`] with the first page that is wrong; [`VmmError::NotPaused`].
    pub fn verify(&self) -> Result<Option<Verified>, VmmError> {
        if self.platform.status.state() == RunState::Running {
            return Err(VmmError::NotPaused);
        }
        let guest = self.built_in();
        Ok(guest.map(|g| g.verify(&self.platform.memory)).transpose()?)
    }

    fn not_ended(&self) -> Result<(), VmmError> {
        match (self.platform.status.state(), self.platform.status.ending()) {
            (RunState::Ended, end) => {
                Err(VmmError::Ended(end.unwrap_or(End::Error("the machine is gone".into()))))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
impl Machine {
    /// Its parts, for tests.
    pub(crate) fn platform(&self) -> &Platform {
        &self.platform
    }
}

impl VmControl for Machine {
    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(Machine::pause(self)?)
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, throttle: Throttle) -> Result<(), BoxError> {
        Ok(self.platform.throttler.set(throttle)?)
    }

    fn processor_times(&self) -> Vec<Duration> {
        let times = self.platform.gate.processor_times();
        // those that write little are let be, and so do not count
        let Some(rings) = self.platform.log.rings() else { return times };
        let writers = throttle::writers(&rings.written_by_vcpu());
        let of_writer = |(time, writes)| if writes { time } else { Duration::ZERO };
        times.into_iter().zip(writers).map(of_writer).collect()
    }

    /// A guest that has ended by itself is here as well as it can be: that is no failure to resume it.
    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError> {
        let _spent = permit;
        match self.run() {
            Ok(()) | Err(VmmError::Ended(_)) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl SaveState for Machine {
    fn save(&mut self) -> Result<Vec<Section>, BoxError> {
        if self.platform.status.state() != RunState::Paused {
            return Err(VmmError::NotPaused.into());
        }
        Ok(sections::save(&self.platform, &self.workload)?)
    }
}

impl SourceVm for Machine {
    fn describe(&self) -> Result<Description, BoxError> {
        // That time goes on is what a destination takes for granted.
        let stop = (self.guest_time == GuestTime::Stop).then(|| self.guest_time.to_section());
        Ok(Description {
            architecture: std::env::consts::ARCH.into(),
            page_bytes: mig::domain::PAGE_BYTES as u32,
            vcpus: self.platform.vcpus.len() as u32,
            regions: layout::regions(self.platform.memory_bytes),
            boot_id: time::boot_id().ok(),
            schemas: sections::schemas(),
            platform: std::iter::once(self.cpu.clone()).chain(stop).collect(),
        })
    }

    fn memory(&self) -> GuestRam {
        GuestRam::from_vm_memory(self.platform.memory.clone()).skip_untouched()
    }

    fn pause_costs(&self) -> PauseCosts {
        PauseCosts { pause: expected_pause(self.platform.vcpus.len()), save: self.platform.save_cost }
    }

    fn tracker(&mut self) -> &mut dyn DirtyTracker {
        &mut self.platform.log
    }
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine").field("workload", &self.workload).finish_non_exhaustive()
    }
}
