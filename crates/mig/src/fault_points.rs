//! Named points of a migration at which a test lets its process die, freeze or wait: how one shows that a
//! migration survives a fault exactly there.
//!
//! Only in builds with the feature `fault-points`, which no release has. [`arm_from_environment`] reads
//! - `MIG_FAULT`: what is to happen, as `NAME:DEED` with a name of [`Point::ALL`]; `NAME@3:DEED` for the third
//!   time it is reached, and several with commas between. A deed is `kill` (SIGKILL), `stop` (SIGSTOP), or
//!   `hold=FILE`: makes the file, and goes on when it has been taken away;
//! - `MIG_FAULT_TRACE`: a file to which the name of every point is added as it is reached.

pub(crate) mod destination;
pub(crate) mod source;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, raise};
use thiserror::Error;

/// How often a point that holds looks whether it may go on.
const HOLD_INTERVAL: Duration = Duration::from_millis(2);

macro_rules! points {
    ($($(#[$when:meta])* $point:ident = $name:literal,)*) => {
        /// A point. Those of the source are in the order in which a migration reaches them, and so are those
        /// of the destination; the last of each are reached in doubt only.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Point { $($(#[$when])* $point,)* }

        impl Point {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$point,)*];

            /// Its name, `source.` or `destination.` first.
            pub fn name(self) -> &'static str {
                match self { $(Self::$point => $name,)* }
            }
        }
    };
}

points! {
    /// Before it connects.
    SourceConnecting = "source.connecting",
    /// Connected; nothing was said.
    SourceConnected = "source.connected",
    /// Hello was sent.
    SourceHelloSent = "source.hello-sent",
    /// Welcome came.
    SourceWelcomeHeard = "source.welcome-heard",
    /// Describe was sent.
    SourceDescribeSent = "source.describe-sent",
    /// Accept came.
    SourceAcceptHeard = "source.accept-heard",
    /// All page channels are attached.
    SourceAttached = "source.attached",
    /// The dirty log is on.
    SourceTracking = "source.tracking",
    /// A batch of pages was planned, and is about to be sent.
    SourceMidRound = "source.mid-round",
    /// All channels have sent their part of a round, not the last.
    SourceRoundSent = "source.round-sent",
    /// The destination has acknowledged a round, not the last.
    SourceRoundAcknowledged = "source.round-acknowledged",
    /// The guest is paused.
    SourcePaused = "source.paused",
    /// Its state is saved.
    SourceSaved = "source.saved",
    /// The dirty log was read for the last time.
    SourceLastSync = "source.last-sync",
    /// The state was sent.
    SourceStateSent = "source.state-sent",
    /// All channels have sent their part of the last round.
    SourceLastRoundSent = "source.last-round-sent",
    /// Ready came.
    SourceReadyHeard = "source.ready-heard",
    /// The guest is given away; Commit was not sent.
    SourceCommitting = "source.committing",
    /// Commit was sent.
    SourceCommitSent = "source.commit-sent",
    /// Running came.
    SourceRunningHeard = "source.running-heard",
    /// What the guest felt came.
    SourceGapHeard = "source.gap-heard",
    /// In doubt; a question is about to be asked.
    SourceAsking = "source.asking",
    /// A question was answered.
    SourceAnswered = "source.answered",

    /// Hello came.
    DestinationHelloHeard = "destination.hello-heard",
    /// Welcome was sent.
    DestinationWelcomeSent = "destination.welcome-sent",
    /// Describe came.
    DestinationDescribeHeard = "destination.describe-heard",
    /// The guest to fill is made.
    DestinationPrepared = "destination.prepared",
    /// Accept was sent.
    DestinationAcceptSent = "destination.accept-sent",
    /// All page channels are attached.
    DestinationAttached = "destination.attached",
    /// A batch of pages was put in place.
    DestinationMidRound = "destination.mid-round",
    /// All channels have received their part of a round, and that was acknowledged.
    DestinationRoundAcknowledged = "destination.round-acknowledged",
    /// The state came.
    DestinationStateHeard = "destination.state-heard",
    /// Everything is here; the state is about to be restored.
    DestinationLoading = "destination.loading",
    /// The state is restored.
    DestinationLoaded = "destination.loaded",
    /// Ready was sent.
    DestinationReadySent = "destination.ready-sent",
    /// Commit came.
    DestinationCommitHeard = "destination.commit-heard",
    /// The guest is about to run here.
    DestinationResuming = "destination.resuming",
    /// It runs; Running was not sent.
    DestinationResumed = "destination.resumed",
    /// Running was sent.
    DestinationRunningSent = "destination.running-sent",
    /// What the guest felt was sent.
    DestinationGapSent = "destination.gap-sent",
    /// In doubt: the copy is complete, and the source is gone.
    DestinationInDoubt = "destination.in-doubt",
    /// The source asks.
    DestinationAsked = "destination.asked",
    /// It is decided what to answer: if Never, the guest is given up.
    DestinationAnswering = "destination.answering",
    /// The source was answered.
    DestinationAnswered = "destination.answered",
}

impl FromStr for Point {
    type Err = ArmError;

    fn from_str(name: &str) -> Result<Self, ArmError> {
        let found = Self::ALL.iter().find(|p| p.name() == name);
        found.copied().ok_or_else(|| ArmError::Name { name: name.into() })
    }
}

/// Why what is to happen could not be read.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ArmError {
    /// No point of that name.
    #[error("no fault point is called {name:?}; there are: {}", names())]
    Name {
        /// The name given.
        name: String,
    },
    /// Not `NAME:DEED` or `NAME@N:DEED`.
    #[error(
        "{text:?} is no fault: write NAME:kill, NAME:stop or NAME:hold=FILE, with NAME@N for the Nth time"
    )]
    Deed {
        /// The part of the text.
        text: String,
    },
    /// It was read before.
    #[error("the fault points are armed already")]
    Twice,
}

