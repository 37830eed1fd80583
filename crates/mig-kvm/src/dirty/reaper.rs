//! Takes entries out of the rings before they are full, once one has run over.
//!
//! A KVM that interprets many instructions in one go fills what it keeps back, and every ring that is full has
//! lost entries ([`super::ring`]): all pages are reported then. Here rings are emptied from a quarter on: 65,536
//! entries have room for what kvm_pvm interprets in 25 ms at least (2 million instructions a second), at one write
//! each. Elsewhere a ring never runs over, and a vCPU that fills its ring empties it itself; a page that is written
//! over and over makes no new entries meanwhile.

use std::sync::Arc;
use std::thread::JoinHandle;

use super::ring_log::Rings;
use crate::error::KvmError;

/// The thread, from the start of a log to its end.
pub(super) struct Reaper {
    rings: Arc<Rings>,
    thread: Option<JoinHandle<()>>,
}

impl Reaper {
    pub(super) fn start(rings: Arc<Rings>) -> Result<Self, KvmError> {
        rings.reap_from_now(true);
        let reaping = rings.clone();
        let thread = std::thread::Builder::new().name("dirty-rings".into()).spawn(move || reaping.reap());
        match thread {
            Ok(thread) => Ok(Self { rings, thread: Some(thread) }),
            Err(source) => Err(KvmError::Thread { source }),
        }
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        self.rings.reap_from_now(false);
        if let Some(thread) = self.thread.take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}
