//! What is typed and printed on the programs' standard streams: once, in order, across moves; and what becomes
//! of the terminal.

#![allow(missing_docs)]

mod support;

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use serde_json::json;
use support::{ask, bzimage, kvm_is_there, mig_recv, mig_send};

/// Far more than anything here takes: a test that waits so long hangs.
const PATIENCE: Duration = Duration::from_secs(180);

/// Sends back every byte: `l: in al, 0x3fd; test al, 1; jz l; in al, 0x3f8; out 0x3f8, al; jmp l`.
const ECHO: &[u8] =
    &[0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb2, 0xf8, 0xec, 0xee, 0xb2, 0xfd, 0xeb, 0xf3];
/// Sends 0, 1, 2 ... 255, 0, 1 ... : `mov edx, 0x3f8; xor eax, eax; l: out dx, al; inc eax; jmp l`.
const COUNTER: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0x31, 0xc0, 0xee, 0x40, 0xeb, 0xfc];
/// Ends once something is typed: code 0 for a `0`: as above, and `sub al, '0'; out 0xf4, al`.
const END: &[u8] = &[
    0xba, 0xfd, 0x03, 0, 0, 0xec, 0xa8, 1, 0x74, 0xfb, 0xb2, 0xf8, 0xec, 0x2c, b'0', 0xe6, 0xf4, 0xeb, 0xfe,
];

/// A kernel whose 32-bit entry is `code`.
fn kernel(directory: &Path, code: &[u8]) -> PathBuf {
    let path = directory.join("kernel");
    std::fs::write(&path, bzimage(code)).expect("a file");
    path
}

fn sender(directory: &Path, code: &[u8]) -> Command {
    let mut command = mig_send();
    command.arg("--kernel").arg(kernel(directory, code)).args(["--memory", "4MiB", "--cpus", "1"]);
    command
}

fn receiver() -> Command {
    let mut command = mig_recv();
    command.args(["--listen", "tcp:127.0.0.1:0"]);
    command
}

/// A program whose standard streams are a guest's console.
struct Holder {
    child: Child,
    control: PathBuf,
    /// What it says itself, line by line.
    said: Arc<Mutex<Vec<String>>>,
}

impl Holder {
    fn start(mut command: Command, control: PathBuf, stdin: Stdio, stdout: Stdio) -> Self {
        command.args(["--console", "stdio", "--control", &format!("unix:{}", control.display())]);
        command.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let said = Arc::<Mutex<Vec<String>>>::default();
        let (lines, stderr) = (said.clone(), BufReader::new(child.stderr.take().expect("piped")));
        thread::spawn(move || {
            stderr.lines().map_while(Result::ok).for_each(|l| lines.lock().unwrap().push(l))
        });
        Self { child, control, said }
    }

    fn said(&self) -> String {
        self.said.lock().unwrap().join("\n")
    }

    /// Waits until it says something with `words`, and gives what follows them on the line.
    fn says(&self, words: &str) -> String {
        let find = || Some(self.said().split_once(words)?.1.lines().next().unwrap_or_default().to_owned());
        wait(&format!("'{words}'"), || find().is_some(), || self.said());
        find().expect("found just now")
    }

    fn state(&self) -> String {
        ask(&self.control, &json!({"cmd": "status"}))["state"].as_str().expect("a state").to_owned()
    }

    fn hop(&self, to: &str) {
        let mut command = mig_send();
        command.args(["--vm", &format!("unix:{}", self.control.display()), "--to", to, "--json"]);
        let output = command.stdin(Stdio::null()).output().expect("the program runs");
        assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stdout), self.said());
    }

    fn terminate(&self) {
        self.signal("TERM");
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args(["-s", name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill starts").success());
    }

    fn quit(&mut self) -> ExitStatus {
        ask(&self.control, &json!({"cmd": "quit"}));
        self.end()
    }

    fn end(&mut self) -> ExitStatus {
        let mut status = None;
        let child = &mut self.child;
        let said = &self.said;
        wait(
            "end",
            || {
                status = child.try_wait().expect("a child can be waited for");
                status.is_some()
            },
            || said.lock().unwrap().join("\n"),
        );
        status.expect("ended")
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool, state: impl FnOnce() -> String) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "no {what} after {PATIENCE:?}:\n{}", state());
        thread::sleep(Duration::from_millis(5));
    }
}

