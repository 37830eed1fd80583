//! Which thread of a CPU goes first.

#![allow(unsafe_code)]

/// Has this thread run at once when it wakes. Where that is not allowed it is as any other.
pub(crate) fn before_all_others() {
    let priority = libc::sched_param { sched_priority: 1 };
    // SAFETY: reads one sched_param; 0 is the calling thread.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
}

/// Has this thread run when no other wants to.
pub(crate) fn after_all_others() {
    // SAFETY: takes numbers only; 0 is the calling thread.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 19) };
}
