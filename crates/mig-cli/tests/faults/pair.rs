//! A sender and a receiver of which one comes to a fault point: where each of them then is, and how many guests
//! beat.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use mig::fault_points::Point::{self, *};
use serde_json::{Value, json};

use crate::census::Census;
use crate::hosts::{Cut, Hosts, LISTEN};
use crate::support::{Program, mig_recv, mig_send, try_ask};

/// Far more than anything here takes.
pub const PATIENCE: Duration = Duration::from_secs(60);
const SHORTEST_INTERVAL: Duration = Duration::from_millis(2);
const LONGEST_INTERVAL: Duration = Duration::from_millis(100);
/// So many beats show that a guest lives, and are time enough for another to show that it does, too.
const BEATS: u64 = 30;

/// A side of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    Source,
    Destination,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The side that comes to a point.
    pub fn of(point: Point) -> Self {
        if point < DestinationHelloHeard { Self::Source } else { Self::Destination }
    }

    pub fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// What has become of a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// The guest runs here.
    Runs,
    /// The guest moved away, and the program has ended.
    Moved,
    /// No guest came, and the program listens.
    Listens,
    /// The guest is here, paused, and this side does not know whether it runs elsewhere.
    InDoubt,
    /// The program was killed.
    Killed,
    /// Not settled yet.
    UnderWay,
}

impl Whereabouts {
    pub fn name(self) -> &'static str {
        match self {
            Self::Runs => "runs the guest",
            Self::Moved => "moved, ended",
            Self::Listens => "listens on",
            Self::InDoubt => "in doubt, paused",
            Self::Killed => "killed",
            Self::UnderWay => "under way",
        }
    }
}

/// A program that may be gone.
struct Party {
    program: Option<Program>,
    killed: bool,
    frozen: bool,
    control: PathBuf,
    trace: PathBuf,
    events: RefCell<Vec<Value>>,
}

impl Party {
    fn program(&self) -> &Program {
        self.program.as_ref().expect("it lives")
    }

    /// The events of that name so far.
    fn events(&self, name: &str) -> Vec<Value> {
        let mut events = self.events.borrow_mut();
        events.extend(self.program.iter().flat_map(|p| std::iter::from_fn(|| p.try_event())));
        events.iter().filter(|e| e["event"] == name).cloned().collect()
    }
}

pub struct Pair {
    directory: tempfile::TempDir,
    source: Party,
    destination: Party,
    address: String,
    census: Option<Census>,
    /// Last: they go after the programs.
    hosts: Option<Hosts>,
}

/// What is to happen: where, and the deed.
pub type Fault<'a> = (Point, &'a str);

impl Pair {
    /// A receiver, and a sender whose guest is about to move. A deed is `kill`, `stop` or `hold`; what is held
    /// goes on when it is [released](Self::release). Both are on this host, or each on its own.
    pub fn start(faults: &[Fault], hosts: Option<Hosts>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let party = |side: Side| Party {
            program: None,
            killed: false,
            frozen: false,
            control: directory.path().join(format!("{}.sock", side.name())),
            trace: directory.path().join(side.name()),
            events: RefCell::default(),
        };
        let (mut source, mut destination) = (party(Side::Source), party(Side::Destination));
        let start = |side: Side, mut command: Command, party: &mut Party| {
            command.args(["--console", "none"]).env("MIG_FAULT_TRACE", &party.trace);
            let faults = faults.iter().filter(|(point, _)| Side::of(*point) == side).map(|(point, deed)| {
                let place = format!("{}@{}", point.name(), time(*point));
                match *deed {
                    "hold" => format!("{place}:hold={}", directory.path().join(point.name()).display()),
                    deed => format!("{place}:{deed}"),
                }
            });
            command.env("MIG_FAULT", faults.collect::<Vec<_>>().join(","));
            party.program = Some(Program::start(command, &party.control));
        };
        let mut command = on(&hosts, Side::Destination, mig_recv());
        command.args(["--listen", listen(&hosts)]);
        start(Side::Destination, command, &mut destination);
        let listening = destination.program().event("listening");
        let address = listening["addr"].as_str().unwrap().to_owned();
        let mut command = on(&hosts, Side::Source, mig_send());
        command.args(["--guest", "dirtier:rate=4MiB,working-set=16MiB", "--memory", "64MiB", "--cpus", "1"]);
        command.args(["--to", &address, "--after", "50ms"]);
        start(Side::Source, command, &mut source);
        let census = Some(Census::take([source.control.clone(), destination.control.clone()]));
        Self { directory, source, destination, address, census, hosts }
    }

