//! A holder: the one owner of a guest in this process, and the state it is in.
//!
//! Invariants: the guest's machine is owned by exactly one state, or by the thread that migrates it. A guest
//! that is in doubt is never ended or resumed but on an operator's word given after the doubt was known.
//! `Ended` is final.

mod commands;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mig::{Address, Control, Observer, Word};

use crate::control::{Check, Screen, Status};
use crate::event::{Event, Report};
use crate::failure::{Failure, chain};
use crate::machine::{GuestEnd, Held, Machine, Moving, Settings, View};
use crate::output::Output;

/// How often a guest's own end is looked for.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

/// How long a command waits for a guest that runs here already but is not yet in the holder's hands.
const ARRIVAL_PATIENCE: Duration = Duration::from_secs(10);

/// Holds a guest, or waits for one.
pub struct Holder<M> {
    inner: Mutex<Inner<M>>,
    changed: Condvar,
    /// A guest has been committed to this side, and is about to be in the holder's hands. Set from within
    /// calls that are made with the lock held.
    arriving: AtomicBool,
    output: Output,
    /// `source` for the program that started the guest, `destination` for one that receives it.
    side: &'static str,
}

struct Inner<M> {
    state: State<M>,
    view: Option<Arc<dyn View>>,
    /// Somebody wants the guest ended as soon as its migration is over.
    quit_asked: bool,
    /// The migration or receive that goes on is in doubt.
    doubt: bool,
    /// Ctrl-C was pressed once while the guest was in doubt.
    warned: bool,
}

enum State<M> {
    Receiving(Control),
    Running(M),
    Paused(M),
    Migrating(Control),
    InDoubt(Box<dyn Held<M>>),
    Ended(End),
}

/// Why a holder has no guest any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It runs elsewhere.
    Moved,
    /// It ended by itself.
    Guest(GuestEnd),
    /// It was ended on request, or never was.
    Quit {
        /// Whether it was in doubt.
        in_doubt: bool,
    },
}

/// What to do about an interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// The holder sees to it.
    Handled,
    /// It has been asked often enough: the program ends at once.
    ExitNow,
    /// The guest has ended, and the program is about to.
    Ended,
}

/// A migration that did not move the guest.
#[derive(Debug, Clone, PartialEq)]
pub struct NotMoved {
    /// Why.
    pub failure: Failure,
    /// How it went, where it began.
    pub report: Option<Box<Report>>,
}

impl<M: Machine> Holder<M> {
    /// Holds a guest that runs.
    pub fn running(machine: M, output: Output, side: &'static str) -> Arc<Self> {
        let view = machine.view();
        Self::new(State::Running(machine), Some(view), output, side)
    }

    /// Waits for a guest.
    pub fn receiving(output: Output, side: &'static str) -> Arc<Self> {
        Self::new(State::Receiving(Control::new()), None, output, side)
    }

    fn new(state: State<M>, view: Option<Arc<dyn View>>, output: Output, side: &'static str) -> Arc<Self> {
        let inner = Inner { state, view, quit_asked: false, doubt: false, warned: false };
        Arc::new(Self {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            arriving: AtomicBool::new(false),
            output,
            side,
        })
    }

    /// Its voice.
    pub fn output(&self) -> &Output {
        &self.output
    }

    /// A look at its guest, once there is one.
    pub fn view(&self) -> Option<Arc<dyn View>> {
        self.lock().view.clone()
    }

    /// What it holds, and how that is.
    pub fn status(&self) -> Status {
        let inner = self.lock_for_command();
        Status {
            state: inner.name().into(),
            heartbeats: inner.view.as_ref().map_or(0, |v| v.heartbeats()),
            vcpus: inner.view.as_ref().map_or(0, |v| v.vcpus()),
            memory_bytes: inner.view.as_ref().map_or(0, |v| v.memory_bytes()),
        }
    }

    /// The guest's VGA text page.
    ///
    /// # Errors
    /// There is no guest yet.
    pub fn screen(&self) -> Result<Screen, Failure> {
        let view = self
            .lock_for_command()
            .view
            .clone()
            .ok_or_else(|| self.wrong_state("show a screen", "receiving"))?;
        Ok(Screen { screen: view.screen() })
    }

    /// Pauses the guest.
    ///
    /// # Errors
    /// It does not run, or could not be paused.
    pub fn pause(&self) -> Result<(), Failure> {
        let mut inner = self.lock_for_command();
        match inner.state.take() {
            State::Running(mut machine) => {
                let paused = machine.pause().map_err(|e| self.failed("pause", &*e));
                inner.state = if paused.is_ok() { State::Paused(machine) } else { State::Running(machine) };
                paused
            }
            other => {
                let name = other.name();
                inner.state = other;
                Err(self.wrong_state("pause", name))
            }
        }
    }

