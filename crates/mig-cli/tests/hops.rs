//! Guests that check themselves move between real processes, again and again.
//!
//! A few hops each in the plain test run; `MIG_HOPS` sets the number, and `MIG_MEMTEST` names memtest86+'s
//! image (Debian's package memtest86+, `/boot/memtest86+x64.bin`).

#![allow(missing_docs)]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Program, hop, hops, kvm_is_there, mig_recv, mig_send};

/// Starts a sender with `guest` options that sends to `to` after a moment, and waits until it has moved.
fn send_first(guest: &[&str], to: &str, control: &Path) -> Value {
    let mut command = mig_send();
    command.args(["--to", to, "--after", "300ms", "--verify", "--console", "none"]).args(guest);
    let sender = Program::start(command, control);
    let report = sender.event("report");
    let (status, stderr) = sender.end();
    assert!(status.success(), "{status}: {report}\n{stderr}");
    report
}

/// One line to look at.
fn tell(what: &str, hop: usize, report: &Value) {
    let downtime = report["downtime_ms"].as_f64().unwrap_or(f64::NAN);
    let predicted = report["predicted_downtime_ms"].as_f64().unwrap_or(f64::NAN);
    let total = report["total_ms"].as_f64().unwrap_or(f64::NAN);
    println!(
        "{what} hop {hop}: {} after {} rounds, total {total:.1} ms, downtime {downtime:.2} ms (predicted {predicted:.2}), gap {} ms, verify {}",
        report["stop_reason"], report["rounds"], report["guest_gap_ms"], report["verify"]
    );
}

/// Moves a guest `count` times, with digests compared each time, and asserts that it lives.
fn moves_and_lives(what: &str, guest: &[&str], count: usize) {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = |n: usize| directory.path().join(format!("{n}.sock"));
    let (mut holder, address) = Program::receiver(&socket(0));
    tell(what, 1, &send_first(guest, &address, &directory.path().join("send.sock")));
    for n in 1..count {
        holder.assert_guest_goes_on();
        let (next, address) = Program::receiver(&socket(n));
        let report = hop(&holder, &address, &["--verify"]);
        assert!(report["guest_gap_ms"].is_number(), "{report}");
        tell(what, n + 1, &report);
        let (status, stderr) = holder.end();
        assert!(status.success(), "the holder ends well after its guest has moved: {status}\n{stderr}");
        holder = next;
    }
    holder.assert_guest_goes_on();
    holder.quit();
}

#[test]
fn a_guest_that_checks_every_register_survives_hops() {
    if kvm_is_there() {
        for cpus in ["1", "4"] {
            let guest = ["--guest", "state", "--memory", "64MiB", "--cpus", cpus];
            moves_and_lives(&format!("state, {cpus} vCPUs,"), &guest, hops(3));
        }
    }
}

#[test]
fn a_guest_that_watches_its_clocks_survives_hops() {
    if kvm_is_there() {
        for cpus in ["1", "4"] {
            let guest = ["--guest", "clock", "--memory", "64MiB", "--cpus", cpus];
            moves_and_lives(&format!("clock, {cpus} vCPUs,"), &guest, hops(3));
        }
    }
}

#[test]
fn a_guest_that_dirties_its_memory_moves_with_every_digest_and_stamp_right() {
    if !kvm_is_there() {
        return;
    }
    let runs = std::env::var("MIG_DIRTIER_RUNS").map_or(1, |n| n.parse().expect("a number"));
    for rate in ["20MiB", "100MiB", "400MiB"] {
        for run in 1..=runs {
            let directory = tempfile::tempdir().expect("a directory");
            let (holder, address) = Program::receiver(&directory.path().join("recv.sock"));
            let guest = format!("dirtier:rate={rate},working-set=256MiB,pattern=random");
            let options = ["--guest", &guest, "--memory", "1GiB", "--cpus", "1"];
            let report = send_first(&options, &address, &directory.path().join("send.sock"));
            tell(&format!("dirtier {rate}/s"), run, &report);
            assert_eq!(report["verify"], "ok", "{report}");
            holder.assert_guest_goes_on();
            let check = holder.ask(&serde_json::json!({"cmd": "check"}));
            assert_eq!(check["ok"], true, "the stamps, seen from the host: {check}");
            holder.assert_guest_goes_on();
            holder.quit();
        }
    }
}

