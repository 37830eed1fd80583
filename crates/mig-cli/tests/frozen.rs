//! Peers that are stopped by SIGSTOP in each phase of a migration, and go on later: the other side notices by the
//! silence, and when all is over exactly one guest runs.

#![allow(missing_docs)]

#[path = "../../mig/tests/gate/mod.rs"]
mod gate;
mod support;

use std::time::{Duration, Instant};

use gate::{Flow, Gate, Kind};
use serde_json::Value;
use support::bench::{Bench, Migrating};
use support::{Program, kvm_is_there, try_ask};

/// More than a peer may be silent: a part of the time in which it is noticed cannot have passed sooner.
const NOT_BEFORE: Duration = Duration::from_secs(3);
const GUEST: &str = "idle:fill=random";
const MEMORY: &str = "32MiB";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Side {
    Source,
    Destination,
}

/// Who is stopped and when, and who has the guest in the end.
struct Case {
    phase: &'static str,
    stopped: Side,
    /// Right before that message, which arrives all the same; none for the middle of a round.
    before: Option<Kind>,
    /// None where that is open: the Commit that waits for a destination and the question of its source arrive
    /// together, and whichever it hears first decides.
    guest: Option<Side>,
}

const fn case(phase: &'static str, stopped: Side, before: Option<Kind>, guest: Side) -> Case {
    Case { phase, stopped, before, guest: Some(guest) }
}

const CASES: [Case; 15] = [
    case("hello", Side::Destination, Some(Kind::Hello), Side::Source),
    case("describe", Side::Destination, Some(Kind::Describe), Side::Source),
    case("attach", Side::Destination, Some(Kind::Attach), Side::Source),
    case("round", Side::Destination, None, Side::Source),
    case("end of a round", Side::Destination, Some(Kind::RoundEnd), Side::Source),
    case("state", Side::Destination, Some(Kind::State), Side::Source),
    Case { phase: "commit", stopped: Side::Destination, before: Some(Kind::Commit), guest: None },
    case("welcome", Side::Source, Some(Kind::Welcome), Side::Source),
    case("accept", Side::Source, Some(Kind::Accept), Side::Source),
    case("attached", Side::Source, Some(Kind::Attached), Side::Source),
    case("round", Side::Source, None, Side::Source),
    case("end of a round", Side::Source, Some(Kind::RoundAck), Side::Source),
    case("state", Side::Source, Some(Kind::State), Side::Source),
    case("ready", Side::Source, Some(Kind::Ready), Side::Source),
    case("commit", Side::Source, Some(Kind::Commit), Side::Destination),
];

struct Pair {
    source: Program,
    destination: Program,
    migrating: Migrating,
    gate: Gate,
}

impl Pair {
    /// A migration that was stopped there.
    fn stopped_before(bench: &Bench, before: Option<Kind>) -> Self {
        let source = bench.holder(GUEST, MEMORY);
        let (destination, address) = bench.receiver();
        let gate = Gate::before(&address);
        let gate = match before {
            Some(kind) => gate.stop_before(kind),
            None => gate.pages_after(1 << 20, Flow::Shut),
        };
        let migrating = Migrating::begin(&source, &gate.address());
        gate.wait();
        Self { source, destination, migrating, gate }
    }

    fn program(&self, side: Side) -> &Program {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    /// Waits for the end, and asserts that the guest is at `guest` then, or at one side if that is open, and
    /// nowhere else at any time. Where it is.
    fn assert_guest_is_at(self, guest: Option<Side>, what: &str) -> Side {
        while !self.migrating.has_ended() {
            self.assert_at_most_one(what);
            std::thread::sleep(Duration::from_millis(5));
        }
        let (answer, _) = self.migrating.end();
        let outcome = &answer["report"]["outcome"];
        let stayed = if outcome == "still-here" { Side::Source } else { Side::Destination };
        let guest = guest.unwrap_or(stayed);
        match guest {
            Side::Source => {
                assert_eq!(outcome, "still-here", "{what}: {answer}");
                self.source.assert_guest_goes_on();
                let there = self.destination.status();
                assert_eq!(there["state"], "receiving", "{what}: {there}");
                self.source.quit();
            }
            Side::Destination => {
                assert_eq!(outcome, "moved", "{what}: {answer}");
                self.destination.assert_guest_goes_on();
                assert!(self.source.end().0.success(), "{what}");
            }
        }
        self.destination.quit();
        guest
    }

    fn assert_at_most_one(&self, what: &str) {
        let state = |program: &Program| {
            try_ask(&program.control, &serde_json::json!({"cmd": "status"}))
                .map_or(Value::Null, |status| status["state"].clone())
        };
        let states = (state(&self.source), state(&self.destination));
        assert!(!(states.0 == "running" && states.1 == "running"), "{what}: two guests run");
    }
}

fn run(case: &Case) -> String {
    let what = format!("{} stopped before {}", format!("{:?}", case.stopped).to_lowercase(), case.phase);
    let bench = Bench::new();
    let pair = Pair::stopped_before(&bench, case.before);
    let other = if case.stopped == Side::Source { Side::Destination } else { Side::Source };
    pair.program(case.stopped).stop();
    let stopped = Instant::now();
    pair.gate.open();
    let names = ["report", "in-doubt", "not-received", "running"];
    let noticed = pair.program(other).event_among(&names);
    let after = stopped.elapsed();
    let heard = noticed["event"] == "running";
    assert!(heard || after > NOT_BEFORE, "{what}: given up after {after:?}: {noticed}");
    pair.program(case.stopped).signal("CONT");
    let guest = pair.assert_guest_is_at(case.guest, &what);
    let noticed = noticed["event"].as_str().unwrap().to_owned();
    let guest = format!("{guest:?}").to_lowercase();
    format!("{what:38} {noticed:13} after {:4.1} s   guest at the {guest}", after.as_secs_f64())
}

#[test]
fn a_peer_that_is_stopped_is_noticed_and_one_guest_runs_when_it_goes_on() {
    if !kvm_is_there() {
        return;
    }
    // together, since each waits for seconds
    let table: Vec<String> = std::thread::scope(|scope| {
        let cases: Vec<_> = CASES.iter().map(|case| scope.spawn(|| run(case))).collect();
        cases.into_iter().map(|case| case.join().unwrap()).collect()
    });
    eprintln!("SIGSTOP\n{}", table.join("\n"));
}

#[test]
fn a_short_stop_is_survived_and_a_long_one_of_both_sides_too() {
    if !kvm_is_there() {
        return;
    }
    let both = [Side::Source, Side::Destination];
    let cases: [(&[Side], Duration); 3] = [
        (&both[..1], Duration::from_secs(3)),
        (&both[1..], Duration::from_secs(3)),
        (&both, Duration::from_secs(12)),
    ];
    std::thread::scope(|scope| {
        for (sides, time) in cases {
            scope.spawn(move || {
                let bench = Bench::new();
                let pair = Pair::stopped_before(&bench, None);
                sides.iter().for_each(|side| pair.program(*side).stop());
                std::thread::sleep(time);
                sides.iter().for_each(|side| pair.program(*side).signal("CONT"));
                pair.gate.open();
                pair.assert_guest_is_at(Some(Side::Destination), &format!("{sides:?} stopped for {time:?}"));
            });
        }
    });
}
