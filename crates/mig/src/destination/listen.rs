//! Who connects: the source of a guest, its page channels, a source in doubt, and strangers.
//!
//! A listener's thread accepts from bind to drop, so that a source in doubt is answered between and after
//! receives too. Each connection's first message is read by a thread of its own with a deadline, so that a
//! silent stranger holds nobody up; at most [`MAX_UNKNOWN`] are heard at a time, each at the cost of a thread's
//! stack and a few hundred bytes (the limits of `Hello`, `Attach` and `Query`), and more wait in the kernel's
//! queue.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{self, Receiver, SendTimeoutError, Sender};
use mig_core::{Fault, Side, Step};
use mig_wire::describe::Refusal;
use mig_wire::frame::Fate;
use mig_wire::hello::{Attach, Hello, Query, session_tag};
use mig_wire::{Kind, Message};

use super::fates::{Fates, Known};
use crate::link::{ReadError, read_header};
use crate::transport::{Address, Ear, Stream};

/// How long a connection may take to say what it is.
const INTRODUCTION: Duration = Duration::from_secs(2);
const MAX_UNKNOWN: usize = 64;
/// The stack of the thread that hears one: with a few hundred bytes all that a stranger costs.
const STACK_BYTES: usize = 256 << 10;
/// Connections that wait for a receive.
const ARRIVALS: usize = 16;
/// How long somebody whom a receive wants waits for one that is busy, or about to begin. A source waits for its
/// answer as long.
const HAND_OVER: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// A receiver's address: what sources connect to.
///
/// Keep it while a source may be in doubt: it answers what became of the sessions that ended here, from memory.
#[derive(Debug)]
pub struct Listener {
    address: Address,
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens. Port 0 takes a free one; see [`Listener::address`].
    ///
    /// # Errors
    /// The name does not resolve, the address is not this host's, or the port is taken.
    pub fn bind(address: &Address) -> Result<Self, Fault> {
        let ear = Ear::bind(address)?;
        let (arrived, arrivals) = channel::bounded(ARRIVALS);
        let desk = Arc::new(Desk {
            closed: AtomicBool::new(false),
            receiving: AtomicBool::new(false),
            taken: AtomicBool::new(false),
            fates: Mutex::default(),
            arrived,
            arrivals,
        });
        let (address, listening) = (ear.address().clone(), desk.clone());
        let thread = std::thread::spawn(move || listening.listen(&ear));
        Ok(Self { address, desk, thread: Some(thread) })
    }

    /// Where it listens, with the port that was chosen.
    pub fn address(&self) -> &Address {
        &self.address
    }

    pub(super) fn desk(&self) -> &Desk {
        &self.desk
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.desk.closed.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Where connections are handed over, and questions about sessions that ended here answered.
#[derive(Debug)]
pub(super) struct Desk {
    closed: AtomicBool,
    /// A receive is open.
    receiving: AtomicBool,
    /// The guest is here: there is no room for another.
    taken: AtomicBool,
    fates: Mutex<Fates>,
    arrived: Sender<Arrival>,
    arrivals: Receiver<Arrival>,
}

/// Somebody has introduced himself, or failed to.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A source.
    Hello(Stream, Hello),
    /// A page channel.
    Attach(Stream, Attach),
    /// The source of a session that is open here is in doubt.
    Query(Stream, Query),
    /// Neither.
    Stranger {
        /// Where from.
        peer: String,
        /// What was wrong.
        cause: String,
    },
    /// The listener itself failed.
    Deaf(std::io::Error),
}

impl Desk {
    /// Where to wait for who comes.
    pub(super) fn arrivals(&self) -> &Receiver<Arrival> {
        &self.arrivals
    }

    /// A receive begins, and lasts until what is returned is dropped: sources are welcome.
    pub(super) fn open(&self) -> Open<'_> {
        self.taken.store(false, Ordering::Relaxed);
        self.receiving.store(true, Ordering::Relaxed);
        Open(self)
    }

    /// Notes what is known of a session; one that has ended is answered for here from now on.
    pub(super) fn note(&self, session: &Query, known: Known) {
        self.fates().note(session, known);
        if matches!(known, Known::Running { .. } | Known::Lost) {
            self.taken.store(true, Ordering::Relaxed);
        }
    }

    /// A receive has ended: who came too late for it is told so.
    pub(super) fn clear(&self) {
        while let Ok(arrival) = self.arrivals.try_recv() {
            match arrival {
                Arrival::Query(stream, query) => {
                    let _ = self.answer(&stream, &query);
                }
                Arrival::Hello(stream, hello) => refuse(&stream, &hello),
                Arrival::Attach(..) | Arrival::Stranger { .. } | Arrival::Deaf(_) => {}
            }
        }
    }

    /// Answers a question, unless the open receive has to.
    fn answer(&self, stream: &Stream, query: &Query) -> bool {
        let known = self.fates().find(query);
        let fate = known.map_or(Some(Fate::Unknown), Known::fate);
        fate.inspect(|fate| tell(stream, query, *fate)).is_some()
    }

