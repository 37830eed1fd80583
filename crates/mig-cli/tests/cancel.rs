//! A cancel in every state, on either side, over the control socket and by Ctrl-C: it is prompt, exactly one guest
//! is left, at the speed it had before, and moves to another receiver right after.

#![allow(missing_docs)]

#[path = "../../mig/tests/gate/mod.rs"]
mod gate;
mod support;

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use gate::{Flow, Gate, Kind};
use nix::sys::socket::{Backlog, listen};
use serde_json::{Value, json};
use support::bench::{Bench, Migrating};
use support::{Program, kvm_is_there, try_ask};

/// Where a migration is stopped to be cancelled.
#[derive(Debug, Clone, Copy)]
enum State {
    /// The address does not answer.
    Connecting,
    /// Right before a message.
    Before(Kind),
    /// In a round, with every socket between full.
    StuckInRound,
    /// The same, and the receiver is stopped.
    FrozenInRound,
}

/// What a source can wait for, in the order of a migration.
const SOURCE_STATES: [(&str, State); 9] = [
    ("connecting", State::Connecting),
    ("handshake", State::Before(Kind::Welcome)),
    ("prepare", State::Before(Kind::Accept)),
    ("attach", State::Before(Kind::Attached)),
    ("mid-round, link stuck", State::StuckInRound),
    ("mid-round, peer stopped", State::FrozenInRound),
    ("between rounds", State::Before(Kind::RoundAck)),
    ("in the pause", State::Before(Kind::State)),
    ("after Ready", State::Before(Kind::Ready)),
];

/// What a destination can wait for.
const DESTINATION_STATES: [(&str, State); 6] = [
    ("handshake", State::Before(Kind::Describe)),
    ("attach", State::Before(Kind::Attach)),
    ("mid-round", State::StuckInRound),
    ("end of a round", State::Before(Kind::RoundEnd)),
    ("in the pause", State::Before(Kind::State)),
    ("after Ready", State::Before(Kind::Commit)),
];

/// How a cancel is asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum By {
    Socket,
    CtrlC,
}

impl By {
    fn cancel(self, program: &Program) {
        match self {
            Self::Socket => assert_eq!(program.ask(&json!({"cmd": "cancel"})), json!({"ok": true})),
            Self::CtrlC => program.signal("INT"),
        }
    }
}

/// An address at which connections are neither accepted nor refused.
struct Deaf {
    address: SocketAddr,
    _ear: TcpListener,
    _queued: Vec<TcpStream>,
}

impl Deaf {
    fn new() -> Self {
        let ear = TcpListener::bind("127.0.0.1:0").unwrap();
        // of a socket that listens already it changes the queue's length
        listen(&ear, Backlog::new(0).unwrap()).unwrap();
        let address = ear.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_millis(300));
        let mut queued = Vec::new();
        loop {
            match connect() {
                Ok(stream) => queued.push(stream),
                Err(e) if e.kind() == io::ErrorKind::TimedOut => break,
                Err(e) => panic!("{e}"),
            }
        }
        Self { address, _ear: ear, _queued: queued }
    }
}

/// What a migration was stopped by.
enum Stopped {
    Deaf(Deaf),
    Gate(Gate),
}

impl Stopped {
    /// Something that stops a migration to `receiver` there.
    fn at(state: State, receiver: &str) -> Self {
        let gate = || Gate::before(receiver);
        match state {
            State::Connecting => Self::Deaf(Deaf::new()),
            State::Before(kind) => Self::Gate(gate().stop_before(kind)),
            State::StuckInRound | State::FrozenInRound => Self::Gate(gate().pages_after(1 << 20, Flow::Shut)),
        }
    }

    fn address(&self) -> String {
        match self {
            Self::Deaf(deaf) => format!("tcp:{}", deaf.address),
            Self::Gate(gate) => gate.address(),
        }
    }

    /// Waits until the migration has come there, and until sockets are full.
    fn wait(&self, state: State, receiver: &Program) {
        if let Self::Gate(gate) = self {
            gate.wait();
            if let State::FrozenInRound = state {
                receiver.stop();
                gate.open();
            }
        }
        std::thread::sleep(Duration::from_millis(200));
    }

    fn open(&self) {
        if let Self::Gate(gate) = self {
            gate.open();
        }
    }
}

/// Pages that a dirtier writes in a second of its program's CPU time, whatever else the machine does: the median
/// of a few looks.
fn speed(holder: &Program) -> f64 {
    let written = || holder.dirtied_pages() as f64;
    let mut rates: Vec<f64> = (0..5)
        .map(|_| {
            let (before, began) = (written(), holder.cpu_time());
            std::thread::sleep(Duration::from_millis(60));
            let took = holder.cpu_time() - began;
            (written() - before) / took.as_secs_f64()
        })
        .collect();
    rates.sort_by(f64::total_cmp);
    rates[2]
}

fn assert_cancelled(answer: &Value, what: &str) {
    let report = &answer["report"];
    assert_eq!(
        (&answer["ok"], &report["outcome"]),
        (&json!(false), &json!("still-here")),
        "{what}: {answer}"
    );
    assert_eq!(report["fault"]["cause"], "cancelled", "{what}: {answer}");
}