/// What comes out of a program, as it comes.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Text {
    fn read(from: impl Read + Send + 'static) -> (Self, thread::JoinHandle<()>) {
        let text = Self::default();
        let (gathered, mut from) = (text.clone(), from);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            // A terminal that is hung up gives an error at its end.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                gathered.0.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        (text, reader)
    }

    fn len(&self) -> usize {
        self.0.lock().unwrap().len()
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }

    fn wait_for(&self, words: &str) {
        let text = || String::from_utf8_lossy(&self.bytes()).into_owned();
        wait(&format!("'{}'", words.escape_debug()), || text().contains(words), text);
    }
}

/// The first place where two texts differ, rather than both.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8]) {
    let at = found.iter().zip(expected).position(|(f, e)| f != e).unwrap_or(found.len().min(expected.len()));
    assert!(
        found == expected,
        "{} bytes instead of {}; from {at} on {:?} instead of {:?}",
        found.len(),
        expected.len(),
        &found[at..found.len().min(at + 8)],
        &expected[at..expected.len().min(at + 8)]
    );
}

#[test]
fn what_is_typed_into_a_pipe_that_all_holders_read_comes_back_once_in_order() {
    if !kvm_is_there() {
        return;
    }
    const HOLDERS: usize = 4;
    let directory = tempfile::tempdir().expect("a directory");
    let typed: Vec<u8> = (0..40_000).map(|n| (n % 251) as u8).collect();
    let (stdin, mut typist) = io::pipe().expect("a pipe");
    let mut holders = Vec::new();
    let mut texts = Vec::new();
    for n in 0..HOLDERS {
        let command = if n == 0 { sender(directory.path(), ECHO) } else { receiver() };
        let stdin = stdin.try_clone().expect("a pipe").into();
        let control = directory.path().join(format!("{n}.sock"));
        let mut holder = Holder::start(command, control, stdin, Stdio::piped());
        texts.push(Text::read(holder.child.stdout.take().expect("piped")));
        holders.push(holder);
    }
    drop(stdin);
    let typing = thread::spawn({
        let typed = typed.clone();
        move || {
            typist.write_all(&typed).expect("somebody reads");
            typist
        }
    });
    let printed = || texts.iter().map(|(text, _)| text.len()).sum::<usize>();
    for n in 1..HOLDERS {
        let share = typed.len() * n / HOLDERS;
        wait("echo", || printed() >= share, || holders[n - 1].said());
        assert!(texts[n - 1].0.len() > 0, "some was typed here");
        holders[n - 1].hop(&holders[n].says("listening on "));
        assert!(holders[n - 1].end().success());
    }
    wait("echo", || printed() >= typed.len(), || holders[HOLDERS - 1].said());
    assert_eq!(holders[HOLDERS - 1].state(), "running", "the end of a pipe is not the guest's end");
    drop(typing.join().expect("all was typed"));
    assert!(holders[HOLDERS - 1].quit().success());
    let printed: Vec<u8> = texts
        .into_iter()
        .flat_map(|(text, reader)| {
            reader.join().expect("read to the end");
            text.bytes()
        })
        .collect();
    assert_same(&printed, &typed);
}

/// Two holders of a guest that prints all the time; what it printed on both. `read_late`: the first console is
/// read when the guest has moved only.
fn print_across_a_move(read_late: bool) {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = |name: &str| directory.path().join(name);
    let mut there = Holder::start(receiver(), socket("there"), Stdio::null(), Stdio::piped());
    let (text_there, reader_there) = Text::read(there.child.stdout.take().expect("piped"));
    let to = there.says("listening on ");
    let (mut here, text_here, reader_here);
    let command = sender(directory.path(), COUNTER);
    if read_late {
        here = Holder::start(command, socket("here"), Stdio::null(), Stdio::piped());
        here.says("runs here");
        wait_until_vcpu_sleeps(here.child.id());
        here.hop(&to);
        here.says("wait for a reader");
        assert_eq!(here.child.try_wait().expect("a child"), None, "it waits for its reader");
        (text_here, reader_here) = Text::read(here.child.stdout.take().expect("piped"));
    } else {
        here = Holder::start(command, socket("here"), Stdio::null(), Stdio::piped());
        (text_here, reader_here) = Text::read(here.child.stdout.take().expect("piped"));
        wait("output", || text_here.len() > 5000, || here.said());
        here.hop(&to);
    }
    assert!(here.end().success());
    reader_here.join().expect("read to the end");
    wait("output there", || text_there.len() > 5000, || there.said());
    assert!(there.quit().success());
    reader_there.join().expect("read to the end");
    let mut printed = text_here.bytes();
    printed.extend(text_there.bytes());
    let expected: Vec<u8> = (0..printed.len()).map(|n| n as u8).collect();
    assert_same(&printed, &expected);
}

