//! Where the guest's serial output goes.
//!
//! Printing never waits: bytes are queued, and a thread writes them to the sink in order, as soon as it takes
//! them. A vCPU waits *before* it prints, while the queue is full and its machine is to run on (see
//! `vcpu.rs`); so a sink that takes nothing holds up the guest that prints, but never a pause.
//!
//! Invariants: a byte leaves the queue when the sink has taken it, or has failed at it. The queue holds
//! [`QUEUE_BYTES`] and, for each pause, at most one port access of each vCPU more.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

/// How much may wait for the sink: some screens full.
const QUEUE_BYTES: usize = 256 << 10;

/// The most that is written at once, so that a slow reader shows as progress; a pipe takes that much whole.
const CHUNK_BYTES: usize = 4096;

/// How soon a sink that would block is tried again: standard output may be non-blocking, since whoever shares
/// it can make it so.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// A sink for the guest's text; cheap to clone. When the last one is dropped the rest is written without
/// anybody waiting: a program that is about to end calls [`Console::flush`] first.
#[derive(Clone)]
pub struct Console {
    /// `None` for a console that goes nowhere.
    queue: Option<Arc<Handle>>,
}

/// Output that did not reach the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unwritten {
    /// How much.
    pub bytes: u64,
    /// What the sink failed with; none if it just does not take more.
    pub reason: Option<String>,
}

impl Console {
    /// Nowhere.
    pub fn none() -> Self {
        Self { queue: None }
    }

    /// Standard output, past the buffer of [`io::stdout`].
    ///
    /// # Errors
    /// It is closed.
    pub fn stdout() -> io::Result<Self> {
        let own = io::stdout().as_fd().try_clone_to_owned()?;
        Ok(Self::to(std::fs::File::from(own)))
    }

    /// Anything that can be written to. Its writes may block; what it fails at is lost, as on a loose cable.
    pub fn to(sink: impl Write + Send + 'static) -> Self {
        let queue = Arc::new(Queue::default());
        let writer = Arc::clone(&queue);
        thread::spawn(move || writer.write_all(sink));
        Self { queue: Some(Arc::new(Handle(queue))) }
    }

    /// Queues a byte.
    pub(crate) fn print(&self, byte: u8) {
        if let Some(queue) = self.queue() {
            queue.lock().bytes.push_back(byte);
            queue.changed.notify_all();
        }
    }

    /// Waits a while for room to print, unless there is some: whether there is.
    pub(crate) fn wait_room(&self, timeout: Duration) -> bool {
        let Some(queue) = self.queue() else { return true };
        let full = |state: &mut State| state.bytes.len() >= QUEUE_BYTES;
        let waited = queue.changed.wait_timeout_while(queue.lock(), timeout, full);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        !full(&mut state)
    }

    /// Waits until everything printed so far is written, for as long as the sink takes any of it within
    /// `patience`.
    ///
    /// # Errors
    /// Some was not, now or earlier.
    pub fn flush(&self, patience: Duration) -> Result<(), Unwritten> {
        let Some(queue) = self.queue() else { return Ok(()) };
        let mut state = queue.lock();
        while state.busy() {
            let seen = state.tried;
            let idle = |state: &mut State| state.busy() && state.tried == seen;
            let waited = queue.changed.wait_timeout_while(state, patience, idle);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if state.busy() && state.tried == seen {
                break;
            }
        }
        match state.lost + state.bytes.len() as u64 {
            0 => Ok(()),
            bytes => Err(Unwritten { bytes, reason: state.failure.clone() }),
        }
    }

