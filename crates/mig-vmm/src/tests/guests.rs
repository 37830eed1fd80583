//! Built-in guests in whole machines.

use mig::DestinationVm;

use super::*;

fn boot(memory_bytes: u64, vcpus: u8, guest: &str) -> Machine {
    let workload = Workload::BuiltIn(guest.parse().unwrap());
    Machine::boot(MachineConfig {
        memory_bytes,
        vcpus,
        workload,
        console: Console::none(),
        tracking: Tracking::default(),
    })
    .unwrap()
}

/// Waits for more heartbeats than `from`.
fn beats(machine: &Machine, from: u64) -> u64 {
    let monitor = machine.monitor();
    wait("heartbeat", || monitor.heartbeats() > from, || format!("{:?}", monitor.end()));
    monitor.heartbeats()
}

#[test]
fn an_idle_guest_of_four_vcpus_beats_on_over_three_hops() {
    if !kvm() {
        return;
    }
    let mut machine = boot(16 << 20, 4, "idle");
    machine.run().unwrap();
    let mut count = beats(&machine, 20);
    for _ in 0..3 {
        machine = hop(machine, Console::none(), |_| ());
        assert!(machine.monitor().heartbeats() >= count, "the count goes on");
        assert_eq!(machine.workload(), "idle");
        machine.verify().unwrap().expect("it is a built-in guest");
        count = machine.monitor().heartbeats();
        machine.run().unwrap();
        assert!(machine.verify().is_err(), "a running guest is not verified");
        count = beats(&machine, count + 20);
    }
}

#[test]
fn the_gap_that_a_guest_felt_spans_its_last_and_first_heartbeats() {
    if !kvm() {
        return;
    }
    let mut machine = boot(8 << 20, 1, "idle");
    machine.run().unwrap();
    beats(&machine, 5);
    machine.pause().unwrap();
    let last = machine.monitor().last_heartbeat_ns();
    let mut incoming = arrive(machine, Console::none(), |_| ()).unwrap();
    assert_eq!(incoming.guest_gap(Duration::from_millis(1)), None, "it does not run yet");
    incoming.machine().run().unwrap();
    let gap = incoming.guest_gap(PATIENCE).expect("one host, one clock");
    let now = incoming.machine().monitor().last_heartbeat_ns();
    assert!(!gap.is_zero() && gap <= Duration::from_nanos(now - last), "{gap:?}");
}

#[test]
fn a_guest_with_memory_above_4_gib_runs() {
    if !kvm() {
        return;
    }
    let memory_bytes = (3 << 30) + (32 << 20);
    if crate::memory::available_bytes().is_some_and(|free| free < memory_bytes + (1 << 30)) {
        eprintln!("SKIPPED: less than 4 GiB of memory available");
        return;
    }
    let mut machine = boot(memory_bytes, 2, "idle");
    assert_eq!(machine.describe().unwrap().regions.len(), 2);
    machine.run().unwrap();
    beats(&machine, 5);
    machine.pause().unwrap();
    machine.verify().unwrap().expect("it is a built-in guest");
}

/// Guests that complain of any register, device, clock or page that is not as they left it.
fn survives(guest: &str, vcpus: u8, hops: usize) {
    let text = Text::default();
    let workload = Workload::BuiltIn(guest.parse().unwrap());
    let config = MachineConfig {
        memory_bytes: 16 << 20,
        vcpus,
        workload,
        console: text.console(),
        tracking: Tracking::default(),
    };
    let mut machine = Machine::boot(config).unwrap();
    for hop_number in 0..=hops {
        machine.run().unwrap();
        let monitor = machine.monitor();
        let enough = monitor.heartbeats() + 50;
        let ok = || monitor.heartbeats() > enough || monitor.end().is_some();
        wait("heartbeat", ok, || text.read());
        assert_eq!(monitor.end(), None, "{guest} on {vcpus} after {hop_number} hops:\n{}", text.read());
        machine = hop(machine, text.console(), |_| ());
        machine.verify().unwrap().expect("it is a built-in guest");
    }
}

#[test]
fn the_state_guest_finds_every_register_and_device_as_it_left_it() {
    if kvm() {
        survives("state", 1, 5);
        survives("state", 4, 5);
    }
}

#[test]
fn the_clock_guest_sees_time_go_forward() {
    if kvm() {
        survives("clock", 1, 5);
        survives("clock", 4, 5);
    }
}

#[test]
fn the_dirtier_finds_no_stale_page() {
    if kvm() {
        survives("dirtier:rate=20MiB,working-set=4MiB", 1, 3);
        survives("dirtier:rate=20MiB,working-set=4MiB,pattern=random", 4, 3);
    }
}
