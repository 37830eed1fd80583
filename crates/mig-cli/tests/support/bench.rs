//! Holders and receivers as many as a test wants, and migrations that go on beside it.

#![allow(dead_code, unreachable_pub)] // a part of several test programs

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use serde_json::{Value, json};

use super::{Program, ask, mig_send};

/// Room for the control sockets of programs.
pub struct Bench {
    directory: tempfile::TempDir,
    programs: AtomicUsize,
}

impl Bench {
    pub fn new() -> Self {
        Self { directory: tempfile::tempdir().expect("a directory"), programs: AtomicUsize::new(0) }
    }

    fn socket(&self) -> PathBuf {
        let number = self.programs.fetch_add(1, Ordering::Relaxed);
        self.directory.path().join(format!("{number}.sock"))
    }

    /// A receiver and its address.
    pub fn receiver(&self) -> (Program, String) {
        Program::receiver(&self.socket())
    }

    /// The holder of a guest that runs, and is told to move later.
    pub fn holder(&self, guest: &str, memory: &str) -> Program {
        let mut command = mig_send();
        command.args(["--guest", guest, "--memory", memory, "--console", "none"]);
        let holder = Program::start(command, &self.socket());
        holder.event("started");
        holder
    }
}

/// A migration that goes on beside the test; its answer comes with the time at which it came.
pub struct Migrating(JoinHandle<(Value, Instant)>);

impl Migrating {
    pub fn begin(holder: &Program, to: &str) -> Self {
        Self::begin_with(holder, to, json!({}))
    }

    /// With further members of the request.
    pub fn begin_with(holder: &Program, to: &str, mut request: Value) -> Self {
        (request["cmd"], request["to"]) = ("migrate".into(), to.into());
        let control = holder.control.clone();
        Self(std::thread::spawn(move || (ask(&control, &request), Instant::now())))
    }

    pub fn has_ended(&self) -> bool {
        self.0.is_finished()
    }

    pub fn end(self) -> (Value, Instant) {
        self.0.join().expect("it is answered")
    }
}
