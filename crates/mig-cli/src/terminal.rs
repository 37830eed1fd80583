//! The terminal on standard input, while a guest is typed to: raw, so that every key goes to the guest.
//!
//! Invariants: the settings it had are put back on every way out of the program that the program itself
//! takes ([`give_back_for_good`]), and from then on it is never raw again. Its settings are changed only by
//! a foreground job: a background one that tries is stopped (SIGTTOU).

use std::fs::File;
use std::io::IsTerminal;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::termios::{
    InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr,
};
use nix::unistd::{getpgrp, tcgetpgrp};

/// What is to be put back.
static ALTERED: Mutex<Altered> = Mutex::new(Altered { terminal: None, over: false });

struct Altered {
    terminal: Option<(File, Termios)>,
    over: bool,
}

/// The terminal, if standard input is one.
pub struct Terminal {
    file: File,
}

impl Terminal {
    /// The terminal that `file` is, if it is one.
    pub fn of(file: &File) -> Option<Self> {
        file.is_terminal().then(|| file.try_clone().ok()).flatten().map(|file| Self { file })
    }

    /// Whether this program is the one that is typed to.
    pub fn in_foreground(&self) -> bool {
        in_foreground(self.file.as_fd())
    }

    /// Whether it has not been hung up.
    pub fn is_there(&self) -> bool {
        tcgetattr(&self.file).is_ok()
    }

    /// Gives every key to the guest, and answers whether that is new. To be asked for again and again: a
    /// shell may change the settings, and so does another holder on the same terminal, when its guest has
    /// moved here and it ends.
    pub fn make_raw(&self) -> bool {
        let mut altered = lock();
        let Ok(usual) = tcgetattr(&self.file) else { return false };
        if altered.over || is_raw(&usual) || !self.in_foreground() {
            return false;
        }
        let Ok(file) = self.file.try_clone() else { return false };
        let raw = raw(usual.clone());
        altered.terminal = Some((file, usual));
        // What was typed and not read stays there.
        tcsetattr(&self.file, SetArg::TCSANOW, &raw).is_ok()
    }
}

/// Puts the settings back, if they were changed: the program is typed to again.
pub fn give_back() {
    put_back(&mut lock());
}

/// The same, as the program ends.
pub fn give_back_for_good() {
    let mut altered = lock();
    altered.over = true;
    put_back(&mut altered);
}

/// Does so when it is dropped, by a panic too.
#[derive(Debug)]
pub struct GivenBack;

impl Drop for GivenBack {
    fn drop(&mut self) {
        give_back_for_good();
    }
}

fn put_back(altered: &mut Altered) {
    let Some((file, usual)) = &altered.terminal else { return };
    if in_foreground(file.as_fd()) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(file, SetArg::TCSANOW, usual);
        altered.terminal = None;
    }
}

/// No signals, no echo, no line editing, no flow control; output is left as it is, so that the program's own
/// lines look right.
fn raw(mut settings: Termios) -> Termios {
    settings.local_flags &= !LOCAL;
    settings.input_flags &= !INPUT;
    // A read waits for one byte and no longer: what else is set would look like the end of the input.
    settings.control_chars[SpecialCharacterIndices::VMIN as usize] = 1;
    settings.control_chars[SpecialCharacterIndices::VTIME as usize] = 0;
    settings
}

const LOCAL: LocalFlags = LocalFlags::ICANON
    .union(LocalFlags::ECHO)
    .union(LocalFlags::ECHONL)
    .union(LocalFlags::ISIG)
    .union(LocalFlags::IEXTEN);
const INPUT: InputFlags = InputFlags::IXON
    .union(InputFlags::ICRNL)
    .union(InputFlags::INLCR)
    .union(InputFlags::IGNCR)
    .union(InputFlags::ISTRIP)
    .union(InputFlags::BRKINT)
    .union(InputFlags::PARMRK);

fn is_raw(settings: &Termios) -> bool {
    !settings.local_flags.intersects(LOCAL) && !settings.input_flags.intersects(INPUT)
}

/// A terminal that is not the controlling one has no jobs: everybody is typed to.
fn in_foreground(terminal: BorrowedFd<'_>) -> bool {
    tcgetpgrp(terminal).map_or(true, |group| group == getpgrp())
}

fn lock() -> MutexGuard<'static, Altered> {
    ALTERED.lock().unwrap_or_else(PoisonError::into_inner)
}
