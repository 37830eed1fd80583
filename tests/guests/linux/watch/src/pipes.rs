//! Messages to another process and back, and signals to it: each arrives once, in order, unchanged.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::duty::Check;
use crate::random::mix;
use crate::report::{Count, Fault, Report};

/// Messages under way at once.
const BURST: u64 = 4;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The peer can take signals.
    Ready = 1,
    /// To be sent back.
    Request = 2,
    /// Sent back.
    Echo = 3,
    /// The peer has received so many signals.
    Signal = 4,
}

/// Fits a pipe's atomic write, so that it comes whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: u64,
    pub(crate) seq: u64,
    pub(crate) check: u64,
}

impl Message {
    pub(crate) const BYTES: usize = 24;

    pub(crate) fn new(kind: Kind, seq: u64) -> Self {
        Self { kind: kind as u64, seq, check: mix(seq) }
    }

    pub(crate) fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (to, word) in bytes.chunks_mut(8).zip([self.kind, self.seq, self.check]) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        Self { kind: word(0), seq: word(8), check: word(16) }
    }
}

/// This side of the pipes.
pub(crate) struct Pipes {
    peer: Child,
    to: ChildStdin,
    from: ChildStdout,
    sent: u64,
    signals: u64,
}

impl Pipes {
    /// Starts the peer, which is this program again.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start() -> io::Result<Self> {
        Self::start_with(Command::new(std::env::current_exe()?).arg("--peer"))
    }

    fn start_with(command: &mut Command) -> io::Result<Self> {
        let mut peer = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = (peer.stdin.take().expect("piped"), peer.stdout.take().expect("piped"));
        let mut pipes = Self { peer, to, from, sent: 0, signals: 0 };
        match pipes.receive(Duration::from_secs(60)) {
            Ok(message) if message == Message::new(Kind::Ready, 0) => Ok(pipes),
            other => Err(io::Error::other(format!("the peer did not say it is ready, but {other:?}"))),
        }
    }

    fn receive(&mut self, limit: Duration) -> Result<Message, String> {
        let mut bytes = [0; Message::BYTES];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        let ready = poll(&mut [PollFd::new(self.from.as_fd(), PollFlags::POLLIN)], limit);
        match ready {
            Ok(0) => return Err("nothing".into()),
            Ok(_) => {}
            Err(error) => return Err(error.to_string()),
        }
        self.from.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        Ok(Message::from_bytes(&bytes))
    }

    fn expect(&mut self, what: &'static str, kind: Kind, seq: u64, limit: Duration) -> Result<(), Fault> {
        let received = self.receive(limit);
        compare(what, Message::new(kind, seq), received)
    }
}

fn compare(what: &'static str, expected: Message, received: Result<Message, String>) -> Result<(), Fault> {
    match received {
        Ok(message) if message == expected => Ok(()),
        Ok(message) => Err(Fault::new(what, format!("{expected:?}"), format!("{message:?}"))),
        Err(error) => Err(Fault::new(what, format!("{expected:?}"), error)),
    }
}

impl Check for Pipes {
    const NAME: &'static str = "pipes";
    const PERIOD: Duration = Duration::from_millis(600);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let first = self.sent + 1;
        for seq in first..first + BURST {
            let message = Message::new(Kind::Request, seq).to_bytes();
            self.to.write_all(&message).map_err(|e| Fault::new("writing to a pipe", "success", e))?;
            self.sent = seq;
        }
        let limit = report.late_limit();
        for seq in first..first + BURST {
            self.expect("echo through pipes", Kind::Echo, seq, limit)?;
            report.checked(Count::Echoes, 1);
        }
        let peer = Pid::from_raw(i32::try_from(self.peer.id()).expect("a process id"));
        kill(peer, Signal::SIGUSR1).map_err(|e| Fault::new("sending a signal", "success", e))?;
        self.signals += 1;
        self.expect("acknowledged signals", Kind::Signal, self.signals, limit)?;
        report.checked(Count::Signals, 1);
        Ok(())
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        // Nobody needs its answer: failing means that it has ended.
        let _ = self.peer.kill();
        let _ = self.peer.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_lost_doubled_or_changed_is_an_error() {
        let right = Message::new(Kind::Echo, 7);
        assert_eq!(compare("echo", right, Ok(right)), Ok(()));
        let doubled = Message::new(Kind::Echo, 6);
        let lost = Message::new(Kind::Echo, 8);
        let changed = Message { check: right.check ^ 1, ..right };
        for wrong in [doubled, lost, changed, Message::new(Kind::Signal, 7)] {
            let fault = compare("echo", right, Ok(wrong)).unwrap_err();
            assert_eq!(fault.found, format!("{wrong:?}"));
        }
        assert_eq!(compare("echo", right, Err("nothing".into())).unwrap_err().found, "nothing");
    }

    #[test]
    fn bytes_become_the_message_they_were() {
        let message = Message::new(Kind::Request, 0x1234_5678_9abc);
        assert_eq!(Message::from_bytes(&message.to_bytes()), message);
    }

    #[test]
    fn a_peer_that_says_nothing_is_noticed() {
        let error = Pipes::start_with(&mut Command::new("true")).err().expect("no peer");
        assert!(error.to_string().contains("ready"), "{error}");
    }
}