    fn fates(&self) -> MutexGuard<'_, Fates> {
        self.fates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Accepts until the listener is dropped.
    fn listen(self: &Arc<Self>, ear: &Ear) {
        let unknown = Arc::new(AtomicUsize::new(0));
        while !self.is_closed() {
            if unknown.load(Ordering::Relaxed) >= MAX_UNKNOWN {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            match ear.accept(POLL) {
                Ok(Some(stream)) => {
                    let (desk, one) = (self.clone(), OneUnknown::new(&unknown));
                    let hearing = std::thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
                        desk.attend(stream);
                        // only now: a thread that waits for a busy coordinator counts too
                        drop(one);
                    });
                    // no thread to be had: this one is hung up on
                    if let Err(error) = hearing {
                        tracing::warn!(%error, "a connection cannot be heard");
                        std::thread::sleep(POLL);
                    }
                }
                Ok(None) => {}
                // one connection's trouble, not the listener's (accept(2))
                Err(e) if is_transient(&e) => std::thread::sleep(POLL),
                Err(e) => return self.hand_over(Arrival::Deaf(e)),
            }
        }
    }

    /// Hears one connection out, and answers it or hands it over.
    fn attend(&self, stream: Stream) {
        let arrival = introduce(stream);
        match &arrival {
            Arrival::Query(stream, query) if self.answer(stream, query) => return,
            Arrival::Hello(stream, hello) if self.taken.load(Ordering::Relaxed) => {
                return refuse(stream, hello);
            }
            _ => {}
        }
        self.hand_over(arrival);
    }

    /// Hands over what a receive wants to know. Who waits here counts as unknown, so nobody may for long: else
    /// strangers would keep the ear from hearing a source.
    fn hand_over(&self, mut arrival: Arrival) {
        let patience = match arrival {
            Arrival::Hello(..) | Arrival::Query(..) => HAND_OVER,
            Arrival::Attach(..) if self.is_receiving() => HAND_OVER,
            // that it came may be told, by the next receive too, and need not be
            Arrival::Stranger { .. } => POLL,
            Arrival::Attach(..) => return,
            Arrival::Deaf(_) => Duration::MAX,
        };
        let began = Instant::now();
        while !self.is_closed() && began.elapsed() < patience {
            match self.arrived.send_timeout(arrival, POLL) {
                Err(SendTimeoutError::Timeout(back)) => arrival = back,
                Ok(()) | Err(SendTimeoutError::Disconnected(_)) => return,
            }
        }
    }

    fn is_receiving(&self) -> bool {
        self.receiving.load(Ordering::Relaxed)
    }
}

/// An open receive.
#[must_use]
pub(super) struct Open<'a>(&'a Desk);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.receiving.store(false, Ordering::Relaxed);
    }
}

/// A connection that counts as unknown as long as this lives.
struct OneUnknown(Arc<AtomicUsize>);

impl OneUnknown {
    fn new(unknown: &Arc<AtomicUsize>) -> Self {
        unknown.fetch_add(1, Ordering::Relaxed);
        Self(unknown.clone())
    }
}

impl Drop for OneUnknown {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers a source in doubt. That it does not arrive is known by its asking again.
pub(super) fn tell(stream: &Stream, query: &Query, fate: Fate) {
    if let Ok(frame) = Message::Outcome(fate).encode(0, session_tag(&query.session)) {
        let _ = stream.write_all(&frame);
    }
}

/// Tells a source that there is no room for its guest, and waits until it has read that: closing at once might
/// overtake the words.
fn refuse(stream: &Stream, hello: &Hello) {
    let refusal =
        Refusal::new("busy", "this receiver has its guest already", "send to another receiver, or start one");
    if let Ok(frame) = Message::Refuse(vec![refusal]).encode(0, session_tag(&hello.session))
        && stream.set_read_deadline(Some(INTRODUCTION)).is_ok()
        && stream.set_write_deadline(Some(INTRODUCTION)).is_ok()
        && stream.write_all(&frame).is_ok()
    {
        stream.finish_writing();
        let _ = stream.read(&mut [0; 64]);
    }
}

fn is_transient(error: &std::io::Error) -> bool {
    let transient = [
        libc::ECONNABORTED,
        libc::EINTR,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOBUFS,
        libc::ENOMEM,
        libc::EPROTO,
        libc::EPERM,
    ];
    error.raw_os_error().is_some_and(|code| transient.contains(&code))
}

fn introduce(stream: Stream) -> Arrival {
    let peer = stream.peer();
    match first_message(&stream) {
        Ok(Message::Hello(hello)) => Arrival::Hello(stream, hello),
        Ok(Message::Attach(attach)) => Arrival::Attach(stream, attach),
        Ok(Message::Query(query)) => Arrival::Query(stream, query),
        Ok(_) => {
            Arrival::Stranger { peer, cause: "it introduced itself as neither source nor channel".into() }
        }
        Err(error) => {
            Arrival::Stranger { peer, cause: error.fault(Side::Destination, Step::Handshake).cause }
        }
    }
}

fn first_message(stream: &Stream) -> Result<Message, ReadError> {
    stream.set_read_deadline(Some(INTRODUCTION)).map_err(ReadError::from)?;
    stream.set_write_deadline(Some(INTRODUCTION)).map_err(ReadError::from)?;
    let header = read_header(stream)?.ok_or(ReadError::Closed)?;
    // checked before the body is read: a stranger may not make us take more
    if !matches!(header.kind, Kind::Hello | Kind::Attach | Kind::Query) {
        return Err(ReadError::Order("the first message is neither hello nor attach nor query"));
    }
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).map_err(ReadError::from)?;
    let message = Message::decode(&header, &body).map_err(ReadError::Wire)?;
    let session = match &message {
        Message::Hello(hello) => session_tag(&hello.session),
        Message::Attach(attach) => session_tag(&attach.session),
        Message::Query(query) => session_tag(&query.session),
        _ => header.session,
    };
    if header.session != session || header.sequence != 0 {
        return Err(ReadError::Order("header and message differ"));
    }
    stream.set_read_deadline(None).map_err(ReadError::from)?;
    stream.set_write_deadline(None).map_err(ReadError::from)?;
    Ok(message)
}
