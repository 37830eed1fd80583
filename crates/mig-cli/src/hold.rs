//! What both programs do around a holder: its control socket, its signals, its end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::thread;

use mig_vmm::Console;

use crate::console;
use crate::control::{Server, Socket};
use crate::event::Event;
use crate::exit::Exit;
use crate::holder::{End, Holder, Interrupted};
use crate::machine::Machine;
use crate::signals::{Signal, on_signal};
use crate::terminal;

/// The holder, from when there is one on.
pub type Later<M> = Arc<OnceLock<Arc<Holder<M>>>>;

/// Obeys signals from now on: before there is a holder, as a guest boots, they end the program, and its
/// control socket with it.
pub fn obey_signals<M: Machine>(socket: Socket) -> Later<M> {
    let holder = Later::<M>::default();
    let later = Arc::clone(&holder);
    on_signal(move |signal| match (later.get(), signal) {
        (None, _) => exit(&socket, Exit::Usage),
        (Some(holder), Signal::Interrupt) => interrupt(holder, &socket),
        (Some(holder), Signal::Terminate) => {
            // It may have ended already, which is what was wanted.
            if holder.quit().is_err() {
                let _ = console::hurry();
            }
        }
    });
    holder
}

/// Ctrl-C, or the key that stands for it. May end the program, and its control socket with it.
pub fn interrupt<M: Machine>(holder: &Holder<M>, socket: &Socket) {
    match holder.interrupt() {
        Interrupted::Handled => {}
        // All that may be left to do is to wait for the console's reader.
        Interrupted::Ended if !console::hurry() => {}
        Interrupted::ExitNow { in_doubt: true } => exit(socket, Exit::InDoubt),
        Interrupted::Ended | Interrupted::ExitNow { in_doubt: false } => exit(socket, Exit::Failed),
    }
}

fn exit(socket: &Socket, code: Exit) -> ! {
    terminal::give_back_for_good();
    socket.remove();
    std::process::exit(code as i32);
}

/// Lets `holder` be controlled: by `server`'s clients, by signals, and by its guest's own end.
pub fn attend<M: Machine>(holder: &Arc<Holder<M>>, server: &mut Server, signals: &Later<M>) {
    holder.controlled_at(shown(server.path()));
    // Set once a program, and by nobody else.
    let _ = signals.set(Arc::clone(holder));
    let commands = Arc::clone(holder);
    server.serve(commands);
    let watched = Arc::clone(holder);
    thread::spawn(move || watched.watch_guest());
}

/// Waits for the holder's end, and until everybody has been told of it and all that its guest printed is
/// written.
pub fn see_off<M: Machine>(holder: &Holder<M>, server: Server, console: &Console) -> End {
    let end = holder.wait_ended();
    server.finish();
    drop(server);
    terminal::give_back_for_good();
    console::finish(console, holder.output());
    let reason = match &end {
        End::Moved => "the guest moved away".to_owned(),
        End::Guest(end) => end.reason.clone(),
        End::Quit { .. } => "as it was told to".to_owned(),
    };
    holder.output().tell(Event::Ended { reason });
    holder.output().flush();
    end
}

/// `unix:PATH`.
pub fn shown(path: &Path) -> String {
    format!("unix:{}", path.display())
}

/// The control path: as given, or one of this program's own.
pub fn control_path(given: &Option<PathBuf>, program: &str) -> PathBuf {
    given.clone().unwrap_or_else(|| crate::options::default_control(program))
}
