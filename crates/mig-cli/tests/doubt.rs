//! Two programs that lose each other around Commit, on a wire that a test cuts and mends; and the lease that
//! decides then.

#![allow(missing_docs)]

#[path = "support/wire.rs"]
mod wire;

mod support;

use std::path::Path;

use serde_json::{Value, json};
use support::{Program, hop, kvm_is_there, mig_recv, mig_send};
use wire::{COMMIT, RUNNING, Wire};

/// A receiver and its address, with a lease if there is one.
fn receiver(directory: &Path, name: &str, lease: Option<&Path>) -> (Program, String) {
    let mut command = mig_recv();
    command.args(["--listen", "tcp:127.0.0.1:0", "--console", "none"]);
    if let Some(lease) = lease {
        command.arg("--lease").arg(lease);
    }
    let receiver = Program::start(command, &directory.join(name));
    let address = receiver.event("listening")["addr"].as_str().unwrap().to_owned();
    (receiver, address)
}

fn sender(directory: &Path, to: &str, lease: Option<&Path>) -> Program {
    let mut command = mig_send();
    command.args(["--guest", "clock", "--memory", "64MiB", "--to", to, "--after", "100ms"]);
    if let Some(lease) = lease {
        command.arg("--lease").arg(lease);
    }
    Program::start(command, &directory.join("send.sock"))
}

/// `mig-send --vm --resolve`: its exit code, and what it said last.
fn resolve(program: &Program, word: &str) -> (Option<i32>, Value) {
    let mut command = mig_send();
    command.args(["--vm", &format!("unix:{}", program.control.display()), "--resolve", word, "--json"]);
    let said = command.output().unwrap();
    let text = String::from_utf8_lossy(&said.stdout);
    let last = text.lines().last().unwrap_or_else(|| panic!("{said:?}"));
    (said.status.code(), serde_json::from_str(last).unwrap())
}

fn assert_in_doubt(program: &Program, side: &str) {
    let doubt = program.event("in-doubt");
    for answer in ["step", "cause", "remedy"] {
        assert!(doubt[answer].as_str().is_some_and(|t| !t.is_empty()), "{answer} is said: {doubt}");
    }
    assert!(doubt["remedy"].as_str().unwrap().contains("--resolve resume|discard"), "{doubt}");
    let status = program.status();
    assert_eq!(status["state"], "in-doubt", "{side}: {status}");
    assert!(status["doubt"]["for_ms"].as_f64().is_some(), "{status}");
    assert!(status["memory_bytes"].as_u64().is_some_and(|bytes| bytes > 0), "{status}");
    for request in ["pause", "check", "cancel", "resume"] {
        let refused = program.ask(&json!({"cmd": request}));
        assert_eq!(refused["ok"], false, "{side} {request}: {refused}");
        assert!(refused["error"]["remedy"].as_str().unwrap().contains("resolve"), "{refused}");
    }
    let before = program.heartbeats();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(program.heartbeats(), before, "{side}: the guest stands still");
}

/// Both sides, after the link was lost as `kind` was on its way.
fn lost_at(kind: u16, directory: &Path, lease: Option<&Path>) -> (Wire, Program, Program) {
    let (receiver, address) = receiver(directory, "recv.sock", lease);
    let wire = Wire::to(&address);
    wire.cut_at(kind);
    let sender = sender(directory, &wire.address(), lease);
    (wire, sender, receiver)
}

#[test]
fn a_guest_whose_commit_was_lost_comes_back_when_the_link_does() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (wire, sender, receiver) = lost_at(COMMIT, directory.path(), None);
    assert_in_doubt(&sender, "source");
    assert_in_doubt(&receiver, "destination");
    assert!(sender.event("in-doubt")["asked"].as_u64().unwrap() > 0, "it asks");
    wire.mend();
    let report = sender.event("report");
    assert_eq!(report["outcome"], "still-here", "{report}");
    receiver.event("not-received");
    sender.assert_guest_goes_on();
    assert_eq!(receiver.status()["state"], "receiving");
    hop(&sender, &wire.address(), &[]);
    receiver.assert_guest_goes_on();
    assert_eq!(sender.end().0.code(), Some(0), "it moved after all");
    receiver.quit();
}

