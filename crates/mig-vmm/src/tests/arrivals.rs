//! What a receiver refuses, and what it rejects when it is already too late to refuse.

use mig::Description;
use mig::describe::Schema;

use super::*;

fn description(edit: impl FnOnce(&mut Description)) -> Description {
    let mut description = machine_of(&[0xf4], Console::none()).describe().unwrap();
    edit(&mut description);
    description
}

fn refused(receiver: Receiver, edit: impl FnOnce(&mut Description)) -> Vec<String> {
    let mut receiver = receiver;
    match receiver.prepare(&description(edit)) {
        Ok(_) => panic!("not refused"),
        Err(refusals) => {
            assert!(refusals.iter().all(|r| !r.cause.is_empty() && !r.remedy.is_empty()), "{refusals:?}");
            refusals.iter().map(ToString::to_string).collect()
        }
    }
}

fn receiver() -> Receiver {
    Receiver::new(Console::none)
}

#[test]
fn every_reason_is_given_at_once() {
    if !kvm() {
        return;
    }
    let reasons = refused(receiver().max_memory_bytes(1 << 20), |d| {
        d.architecture = "s390x".into();
        d.page_bytes = 65536;
        d.vcpus = 33;
        d.regions[0].guest_address = 1 << 20;
        d.platform.clear();
        d.schemas.retain(|s| s.name != "vmm.cmos");
        d.schemas.push(Schema { name: "acme.gpu".into(), version: 7 });
        d.schemas.iter_mut().filter(|s| s.name == "vmm.serial").for_each(|s| s.version = 9);
    });
    let expected = [
        "architecture: the guest's is s390x",
        "page size: the source counts pages of 65536",
        "vCPUs: the guest has 33",
        "memory layout: the guest's 4 MiB",
        "state vmm.serial: the source sends version 9, this side knows 1",
        "state acme.gpu: this side does not know it (version 7)",
        "state vmm.cmos: the source does not send it",
        "memory: the guest has 4 MiB, this receiver takes 1 MiB at most",
        "cpu: the source does not describe it",
    ];
    for (reason, expected) in reasons.iter().zip(expected) {
        assert!(reason.starts_with(expected), "{reason} is not {expected}");
    }
    assert_eq!(reasons.len(), expected.len(), "{reasons:#?}");
}

#[test]
fn a_guest_larger_than_the_hosts_memory_is_refused_with_both_sizes() {
    if !kvm() {
        return;
    }
    let reasons = refused(receiver(), |d| d.regions = crate::layout::regions(1 << 40));
    assert_eq!(reasons.len(), 1, "{reasons:?}");
    assert!(reasons[0].starts_with("memory: the guest has 1048576 MiB, this host has "), "{reasons:?}");
}

#[test]
fn state_that_is_wrong_is_an_error_that_names_the_section() {
    if !kvm() {
        return;
    }
    let error = |edit: &dyn Fn(&mut Vec<Section>)| {
        let arrived =
            arrive(machine_of(&[0xf4], Console::none()), Console::none(), |sections| edit(sections));
        arrived.err().expect("wrong state is an error").to_string()
    };
    let unknown = error(&|s| s.push(Section::critical("acme.gpu", 3, 1, &7u8)));
    assert!(unknown.contains("acme.gpu 3"), "{unknown}");
    let twice = error(&|s| s.push(s[0].clone()));
    assert!(twice.contains("twice"), "{twice}");
    let version = error(&|s| s[0].version = 5);
    assert!(version.contains("vmm.machine has version 5, and 1 is known"), "{version}");
    let bytes = error(&|s| s[1].body.push(0));
    assert!(bytes.contains("vmm.serial cannot be read"), "{bytes}");
    let index = error(&|s| s[2].body[0] = 0xff);
    assert!(index.contains("vmm.cmos cannot be: "), "{index}");

    let skipped = arrive(machine_of(&[0xf4], Console::none()), Console::none(), |s| {
        s.push(Section::optional("acme.notes", 0, 1, &7u8));
    });
    assert!(skipped.is_ok(), "unknown and not critical is skipped");
}

#[test]
fn what_was_asked_for_wrongly_is_refused_with_the_limits() {
    if !kvm() {
        return;
    }
    let boot = |memory_bytes, vcpus| {
        let workload = Workload::BuiltIn("idle".parse().unwrap());
        Machine::boot(MachineConfig {
            memory_bytes,
            vcpus,
            workload,
            console: Console::none(),
            tracking: Tracking::default(),
        })
        .expect_err("refused")
        .to_string()
    };
    assert!(boot(1 << 20, 1).contains("2097152 to "));
    assert!(boot((4 << 20) + 1, 1).contains("whole pages"));
    assert!(boot(4 << 20, 0).contains("1 to 32") && boot(4 << 20, 33).contains("1 to 32"));
}

#[test]
fn a_receiver_that_gives_up_gives_everything_back() {
    if !kvm() {
        return;
    }
    let incoming = receiver().prepare(&description(|_| ())).expect("accepted");
    assert!(incoming.monitor().is_none());
    assert!(incoming.into_machine().is_none());
}
