//! The receiving side: a machine made to a source's description, filled, and run.

use std::time::{Duration, Instant};

use mig::domain::PAGE_BYTES;
use mig::{
    BoxError, Description, DestinationVm, GuestRam, Incoming, Refusal, RestoreState, ResumeCosts, RunPermit,
    Section,
};
use mig_kvm::state::Prepared;
use mig_kvm::{GuestTime, compat, time};

use crate::console::Console;
use crate::cpuid;
use crate::error::VmmError;
use crate::layout::{self, MAX_MEMORY_BYTES, MAX_VCPUS, MIN_MEMORY_BYTES};
use crate::machine::Machine;
use crate::memory;
use crate::monitor::Monitor;
use crate::platform::{Platform, open_kvm};
use crate::sections;
use crate::tracking::Tracking;

/// What opening the gate takes as a rule, until the last vCPU is in (measured on two cores: 0.03 to 0.1 ms with two).
fn expected_resume(vcpus: usize) -> Duration {
    Duration::from_micros(20 + 15 * vcpus as u64)
}

/// Makes machines for guests that arrive.
pub struct Receiver {
    /// Makes the console of each.
    console: Box<dyn FnMut() -> Console + Send>,
    /// The most memory that a guest may have, if it is to be less than the host has.
    max_memory_bytes: Option<u64>,
    /// How the machines' writes are found when they move on.
    tracking: Tracking,
}

impl Receiver {
    /// A receiver whose machines write to what `console` makes.
    pub fn new(console: impl FnMut() -> Console + Send + 'static) -> Self {
        Self { console: Box::new(console), max_memory_bytes: None, tracking: Tracking::default() }
    }

    /// Refuses guests with more memory than this.
    pub fn max_memory_bytes(self, bytes: u64) -> Self {
        Self { max_memory_bytes: Some(bytes), ..self }
    }

    /// Chooses how the machines' writes are found when they move on.
    pub fn tracking(self, tracking: Tracking) -> Self {
        Self { tracking, ..self }
    }

    fn refusals(&self, description: &Description) -> Vec<Refusal> {
        let mut refusals = shape(description);
        let bytes = total(description);
        if let Some(most) = self.max_memory_bytes.filter(|most| bytes > *most) {
            refusals.push(Refusal::new(
                "memory",
                format!("the guest has {}, this receiver takes {} at most", mib(bytes), mib(most)),
                "allow the receiver more, or give the guest less",
            ));
        }
        if let Some(free) = memory::available_bytes().filter(|free| bytes > *free) {
            refusals.push(Refusal::new(
                "memory",
                format!("the guest has {}, this host has {} available", mib(bytes), mib(free)),
                "free memory on the destination, or take another",
            ));
        }
        match open_kvm() {
            Err(e) => refusals.push(failed("kvm", &e, "see that KVM works on the destination")),
            Ok(kvm) => match (described(description, compat::NAME), guest_time(description)) {
                (Some(section), Ok(time)) => refusals.extend(compat::check(&kvm, section, time)),
                (cpu, time) => {
                    if cpu.is_none() {
                        refusals.push(undescribed("cpu", compat::NAME));
                    }
                    if let Err(e) = time {
                        refusals.push(failed("guest time", &e, "use the same release on both sides"));
                    }
                }
            },
        }
        refusals
    }
}

impl Incoming for Receiver {
    type Vm = IncomingMachine;

    fn prepare(&mut self, description: &Description) -> Result<IncomingMachine, Vec<Refusal>> {
        let refusals = self.refusals(description);
        if !refusals.is_empty() {
            return Err(refusals);
        }
        let made = Platform::new(total(description), description.vcpus, (self.console)(), self.tracking)
            .and_then(|platform| with_cpu(platform, description));
        let ready = made.map_err(|e| {
            let remedy = match e {
                VmmError::Memory(_) => "free memory on the destination, or take another",
                _ => "see the cause, or take another destination",
            };
            vec![failed("machine", &e, remedy)]
        })?;
        let boot_id = time::boot_id().ok();
        let same_boot = boot_id.is_some() && boot_id == description.boot_id;
        Ok(IncomingMachine {
            guest_time: guest_time(description).unwrap_or_default(),
            filling: Filling::Empty(Box::new(ready)),
            same_boot,
            last_beat_there_ns: 0,
        })
    }
}

