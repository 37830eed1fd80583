//! A guest at its serial console, wherever it runs: a chain of programs, each with the console on its standard
//! input and output, that hand it on to one another.

#![allow(dead_code, unreachable_pub)] // a part of several test programs

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{ask, mig_recv, mig_send, try_ask};

/// Far more than anything here takes: a test that waits so long hangs.
const PATIENCE: Duration = Duration::from_secs(240);

/// A program with a guest's console.
struct Terminal {
    child: Child,
    stdin: Option<ChildStdin>,
    printed: Arc<Text>,
    said: Arc<Text>,
    control: PathBuf,
}

/// What a program has written so far.
#[derive(Default)]
struct Text {
    bytes: Mutex<(Vec<u8>, bool)>,
    more: Condvar,
}

impl Text {
    fn gather(mut stream: impl Read + Send + 'static) -> Arc<Self> {
        let text = Arc::new(Self::default());
        let writer = text.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let read = stream.read(&mut buffer).unwrap_or(0);
                let mut bytes = writer.bytes.lock().unwrap();
                bytes.0.extend_from_slice(&buffer[..read]);
                bytes.1 = read == 0;
                writer.more.notify_all();
                if read == 0 {
                    return;
                }
            }
        });
        text
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().0.clone()
    }

    /// Waits until it has ended, and gives all of it.
    fn whole(&self) -> Vec<u8> {
        let bytes = self.bytes.lock().unwrap();
        let (bytes, late) = self.more.wait_timeout_while(bytes, PATIENCE, |b| !b.1).unwrap();
        assert!(!late.timed_out(), "the program does not end its output");
        bytes.0.clone()
    }
}

impl Terminal {
    fn start(mut command: Command, control: PathBuf) -> Self {
        command.args(["--console", "stdio", "--control"]).arg(format!("unix:{}", control.display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let stdin = child.stdin.take();
        let printed = Text::gather(child.stdout.take().expect("piped"));
        let said = Text::gather(child.stderr.take().expect("piped"));
        Self { child, stdin, printed, said, control }
    }

    fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.so_far()).into_owned()
    }

    /// The address that a receiver says it listens on.
    fn address(&self) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.said();
            let word = said.split_whitespace().find(|w| w.starts_with("tcp:127.0.0.1:"));
            if let Some(word) = word.filter(|_| said.ends_with('\n')) {
                return word.trim_end_matches(|c: char| !c.is_ascii_digit()).to_owned();
            }
            assert!(Instant::now() < deadline, "it does not listen: {said}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until it can be asked for something, or has ended.
    fn wait_for_control(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&self.control).is_err() {
            if self.child.try_wait().expect("a child can be waited for").is_some() {
                return;
            }
            assert!(Instant::now() < deadline, "it is not to be asked: {}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "the program does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // it may have ended already
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest with its console.
pub struct Guest {
    directory: tempfile::TempDir,
    programs: usize,
    now: Terminal,
    /// What was printed where it was before.
    before: Vec<u8>,
}

impl Guest {
    /// Boots a guest with these options of mig-send's.
    pub fn boot(options: &[&str]) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let mut command = mig_send();
        command.args(options);
        let mut now = Terminal::start(command, directory.path().join("0.sock"));
        now.wait_for_control();
        Self { directory, programs: 1, now, before: Vec::new() }
    }

    /// Everything the guest has printed, over all consoles, as text with plain line ends.
    pub fn text(&self) -> String {
        let bytes = [self.before.as_slice(), &self.now.printed.so_far()].concat();
        String::from_utf8_lossy(&bytes).replace("\r\n", "\n")
    }

    /// Waits until `found` finds what it looks for in everything printed.
    pub fn wait<T>(&mut self, what: &str, found: impl Fn(&str) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.text();
            if let Some(found) = found(&text) {
                return found;
            }
            let tail: String = text
                .lines()
                .rev()
                .take(30)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .fold(String::new(), |all, line| all + line + "\n");
            assert!(Instant::now() < deadline, "no {what}:\n{tail}\n{}", self.now.said());
            if let Some(status) = self.now.child.try_wait().expect("a child can be waited for") {
                let text = self.text();
                return found(&text)
                    .unwrap_or_else(|| panic!("{status}, and no {what}:\n{tail}\n{}", self.now.said()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until this was printed.
    pub fn wait_for(&mut self, words: &str) {
        self.wait(words, |text| text.contains(words).then_some(()));
    }

    /// Types at the console.
    pub fn type_in(&mut self, keys: &str) {
        let stdin = self.now.stdin.as_mut().expect("a console that is typed at");
        stdin.write_all(keys.as_bytes()).and_then(|()| stdin.flush()).expect("the program reads its console");
    }

    /// Asks the program that the guest runs in for `command`, which is to succeed.
    pub fn command(&self, command: &str) {
        let answer = ask(&self.now.control, &serde_json::json!({"cmd": command}));
        assert_eq!(answer["ok"], true, "{command}: {answer}");
    }

    /// Moves the guest to a new program; gives the report.
    pub fn hop(&mut self) -> Value {
        let report = self.try_hop();
        assert_eq!(report["outcome"], "moved", "{report}\n{}", self.now.said());
        report
    }

    /// The same, whatever comes of it: the guest is looked at where the report says it is. Nothing is
    /// reported when it had ended before.
    pub fn try_hop(&mut self) -> Value {
        let control = self.directory.path().join(format!("{}.sock", self.programs));
        self.programs += 1;
        let mut command = mig_recv();
        command.args(["--listen", "tcp:127.0.0.1:0"]);
        let next = Terminal::start(command, control);
        let address = next.address();
        let request = serde_json::json!({"cmd": "migrate", "to": address});
        let Some(answer) = try_ask(&self.now.control, &request) else { return Value::Null };
        let report = answer["report"].clone();
        if report["outcome"] == "moved" {
            let mut last = std::mem::replace(&mut self.now, next);
            let status = last.wait();
            assert!(status.success(), "who sent the guest on ends well: {status}\n{}", last.said());
            self.before.extend(last.printed.whole());
        } else {
            // the receiver hears why, and goes on listening
            let state = ask(&next.control, &serde_json::json!({"cmd": "status"}));
            assert_eq!(state["state"], "receiving", "{state} {answer}");
        }
        if report.is_null() { answer } else { report }
    }

    /// Waits for the end of the program that the guest runs in; what it said goes with its status.
    pub fn end(mut self) -> (ExitStatus, String, String) {
        let status = self.now.wait();
        let printed = [self.before.as_slice(), &self.now.printed.whole()].concat();
        let said = String::from_utf8_lossy(&self.now.said.whole()).into_owned();
        (status, said, String::from_utf8_lossy(&printed).replace("\r\n", "\n"))
    }

    /// Ends the guest; gives everything it printed.
    pub fn quit(self) -> String {
        self.command("quit");
        self.end().2
    }
}
