//! A holder: the one owner of a guest in this process, and the state it is in.
//!
//! Invariants: the guest's machine is owned by exactly one state, or by the thread that migrates or receives it.
//! A guest that is in doubt is never ended or resumed by the holder but on an operator's word given after the
//! doubt was known. `Ended` is final.

mod commands;
mod doubt;
mod ending;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use mig::observe::Progress;
use mig::{Address, Arbiter, Control, Observer};

use self::doubt::Doubt;
use crate::control::{Check, Screen, Status};
use crate::convergence;
use crate::estimate::{Estimate, Estimated, WATCHED};
use crate::event::{Event, Report};
use crate::failure::{Failure, chain};
use crate::machine::{GuestEnd, Held, Machine, Moving, Settings, View};
use crate::output::Output;

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
    /// Decides in doubt, in every migration of the guest's.
    arbiter: Option<Arc<dyn Arbiter>>,
    /// Where it is controlled, for those who are to be told.
    control: OnceLock<String>,
}

struct Inner<M> {
    state: State<M>,
    view: Option<Arc<dyn View>>,
    /// Somebody wants the guest ended as soon as its migration or its receive is over.
    quit_asked: bool,
    /// The guest that is received or migrated, or that is `Lost`, is in doubt.
    doubt: Option<Doubt>,
}

type Guard<'a, M> = MutexGuard<'a, Inner<M>>;

enum State<M> {
    Receiving(Control),
    Running(M),
    Paused(M),
    Migrating(Control),
    /// A complete copy that was to run here and could not be started; always in doubt.
    Lost(Box<dyn Held<M>>),
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
    ExitNow {
        /// Whether the guest is in doubt.
        in_doubt: bool,
    },
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
    pub fn running(
        machine: M,
        output: Output,
        side: &'static str,
        arbiter: Option<Arc<dyn Arbiter>>,
    ) -> Arc<Self> {
        let view = machine.view();
        Self::new(State::Running(machine), Some(view), output, side, arbiter)
    }

    /// Waits for a guest.
    pub fn receiving(output: Output, side: &'static str, arbiter: Option<Arc<dyn Arbiter>>) -> Arc<Self> {
        Self::new(State::Receiving(Control::new()), None, output, side, arbiter)
    }

    fn new(
        state: State<M>,
        view: Option<Arc<dyn View>>,
        output: Output,
        side: &'static str,
        arbiter: Option<Arc<dyn Arbiter>>,
    ) -> Arc<Self> {
        let inner = Inner { state, view, quit_asked: false, doubt: None };
        Arc::new(Self {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
            arriving: AtomicBool::new(false),
            output,
            side,
            arbiter,
            control: OnceLock::new(),
        })
    }

