//! One token that ends a migration or a receive from any thread, at any moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Is told the reason, if there is one.
type Hook = Box<dyn Fn(Option<String>) + Send>;

/// Cancels what it was given to; cheap to clone, and all clones are one token.
#[derive(Clone, Default)]
pub struct Cancel {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
    reason: OnceLock<String>,
    hook: Mutex<Option<Hook>>,
}

impl Cancel {
    /// A token that nobody has cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels. Returns at once; the migration ends by itself, with the guest still here, unless it has
    /// been committed already.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::SeqCst);
        if let Some(hook) = &*self.hook() {
            hook(self.reason());
        }
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

    /// Why it was cancelled, if a reason was given.
    pub fn reason(&self) -> Option<String> {
        self.shared.reason.get().cloned()
    }

    /// Whether somebody has cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    /// Has `hook` called on cancel (at once, if that has happened) until the guard is dropped. One hook at
    /// a time: a token serves one migration.
    pub(crate) fn on_cancel(&self, hook: impl Fn(Option<String>) + Send + 'static) -> HookGuard {
        *self.hook() = Some(Box::new(hook));
        if self.is_cancelled()
            && let Some(hook) = &*self.hook()
        {
            hook(self.reason());
        }
        HookGuard { cancel: self.clone() }
    }

    fn hook(&self) -> std::sync::MutexGuard<'_, Option<Hook>> {
        self.shared.hook.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Cancel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cancel").field("cancelled", &self.is_cancelled()).finish()
    }
}

/// Takes the hook back when it is dropped.
pub(crate) struct HookGuard {
    cancel: Cancel,
}

impl Drop for HookGuard {
    fn drop(&mut self) {
        *self.cancel.hook() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts_and_none_that_comes_after_a_plain_cancel() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&told);
        let cancel = Cancel::new();
        let hook = cancel.on_cancel(move |reason| notes.lock().unwrap().push(reason));
        cancel.cancel_because("one");
        cancel.cancel_because("two");
        drop(hook);
        assert_eq!((cancel.reason(), cancel.is_cancelled()), (Some("one".into()), true));
        assert_eq!(*told.lock().unwrap(), [Some("one".to_owned()), Some("one".to_owned())]);
        let plain = Cancel::new();
        plain.cancel();
        plain.cancel_because("late");
        assert_eq!(plain.reason(), None);
    }
}
