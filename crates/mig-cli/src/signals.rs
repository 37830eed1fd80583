//! Ctrl-C and SIGTERM.

use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// What was asked for from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: Ctrl-C, which may be pressed again.
    Interrupt,
    /// SIGTERM: to be obeyed at once.
    Terminate,
}

/// Has `handle` called for each, on a thread of its own.
pub fn on_signal(mut handle: impl FnMut(Signal) + Send + 'static) {
    // Without handlers the signals end the program, which is what they are for.
    let Ok(mut signals) = Signals::new([SIGINT, SIGTERM]) else { return };
    thread::spawn(move || {
        for signal in &mut signals {
            handle(if signal == SIGTERM { Signal::Terminate } else { Signal::Interrupt });
        }
    });
}