    /// # Panics
    /// Both are on this host.
    pub fn cut(&self, cut: Cut) {
        self.hosts.as_ref().expect("two hosts").cut(cut);
    }

    /// # Panics
    /// Both are on this host.
    pub fn heal(&self, cut: Cut) {
        self.hosts.as_ref().expect("two hosts").heal(cut);
    }

    fn party(&self, side: Side) -> &Party {
        match side {
            Side::Source => &self.source,
            Side::Destination => &self.destination,
        }
    }

    fn party_mut(&mut self, side: Side) -> &mut Party {
        match side {
            Side::Source => &mut self.source,
            Side::Destination => &mut self.destination,
        }
    }

    /// The points that a side has come to.
    pub fn reached(&self, side: Side) -> Vec<Point> {
        reached(&self.party(side).trace)
    }

    /// How often a point was reached.
    pub fn times_reached(&self, point: Point) -> usize {
        let text = std::fs::read_to_string(&self.party(Side::of(point)).trace).unwrap_or_default();
        text.lines().filter(|name| *name == point.name()).count()
    }

    /// Waits until it is held at a point.
    pub fn wait_held(&self, point: Point) {
        let hold = self.directory.path().join(point.name());
        self.wait(&format!("hold at {}", point.name()), || hold.exists());
    }

    /// The same, and until the other side has come as far as it comes then.
    pub fn wait_held_and_far(&self, point: Point) {
        self.wait_held(point);
        if let Some(other) = other_comes_to(point) {
            self.wait_reached(Side::of(point).other(), other);
        }
    }

    /// Lets what is held at a point go on.
    pub fn release(&self, point: Point) {
        std::fs::remove_file(self.directory.path().join(point.name())).expect("it holds");
    }

    /// Waits until a side has come to a point.
    pub fn wait_reached(&self, side: Side, point: Point) {
        self.wait(point.name(), || self.reached(side).contains(&point));
    }

    /// Waits for something, and says how everything is if it does not come.
    pub fn wait(&self, what: &str, mut come: impl FnMut() -> bool) {
        let began = Instant::now();
        while !come() {
            assert!(began.elapsed() < PATIENCE, "no {what}: {}", self.describe());
            if let Some(census) = &self.census {
                census.assert_never_two();
            }
            // what comes soon is seen soon, and what takes seconds is not asked for all the time
            std::thread::sleep((began.elapsed() / 16).clamp(SHORTEST_INTERVAL, LONGEST_INTERVAL));
        }
    }

    pub fn describe(&self) -> String {
        let side = |side: Side| {
            let last = self.reached(side).last().map_or("nothing", |p| p.name());
            let status = self.status(side).unwrap_or_default();
            format!("{}: {:?}, {status}, after {last}", side.name(), self.whereabouts(side))
        };
        Side::BOTH.map(side).join("; ")
    }

    /// Kills a side, here and now.
    pub fn kill(&mut self, side: Side) {
        self.signal(side, "KILL");
        self.wait_killed(side);
    }

    pub fn signal(&self, side: Side, name: &str) {
        self.party(side).program().signal(name);
    }

    /// Waits until a side has been stopped by SIGSTOP; it is not asked any more then.
    pub fn wait_stopped(&mut self, side: Side) {
        let stat = format!("/proc/{}/stat", self.party(side).program().id());
        // the state follows the name in parentheses: proc_pid_stat(5)
        let is_stopped = || std::fs::read_to_string(&stat).is_ok_and(|s| s.contains(") T "));
        self.wait("stop", is_stopped);
        self.party_mut(side).frozen = true;
    }

    pub fn thaw(&mut self, side: Side) {
        self.signal(side, "CONT");
        self.party_mut(side).frozen = false;
    }

    /// Waits until a side has been killed.
    pub fn wait_killed(&mut self, side: Side) {
        let party = self.party_mut(side);
        let (status, _) = party.program.take().expect("it lives").end();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{status}");
        party.killed = true;
        self.census.as_ref().expect("it goes on").killed(side);
    }

