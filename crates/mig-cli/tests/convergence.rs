//! A guest that writes faster than the link takes, with the real programs: it is slowed, and has its speed back however
//! that ends; a cap is changed while it moves.

#![allow(missing_docs)]

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::bench::{Bench, Migrating};
use support::{Program, kvm_is_there, mig_send};

/// Writes as fast as it can.
const WRITER: &str = "dirtier:rate=1TiB,working-set=32MiB";

/// How a migration that slows the guest ends.
#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Cancelled,
    ReceiverKilled,
    GivenUp,
    Moved,
}

/// Pages that a dirtier writes in a second: the best of a few looks, since a busy host only takes away.
fn speed(holder: &Program) -> f64 {
    let written = || holder.dirtied_pages() as f64;
    let look = |_| {
        let (before, began) = (written(), Instant::now());
        std::thread::sleep(Duration::from_millis(100));
        (written() - before) / began.elapsed().as_secs_f64()
    };
    (0..5).map(look).fold(0.0, f64::max)
}

/// The part of a processor that a program's vCPUs use.
fn busy(program: &Program) -> f64 {
    let (before, began) = (vcpu_ticks(program), Instant::now());
    std::thread::sleep(Duration::from_millis(600));
    // in hundredths of a second (proc(5))
    (vcpu_ticks(program) - before) as f64 / 100.0 / began.elapsed().as_secs_f64()
}

fn vcpu_ticks(program: &Program) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", program.id())).expect("it runs");
    let ticks = |task: std::io::Result<std::fs::DirEntry>| {
        let stat = std::fs::read_to_string(task.expect("a thread").path().join("stat")).unwrap_or_default();
        let (name, rest) = stat.rsplit_once(") ").unwrap_or_default();
        let used = |field: usize| rest.split(' ').nth(field).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        // of the fields behind the name, utime and stime
        if name.contains("(vcpu-") { used(11) + used(12) } else { 0 }
    };
    tasks.map(ticks).sum()
}

fn request(end: End) -> Value {
    match end {
        // no pause is short enough, and there are rounds enough to be looked at
        End::Cancelled | End::ReceiverKilled => {
            json!({"bandwidth": "400Mbit", "pause_bandwidth": "capped", "downtime_ms": 1, "priority": "never-over-budget"})
        }
        End::GivenUp => {
            json!({"bandwidth": "400Mbit", "pause_bandwidth": "capped", "downtime_ms": 1, "max_rounds": 6,
                   "priority": "never-over-budget"})
        }
        End::Moved => {
            json!({"bandwidth": "400Mbit", "downtime_ms": 1, "max_rounds": 6, "priority": "shortest-pause"})
        }
    }
}

#[test]
fn a_slowed_guest_has_its_speed_back_however_its_migration_ends() {
    if !kvm_is_there() {
        return;
    }
    let bench = Bench::new();
    let mut table = Vec::new();
    for end in [End::Cancelled, End::ReceiverKilled, End::GivenUp, End::Moved] {
        let holder = bench.holder(WRITER, "64MiB");
        let (target, address) = bench.receiver();
        let (before, busy_before) = (speed(&holder), busy(&holder));
        let migrating = Migrating::begin_with(&holder, &address, request(end));
        // in the second step it is slowed so much that even a busy host, which takes from both, cannot hide it
        let mut steps = 0;
        let under_way = loop {
            let round = holder.event("round");
            match round["decision"].as_str() {
                Some("throttle") if steps == 1 => break true,
                Some("throttle") => steps += 1,
                Some("continue") => {}
                _ => break false,
            }
        };
        let slowed = if under_way { busy(&holder) } else { 0.0 };
        assert!(
            slowed < busy_before * 0.6,
            "{end:?}: {slowed} of {busy_before} processors while it is slowed"
        );
        let end = if under_way || end == End::Moved { end } else { End::GivenUp };
        match end {
            End::Cancelled => assert_eq!(holder.ask(&json!({"cmd": "cancel"})), json!({"ok": true})),
            End::ReceiverKilled => target.signal("KILL"),
            End::GivenUp | End::Moved => {}
        }
        let (answer, _) = migrating.end();
        let report = &answer["report"];
        let here = if end == End::Moved { "moved" } else { "still-here" };
        assert_eq!(report["outcome"], here, "{end:?}: {answer}");
        assert!(report["slowed"]["most_percent"].as_u64() > Some(0), "{end:?}: {answer}");
        if end == End::GivenUp {
            assert!(report["shortfall"]["bytes_per_second"].as_u64() > Some(0), "{answer}");
        }
        let after = speed(if end == End::Moved { &target } else { &holder });
        table.push(format!(
            "{end:15?} speed after/before {:.2}, processors while slowed {slowed:.2} of {busy_before:.2}",
            after / before
        ));
        assert!(after > before / 2.0, "{end:?}: {before} pages a second before, {after} after");
        match end {
            End::Moved => target.quit(),
            _ => holder.quit(),
        }
    }
    eprintln!("{}", table.join("\n"));
}