    /// Resumes a guest that was paused; or one in doubt, on the operator's word that nobody else runs it.
    ///
    /// # Errors
    /// It is not paused, or could not be resumed.
    pub fn resume(&self) -> Result<(), Failure> {
        let mut inner = self.lock_for_command();
        match inner.state.take() {
            State::Paused(mut machine) => {
                let resumed = machine.resume().map_err(|e| self.failed("resume", &*e));
                inner.state = if resumed.is_ok() { State::Running(machine) } else { State::Paused(machine) };
                resumed
            }
            state @ (State::Migrating(_) | State::Receiving(_)) if inner.doubt => {
                state.resolve(Word::Resume);
                inner.state = state;
                Ok(())
            }
            State::InDoubt(held) => match held.resume() {
                Ok(machine) => {
                    inner.view = Some(machine.view());
                    inner.state = State::Running(machine);
                    drop(inner);
                    self.changed.notify_all();
                    Ok(())
                }
                Err((held, e)) => {
                    inner.state = State::InDoubt(held);
                    Err(self.failed("resume", &*e))
                }
            },
            other => {
                let name = other.name();
                inner.state = other;
                Err(self.wrong_state("resume", name))
            }
        }
    }

    /// Checks what the guest put into its memory, pausing it meanwhile.
    ///
    /// # Errors
    /// Something is wrong there, or the guest cannot be checked.
    pub fn check(&self) -> Result<Check, Failure> {
        let mut inner = self.lock_for_command();
        let was_running = matches!(inner.state, State::Running(_));
        let name = inner.state.name();
        let (State::Running(machine) | State::Paused(machine)) = &mut inner.state else {
            return Err(self.wrong_state("check", name));
        };
        if was_running {
            machine.pause().map_err(|e| self.failed("pause", &*e))?;
        }
        let checked = machine.check();
        if was_running {
            machine.resume().map_err(|e| self.failed("resume", &*e))?;
        }
        match checked {
            Ok(found) => Ok(Check { found, heartbeats: machine.view().heartbeats() }),
            Err(cause) => Err(self.failure("check", cause, "")),
        }
    }

    /// Cancels the migration that runs, or the receive.
    ///
    /// # Errors
    /// There is none.
    pub fn cancel(&self) -> Result<(), Failure> {
        let inner = self.lock();
        match &inner.state {
            State::Migrating(cancel) | State::Receiving(cancel) if !inner.doubt => {
                cancel.cancel();
                Ok(())
            }
            _ => Err(self.wrong_state("cancel", inner.name())),
        }
    }

    /// Ends the guest; one that migrates is ended when the migration is over and did not move it.
    ///
    /// # Errors
    /// It has ended already.
    pub fn quit(&self) -> Result<(), Failure> {
        let mut inner = self.lock_for_command();
        match inner.state.take() {
            State::Ended(end) => {
                inner.state = State::Ended(end);
                Err(self.wrong_state("quit", "ended"))
            }
            state @ (State::Migrating(_) | State::Receiving(_)) if inner.doubt => {
                state.resolve(Word::Discard);
                inner.state = state;
                inner.quit_asked = true;
                Ok(())
            }
            State::Receiving(cancel) => {
                cancel.cancel();
                self.end(inner, End::Quit { in_doubt: false });
                Ok(())
            }
            State::Migrating(cancel) => {
                cancel.cancel();
                inner.quit_asked = true;
                inner.state = State::Migrating(cancel);
                Ok(())
            }
            State::InDoubt(held) => {
                drop(held);
                self.end(inner, End::Quit { in_doubt: true });
                Ok(())
            }
            State::Running(machine) | State::Paused(machine) => {
                machine.end();
                self.end(inner, End::Quit { in_doubt: false });
                Ok(())
            }
        }
    }

