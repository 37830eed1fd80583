//! What goes wrong is said with side, step, cause and remedy, and the guest goes on.

#![allow(missing_docs)]

mod support;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};
use support::{Program, kvm_is_there, mig_recv, mig_send};

/// Starts a sender with a small guest that sends to `to` at once.
fn sender(to: &str, directory: &Path) -> Program {
    let mut command = mig_send();
    command.args(["--guest", "clock", "--memory", "64MiB", "--to", to, "--after", "100ms"]);
    Program::start(command, &directory.join("send.sock"))
}

fn assert_four_answers(failure: &Value) {
    for answer in ["side", "step", "cause", "remedy"] {
        assert!(failure[answer].as_str().is_some_and(|t| !t.is_empty()), "{answer} is said: {failure}");
    }
}

/// Asserts that the guest did not move, that the reason is named, and that it goes on.
fn assert_still_here(sender: Program, side: &str, step: &str, cause: &str) {
    let report = sender.event("report");
    assert_eq!(report["outcome"], "still-here", "{report}");
    let fault = &report["fault"];
    assert_four_answers(fault);
    assert_eq!((fault["side"].as_str(), fault["step"].as_str()), (Some(side), Some(step)), "{fault}");
    assert!(fault["cause"].as_str().unwrap().contains(cause), "{cause}: {fault}");
    sender.assert_guest_goes_on();
    sender.ask(&json!({"cmd": "quit"}));
    assert_eq!(sender.end().0.code(), Some(1));
}

#[test]
fn the_demo_moves_its_guest_and_exits_with_0() {
    if !kvm_is_there() {
        return;
    }
    let shown = mig_send().arg("--demo").output().expect("it starts");
    let text = String::from_utf8_lossy(&shown.stdout);
    assert_eq!(shown.status.code(), Some(0), "{text}{}", String::from_utf8_lossy(&shown.stderr));
    for words in ["moved in", "downtime", "verified", "heartbeats", "as the guest left them"] {
        assert!(text.contains(words), "{words} in\n{text}");
    }
    assert!(!text.contains('\x1b'), "no colours where there is no terminal");
}

#[test]
fn a_name_that_does_not_resolve_leaves_the_guest_here() {
    if kvm_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let sender = sender("tcp:no-such-host.invalid:4444", directory.path());
        assert_still_here(sender, "source", "connect", "no-such-host.invalid");
    }
}

#[test]
fn ctrl_c_as_soon_as_a_guest_has_started_ends_it_and_takes_its_socket_away() {
    if kvm_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = mig_send();
        command.args(["--guest", "clock", "--memory", "64MiB", "--to", "tcp:127.0.0.1:1", "--after", "1m"]);
        let sender = Program::start(command, &directory.path().join("send.sock"));
        sender.event("started");
        sender.signal("INT");
        let (control, (status, _)) = (sender.control.clone(), sender.end());
        assert_eq!(status.code(), Some(1));
        assert!(!control.exists());
    }
}

#[test]
fn a_refused_port_leaves_the_guest_here() {
    if kvm_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert_still_here(sender(&format!("tcp:{free}"), directory.path()), "source", "connect", "refused");
    }
}

#[test]
fn a_receiver_with_too_little_memory_names_it_and_listens_on() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut command = mig_recv();
    command.args(["--listen", "tcp:127.0.0.1:0", "--max-memory", "32MiB"]);
    let receiver = Program::start(command, &directory.path().join("recv.sock"));
    let address = receiver.event("listening")["addr"].as_str().unwrap().to_owned();
    let sender = sender(&address, directory.path());
    assert_still_here(sender, "destination", "prepare", "memory");
    assert_four_answers(&receiver.event("not-received"));
    assert_eq!(receiver.status()["state"], "receiving");
    receiver.quit();
}

