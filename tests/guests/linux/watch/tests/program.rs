//! The program as a guest runs it, on this machine.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

fn watch(args: &[&str], directory: &TempDir) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mig-guest-watch"));
    command.args(args).arg("--dir").arg(directory.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn lines(output: &Output) -> Vec<String> {
    String::from_utf8(output.stdout.clone()).unwrap().lines().map(String::from).collect()
}

fn value(line: &str, key: &str) -> u64 {
    let word = line.split(' ').find_map(|word| word.strip_prefix(&format!("{key}=")));
    word.unwrap_or_else(|| panic!("{key} is in: {line}")).parse().unwrap()
}

#[test]
fn it_says_a_line_a_second_with_everything_checked_and_nothing_wrong() {
    let directory = TempDir::new().unwrap();
    let output = watch(&["--seconds", "3", "--late-limit", "60"], &directory).output().unwrap();
    let lines = lines(&output);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(lines.len(), 4, "{lines:?}");
    for (line, seq) in lines[..3].iter().zip(1..) {
        assert!(line.starts_with(&format!("watch {seq} mono_ms=")), "{line}");
    }
    let apart = value(&lines[2], "mono_ms") - value(&lines[0], "mono_ms");
    assert!(apart >= 1000, "the third line came {apart} ms after the first");
    for key in
        ["patterns", "pages", "nodes", "clocks", "ticks", "sleeps", "alarms", "echoes", "signals", "fpu"]
    {
        assert!(value(&lines[2], key) > 0, "{key}: {}", lines[2]);
    }
    assert_eq!(lines[3], "watch END lines=3 errors=0");
}

#[test]
fn spinning_it_checks_the_same() {
    let directory = TempDir::new().unwrap();
    let args = ["--seconds", "2", "--spin", "--memory", "1MiB", "--late-limit", "60"];
    let output = watch(&args, &directory).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(value(&lines(&output)[1], "clocks") > 0, "{output:?}");
}

#[test]
fn a_peer_that_dies_is_an_error_in_the_text_and_in_the_exit_code() {
    let directory = TempDir::new().unwrap();
    let mut child = watch(&["--seconds", "4", "--late-limit", "60"], &directory).spawn().unwrap();
    let children = format!("/proc/{0}/task/{0}/children", child.id());
    let begin = Instant::now();
    let peer = loop {
        let peers = std::fs::read_to_string(&children).unwrap_or_default();
        if let Some(peer) = peers.split_whitespace().next() {
            break peer.to_string();
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "no peer was started");
        std::thread::sleep(Duration::from_millis(10));
    };
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    stdout.read_line(&mut text).unwrap();
    assert!(text.starts_with("watch 1 "), "it has started: {text}");
    assert!(Command::new("kill").args(["-9", &peer]).status().unwrap().success());
    stdout.read_to_string(&mut text).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(text.contains("watch ERROR "), "{text}");
    assert!(!text.contains("errors=0\nwatch END") && text.contains("watch END lines=4 errors="), "{text}");
}

#[test]
fn a_wrong_word_is_told_with_the_usage() {
    let directory = TempDir::new().unwrap();
    let output = watch(&["--second", "3"], &directory).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("'--second'") && text.contains("usage:"), "{text}");
}
