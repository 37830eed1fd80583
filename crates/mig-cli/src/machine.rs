//! What a holder needs of a machine: the seam between holding a guest and the VMM that runs it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use mig::dirtying::Dirtying;
use mig::observe::Report;
use mig::{Address, BoxError, Control, Fault, Observer, SourceOptions};
use mig_vmm::GuestTime;

/// A guest that can be looked at from any thread, whoever owns its machine at the moment.
pub trait View: Send + Sync {
    /// Heartbeats counted so far.
    fn heartbeats(&self) -> u64;
    /// Its vCPUs.
    fn vcpus(&self) -> u32;
    /// Its memory.
    fn memory_bytes(&self) -> u64;
    /// The VGA text page: 25 lines.
    fn screen(&self) -> Vec<String>;
    /// Whether the guest runs here and has room for something typed.
    fn takes_input(&self) -> bool;
    /// If so, has `take` fetch at most as many bytes as it is told and types them: what was fetched goes
    /// wherever the guest does. `take` must not wait.
    ///
    /// # Errors
    /// What `take` met with.
    fn feed(&self, take: &mut dyn FnMut(usize) -> io::Result<Vec<u8>>) -> io::Result<()>;
    /// Waits for the guest to end by itself, at most `timeout`.
    fn wait_end(&self, timeout: Duration) -> Option<GuestEnd>;
}

/// How a guest ended by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestEnd {
    /// In words.
    pub reason: String,
    /// Whether that is a good end.
    pub good: bool,
}

/// A machine with a guest, running or paused.
pub trait Machine: Sized + Send + 'static {
    /// A look at it.
    fn view(&self) -> Arc<dyn View>;

    /// Pauses the running guest.
    ///
    /// # Errors
    /// It could not be paused.
    fn pause(&mut self) -> Result<(), BoxError>;

    /// Runs the paused guest.
    ///
    /// # Errors
    /// It could not be resumed.
    fn resume(&mut self) -> Result<(), BoxError>;

    /// Checks from outside what the guest put into its memory; called paused.
    ///
    /// # Errors
    /// What is wrong with it, or why this guest cannot be checked.
    fn check(&mut self) -> Result<String, String>;

    /// Watches for so long how the running guest dirties its memory.
    ///
    /// # Errors
    /// Its dirty log cannot be read.
    fn watch(&mut self, over: Duration) -> Result<Dirtying, BoxError>;

    /// Moves the running guest.
    fn migrate(
        self,
        to: &Address,
        settings: &Settings,
        control: &Control,
        observer: &dyn Observer,
    ) -> Moving<Self>;

    /// Ends the guest.
    fn end(self);
}

/// How a guest is to move.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// For the engine.
    pub engine: SourceOptions,
    /// What the guest's time does across the pause.
    pub guest_time: GuestTime,
}

/// How a migration ended.
pub enum Moving<M> {
    /// The guest runs on the destination.
    Moved(Report),
    /// It is here.
    StillHere {
        /// The guest, running unless resuming it is what failed.
        machine: M,
        /// How it went.
        report: Report,
    },
    /// It was in doubt, and an operator said that it runs there. Here it is gone.
    Discarded(Report),
}

/// A complete copy, paused, that was to run here and could not be started; dropping it drops the guest.
pub trait Held<M>: Send {
    /// A look at it, where its holder has none yet: a copy that arrived.
    fn view(&self) -> Option<Arc<dyn View>> {
        None
    }

    /// The operator's word that nobody else runs it: runs it here.
    ///
    /// # Errors
    /// It could not be resumed; it is held on.
    fn resume(self: Box<Self>) -> Result<M, (Box<dyn Held<M>>, BoxError)>;
}

/// How a receive ended.
pub enum Arrival<M> {
    /// The guest runs here.
    Running {
        /// Its machine.
        machine: M,
        /// How it went.
        report: mig::ReceiveReport,
    },
    /// It never did.
    NotReceived(Fault),
    /// It was given to this side, which could not start it.
    Lost {
        /// The copy, paused.
        held: Box<dyn Held<M>>,
        /// How it came to this.
        fault: Fault,
    },
}
