//! The control channel: messages out, messages in, and the certainty that the peer is alive.
//!
//! Each side pings once a second and answers pings from its reading thread, whatever its coordinator is
//! doing; a peer that says nothing for [`SILENCE_DEADLINE`] is gone, and every stream of the migration is
//! closed, which unblocks every thread.

use std::io;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::header::{HEADER_BYTES, Header};
use mig_wire::{Message, WireError};
use thiserror::Error;

use crate::transport::Stream;

/// A peer that says nothing for so long is gone.
pub(crate) const SILENCE_DEADLINE: Duration = Duration::from_secs(5);
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// Why a stream gave no frame.
#[derive(Debug, Error)]
pub(crate) enum ReadError {
    #[error("the connection was closed")]
    Closed,
    /// A deadline on the stream passed.
    #[error("the peer did not answer in time")]
    Late,
    #[error("the connection was lost: {0}")]
    Io(io::Error),
    #[error("the peer breaks the protocol: {0}")]
    Wire(WireError),
    #[error("the peer breaks the protocol: {0}")]
    Order(&'static str),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // which of the two, the platform decides (Rust's TcpStream::set_read_timeout)
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Late,
            _ => Self::Io(error),
        }
    }
}

impl ReadError {
    /// Whether it is explained by a peer that fell silent, and was therefore hung up on.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Self::Closed | Self::Late | Self::Io(_))
    }

    pub(crate) fn fault(&self, side: Side, step: Step) -> Fault {
        let blame = match self {
            Self::Closed | Self::Late | Self::Io(_) => Blame::Network,
            Self::Wire(_) | Self::Order(_) => Blame::Peer,
        };
        let remedy = match self {
            Self::Closed | Self::Late | Self::Io(_) => "check the other side and the network between",
            Self::Wire(WireError::NotOurs { .. }) => "check host and port: something else listens there",
            Self::Wire(_) | Self::Order(_) => "use the same version on both sides",
        };
        Fault::new(side, step, blame, self.to_string()).remedy(remedy)
    }
}

/// Reads a header; `Ok(None)` when the peer has ended the stream between frames.
pub(crate) fn read_header(stream: &Stream) -> Result<Option<Header>, ReadError> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    while filled < HEADER_BYTES {
        match stream.read(&mut bytes[filled..]) {
            Ok(0) if filled == 0 => return Ok(None),
            // another protocol's short answer is worth quoting
            Ok(0) => return Header::decode(&bytes).map(Some).map_err(ReadError::Wire),
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Header::decode(&bytes).map(Some).map_err(ReadError::Wire)
}

/// Reads a message: the bytes allocated for it are bounded by its kind.
pub(crate) fn read_message(stream: &Stream) -> Result<(Header, Message), ReadError> {
    let header = read_header(stream)?.ok_or(ReadError::Closed)?;
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).map_err(ReadError::from)?;
    let message = Message::decode(&header, &body).map_err(ReadError::Wire)?;
    Ok((header, message))
}

/// Something from the control channel.
#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// A message that is not the link's own.
    Message(Message),
    /// A ping came back after so long.
    RoundTrip(Duration),
    /// It is over.
    Lost(ReadError),
}

/// The control channel's sending half and its liveness.
pub(crate) struct Link {
    stream: Stream,
    session: u64,
    next_sequence: Mutex<u64>,
    clock: Instant,
    /// Nanoseconds on `clock` when the peer was last heard.
    heard: AtomicU64,
}

impl Link {
    /// A link over `stream`, on which `sent` messages went out before.
    pub(crate) fn new(stream: Stream, session: u64, sent: u64) -> Self {
        // a peer that takes nothing for so long is gone too; without the deadline its silence tells, except
        // to a ping that waits for it
        if let Err(error) = stream.set_write_deadline(Some(SILENCE_DEADLINE)) {
            tracing::warn!(%error, "writes to the peer have no deadline");
        }
        let heard = AtomicU64::new(0);
        Self { stream, session, next_sequence: Mutex::new(sent), clock: Instant::now(), heard }
    }

    pub(crate) fn send(&self, message: &Message) -> Result<(), ReadError> {
        // held while writing, so that messages are not mixed and go out in their order
        self.send_as(&mut self.next_sequence.lock().unwrap_or_else(PoisonError::into_inner), message)
    }