    fn queue(&self) -> Option<&Queue> {
        self.queue.as_deref().map(|handle| &*handle.0)
    }
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

/// What is shared with the writing thread, which lives until the last handle is dropped and all is written.
struct Handle(Arc<Queue>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

#[derive(Default)]
struct Queue {
    state: Mutex<State>,
    /// Anything did.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    /// Bytes that the sink took or failed at.
    tried: u64,
    /// Bytes that the sink failed at, and how it did last.
    lost: u64,
    failure: Option<String>,
    /// All was written, but may not be flushed.
    flushing: bool,
    closed: bool,
}

impl State {
    fn busy(&self) -> bool {
        !self.bytes.is_empty() || self.flushing
    }
}

impl Queue {
    /// The writing thread.
    fn write_all(&self, mut sink: impl Write) {
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while self.next(&mut chunk) {
            let written = write(&mut sink, &chunk);
            let mut state = self.lock();
            let count = *written.as_ref().unwrap_or(&chunk.len());
            state.bytes.drain(..count);
            state.tried += count as u64;
            if let Err(e) = written {
                state.lost += count as u64;
                state.failure = Some(e.to_string());
            }
            state.flushing = state.bytes.is_empty();
            let flush = state.flushing;
            drop(state);
            if flush {
                // A prompt has no line end, and is wanted at once. An error here shows at the next write.
                let _ = sink.flush();
                self.lock().flushing = false;
            }
            self.changed.notify_all();
        }
    }

    /// Waits for something to write; `false` when nothing can come any more.
    fn next(&self, chunk: &mut Vec<u8>) -> bool {
        let nothing = |state: &mut State| state.bytes.is_empty() && !state.closed;
        let waited = self.changed.wait_while(self.lock(), nothing);
        let state = waited.unwrap_or_else(PoisonError::into_inner);
        chunk.clear();
        chunk.extend(state.bytes.iter().take(CHUNK_BYTES));
        !chunk.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes some of it: how much.
fn write(sink: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match sink.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};

    const PATIENCE: Duration = Duration::from_secs(60);

    fn print(console: &Console, text: &[u8]) {
        text.iter().for_each(|byte| console.print(*byte));
    }

    /// Takes a few bytes at a time, each after a word from the test.
    struct Slow {
        allowed: Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Slow {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.allowed.recv().is_err() {
                return Err(io::Error::other("unplugged"));
            }
            let count = bytes.len().min(100);
            self.written.lock().unwrap().extend_from_slice(&bytes[..count]);
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn slow() -> (Console, Sender<()>, Arc<Mutex<Vec<u8>>>) {
        let (allow, allowed) = channel();
        let written = Arc::<Mutex<Vec<u8>>>::default();
        (Console::to(Slow { allowed, written: written.clone() }), allow, written)
    }

    #[test]
    fn every_byte_is_written_once_in_order_however_the_sink_takes_them() {
        let (console, allow, written) = slow();
        let text: Vec<u8> = (0..10_000u32).map(|n| (n % 251) as u8).collect();
        print(&console, &text[..50]);
        print(&console, &text[50..]);
        assert_eq!(console.flush(Duration::ZERO), Err(Unwritten { bytes: 10_000, reason: None }));
        // More than enough: the first write may have been of a few bytes.
        (0..text.len() / 50).for_each(|_| allow.send(()).unwrap());
        console.flush(PATIENCE).unwrap();
        assert!(*written.lock().unwrap() == text);
    }

    #[test]
    fn a_full_console_has_no_room_until_its_sink_takes_something() {
        let (console, allow, _) = slow();
        print(&console, &[b'x'; QUEUE_BYTES - 1]);
        assert!(console.wait_room(Duration::ZERO));
        print(&console, b"y");
        assert!(!console.wait_room(Duration::from_millis(1)));
        // Overshoot.
        print(&console, b"z");
        // The first write may be of one byte.
        (0..2).for_each(|_| allow.send(()).unwrap());
        assert!(console.wait_room(PATIENCE));
        assert!(Console::none().wait_room(Duration::ZERO));
    }

    #[test]
    fn what_a_sink_fails_at_is_lost_and_counted() {
        let (console, allow, written) = slow();
        print(&console, b"a");
        allow.send(()).unwrap();
        console.flush(PATIENCE).unwrap();
        drop(allow);
        print(&console, b"lost");
        let lost = Unwritten { bytes: 4, reason: Some("unplugged".into()) };
        assert_eq!(console.flush(PATIENCE), Err(lost));
        assert_eq!(*written.lock().unwrap(), b"a");
    }

    #[test]
    fn a_dropped_console_is_still_written_and_closes_its_sink() {
        use std::io::Read;
        let (mut reader, writer) = io::pipe().unwrap();
        let console = Console::to(writer);
        let other = console.clone();
        drop(console);
        print(&other, b"last words");
        drop(other);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "last words");
    }
}