/// Waits until a program's vCPU has run and uses no processor time any more: until its console is full.
fn wait_until_vcpu_sleeps(process: u32) {
    let ticks = || -> Option<u64> {
        let tasks = std::fs::read_dir(format!("/proc/{process}/task")).ok()?;
        let vcpu = tasks.flatten().find(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == "vcpu-0")
        })?;
        let stat = std::fs::read_to_string(vcpu.path().join("stat")).ok()?;
        // utime and stime: proc_pid_stat(5), fields 14 and 15; the second field is a name.
        let fields: Vec<&str> = stat.rsplit(')').next()?.split_whitespace().collect();
        Some(fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?)
    };
    let (mut before, mut quiet) = (0, 0);
    let start = Instant::now();
    loop {
        let now = ticks().expect("a vCPU");
        // It looks about a thousand times a second, which is not quite nothing.
        quiet = if now > 5 && now - before <= 5 { quiet + 1 } else { 0 };
        // Once may be a host that is busy with others.
        if quiet == 3 {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "the vCPU never sleeps");
        before = now;
        thread::sleep(Duration::from_millis(500));
    }
}

#[test]
fn what_is_printed_at_full_speed_across_a_move_is_on_one_console_or_the_other() {
    if kvm_is_there() {
        print_across_a_move(false);
    }
}

#[test]
fn a_console_that_nobody_reads_holds_up_no_move_and_is_whole_once_it_is_read() {
    if kvm_is_there() {
        print_across_a_move(true);
    }
}

#[test]
fn a_program_that_is_told_twice_to_end_leaves_a_console_that_nobody_reads() {
    if !kvm_is_there() {
        return;
    }
    for signal in ["TERM", "INT"] {
        let directory = tempfile::tempdir().expect("a directory");
        let control = directory.path().join("control");
        let command = sender(directory.path(), COUNTER);
        let mut holder = Holder::start(command, control, Stdio::null(), Stdio::piped());
        holder.says("runs here");
        wait_until_vcpu_sleeps(holder.child.id());
        holder.signal(signal);
        holder.says("wait for a reader");
        holder.signal(signal);
        assert_eq!(holder.end().code(), Some(0), "{signal}: {}", holder.said());
        holder.says("were not written: nobody read them");
    }
}

/// A terminal with programs on it, and what they print there.
struct Terminal {
    keys: File,
    screen: Text,
    /// The programs' end, kept open so that its settings outlive them.
    line: OwnedFd,
    usual: Termios,
}

impl Terminal {
    fn open() -> Self {
        let pty = nix::pty::openpty(None, None).expect("a terminal");
        let usual = tcgetattr(&pty.slave).expect("settings");
        let keys = File::from(pty.master);
        let (screen, _) = Text::read(keys.try_clone().expect("a terminal"));
        Self { keys, screen, line: pty.slave, usual }
    }

    fn stdio(&self) -> Stdio {
        self.line.try_clone().expect("a terminal").into()
    }

    fn type_in(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).expect("typed");
    }

    fn settings(&self) -> Termios {
        tcgetattr(&self.line).expect("settings")
    }

    fn wait_until_raw(&self) {
        let raw = || !self.settings().local_flags.intersects(LocalFlags::ICANON | LocalFlags::ISIG);
        wait("raw terminal", raw, || format!("{:?}", self.settings().local_flags));
    }

    #[track_caller]
    fn assert_usual(&self) {
        assert_eq!(self.settings(), self.usual);
    }
}

#[test]
fn a_terminal_is_as_it_was_however_a_program_ends() {
    if !kvm_is_there() {
        return;
    }
    type Ending = fn(&mut Terminal, &Holder);
    let endings: [(&str, Ending, i32); 4] = [
        ("the key for it", |terminal, _| terminal.type_in("\x1d"), 0),
        ("its guest's good end", |terminal, _| terminal.type_in("0"), 0),
        ("its guest's bad end", |terminal, _| terminal.type_in("3"), 1),
        ("SIGTERM", |_, holder| holder.terminate(), 0),
    ];
    for (what, end, code) in endings {
        let directory = tempfile::tempdir().expect("a directory");
        let mut terminal = Terminal::open();
        // The terminal is its controlling one, as a shell would have it.
        let plain = sender(directory.path(), END);
        let mut command = Command::new("setsid");
        command.arg("--ctty").arg(plain.get_program()).args(plain.get_args());
        let control = directory.path().join("control");
        let mut holder = Holder::start(command, control, terminal.stdio(), terminal.stdio());
        holder.says("Ctrl-]");
        terminal.wait_until_raw();
        end(&mut terminal, &holder);
        assert_eq!(holder.end().code(), Some(code), "{what}: {}", holder.said());
        terminal.assert_usual();
    }
}

