//! Memory full of bytes that the host can tell again: puts them there, and compares them.

use std::ops::Range;

use super::contents::write_page;
use super::image::{read, write};
use super::layout::PAGE_BYTES;
use super::{Fill, Memory, WorkloadError};

/// Pages written or read at a time: large enough for one copy, small enough for a core's cache.
const CHUNK_PAGES: u64 = 64;
const MAX_THREADS: usize = 8;

/// Fills the pages.
pub(super) fn fill(kind: Fill, memory: &Memory, pages: &[Range<u64>]) -> Result<(), WorkloadError> {
    in_parallel(pages, |chunk| write(memory, chunk.start * PAGE_BYTES, &contents(kind, chunk)))
}

/// Compares the pages but for the first `own_bytes` of each, which are the guest's; how many they were.
pub(super) fn verify(
    kind: Fill,
    memory: &Memory,
    pages: &[Range<u64>],
    own_bytes: usize,
) -> Result<u64, WorkloadError> {
    in_parallel(pages, |chunk| {
        let mut expected = contents(kind, chunk.clone());
        let mut found = vec![0; expected.len()];
        read(memory, chunk.start * PAGE_BYTES, &mut found)?;
        let whole = PAGE_BYTES as usize;
        for (expected, found) in expected.chunks_exact_mut(whole).zip(found.chunks_exact(whole)) {
            expected[..own_bytes].copy_from_slice(&found[..own_bytes]);
        }
        if expected == found {
            return Ok(());
        }
        let quadword = |bytes: &[u8], at: usize| {
            u64::from_le_bytes(std::array::from_fn(|i| bytes.get(at * 8 + i).copied().unwrap_or(0)))
        };
        let differing = expected.iter().zip(&found).position(|(a, b)| a != b).unwrap_or(0) / 8;
        let address = chunk.start * PAGE_BYTES + differing as u64 * 8;
        Err(WorkloadError::Changed {
            what: "the fill",
            page: address / PAGE_BYTES,
            address,
            expected: quadword(&expected, differing),
            found: quadword(&found, differing),
        })
    })?;
    Ok(pages.iter().map(|range| range.end - range.start).sum())
}

fn contents(kind: Fill, pages: Range<u64>) -> Vec<u8> {
    let mut bytes = vec![0; (pages.end - pages.start) as usize * PAGE_BYTES as usize];
    let (whole, _) = bytes.as_chunks_mut::<{ PAGE_BYTES as usize }>();
    pages.zip(whole).for_each(|(page, bytes)| write_page(kind, page, bytes));
    bytes
}

/// Calls `f` for every chunk of the pages, on several threads; the first error of the lowest-numbered thread.
fn in_parallel(
    pages: &[Range<u64>],
    f: impl Fn(Range<u64>) -> Result<(), WorkloadError> + Sync,
) -> Result<(), WorkloadError> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    let chunks = || {
        pages.iter().flat_map(|range| {
            range
                .clone()
                .step_by(CHUNK_PAGES as usize)
                .map(move |start| start..(start + CHUNK_PAGES).min(range.end))
        })
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|thread| {
                let f = &f;
                scope.spawn(move || chunks().skip(thread).step_by(threads).try_for_each(f))
            })
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}
