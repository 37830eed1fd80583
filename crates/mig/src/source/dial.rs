//! Connections to the destination, made on threads of their own, so that neither a resolver nor a host that does
//! not answer holds up a cancel. A thread that nobody waits for any more ends by its own deadlines.

use std::time::Duration;

use crossbeam::channel;
use crossbeam::select;
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::hello::{Attach, Secret, SessionId, session_tag};

use crate::control::{Control, Order};
use crate::link::{ReadError, read_message};
use crate::transport::{self, Address, Stream};

/// How long the destination may take to answer on a page channel.
const ANSWER: Duration = Duration::from_secs(10);

/// Connects, unless somebody cancels first.
pub(super) fn connect(to: &Address, control: &Control) -> Result<Stream, Fault> {
    let (cancelling, cancelled) = channel::bounded(1);
    let _hook = control.on_order(move |order| {
        if let Order::Cancel(reason) = order {
            // one word is enough
            let _ = cancelling.try_send(reason);
        }
    });
    let (connecting, connected) = channel::bounded(1);
    let to = to.clone();
    std::thread::spawn(move || {
        // it may have been cancelled, and nobody waits
        let _ = connecting.send(transport::connect(&to));
    });
    let fault = |reason| Fault::cancelled(Side::Source, Step::Connect, reason);
    select! {
        recv(connected) -> stream => {
            let ended = |_| Fault::new(Side::Source, Step::Connect, Blame::Local, "the connecting thread ended");
            let stream = stream.map_err(ended)??;
            if control.is_cancelled() { Err(fault(control.reason())) } else { Ok(stream) }
        }
        recv(cancelled) -> reason => Err(fault(reason.unwrap_or_default())),
    }
}

/// Opens the page channels and gives them to `done`.
pub(super) fn open_page_channels(
    to: Address,
    session: SessionId,
    secret: Secret,
    channels: u16,
    done: impl FnOnce(Result<Vec<Stream>, Fault>) + Send + 'static,
) {
    std::thread::spawn(move || {
        done((0..channels).map(|channel| open(&to, &Attach { session, secret, channel })).collect());
    });
}

fn open(to: &Address, attach: &Attach) -> Result<Stream, Fault> {
    let stream = transport::connect(to).map_err(|f| Fault { step: Step::Attach, ..f })?;
    introduce(&stream, attach).map_err(|e| e.fault(Side::Source, Step::Attach))?;
    Ok(stream)
}

fn introduce(stream: &Stream, attach: &Attach) -> Result<(), ReadError> {
    let introduction = Message::Attach(attach.clone());
    stream.write_all(&introduction.encode(0, session_tag(&attach.session)).map_err(ReadError::Wire)?)?;
    stream.set_read_deadline(Some(ANSWER))?;
    match read_message(stream)? {
        (_, Message::Attached) => {}
        _ => return Err(ReadError::Order("attach was not answered")),
    }
    Ok(stream.set_read_deadline(None)?)
}
