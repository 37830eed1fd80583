//! A lease file between processes: several that ask at once, and some that are killed while they do.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use mig::Side;
use mig::arbiter::{Arbiter, LeaseFile, SessionId};

/// What a process that is started by a test here is: this program again, told so by its environment.
const ROLE: &str = "MIG_TEST_LEASE_ROLE";
const LEASE: &str = "MIG_TEST_LEASE";
/// Precedes what such a process says, apart from what the test harness prints.
const MARK: &str = "said:";
const SIDES: [Side; 2] = [Side::Source, Side::Destination];

struct Asker {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Asker {
    /// Starts this program again as `role`; it runs the test named like that and nothing else.
    fn start(role: &str, lease: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_process_is_given_what_it_asks_for", "--nocapture", "--test-threads=1"])
            .envs([(ROLE, role.as_ref()), (LEASE, lease.as_os_str())])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (orders, answers) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, orders, answers }
    }

    fn order(&mut self, order: &str) {
        writeln!(self.orders.as_mut().unwrap(), "{order}").unwrap();
    }

    /// The next thing it says; none at its end, and for words that were cut short.
    fn hear(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line).unwrap() == 0 || !line.ends_with('\n') {
                return None;
            }
            // the harness prints the test's name before it, without a line's end
            if let Some((_, said)) = line.trim_end().split_once(MARK) {
                return Some(said.to_owned());
            }
        }
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{MARK}{text}").and_then(|()| out.flush()).unwrap();
}

fn session(text: &str) -> SessionId {
    u128::from_str_radix(text, 16).unwrap().to_be_bytes()
}

/// Claims each session that it is told, for its side.
fn claim_as_told(lease: &LeaseFile, side: Side) {
    for order in std::io::stdin().lines() {
        let given = lease.claim(&session(&order.unwrap()), side).unwrap();
        say(if given { "yes" } else { "no" });
    }
}

/// Begins and claims session after session, and says what it knows, until it is killed.
fn begin_and_claim(lease: &LeaseFile) {
    for n in u128::from(std::process::id()) << 64.. {
        let (name, side) = (format!("{n:032x}"), SIDES[usize::from(n % 3 == 0)]);
        say(&format!("beginning {name}"));
        lease.begin(&session(&name)).unwrap();
        say(&format!("begun {name}"));
        assert!(lease.claim(&session(&name), side).unwrap());
        say(&format!("given {name} {side}"));
    }
}

#[test]
fn a_process_is_given_what_it_asks_for() {
    if let Ok(role) = std::env::var(ROLE) {
        let lease = LeaseFile::open(PathBuf::from(std::env::var_os(LEASE).unwrap())).unwrap();
        return match role.as_str() {
            "source" => claim_as_told(&lease, Side::Source),
            "destination" => claim_as_told(&lease, Side::Destination),
            _ => begin_and_claim(&lease),
        };
    }
    let directory = tempfile::tempdir().unwrap();
    let lease = LeaseFile::open(directory.path().join("lease")).unwrap();
    lease.begin(&session("1")).unwrap();
    let mut source = Asker::start("source", lease.path());
    source.order("1");
    assert_eq!(source.hear().as_deref(), Some("yes"));
    assert!(!lease.claim(&session("1"), Side::Destination).unwrap());
}

#[test]
fn of_processes_that_ask_at_once_those_of_one_side_are_given_a_session() {
    let directory = tempfile::tempdir().unwrap();
    let lease = LeaseFile::open(directory.path().join("lease")).unwrap();
    let mut askers =
        ["source", "destination", "source", "destination"].map(|s| Asker::start(s, lease.path()));
    let mut winners = HashSet::new();
    for n in 1..=2000 {
        let name = format!("{n:x}");
        lease.begin(&session(&name)).unwrap();
        for asker in &mut askers {
            asker.order(&name);
        }
        let answers = askers.each_mut().map(|a| a.hear().unwrap());
        let answers = answers.each_ref().map(String::as_str);
        assert!(
            answers == ["yes", "no", "yes", "no"] || answers == ["no", "yes", "no", "yes"],
            "session {n}: {answers:?}"
        );
        winners.insert(answers[0].to_owned());
    }
    assert_eq!(winners.len(), 2, "neither side was always first");
}

#[test]
fn a_process_that_is_killed_has_what_it_was_told_and_leaves_no_lock_behind() {
    let directory = tempfile::tempdir().unwrap();
    let lease = LeaseFile::open(directory.path().join("lease")).unwrap();
    let mut last_words = HashSet::new();
    for round in 0..150_u64 {
        let mut asker = Asker::start("killed", lease.path());
        let first = asker.hear().unwrap();
        // any moment of what it does over and over
        std::thread::sleep(Duration::from_micros(round * 7919 % 5000));
        asker.child.kill().unwrap();
        let last = std::iter::from_fn(|| asker.hear()).last().unwrap_or(first);
        let mut words = last.split(' ');
        let (what, name) = (words.next().unwrap(), session(words.next().unwrap()));
        last_words.insert(what.to_owned());
        let claims = SIDES.map(|side| {
            let lease = lease.clone();
            std::thread::spawn(move || lease.claim(&name, side).unwrap())
        });
        let given = claims.map(|c| c.join().unwrap());
        match (what, words.next()) {
            ("given", Some("source")) => assert_eq!(given, [true, false], "{last}"),
            ("given", _) => assert_eq!(given, [false, true], "{last}"),
            ("begun", _) => assert_ne!(given[0], given[1], "{last}"),
            // whether it had begun is not known: given to one, or to nobody
            _ => assert_ne!(given, [true, true], "{last}"),
        }
    }
    assert!(last_words.len() > 1, "they were killed at various moments: {last_words:?}");
}
