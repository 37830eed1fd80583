//! The machine's state as sections: KVM's, and one for each device of ours.
//!
//! Invariant: what [`save`] makes is what [`SCHEMAS`] lists, all of it critical, and [`restore`] wants each
//! exactly once.

use std::time::{Duration, Instant};

use mig::describe::Schema;
use mig::{Section, body};
use mig_kvm::state::{self, KvmState, Prepared};
use mig_kvm::time::{self, GuestTime, TimePlan};
use mig_kvm::{compat, vcpu, vm};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::bus::lock;
use crate::devices::cmos::{Cmos, CmosState};
use crate::devices::heartbeat::HeartbeatState;
use crate::devices::i8042::I8042;
use crate::devices::serial::SerialState;
use crate::error::VmmError;
use crate::platform::Platform;

const MACHINE: &str = "vmm.machine";
const SERIAL: &str = "vmm.serial";
const CMOS: &str = "vmm.cmos";
const KEYBOARD: &str = "vmm.i8042";
/// The version of all of them.
const VERSION: u16 = 1;
const OURS: [&str; 4] = [MACHINE, SERIAL, CMOS, KEYBOARD];

/// What a machine's state is sent as.
pub(crate) fn schemas() -> Vec<Schema> {
    let kvm = [(vm::NAME, vm::SCHEMA), (vcpu::NAME, vcpu::SCHEMA)];
    kvm.into_iter()
        .chain(OURS.map(|name| (name, VERSION)))
        .map(|(name, version)| Schema { name: name.into(), version })
        .collect()
}

/// The machine itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MachineState {
    /// What it runs, for people.
    pub(crate) workload: String,
    pub(crate) heartbeat: HeartbeatState,
}

/// Saves a paused machine.
pub(crate) fn save(platform: &Platform, workload: &str) -> Result<Vec<Section>, VmmError> {
    let context = platform.save_context()?;
    let bus = &platform.bus;
    let kvm = state::save(&platform.vm, &platform.locked_vcpus(), context)?;
    let machine = MachineState { workload: workload.into(), heartbeat: bus.heartbeat.save() };
    let mut sections = vec![
        Section::critical(MACHINE, 0, VERSION, &machine),
        Section::critical(SERIAL, 0, VERSION, &lock(&bus.serial).save()),
        Section::critical(CMOS, 0, VERSION, &lock(&bus.cmos).save()),
        Section::critical(KEYBOARD, 0, VERSION, &*lock(&bus.i8042)),
    ];
    sections.extend(kvm.to_sections());
    Ok(sections)
}

/// Saves a machine that does not run, to see what that costs.
pub(crate) fn rehearse_save(platform: &Platform) -> Result<Duration, VmmError> {
    platform.save_context()?;
    rehearsed(|| save(platform, "").map(drop))
}

/// Reads back what a machine that has never run was saved as, and restores its vCPUs, to see what that costs.
pub(crate) fn rehearse_load(platform: &Platform) -> Result<Duration, VmmError> {
    let sections = save(platform, "")?;
    rehearsed(|| {
        let kvm = KvmState::from_sections(&sections, platform.vcpus.len())?;
        Ok(state::rehearse_restore(&platform.locked_vcpus(), &kvm, platform.save_context()?)?)
    })
}

/// What the pause has and a rehearsal has not: pages have just gone through all caches, and on the way in there
/// are the chips and the devices (measured: 0.04 to 0.1 ms, with one vCPU as with 16).
const UNREHEARSED: Duration = Duration::from_micros(80);

/// What it takes with cold caches, as in the pause: the first time, unless something came between.
fn rehearsed(once: impl Fn() -> Result<(), VmmError>) -> Result<Duration, VmmError> {
    let time = || {
        let started = Instant::now();
        once().map(|()| started.elapsed())
    };
    let (cold, warm) = (time()?, time()?);
    Ok(cold.min(warm * 2) + UNREHEARSED)
}

/// Restores into a machine that has never run.
///
/// Which interrupts of the devices are pending is for the interrupt controllers to know: no device raises any.
pub(crate) fn restore(
    platform: &mut Platform,
    prepared: &Prepared,
    sections: &[Section],
    choice: GuestTime,
) -> Result<(MachineState, TimePlan), VmmError> {
    check_names(sections)?;
    let bus = &platform.bus;
    let machine: MachineState = one(sections, MACHINE)?;
    let serial: SerialState = one(sections, SERIAL)?;
    let cmos: CmosState = one(sections, CMOS)?;
    let keyboard: I8042 = one(sections, KEYBOARD)?;
    let kvm = KvmState::from_sections(sections, platform.vcpus.len())?;

    lock(&bus.serial).restore(serial).map_err(|why| VmmError::SectionContent { name: SERIAL, why })?;
    *lock(&bus.cmos) = Cmos::from_state(&cmos).ok_or_else(|| VmmError::SectionContent {
        name: CMOS,
        why: "an index or a length is out of range".into(),
    })?;
    *lock(&bus.i8042) = keyboard;
    bus.heartbeat.restore(machine.heartbeat);
    platform.save_context()?;
    let mut context = platform.save_context.take().expect("found out above");
    let vcpus = platform.locked_vcpus();
    let time = state::restore(&platform.vm, &vcpus, &kvm, prepared, &mut context, choice)?;
    drop(vcpus);
    platform.save_context = context.into();
    Ok((machine, time))
}

/// What a section of a machine's state or description holds, read as a machine here would read it, as debug
/// text.
///
/// # Errors
/// A critical section that is not known, of whatever version; one that cannot be read.
pub fn text(section: &Section) -> Result<String, VmmError> {
    let alone = std::slice::from_ref(section);
    Ok(match section.name.as_str() {
        MACHINE => format!("{:?}", one::<MachineState>(alone, MACHINE)?),
        SERIAL => format!("{:?}", one::<SerialState>(alone, SERIAL)?),
        CMOS => format!("{:?}", one::<CmosState>(alone, CMOS)?),
        KEYBOARD => format!("{:?}", one::<I8042>(alone, KEYBOARD)?),
        vm::NAME => format!("{:?}", mig_kvm::VmState::from_section(section)?),
        vcpu::NAME => format!("{:?}", mig_kvm::VcpuState::from_section(section)?),
        compat::NAME => compat::text(section)?,
        time::NAME => format!("{:?}", GuestTime::from_section(section)?),
        _ => {
            check_names(alone)?;
            format!("{} bytes, skipped", section.body.len())
        }
    })
}

fn check_names(sections: &[Section]) -> Result<(), VmmError> {
    let known = schemas();
    for section in sections {
        if section.critical && known.iter().all(|s| s.name != section.name) {
            let (name, instance, version) = (section.name.clone(), section.instance, section.version);
            return Err(VmmError::UnknownSection { name, instance, version });
        }
    }
    Ok(())
}

fn one<T: DeserializeOwned>(sections: &[Section], name: &'static str) -> Result<T, VmmError> {
    let mut found = sections.iter().filter(|s| s.name == name);
    let section = found.next().ok_or(VmmError::MissingSection { name })?;
    if found.next().is_some() {
        return Err(VmmError::DuplicateSection { name: name.into() });
    }
    if section.version != VERSION {
        return Err(VmmError::SectionVersion { name, version: section.version, known: VERSION });
    }
    body::decode(name, &section.body).map_err(|source| VmmError::Section { name, source })
}
