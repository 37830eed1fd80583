//! The control channel: messages out, messages in, and the certainty that the peer is alive.
//!
//! Each side pings twice a second, whatever its coordinator is doing, and answers pings from its reading
//! thread; a peer of which nothing comes, not a byte, for [`SILENCE_DEADLINE`] is gone: nothing more is read, and
//! the page channels are closed, which unblocks every thread. A peer that lives but does not go on is given up by
//! the deadlines of the steps (see `patience`).

mod outbox;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::header::{HEADER_BYTES, Header};
use mig_wire::{Kind, Message, WireError};
use thiserror::Error;

use self::outbox::Outbox;
use crate::stall::Delivery;
use crate::transport::Stream;

/// A peer that says nothing for so long is gone. Noticed within [`LOOK_INTERVAL`] of it, and heard at most
/// [`PING_INTERVAL`] before it froze: 4 to 5 s from then, on a machine that finds time for this thread.
pub(crate) const SILENCE_DEADLINE: Duration = Duration::from_millis(4500);
/// How long the last word may take to the peer's host.
const FAREWELL: Duration = Duration::from_secs(1);
/// How long a peer may take to close whose host has the last word: what it has is not lost to a reset any more.
const CLOSES: Duration = Duration::from_millis(250);
/// How often it is asked whether something came.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);
const PING_INTERVAL: Duration = Duration::from_millis(500);
/// The first pings follow each other faster: a migration may be over before the third, and the pause it predicts
/// holds the shortest round trip that was seen.
const FIRST_PINGS: u32 = 8;
const FIRST_PING_INTERVAL: Duration = Duration::from_millis(10);
/// What counts of the time between two looks: who did not come to look for longer was himself held up, or
/// stopped, and what came meanwhile is still unread.
pub(crate) const MOST_BETWEEN_LOOKS: Duration = Duration::from_secs(1);

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
    /// Nothing of the connection's.
    #[error("this host has no memory for the guest's pages: {0}")]
    Memory(io::Error),
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
            Self::Memory(_) => Blame::Local,
        };
        let remedy = match self {
            Self::Closed | Self::Late | Self::Io(_) => "check the other side and the network between",
            Self::Wire(WireError::NotOurs { .. }) => "check host and port: something else listens there",
            Self::Wire(_) | Self::Order(_) => "use the same version on both sides",
            Self::Memory(_) => "free memory on the destination, or take another",
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
    let message = read_body(stream, &header)?;
    Ok((header, message))
}

fn read_body(stream: &Stream, header: &Header) -> Result<Message, ReadError> {
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).map_err(ReadError::from)?;
    Message::decode(header, &body).map_err(ReadError::Wire)
}

/// Whether a peer may send more than one message of a kind. All others come once, which also bounds what waits
/// for a coordinator that is busy: one State, one Describe, and small ones.
fn may_repeat(kind: Kind) -> bool {
    matches!(kind, Kind::RoundAck | Kind::Digests | Kind::Ping | Kind::Pong)
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
    stream: Arc<Stream>,
    session: u64,
    outbox: Arc<Outbox>,
    clock: Instant,
    /// For how many milliseconds nothing has come.
    silent_ms: AtomicU64,
    /// Bytes of pings and their answers that came in.
    ping_bytes: AtomicU64,
}

impl Link {
    /// A link over `stream`, on which `sent` messages went out before.
    pub(crate) fn new(stream: Stream, session: u64, sent: u64) -> Self {
        let stream = Arc::new(stream);
        let outbox = Arc::new(Outbox::new(stream.clone(), session, sent));
        let writing = outbox.clone();
        std::thread::spawn(move || writing.write());
        let (silent_ms, ping_bytes) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { stream, session, outbox, clock: Instant::now(), silent_ms, ping_bytes }
    }

