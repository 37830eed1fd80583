//! The page channels of a migration, to be closed together from any thread.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::stall::Delivery;
use crate::transport::Stream;

/// How many suit this host: two for each core, so that one moves bytes while the other waits for memory or for
/// the socket. More than eight gain nothing on the links there are (docs/benchmarks).
pub(crate) fn suited_channels() -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    u16::try_from(cores).unwrap_or(u16::MAX).saturating_mul(2).clamp(2, 8)
}

/// Streams that close together; one added after that is closed at once.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    streams: Vec<Stream>,
    closed: bool,
}

impl Streams {
    pub(crate) fn add(&self, stream: Stream) {
        let mut state = self.lock();
        if state.closed {
            stream.close();
        }
        state.streams.push(stream);
    }

    /// What the peer's host has taken of what was written, and what it has not yet.
    pub(crate) fn delivery(&self) -> Delivery {
        let mut all = Delivery::default();
        self.lock().streams.iter().for_each(|stream| all += Delivery::of(stream));
        all
    }

    /// Bytes that came in.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.lock().streams.iter().map(Stream::read_bytes).sum()
    }

    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.streams.iter().for_each(Stream::close);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
