//! Golden state: the sections of real machines, as every version saved them.
//!
//! Of each machine there are its state sections, its description, and today's reading of both as text. What is
//! bound to the host that a file was made on (CPUID, MSRs, XSAVE area, TSC, clock) can be read anywhere but not
//! restored anywhere: the test that restores takes those from the host it runs on.

mod golden;

use std::path::Path;
use std::sync::Once;
use std::time::{Duration, Instant};

use mig::{DestinationVm, Incoming, RestoreState, SaveState, Section, SourceVm};
use mig_kvm::{VcpuState, VmState};
use mig_vmm::{Console, Fed, Machine, MachineConfig, Receiver, Workload, section_text};
use mig_wire::bytes::{Reader, Writer};
use mig_wire::{Description, section};

const SECTIONS: &str = "machine.sections";
const DESCRIPTION: &str = "machine.description";
const TEXT: &str = "machine.txt";
const VERSIONS: [&str; 1] = ["v1"];

const VCPUS: u8 = 2;
const INPUT: &[u8] = b"not read yet";

/// Whether machines can be made here. Fails where they must.
fn kvm() -> bool {
    let there = Path::new("/dev/kvm").exists();
    assert!(there || std::env::var_os("MIG_REQUIRE_KVM").is_none(), "/dev/kvm is missing and required");
    if !there {
        eprintln!("SKIPPED: no /dev/kvm");
    }
    there
}