#[test]
fn a_guest_whose_vcpus_keep_dirty_rings_moves_on_from_one_that_has_them_too() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let socket = |n: usize| directory.path().join(format!("{n}.sock"));
    let receiver = |n: usize| {
        let mut command = mig_recv();
        command.args(["--listen", "tcp:127.0.0.1:0", "--console", "none", "--dirty-log", "ring"]);
        let receiver = Program::start(command, &socket(n));
        let address = receiver.event("listening")["addr"].as_str().expect("an address").to_owned();
        (receiver, address)
    };
    let guest = ["--guest", "dirtier:rate=100MiB,working-set=64MiB,pattern=random", "--memory", "256MiB"];
    let options = [&guest[..], &["--cpus", "2", "--dirty-log", "ring"]].concat();
    let (mut holder, address) = receiver(0);
    let mut report = send_first(&options, &address, &directory.path().join("send.sock"));
    for n in 1..hops(3) {
        tell("dirtier, rings,", n, &report);
        assert_eq!(report["verify"], "ok", "{report}");
        let check = holder.ask(&serde_json::json!({"cmd": "check"}));
        assert_eq!(check["ok"], true, "the stamps, seen from the host: {check}");
        holder.assert_guest_goes_on();
        let (next, address) = receiver(n);
        report = hop(&holder, &address, &["--verify"]);
        let (status, stderr) = holder.end();
        assert!(status.success(), "{status}\n{stderr}");
        holder = next;
    }
    tell("dirtier, rings,", hops(3), &report);
    holder.assert_guest_goes_on();
    holder.quit();
}

fn memtest() -> Option<PathBuf> {
    let named = std::env::var_os("MIG_MEMTEST").map(PathBuf::from);
    let path = named.clone().unwrap_or_else(|| "/boot/memtest86+x64.bin".into());
    if path.exists() {
        return Some(path);
    }
    assert!(named.is_none(), "MIG_MEMTEST: {} is missing", path.display());
    eprintln!("SKIPPED: no memtest86+ at {} (Debian's package memtest86+)", path.display());
    None
}

/// What memtest86+ shows that changes while it works, without what blinks.
fn progress(screen: &[String]) -> String {
    screen[..screen.len().min(12)].join("\n")
}

/// The number behind `Errors:`, once the tests have begun.
fn errors(screen: &[String]) -> Option<u64> {
    let line = screen.iter().find(|line| line.contains("Errors:"))?;
    line.split("Errors:").nth(1)?.split_whitespace().next()?.parse().ok()
}

/// Waits until the screen shows that its tests run and get on.
fn assert_tests_get_on(holder: &Program) -> Vec<String> {
    let deadline = Instant::now() + Duration::from_secs(180);
    let mut first: Option<String> = None;
    loop {
        let screen = holder.screen();
        let text = progress(&screen);
        if let Some(errors) = errors(&screen) {
            assert_eq!(errors, 0, "memtest86+ found errors:\n{}", screen.join("\n"));
            match &first {
                None => first = Some(text),
                Some(before) if *before != text => return screen,
                Some(_) => {}
            }
        }
        assert!(Instant::now() < deadline, "memtest86+ does not get on:\n{}", screen.join("\n"));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ways to move a guest that writes faster than they take, one for each hop in turn: as it is, with what changed of its
/// pages, slowed until it fits, and compressed.
const WAYS: [&[&str]; 4] = [
    &[],
    &["--bandwidth", "1Gbit", "--compress", "delta"],
    &[
        "--bandwidth",
        "1Gbit",
        "--pause-bandwidth",
        "capped",
        "--downtime",
        "5ms",
        "--priority",
        "shortest-pause",
    ],
    &["--bandwidth", "1Gbit", "--compress", "zstd"],
];

#[test]
fn memtest86_moves_forth_and_back_while_its_tests_run_and_finds_no_error() {
    let Some(image) = memtest().filter(|_| kvm_is_there()) else { return };
    let directory = tempfile::tempdir().expect("a directory");
    let socket = |n: usize| directory.path().join(format!("{n}.sock"));
    let image = image.to_str().expect("a path in UTF-8");
    let options =
        ["--kernel", image, "--cmdline", "nosmp console=ttyS0,115200", "--memory", "32MiB", "--cpus", "1"];
    let (mut holder, address) = Program::receiver(&socket(0));
    let report = send_first(&options, &address, &directory.path().join("send.sock"));
    tell("memtest86+", 1, &report);
    for n in 1..hops(4).max(12) {
        assert_tests_get_on(&holder);
        let (next, address) = Program::receiver(&socket(n));
        let report = hop(&holder, &address, WAYS[n % WAYS.len()]);
        tell("memtest86+", n + 1, &report);
        println!(
            "  {} pages {}, slowed {}",
            WAYS[n % WAYS.len()].join(" "),
            report["pages"],
            report["slowed"]
        );
        holder.end();
        holder = next;
    }
    let screen = assert_tests_get_on(&holder);
    println!("{}", screen.join("\n"));
    holder.quit();
}