    /// Moves the guest; tells `watch` what the holder's own output is told. Comes back when the migration
    /// has ended, with the guest's new whereabouts settled.
    ///
    /// # Errors
    /// The guest did not move, or it is not known whether it did.
    pub fn migrate(
        &self,
        to: &Address,
        settings: &Settings,
        watch: &(dyn Fn(&Event) + Sync),
    ) -> Result<Box<Report>, Box<NotMoved>> {
        let cancel = Control::new();
        let machine = {
            let mut inner = self.lock_for_command();
            match inner.state.take() {
                State::Running(machine) => {
                    inner.state = State::Migrating(cancel.clone());
                    machine
                }
                other => {
                    let failure = self.wrong_state("migrate", other.name());
                    inner.state = other;
                    return Err(Box::new(NotMoved { failure, report: None }));
                }
            }
        };
        let tell = |event: Event| {
            watch(&event);
            self.output.tell(event);
        };
        tell(Event::Migrating { to: to.to_string() });
        let moving =
            machine.migrate(to, settings, &cancel, &Telling(&|event| tell(event), &|p| self.note_doubt(p)));
        let (report, next) = match moving {
            Moving::Moved(report) => (report, State::Ended(End::Moved)),
            Moving::StillHere { machine, report } => {
                let next = still_here(machine, &report);
                (report, next)
            }
            Moving::Discarded(report) => (report, State::Ended(End::Quit { in_doubt: true })),
        };
        let report = Box::new(Report::from(&report));
        let moved = matches!(next, State::Ended(End::Moved));
        self.settle(next);
        tell(Event::Report(report.clone()));
        if moved {
            return Ok(report);
        }
        let unnamed = || self.failure("migrate", "the migration ended without a reason", "");
        let failure = report.fault.clone().unwrap_or_else(unnamed);
        Err(Box::new(NotMoved { failure, report: Some(report) }))
    }

    /// Notes whether what goes on is in doubt.
    pub fn note_doubt(&self, progress: &mig::observe::Progress) {
        if let mig::observe::Progress::InDoubt { .. } = progress {
            let mut inner = self.lock();
            (inner.doubt, inner.warned) = (true, false);
        }
    }

    fn settle(&self, next: State<M>) {
        let mut inner = self.lock();
        inner.doubt = false;
        match next {
            State::Ended(end) => self.end(inner, end),
            State::Running(machine) | State::Paused(machine) if inner.quit_asked => {
                machine.end();
                self.end(inner, End::Quit { in_doubt: false });
            }
            other => {
                inner.state = other;
                inner.quit_asked = false;
                drop(inner);
                self.changed.notify_all();
            }
        }
    }

    /// The token of the receive that is to begin now; none when the holder was told to quit.
    pub fn begin_receive(&self) -> Option<Control> {
        let mut inner = self.lock();
        match &mut inner.state {
            State::Receiving(cancel) => {
                if cancel.is_cancelled() {
                    *cancel = Control::new();
                }
                Some(cancel.clone())
            }
            _ => None,
        }
    }

    /// A guest has been committed to this side: commands wait for it from now on.
    pub fn arriving(&self) {
        self.arriving.store(true, Ordering::SeqCst);
    }

