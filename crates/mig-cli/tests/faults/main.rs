//! Every named fault point of a migration between real programs, and every fault there. After each, guests are
//! counted by their heartbeats: never two, and one wherever the design says so.

#![allow(missing_docs)]

#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use mig::fault_points::Point;
use serde_json::Value;
use support::{Program, kvm_is_there, mig_recv, mig_send};

/// The points in `trace`, each once, in the order of the table.
fn reached(trace: &Path) -> Vec<Point> {
    let text = std::fs::read_to_string(trace).unwrap_or_default();
    let reached: Vec<Point> = text.lines().map(|name| name.parse().expect("a point's name")).collect();
    Point::ALL.iter().copied().filter(|p| reached.contains(p)).collect()
}

#[test]
fn a_migration_reaches_every_point() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [send_trace, recv_trace] = ["send", "recv"].map(|side| directory.path().join(side));
    let mut command = mig_recv();
    command.args(["--listen", "tcp:127.0.0.1:0", "--console", "none"]).env("MIG_FAULT_TRACE", &recv_trace);
    let receiver = Program::start(command, &directory.path().join("recv.sock"));
    let address = receiver.event("listening")["addr"].as_str().unwrap().to_owned();
    let mut command = mig_send();
    command.args(["--guest", "idle", "--memory", "64MiB", "--to", &address, "--after", "10ms"]);
    command.env("MIG_FAULT_TRACE", &send_trace);
    let sender = Program::start(command, &directory.path().join("send.sock"));
    assert_eq!(sender.event("report")["outcome"], "moved");
    receiver.event("running");
    let (source, destination): (Vec<Point>, Vec<Point>) =
        Point::ALL.iter().partition(|p| p.name().starts_with("source."));
    assert_eq!((reached(&send_trace), reached(&recv_trace)), (source, destination));
    receiver.quit();
}

#[test]
fn an_unknown_point_is_refused_before_anything_is_started() {
    for mut command in [mig_send(), mig_recv()] {
        let said = command.arg("--json").env("MIG_FAULT", "source.nowhere:kill").output().unwrap();
        let event: Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!((said.status.code(), &event["event"]), (Some(2), &"error".into()), "{event}");
        assert!(event["cause"].as_str().unwrap().contains("source.committing"), "{event}");
    }
}
