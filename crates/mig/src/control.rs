//! One token that steers a migration or a receive from any thread: ends it, or takes an operator's word.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use mig_core::Word;

/// What a driver is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// To end, for this reason if there is one.
    Cancel(Option<String>),
    /// What to do with a guest in doubt.
    Resolve(Word),
    /// To send at most so many bytes a second from now on, or as many as go.
    Bandwidth(Option<u64>),
}

type Hook = Box<dyn Fn(Order) + Send>;

/// Steers what it was given to; cheap to clone, and all clones are one token.
#[derive(Clone, Default)]
pub struct Control {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    reason: OnceLock<String>,
    word: Mutex<Option<Word>>,
    bandwidth: Mutex<Option<Option<u64>>>,
    hook: Mutex<Option<Hook>>,
}

impl Control {
    /// A token that nobody has used.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. Returns at once; the migration ends by itself, with the guest still here, unless it has
    /// been committed already.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        self.give(Order::Cancel(self.reason()));
    }

    /// Cancels for a reason, which the report then gives as the cause; the first one counts. For a VMM whose
    /// guest has ended by itself: what is left of it is not worth moving.
    pub fn cancel_because(&self, reason: impl Into<String>) {
        // The first reason counts, and none once it was cancelled without.
        if !self.is_cancelled() {
            let _ = self.shared.reason.set(reason.into());
        }
        self.cancel();
    }

    /// An operator's word on a guest that is in doubt ([`Progress::InDoubt`]); two guests run if
    /// [`Word::Resume`] is wrong. Returns at once, and means nothing to a guest that is not in doubt. With an
    /// arbiter that knows better the word is refused ([`Progress::WordRefused`]).
    ///
    /// [`Progress::InDoubt`]: crate::observe::Progress::InDoubt
    /// [`Progress::WordRefused`]: crate::observe::Progress::WordRefused
    pub fn resolve(&self, word: Word) {
        *self.shared.word.lock().unwrap_or_else(PoisonError::into_inner) = Some(word);
        self.give(Order::Resolve(word));
    }

    /// Changes the cap over all page channels of the rounds that are under way, in bytes a second ([`Bandwidth`]); what
    /// the pause may take stays as it was. Returns at once, and means nothing to a receive.
    ///
    /// [`Bandwidth`]: crate::pacing::Bandwidth
    pub fn change_bandwidth(&self, cap_bytes_per_second: Option<u64>) {
        *self.shared.bandwidth.lock().unwrap_or_else(PoisonError::into_inner) = Some(cap_bytes_per_second);
        self.give(Order::Bandwidth(cap_bytes_per_second));
    }

    /// Why it was cancelled, if a reason was given.
    pub fn reason(&self) -> Option<String> {
        self.shared.reason.get().cloned()
    }

    /// The last word that was given, whether or not it meant anything.
    pub fn word(&self) -> Option<Word> {
        *self.shared.word.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether somebody has cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    fn give(&self, order: Order) {
        if let Some(hook) = &*self.hook() {
            hook(order);
        }
    }

    /// Has `hook` called with each order (with a cancel or a bandwidth that was given before, at once) until the guard is
    /// dropped. One hook at a time: a token serves one migration.
    pub(crate) fn on_order(&self, hook: impl Fn(Order) + Send + 'static) -> HookGuard {
        *self.hook() = Some(Box::new(hook));
        if self.is_cancelled() {
            self.give(Order::Cancel(self.reason()));
        }
        if let Some(cap) = *self.shared.bandwidth.lock().unwrap_or_else(PoisonError::into_inner) {
            self.give(Order::Bandwidth(cap));
        }
        HookGuard { control: self.clone() }
    }

    fn hook(&self) -> std::sync::MutexGuard<'_, Option<Hook>> {
        self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("cancelled", &self.is_cancelled()).finish()
    }
}

/// Takes the hook back when it is dropped.
pub(crate) struct HookGuard {
    control: Control,
}

impl Drop for HookGuard {
    fn drop(&mut self) {
        *self.control.hook() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bandwidth_that_was_given_before_the_migration_began_is_told_as_it_begins() {
        let (control, told) = (Control::new(), Arc::new(Mutex::new(Vec::new())));
        control.change_bandwidth(Some(1));
        control.change_bandwidth(None);
        let notes = Arc::clone(&told);
        let _hook = control.on_order(move |order| notes.lock().unwrap().push(order));
        assert_eq!(*told.lock().unwrap(), [Order::Bandwidth(None)]);
    }

    #[test]
    fn the_first_reason_counts_and_none_that_comes_after_a_plain_cancel() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&told);
        let control = Control::new();
        let hook = control.on_order(move |order| notes.lock().unwrap().push(order));
        control.cancel_because("one");
        control.cancel_because("two");
        control.resolve(Word::Discard);
        drop(hook);
        control.resolve(Word::Resume);
        assert_eq!((control.reason(), control.is_cancelled()), (Some("one".into()), true));
        let one = || Order::Cancel(Some("one".into()));
        assert_eq!(*told.lock().unwrap(), [one(), one(), Order::Resolve(Word::Discard)]);
        let plain = Control::new();
        plain.cancel();
        plain.cancel_because("late");
        assert_eq!(plain.reason(), None);
    }
}
