//! Work that needs a process of its own: this program once more, told by its environment what to be.
//!
//! A program that uses it calls [`run_if_asked`] before anything else.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::model::{self, Content};
use crate::{warmth, yardstick};

const ROLE: &str = "MIG_BENCHES_CHILD";

/// What a child is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Role {
    /// Hold so many bytes for somebody.
    Warm(usize),
    /// Send bytes from memory.
    Send {
        /// How many.
        bytes: usize,
    },
    /// Receive bytes into memory.
    Receive(yardstick::Receive),
    /// Move a guest without KVM away.
    SendModel {
        /// How large it is.
        pages: u64,
        /// What is in it.
        content: Content,
    },
    /// Take it.
    TakeModel,
}

/// Does a child's work and ends, if this process is one.
pub fn run_if_asked() {
    let Some(text) = std::env::var_os(ROLE) else { return };
    let done =
        serde_json::from_str(&text.to_string_lossy()).context("no role of mine").and_then(
            |role| match role {
                Role::Warm(bytes) => warmth::hold(bytes),
                Role::Send { bytes } => yardstick::send(bytes),
                Role::Receive(receive) => yardstick::receive(&receive),
                Role::SendModel { pages, content } => model::send(pages, content),
                Role::TakeModel => model::take(),
            },
        );
    if let Err(error) = &done {
        eprintln!("{error:#}");
    }
    std::process::exit(i32::from(done.is_err()));
}

/// This program in another role, on the host that `place` puts a command on.
///
/// # Errors
/// This program's file cannot be found.
pub fn command(role: &Role, place: impl FnOnce(Command) -> Command) -> Result<Command> {
    let mut command = place(Command::new(std::env::current_exe()?));
    command.env(ROLE, serde_json::to_string(role)?);
    Ok(command)
}

/// A child that is talked to by lines of JSON; killed when this is dropped.
#[derive(Debug)]
pub struct Talking {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Talking {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(mut command: Command) -> Result<Self> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = child.with_context(|| format!("starting {}", command.get_program().display()))?;
        let input = child.stdin.take().context("its input is piped")?;
        let output = BufReader::new(child.stdout.take().context("its output is piped")?);
        Ok(Self { child, input, output })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Tells it something.
    ///
    /// # Errors
    /// It has ended.
    pub fn tell(&mut self, what: &impl Serialize) -> Result<()> {
        say(&mut self.input, what)
    }

    /// What it says next.
    ///
    /// # Errors
    /// It has ended.
    pub fn hear<T: DeserializeOwned>(&mut self) -> Result<T> {
        match hear(&mut self.output)? {
            Some(heard) => Ok(heard),
            None => bail!("a child ended: {}", self.child.wait()?),
        }
    }

    /// Waits for its end, which is to be a good one.
    ///
    /// # Errors
    /// It was not.
    pub fn wait(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.success(), "a child ended: {status}");
        Ok(())
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Writes a line.
///
/// # Errors
/// Nobody reads it.
pub fn say(to: &mut impl Write, what: &impl Serialize) -> Result<()> {
    let line = serde_json::to_string(what)? + "\n";
    to.write_all(line.as_bytes())?;
    Ok(to.flush()?)
}

/// Reads a line; `None` at the end.
///
/// # Errors
/// It is not what was expected.
pub fn hear<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Option<T>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    serde_json::from_str(&line).with_context(|| line.clone()).map(Some)
}