/// Where KVM can shift a guest's TSC the guest moves, elsewhere the choice is refused by name.
#[test]
fn guest_time_stands_still_or_is_refused_before_a_page_moves() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (receiver, address) = Program::receiver(&directory.path().join("recv.sock"));
    let mut command = mig_send();
    command.args(["--guest", "clock", "--memory", "64MiB", "--to", &address, "--after", "100ms"]);
    command.args(["--guest-time", "stop"]);
    let sender = Program::start(command, &directory.path().join("send.sock"));
    let report = sender.event("report");
    if report["outcome"] == "moved" {
        let time = &receiver.event("running")["guest_time"];
        assert_eq!((time["choice"].as_str(), time["advanced_ms"].as_f64()), (Some("stop"), Some(0.0)));
        receiver.assert_guest_goes_on();
    } else {
        assert_four_answers(&report["fault"]);
        assert!(report["fault"]["cause"].as_str().unwrap().contains("guest time"), "{report}");
        assert_eq!(report["sent_bytes"], 0, "{report}");
        sender.assert_guest_goes_on();
        let report = support::hop(&sender, &address, &[]);
        let time = &receiver.event("running")["guest_time"];
        let advanced_ms = time["advanced_ms"].as_f64().expect("a time");
        assert!(
            advanced_ms > 0.0 && advanced_ms <= report["downtime_ms"].as_f64().unwrap(),
            "{time} {report}"
        );
        assert_eq!((time["choice"].as_str(), time["same_host"].as_bool()), (Some("advance"), Some(true)));
        receiver.assert_guest_goes_on();
    }
}

#[test]
fn a_peer_that_speaks_http_leaves_the_guest_here() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let _ = stream.read(&mut request);
        let answer = "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n";
        // The sender may have hung up in the middle, which is what it should.
        let _ = stream.write_all(answer.repeat(20).as_bytes());
    });
    assert_still_here(sender(&format!("tcp:{address}"), directory.path()), "source", "handshake", "");
}

#[test]
fn somebody_who_speaks_http_to_a_receiver_is_turned_away_and_the_next_guest_is_received() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (receiver, address) = Program::receiver(&directory.path().join("recv.sock"));
    let mut stranger = std::net::TcpStream::connect(address.strip_prefix("tcp:").unwrap()).unwrap();
    stranger.write_all("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(20).as_bytes()).unwrap();
    let sender = sender(&address, directory.path());
    assert_eq!(sender.event("report")["outcome"], "moved");
    assert_eq!(sender.end().0.code(), Some(0));
    receiver.assert_guest_goes_on();
    receiver.quit();
}

#[test]
fn a_migration_that_hangs_can_be_cancelled_and_the_guest_moves_later() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = sender(&format!("tcp:{}", silent.local_addr().unwrap()), directory.path());
    sender.event("migrating");
    let second = sender.ask(&json!({"cmd": "migrate", "to": "tcp:127.0.0.1:1"}));
    assert_eq!(second["ok"], false, "one at a time: {second}");
    assert_eq!(sender.status()["state"], "migrating");
    assert_eq!(sender.ask(&json!({"cmd": "cancel"})), json!({"ok": true}));
    assert_eq!(sender.event("report")["outcome"], "still-here");
    sender.assert_guest_goes_on();
    let (receiver, address) = Program::receiver(&directory.path().join("recv.sock"));
    let answer = sender.ask(&json!({"cmd": "migrate", "to": address}));
    assert_eq!((&answer["ok"], &answer["report"]["outcome"]), (&json!(true), &json!("moved")), "{answer}");
    assert_eq!(sender.end().0.code(), Some(0), "it moved after all");
    receiver.assert_guest_goes_on();
    receiver.quit();
}

/// 32-bit code that resets the machine when the clock's seconds have changed three times.
const RESET_AFTER_SECONDS: [u8; 31] = [
    0xb9, 3, 0, 0, 0, // mov ecx, 3
    0x30, 0xc0, 0xe6, 0x70, 0xe4, 0x71, 0x88, 0xc3, // again: bl = seconds
    0x30, 0xc0, 0xe6, 0x70, 0xe4, 0x71, 0x38, 0xd8, 0x74, 0xf6, // while they are the same
    0x49, 0x75, 0xeb, // dec ecx; jnz again
    0xb0, 0xfe, 0xe6, 0x64, 0xf4, // the keyboard controller's reset line
];

#[test]
fn a_guest_that_resets_while_it_migrates_ends_the_migration_and_says_so() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, support::bzimage(&RESET_AFTER_SECONDS)).unwrap();
    // Whom nobody answers waits longer than the guest lives.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = mig_send();
    command.args(["--memory", "4MiB", "--cpus", "1", "--after", "100ms", "--console", "none"]);
    command.arg("--to").arg(format!("tcp:{}", silent.local_addr().unwrap()));
    command.arg("--kernel").arg(&kernel);
    let sender = Program::start(command, &directory.path().join("send.sock"));
    sender.event("migrating");
    let report = sender.event("report");
    assert_eq!(report["outcome"], "still-here", "{report}");
    assert_eq!(report["fault"]["cause"], "the guest reset the machine", "{report}");
    assert_eq!(sender.event("ended")["reason"], "the guest reset the machine");
    assert_eq!(sender.end().0.code(), Some(1), "it did not move");
}

