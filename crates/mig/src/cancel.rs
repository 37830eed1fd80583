//! One token that ends a migration or a receive from any thread, at any moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

type Hook = Box<dyn Fn() + Send>;

/// Cancels what it was given to; cheap to clone, and all clones are one token.
#[derive(Clone, Default)]
pub struct Cancel {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    cancelled: AtomicBool,
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
            hook();
        }
    }

    /// Whether somebody has cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::SeqCst)
    }

    /// Has `hook` called on cancel (at once, if that has happened) until the guard is dropped. One hook at
    /// a time: a token serves one migration.
    pub(crate) fn on_cancel(&self, hook: impl Fn() + Send + 'static) -> HookGuard {
        *self.hook() = Some(Box::new(hook));
        if self.is_cancelled()
            && let Some(hook) = &*self.hook()
        {
            hook();
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
