//! `mig-send --demo`: one live migration, with a receiver of its own in another process.
//!
//! The receiver is the same executable, started again; it ends when its standard input does, so that it
//! never outlives the demo.

use std::fs::DirBuilder;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use mig::Address;
use mig_vmm::Console;

use crate::console::ConsoleTo;
use crate::control::{Answer, Client, Finished, Request};
use crate::event::Event;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::holder::{End, Holder, Interrupted};
use crate::options::{DirtyLog, RecvOptions, SendOptions};
use crate::output::Output;
use crate::recv;
use crate::send::{boot, started};
use crate::signals::{Signal, on_signal};

/// The demo's guest.
const GUEST: &str = "dirtier:rate=40MiB,working-set=128MiB,pattern=random";
/// How long the guest is watched on either side.
const WATCH: Duration = Duration::from_secs(1);
/// How often the receiver is asked what became of the guest, should the connection be lost.
const QUESTIONS: u32 = 4;
/// How many times it is looked at meanwhile on the destination.
const LOOKS: u32 = 3;

/// Shows a migration.
///
/// # Errors
/// Nothing could be shown.
pub fn run(options: &SendOptions, output: &Output) -> Result<Exit, Failure> {
    output.note("One running guest moves from this process to another, while it goes on writing memory.\n");
    let receiver = ReceiverProcess::start()?;
    let guest = GUEST.parse().map_err(|e| Failure::new("source", "demo", format!("{GUEST}: {e}"), ""))?;
    let options =
        SendOptions { guest: Some(guest), verify: true, memory: 1 << 30, cpus: 2, ..options.clone() };
    let machine = boot(&options, Console::none())?;
    output.tell(started(&machine, None));
    let holder = Holder::running(machine, output.clone(), "source", None);
    let interrupted = holder.clone();
    on_signal(move |signal| {
        // The receiver's end follows from this one's.
        let now =
            signal == Signal::Terminate || matches!(interrupted.interrupt(), Interrupted::ExitNow { .. });
        if now {
            std::process::exit(Exit::Failed as i32);
        }
    });
    let before = holder.status().heartbeats;
    if holder.wait_ended_for(WATCH).is_some() {
        output.note("the demo was ended, and its guest with it");
        return Ok(Exit::Failed);
    }
    let here = holder.status().heartbeats;
    output.note(format!(
        "here (process {}): {} heartbeats in {WATCH:?}\n",
        std::process::id(),
        here - before
    ));
    let (to, settings) = options.migrate(&receiver.address).settings()?;
    // A receiver that does not answer has gone: it is this program's own.
    let give_up = |event: &Event| {
        if matches!(event, Event::InDoubt(doubt) if doubt.asked >= QUESTIONS) {
            let _ = holder.quit();
        }
    };
    if let Err(not_moved) = holder.migrate(&to, &settings, &give_up) {
        if not_moved.report.is_none() {
            output.tell(Event::Error(not_moved.failure));
        }
        output.note("the demo ends, and its guest with it");
        return Ok(Exit::Failed);
    }
    debug_assert_eq!(holder.wait_ended_for(Duration::ZERO), Some(End::Moved));
    match receiver.show(output) {
        Ok(()) => {
            output.note("\nThe guest went on from where it was, and every page it wrote is as it left it.");
            Ok(Exit::Done)
        }
        Err(failure) => {
            output.tell(Event::Error(failure));
            Ok(Exit::Failed)
        }
    }
}

/// The receiver of a demo, in its own process.
struct ReceiverProcess {
    child: Child,
    address: Address,
    directory: PathBuf,
}

impl ReceiverProcess {
    fn start() -> Result<Self, Failure> {
        let failed = |what: &str, e: &dyn std::fmt::Display| {
            Failure::new("destination", "demo", format!("{what}: {e}"), "see the cause").local()
        };
        let directory = std::env::temp_dir().join(format!("mig-demo-{}", std::process::id()));
        DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .map_err(|e| failed(&format!("cannot make {}", directory.display()), &e))?;
        let spawned = std::env::current_exe().and_then(|program| {
            Command::new(program)
                .arg("--demo-receiver")
                .arg(directory.join("control"))
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
        });
        let child = match spawned {
            Ok(child) => child,
            Err(e) => {
                let _ = std::fs::remove_dir(&directory);
                return Err(failed("the receiver cannot be started", &e));
            }
        };
        let mut receiver = Self { child, address: Address::tcp("", 0), directory };
        receiver.address = receiver.listening()?;
        Ok(receiver)
    }

