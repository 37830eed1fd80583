//! What both programs do around a holder: its control socket, its signals, its end.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use crate::control::Server;
use crate::event::Event;
use crate::exit::Exit;
use crate::holder::{End, Holder, Interrupted};
use crate::machine::Machine;
use crate::signals::{Signal, on_signal};

/// Lets `holder` be controlled: by `server`'s clients, by signals, and by its guest's own end.
pub fn attend<M: Machine>(holder: &Arc<Holder<M>>, server: &mut Server) {
    let commands = Arc::clone(holder);
    server.serve(commands);
    let (interrupted, path) = (Arc::clone(holder), server.path().to_owned());
    on_signal(move |signal| match signal {
        Signal::Interrupt if interrupted.interrupt() == Interrupted::ExitNow => {
            let _ = std::fs::remove_file(&path);
            std::process::exit(Exit::Failed as i32);
        }
        Signal::Interrupt => {}
        Signal::Terminate => {
            // It may have ended already, which is what was wanted.
            let _ = interrupted.quit();
        }
    });
    let watched = Arc::clone(holder);
    thread::spawn(move || watched.watch_guest());
}

/// Waits for the holder's end, and until everybody has been told of it.
pub fn see_off<M: Machine>(holder: &Holder<M>, server: Server) -> End {
    let end = holder.wait_ended();
    server.finish();
    drop(server);
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