fn names() -> String {
    Point::ALL.iter().map(|p| p.name()).collect::<Vec<_>>().join(", ")
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Fault {
    point: Point,
    /// The first time is 1.
    time: u32,
    deed: Deed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Deed {
    Kill,
    Stop,
    Hold(PathBuf),
}

impl FromStr for Fault {
    type Err = ArmError;

    fn from_str(text: &str) -> Result<Self, ArmError> {
        let wrong = || ArmError::Deed { text: text.into() };
        let (point, deed) = text.split_once(':').ok_or_else(wrong)?;
        let (name, time) = point.split_once('@').unwrap_or((point, "1"));
        let time = time.parse().ok().filter(|time| *time > 0).ok_or_else(wrong)?;
        let deed = match deed.split_once('=') {
            None if deed == "kill" => Deed::Kill,
            None if deed == "stop" => Deed::Stop,
            Some(("hold", file)) if !file.is_empty() => Deed::Hold(file.into()),
            _ => return Err(wrong()),
        };
        Ok(Self { point: name.parse()?, time, deed })
    }
}

#[derive(Debug)]
struct Armed {
    faults: Vec<Fault>,
    reached: Vec<AtomicU32>,
    trace: Option<PathBuf>,
}

static ARMED: OnceLock<Armed> = OnceLock::new();

/// Reads what is to happen from the environment, once a process. Without the variables nothing is.
///
/// # Errors
/// There is no such point or deed, or this was done before.
pub fn arm_from_environment() -> Result<(), ArmError> {
    let faults = std::env::var("MIG_FAULT").unwrap_or_default();
    let faults = faults.split(',').filter(|f| !f.is_empty()).map(str::parse).collect::<Result<_, _>>()?;
    let reached = Point::ALL.iter().map(|_| AtomicU32::new(0)).collect();
    let trace = std::env::var_os("MIG_FAULT_TRACE").map(PathBuf::from);
    ARMED.set(Armed { faults, reached, trace }).map_err(|_| ArmError::Twice)
}

/// Notes that this thread is at a point, and does what was armed there.
///
/// # Panics
/// The trace, or the file of a hold, cannot be written.
pub(crate) fn reach(point: impl Into<Option<Point>>) {
    if let (Some(armed), Some(point)) = (ARMED.get(), point.into()) {
        armed.reach(point);
    }
}

impl Armed {
    fn reach(&self, point: Point) {
        if let Some(trace) = &self.trace {
            add_line(trace, point.name()).expect("the trace of fault points can be written");
        }
        let time = self.reached[point as usize].fetch_add(1, Ordering::SeqCst) + 1;
        for fault in self.faults.iter().filter(|f| (f.point, f.time) == (point, time)) {
            fault.deed.perform().expect("the deed at a fault point can be done");
        }
    }
}

/// In one write, so that the lines of two threads are not mixed.
fn add_line(file: &Path, line: &str) -> std::io::Result<()> {
    File::options().append(true).create(true).open(file)?.write_all(format!("{line}\n").as_bytes())
}

impl Deed {
    fn perform(&self) -> std::io::Result<()> {
        match self {
            Self::Kill => raise(Signal::SIGKILL)?,
            Self::Stop => raise(Signal::SIGSTOP)?,
            Self::Hold(file) => {
                File::create(file)?;
                while file.exists() {
                    std::thread::sleep(HOLD_INTERVAL);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_a_point_a_time_and_a_deed() {
        let read = |text: &str| text.parse::<Fault>();
        let fault = |point, time, deed| Ok(Fault { point, time, deed });
        assert_eq!(read("source.paused:kill"), fault(Point::SourcePaused, 1, Deed::Kill));
        assert_eq!(read("source.mid-round@3:stop"), fault(Point::SourceMidRound, 3, Deed::Stop));
        assert_eq!(
            read("destination.loaded:hold=/x=y"),
            fault(Point::DestinationLoaded, 1, Deed::Hold("/x=y".into()))
        );
        for text in
            ["", "source.paused", "source.paused:", "source.paused:hold=", "source.paused@0:kill", "@:kill"]
        {
            assert!(matches!(read(text), Err(ArmError::Deed { .. })), "{text}");
        }
    }

    #[test]
    fn an_unknown_point_is_refused_with_all_that_there_are() {
        let refused = "source.nowhere:kill".parse::<Fault>().unwrap_err().to_string();
        assert!(refused.contains("source.nowhere"), "{refused}");
        for point in Point::ALL {
            assert!(refused.contains(point.name()), "{point:?} in {refused}");
            assert_eq!(point.name().parse(), Ok(*point));
            assert_eq!(Point::ALL[*point as usize], *point);
        }
    }

    #[test]
    fn a_deed_is_done_the_nth_time_and_a_hold_ends_with_its_file() {
        let file = std::env::temp_dir().join(format!("mig-hold-{}", std::process::id()));
        let fault = Fault { point: Point::SourceSaved, time: 2, deed: Deed::Hold(file.clone()) };
        let reached = Point::ALL.iter().map(|_| AtomicU32::new(0)).collect();
        let armed = Armed { faults: vec![fault], reached, trace: None };
        armed.reach(Point::SourceSaved);
        armed.reach(Point::SourcePaused);
        assert!(!file.exists());
        std::thread::scope(|scope| {
            let held = scope.spawn(|| armed.reach(Point::SourceSaved));
            while !file.exists() {
                assert!(!held.is_finished(), "it holds");
            }
            assert!(!held.is_finished(), "it holds");
            std::fs::remove_file(&file).unwrap();
        });
    }
}