#[test]
fn two_programs_hand_a_terminal_on_with_what_is_typed_on_it() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let socket = |name: &str| directory.path().join(name);
    let mut terminal = Terminal::open();
    let mut there = Holder::start(receiver(), socket("there"), terminal.stdio(), terminal.stdio());
    let to = there.says("listening on ");
    terminal.assert_usual();
    let command = sender(directory.path(), ECHO);
    let mut here = Holder::start(command, socket("here"), terminal.stdio(), terminal.stdio());
    terminal.wait_until_raw();
    // Neither a signal nor an end of file, and every key once: the terminal does not echo.
    terminal.type_in("here\x03\x04.");
    terminal.screen.wait_for("here\x03\x04.");
    // Nobody takes this now.
    assert_eq!(ask(&here.control, &json!({"cmd": "pause"}))["ok"], true);
    terminal.type_in("between");
    assert_eq!(ask(&here.control, &json!({"cmd": "resume"}))["ok"], true);
    here.hop(&to);
    assert!(here.end().success(), "{}", here.said());
    // Raw again, although the first program has given it back.
    there.says("Ctrl-]");
    terminal.wait_until_raw();
    terminal.type_in("there.");
    terminal.screen.wait_for("there.");
    terminal.type_in("\x1d");
    assert!(there.end().success(), "{}", there.said());
    let printed = String::from_utf8_lossy(&terminal.screen.bytes()).into_owned();
    assert_eq!(printed, "here\x03\x04.betweenthere.");
    terminal.assert_usual();
}

/// While two programs hand a terminal on it has its usual settings for an instant, in which Ctrl-D is an end of
/// file to whoever reads.
#[test]
fn an_end_of_file_on_a_terminal_that_is_still_there_ends_no_typing() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut terminal = Terminal::open();
    let command = sender(directory.path(), ECHO);
    let control = directory.path().join("control");
    let mut holder = Holder::start(command, control, terminal.stdio(), terminal.stdio());
    terminal.wait_until_raw();
    for _ in 0..5 {
        tcsetattr(&terminal.line, SetArg::TCSANOW, &terminal.usual).expect("settings");
        terminal.type_in("\x04");
        terminal.wait_until_raw();
    }
    terminal.type_in("goes on");
    terminal.screen.wait_for("goes on");
    assert!(holder.quit().success());
    terminal.assert_usual();
}

#[test]
fn a_terminal_is_given_back_while_its_guest_takes_no_keys_and_keeps_them() {
    if !kvm_is_there() {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let mut terminal = Terminal::open();
    let command = sender(directory.path(), ECHO);
    let control = directory.path().join("control");
    let mut holder = Holder::start(command, control, terminal.stdio(), terminal.stdio());
    terminal.wait_until_raw();
    assert_eq!(ask(&holder.control, &json!({"cmd": "pause"}))["ok"], true);
    terminal.type_in("kept");
    wait("terminal given back", || terminal.settings() == terminal.usual, || holder.said());
    assert_eq!(ask(&holder.control, &json!({"cmd": "resume"}))["ok"], true);
    terminal.wait_until_raw();
    terminal.screen.wait_for("kept");
    assert!(holder.quit().success());
    terminal.assert_usual();
}

#[test]
fn a_guest_that_is_not_to_move_ends_its_program_with_its_own_end() {
    if !kvm_is_there() {
        return;
    }
    for (typed, code) in [(b"0", 0), (b"7", 1)] {
        let directory = tempfile::tempdir().expect("a directory");
        let command = sender(directory.path(), END);
        let control = directory.path().join("control");
        let mut holder = Holder::start(command, control, Stdio::piped(), Stdio::piped());
        holder.child.stdin.take().expect("piped").write_all(typed).expect("it reads");
        assert_eq!(holder.end().code(), Some(code), "{}", holder.said());
    }
}
