//! mig-send and mig-recv: where they are, and each as a process that is listened to.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::events::{self, Event};

/// The two programs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// mig-send.
    pub send: PathBuf,
    /// mig-recv.
    pub recv: PathBuf,
}

impl Programs {
    /// Those in `directory`, or else those that cargo builds beside this program, in the same profile; under
    /// `cargo run` and `cargo bench` it builds them now.
    ///
    /// # Errors
    /// They are not there, or cannot be built.
    pub fn find(directory: Option<&Path>) -> Result<Self> {
        let found = match directory {
            Some(directory) => Self::within(directory),
            None => {
                let own = own_directory()?;
                if let Some(cargo) = std::env::var_os("CARGO") {
                    build(Command::new(cargo), &own)?;
                }
                Self::within(&own)
            }
        };
        for program in [&found.send, &found.recv] {
            ensure!(
                program.is_file(),
                "{} is not there: build it with `cargo build --release -p mig-cli`, or say where it is with --programs",
                program.display()
            );
        }
        Ok(found)
    }

    fn within(directory: &Path) -> Self {
        Self { send: directory.join("mig-send"), recv: directory.join("mig-recv") }
    }
}

/// Where cargo puts the programs of this one's profile.
fn own_directory() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let parent = exe.parent().context("this program has no directory")?;
    // benches are built a directory deeper
    Ok(if parent.ends_with("deps") { parent.parent().unwrap_or(parent) } else { parent }.to_owned())
}

fn build(mut cargo: Command, beside: &Path) -> Result<()> {
    cargo.args(["build", "--quiet", "-p", "mig-cli", "--bins"]);
    if beside.ends_with("release") {
        cargo.arg("--release");
    }
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let status =
        cargo.current_dir(manifest.parent().unwrap_or(manifest)).status().context("starting cargo")?;
    ensure!(status.success(), "mig-send and mig-recv cannot be built");
    Ok(())
}

/// A running program that prints a JSON event a line; killed when this is dropped.
#[derive(Debug)]
pub struct Program {
    child: Child,
    name: String,
    events: Receiver<Event>,
    stderr: Option<std::thread::JoinHandle<String>>,
}

impl Program {
    /// Starts it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(mut command: Command) -> Result<Self> {
        let name =
            Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let (teller, events) = channel();
        let stdout = BufReader::new(child.stdout.take().context("its output is piped")?);
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // what is no event is none that is waited for
                if teller.send(events::parse(&line).unwrap_or(Event::Other)).is_err() {
                    return;
                }
            }
        });
        let mut stderr = child.stderr.take().context("its output is piped")?;
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            // what came before an unreadable byte is good enough for a message
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Ok(Self { child, name, events, stderr: Some(stderr) })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The first event of which `pick` makes something; a failure that comes before is an error.
    ///
    /// # Errors
    /// It failed, ended, or took too long.
    pub fn wait_for<T>(&mut self, patience: Duration, mut pick: impl FnMut(Event) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + patience;
        loop {
            match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Event::Error(failure) | Event::NotReceived(failure)) => bail!("{}: {failure}", self.name),
                Ok(event) => {
                    if let Some(picked) = pick(event) {
                        return Ok(picked);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("{}: nothing came in {patience:?}", self.name),
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait()?;
                    let said = self.stderr.take().map(|t| t.join().unwrap_or_default()).unwrap_or_default();
                    bail!("{} ended, {status}: {}", self.name, said.trim());
                }
            }
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It took too long.
    pub fn wait_for_end(&mut self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        while self.child.try_wait()?.is_none() {
            ensure!(Instant::now() < deadline, "{} does not end", self.name);
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // it may have ended by itself
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Program::start(command).unwrap()
    }

    #[test]
    fn the_event_that_is_waited_for_is_found_behind_others() {
        let mut program = shell(
            r#"echo '{"event":"paused"}'; echo noise; echo '{"event":"listening","addr":"tcp:h:1"}'; sleep 9"#,
        );
        let found = program.wait_for(SOON, |event| match event {
            Event::Listening { addr } => Some(addr),
            _ => None,
        });
        assert_eq!(found.unwrap(), "tcp:h:1");
    }

    #[test]
    fn a_program_that_fails_or_ends_says_so() {
        let failing = r#"echo '{"event":"error","side":"source","step":"options","cause":"no"}'"#;
        let error = shell(failing).wait_for(SOON, |_| None::<()>).unwrap_err().to_string();
        assert_eq!(error, "sh: source, options: no");
        let error = shell("echo wrong >&2; exit 3").wait_for(SOON, |_| None::<()>).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("wrong"), "{error}");
    }

    #[test]
    fn programs_that_are_not_built_are_named_with_the_remedy() {
        let error = Programs::find(Some(Path::new("/nowhere"))).unwrap_err().to_string();
        assert!(error.starts_with("/nowhere/mig-send is not there: build it with `cargo build"), "{error}");
    }
}