#[test]
fn a_guest_that_runs_over_there_is_known_to_when_the_link_comes_back() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (wire, sender, receiver) = lost_at(RUNNING, directory.path(), None);
    assert_in_doubt(&sender, "source");
    receiver.event("running");
    receiver.assert_guest_goes_on();
    wire.mend();
    let report = sender.event("report");
    assert_eq!(report["outcome"], "moved", "{report}");
    assert!(report["downtime_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{report}");
    assert_eq!(sender.end().0.code(), Some(0));
    receiver.assert_guest_goes_on();
    receiver.quit();
}

#[test]
fn an_operator_s_word_resumes_on_one_side_and_discards_on_the_other() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (_wire, sender, receiver) = lost_at(COMMIT, directory.path(), None);
    assert_in_doubt(&sender, "source");
    assert_in_doubt(&receiver, "destination");
    let (code, said) = resolve(&receiver, "discard");
    assert_eq!((code, &said["event"]), (Some(0), &json!("note")), "{said}");
    receiver.event("not-received");
    assert_eq!(receiver.status()["state"], "receiving");
    assert_eq!(resolve(&receiver, "resume").0, Some(1), "there is nothing left to resolve");
    let answer = sender.ask(&json!({"cmd": "resolve", "word": "resume"}));
    assert_eq!(answer, json!({"ok": true, "state": "running"}));
    assert_eq!(sender.event("report")["outcome"], "still-here");
    sender.assert_guest_goes_on();
    sender.quit();
    receiver.quit();
}

#[test]
fn a_copy_that_is_resumed_runs_and_the_source_is_discarded_with_a_code_of_its_own() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (_wire, sender, receiver) = lost_at(COMMIT, directory.path(), None);
    assert_in_doubt(&sender, "source");
    assert_in_doubt(&receiver, "destination");
    assert_eq!(resolve(&sender, "discard").0, Some(0));
    let report = sender.event("report");
    assert_eq!(report["outcome"], "discarded", "{report}");
    assert!(report["fault"]["remedy"].as_str().unwrap().contains("destination"), "{report}");
    assert_eq!(sender.end().0.code(), Some(3));
    assert_eq!(resolve(&receiver, "resume").0, Some(0));
    receiver.event("running");
    receiver.assert_guest_goes_on();
    receiver.quit();
}

#[test]
fn ctrl_c_twice_discards_a_guest_in_doubt_and_not_once() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (_wire, sender, receiver) = lost_at(COMMIT, directory.path(), None);
    for program in [sender, receiver] {
        program.event("in-doubt");
        program.signal("INT");
        let note = program.event("note");
        assert!(note["text"].as_str().unwrap().contains("last copy"), "{note}");
        assert_eq!(program.status()["state"], "in-doubt");
        program.signal("INT");
        assert_eq!(program.end().0.code(), Some(3));
    }
}

#[test]
fn a_lease_gives_the_guest_back_to_a_source_that_nobody_answers_and_overrules_a_wrong_word() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let lease = directory.path().join("lease");
    let (_wire, sender, receiver) = lost_at(COMMIT, directory.path(), Some(&lease));
    let report = sender.event("report");
    assert_eq!(report["outcome"], "still-here", "{report}");
    sender.assert_guest_goes_on();
    assert_in_doubt(&receiver, "destination");
    let (code, said) = resolve(&receiver, "resume");
    assert_eq!((code, &said["event"]), (Some(1), &json!("error")), "{said}");
    assert!(said["cause"].as_str().unwrap().contains("source"), "{said}");
    receiver.event("word-refused");
    assert_eq!(receiver.status()["state"], "in-doubt");
    assert_eq!(resolve(&receiver, "discard").0, Some(0));
    sender.assert_guest_goes_on();
    sender.quit();
    receiver.quit();
}