    /// Says something: never waits for the peer. That the link failed is left to the thread that reads it.
    pub(crate) fn send(&self, message: &Message) -> Result<(), ReadError> {
        self.outbox.push(message).map_err(ReadError::Wire)?;
        // who strikes at a message that was sent wants it on its way
        #[cfg(feature = "fault-points")]
        self.drain(Instant::now() + SILENCE_DEADLINE);
        Ok(())
    }

    /// The same for one of many messages: waits for a peer that does not take them.
    pub(crate) fn send_patiently(&self, message: &Message) -> Result<(), ReadError> {
        self.outbox.push_patiently(message).map_err(ReadError::Wire)
    }

    /// Reads until the channel ends, giving everything to `sink`; the last event is [`LinkEvent::Lost`].
    /// `received` messages came in before.
    pub(crate) fn read_all(&self, received: u64, mut sink: impl FnMut(LinkEvent)) {
        let (mut expected, mut seen) = (received, Vec::new());
        loop {
            match self.read_one(expected, &mut seen) {
                Ok(event) => event.into_iter().for_each(&mut sink),
                Err(error) => return sink(LinkEvent::Lost(error)),
            }
            expected += 1;
        }
    }

    /// `seen` are the kinds that came before, of those that come once.
    fn read_one(&self, expected: u64, seen: &mut Vec<Kind>) -> Result<Option<LinkEvent>, ReadError> {
        let header = read_header(&self.stream)?.ok_or(ReadError::Closed)?;
        if header.session != self.session {
            return Err(ReadError::Order("another session"));
        }
        if header.sequence != expected {
            return Err(ReadError::Order("a message is missing"));
        }
        if !may_repeat(header.kind) {
            if seen.contains(&header.kind) {
                return Err(ReadError::Order("a message that comes once came twice"));
            }
            seen.push(header.kind);
        }
        let message = read_body(&self.stream, &header)?;
        if matches!(header.kind, Kind::Ping | Kind::Pong) {
            let bytes = (HEADER_BYTES + header.body_bytes()) as u64;
            self.ping_bytes.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(match message {
            Message::Ping(token) => {
                // this thread must not wait, and a peer that has so much to read hears that this side lives
                self.outbox.push_if_room(&Message::Pong(token)).map_err(ReadError::Wire)?;
                None
            }
            // pings carry their time of sending
            Message::Pong(sent) => {
                Some(LinkEvent::RoundTrip(Duration::from_nanos(self.now().saturating_sub(sent))))
            }
            message => Some(LinkEvent::Message(message)),
        })
    }

    /// Pings until `stop` is closed. When the peer has been silent for too long, ends what is heard here, calls
    /// `close_others` and returns. What is said last is still left for a peer that was frozen, and goes on later.
    pub(crate) fn watch(&self, stop: &Receiver<()>, close_others: impl FnOnce()) {
        let mut silence = Silence::new(self.clock.elapsed(), self.stream.read_bytes());
        let (mut pinged, mut pings) = (None, 0);
        loop {
            let now = self.clock.elapsed();
            let first = pings < FIRST_PINGS;
            let interval = if first { FIRST_PING_INTERVAL } else { PING_INTERVAL };
            if pinged.is_none_or(|at| now.saturating_sub(at) >= interval) {
                pinged = Some(now);
                pings += 1;
                self.ping();
            }
            match stop.recv_timeout(if first { FIRST_PING_INTERVAL } else { LOOK_INTERVAL }) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
            // what is unread is this side's delay: its reader waits for a coordinator that is busy
            let unread = self.stream.has_unread();
            let lasts = silence.look(self.clock.elapsed(), self.stream.read_bytes(), unread);
            self.silent_ms.store(u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
            if lasts > SILENCE_DEADLINE {
                self.stream.finish_reading();
                return close_others();
            }
        }
    }

    /// Asks whether the peer is there, unless something waits to be written anyway.
    fn ping(&self) {
        if self.outbox.queued_bytes() == 0 {
            // a failure shows in the reading thread, or as silence
            let _ = self.send(&Message::Ping(self.now()));
        }
    }

    /// How long the peer has said nothing.
    pub(crate) fn silence(&self) -> Duration {
        Duration::from_millis(self.silent_ms.load(Ordering::Relaxed))
    }

    /// Bytes that came in, without those that only say that the peer lives.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.stream.read_bytes().saturating_sub(self.ping_bytes.load(Ordering::Relaxed))
    }

    /// What the peer's host has taken of what was said, and what it has not yet.
    pub(crate) fn delivery(&self) -> Delivery {
        let queued = self.outbox.queued_bytes() as u64;
        let part = Delivery::of(&self.stream);
        // the frame on its way counts in both, as long as it is
        Delivery { owed_bytes: part.owed_bytes.max(queued), ..part }
    }

    /// No more will be said; what was said still arrives.
    pub(crate) fn finish(&self) {
        self.outbox.finish();
    }

    /// Says no more and ends it so that the last word arrives: when the peer has ended it too, or has had the
    /// time to. `ended` waits so long for its end and says whether that has come.
    pub(crate) fn part(&self, mut ended: impl FnMut(Duration) -> bool) {
        self.finish();
        let began = Instant::now();
        let waits = || match began.elapsed() {
            waited if waited < CLOSES => true,
            waited => waited < FAREWELL && self.delivery().owed_bytes > 0,
        };
        while !ended(CLOSES / 10) && waits() {}
        self.drain(began + FAREWELL);
        self.close();
    }

    /// Waits until all that was said is on its way, at most until `deadline`.
    fn drain(&self, deadline: Instant) {
        self.outbox.drain(deadline);
    }

    /// Ends it at once.
    pub(crate) fn close(&self) {
        self.outbox.close();
        self.stream.close();
    }

    fn now(&self) -> u64 {
        u64::try_from(self.clock.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

impl Drop for Link {
    /// Ends the thread that writes.
    fn drop(&mut self) {
        self.close();
    }
}

/// How long nothing has come, as far as somebody looked.
struct Silence {
    looked: Duration,
    read_bytes: u64,
    lasts: Duration,
}

impl Silence {
    fn new(now: Duration, read_bytes: u64) -> Self {
        Self { looked: now, read_bytes, lasts: Duration::ZERO }
    }

    fn look(&mut self, now: Duration, read_bytes: u64, unread: bool) -> Duration {
        self.lasts += now.saturating_sub(self.looked).min(MOST_BETWEEN_LOOKS);
        if read_bytes != self.read_bytes || unread {
            self.lasts = Duration::ZERO;
        }
        (self.looked, self.read_bytes) = (now, read_bytes);
        self.lasts
    }
}

#[cfg(test)]
mod tests {
    use mig_wire::Section;
    use mig_wire::section::MAX_BODY_BYTES;

    use super::*;
    use crate::transport::{Address, Ear, connect};

    fn connected() -> (Ear, Link, Stream) {
        let listener = Ear::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
        let link = Link::new(connect(listener.address()).unwrap(), 7, 0);
        let theirs = listener.accept(Duration::from_secs(10)).unwrap();
        let theirs = theirs.or_else(|| listener.accept(Duration::from_secs(10)).unwrap()).unwrap();
        (listener, link, theirs)
    }

    /// How long the link is watched until it finds its peer gone, or `patience` is over.
    fn watched(link: &Link, patience: Duration) -> Option<Duration> {
        let (stopping, stopped) = crossbeam::channel::bounded(0);
        let began = Instant::now();
        let gone = std::thread::scope(|scope| {
            let reading = scope.spawn(|| link.read_all(0, drop));
            let watching = scope.spawn(|| {
                let mut gone = None;
                link.watch(&stopped, || gone = Some(began.elapsed()));
                gone
            });
            while !watching.is_finished() && began.elapsed() < patience {
                std::thread::sleep(Duration::from_millis(10));
            }
            drop(stopping);
            let gone = watching.join().unwrap();
            link.close();
            reading.join().unwrap();
            gone
        });
        eprintln!("gone after {gone:?}");
        gone
    }

    fn large() -> Message {
        let body = vec![0; MAX_BODY_BYTES];
        let section = Section { name: "large".into(), instance: 0, version: 1, critical: true, body };
        Message::State { round: 1, sections: vec![section; 3] }
    }

    #[test]
    fn a_peer_that_stops_reading_in_the_middle_of_a_message_is_gone_and_nobody_waits_for_it() {
        let (_listener, link, _theirs) = connected();
        link.send(&large()).unwrap();
        link.send(&Message::Commit).unwrap();
        assert!(link.delivery().owed_bytes > 0);
        let gone = watched(&link, 12 * SILENCE_DEADLINE).expect("the silence is noticed");
        assert!(gone >= SILENCE_DEADLINE && link.silence() > SILENCE_DEADLINE);
    }

    #[test]
    fn a_peer_whose_message_takes_long_to_come_is_heard_all_the_while() {
        let (_listener, link, theirs) = connected();
        let frame = Message::Abort(Fault::new(Side::Source, Step::Save, Blame::Local, "x".repeat(60)));
        let frame = frame.encode(0, 7).unwrap();
        std::thread::spawn(move || {
            for byte in frame {
                if theirs.write_all(&[byte]).is_err() {
                    return;
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        assert_eq!(watched(&link, SILENCE_DEADLINE + Duration::from_secs(2)), None);
    }

    #[test]
    fn a_peer_that_repeats_what_comes_once_is_no_peer_and_fills_no_memory() {
        let (_listener, link, theirs) = connected();
        let state = Message::State { round: 0, sections: Vec::new() };
        for (sequence, message) in (0u64..).zip([&Message::Digests { first_chunk: 0, digests: vec![1] }; 3]) {
            theirs.write_all(&message.encode(sequence, 7).unwrap()).unwrap();
        }
        for sequence in 3..5 {
            theirs.write_all(&state.encode(sequence, 7).unwrap()).unwrap();
        }
        theirs.finish_writing();
        let mut heard = Vec::new();
        link.read_all(0, |event| heard.push(event));
        let [.., LinkEvent::Message(Message::State { .. }), LinkEvent::Lost(ReadError::Order(_))] =
            &heard[..]
        else {
            panic!("{heard:?}")
        };
        assert_eq!(heard.len(), 5);
    }

    #[test]
    fn who_was_stopped_himself_does_not_take_that_for_the_peers_silence() {
        let mut silence = Silence::new(Duration::ZERO, 7);
        let mut look = |ms, read, unread| silence.look(Duration::from_millis(ms), read, unread).as_millis();
        assert_eq!([look(250, 7, false), look(500, 7, false)], [250, 500]);
        assert_eq!([look(60_000, 7, false), look(60_250, 7, false)], [1500, 1750]);
        assert_eq!([look(60_500, 8, false), look(60_750, 8, false)], [0, 250]);
        assert_eq!([look(61_000, 8, true), look(61_250, 8, false)], [0, 250]);
    }

    #[test]
    fn what_is_said_last_arrives_before_the_end() {
        let (_listener, link, theirs) = connected();
        link.send(&Message::Commit).unwrap();
        link.finish();
        link.send(&Message::Ping(1)).unwrap();
        assert!(matches!(read_message(&theirs), Ok((_, Message::Commit))));
        assert!(matches!(read_message(&theirs), Err(ReadError::Closed)));
    }

    #[test]
    fn a_deadline_on_reading_is_not_moved_by_a_byte_now_and_then() {
        let (_listener, link, theirs) = connected();
        let began = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let frame = Message::Commit.encode(0, 7).unwrap();
                for byte in &frame {
                    if link.stream.write_all(&[*byte]).is_err() {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(50));
                }
            });
            theirs.set_read_deadline(Some(Duration::from_millis(300))).unwrap();
            assert!(matches!(read_message(&theirs), Err(ReadError::Late)), "{:?}", began.elapsed());
            theirs.close();
        });
    }
}
