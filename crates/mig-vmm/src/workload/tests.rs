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
