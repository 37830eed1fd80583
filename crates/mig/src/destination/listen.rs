//! Who connects: the source of a guest, its page channels, and strangers.
//!
//! Each connection's first message is read by a thread of its own with a deadline, so that a silent stranger
//! holds nobody up; at most [`MAX_UNKNOWN`] are heard at a time, each at the cost of a thread's stack and a
//! few hundred bytes (the limits of `Hello` and `Attach`), and more wait in the kernel's queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam::channel::{SendTimeoutError, Sender};
use mig_core::{Side, Step};
use mig_wire::Message;
use mig_wire::hello::{Attach, Hello, session_tag};

use crate::link::{ReadError, read_header};
use crate::transport::{Listener, Stream};

/// How long a connection may take to say what it is.
const INTRODUCTION: Duration = Duration::from_secs(2);
const MAX_UNKNOWN: usize = 64;
const POLL: Duration = Duration::from_millis(50);

/// Somebody has introduced himself, or failed to.
#[derive(Debug)]
pub(super) enum Arrival {
    /// A source.
    Hello(Stream, Hello),
    /// A page channel.
    Attach(Stream, Attach),
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

/// Accepts until `stop` is set.
///
/// Introductions run on threads of their own that outlive this call by [`INTRODUCTION`] at most: a silent
/// stranger does not hold up who has received a guest.
pub(super) fn run(listener: &Listener, stop: &AtomicBool, arrivals: &Sender<Arrival>) {
    let unknown = Arc::new(AtomicUsize::new(0));
    while !stop.load(Ordering::Relaxed) {
        if unknown.load(Ordering::Relaxed) >= MAX_UNKNOWN {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        match listener.accept(POLL) {
            Ok(Some(stream)) => {
                unknown.fetch_add(1, Ordering::Relaxed);
                let (arrivals, unknown) = (arrivals.clone(), unknown.clone());
                std::thread::spawn(move || {
                    let arrival = introduce(stream);
                    // a receive that has ended has no use for it
                    let _ = arrivals.send(arrival);
                    // only now: a thread that waits for a busy coordinator counts too
                    unknown.fetch_sub(1, Ordering::Relaxed);
                });
            }
            Ok(None) => {}
            // one connection's trouble, not the listener's (accept(2))
            Err(e) if is_transient(&e) => std::thread::sleep(POLL),
            Err(e) => return say_deaf(e, stop, arrivals),
        }
    }
}

/// Reports that the listener failed, unless the receive is over before there is room for the report.
fn say_deaf(error: std::io::Error, stop: &AtomicBool, arrivals: &Sender<Arrival>) {
    let mut arrival = Arrival::Deaf(error);
    while !stop.load(Ordering::Relaxed) {
        match arrivals.send_timeout(arrival, POLL) {
            Err(SendTimeoutError::Timeout(back)) => arrival = back,
            Ok(()) | Err(SendTimeoutError::Disconnected(_)) => return,
        }
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
    if !matches!(header.kind, mig_wire::Kind::Hello | mig_wire::Kind::Attach) {
        return Err(ReadError::Order("the first message is neither hello nor attach"));
    }
    let mut body = vec![0; header.body_bytes()];
    stream.read_exact(&mut body).map_err(ReadError::from)?;
    let message = Message::decode(&header, &body).map_err(ReadError::Wire)?;
    let session = match &message {
        Message::Hello(hello) => session_tag(&hello.session),
        Message::Attach(attach) => session_tag(&attach.session),
        _ => header.session,
    };
    if header.session != session || header.sequence != 0 {
        return Err(ReadError::Order("header and message differ"));
    }
    stream.set_read_deadline(None).map_err(ReadError::from)?;
    stream.set_write_deadline(None).map_err(ReadError::from)?;
    Ok(message)
}