/// A machine that waits for its guest.
struct Ready {
    platform: Platform,
    /// What its vCPUs hold until then.
    prepared: Prepared,
    /// Its CPU, for the move after this one.
    cpu: Section,
    /// What restoring cost when it was rehearsed.
    load_cost: Duration,
}

/// Gives the vCPUs the CPU of the guest to come, and does all else that would otherwise fall into the pause.
fn with_cpu(mut platform: Platform, description: &Description) -> Result<Ready, VmmError> {
    if let Some(section) = described(description, compat::NAME) {
        compat::adopt(&platform.locked_vcpus(), section, cpuid::place)?;
    }
    let cpu = platform.describe_cpu()?;
    platform.save_cost = sections::rehearse_save(&platform)?;
    let load_cost = sections::rehearse_load(&platform)?;
    // Last: from here on nothing changes what the vCPUs hold.
    let prepared = Prepared::read(&platform.locked_vcpus(), platform.save_context()?)?;
    Ok(Ready { platform, prepared, cpu, load_cost })
}

fn described<'a>(description: &'a Description, name: &str) -> Option<&'a Section> {
    description.platform.iter().find(|s| s.name == name)
}

/// What the guest's time is to do; a source that does not say lets it advance.
fn guest_time(description: &Description) -> Result<GuestTime, mig_kvm::KvmError> {
    described(description, time::NAME).map_or(Ok(GuestTime::Advance), GuestTime::from_section)
}

fn undescribed(what: &str, section: &str) -> Refusal {
    let cause = format!("the source does not describe it (no section {section})");
    Refusal::new(what, cause, "use the same VMM on both sides")
}

/// What is wrong with the description itself.
fn shape(description: &Description) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    let mut refuse =
        |what: &str, cause: String, remedy: &str| refusals.push(Refusal::new(what, cause, remedy));
    let here = std::env::consts::ARCH;
    if description.architecture != here {
        let cause = format!("the guest's is {}, this host's {here}", description.architecture);
        refuse("architecture", cause, "take a destination of the same architecture");
    }
    if u64::from(description.page_bytes) != PAGE_BYTES {
        let cause =
            format!("the source counts pages of {} bytes, this side of {PAGE_BYTES}", description.page_bytes);
        refuse("page size", cause, "use the same VMM on both sides");
    }
    if !(1..=u32::from(MAX_VCPUS)).contains(&description.vcpus) {
        let cause = format!("the guest has {}, a machine here has 1 to {MAX_VCPUS}", description.vcpus);
        refuse("vCPUs", cause, "give the guest fewer");
    }
    let bytes = total(description);
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&bytes) {
        let cause = format!(
            "the guest has {bytes} bytes, a machine here has {MIN_MEMORY_BYTES} to {MAX_MEMORY_BYTES}"
        );
        refuse("memory", cause, "give the guest more or less");
    } else if description.regions != layout::regions(bytes) {
        let cause = format!("the guest's {} lie at other addresses than here", mib(bytes));
        refuse("memory layout", cause, "use the same VMM on both sides");
    }
    let known = sections::schemas();
    for schema in description.schemas.iter().filter(|s| !known.contains(s)) {
        let cause = match known.iter().find(|k| k.name == schema.name) {
            Some(ours) => {
                format!("the source sends version {}, this side knows {}", schema.version, ours.version)
            }
            None => format!("this side does not know it (version {})", schema.version),
        };
        refuse(&format!("state {}", schema.name), cause, "use the same release on both sides");
    }
    for ours in known.iter().filter(|k| description.schemas.iter().all(|s| s.name != k.name)) {
        refuse(
            &format!("state {}", ours.name),
            "the source does not send it, and a machine here needs it".into(),
            "use the same release on both sides",
        );
    }
    let ours = [compat::NAME, time::NAME];
    for section in description.platform.iter().filter(|s| s.critical && !ours.contains(&s.name.as_str())) {
        refuse(
            &format!("description {}", section.name),
            format!("this side does not know it (version {})", section.version),
            "use the same release on both sides",
        );
    }
    refusals
}

fn failed(what: &str, error: &dyn std::error::Error, remedy: &str) -> Refusal {
    let mut cause = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        cause = format!("{cause}: {source}");
        next = source.source();
    }
    Refusal::new(what, cause, remedy)
}

