//! The guest's console: where its serial output goes.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mig_vmm::Console;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::failure::Failure;
use crate::output::Output;

/// How long a reader that takes nothing is waited for before that is said, and how many times as long in all.
const PATIENCE: Duration = Duration::from_secs(1);
const PATIENCES: u32 = 60;

/// The program was told to end as it waited.
static HURRY: AtomicBool = AtomicBool::new(false);

/// Where a guest's serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleTo {
    /// Nowhere.
    None,
    /// To standard output, and from standard input.
    Stdio,
    /// To a file, which is created or appended to.
    File(PathBuf),
}

impl FromStr for ConsoleTo {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "none" => Self::None,
            "stdio" => Self::Stdio,
            file => Self::File(file.into()),
        })
    }
}

impl ConsoleTo {
    /// Opens its output.
    ///
    /// # Errors
    /// It cannot be written. A pipe (FIFO) that nobody reads is one such, rather than a wait for a reader.
    pub fn open(&self, side: &str) -> Result<Console, Failure> {
        match self {
            Self::None => Ok(Console::none()),
            Self::Stdio => Console::stdout().map_err(|e| {
                let cause = format!("standard output cannot be written: {e}");
                Failure::new(side, "start", cause, "open it, or give --console a file, or none")
            }),
            Self::File(path) => open(path).map(Console::to).map_err(|e| {
                let (why, remedy) = match e.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::ENXIO) => ("nobody reads it".to_owned(), "start its reader first"),
                    _ => (e.to_string(), "give --console a file that can be written, stdio or none"),
                };
                let cause = format!("cannot write the console to {}: {why}", path.display());
                Failure::new(side, "start", cause, remedy)
            }),
        }
    }
}

fn open(path: &Path) -> std::io::Result<File> {
    // Does not wait for the reader of a pipe, nor takes a terminal for this program's own.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    File::options().create(true).append(true).custom_flags(flags.bits()).open(path)
}

/// Waits until everything that the guest printed here is written; says so where that takes long, and what
/// was not written.
pub fn finish(console: &Console, output: &Output) {
    let Err(mut unwritten) = console.flush(PATIENCE) else { return };
    if unwritten.reason.is_none() {
        output.note(format!(
            "{} bytes that the guest printed wait for a reader of its console; Ctrl-C drops them",
            unwritten.bytes
        ));
    }
    let mut waited = 1;
    while waited < PATIENCES && !HURRY.load(Ordering::Relaxed) {
        match console.flush(PATIENCE) {
            Ok(()) => return,
            Err(now) if now.bytes < unwritten.bytes => (unwritten, waited) = (now, 0),
            // What was lost is lost.
            Err(now) if now == unwritten && now.reason.is_some() => break,
            Err(now) => (unwritten, waited) = (now, waited + 1),
        }
    }
    let why = unwritten.reason.unwrap_or_else(|| "nobody read them".to_owned());
    output.note(format!("{} bytes that the guest printed were not written: {why}", unwritten.bytes));
}

/// Has [`finish`] wait for no reader any more; answers whether it was told so before.
pub fn hurry() -> bool {
    HURRY.swap(true, Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;

    #[test]
    fn a_pipe_that_nobody_reads_is_refused_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let console = ConsoleTo::File(path.clone());
        let failure = console.open("source").unwrap_err();
        assert!(
            failure.cause.contains("nobody reads it") && failure.remedy.contains("reader"),
            "{failure:?}"
        );
        let _reader = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path).unwrap();
        console.open("source").unwrap();
    }
}