#[test]
fn a_lease_denies_the_guest_to_a_source_whose_destination_runs_it() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let lease = directory.path().join("lease");
    let (wire, sender, receiver) = lost_at(RUNNING, directory.path(), Some(&lease));
    assert_in_doubt(&sender, "source");
    receiver.event("running");
    assert_eq!(resolve(&sender, "resume").0, Some(1));
    sender.event("word-refused");
    assert_eq!(sender.status()["state"], "in-doubt");
    wire.mend();
    assert_eq!(sender.event("report")["outcome"], "moved");
    receiver.assert_guest_goes_on();
    receiver.quit();
}

#[test]
fn a_lease_goes_with_its_guest_and_another_or_none_is_refused_by_name() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [lease, other] = ["lease", "other"].map(|name| directory.path().join(name));
    let (first, to_first) = receiver(directory.path(), "first.sock", Some(&lease));
    let moving = sender(directory.path(), &to_first, Some(&lease));
    assert_eq!(moving.event("report")["outcome"], "moved");
    first.event("running");
    let text = std::fs::read_to_string(&lease).unwrap();
    assert!(text.contains("owner destination"), "{text}");
    let refused = |receiver: &Program, to: &str| {
        let answer = first.ask(&json!({"cmd": "migrate", "to": to}));
        assert_eq!((&answer["ok"], &answer["report"]["outcome"]), (&json!(false), &json!("still-here")));
        let fault = &answer["error"];
        assert_eq!(fault["side"], "destination", "{fault}");
        assert!(fault["cause"].as_str().unwrap().contains("arbiter"), "{fault}");
        assert!(fault["remedy"].as_str().unwrap().contains("lease"), "{fault}");
        assert_eq!(answer["report"]["sent_bytes"], 0, "{answer}");
        receiver.event("not-received");
        first.assert_guest_goes_on();
    };
    let (wrong, to_wrong) = receiver(directory.path(), "wrong.sock", Some(&other));
    refused(&wrong, &to_wrong);
    let (without, to_without) = receiver(directory.path(), "without.sock", None);
    refused(&without, &to_without);
    let (second, to_second) = receiver(directory.path(), "second.sock", Some(&lease));
    hop(&first, &to_second, &[]);
    second.assert_guest_goes_on();
    let report = second.ask(&json!({"cmd": "migrate", "to": to_without}))["report"].clone();
    assert_eq!(report["outcome"], "still-here", "{report}");
    let unarbitrated = sender(directory.path(), &to_wrong, None);
    let fault = unarbitrated.event("report")["fault"].clone();
    assert!(fault["cause"].as_str().unwrap().contains("arbiter"), "{fault}");
    for program in [second, wrong, without, unarbitrated] {
        program.quit();
    }
}

#[test]
fn a_file_that_is_no_lease_is_refused_before_anything_is_started() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("precious");
    std::fs::write(&path, "precious").unwrap();
    let missing = directory.path().join("no/lease");
    for file in [&path, &missing] {
        for mut command in [mig_send(), mig_recv()] {
            let program = command.get_program().to_string_lossy().into_owned();
            let options =
                if program.ends_with("send") { ["--guest", "idle"] } else { ["--listen", "tcp:127.0.0.1:0"] };
            let said = command.args(options).arg("--lease").arg(file).arg("--json").output().unwrap();
            let error: Value = serde_json::from_slice(&said.stdout).unwrap();
            if program.ends_with("recv") && error["step"] == "start" {
                eprintln!("SKIPPED: no /dev/kvm");
                continue;
            }
            assert_eq!((said.status.code(), &error["step"]), (Some(2), &json!("lease")), "{error}");
            assert!(error["cause"].as_str().unwrap().contains(file.to_str().unwrap()), "{error}");
            assert!(!error["remedy"].as_str().unwrap().is_empty());
        }
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    assert!(!missing.exists());
}