/// A paused machine whose guest has filled every register, with input waiting at its serial port.
fn machine() -> Machine {
    let workload = Workload::BuiltIn("state".parse().unwrap());
    let config = MachineConfig {
        memory_bytes: 16 << 20,
        vcpus: VCPUS,
        workload,
        console: Console::none(),
        tracking: mig_vmm::Tracking::default(),
    };
    let mut machine = Machine::boot(config).unwrap();
    machine.run().unwrap();
    let (monitor, started) = (machine.monitor(), Instant::now());
    while monitor.heartbeats() < 100 {
        assert!(started.elapsed() < Duration::from_secs(120), "no heartbeats: {:?}", monitor.end());
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(monitor.feed_serial(|_| Ok(INPUT.into())).unwrap(), Fed::Taken(INPUT.len()));
    machine.pause().unwrap();
    machine
}

fn sections_bytes(sections: &[Section]) -> Vec<u8> {
    let mut writer = Writer::new();
    section::write_all(&mut writer, sections);
    writer.into_bytes()
}

fn description_bytes(description: &Description) -> Vec<u8> {
    let mut writer = Writer::new();
    description.write(&mut writer);
    writer.into_bytes()
}

fn sections(version: &str) -> Vec<Section> {
    let bytes = golden::read(version, SECTIONS);
    let mut reader = Reader::new("golden sections", &bytes);
    let sections = section::read_all(&mut reader).unwrap();
    reader.finish().unwrap();
    sections
}

fn description(version: &str) -> Description {
    let bytes = golden::read(version, DESCRIPTION);
    let mut reader = Reader::new("golden description", &bytes);
    let description = Description::read(&mut reader).unwrap();
    reader.finish().unwrap();
    description
}

/// Sections and description as text, a line for each section.
fn text(sections: &[Section], description: &Description) -> String {
    let line = |s: &Section| {
        let Section { name, instance, version, critical, .. } = s;
        let inside = section_text(s).unwrap_or_else(|e| panic!("{name} {instance} {version}: {e:?}"));
        format!("{name} {instance} version {version} critical {critical}: {inside}\n")
    };
    let own: String = sections.iter().chain(&description.platform).map(line).collect();
    let rest = Description { platform: Vec::new(), ..description.clone() };
    format!("{own}{rest:?}\n")
}

/// Makes the files of the current version that do not exist, all of one machine.
fn bless() {
    static BLESSED: Once = Once::new();
    BLESSED.call_once(bless_once);
}

fn bless_once() {
    if !golden::path(golden::CURRENT, SECTIONS).exists() && kvm() {
        let mut machine = machine();
        golden::bless(SECTIONS, || sections_bytes(&machine.save().unwrap()));
        golden::bless(DESCRIPTION, || description_bytes(&machine.describe().unwrap()));
    }
    golden::bless(TEXT, || text(&sections(golden::CURRENT), &description(golden::CURRENT)).into_bytes());
}

#[test]
fn every_versions_sections_are_read_as_they_always_were() {
    bless();
    for version in VERSIONS {
        let (sections, description) = (sections(version), description(version));
        let found = text(&sections, &description);
        let expected = String::from_utf8(golden::read(version, TEXT)).unwrap();
        assert_eq!(found.lines().count(), expected.lines().count());
        for (found, expected) in found.lines().zip(expected.lines()) {
            assert!(found == expected, "{version} was\n{expected}\nand is read as\n{found}");
        }
        assert!(sections_bytes(&sections) == golden::read(version, SECTIONS), "{version}: the same bytes");
        assert!(description_bytes(&description) == golden::read(version, DESCRIPTION), "{version}: the same");
    }
}

#[test]
fn the_current_version_has_every_section_that_a_machine_is_saved_as() {
    bless();
    if !kvm() {
        return;
    }
    let mut machine = machine();
    let names = |sections: &[Section]| {
        sections.iter().map(|s| (s.name.clone(), s.instance, s.version, s.critical)).collect::<Vec<_>>()
    };
    assert_eq!(names(&sections(golden::CURRENT)), names(&machine.save().unwrap()));
    let (golden, here) = (description(golden::CURRENT), machine.describe().unwrap());
    assert_eq!(golden.schemas, here.schemas);
    assert_eq!(names(&golden.platform), names(&here.platform));
    assert_eq!((golden.regions, golden.vcpus), (here.regions, here.vcpus));
}

/// A golden section with what is bound to a host taken from this host's section of the same name.
fn at_home_here(golden: &Section, here: &Section) -> Section {
    match golden.name.as_str() {
        mig_kvm::vm::NAME => {
            let (golden, here) =
                (VmState::from_section(golden).unwrap(), VmState::from_section(here).unwrap());
            VmState { clock: here.clock, ..golden }.to_section()
        }
        mig_kvm::vcpu::NAME => {
            let instance = golden.instance;
            let (golden, here) =
                (VcpuState::from_section(golden).unwrap(), VcpuState::from_section(here).unwrap());
            let VcpuState { cpuid, feature_msrs, msrs, xsave, xcrs, tsc, tsc_deadline, nested, .. } = here;
            VcpuState { cpuid, feature_msrs, msrs, xsave, xcrs, tsc, tsc_deadline, nested, ..golden }
                .to_section(instance)
        }
        _ => golden.clone(),
    }
}

#[test]
fn every_versions_state_can_be_restored_and_saves_as_it_was() {
    if !kvm() {
        return;
    }
    bless();
    for version in VERSIONS {
        let golden = sections(version);
        let mut here = machine();
        let (saved, description) = (here.save().unwrap(), here.describe().unwrap());
        let twin = |s: &Section| {
            let found = saved.iter().find(|h| (&h.name, h.instance) == (&s.name, s.instance));
            found.unwrap_or_else(|| panic!("{} {} has no counterpart here", s.name, s.instance))
        };
        let moved: Vec<Section> = golden.iter().map(|s| at_home_here(s, twin(s))).collect();
        let mut incoming =
            Receiver::new(Console::none).prepare(&description).unwrap_or_else(|r| panic!("{r:?}"));
        assert_eq!(incoming.memory().regions(), description.regions);
        incoming.restore(&moved).unwrap();
        let again = incoming.into_machine().unwrap().save().unwrap();
        for (golden, again) in golden.iter().zip(&again) {
            assert_eq!((&golden.name, golden.instance), (&again.name, again.instance));
            if golden.name == mig_kvm::vcpu::NAME {
                let (golden, again) =
                    (VcpuState::from_section(golden).unwrap(), VcpuState::from_section(again).unwrap());
                assert_eq!((golden.regs, golden.sregs), (again.regs, again.sregs));
                assert_eq!((golden.debug, golden.mp_state), (again.debug, again.mp_state));
            } else if golden.name == mig_kvm::vm::NAME {
                let (golden, again) =
                    (VmState::from_section(golden).unwrap(), VmState::from_section(again).unwrap());
                assert_eq!((golden.pics, golden.ioapic), (again.pics, again.ioapic));
            } else {
                assert_eq!(section_text(golden).unwrap(), section_text(again).unwrap());
            }
        }
    }
}
