//! The guests on KVM: they beat, they are checked, and they find what was changed behind their backs.

use super::harness::{Machine, kvm_exists};
use super::*;

const SMALL: &[(u64, usize)] = &[(0, 16 << 20)];

#[test]
fn every_guest_beats_and_has_nothing_to_complain_about() {
    if !kvm_exists() {
        return;
    }
    for name in ["idle", "idle:fill=random", "dirtier:working-set=8MiB", "state", "clock"] {
        for vcpus in [1, 3] {
            let machine = Machine::start(name, SMALL, vcpus);
            machine.run_for_beats(400);
            let guest: Guest = name.parse().unwrap();
            machine.paused(|_, memory| {
                assert_eq!(Guest::in_memory(memory), Some(guest.clone()));
                guest.verify(memory).unwrap()
            });
            machine.run_for_beats(100);
        }
    }
}

#[test]
fn a_dirtier_reaches_its_rate_and_its_stamps_agree() {
    if !kvm_exists() {
        return;
    }
    for (rate, vcpus) in
        [("20MiB", 1), ("100MiB", 1), ("400MiB", 1), ("1TiB", 1), ("20MiB", 2), ("400MiB", 2), ("1TiB", 2)]
    {
        for pattern in ["sequential", "random", "hot"] {
            let name = format!("dirtier:rate={rate},working-set=64MiB,pattern={pattern}");
            let guest: Guest = name.parse().unwrap();
            let machine = Machine::start(&name, &[(0, 96 << 20)], vcpus);
            machine.run_for_beats(200);
            let (start, before) = (std::time::Instant::now(), guest.pages_written(&machine.memory).unwrap());
            machine.run_for_beats(1000);
            let (seconds, after) =
                (start.elapsed().as_secs_f64(), guest.pages_written(&machine.memory).unwrap());
            machine.paused(|_, memory| guest.verify(memory)).unwrap();
            let mib = (after - before) as f64 / 256.0 / seconds;
            eprintln!("{name} on {vcpus}: {mib:.0} MiB/s, {:.3} ms a beat", seconds);
            assert!(after > before);
        }
    }
}
