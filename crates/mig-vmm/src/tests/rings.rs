//! Guests that move while what they write is noted in dirty rings.

use mig::observe::Progress;
use mig::policy::{OnStall, Policy};
use mig::{Control, Listener, Observer, Outcome, ReceiveOptions, Received, SourceOptions};

use super::*;

/// So few that every guest here fills them many times.
const FEW: Tracking = Tracking::Ring { entries: 1024 };
const DIRTIER: &str = "dirtier:rate=60MiB,working-set=12MiB,pattern=random";

fn boot(vcpus: u8, tracking: Tracking) -> Machine {
    let workload = Workload::BuiltIn(DIRTIER.parse().unwrap());
    let config =
        MachineConfig { memory_bytes: 32 << 20, vcpus, workload, console: Console::none(), tracking };
    let mut machine = Machine::boot(config).unwrap();
    machine.run().unwrap();
    machine
}

/// Waits for 50 more heartbeats.
fn gets_on(machine: &Machine) {
    let monitor = machine.monitor();
    let enough = monitor.heartbeats() + 50;
    let done = || monitor.heartbeats() > enough || monitor.end().is_some();
    wait("heartbeat", done, || format!("{:?}", monitor.end()));
    assert_eq!(monitor.end(), None);
}

/// Moves a machine to a receiver of this process.
fn migrate(
    machine: Machine,
    policy: Policy,
    control: &Control,
    observer: &dyn Observer,
    arrives_with: Tracking,
) -> (Outcome<Machine>, Option<Machine>) {
    let listener = Listener::bind(&mig::Address::tcp("127.0.0.1", 0)).unwrap();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut receiver = Receiver::new(Console::none).tracking(arrives_with);
            mig::receive(&listener, &mut receiver, &ReceiveOptions::default(), &Control::new(), &())
        });
        let options = SourceOptions { policy, verify: true, ..SourceOptions::default() };
        let outcome = mig::migrate(machine, listener.address(), &options, control, observer);
        let arrived = match receiver.join().unwrap() {
            Received::Running { vm, .. } => vm.into_machine(),
            _ => None,
        };
        (outcome, arrived)
    })
}

fn moves(mut machine: Machine, hops: usize, arrives_with: Tracking) {
    for _ in 0..hops {
        gets_on(&machine);
        let (outcome, arrived) = migrate(machine, Policy::default(), &Control::new(), &(), arrives_with);
        let Outcome::Moved(_) = outcome else { panic!("it did not move: {outcome:?}") };
        machine = arrived.expect("it moved");
        gets_on(&machine);
        machine.pause().unwrap();
        machine.verify().unwrap().expect("it is a built-in guest");
        machine.run().unwrap();
    }
}

#[test]
fn a_guest_moves_on_and_on_with_rings_that_are_never_full() {
    if kvm() {
        moves(boot(1, Tracking::RING), 2, Tracking::RING);
    }
}

#[test]
fn a_guest_of_four_vcpus_moves_with_rings_that_get_full_again_and_again() {
    if kvm() {
        moves(boot(4, FEW), 2, FEW);
    }
}

#[test]
fn what_the_destination_takes_is_its_own_choice() {
    if kvm() {
        moves(boot(2, FEW), 2, Tracking::Bitmap);
        moves(boot(2, Tracking::Bitmap), 2, FEW);
    }
}

/// Cancels after two rounds.
struct Cancels(Control);

impl Observer for Cancels {
    fn progress(&self, progress: &Progress) {
        if matches!(progress, Progress::Round(round) if round.round >= 1) {
            self.0.cancel();
        }
    }
}

#[test]
fn a_guest_that_did_not_move_the_first_time_moves_the_second_time() {
    if !kvm() {
        return;
    }
    let mut machine = boot(2, FEW);
    for _ in 0..2 {
        gets_on(&machine);
        // No pause is short enough: it does not move, however late the cancel is seen.
        let policy = Policy {
            downtime_limit: Duration::ZERO,
            few_pages: 0,
            on_stall: OnStall::Abort,
            ..Policy::default()
        };
        let control = Control::new();
        let (outcome, _) = migrate(machine, policy, &control, &Cancels(control.clone()), FEW);
        let Outcome::StillHere { vm, .. } = outcome else { panic!("it moved") };
        machine = vm;
    }
    moves(machine, 1, FEW);
}

#[test]
fn who_writes_is_known_while_the_guest_moves() {
    if !kvm() {
        return;
    }
    /// What was known after each round.
    struct Asks(crate::Monitor, Mutex<Vec<Vec<u64>>>);
    impl Observer for Asks {
        fn progress(&self, progress: &Progress) {
            if matches!(progress, Progress::Round(_)) {
                lock(&self.1).push(self.0.written_by_vcpu().expect("it has rings"));
            }
        }
    }
    assert_eq!(boot(1, Tracking::Bitmap).monitor().written_by_vcpu(), None);
    let machine = boot(3, Tracking::RING);
    let asks = Asks(machine.monitor(), Mutex::default());
    assert_eq!(asks.0.written_by_vcpu().unwrap(), [0; 3], "nothing is noted before it moves");
    let (outcome, _) = migrate(machine, Policy::default(), &Control::new(), &asks, FEW);
    assert!(matches!(outcome, Outcome::Moved(_)), "{outcome:?}");
    let known = lock(&asks.1);
    assert!(known.is_sorted_by(|a, b| (0..3).all(|v| a[v] <= b[v])), "{known:?}");
    assert!(known.last().unwrap().iter().all(|count| *count > 0), "all of them write: {known:?}");
}