#[test]
fn a_paused_guest_stands_still_and_does_not_move() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut command = mig_send();
    let to = format!("tcp:{}", silent.local_addr().unwrap());
    command.args(["--guest", "clock", "--memory", "64MiB", "--to", &to, "--after", "600s"]);
    let sender = Program::start(command, &directory.path().join("send.sock"));
    sender.event("started");
    assert_eq!(sender.ask(&json!({"cmd": "pause"}))["ok"], true);
    let before = sender.heartbeats();
    let refused = sender.ask(&json!({"cmd": "migrate", "to": to}));
    assert_eq!(refused["ok"], false, "{refused}");
    assert_four_answers(&refused["error"]);
    assert_eq!((sender.heartbeats(), &sender.status()["state"]), (before, &json!("paused")));
    assert_eq!(sender.ask(&json!({"cmd": "screen"}))["screen"].as_array().unwrap().len(), 25);
    assert_eq!(sender.ask(&json!({"cmd": "resume"}))["ok"], true);
    sender.assert_guest_goes_on();
    sender.quit();
}

/// Asserts that nothing was started, and that people and programs are told why in four answers.
fn assert_not_started(mut command: impl FnMut() -> Command, cause: &str) {
    let said = command().arg("--json").output().expect("it starts");
    let event: Value = serde_json::from_slice(&said.stdout).unwrap_or_else(|e| panic!("{e}: {said:?}"));
    assert_eq!((said.status.code(), &event["event"]), (Some(2), &json!("error")), "{event}");
    assert_four_answers(&event);
    assert!(event["cause"].as_str().unwrap().contains(cause), "{cause}: {event}");
    let Output { stderr, stdout, status } = command().output().expect("it starts");
    let text = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(2), "{text}");
    for word in ["side:", "step:", "cause:", "remedy:"] {
        assert!(text.contains(word), "{word} in {text}{}", String::from_utf8_lossy(&stdout));
    }
}

#[test]
fn what_cannot_be_started_is_said_before_a_guest_is() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text");
    std::fs::write(&text, "no kernel ".repeat(1000)).unwrap();
    let with = |options: &[&str]| {
        let options: Vec<String> = options.iter().map(|o| (*o).to_owned()).collect();
        move || {
            let mut command = mig_send();
            command.args(["--to", "tcp:127.0.0.1:1"]).args(&options);
            command
        }
    };
    assert_not_started(with(&["--kernel", "/nonexistent/vmlinux"]), "/nonexistent/vmlinux");
    assert_not_started(with(&["--kernel", text.to_str().unwrap()]), "not a kernel");
    assert_not_started(with(&["--guest", "nosuch"]), "nosuch");
    assert_not_started(with(&["--guest", "dirtier:working-set=4GiB"]), "memory");
    assert_not_started(with(&["--guest", "idle", "--cpus", "99"]), "99");
    assert_not_started(with(&["--guest", "idle", "--control", "unix:/nonexistent/x"]), "/nonexistent/x");
    assert_not_started(with(&["--vm", "unix:/nonexistent/x"]), "/nonexistent/x");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("tcp:{}", taken.local_addr().unwrap());
    let recv = || {
        let mut command = mig_recv();
        command.args(["--listen", &address]);
        command
    };
    assert_not_started(recv, &address);
}

#[test]
fn without_permission_on_dev_kvm_it_is_said_how_to_get_it() {
    if !kvm_is_there() {
        return;
    }
    let nobody = 65534;
    let directory = tempfile::tempdir().unwrap();
    let is_root = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(directory.path()).unwrap()) == 0;
    let mode = std::fs::metadata("/dev/kvm").unwrap().permissions().mode();
    if !is_root || mode & 0o006 != 0 {
        eprintln!("SKIPPED: only root can become somebody who may not open /dev/kvm, if there is somebody");
        return;
    }
    let open_to_all = || std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(directory.path(), open_to_all()).unwrap();
    for (original, options) in [
        (mig_send(), ["--guest", "idle", "--to", "tcp:127.0.0.1:1"].as_slice()),
        (mig_recv(), ["--listen", "tcp:127.0.0.1:0"].as_slice()),
    ] {
        let program = directory.path().join(Path::new(original.get_program()).file_name().unwrap());
        std::fs::copy(original.get_program(), &program).unwrap();
        let control = format!("unix:{}", directory.path().join("control").display());
        let command = || {
            let mut command = Command::new(&program);
            command.uid(nobody).gid(nobody).args(options).args(["--control", &control]);
            command
        };
        assert_not_started(command, "/dev/kvm");
    }
}