    /// Reads the receiver's events up to `listening`; the rest is read and forgotten.
    fn listening(&mut self) -> Result<Address, Failure> {
        let silent =
            || Failure::new("destination", "demo", "the receiver did not say where it listens", "see above");
        let mut lines = BufReader::new(self.child.stdout.take().ok_or_else(silent)?).lines();
        let address = loop {
            let line = lines.next().and_then(Result::ok).ok_or_else(silent)?;
            match serde_json::from_str(&line) {
                Ok(Event::Listening { addr }) => break addr.parse().map_err(|_| silent())?,
                Ok(Event::Error(failure)) => return Err(failure),
                _ => {}
            }
        };
        thread::spawn(move || lines.for_each(drop));
        Ok(address)
    }

    /// Shows that the guest goes on there, and has its memory checked.
    fn show(&self, output: &Output) -> Result<(), Failure> {
        let mut client = Client::connect(&self.directory.join("control"))?;
        output.note("");
        let mut before = self.heartbeats(&mut client)?;
        for _ in 0..LOOKS {
            let pause = WATCH / LOOKS;
            thread::sleep(pause);
            let now = self.heartbeats(&mut client)?;
            output.note(format!(
                "there (process {}): {} heartbeats in {} ms",
                self.child.id(),
                now.saturating_sub(before),
                pause.as_millis()
            ));
            if now <= before {
                return Err(Failure::new("destination", "demo", "the guest's heart stands still", ""));
            }
            before = now;
        }
        let answer = ask(&mut client, &Request::Check)?;
        let found: String = answer.member("found").unwrap_or_default();
        output.note(format!("its memory, checked from outside: {found}"));
        ask(&mut client, &Request::Quit).map(drop)
    }

    fn heartbeats(&self, client: &mut Client) -> Result<u64, Failure> {
        let answer = ask(client, &Request::Status)?;
        let state: String = answer.member("state").unwrap_or_default();
        match (state.as_str(), answer.member("heartbeats")) {
            ("running", Some(heartbeats)) => Ok(heartbeats),
            _ => Err(Failure::new("destination", "demo", format!("the receiver is {state}"), "")),
        }
    }
}

impl Drop for ReceiverProcess {
    fn drop(&mut self) {
        // The end of its standard input ends it.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
        let _ = std::fs::remove_file(self.directory.join("control"));
        let _ = std::fs::remove_dir(&self.directory);
    }
}

fn ask(client: &mut Client, request: &Request) -> Result<Answer, Failure> {
    match client.ask(request, |_| {}) {
        Finished::Answered(answer) if answer.is_ok() => Ok(answer),
        Finished::Answered(answer) => Err(answer
            .member("error")
            .unwrap_or_else(|| Failure::new("destination", "demo", "the receiver gave no reason", ""))),
        Finished::Lost(failure) => Err(failure),
    }
}

/// The demo's receiver.
///
/// # Errors
/// It could not listen.
pub fn receiver(control: &Path) -> Result<Exit, Failure> {
    let path = control.to_owned();
    thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        // Gone already, most likely.
        if let Ok(mut client) = Client::connect(&path) {
            client.ask(&Request::Quit, |_| {});
        }
    });
    let output = Output::json();
    let options = RecvOptions {
        listen: Address::tcp("127.0.0.1", 0),
        control: Some(control.to_owned()),
        console: Some(ConsoleTo::None),
        max_memory: None,
        dirty_log: DirtyLog::Bitmap,
        lease: None,
        json: true,
    };
    let exit = recv::run_with(&options, &ConsoleTo::None, &output).unwrap_or_else(|failure| {
        output.tell(Event::Error(failure));
        Exit::Usage
    });
    output.flush();
    // The demo does so too, unless it was ended at once.
    if let Some(directory) = control.parent() {
        let _ = std::fs::remove_dir(directory);
    }
    Ok(exit)
}
