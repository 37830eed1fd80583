//! Many cases that mostly wait, a few at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs all cases, `at_once` of them at a time; gives their results in order.
///
/// # Panics
/// One did. All are run before.
pub fn run<C: Sync + std::fmt::Debug, R: Send>(
    cases: &[C],
    at_once: usize,
    run: impl Fn(&C) -> R + Sync,
) -> Vec<R> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<R>>> = cases.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                while let Some((case, result)) = {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    cases.get(index).zip(results.get(index))
                } {
                    match catch_unwind(AssertUnwindSafe(|| run(case))) {
                        Ok(found) => *result.lock().unwrap() = Some(found),
                        Err(_) => eprintln!("FAILED: {case:?}"),
                    }
                }
            });
        }
    });
    let failed: Vec<&C> =
        cases.iter().zip(&results).filter(|(_, r)| r.lock().unwrap().is_none()).map(|(c, _)| c).collect();
    assert!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), cases.len());
    results.into_iter().filter_map(|r| r.into_inner().unwrap()).collect()
}
