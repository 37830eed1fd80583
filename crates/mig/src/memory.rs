//! Guest memory as the kernel and volatile accesses see it: never as a Rust reference.
//!
//! Invariant: every mapping stays valid while its [`GuestRam`] (or a clone) lives, because it keeps the
//! owner alive.

#![allow(unsafe_code)]

use std::any::Any;
use std::io;
use std::sync::Arc;

use mig_core::bitmap::PageRun;
use mig_core::domain::{Domain, DomainError, PAGE_BYTES};
use mig_wire::describe::Region;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Bytes in a page, as a size in memory.
pub(crate) const PAGE: usize = PAGE_BYTES as usize;

/// One mapped region of guest memory.
#[derive(Debug, Clone, Copy)]
struct Mapping {
    region: Region,
    host: *mut u8,
}

/// A guest's memory, mapped into this process; cheap to clone.
#[derive(Clone)]
pub struct GuestRam {
    mappings: Arc<[Mapping]>,
    skips_untouched: bool,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the pointers are used for volatile accesses and system calls only, from any thread; the memory they
// point to is kept mapped by the owner.
unsafe impl Send for GuestRam {}
// SAFETY: as above; concurrent volatile accesses to guest memory are what a guest's own vCPUs do.
unsafe impl Sync for GuestRam {}

impl std::fmt::Debug for GuestRam {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.mappings.iter()).finish()
    }
}

impl GuestRam {
    /// The memory of a `vm-memory` guest, whatever tracks the VMM's own writes to it.
    ///
    /// # Panics
    /// When a region has no host address, which mmap regions always have.
    pub fn from_vm_memory<B>(memory: Arc<GuestMemoryMmap<B>>) -> Self
    where
        B: vm_memory::bitmap::Bitmap + Send + Sync + 'static,
        GuestMemoryMmap<B>: GuestMemoryBackend + Send + Sync,
    {
        let mappings = memory
            .iter()
            .map(|r| Mapping {
                region: Region { guest_address: r.start_addr().0, bytes: r.len() },
                host: memory
                    .get_host_address(GuestAddress(r.start_addr().0))
                    .expect("mmap regions are mapped"),
            })
            .collect();
        Self { mappings, skips_untouched: false, _owner: memory }
    }

    /// The owner's word that this memory is private, anonymous and filled through its mappings only: no file,
    /// no other process and no `userfaultfd` stands behind it, and it is not of hugetlbfs pages (`MAP_HUGETLB`: of
    /// those the kernel shows one that it is moving as if it had never been touched). Then a page that was never
    /// touched is known to be zero, and a source neither reads it nor has the host find a page for it. Given
    /// wrongly, pages are lost.
    #[must_use]
    pub fn skip_untouched(self) -> Self {
        Self { skips_untouched: true, ..self }
    }

    /// The regions, ascending.
    pub fn regions(&self) -> Vec<Region> {
        self.mappings.iter().map(|m| m.region).collect()
    }
}

/// Guest memory by page index.
#[derive(Debug, Clone)]
pub(crate) struct Pages {
    ram: GuestRam,
    domain: Domain,
}

impl Pages {
    pub(crate) fn new(ram: GuestRam) -> Result<Self, DomainError> {
        let domain = Domain::new(&ram.regions())?;
        Ok(Self { ram, domain })
    }

    pub(crate) fn domain(&self) -> &Domain {
        &self.domain
    }

    /// Where a run of pages is mapped.
    ///
    /// # Panics
    /// When the pages do not all exist, in one region: callers have checked a peer's runs before.
    fn host(&self, run: PageRun) -> *mut u8 {
        assert!(self.domain.holds(run.first, run.count), "pages {run:?} are not in the domain");
        let extents = self.domain.extents();
        let at = extents.partition_point(|e| e.first_page <= run.first) - 1;
        let offset = (run.first - extents[at].first_page) * PAGE_BYTES;
        // SAFETY: the run lies within the extent, which is as long as the mapping of the same index.
        unsafe { self.ram.mappings[at].host.add(offset as usize) }
    }

    /// A run of pages for `readv` and `writev`. The kernel reads and writes them; they stay mapped while
    /// `self` lives.
    pub(crate) fn iovec(&self, run: PageRun) -> libc::iovec {
        libc::iovec { iov_base: self.host(run).cast(), iov_len: run.count as usize * PAGE }
    }

    /// Whether the owner lets pages that were never touched count as zeros.
    pub(crate) fn skips_untouched(&self) -> bool {
        self.ram.skips_untouched
    }

    /// Where a run of pages lies among all pages of this process's address space: its index in
    /// `/proc/self/pagemap`.
    pub(crate) fn host_page(&self, run: PageRun) -> u64 {
        self.host(run) as u64 / PAGE_BYTES
    }

