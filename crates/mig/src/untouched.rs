//! Which pages were never touched: they are zeros that need not be read, and have no memory yet.
//!
//! The kernel's documentation of `/proc/pid/pagemap` (Documentation/admin-guide/mm/pagemap.rst): a word a page of
//! the address space, with bit 63 for a page that is present and bit 62 for one that is swapped out. In private
//! anonymous memory of ordinary pages, huge ones that the kernel makes by itself among them, a page that is neither was
//! never written: one that is being moved shows as swapped. That the memory is so, the embedder says
//! ([`crate::GuestRam::skip_untouched`]).
//!
//! A page that is touched after it was looked at is found by the dirty log, as if it had been read before.

use std::fs::File;
use std::os::unix::fs::FileExt;

use mig_core::bitmap::PageRun;

use crate::memory::Pages;

const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
const ENTRY_BYTES: usize = 8;
/// Runs of fewer pages are read outright: pages dirtied here and there were touched.
const MIN_PAGES: u64 = 16;

/// Looks at a run of pages at a time.
pub(crate) struct Untouched {
    /// Absent where the owner did not allow it, or the host does not show it.
    pagemap: Option<File>,
    run: PageRun,
    entries: Vec<u8>,
}

impl Untouched {
    pub(crate) fn new(pages: &Pages) -> Self {
        let pagemap = if pages.skips_untouched() { File::open("/proc/self/pagemap").ok() } else { None };
        Self { pagemap, run: PageRun { first: 0, count: 0 }, entries: Vec::new() }
    }

    /// Looks at `run`, which [`Untouched::contains`] is then about.
    pub(crate) fn look(&mut self, pages: &Pages, run: PageRun) {
        self.run = run;
        self.entries.clear();
        let Some(pagemap) = self.pagemap.as_ref().filter(|_| run.count >= MIN_PAGES) else { return };
        self.entries.resize(run.count as usize * ENTRY_BYTES, 0);
        let at = pages.host_page(run) * ENTRY_BYTES as u64;
        if pagemap.read_exact_at(&mut self.entries, at).is_err() {
            self.entries.clear();
        }
    }

    /// Whether a page was never touched, as far as that is known.
    pub(crate) fn contains(&self, page: u64) -> bool {
        let index = page.checked_sub(self.run.first).and_then(|i| usize::try_from(i).ok());
        let entry = index.and_then(|i| self.entries.as_chunks::<ENTRY_BYTES>().0.get(i));
        entry.is_some_and(|entry| u64::from_le_bytes(*entry) & PRESENT_OR_SWAPPED == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::GuestRam;
    use crate::memory::PAGE;

    fn memory() -> (Arc<GuestMemoryMmap>, GuestRam) {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 * PAGE)]).unwrap());
        (memory.clone(), GuestRam::from_vm_memory(memory))
    }

    const ALL: PageRun = PageRun { first: 0, count: 64 };

    #[test]
    fn a_page_is_untouched_until_it_is_read_or_written_and_looking_touches_none() {
        let (memory, ram) = memory();
        let pages = Pages::new(ram.skip_untouched()).unwrap();
        let mut untouched = Untouched::new(&pages);
        memory.write_obj(1u8, GuestAddress(7 * 4096)).unwrap();
        for _ in 0..2 {
            untouched.look(&pages, ALL);
            let touched: Vec<u64> = (0..64).filter(|page| !untouched.contains(*page)).collect();
            assert_eq!(touched, [7]);
        }
        assert!(pages.is_zero(9));
        untouched.look(&pages, ALL);
        assert!(!untouched.contains(9) && untouched.contains(8));
        assert!(!untouched.contains(64), "nothing is known of pages that were not looked at");
    }

    #[test]
    fn without_the_owners_word_every_page_counts_as_touched() {
        let (_memory, ram) = memory();
        let pages = Pages::new(ram).unwrap();
        let mut untouched = Untouched::new(&pages);
        untouched.look(&pages, ALL);
        assert!((0..64).all(|page| !untouched.contains(page)));
    }
}
