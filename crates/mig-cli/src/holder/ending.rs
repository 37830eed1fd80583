//! How a holder comes to its end: its guest ends by itself, or somebody presses Ctrl-C; and waiting for it.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::{End, Holder, Interrupted, State};
use crate::machine::{GuestEnd, Machine};

/// How often a guest's own end is looked for.
const WATCH_INTERVAL: Duration = Duration::from_millis(100);

impl<M: Machine> Holder<M> {
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
                    State::Receiving(_) | State::Lost(_) => None,
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
                self.end(&mut inner, End::Guest(end));
            }
            // The engine has the machine, and gives it back when it has told the destination.
            State::Migrating(control) => {
                if !control.is_cancelled() {
                    control.cancel_because(end.reason);
                }
                inner.state = State::Migrating(control);
            }
            other => inner.state = other,
        }
    }

    /// Ctrl-C. A migration is cancelled first, and a guest in doubt is discarded on the second one only.
    pub fn interrupt(&self) -> Interrupted {
        let mut inner = self.lock();
        let (quit_asked, in_doubt) = (inner.quit_asked, inner.doubt.is_some());
        if let Some(doubt) = &mut inner.doubt
            && !std::mem::replace(&mut doubt.warned, true)
        {
            self.output.note("the guest held here may be the last copy. Ctrl-C again discards it");
            return Interrupted::Handled;
        }
        match &inner.state {
            State::Ended(_) => return Interrupted::Ended,
            State::Migrating(_) | State::Receiving(_) if quit_asked => {
                return Interrupted::ExitNow { in_doubt };
            }
            State::Migrating(control) if !in_doubt && !control.is_cancelled() => {
                control.cancel();
                self.output.note("cancelling the migration; the guest stays. Ctrl-C again ends it");
            }
            State::Migrating(_) if !in_doubt => inner.quit_asked = true,
            _ => {
                drop(inner);
                // It may have ended in this moment, which is what was wanted.
                let _ = self.quit();
            }
        }
        Interrupted::Handled
    }
}
