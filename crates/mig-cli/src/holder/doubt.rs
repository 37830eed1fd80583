//! A guest in doubt: nobody here knows whether the other side runs it, or will.
//!
//! It is a phase: of a migration or a receive, whose engine holds the guest meanwhile and ends it as soon as
//! the other side or an arbiter tells; or of a copy that was given to this side and could not be started, which
//! the holder has itself. An operator's word ends it in each of them.

use std::time::{Duration, Instant};

use mig::Word;
use mig::observe::Progress;

use super::{End, Holder, Inner, State};
use crate::event::{self, Event};
use crate::failure::Failure;
use crate::machine::{Held, Machine};
use crate::units::as_ms;

/// How long an operator waits for a word to be obeyed: an arbiter may have to be asked first.
const WORD_PATIENCE: Duration = Duration::from_secs(20);

/// What is known of it.
#[derive(Debug, Clone)]
pub(super) struct Doubt {
    since: Instant,
    asked: u32,
    failure: Failure,
    /// Why the last word was not obeyed.
    refused: Option<Failure>,
    /// Ctrl-C was pressed once since it began.
    pub(super) warned: bool,
}

impl Doubt {
    fn new(asked: u32, failure: Failure) -> Self {
        Self { since: Instant::now(), asked, failure, refused: None, warned: false }
    }

    pub(super) fn shown(&self) -> event::Doubt {
        event::Doubt { for_ms: as_ms(self.since.elapsed()), asked: self.asked, failure: self.failure.clone() }
    }
}

impl<M: Machine> Holder<M> {
    /// The event of what the engine tells; keeps what it says of doubt.
    pub fn follow(&self, progress: &Progress) -> Event {
        match progress {
            Progress::InDoubt { fault, asked } => self.in_doubt(*asked, fault.into()),
            Progress::WordRefused { cause } => {
                let remedy = "look at the other side, which has the guest; discard it here";
                let failure = self.failure("resolve", cause, remedy);
                if let Some(doubt) = &mut self.lock().doubt {
                    doubt.refused = Some(failure.clone());
                }
                self.changed.notify_all();
                Event::WordRefused(failure)
            }
            other => other.into(),
        }
    }

    fn in_doubt(&self, asked: u32, failure: Failure) -> Event {
        let failure = self.with_command(failure);
        let mut inner = self.lock();
        // Whoever wanted an end before did not know of the doubt.
        let doubt = match inner.doubt.take() {
            Some(doubt) => Doubt { asked, failure, ..doubt },
            None => {
                inner.quit_asked = false;
                Doubt::new(asked, failure)
            }
        };
        let event = Event::InDoubt(doubt.shown());
        inner.doubt = Some(doubt);
        event
    }

    /// Takes over a copy that was given to this side, which could not start it. It may be the last one: it is
    /// kept even if the holder was told to quit meanwhile.
    pub fn received_lost(&self, held: Box<dyn Held<M>>, failure: Failure) {
        let failure = self.with_command(failure);
        let mut inner = self.lock();
        let doubt = Doubt::new(0, failure);
        let event = Event::InDoubt(doubt.shown());
        inner.view = held.view().or(inner.view.take());
        inner.doubt = Some(doubt);
        inner.quit_asked = false;
        inner.state = State::Lost(held);
        drop(inner);
        self.changed.notify_all();
        self.output.tell(event);
    }

    /// Obeys an operator's word on a guest in doubt. Comes back when that is done, with the new state's name.
    ///
    /// # Errors
    /// The guest is not in doubt, or it still is: the word was refused, or has had no effect yet.
    pub fn resolve(&self, word: Word) -> Result<String, Failure> {
        let mut inner = self.lock_for_command();
        let name = inner.name();
        let Some(doubt) = &mut inner.doubt else { return Err(self.wrong_state("resolve", name)) };
        doubt.refused = None;
        let since = doubt.since;
        if let State::Migrating(control) | State::Receiving(control) = &inner.state {
            control.resolve(word);
            let settled = |doubt: &Doubt| doubt.since != since || doubt.refused.is_some();
            inner = self
                .wait_while(inner, WORD_PATIENCE, |inner| inner.doubt.as_ref().is_some_and(|d| !settled(d)));
        } else {
            self.resolve_lost(&mut inner, word);
        }
        match &inner.doubt {
            Some(doubt) if doubt.since == since => Err(doubt.refused.clone().unwrap_or_else(|| {
                self.failure(
                    "resolve",
                    "the word has had no effect yet",
                    "see with status what becomes of it",
                )
            })),
            _ => Ok(inner.name().into()),
        }
    }

    /// The same for a copy that the holder has itself.
    fn resolve_lost(&self, inner: &mut Inner<M>, word: Word) {
        let held = match inner.state.take() {
            State::Lost(held) => held,
            other => return inner.state = other,
        };
        match word {
            Word::Discard => self.end(inner, End::Quit { in_doubt: true }),
            Word::Resume => match held.resume() {
                Ok(machine) => {
                    inner.view = Some(machine.view());
                    inner.doubt = None;
                    inner.state = State::Running(machine);
                }
                Err((held, e)) => {
                    inner.state = State::Lost(held);
                    if let Some(doubt) = &mut inner.doubt {
                        doubt.refused = Some(self.failed("resume", &*e));
                    }
                }
            },
        }
        self.changed.notify_all();
    }

    /// Discards a guest in doubt, since its holder is to end; it ends when that is done.
    pub(super) fn quit_in_doubt(&self, inner: &mut Inner<M>) {
        inner.quit_asked = true;
        match &inner.state {
            State::Migrating(control) | State::Receiving(control) => control.resolve(Word::Discard),
            _ => self.resolve_lost(inner, Word::Discard),
        }
    }

    /// What to do, with the words for it.
    fn with_command(&self, failure: Failure) -> Failure {
        let Some(control) = self.control.get() else { return failure };
        let command = format!("mig-send --vm {control} --resolve resume|discard");
        Failure { remedy: format!("{}. By: {command}", failure.remedy), ..failure }
    }
}
