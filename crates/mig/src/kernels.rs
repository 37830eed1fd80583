//! The inner loops of the page path, opened for the benches. Not stable, and no part of what an embedder uses.

use mig_core::bitmap::PageRun;
use mig_core::domain::DomainError;
use mig_wire::pages::Run;

use crate::encoding::zero;
use crate::memory::{GuestRam, Pages};
use crate::untouched::Untouched;

/// Guest memory as a channel sees it: by page index.
#[allow(missing_debug_implementations)] // for benches
pub struct GuestPages {
    pages: Pages,
    untouched: Untouched,
}

impl GuestPages {
    /// The pages of `ram`.
    ///
    /// # Errors
    /// The regions are none of a guest's.
    pub fn new(ram: GuestRam) -> Result<Self, DomainError> {
        let pages = Pages::new(ram)?;
        Ok(Self { untouched: Untouched::new(&pages), pages })
    }

    /// Whether a page holds nothing but zeros.
    ///
    /// # Panics
    /// When there is no such page.
    pub fn is_zero(&self, page: u64) -> bool {
        self.pages.is_zero(page)
    }

    /// Appends the runs of `count` pages from `first` to `table`, as a sender does before it sends them.
    ///
    /// # Panics
    /// When there are no such pages.
    pub fn classify(&mut self, first: u64, count: u64, table: &mut Vec<Run>) {
        zero::classify(&self.pages, PageRun { first, count }, &mut self.untouched, table);
    }
}
