//! Standard input, typed to the guest.
//!
//! Invariant: a byte is read only by the program whose guest runs, and only when the guest has room for it
//! ([`View::feed`] sees to that), so that a guest's holders can share a terminal or a pipe and nothing typed
//! is lost between them. The price: while no guest takes input, nobody sees the keys of a raw terminal; so it
//! is given back then.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::control::Socket;
use crate::hold;
use crate::holder::Holder;
use crate::machine::{Machine, View};
use crate::terminal::{self, Terminal};

/// The key that does what Ctrl-C does otherwise: Ctrl-].
const ESCAPE: u8 = 0x1d;

/// How often a guest that takes no input is looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(10);
/// How long nothing is typed before guest and terminal are looked at again.
const IDLE_INTERVAL: Duration = Duration::from_millis(100);
/// How long a guest may take no input before its terminal is given back: longer than a good pause.
const GIVE_BACK_AFTER: Duration = Duration::from_secs(2);

/// Types standard input to the holder's guest from now on, whenever one runs here. `control` is the program's
/// socket, for when it is interrupted.
pub fn attend<M: Machine>(holder: &Arc<Holder<M>>, control: Socket) {
    // Without standard input nobody types.
    let Ok(stdin) = io::stdin().as_fd().try_clone_to_owned() else { return };
    let mut keyboard = Keyboard::on(stdin.into());
    let holder = Arc::clone(holder);
    thread::spawn(move || {
        let mut told = false;
        while !keyboard.ended {
            let turn = keyboard.turn(holder.view().as_deref());
            if turn.raw && !told {
                told = true;
                holder
                    .output()
                    .note("keys go to the guest from now on; Ctrl-] does what Ctrl-C does otherwise");
            }
            (0..turn.escapes).for_each(|_| hold::interrupt(&holder, &control));
        }
    });
}

/// What came of a look at guest and keys.
#[derive(Debug, Default, PartialEq, Eq)]
struct Turn {
    /// The terminal was made raw.
    raw: bool,
    /// How many times Ctrl-] was pressed.
    escapes: usize,
}

struct Keyboard {
    input: File,
    terminal: Option<Terminal>,
    /// When a guest would last have taken something.
    taken: Instant,
    /// There is nothing more to read, ever.
    ended: bool,
}

impl Keyboard {
    fn on(stdin: File) -> Self {
        let terminal = Terminal::of(&stdin);
        let input = unshared(&stdin).unwrap_or(stdin);
        Self { input, terminal, taken: Instant::now(), ended: false }
    }

    /// Waits a while for keys and types them, or for a guest that takes them.
    fn turn(&mut self, view: Option<&dyn View>) -> Turn {
        let Some(view) = view.filter(|view| self.is_typed_to() && view.takes_input()) else {
            let long = self.taken.elapsed() > GIVE_BACK_AFTER;
            if self.terminal.is_some() && long {
                terminal::give_back();
            }
            thread::sleep(if long { IDLE_INTERVAL } else { LOOK_INTERVAL });
            return Turn::default();
        };
        self.taken = Instant::now();
        let raw = self.terminal.as_ref().is_some_and(Terminal::make_raw);
        // Who reads from the background is stopped.
        let escapes = if wait_for_keys(&self.input, IDLE_INTERVAL) && self.is_typed_to() {
            self.type_to(view)
        } else {
            0
        };
        Turn { raw, escapes }
    }

    /// Whether keys are for this program: always, unless they are a terminal's and it is in the background.
    fn is_typed_to(&self) -> bool {
        self.terminal.as_ref().is_none_or(Terminal::in_foreground)
    }

    /// How many times Ctrl-] was among it.
    fn type_to(&mut self, view: &dyn View) -> usize {
        let mut escapes = 0;
        let fed = view.feed(&mut |room| {
            // Somebody else may have read it, and this must not wait.
            if !wait_for_keys(&self.input, Duration::ZERO) {
                return Ok(Vec::new());
            }
            let mut bytes = vec![0; room];
            match self.input.read(&mut bytes) {
                Ok(count) => {
                    // On a terminal that lives it was Ctrl-D as somebody else had given it back.
                    self.ended = count == 0 && !self.terminal.as_ref().is_some_and(Terminal::is_there);
                    bytes.truncate(count);
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                    bytes.clear();
                }
                Err(e) => return Err(e),
            }
            if self.terminal.is_some() {
                let count = bytes.len();
                bytes.retain(|byte| *byte != ESCAPE);
                escapes = count - bytes.len();
            }
            Ok(bytes)
        });
        // A terminal that was hung up, as a rule.
        self.ended |= fed.is_err();
        escapes
    }
}

/// Whether there is something to read, within `time`.
fn wait_for_keys(input: &File, time: Duration) -> bool {
    let mut fds = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
    // An interrupted wait is over.
    poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
}

/// The same pipe or terminal, opened anew to be read without blocking: to change standard input itself would
/// change it for everybody who shares it. Not a file, which is read on from where it is.
fn unshared(stdin: &File) -> Option<File> {
    let kind = stdin.metadata().ok()?.file_type();
    if !kind.is_fifo() && !kind.is_char_device() {
        return None;
    }
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let path = format!("/proc/self/fd/{}", stdin.as_raw_fd());
    File::options().read(true).custom_flags(flags.bits()).open(path).ok()
}