fn total(description: &Description) -> u64 {
    description.regions.iter().fold(0, |sum: u64, r| sum.saturating_add(r.bytes))
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

/// A machine that is being filled, and then runs.
pub struct IncomingMachine {
    filling: Filling,
    /// What its time is to do.
    guest_time: GuestTime,
    /// Whether the source's CLOCK_MONOTONIC is this side's too.
    same_boot: bool,
    last_beat_there_ns: u64,
}

enum Filling {
    Empty(Box<Ready>),
    Restored(Box<Machine>),
    /// Restoring failed.
    Broken,
}

impl IncomingMachine {
    /// The machine, once it was restored: to hold it, or to send it on. `None` before.
    pub fn into_machine(self) -> Option<Machine> {
        match self.filling {
            Filling::Restored(machine) => Some(*machine),
            Filling::Empty(_) | Filling::Broken => None,
        }
    }

    /// A view for other threads, once it was restored.
    pub fn monitor(&self) -> Option<Monitor> {
        match &self.filling {
            Filling::Restored(machine) => Some(machine.monitor()),
            Filling::Empty(_) | Filling::Broken => None,
        }
    }
}

/// For calls in an order that the engine never makes.
fn out_of_order() -> BoxError {
    VmmError::NotPaused.into()
}

impl RestoreState for IncomingMachine {
    fn restore(&mut self, sections: &[Section]) -> Result<(), BoxError> {
        let Filling::Empty(ready) = std::mem::replace(&mut self.filling, Filling::Broken) else {
            return Err(out_of_order());
        };
        let Ready { mut platform, prepared, cpu, load_cost: _ } = *ready;
        let (state, time) = sections::restore(&mut platform, &prepared, sections, self.guest_time)?;
        self.last_beat_there_ns = state.heartbeat.last_ns;
        self.filling = Filling::Restored(Box::new(Machine::arrived(platform, cpu, state.workload, time)));
        Ok(())
    }
}

impl DestinationVm for IncomingMachine {
    fn memory(&self) -> GuestRam {
        match &self.filling {
            Filling::Empty(ready) => GuestRam::from_vm_memory(ready.platform.memory.clone()),
            Filling::Restored(machine) => mig::SourceVm::memory(&**machine),
            Filling::Broken => unreachable!("a guest whose state was refused is discarded"),
        }
    }

    fn resume_costs(&self) -> ResumeCosts {
        match &self.filling {
            Filling::Empty(ready) => {
                ResumeCosts { load: ready.load_cost, resume: expected_resume(ready.platform.vcpus.len()) }
            }
            Filling::Restored(_) | Filling::Broken => ResumeCosts::default(),
        }
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError> {
        let _spent = permit;
        match &mut self.filling {
            Filling::Restored(machine) => Ok(machine.run()?),
            Filling::Empty(_) | Filling::Broken => Err(out_of_order()),
        }
    }

    fn running_since(&self) -> Option<Instant> {
        match &self.filling {
            Filling::Restored(machine) => machine.running_since(),
            Filling::Empty(_) | Filling::Broken => None,
        }
    }

    fn guest_gap(&mut self, patience: Duration) -> Option<Duration> {
        let Filling::Restored(machine) = &self.filling else { return None };
        if !self.same_boot || self.last_beat_there_ns == 0 {
            return None;
        }
        let deadline = Instant::now() + patience;
        let monitor = machine.monitor();
        loop {
            match monitor.bus.heartbeat.first_here_ns() {
                0 if Instant::now() < deadline => std::thread::sleep(Duration::from_micros(200)),
                0 => return None,
                first => return first.checked_sub(self.last_beat_there_ns).map(Duration::from_nanos),
            }
        }
    }
}

#[cfg(test)]
impl IncomingMachine {
    /// The memory to fill, for tests without an engine.
    pub(crate) fn platform_memory(&self) -> std::sync::Arc<memory::Ram> {
        match &self.filling {
            Filling::Empty(ready) => ready.platform.memory.clone(),
            Filling::Restored(_) | Filling::Broken => panic!("filled already"),
        }
    }

    /// The restored machine, for tests that hold no permit.
    pub(crate) fn machine(&mut self) -> &mut Machine {
        match &mut self.filling {
            Filling::Restored(machine) => machine,
            Filling::Empty(_) | Filling::Broken => panic!("not restored"),
        }
    }
}
