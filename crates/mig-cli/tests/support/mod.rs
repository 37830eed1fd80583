//! The real programs as processes: started, listened to, asked over their control sockets, and killed when the
//! test ends, however it ends.

#![allow(dead_code, unreachable_pub)] // a part of several test programs

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use serde_json::Value;

pub mod bench;
pub mod terminal;

/// Far more than anything here takes: a test that waits so long hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Whether KVM tests can run here; says so loudly when not, and fails where they must.
pub fn kvm_is_there() -> bool {
    let usable = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(error) = &usable {
        assert!(std::env::var_os("MIG_REQUIRE_KVM").is_none(), "/dev/kvm: {error}");
        eprintln!("SKIPPED: no /dev/kvm ({error})");
    }
    usable.is_ok()
}

/// How many hops the tests take: a few, unless `MIG_HOPS` asks for more.
pub fn hops(few: usize) -> usize {
    std::env::var("MIG_HOPS").ok().map_or(few, |n| n.parse().expect("MIG_HOPS is a number"))
}

pub fn mig_send() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mig-send"))
}

pub fn mig_recv() -> Command {
    Command::new(env!("CARGO_BIN_EXE_mig-recv"))
}

/// A running program that prints a JSON event a line.
pub struct Program {
    child: Child,
    events: Receiver<Value>,
    stderr: Option<std::thread::JoinHandle<String>>,
    /// Its control socket, where it has one.
    pub control: PathBuf,
}

impl Program {
    /// Starts `command` with `--json` and a control socket at `control`.
    pub fn start(mut command: Command, control: &Path) -> Self {
        command.arg("--json").arg("--control").arg(format!("unix:{}", control.display()));
        Self::start_as_it_is(command, control)
    }

    /// Starts `command` without adding anything.
    pub fn start_as_it_is(mut command: Command, control: &Path) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let (line_sender, events) = channel();
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if line_sender.send(event).is_err() {
                    return;
                }
            }
        });
        let mut stderr = child.stderr.take().expect("piped");
        let stderr = std::thread::spawn(move || {
            let mut text = String::new();
            // whatever came before an unreadable byte is good enough for a message
            let _ = stderr.read_to_string(&mut text);
            text
        });
        Self { child, events, stderr: Some(stderr), control: control.into() }
    }

    /// A receiver and the address it listens on.
    pub fn receiver(control: &Path) -> (Self, String) {
        let mut command = mig_recv();
        command.args(["--listen", "tcp:127.0.0.1:0", "--console", "none"]);
        let receiver = Self::start(command, control);
        let listening = receiver.event("listening");
        (receiver, listening["addr"].as_str().expect("an address").to_owned())
    }

    /// The next event of that name; others before it are passed over.
    pub fn event(&self, name: &str) -> Value {
        self.event_among(&[name])
    }

    /// The next event of one of these names; others before it are passed over.
    pub fn event_among(&self, names: &[&str]) -> Value {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) if names.iter().any(|name| event["event"] == *name) => return event,
                Ok(event) => seen.push(event.to_string()),
                Err(error) => panic!("no event of {names:?} ({error}); seen: {seen:#?}"),
            }
        }
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next event, if one has come.
    pub fn try_event(&self) -> Option<Value> {
        self.events.try_recv().ok()
    }

    /// Waits for its end; gives the exit status and what it wrote to stderr.
    pub fn end(mut self) -> (ExitStatus, String) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                let stderr = self.stderr.take().map(|t| t.join().expect("the reading thread ends"));
                return (status, stderr.unwrap_or_default());
            }
            assert!(Instant::now() < deadline, "the program does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How long its threads have run, its guest's vCPUs among them.
    pub fn cpu_time(&self) -> Duration {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a process id"));
        clock_getcpuclockid(pid).and_then(|clock| clock.now()).expect("it runs").into()
    }

    /// Sends it a signal, by name.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill starts").success());
    }

    /// Stops it by SIGSTOP; every thread of it has stopped when this returns.
    pub fn stop(&self) {
        self.signal("STOP");
        let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = std::fs::read_to_string(task.expect("a thread").path().join("stat"));
            // a thread that ends is none (proc(5): the state follows the name, which is in parentheses)
            stat.is_ok_and(|s| s.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
        };
        let tasks = || std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("it runs");
        let deadline = Instant::now() + PATIENCE;
        while !tasks().all(is_stopped) {
            assert!(Instant::now() < deadline, "it does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// One request over the control socket, and its answer.
    pub fn ask(&self, request: &Value) -> Value {
        ask(&self.control, request)
    }

    pub fn status(&self) -> Value {
        self.ask(&serde_json::json!({"cmd": "status"}))
    }

    pub fn heartbeats(&self) -> u64 {
        self.status()["heartbeats"].as_u64().expect("a number of heartbeats")
    }

    /// How many pages a dirtier has written, by its own count.
    pub fn dirtied_pages(&self) -> u64 {
        let answer = self.ask(&serde_json::json!({"cmd": "check"}));
        let found = answer["found"].as_str().unwrap_or_else(|| panic!("{answer}"));
        let mut words = found.split_whitespace().skip_while(|word| *word != "after");
        words.nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{found}"))
    }

    /// The VGA text page.
    pub fn screen(&self) -> Vec<String> {
        let answer = self.ask(&serde_json::json!({"cmd": "screen"}));
        let lines = answer["screen"].as_array().unwrap_or_else(|| panic!("a screen: {answer}"));
        lines.iter().map(|l| l.as_str().expect("text").to_owned()).collect()
    }

    /// Asserts that the guest runs here, by its heartbeats.
    pub fn assert_guest_goes_on(&self) {
        let before = self.heartbeats();
        let deadline = Instant::now() + PATIENCE;
        while self.heartbeats() < before + 20 {
            assert!(Instant::now() < deadline, "the guest does not go on: {}", self.status());
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(self.status()["state"], "running");
    }

    pub fn quit(self) {
        self.ask(&serde_json::json!({"cmd": "quit"}));
        self.end();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A bzImage whose 32-bit entry is `code`, at 1 MiB.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1; // a sector of setup code
    image[0x201] = 0x6a;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020cu16.to_le_bytes());
    image[0x211] = 1; // loaded high
    image[0x22c..0x230].copy_from_slice(&0x3fff_ffffu32.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    image.extend_from_slice(code);
    image
}

/// One request over a control socket, and its answer.
pub fn ask(control: &Path, request: &Value) -> Value {
    try_ask(control, request).unwrap_or_else(|| panic!("nobody answers at {}", control.display()))
}

/// The same; none when nobody is there any more, or goes away without an answer.
pub fn try_ask(control: &Path, request: &Value) -> Option<Value> {
    let mut socket = UnixStream::connect(control).ok()?;
    socket.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    writeln!(socket, "{request}").ok()?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).ok().filter(|bytes| *bytes > 0)?;
    Some(serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}")))
}

/// Tells the VM behind `from` to move to `to`; gives the report.
pub fn hop(from: &Program, to: &str, options: &[&str]) -> Value {
    let mut command = mig_send();
    let vm = format!("unix:{}", from.control.display());
    command.args(["--vm", &vm, "--to", to, "--json"]).args(options);
    let sender = Program::start_as_it_is(command, &from.control);
    let report = sender.event("report");
    let (status, stderr) = sender.end();
    assert!(status.success(), "{status}: {report}\n{stderr}");
    assert_eq!(report["outcome"], "moved", "{report}");
    report
}
