//! Where a program's events go: lines of JSON or text for people, written by a thread of its own, so that a
//! full pipe or a slow terminal never holds up a migration.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use crate::event::Event;
use crate::render::Renderer;

/// How long a program waits for its last words to be read.
const FLUSH_PATIENCE: Duration = Duration::from_secs(2);

/// A program's voice; cheap to clone.
#[derive(Debug, Clone)]
pub struct Output {
    sender: Sender<Message>,
}

#[derive(Debug)]
enum Message {
    Tell(Box<Event>),
    Flush(Sender<()>),
}

/// Which stream a program speaks on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error: where standard output is the guest's console.
    Stderr,
}

impl Output {
    /// An event a line on standard output.
    pub fn json() -> Self {
        Self::to(Stream::Stdout, true, |event| {
            serde_json::to_string(event).map(|line| line + "\n").unwrap_or_default()
        })
    }

    /// Lines for people, with colours on a terminal unless `NO_COLOR` is set (<https://no-color.org>). Errors
    /// go to standard error whatever the stream.
    pub fn human(stream: Stream) -> Self {
        let terminal = match stream {
            Stream::Stdout => io::stdout().is_terminal(),
            Stream::Stderr => io::stderr().is_terminal(),
        };
        let no_colour = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let mut renderer = Renderer::new(terminal && !no_colour, terminal);
        Self::to(stream, false, move |event| renderer.render(event))
    }

    /// Hands every event to `sink`, on a thread of its own.
    pub fn sink(mut sink: impl FnMut(&Event) + Send + 'static) -> Self {
        let (sender, receiver) = channel();
        thread::spawn(move || drain(&receiver, &mut sink));
        Self { sender }
    }

    fn to(
        stream: Stream,
        speaks_json: bool,
        mut text: impl FnMut(&Event) -> String + Send + 'static,
    ) -> Self {
        Self::sink(move |event| {
            let text = text(event);
            let stream =
                if speaks_json || !matches!(event, Event::Error(_)) { stream } else { Stream::Stderr };
            // A reader that is gone is no reason to stop a guest.
            let _ = match stream {
                Stream::Stdout => write_out(&mut io::stdout().lock(), &text),
                Stream::Stderr => write_out(&mut io::stderr().lock(), &text),
            };
        })
    }

    /// Tells an event. Never waits.
    pub fn tell(&self, event: Event) {
        // The receiving thread lives as long as a sender does.
        let _ = self.sender.send(Message::Tell(Box::new(event)));
    }

    /// Tells something in words.
    pub fn note(&self, text: impl Into<String>) {
        self.tell(Event::Note { text: text.into() });
    }

    /// Waits until everything told so far is written, a short while at most.
    pub fn flush(&self) {
        let (done, wait) = channel();
        if self.sender.send(Message::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(FLUSH_PATIENCE);
        }
    }
}

fn drain(receiver: &Receiver<Message>, sink: &mut impl FnMut(&Event)) {
    for message in receiver {
        match message {
            Message::Tell(event) => sink(&event),
            Message::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

fn write_out(stream: &mut impl Write, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes())?;
    stream.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn telling_never_waits_for_the_reader_and_a_flush_does() {
        let (gate, wait) = channel::<()>();
        let (seen, told) = channel();
        let output = Output::sink(move |event| {
            let _ = wait.recv();
            let _ = seen.send(event.clone());
        });
        for _ in 0..1000 {
            output.tell(Event::Paused);
        }
        assert!(told.try_recv().is_err(), "nothing was written yet, and telling came back");
        drop(gate);
        output.flush();
        assert_eq!(told.try_iter().count(), 1000);
    }
}
