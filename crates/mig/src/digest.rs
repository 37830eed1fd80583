//! Digests of guest memory, a chunk of 2 MiB at a time, for `--verify`.
//!
//! xxh3 finds a lost page; it is no protection against a peer that lies.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mig_core::bitmap::PageRun;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

use crate::memory::{PAGE, Pages};

/// Pages that are copied out at a time: so few that they are still in the core's own cache when they are
/// digested.
const PIECE_PAGES: u64 = 8;
/// Chunks that are digested to find out how fast that is.
const REHEARSAL_CHUNKS: u64 = 16;

/// A digest of each chunk. The guest must be paused.
pub(crate) fn all_chunks(pages: &Pages) -> Vec<u64> {
    chosen_chunks(pages, pages.domain().chunks(), 1)
}

/// What [`all_chunks`] would take, from a few chunks all over memory: neighbours would be in a cache.
pub(crate) fn expected_cost(pages: &Pages) -> Duration {
    let chunks = pages.domain().chunks();
    let rehearsed = chunks.min(REHEARSAL_CHUNKS);
    let started = Instant::now();
    chosen_chunks(pages, rehearsed, chunks / rehearsed);
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

/// Every `stride`th chunk, `chunks` of them.
fn chosen_chunks(pages: &Pages, chunks: u64, stride: u64) -> Vec<u64> {
    let digests: Vec<AtomicU64> = (0..chunks).map(|_| AtomicU64::new(0)).collect();
    let next = AtomicU64::new(0);
    let work = || {
        let mut scratch = vec![0; PIECE_PAGES as usize * PAGE];
        while let Some((chunk, digest)) = claim(&next, &digests) {
            digest.store(one_chunk(pages, chunk * stride, &mut scratch), Ordering::Relaxed);
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
    let mut digest = Xxh3Default::new();
    let mut first = range.start;
    while first < range.end {
        let run = PageRun { first, count: PIECE_PAGES.min(range.end - first) };
        let bytes = &mut scratch[..run.count as usize * PAGE];
        pages.copy(run, bytes);
        digest.update(bytes);
        first += run.count;
    }
    digest.digest()
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::tests::two_regions;

    #[test]
    fn digests_are_xxh3_of_each_chunks_bytes() {
        let (memory, pages) = two_regions(1100, 5);
        let bytes: Vec<u8> = (0..1100 * PAGE).map(|at| (at / 7 % 251) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let chunk = 512 * PAGE;
        let whole = [&bytes[..chunk], &bytes[chunk..2 * chunk], &bytes[2 * chunk..]];
        assert_eq!(all_chunks(&pages)[..3], whole.map(xxh3_64));
    }

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
