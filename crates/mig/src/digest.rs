//! Digests of guest memory, a chunk of 2 MiB at a time, for `--verify`.
//!
//! xxh3 finds a lost page; it is no protection against a peer that lies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mig_core::bitmap::PageRun;
use mig_core::domain::CHUNK_PAGES;
use xxhash_rust::xxh3::xxh3_64;

use crate::memory::{PAGE, Pages};

/// Chunks that are digested to find out how fast that is.
const REHEARSAL_CHUNKS: u64 = 8;

/// A digest of each chunk. The guest must be paused.
pub(crate) fn all_chunks(pages: &Pages) -> Vec<u64> {
    first_chunks(pages, pages.domain().chunks())
}

/// What [`all_chunks`] would take, from a few chunks.
pub(crate) fn expected_cost(pages: &Pages) -> Duration {
    let chunks = pages.domain().chunks();
    let rehearsed = chunks.clamp(1, REHEARSAL_CHUNKS);
    first_chunks(pages, rehearsed); // faults memory and caches in
    let started = Instant::now();
    first_chunks(pages, rehearsed);
    let cost = started.elapsed().as_nanos() * u128::from(chunks) / u128::from(rehearsed);
    Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX))
}

/// The digest of each page of a chunk.
pub(crate) fn pages_of_chunk(pages: &Pages, chunk: u64) -> Vec<u64> {
    let mut page_bytes = [0; PAGE];
    let digest = |page| {
        pages.copy(PageRun { first: page, count: 1 }, &mut page_bytes);
        xxh3_64(&page_bytes)
    };
    pages.domain().chunk_pages(chunk).map(digest).collect()
}

fn first_chunks(pages: &Pages, chunks: u64) -> Vec<u64> {
    let digests: Vec<AtomicU64> = (0..chunks).map(|_| AtomicU64::new(0)).collect();
    let next = AtomicU64::new(0);
    let work = || {
        let mut scratch = vec![0; CHUNK_PAGES as usize * PAGE];
        while let Some((chunk, digest)) = claim(&next, &digests) {
            digest.store(one_chunk(pages, chunk, &mut scratch), Ordering::Relaxed);
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
    digests.into_iter().map(AtomicU64::into_inner).collect()
}

fn claim<'a>(next: &AtomicU64, digests: &'a [AtomicU64]) -> Option<(u64, &'a AtomicU64)> {
    let chunk = next.fetch_add(1, Ordering::Relaxed);
    digests.get(usize::try_from(chunk).ok()?).map(|digest| (chunk, digest))
}

fn one_chunk(pages: &Pages, chunk: u64, scratch: &mut [u8]) -> u64 {
    let range = pages.domain().chunk_pages(chunk);
    let run = PageRun { first: range.start, count: range.end - range.start };
    if run.count == 0 {
        return 0;
    }
    let bytes = &mut scratch[..run.count as usize * PAGE];
    pages.copy(run, bytes);
    xxh3_64(bytes)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::tests::two_regions;

    #[test]
    fn a_changed_byte_changes_the_digest_of_its_chunk_and_page_alone() {
        let (memory, pages) = two_regions(1100, 5);
        let before = all_chunks(&pages);
        let pages_before = pages_of_chunk(&pages, 1);
        memory.write_obj(1u8, GuestAddress(600 * 4096 + 7)).unwrap();
        let after = all_chunks(&pages);
        let differing: Vec<usize> = (0..before.len()).filter(|c| before[*c] != after[*c]).collect();
        assert_eq!((before.len(), differing), (4, vec![1]));
        let pages_after = pages_of_chunk(&pages, 1);
        let differing: Vec<usize> = (0..512).filter(|p| pages_before[*p] != pages_after[*p]).collect();
        assert_eq!(differing, [600 - 512]);
    }
}
