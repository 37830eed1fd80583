//! Many cases that mostly wait, a few at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Runs all cases, `at_once` of them at a time; gives their results in order.
///
/// # Panics
/// One did. Those that were under way are ended first, and others not begun.
pub fn run<C: Sync + std::fmt::Debug, R: Send>(
    cases: &[C],
    at_once: usize,
    run: impl Fn(&C) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let results: Vec<Mutex<Option<R>>> = cases.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed)
                    && let index = next.fetch_add(1, Ordering::Relaxed)
                    && let Some((case, result)) = cases.get(index).zip(results.get(index))
                {
                    match catch_unwind(AssertUnwindSafe(|| run(case))) {
                        Ok(found) => *result.lock().unwrap() = Some(found),
                        Err(_) => {
                            eprintln!("FAILED: {case:?}");
                            failed.store(true, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    assert!(!failed.into_inner(), "a case failed, see above");
    results.into_iter().filter_map(|r| r.into_inner().unwrap()).collect()
}