    /// What was arriving did not.
    pub fn not_received(&self) {
        self.arriving.store(false, Ordering::SeqCst);
        let mut inner = self.lock();
        let dropped = std::mem::take(&mut inner.doubt) && inner.quit_asked;
        if dropped {
            return self.end(inner, End::Quit { in_doubt: true });
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Takes over a guest that was received and runs.
    pub fn received(&self, machine: M) {
        let mut inner = self.lock();
        inner.doubt = false;
        inner.view = Some(machine.view());
        match inner.state {
            State::Receiving(_) => inner.state = State::Running(machine),
            // It was told to quit while the last byte came in; the source has given the guest up.
            _ => {
                drop(inner);
                return machine.end();
            }
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Takes over a copy that is in doubt. It is kept even if the holder was told to quit meanwhile.
    pub fn received_in_doubt(&self, held: Box<dyn Held<M>>) {
        let mut inner = self.lock();
        inner.view = held.view().or(inner.view.take());
        inner.state = State::InDoubt(held);
        drop(inner);
        self.changed.notify_all();
    }

    /// Waits at most `timeout` for the end.
    pub fn wait_ended_for(&self, timeout: Duration) -> Option<End> {
        let deadline = Instant::now().checked_add(timeout);
        let mut inner = self.lock();
        loop {
            if let State::Ended(end) = &inner.state {
                return Some(end.clone());
            }
            let left = match deadline {
                Some(deadline) => deadline.checked_duration_since(Instant::now())?,
                None => Duration::MAX,
            };
            inner = self
                .changed
                .wait_timeout(inner, left.min(Duration::from_secs(3600)))
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the end.
    pub fn wait_ended(&self) -> End {
        loop {
            if let Some(end) = self.wait_ended_for(Duration::MAX) {
                return end;
            }
        }
    }

    /// Ends the holder when its guest ends by itself. Comes back when the holder has ended.
    pub fn watch_guest(&self) {
        loop {
            let view = {
                let inner = self.lock();
                match &inner.state {
                    State::Ended(_) => return,
                    State::Running(_) | State::Paused(_) | State::Migrating(_) => inner.view.clone(),
                    State::Receiving(_) | State::InDoubt(_) => None,
                }
            };
            if let Some(end) = view.and_then(|v| v.wait_end(WATCH_INTERVAL)) {
                self.guest_ended(end);
            }
            if self.wait_ended_for(WATCH_INTERVAL / 10).is_some() {
                return;
            }
        }
    }

    fn guest_ended(&self, end: GuestEnd) {
        let mut inner = self.lock();
        match inner.state.take() {
            State::Running(machine) | State::Paused(machine) => {
                machine.end();
                self.end(inner, End::Guest(end));
            }
            // The engine has the machine, and gives it back when it has told the destination.
            State::Migrating(cancel) => {
                if !cancel.is_cancelled() {
                    cancel.cancel_because(end.reason);
                }
                inner.state = State::Migrating(cancel);
            }
            other => inner.state = other,
        }
    }

    /// Ctrl-C. A migration is cancelled first, and a guest in doubt is dropped on the second one only.
    pub fn interrupt(&self) -> Interrupted {
        let mut inner = self.lock();
        match &inner.state {
            State::Migrating(cancel) if !inner.doubt && !cancel.is_cancelled() => {
                cancel.cancel();
                self.output.note("cancelling the migration; the guest stays. Ctrl-C again ends it");
            }
            State::Migrating(_) if !inner.doubt && !inner.quit_asked => inner.quit_asked = true,
            State::Migrating(_) if !inner.doubt => return Interrupted::ExitNow,
            State::Ended(_) => return Interrupted::Ended,
            _ if inner.name() == "in-doubt" && !inner.warned => {
                inner.warned = true;
                self.output.note("the guest held here may be the last copy. Ctrl-C again drops it");
            }
            _ => {
                drop(inner);
                // It may have ended in this moment, which is what was wanted.
                let _ = self.quit();
            }
        }
        Interrupted::Handled
    }

    fn end(&self, mut inner: MutexGuard<'_, Inner<M>>, end: End) {
        inner.state = State::Ended(end);
        // It keeps the guest's memory.
        inner.view = None;
        drop(inner);
        self.changed.notify_all();
    }

    /// As [`Holder::lock`], for commands: the source may know that its guest runs here before the receive
    /// has come back.
    fn lock_for_command(&self) -> MutexGuard<'_, Inner<M>> {
        let waits = |inner: &mut Inner<M>| {
            self.arriving.load(Ordering::SeqCst) && matches!(inner.state, State::Receiving(_))
        };
        self.changed
            .wait_timeout_while(self.lock(), ARRIVAL_PATIENCE, waits)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn lock(&self) -> MutexGuard<'_, Inner<M>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self, step: &str, cause: impl Into<String>, remedy: &str) -> Failure {
        Failure::new(self.side, step, cause, remedy)
    }

    fn failed(&self, step: &str, error: &(dyn std::error::Error + Send + Sync + 'static)) -> Failure {
        self.failure(step, chain(error), "").local()
    }
}

/// What has become of a guest that did not move.
fn still_here<M: Machine>(machine: M, report: &mig::observe::Report) -> State<M> {
    if let Some(end) = machine.view().wait_end(Duration::ZERO) {
        machine.end();
        return State::Ended(End::Guest(end));
    }
    let stuck = |f: &mig::Fault| f.side == mig::Side::Source && f.step == mig::Step::Resume;
    match report.fault.as_ref().is_some_and(stuck) {
        true => State::Paused(machine),
        false => State::Running(machine),
    }
}

impl<M> Inner<M> {
    fn name(&self) -> &'static str {
        if self.doubt { "in-doubt" } else { self.state.name() }
    }
}

impl<M> State<M> {
    fn name(&self) -> &'static str {
        match self {
            Self::Receiving(_) => "receiving",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Migrating(_) => "migrating",
            Self::InDoubt(_) => "in-doubt",
            Self::Ended(_) => "ended",
        }
    }

    /// Hands an operator's word to the engine.
    fn resolve(&self, word: Word) {
        if let Self::Migrating(control) | Self::Receiving(control) = self {
            control.resolve(word);
        }
    }

    /// Takes the state out for a moment; the caller, who has the lock, puts one back.
    fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Ended(End::Quit { in_doubt: false }))
    }
}

/// An engine's observer that turns progress into events.
pub(crate) struct Telling<'a>(
    pub(crate) &'a (dyn Fn(Event) + Sync),
    pub(crate) &'a (dyn Fn(&mig::observe::Progress) + Sync),
);

impl Observer for Telling<'_> {
    fn progress(&self, progress: &mig::observe::Progress) {
        (self.1)(progress);
        (self.0)(progress.into());
    }
}

#[cfg(test)]
mod tests;
