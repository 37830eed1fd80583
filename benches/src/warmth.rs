//! Memory that the host has at hand for somebody else.
//!
//! A host that is itself a guest may take memory back that has been free for a moment (free page reporting: two
//! seconds, in the kernel's mm/page_reporting.c), and to have it again takes up to seconds a GiB, which would be
//! all that is measured. So a child faults in what is going to be needed, and lets it go a little ahead of the one
//! who needs it.

use std::io::BufReader;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::child::{self, Role, Talking};
use crate::memory::Memory;
use crate::process::Process;

/// What is free for whoever is followed: enough for a few hundredths of a second.
const AHEAD_BYTES: usize = 512 << 20;
const INTERVAL: Duration = Duration::from_millis(5);
/// What is let go at a time, at least.
const PIECE_BYTES: usize = 32 << 20;

/// Warm memory; what was not let go is let go when this is dropped.
#[derive(Debug)]
pub struct Warmth {
    child: Talking,
}

impl Warmth {
    /// Faults in so many bytes, and holds them.
    ///
    /// # Errors
    /// There is not so much.
    pub fn gather(bytes: usize) -> Result<Self> {
        let mut child = Talking::start(child::command(&Role::Warm(bytes), |command| command)?)?;
        child.hear::<()>().context("memory cannot be warmed")?;
        Ok(Self { child })
    }

    /// Lets go from now on what this process takes, ahead of it.
    ///
    /// # Errors
    /// The child has ended.
    pub fn follow(&mut self, pid: u32) -> Result<()> {
        self.child.tell(&pid)?;
        self.child.hear()
    }
}

/// The child.
pub(crate) fn hold(bytes: usize) -> Result<()> {
    let mut memory = Memory::new(bytes)?;
    memory.populate()?;
    let (mut input, mut output) = (BufReader::new(std::io::stdin()), std::io::stdout());
    child::say(&mut output, &())?;
    let Some(pid) = child::hear(&mut input)? else { return Ok(()) };
    let process = Process::new(pid);
    let before = process.resident_bytes()?;
    let mut released = 0;
    let mut has_said = false;
    while released < bytes {
        // one that has ended needs no more
        let Ok(now) = process.resident_bytes() else { return Ok(()) };
        let taken = usize::try_from(now.saturating_sub(before))?;
        let target = (taken + AHEAD_BYTES).next_multiple_of(PIECE_BYTES).min(bytes);
        if target > released {
            memory.release(released..target);
            released = target;
        }
        if !std::mem::replace(&mut has_said, true) {
            child::say(&mut output, &())?;
        }
        std::thread::sleep(INTERVAL);
    }
    Ok(())
}