/// Moves the guest to `next`, and asserts that it is there and nowhere else.
fn assert_moves_on(holder: Program, next: &Program, to: &str, other: &Program, what: &str) {
    let (answer, _) = Migrating::begin(&holder, to).end();
    assert_eq!(answer["report"]["outcome"], "moved", "{what}: {answer}");
    next.assert_guest_goes_on();
    let control = holder.control.clone();
    let (status, stderr) = holder.end();
    assert!(status.success(), "{what}: {status}\n{stderr}");
    assert!(try_ask(&control, &json!({"cmd": "status"})).is_none(), "{what}: the guest left");
    assert_eq!(other.status()["state"], "receiving", "{what}: it is not where the move was cancelled");
}

#[test]
fn a_source_that_is_cancelled_in_any_state_keeps_its_guest_at_full_speed_and_can_move_it_at_once() {
    if !kvm_is_there() {
        return;
    }
    let bench = Bench::new();
    let mut holder = bench.holder("dirtier:rate=1TiB,working-set=32MiB", "64MiB");
    let (target, address) = bench.receiver();
    let mut table = Vec::new();
    for by in [By::Socket, By::CtrlC] {
        for (name, state) in SOURCE_STATES {
            let what = format!("{name}, by {by:?}");
            let before = speed(&holder);
            let stop = Stopped::at(state, &address);
            let migrating = Migrating::begin(&holder, &stop.address());
            stop.wait(state, &target);
            let asked = Instant::now();
            by.cancel(&holder);
            let (answer, answered) = migrating.end();
            assert_cancelled(&answer, &what);
            let after = speed(&holder);
            let latency = answered.duration_since(asked);
            table.push(format!(
                "{what:34} {:6.1} ms   speed after/before {:.2} ({:.0} pages a ms before)",
                latency.as_secs_f64() * 1e3,
                after / before,
                before / 1e3
            ));
            assert!(after > before / 2.0, "{what}: {before} pages a second before, {after} after");
            let (next, to) = bench.receiver();
            if let State::FrozenInRound = state {
                target.signal("CONT");
            }
            stop.open();
            if !matches!(state, State::Connecting) {
                target.event("not-received");
            }
            assert_moves_on(holder, &next, &to, &target, &what);
            holder = next;
        }
    }
    eprintln!("cancel of the source\n{}", table.join("\n"));
    holder.quit();
}

#[test]
fn a_receiver_that_is_cancelled_in_any_state_leaves_the_guest_with_its_source() {
    if !kvm_is_there() {
        return;
    }
    let bench = Bench::new();
    let holder = bench.holder("dirtier:rate=50MiB,working-set=16MiB", "64MiB");
    let mut table = Vec::new();
    for by in [By::Socket, By::CtrlC] {
        for (name, state) in DESTINATION_STATES {
            let what = format!("{name}, by {by:?}");
            let (target, address) = bench.receiver();
            let stop = Stopped::at(state, &address);
            let migrating = Migrating::begin(&holder, &stop.address());
            stop.wait(state, &target);
            let asked = Instant::now();
            by.cancel(&target);
            let (answer, answered) = migrating.end();
            assert_cancelled(&answer, &what);
            assert_eq!(answer["report"]["fault"]["side"], "destination", "{what}: {answer}");
            let latency = answered.duration_since(asked);
            table.push(format!("{what:34} {:6.1} ms", latency.as_secs_f64() * 1e3));
            match by {
                By::Socket => {
                    target.event("not-received");
                    assert_eq!(target.status()["state"], "receiving", "{what}");
                    target.quit();
                }
                By::CtrlC => assert!(target.end().0.success(), "{what}"),
            }
            holder.assert_guest_goes_on();
        }
    }
    eprintln!("cancel of the destination, until the source has reported\n{}", table.join("\n"));
    let (next, to) = bench.receiver();
    let (other, _) = bench.receiver();
    assert_moves_on(holder, &next, &to, &other, "after all");
    next.quit();
}

#[test]
fn a_cancel_after_commit_comes_too_late_on_either_side() {
    if !kvm_is_there() {
        return;
    }
    // on the destination Ctrl-C would end the guest, which runs
    for (side, by) in [("source", By::Socket), ("source", By::CtrlC), ("destination", By::Socket)] {
        let bench = Bench::new();
        let holder = bench.holder("clock", "16MiB");
        let (target, address) = bench.receiver();
        let gate = Gate::before(&address).stop_before(Kind::Running);
        let migrating = Migrating::begin(&holder, &gate.address());
        gate.wait();
        if side == "source" {
            by.cancel(&holder);
        } else {
            // it may have been received already, with nothing left to cancel
            target.ask(&json!({"cmd": "cancel"}));
        }
        assert!(!migrating.has_ended());
        gate.open();
        let (answer, _) = migrating.end();
        assert_eq!(answer["report"]["outcome"], "moved", "{side}, {by:?}: {answer}");
        assert!(holder.end().0.success());
        target.assert_guest_goes_on();
        target.quit();
    }
}
