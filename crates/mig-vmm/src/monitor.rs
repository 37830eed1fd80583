//! Looking at a machine from other threads while it runs, moves away or has ended.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use mig_kvm::Rings;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, lock};
use crate::layout::VGA_TEXT;
use crate::memory::Ram;

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It wrote this code to the debug-exit port; 0 is a good end.
    Exit(u8),
    /// It reset the machine.
    Reset,
    /// It shut down, by a triple fault as a rule.
    Shutdown,
    /// It cannot go on: the reason.
    Error(String),
}

impl std::fmt::Display for End {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            End::Exit(code) => write!(f, "the guest ended with code {code}"),
            End::Reset => write!(f, "the guest reset the machine"),
            End::Shutdown => write!(f, "the guest shut down (triple fault)"),
            End::Error(reason) => write!(f, "the guest cannot go on: {reason}"),
        }
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Its vCPUs are stopped, for now.
    Paused,
    /// Its vCPUs run.
    Running,
    /// Its guest has ended, or the machine is gone.
    Ended,
}

/// What became of an offer of input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fed {
    /// So many bytes were taken; it may have been none that there were.
    Taken(usize),
    /// The guest has yet to read what it was given.
    Full,
    /// No guest runs here.
    NotRunning,
}

/// The run state and the end, with those who wait for it.
#[derive(Debug)]
pub(crate) struct Status {
    now: Mutex<(RunState, Option<End>)>,
    ended: Condvar,
}

impl Status {
    pub(crate) fn paused() -> Self {
        Self { now: Mutex::new((RunState::Paused, None)), ended: Condvar::new() }
    }

    /// Paused or running, unless the guest has ended.
    pub(crate) fn set(&self, state: RunState) {
        let mut now = lock(&self.now);
        if now.0 != RunState::Ended {
            now.0 = state;
        }
    }

    /// The guest's end; the first reason counts.
    pub(crate) fn end(&self, end: End) {
        let mut now = lock(&self.now);
        now.0 = RunState::Ended;
        now.1.get_or_insert(end);
        self.ended.notify_all();
    }

    /// The machine is gone, however the guest was.
    pub(crate) fn gone(&self) {
        lock(&self.now).0 = RunState::Ended;
        self.ended.notify_all();
    }

    pub(crate) fn state(&self) -> RunState {
        lock(&self.now).0
    }

    pub(crate) fn ending(&self) -> Option<End> {
        lock(&self.now).1.clone()
    }
}

/// A view of a machine; cheap to clone. It keeps the guest's memory mapped.
#[derive(Clone)]
pub struct Monitor {
    pub(crate) status: Arc<Status>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) memory: Arc<Ram>,
    pub(crate) rings: Option<Arc<Rings>>,
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
}

impl Monitor {
    /// Heartbeats since the guest's start, wherever it ran.
    pub fn heartbeats(&self) -> u64 {
        self.bus.heartbeat.count()
    }

    /// CLOCK_MONOTONIC of the last heartbeat in nanoseconds; 0 if there was none.
    pub fn last_heartbeat_ns(&self) -> u64 {
        self.bus.heartbeat.last_ns()
    }

    /// What the machine is doing.
    pub fn state(&self) -> RunState {
        self.status.state()
    }

    /// How many vCPUs it has.
    pub fn vcpus(&self) -> u8 {
        self.vcpus
    }

    /// How much memory it has.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// How many pages each vCPU has written since its last move began ([`Rings::written_by_vcpu`]): of two answers
    /// the difference tells whom to slow. `None` where KVM does not tell vCPUs apart ([`crate::Tracking::Bitmap`]).
    pub fn written_by_vcpu(&self) -> Option<Vec<u64>> {
        self.rings.as_ref().map(|rings| rings.written_by_vcpu())
    }

    /// The VGA text page: 25 rows, without the blanks at their ends. Anything that is not printable ASCII is
    /// shown as `.`.
    pub fn screen(&self) -> [String; 25] {
        let mut page = [0u8; 25 * 160];
        // Every machine has the first 2 MiB.
        if self.memory.read_slice(&mut page, GuestAddress(VGA_TEXT)).is_err() {
            page.fill(0);
        }
        std::array::from_fn(|row| {
            let cells = page[row * 160..][..160].iter().step_by(2);
            let text: String = cells
                .map(|c| match c {
                    0 => ' ',
                    b' '..=b'~' => char::from(*c),
                    _ => '.',
                })
                .collect();
            text.trim_end().to_owned()
        })
    }

    /// Whether the guest runs here and its serial port has room for input.
    pub fn takes_input(&self) -> bool {
        lock(&self.bus.serial).has_room() && self.status.state() == RunState::Running
    }

    /// Has `take` fetch input for the guest's serial port, at most as many bytes as it is told.
    ///
    /// `take` is called only while the guest runs here and has room, and what it returns is in the guest's
    /// state from then on, wherever that goes: what a guest does not take is left to whoever runs it next.
    /// It must not wait: it holds up the guest, and a pause.
    ///
    /// # Errors
    /// What `take` met with; nothing was taken then.
    pub fn feed_serial(&self, take: impl FnOnce(usize) -> io::Result<Vec<u8>>) -> io::Result<Fed> {
        let mut serial = lock(&self.bus.serial);
        match self.status.state() {
            RunState::Paused | RunState::Ended => Ok(Fed::NotRunning),
            RunState::Running => Ok(serial.feed(take)?.map_or(Fed::Full, Fed::Taken)),
        }
    }

    /// How the guest ended, if it has.
    pub fn end(&self) -> Option<End> {
        self.status.ending()
    }

    /// Waits for the guest's end; `None` when the time is up or the machine is gone without one.
    pub fn wait_end(&self, timeout: Duration) -> Option<End> {
        let deadline = Instant::now() + timeout;
        let mut now = lock(&self.status.now);
        while now.0 != RunState::Ended {
            let left = deadline.checked_duration_since(Instant::now())?;
            now = self.status.ended.wait_timeout(now, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        now.1.clone()
    }
}

impl std::fmt::Debug for Monitor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Monitor").field("state", &self.state()).finish_non_exhaustive()
    }
}
