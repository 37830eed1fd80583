//! The page channels of a migration, to be closed together from any thread.

use std::sync::{Mutex, PoisonError};

use crate::transport::Stream;

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
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.closed {
            stream.close();
        }
        state.streams.push(stream);
    }

    pub(crate) fn close(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.closed = true;
        state.streams.iter().for_each(Stream::close);
    }
}
