//! What is to be said on the control channel, in its order: whoever has something to say never waits for a peer
//! that does not listen. What the socket has room for is written at once, since a thread that must wake first
//! is time in the pause; the rest, and all that is said meanwhile, by a thread of its own.
//!
//! Bounded all the same: a writer of many messages waits for room, the answer to a ping is dropped where there
//! is none, and a coordinator says a handful of messages in a migration.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mig_wire::{Message, WireError};

use crate::transport::Stream;

/// There is no room while more than this is queued.
const ROOM_BYTES: usize = 1 << 20;

/// The queue, and what has become of it.
pub(super) struct Outbox {
    session: u64,
    stream: Arc<Stream>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    frames: VecDeque<Vec<u8>>,
    queued_bytes: usize,
    next_sequence: u64,
    /// Nothing more will be said, but what is queued still is.
    finishing: bool,
    /// Nothing is said any more.
    closed: bool,
}

impl Outbox {
    /// A queue for a stream on which `sent` messages went out before.
    pub(super) fn new(stream: Arc<Stream>, session: u64, sent: u64) -> Self {
        let state = State {
            frames: VecDeque::new(),
            queued_bytes: 0,
            next_sequence: sent,
            finishing: false,
            closed: false,
        };
        Self { session, stream, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Queues a message at once. One that cannot be said any more is dropped: the reading thread knows.
    pub(super) fn push(&self, message: &Message) -> Result<(), WireError> {
        self.state().push(message, self.session, &self.stream)?;
        self.changed.notify_all();
        Ok(())
    }

    /// Queues a message when there is room for more.
    pub(super) fn push_patiently(&self, message: &Message) -> Result<(), WireError> {
        let full = |state: &mut State| state.queued_bytes > ROOM_BYTES && !state.closed;
        let mut state = self.changed.wait_while(self.state(), full).unwrap_or_else(PoisonError::into_inner);
        state.push(message, self.session, &self.stream)?;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Queues a message if there is room for more.
    pub(super) fn push_if_room(&self, message: &Message) -> Result<(), WireError> {
        let mut state = self.state();
        if state.queued_bytes <= ROOM_BYTES {
            state.push(message, self.session, &self.stream)?;
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Bytes that wait to be written, or are being.
    pub(super) fn queued_bytes(&self) -> usize {
        self.state().queued_bytes
    }

    /// Says no more than what is queued.
    pub(super) fn finish(&self) {
        self.state().finishing = true;
        self.changed.notify_all();
    }

    /// Waits until all is written or nothing more will be, at most until `deadline`.
    pub(super) fn drain(&self, deadline: Instant) {
        let waits = |state: &mut State| state.queued_bytes > 0 && !state.closed;
        let patience = deadline.saturating_duration_since(Instant::now());
        drop(self.changed.wait_timeout_while(self.state(), patience, waits));
    }

    /// Drops what is queued.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        state.frames.clear();
        state.queued_bytes = 0;
        drop(state);
        self.changed.notify_all();
    }

    /// Writes what is queued until it is finished, closed, or the stream fails; then the peer reads the end. That
    /// it failed is left to the thread that reads it, which first hands on what the peer still said.
    pub(super) fn write(&self) {
        while let Some(frame) = self.next() {
            if self.stream.write_all(&frame).is_err() {
                self.close();
                break;
            }
            self.written(frame.len());
        }
        self.stream.finish_writing();
    }

    fn next(&self) -> Option<Vec<u8>> {
        let idle = |state: &mut State| state.frames.is_empty() && !state.finishing && !state.closed;
        self.changed.wait_while(self.state(), idle).unwrap_or_else(PoisonError::into_inner).frames.pop_front()
    }

    fn written(&self, bytes: usize) {
        let mut state = self.state();
        // it may have been closed meanwhile
        state.queued_bytes = state.queued_bytes.saturating_sub(bytes);
        drop(state);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn push(&mut self, message: &Message, session: u64, stream: &Stream) -> Result<(), WireError> {
        if self.finishing || self.closed {
            return Ok(());
        }
        let mut frame = message.encode(self.next_sequence, session)?;
        self.next_sequence += 1;
        // with nothing queued nothing is being written either
        if self.queued_bytes == 0 {
            // whatever kept the rest, the thread that writes it finds out
            let written = stream.write_now(&frame).unwrap_or(0);
            frame.drain(..written);
        }
        if !frame.is_empty() {
            self.queued_bytes += frame.len();
            self.frames.push_back(frame);
        }
        Ok(())
    }
}
