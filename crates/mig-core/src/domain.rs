//! The pages that move: guest-physical regions laid out in one dense page index.
//!
//! Invariant: each region starts at a page index that is a multiple of [`CHUNK_PAGES`], so a chunk never
//! spans two regions, and a bitmap word or a chunk of one region is aligned in KVM's log of its slot too.
//! Indices between a region's end and the next chunk belong to no page.

use mig_wire::describe::Region;
use thiserror::Error;

/// Bytes in a page: the granule of KVM's dirty log on x86.
pub const PAGE_BYTES: u64 = 4096;
/// Pages in a chunk (2 MiB): the unit of channel choice, of re-arming and of digests.
pub const CHUNK_PAGES: u64 = 512;
/// The largest domain in pages (64 TiB): a bound on what a peer's description can make us allocate.
pub const MAX_PAGES: u64 = 1 << 34;

/// A region and its place in the page index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// Index of its first page, a multiple of [`CHUNK_PAGES`].
    pub first_page: u64,
    /// Number of pages.
    pub pages: u64,
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
}

impl Extent {
    /// One past the index of the last page.
    pub fn end_page(&self) -> u64 {
        self.first_page + self.pages
    }
}

/// What is wrong with a list of regions.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)]
pub enum DomainError {
    #[error("no memory regions")]
    Empty,
    #[error("region at {guest_address:#x} of {bytes} bytes is not whole pages")]
    NotWholePages { guest_address: u64, bytes: u64 },
    #[error("region at {guest_address:#x} overlaps or precedes the one before it")]
    Overlap { guest_address: u64 },
    #[error("regions hold more than {MAX_PAGES} pages")]
    TooLarge,
}

/// The regions of a guest as one page index.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Domain {
    extents: Vec<Extent>,
    end_page: u64,
}

impl Domain {
    /// Lays out regions that are ascending and apart from each other.
    ///
    /// # Errors
    /// A [`DomainError`] when they are not, or are not whole pages, or are too large.
    pub fn new(regions: &[Region]) -> Result<Self, DomainError> {
        let (mut extents, mut end_page, mut end_address) = (Vec::new(), 0u64, 0u64);
        for &Region { guest_address, bytes } in regions {
            if bytes == 0 || bytes % PAGE_BYTES != 0 || guest_address % PAGE_BYTES != 0 {
                return Err(DomainError::NotWholePages { guest_address, bytes });
            }
            if guest_address < end_address {
                return Err(DomainError::Overlap { guest_address });
            }
            end_address = guest_address.checked_add(bytes).ok_or(DomainError::TooLarge)?;
            let first_page = end_page.next_multiple_of(CHUNK_PAGES);
            let pages = bytes / PAGE_BYTES;
            end_page = first_page + pages;
            if end_page > MAX_PAGES {
                return Err(DomainError::TooLarge);
            }
            extents.push(Extent { first_page, pages, guest_address });
        }
        if extents.is_empty() {
            return Err(DomainError::Empty);
        }
        Ok(Self { extents, end_page })
    }

    /// The regions, ascending.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// One past the last page index.
    pub fn end_page(&self) -> u64 {
        self.end_page
    }

    /// How many pages there are.
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|e| e.pages).sum()
    }

    /// How many bytes of memory there are.
    pub fn bytes(&self) -> u64 {
        self.pages() * PAGE_BYTES
    }

    /// How many chunks the page index spans.
    pub fn chunks(&self) -> u64 {
        self.end_page.div_ceil(CHUNK_PAGES)
    }

    /// The pages of a chunk, as a range of indices; empty beyond the end.
    pub fn chunk_pages(&self, chunk: u64) -> std::ops::Range<u64> {
        let first = chunk.saturating_mul(CHUNK_PAGES);
        match self.extent_of(first) {
            Some(extent) => first..extent.end_page().min(first + CHUNK_PAGES),
            None => first..first,
        }
    }

    /// The region that a page belongs to.
    pub fn extent_of(&self, page: u64) -> Option<&Extent> {
        let after = self.extents.partition_point(|e| e.first_page <= page);
        self.extents[..after].last().filter(|e| page < e.end_page())
    }

    /// The guest-physical address of a page.
    pub fn guest_address(&self, page: u64) -> Option<u64> {
        self.extent_of(page).map(|e| e.guest_address + (page - e.first_page) * PAGE_BYTES)
    }

    /// Whether `count` pages from `first` all exist, in one region.
    pub fn holds(&self, first: u64, count: u64) -> bool {
        count > 0
            && self
                .extent_of(first)
                .is_some_and(|e| first.checked_add(count).is_some_and(|end| end <= e.end_page()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest_address: u64, pages: u64) -> Region {
        Region { guest_address, bytes: pages * PAGE_BYTES }
    }

    #[test]
    fn regions_start_at_chunks_and_pages_map_to_addresses() {
        let domain = Domain::new(&[region(0, 700), region(1 << 32, 3)]).unwrap();
        assert_eq!(domain.extents()[1].first_page, 1024);
        assert_eq!((domain.pages(), domain.end_page(), domain.chunks()), (703, 1027, 3));
        assert_eq!(domain.guest_address(699), Some(699 * PAGE_BYTES));
        assert_eq!(domain.guest_address(700), None);
        assert_eq!(domain.guest_address(1026), Some((1 << 32) + 2 * PAGE_BYTES));
        assert_eq!(domain.guest_address(1027), None);
        assert_eq!(domain.chunk_pages(1), 512..700);
        assert_eq!(domain.chunk_pages(2), 1024..1027);
        assert!(domain.chunk_pages(3).is_empty() && domain.chunk_pages(u64::MAX).is_empty());
        assert!(domain.holds(698, 2) && !domain.holds(698, 3) && !domain.holds(0, 0));
        assert!(!domain.holds(1026, u64::MAX));
    }

    #[test]
    fn regions_that_overlap_or_split_pages_or_are_huge_are_refused() {
        assert_eq!(Domain::new(&[]), Err(DomainError::Empty));
        assert!(matches!(Domain::new(&[region(4096, 2), region(8192, 1)]), Err(DomainError::Overlap { .. })));
        let odd = Region { guest_address: 0, bytes: 5000 };
        assert!(matches!(Domain::new(&[odd]), Err(DomainError::NotWholePages { .. })));
        let huge = Region { guest_address: 4096, bytes: !0 << 12 };
        assert_eq!(Domain::new(&[huge]), Err(DomainError::TooLarge));
        let large = Region { guest_address: 0, bytes: 1 << 60 };
        assert_eq!(Domain::new(&[large]), Err(DomainError::TooLarge));
    }
}
