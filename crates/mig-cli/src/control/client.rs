//! A client of the control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Answer, Request};
use crate::event::Event;
use crate::failure::Failure;

/// The longest line that a holder may send: a screen or a report has a few kilobytes.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// A connection to a holder.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
    name: String,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Finished {
    /// The holder answered.
    Answered(Answer),
    /// The holder went away after the request was sent: what it did is not known.
    Lost(Failure),
}

impl Client {
    /// Connects to the holder at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> Result<Self, Failure> {
        let name = format!("unix:{}", path.display());
        let stream = UnixStream::connect(path).map_err(|e| {
            let remedy = match e.kind() {
                io::ErrorKind::PermissionDenied => "only the user who runs the holder may control it",
                _ => "give the --control path of a mig-send or mig-recv that runs",
            };
            Failure::new("source", "control", format!("no holder answers at {name}: {e}"), remedy)
        })?;
        Ok(Self { reader: BufReader::new(stream), name })
    }

    /// Sends a request and waits for its answer, handing events that come first to `on_event`.
    pub fn ask(&mut self, request: &Request, mut on_event: impl FnMut(Event)) -> Finished {
        self.exchange(request, &mut on_event).map_or_else(
            |e| {
                Finished::Lost(
                    Failure::new(
                        "source",
                        "control",
                        format!("the holder at {} went away before it answered: {e}", self.name),
                        "look for the guest at both ends before you start it anywhere",
                    )
                    .local(),
                )
            },
            Finished::Answered,
        )
    }

    fn exchange(&mut self, request: &Request, on_event: &mut impl FnMut(Event)) -> io::Result<Answer> {
        let mut text = serde_json::to_string(request)?;
        text.push('\n');
        self.reader.get_mut().write_all(text.as_bytes())?;
        loop {
            let mut line = Vec::new();
            (&mut self.reader).take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line)?;
            if !line.ends_with(b"\n") {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if let Some(answer) = Answer::parse(&line) {
                return Ok(answer);
            }
            // An event of a newer holder's is skipped.
            if let Ok(event) = serde_json::from_slice(&line) {
                on_event(event);
            }
        }
    }
}