    fn status(&self, side: Side) -> Option<Value> {
        if self.party(side).frozen {
            return None;
        }
        try_ask(&self.party(side).control, &json!({"cmd": "status"}))
    }

    pub fn whereabouts(&self, side: Side) -> Whereabouts {
        if self.party(side).killed {
            return Whereabouts::Killed;
        }
        if self.party(side).frozen {
            return Whereabouts::UnderWay;
        }
        let state = self.status(side).map(|s| s["state"].as_str().unwrap_or_default().to_owned());
        match (state.as_deref(), side) {
            (Some("running"), _) => Whereabouts::Runs,
            (Some("in-doubt"), _) => Whereabouts::InDoubt,
            (Some("receiving"), _) => {
                // it listened before a source came, too
                let came = self.reached(side).contains(&Point::DestinationHelloHeard);
                let went = !came || !self.destination.events("not-received").is_empty();
                if went { Whereabouts::Listens } else { Whereabouts::UnderWay }
            }
            (Some("ended") | None, Side::Source) => {
                let reports = self.source.events("report");
                let moved = reports.last().is_some_and(|r| r["outcome"] == "moved");
                if moved { Whereabouts::Moved } else { Whereabouts::UnderWay }
            }
            _ => Whereabouts::UnderWay,
        }
    }

    /// Waits until a side knows that the migration is over or in doubt, if it ever knew of one.
    pub fn wait_noticed(&self, side: Side) -> Whereabouts {
        use Whereabouts::{InDoubt, Listens, Moved, Runs};
        self.settle(side, &[Runs, Moved, Listens, InDoubt])
    }

    /// Waits until a side is in one of these; gives which.
    pub fn settle(&self, side: Side, possible: &[Whereabouts]) -> Whereabouts {
        let mut found = Whereabouts::UnderWay;
        self.wait(&format!("{possible:?} at the {}", side.name()), || {
            found = self.whereabouts(side);
            possible.contains(&found)
        });
        found
    }

    /// The operator's word: `resume` or `discard`.
    pub fn resolve(&self, side: Side, word: &str) {
        let control = &self.party(side).control;
        let answer = try_ask(control, &json!({"cmd": "resolve", "word": word}));
        if answer.as_ref().is_some_and(|a| a["ok"] == true) {
            return;
        }
        let old_word = if word == "resume" { "resume" } else { "quit" };
        let answer = try_ask(control, &json!({"cmd": old_word}));
        assert!(answer.as_ref().is_some_and(|a| a["ok"] == true), "{answer:?}");
    }

    fn heartbeats(&self, side: Side) -> u64 {
        let status = self.status(side).filter(|_| !self.party(side).killed);
        status.map_or(0, |s| s["heartbeats"].as_u64().unwrap_or(0))
    }

    /// Counts the guests that beat now: looks long enough for the one that is expected to beat often.
    pub fn guests_alive(&self, expected: Option<Side>) -> usize {
        let before = Side::BOTH.map(|s| self.heartbeats(s));
        match expected {
            Some(side) => self.wait("heartbeats", || self.heartbeats(side) >= before[side as usize] + BEATS),
            None => std::thread::sleep(Duration::from_millis(200)),
        }
        // a guest that has just come beats from here on; one that is only there has a number
        let beats = |s: &Side| before[*s as usize] > 0 && self.heartbeats(*s) > before[*s as usize];
        Side::BOTH.iter().filter(|s| beats(s)).count()
    }

    /// Ends the census; nobody is to have seen two guests.
    pub fn assert_never_two(&mut self) {
        self.census.take().expect("it goes on").assert_never_two();
    }

    /// Asserts that what is in the guest's memory is what it put there.
    pub fn assert_guest_is_whole(&self, side: Side) {
        let check = self.party(side).program().ask(&json!({"cmd": "check"}));
        assert_eq!(check["ok"], true, "{check}");
    }

