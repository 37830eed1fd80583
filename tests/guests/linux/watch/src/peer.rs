//! The other process: sends back what comes through its pipe, and acknowledges signals.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::process::ExitCode;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::pipes::{Kind, Message};

/// Until its standard input ends.
pub(crate) fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("watch: the peer failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    let mut usr1 = SigSet::empty();
    usr1.add(Signal::SIGUSR1);
    usr1.thread_block()?;
    let signals = SignalFd::with_flags(&usr1, SfdFlags::SFD_NONBLOCK)?;
    // Unbuffered: standard input's own buffer would hide messages from the poll.
    let mut input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut output = io::stdout().lock();
    let mut send = |message: Message| {
        output.write_all(&message.to_bytes())?;
        output.flush()
    };
    send(Message::new(Kind::Ready, 0))?;
    let mut received = 0;
    loop {
        let mut waiting =
            [PollFd::new(input.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => continue,
            other => other?,
        };
        let [message, signal] = waiting.map(|fd| fd.any().unwrap_or(false));
        if signal && signals.read_signal()?.is_some() {
            received += 1;
            send(Message::new(Kind::Signal, received))?;
        }
        if message {
            let mut bytes = [0; Message::BYTES];
            match input.read_exact(&mut bytes) {
                Ok(()) => send(Message { kind: Kind::Echo as u64, ..Message::from_bytes(&bytes) })?,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}