#[test]
fn the_bandwidth_is_changed_while_a_guest_moves_and_by_nobody_else() {
    if !kvm_is_there() {
        return;
    }
    let bench = Bench::new();
    let holder = bench.holder("idle:fill=random", "64MiB");
    let set = |rate: &str| {
        let mut command = mig_send();
        command.args([
            "--vm",
            &format!("unix:{}", holder.control.display()),
            "--set-bandwidth",
            rate,
            "--json",
        ]);
        command.output().expect("the program starts")
    };
    let early = set("1Gbit");
    let said = String::from_utf8_lossy(&early.stdout).into_owned();
    assert!(!early.status.success() && said.contains("no migration runs"), "{said}");
    let (target, address) = bench.receiver();
    // at this rate it would take nine minutes
    let migrating = Migrating::begin_with(&holder, &address, json!({"bandwidth": "1Mbit"}));
    holder.event("copying");
    let began = Instant::now();
    let changed = set("off");
    assert!(changed.status.success(), "{}", String::from_utf8_lossy(&changed.stdout));
    let (answer, _) = migrating.end();
    assert_eq!(answer["report"]["outcome"], "moved", "{answer}");
    assert!(began.elapsed() < Duration::from_secs(120));
    target.assert_guest_goes_on();
    target.quit();
}

#[test]
fn a_guest_is_watched_before_it_moves_and_what_is_foretold_comes_true() {
    if !kvm_is_there() {
        return;
    }
    let bench = Bench::new();
    let holder = bench.holder("dirtier:rate=4MiB,working-set=16MiB", "64MiB");
    let estimate = json!({"cmd": "estimate", "bandwidth": "400Mbit", "priority": "balanced"});
    let answer = holder.ask(&estimate);
    assert_eq!(answer["ok"], true, "{answer}");
    let forecast = &answer["forecasts"][0];
    assert_eq!((&forecast["moves"], &forecast["fits"]), (&json!(true), &json!(true)), "{answer}");
    let dirtied: Vec<u64> =
        answer["dirtied"].as_array().unwrap().iter().map(|d| d["bytes"].as_u64().unwrap()).collect();
    assert!(dirtied.is_sorted() && dirtied.last().unwrap() <= &(24 << 20), "{answer}");
    holder.assert_guest_goes_on();
    let (target, address) = bench.receiver();
    let migrating = Migrating::begin_with(&holder, &address, json!({"bandwidth": "400Mbit"}));
    let (answer, _) = migrating.end();
    assert_eq!(answer["report"]["outcome"], "moved", "{answer}");
    assert!(answer["report"]["slowed"].is_null() == (forecast["most_throttle_percent"] == 0), "{answer}");
    target.assert_guest_goes_on();
    target.quit();
}
