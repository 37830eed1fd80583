//! An allocator that counts: what a piece of code allocates at most, and what it leaves behind.
//!
//! Counts by thread, so that tests which run beside each other do not disturb each other; memory that is freed
//! by another thread than its maker's is counted wrong, and nothing measured here does that.

#![allow(unsafe_code)] // GlobalAlloc is an unsafe trait

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    // `const` and without a destructor: touching them allocates nothing
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator with counters: `#[global_allocator] static HEAP: Counting = Counting;`.
#[derive(Debug)]
pub struct Counting;

/// What was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// The most bytes at a time, beyond those that were there before.
    pub peak_bytes: usize,
    /// The bytes that are still there.
    pub kept_bytes: usize,
}

// SAFETY: every call is handed on to the system's allocator as it is; the counters are not memory of it.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the contract is the trait's, as the system's allocator has it.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the contract is the trait's, as the system's allocator has it.
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    // SAFETY: the contract is the trait's, as the system's allocator has it.
    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(memory, layout) }
    }

    // SAFETY: the contract is the trait's, as the system's allocator has it.
    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, bytes: usize) -> *mut u8 {
        // both exist for a moment, or may
        count(bytes as isize);
        count(-(layout.size() as isize));
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(memory, layout, bytes) }
    }
}

fn count(bytes: isize) {
    let live = LIVE.get() + bytes;
    LIVE.set(live);
    PEAK.set(PEAK.get().max(live));
}

/// Bytes that this thread has allocated and not freed; 0 when nothing counts.
pub fn live_bytes() -> isize {
    LIVE.get()
}

/// What `work` allocates. Measurements may contain each other.
pub fn measure<T>(work: impl FnOnce() -> T) -> (T, Usage) {
    let (live, outer) = (LIVE.get(), PEAK.get());
    PEAK.set(live);
    let result = work();
    let usage = Usage {
        peak_bytes: usize::try_from(PEAK.get() - live).unwrap_or(0),
        kept_bytes: usize::try_from(LIVE.get() - live).unwrap_or(0),
    };
    PEAK.set(PEAK.get().max(outer));
    (result, usage)
}

/// Whether [`Counting`] is the program's allocator; without it every measurement is 0.
pub fn is_counted() -> bool {
    let (bytes, _) = measure(|| std::hint::black_box(vec![0u8; 100]));
    let (_, usage) = measure(|| std::hint::black_box(bytes.clone()));
    usage.kept_bytes == 100
}