    /// Moves the guest that stayed to another receiver, or another guest to the receiver that listens on.
    pub fn assert_moves_again(&self, side: Side) {
        let control = self.directory.path().join("again.sock");
        let (source, destination) = (&self.source.program, &self.destination.program);
        match side {
            Side::Source => {
                let mut command = on(&self.hosts, Side::Destination, mig_recv());
                command.args(["--listen", listen(&self.hosts), "--console", "none"]);
                let receiver = Program::start(command, &control);
                let address = receiver.event("listening")["addr"].clone();
                assert_moves(source, &json!(address), &receiver);
            }
            Side::Destination => {
                let mut command = on(&self.hosts, Side::Source, mig_send());
                command.args(["--guest", "idle", "--memory", "64MiB"]);
                let sender = Program::start(command, &control);
                sender.event("started");
                assert_moves(&Some(sender), &json!(self.address), destination.as_ref().expect("it lives"));
            }
        }
    }

    /// Moves the guest that stayed to the very receiver that did not get it before.
    pub fn assert_moves_there_after_all(&self) {
        assert_moves(&self.source.program, &json!(self.address), self.destination.program());
    }
}

/// Moves the guest of `from` to `to`, whose address is `address`.
fn assert_moves(from: &Option<Program>, address: &Value, to: &Program) {
    let request = json!({"cmd": "migrate", "to": address});
    let moved = from.as_ref().expect("it lives").ask(&request);
    assert_eq!(moved["report"]["outcome"], "moved", "{moved}");
    to.assert_guest_goes_on();
}

fn on(hosts: &Option<Hosts>, side: Side, command: Command) -> Command {
    match hosts {
        Some(hosts) => hosts.on(side, command),
        None => command,
    }
}

fn listen(hosts: &Option<Hosts>) -> &'static str {
    if hosts.is_some() { LISTEN } else { "tcp:127.0.0.1:0" }
}

/// Which coming to a point counts: in the middle of a round, not at its first batch.
fn time(point: Point) -> u32 {
    if point == SourceMidRound || point == DestinationMidRound { 3 } else { 1 }
}

/// How far the other side certainly comes while one is held at a point.
fn other_comes_to(held: Point) -> Option<Point> {
    Some(match held {
        SourceConnecting | SourceConnected => return None,
        SourceHelloSent | SourceWelcomeHeard => DestinationWelcomeSent,
        SourceDescribeSent | SourceAcceptHeard => DestinationAcceptSent,
        SourceAttached | SourceTracking => DestinationAttached,
        SourceMidRound => DestinationMidRound,
        SourceRoundSent | SourceRoundAcknowledged | SourcePaused | SourceSaved | SourceLastSync => {
            DestinationRoundAcknowledged
        }
        SourceStateSent => DestinationStateHeard,
        SourceLastRoundSent | SourceReadyHeard | SourceCommitting => DestinationReadySent,
        SourceCommitSent | SourceRunningHeard | SourceGapHeard => DestinationGapSent,
        SourceAsking => DestinationInDoubt,
        SourceAnswered => DestinationAnswered,
        DestinationHelloHeard => SourceHelloSent,
        DestinationWelcomeSent | DestinationDescribeHeard | DestinationPrepared => SourceDescribeSent,
        DestinationAcceptSent => SourceAcceptHeard,
        DestinationAttached => SourceTracking,
        DestinationMidRound => SourceMidRound,
        DestinationRoundAcknowledged => SourceRoundAcknowledged,
        DestinationStateHeard | DestinationLoading | DestinationLoaded => SourceLastRoundSent,
        DestinationReadySent | DestinationCommitHeard | DestinationResuming | DestinationResumed => {
            SourceCommitSent
        }
        DestinationRunningSent => SourceRunningHeard,
        DestinationGapSent => SourceGapHeard,
        DestinationInDoubt | DestinationAsked | DestinationAnswering => SourceAsking,
        DestinationAnswered => SourceAnswered,
    })
}

/// The points of every migration: not those of doubt.
pub fn always_reached() -> Vec<Point> {
    let doubt = |p: &Point| (SourceAsking..=SourceAnswered).contains(p) || *p >= DestinationInDoubt;
    Point::ALL.iter().copied().filter(|p| !doubt(p)).collect()
}

/// The points in a trace, each once, in the order of the table.
pub fn reached(trace: &Path) -> Vec<Point> {
    let text = std::fs::read_to_string(trace).unwrap_or_default();
    // the last line may be on its way
    let lines = text.rsplit_once('\n').map_or("", |(lines, _)| lines);
    let reached: Vec<Point> = lines.lines().map(|name| name.parse().expect("a point's name")).collect();
    Point::ALL.iter().copied().filter(|p| reached.contains(p)).collect()
}