    /// Has the host find memory for a run of pages, in as large pieces as it may, changing no content.
    ///
    /// # Errors
    /// The host has none (ENOMEM), or what it had is broken (EHWPOISON).
    pub(crate) fn populate(&self, run: PageRun) -> io::Result<()> {
        let (start, bytes) = (self.host(run).cast(), run.count as usize * PAGE);
        // SAFETY: the range lies in one mapping, which stays while `self` lives; populating it changes no content.
        match unsafe { libc::madvise(start, bytes, libc::MADV_POPULATE_WRITE) } {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                // Linux before 5.14 does not know the advice, and some mappings do not take it: their pages come
                // when they are written.
                e if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EAGAIN)) => Ok(()),
                e => Err(e),
            },
        }
    }

    /// Whether a page holds nothing but zeros.
    pub(crate) fn is_zero(&self, page: u64) -> bool {
        const WORDS: usize = PAGE / 8;
        const LINE: usize = 8;
        let words = self.host(PageRun { first: page, count: 1 }).cast::<u64>();
        // SAFETY: 512 words from the page's start, all within its mapping and aligned.
        let word = |at: usize| unsafe { words.add(at).read_volatile() };
        (0..WORDS).step_by(LINE).all(|line| (line..line + LINE).fold(0, |all, at| all | word(at)) == 0)
    }

    /// Fills a page with zeros.
    pub(crate) fn clear(&self, page: u64) {
        let words = self.host(PageRun { first: page, count: 1 }).cast::<u64>();
        for at in 0..PAGE / 8 {
            // SAFETY: 512 words from the page's start, all within its mapping and aligned.
            unsafe { words.add(at).write_volatile(0) };
        }
    }

    /// Copies pages in.
    ///
    /// # Panics
    /// When `from` has another size than the pages.
    pub(crate) fn place(&self, run: PageRun, from: &[u8]) {
        let host = self.host(run);
        assert_eq!(from.len(), run.count as usize * PAGE);
        // SAFETY: source and target are as long as asserted and do not overlap: guest memory is never
        // behind a reference.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), host, from.len()) };
    }

    /// Copies pages out, as they are now.
    ///
    /// # Panics
    /// When `into` has another size than the pages.
    pub(crate) fn copy(&self, run: PageRun, into: &mut [u8]) {
        let host = self.host(run);
        assert_eq!(into.len(), run.count as usize * PAGE);
        // SAFETY: source and target are as long as asserted and do not overlap: guest memory is never
        // behind a reference. The guest may write meanwhile; the bytes are then torn, as on any wire.
        unsafe { std::ptr::copy_nonoverlapping(host, into.as_mut_ptr(), into.len()) };
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use vm_memory::Bytes;

    use super::*;

    /// Memory of two regions with a hole between them.
    pub(crate) fn two_regions(first: usize, second: usize) -> (Arc<GuestMemoryMmap>, Pages) {
        let ranges = [(GuestAddress(0), first * PAGE), (GuestAddress(1 << 32), second * PAGE)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        (memory.clone(), Pages::new(GuestRam::from_vm_memory(memory)).unwrap())
    }

    #[test]
    fn pages_are_found_by_index_across_regions() {
        let (memory, pages) = two_regions(3, 2);
        memory.write_obj(7u8, GuestAddress((1 << 32) + 4096)).unwrap();
        let mut page = [0; PAGE];
        pages.copy(PageRun { first: 513, count: 1 }, &mut page);
        assert_eq!(page[0], 7);
    }

    #[test]
    fn placed_pages_are_where_they_belong_and_their_neighbours_are_left() {
        let (memory, pages) = two_regions(4, 1);
        let content: Vec<u8> = (0..2 * PAGE).map(|at| (at % 251) as u8 + 1).collect();
        pages.place(PageRun { first: 1, count: 2 }, &content);
        let mut back = vec![0; 2 * PAGE];
        memory.read_slice(&mut back, GuestAddress(PAGE as u64)).unwrap();
        assert!(back == content);
        assert_eq!([0, 1, 2, 3].map(|page| pages.is_zero(page)), [true, false, false, true]);
    }

    #[test]
    fn a_single_bit_anywhere_makes_a_page_not_zero() {
        let (memory, pages) = two_regions(1, 1);
        assert!(pages.is_zero(0));
        for at in (0..PAGE).step_by(61).chain([PAGE - 1]) {
            let address = GuestAddress(at as u64);
            memory.write_obj(0x80u8, address).unwrap();
            assert!(!pages.is_zero(0), "byte {at}");
            memory.write_obj(0u8, address).unwrap();
        }
        assert!(pages.is_zero(0));
    }

    #[test]
    fn clearing_makes_a_page_zero_and_leaves_its_neighbours() {
        let (memory, pages) = two_regions(3, 1);
        memory.write_slice(&[0xff; 3 * PAGE], GuestAddress(0)).unwrap();
        pages.clear(1);
        assert_eq!([0, 1, 2].map(|p| pages.is_zero(p)), [false, true, false]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE as u64 - 1)).unwrap(), 0xff);
    }

    #[test]
    fn populated_pages_are_resident_and_keep_what_they_held() {
        let (memory, pages) = two_regions(64, 1);
        memory.write_obj(5u8, GuestAddress(9 * 4096)).unwrap();
        let run = PageRun { first: 8, count: 16 };
        pages.populate(run).unwrap();
        let mut resident = [0u8; 64];
        let start = pages.host(PageRun { first: 0, count: 64 }).cast();
        // SAFETY: the array has a byte for each page of the mapping.
        assert_eq!(unsafe { libc::mincore(start, 64 * PAGE, resident.as_mut_ptr()) }, 0);
        assert!(resident[8..24].iter().all(|r| r & 1 == 1), "{resident:?}");
        assert_eq!(resident.iter().filter(|r| **r & 1 == 1).count(), 16);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(9 * 4096)).unwrap(), 5);
        assert!(pages.is_zero(10));
    }

    #[test]
    #[should_panic(expected = "not in the domain")]
    fn pages_outside_are_never_touched() {
        two_regions(3, 1).1.is_zero(3);
    }
}
