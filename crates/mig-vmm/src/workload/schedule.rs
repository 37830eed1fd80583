//! The order in which a dirtier visits its pages, as the tables that it walks.
//!
//! A *batch* is up to sixteen pages, each page in exactly one batch. A *step* visits a batch: it raises the
//! generation of each of the batch's pages by one. A vCPU walks its steps from first to last, a *lap*, for
//! ever. So the generation of every page follows from how many pages the vCPU has written so far, which is
//! what it keeps in its control page: host and guest need no list of generations to know a stale page.

use super::Pattern;
use super::contents::split_mix;
use super::layout::PAGE_BYTES;

/// Pages in a full batch.
pub(super) const BATCH_PAGES: usize = 16;
/// Bytes of a batch: entry point in the code, sum of the stamps in generation 0, number of pages, addresses
/// (aligned to the end).
pub(super) const BATCH_BYTES: u64 = BATCH_ADDRESSES + BATCH_PAGES as u64 * 8;
pub(super) const BATCH_SUM: u64 = 8;
pub(super) const BATCH_COUNT: u64 = 16;
pub(super) const BATCH_ADDRESSES: u64 = 24;
/// Bytes of a step: the batch's address, the generation its pages have before the step in lap 0, and by how
/// much that grows from lap to lap.
pub(super) const STEP_BYTES: u64 = 16;
pub(super) const STEP_GENERATION: u64 = 8;
pub(super) const STEP_GENERATIONS_PER_LAP: u64 = 12;

/// How often a lap of [`Pattern::Hot`] visits the first tenth: nine tenths of the writes go there when it is
/// 81 times, since 0.1 * 81 = 9 * 0.9.
const HOT_VISITS: usize = 81;

/// The stamp of a page: its number in the upper 28 bits, its generation in the lower 36.
pub(super) const fn stamp(page: u64, generation: u64) -> u64 {
    (page << GENERATION_BITS).wrapping_add(generation)
}

pub(super) const GENERATION_BITS: u32 = 36;

/// What one vCPU does.
pub(super) struct Share {
    /// Page numbers.
    pub(super) batches: Vec<Vec<u64>>,
    pub(super) steps: Vec<Step>,
}

/// One visit.
#[derive(Clone, Copy)]
pub(super) struct Step {
    /// Index of the batch.
    pub(super) batch: usize,
    pub(super) generation: u32,
    pub(super) generations_per_lap: u32,
}

impl Share {
    /// The share of a vCPU that writes `pages`.
    pub(super) fn new(pattern: Pattern, pages: &[u64]) -> Self {
        let mut pages = pages.to_vec();
        if pattern == Pattern::Random {
            let mut state = pages.len() as u64;
            for last in (1..pages.len()).rev() {
                pages.swap(last, (split_mix(&mut state) % (last as u64 + 1)) as usize);
            }
        }
        let hot = if pattern == Pattern::Hot { pages.len().div_ceil(10) } else { 0 };
        let batched = |pages: &[u64]| pages.chunks(BATCH_PAGES).map(<[u64]>::to_vec).collect::<Vec<_>>();
        let mut batches = batched(&pages[..hot]);
        let hot_batches = batches.len();
        batches.extend(batched(&pages[hot..]));
        let visits = if hot_batches == 0 { 1 } else { HOT_VISITS };
        let cold = batches.len() - hot_batches;
        let mut steps = Vec::new();
        for visit in 0..visits {
            steps.extend((0..hot_batches).map(|batch| Step {
                batch,
                generation: visit as u32,
                generations_per_lap: HOT_VISITS as u32,
            }));
            steps.extend((cold * visit / visits..cold * (visit + 1) / visits).map(|batch| Step {
                batch: hot_batches + batch,
                generation: 0,
                generations_per_lap: 1,
            }));
        }
        Self { batches, steps }
    }

    /// Bytes of the tables.
    pub(super) fn bytes(&self) -> u64 {
        self.batches.len() as u64 * BATCH_BYTES + self.steps.len() as u64 * STEP_BYTES
    }

    /// Where the steps start in tables at `address`.
    pub(super) fn steps_at(&self, address: u64) -> u64 {
        address + self.batches.len() as u64 * BATCH_BYTES
    }

    /// The tables as they lie at `address`; `entries[i]` is the code that visits the last pages from slot `i`.
    pub(super) fn tables(&self, address: u64, entries: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.bytes() as usize);
        let mut put = |quadword: u64| bytes.extend(quadword.to_le_bytes());
        for batch in &self.batches {
            let unused = BATCH_PAGES - batch.len();
            put(entries[unused]);
            put(batch.iter().fold(0, |sum, page| sum.wrapping_add(stamp(*page, 0))));
            put(batch.len() as u64);
            (0..unused).for_each(|_| put(0));
            batch.iter().for_each(|page| put(page * PAGE_BYTES));
        }
        for step in &self.steps {
            put(address + step.batch as u64 * BATCH_BYTES);
            put(u64::from(step.generation) | u64::from(step.generations_per_lap) << 32);
        }
        bytes
    }

    /// After `written` page writes: the generation of each batch, and the batch whose visit has begun at most.
    /// `None` when the vCPU cannot have counted so, because it counts whole batches.
    pub(super) fn after(&self, written: u64) -> Option<(Vec<u64>, usize)> {
        let batch_of = |step: &Step| self.batches[step.batch].len() as u64;
        let per_lap: u64 = self.steps.iter().map(batch_of).sum();
        let (lap, mut rest) = (written / per_lap, written % per_lap);
        let mut generations = vec![0; self.batches.len()];
        for step in &self.steps {
            generations[step.batch] = lap * u64::from(step.generations_per_lap);
        }
        for step in &self.steps {
            if rest == 0 {
                return Some((generations, step.batch));
            }
            rest = rest.checked_sub(batch_of(step))?;
            generations[step.batch] += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_finds_the_generation_that_the_steps_before_it_left() {
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Hot] {
            for pages in [1, 2, 16, 17, 333, 4000] {
                let share = Share::new(pattern, &(1000..1000 + pages).collect::<Vec<_>>());
                let mut generations = vec![0; share.batches.len()];
                let mut written = 0;
                for lap in 0..3 {
                    for step in &share.steps {
                        let (known, current) = share.after(written).unwrap();
                        assert_eq!((&known, current), (&generations, step.batch));
                        let expected = u64::from(step.generation) + lap * u64::from(step.generations_per_lap);
                        assert_eq!(generations[step.batch], expected, "{pattern} {pages}");
                        generations[step.batch] += 1;
                        written += share.batches[step.batch].len() as u64;
                        if share.batches[step.batch].len() > 1 {
                            assert!(share.after(written - 1).is_none());
                        }
                    }
                    if pages == 4000 && pattern == Pattern::Hot {
                        break; // quadratic
                    }
                }
            }
        }
    }

    #[test]
    fn every_page_is_in_one_batch_and_hot_pages_get_nine_writes_in_ten() {
        for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Hot] {
            let pages: Vec<u64> = (500..1500).collect();
            let share = Share::new(pattern, &pages);
            let mut all = share.batches.concat();
            assert_eq!(all == pages, pattern != Pattern::Random);
            all.sort_unstable();
            assert_eq!(all, pages);
            if pattern == Pattern::Hot {
                let visited = share.steps.iter().flat_map(|step| &share.batches[step.batch]);
                let hot = visited.clone().filter(|page| **page < 600).count();
                assert_eq!(hot * 10, visited.count() * 9);
            }
        }
    }
}