    fn send_as(&self, sequence: &mut u64, message: &Message) -> Result<(), ReadError> {
        let frame = message.encode(*sequence, self.session).map_err(ReadError::Wire)?;
        *sequence += 1;
        self.stream.write_all(&frame).map_err(ReadError::from)
    }

    /// Reads until the channel ends, giving everything to `sink`; the last event is [`LinkEvent::Lost`].
    /// `received` messages came in before.
    pub(crate) fn read_all(&self, received: u64, mut sink: impl FnMut(LinkEvent)) {
        let mut expected = received;
        loop {
            match self.read_one(expected) {
                Ok(event) => event.into_iter().for_each(&mut sink),
                Err(error) => return sink(LinkEvent::Lost(error)),
            }
            expected += 1;
        }
    }

    fn read_one(&self, expected: u64) -> Result<Option<LinkEvent>, ReadError> {
        let (header, message) = read_message(&self.stream)?;
        if header.session != self.session {
            return Err(ReadError::Order("another session"));
        }
        if header.sequence != expected {
            return Err(ReadError::Order("a message is missing"));
        }
        self.heard.store(self.now(), Ordering::Relaxed);
        Ok(match message {
            Message::Ping(token) => {
                self.send(&Message::Pong(token))?;
                None
            }
            // pings carry their time of sending
            Message::Pong(sent) => {
                Some(LinkEvent::RoundTrip(Duration::from_nanos(self.now().saturating_sub(sent))))
            }
            message => Some(LinkEvent::Message(message)),
        })
    }

    /// Pings until `stop` is closed. Calls `close_all` and returns when the peer has been silent for too long.
    pub(crate) fn watch(&self, stop: &Receiver<()>, close_all: impl FnOnce()) {
        self.heard.store(self.now(), Ordering::Relaxed);
        loop {
            self.ping();
            match stop.recv_timeout(PING_INTERVAL) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.silence() > SILENCE_DEADLINE {
                return close_all();
            }
        }
    }

    /// Asks whether the peer is there, unless a message is on its way: one that the peer does not take would
    /// keep this thread from noticing its silence.
    fn ping(&self) {
        if let Ok(mut sequence) = self.next_sequence.try_lock() {
            // a failure shows in the reading thread, or as silence
            let _ = self.send_as(&mut sequence, &Message::Ping(self.now()));
        }
    }

    /// How long the peer has said nothing.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_nanos(self.now().saturating_sub(self.heard.load(Ordering::Relaxed)))
    }

    /// No more will be said; what was said still arrives.
    pub(crate) fn finish(&self) {
        self.stream.finish_writing();
    }

    /// Ends it at once.
    pub(crate) fn close(&self) {
        self.stream.close();
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use mig_wire::Section;
    use mig_wire::section::MAX_BODY_BYTES;

    use super::*;
    use crate::transport::{Address, Ear, connect};

    #[test]
    fn a_peer_that_stops_reading_in_the_middle_of_a_message_is_gone_too() {
        let listener = Ear::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
        let link = Link::new(connect(listener.address()).unwrap(), 7, 0);
        // connected, but nobody ever reads: the connection stays in the listener's queue
        let body = vec![0; MAX_BODY_BYTES];
        let section = Section { name: "large".into(), instance: 0, version: 1, critical: true, body };
        let message = Message::State { round: 1, sections: vec![section; 3] };
        let (finished, outcome) = crossbeam::channel::bounded(1);
        let (_stop, stopped) = crossbeam::channel::bounded(0);
        std::thread::spawn(move || {
            std::thread::scope(|scope| {
                let sending = scope.spawn(|| link.send(&message));
                // the message holds the link before the first ping
                while link.next_sequence.try_lock().is_ok() && !sending.is_finished() {
                    std::thread::yield_now();
                }
                link.watch(&stopped, || link.close());
                let _ = finished.send(sending.join().unwrap());
            });
        });
        let sent = outcome.recv_timeout(12 * SILENCE_DEADLINE).expect("the silence is noticed");
        assert!(matches!(sent, Err(ReadError::Io(_))), "{sent:?}");
    }
}