    /// Lets it say where it is controlled, as in `unix:PATH`.
    pub fn controlled_at(&self, control: String) {
        // Once a program.
        let _ = self.control.set(control);
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
            doubt: inner.doubt.as_ref().map(Doubt::shown),
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
                inner.state = other;
                Err(self.wrong_state("pause", inner.name()))
            }
        }
    }

    /// Resumes a guest that was paused.
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
            other => {
                inner.state = other;
                Err(self.wrong_state("resume", inner.name()))
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
        let name = inner.name();
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

    /// Watches for [`WATCHED`] how the guest dirties its memory, and foretells migrations. Other commands wait meanwhile.
    ///
    /// # Errors
    /// It does not run, or cannot be watched.
    pub fn estimate(&self, estimate: &Estimate) -> Result<Estimated, Failure> {
        convergence::check(estimate.on_stall, estimate.keep_speed_percent)?;
        let mut inner = self.lock_for_command();
        let name = inner.name();
        let State::Running(machine) = &mut inner.state else {
            return Err(self.wrong_state("estimate", name));
        };
        let seen = machine.watch(WATCHED).map_err(|e| self.failed("estimate", &*e))?;
        Ok(estimate.foresee(&seen))
    }

    /// Cancels the migration that runs, or the receive.
    ///
    /// # Errors
    /// There is none.
    pub fn cancel(&self) -> Result<(), Failure> {
        let inner = self.lock();
        match &inner.state {
            State::Migrating(control) | State::Receiving(control) if inner.doubt.is_none() => {
                control.cancel();
                Ok(())
            }
            _ => Err(self.wrong_state("cancel", inner.name())),
        }
    }

    /// Caps the rounds of the migration that runs, in bytes a second, or lifts the cap.
    ///
    /// # Errors
    /// There is none.
    pub fn change_bandwidth(&self, cap_bytes_per_second: Option<u64>) -> Result<(), Failure> {
        let inner = self.lock();
        match &inner.state {
            State::Migrating(control) if inner.doubt.is_none() => {
                control.change_bandwidth(cap_bytes_per_second);
                Ok(())
            }
            _ => Err(self.wrong_state("change the bandwidth", inner.name())),
        }
    }

    /// Ends the guest; one that migrates is ended when the migration is over and did not move it, one in doubt
    /// is discarded.
    ///
    /// # Errors
    /// It has ended already.
    pub fn quit(&self) -> Result<(), Failure> {
        let mut inner = self.lock_for_command();
        if inner.doubt.is_some() {
            self.quit_in_doubt(&mut inner);
            return Ok(());
        }
        match inner.state.take() {
            State::Running(machine) | State::Paused(machine) => {
                machine.end();
                self.end(&mut inner, End::Quit { in_doubt: false });
                Ok(())
            }
            other => {
                inner.state = other;
                inner.quit_asked = true;
                match &inner.state {
                    State::Ended(_) => Err(self.wrong_state("quit", "ended")),
                    State::Migrating(control) | State::Receiving(control) => {
                        control.cancel();
                        Ok(())
                    }
                    State::Running(_) | State::Paused(_) | State::Lost(_) => Ok(()),
                }
            }
        }
    }

    /// Moves the guest; tells `watch` what the holder's own output is told. Comes back when the migration
    /// has ended, with the guest's new whereabouts settled.
    ///
    /// # Errors
    /// The guest did not move; or it was in doubt, and was discarded.
    pub fn migrate(
        &self,
        to: &Address,
        settings: &Settings,
        watch: &(dyn Fn(&Event) + Sync),
    ) -> Result<Box<Report>, Box<NotMoved>> {
        let control = Control::new();
        let machine = {
            let mut inner = self.lock_for_command();
            match inner.state.take() {
                State::Running(machine) => {
                    inner.state = State::Migrating(control.clone());
                    machine
                }
                other => {
                    inner.state = other;
                    let failure = self.wrong_state("migrate", inner.name());
                    return Err(Box::new(NotMoved { failure, report: None }));
                }
            }
        };
        let mut settings = settings.clone();
        settings.engine.arbiter.clone_from(&self.arbiter);
        let tell = |event: Event| {
            watch(&event);
            self.output.tell(event);
        };
        tell(Event::Migrating { to: to.to_string() });
        let follow = Following(&|progress| tell(self.follow(progress)));
        let moving = machine.migrate(to, &settings, &control, &follow);
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

    fn settle(&self, next: State<M>) {
        let mut inner = self.lock();
        match next {
            State::Ended(end) => self.end(&mut inner, end),
            State::Running(machine) | State::Paused(machine) if inner.quit_asked => {
                machine.end();
                self.end(&mut inner, End::Quit { in_doubt: false });
            }
            other => {
                inner.state = other;
                inner.quit_asked = false;
                inner.doubt = None;
                drop(inner);
                self.changed.notify_all();
            }
        }
    }

    /// The token of the receive that is to begin now; none when the holder was told to quit, and has ended.
    pub fn begin_receive(&self) -> Option<Control> {
        let mut inner = self.lock();
        if inner.quit_asked && matches!(inner.state, State::Receiving(_)) {
            self.end(&mut inner, End::Quit { in_doubt: false });
            return None;
        }
        match &mut inner.state {
            State::Receiving(control) => {
                if control.is_cancelled() {
                    *control = Control::new();
                }
                Some(control.clone())
            }
            _ => None,
        }
    }

    /// A guest has been committed to this side: commands wait for it from now on.
    pub fn arriving(&self) {
        self.arriving.store(true, Ordering::SeqCst);
    }

    /// The guest that comes in is all here and paused: one can look at it.
    pub fn restored(&self, view: Arc<dyn View>) {
        self.lock().view = Some(view);
    }

    /// What was arriving did not, or has been given back.
    pub fn not_received(&self) {
        self.arriving.store(false, Ordering::SeqCst);
        let mut inner = self.lock();
        inner.view = None;
        if inner.doubt.take().is_some() && inner.quit_asked {
            self.end(&mut inner, End::Quit { in_doubt: true });
        } else {
            drop(inner);
            self.changed.notify_all();
        }
    }

    /// Takes over a guest that was received and runs.
    pub fn received(&self, machine: M) {
        let mut inner = self.lock();
        // It was told to quit while the last byte came in; the source has given the guest up.
        if inner.quit_asked || !matches!(inner.state, State::Receiving(_)) {
            machine.end();
            self.end(&mut inner, End::Quit { in_doubt: false });
            return;
        }
        inner.view = Some(machine.view());
        inner.doubt = None;
        inner.state = State::Running(machine);
        drop(inner);
        self.changed.notify_all();
    }

    fn end(&self, inner: &mut Inner<M>, end: End) {
        inner.state = State::Ended(end);
        inner.doubt = None;
        // It keeps the guest's memory.
        inner.view = None;
        self.changed.notify_all();
    }

    /// As [`Holder::lock`], for commands: the source may know that its guest runs here before the receive
    /// has come back.
    fn lock_for_command(&self) -> Guard<'_, M> {
        self.wait_while(self.lock(), ARRIVAL_PATIENCE, |inner| {
            self.arriving.load(Ordering::SeqCst) && matches!(inner.state, State::Receiving(_))
        })
    }

    fn wait_while<'a>(
        &self,
        inner: Guard<'a, M>,
        patience: Duration,
        mut waits: impl FnMut(&Inner<M>) -> bool,
    ) -> Guard<'a, M> {
        self.changed
            .wait_timeout_while(inner, patience, |inner| waits(inner))
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    fn lock(&self) -> Guard<'_, M> {
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
    /// As in [`Status`].
    fn name(&self) -> &'static str {
        if self.doubt.is_some() { "in-doubt" } else { self.state.name() }
    }
}

impl<M> State<M> {
    fn name(&self) -> &'static str {
        match self {
            Self::Receiving(_) => "receiving",
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Migrating(_) => "migrating",
            Self::Lost(_) => "in-doubt",
            Self::Ended(_) => "ended",
        }
    }

    /// Takes the state out for a moment; the caller, who has the lock, puts one back.
    fn take(&mut self) -> Self {
        std::mem::replace(self, Self::Ended(End::Quit { in_doubt: false }))
    }
}

/// An engine's observer that is a closure.
pub(crate) struct Following<'a>(pub(crate) &'a (dyn Fn(&Progress) + Sync));

impl Observer for Following<'_> {
    fn progress(&self, progress: &Progress) {
        (self.0)(progress);
    }
}

#[cfg(test)]
mod tests;
