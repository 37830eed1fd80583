//! Peers that live and answer pings but neither take nor bring what is under way, and links that are only slow.

mod gate;
mod model;

use std::time::{Duration, Instant};

use gate::{Flow, Gate, Kind};
use mig::{
    Blame, Compress, Control, Fault, Listener, Outcome, ReceiveOptions, Received, SourceOptions, Step,
    migrate, receive,
};
use model::{Flaw, Host, Model};

/// A guest that writes now and then.
const CALM: Duration = Duration::from_millis(20);

/// Moves a guest of so many pages through a gate; gives both ends and how long it took.
fn through(
    make: impl FnOnce(Gate) -> Gate,
    vm: Model,
    host: Host,
) -> (Outcome<Model>, Received<Model>, Duration) {
    let listener = Listener::bind(&mig::Address::tcp("127.0.0.1", 0)).unwrap();
    let gate = make(Gate::before(&listener.address().to_string()));
    let hang_up = Control::new();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let mut host = host;
        let (listener, hang_up) = (&listener, &hang_up);
        let receiving =
            scope.spawn(move || receive(listener, &mut host, &ReceiveOptions::default(), hang_up, &()));
        let to = mig::Address::tcp("127.0.0.1", gate.port());
        // pages as they are, so that they are as many bytes
        let options = SourceOptions { compress: Compress::Off, ..SourceOptions::default() };
        let outcome = migrate(vm, &to, &options, &Control::new(), &());
        let took = began.elapsed();
        // the wire heals, and what was said at last is heard
        gate.open();
        let received = receiving.join().unwrap();
        (outcome, received, took)
    })
}

fn name(outcome: &Outcome<Model>) -> String {
    match outcome {
        Outcome::Moved(report) | Outcome::StillHere { report, .. } | Outcome::Discarded(report) => {
            format!("{report:?}")
        }
    }
}

fn still_here(what: &str, (outcome, received, took): (Outcome<Model>, Received<Model>, Duration)) -> Fault {
    let Outcome::StillHere { vm, report } = outcome else { panic!("{what}: {}", name(&outcome)) };
    let fault = report.fault.unwrap();
    eprintln!("{what}: given up after {:.1} s: {fault}", took.as_secs_f64());
    assert!(!vm.is_tracked() && vm.makes_progress(), "{what}: the guest goes on at its full speed");
    assert!(matches!(received, Received::NotReceived(_)), "{what}");
    assert_eq!(fault.blame, Blame::Peer, "{what}: {fault}");
    fault
}

/// One test, since each part waits for the better part of a minute, and they can wait together.
#[test]
fn a_peer_that_does_not_go_on_is_given_up_and_a_slow_link_is_not() {
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let vm = Model::running(8000, CALM, Flaw::None);
            let shut = |gate: Gate| gate.pages_after(1 << 20, Flow::Shut);
            let fault = still_here("pages not taken", through(shut, vm, Host::default()));
            assert!(matches!(fault.step, Step::Round(0)) && fault.cause.contains("took 0 of"), "{fault}");
        });
        scope.spawn(|| {
            let vm = Model::running(8000, CALM, Flaw::None);
            let drip = |gate: Gate| gate.pages_after(1 << 20, Flow::Slow(1));
            let fault = still_here("a byte of pages a second", through(drip, vm, Host::default()));
            assert!(
                matches!(fault.step, Step::Round(0)) && fault.cause.contains("bytes that waited"),
                "{fault}"
            );
        });
        scope.spawn(|| {
            let vm = Model::running(2000, CALM, Flaw::LargeState(4 << 20));
            let stuck = |gate: Gate| gate.stop_before(Kind::State);
            let (outcome, received, took) = through(stuck, vm, Host::default());
            // the destination hears nothing else while the state is on its way, and hangs up first
            let Outcome::StillHere { vm, report } = outcome else { panic!("{}", name(&outcome)) };
            eprintln!("state not taken: given up after {:.1} s: {:?}", took.as_secs_f64(), report.fault);
            assert!(!vm.is_tracked() && vm.makes_progress());
            assert!(matches!(received, Received::NotReceived(_)));
        });
        scope.spawn(|| {
            let vm = Model::running(2000, CALM, Flaw::LargeState(4 << 20));
            let drip = |gate: Gate| gate.from(Kind::State, Flow::Slow(1));
            let fault = still_here("a byte of the state a second", through(drip, vm, Host::default()));
            assert!(fault.cause.contains("bytes that waited"), "{fault}");
        });
        scope.spawn(|| {
            // 2.4 MB of pages and 2 MiB of state at 300 kB/s each: 8 and 7 s, most of it in the pause
            let vm = Model::running(600, CALM, Flaw::LargeState(2 << 20));
            let slow = |gate: Gate| gate.all_to_destination(Flow::Slow(300_000));
            let (outcome, received, took) = through(slow, vm, Host::default());
            let Outcome::Moved(report) = outcome else { panic!("{}", name(&outcome)) };
            let downtime = report.downtime.unwrap().total();
            eprintln!("a slow link: moved in {took:.1?}, downtime {downtime:.1?}");
            assert!(downtime > Duration::from_secs(5), "longer than a peer may be silent: {downtime:?}");
            let Received::Running { vm, .. } = received else { panic!("not running") };
            assert!(vm.makes_progress());
        });
    });
}
