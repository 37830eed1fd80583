//! The inner loops of the page path, opened for the benches. Not stable, and no part of what an embedder uses.

use mig_core::bitmap::PageRun;
use mig_core::domain::DomainError;
use mig_wire::WireError;
use mig_wire::pages::Run;

use crate::encoding::decoder::{DecodeError, Decoder};
use crate::encoding::{delta, zero, zstd};
use crate::memory::{GuestRam, PAGE, Pages};
use crate::untouched::Untouched;

/// Guest memory as a channel sees it: by page index.
#[allow(missing_debug_implementations)] // for benches
pub struct GuestPages {
    pages: Pages,
    untouched: Untouched,
    decoder: Decoder,
}

impl GuestPages {
    /// The pages of `ram`.
    ///
    /// # Errors
    /// The regions are none of a guest's.
    pub fn new(ram: GuestRam) -> Result<Self, DomainError> {
        let pages = Pages::new(ram)?;
        Ok(Self { untouched: Untouched::new(&pages), pages, decoder: Decoder::default() })
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

    /// Decodes the payload of an encoded run to its place, as a receiver does.
    ///
    /// # Errors
    /// The payload is none.
    ///
    /// # Panics
    /// When there are no such pages, or the host has no memory to decode them.
    pub fn decode(&mut self, run: &Run, payload: &[u8]) -> Result<(), WireError> {
        self.decoder.place(&self.pages, run, payload).map_err(|error| match error {
            DecodeError::Wire(error) => error,
            DecodeError::Memory(error) => panic!("{error}"),
        })
    }
}

/// Appends the payload by which a receiver makes `new` of `old`, as a sender does; says whether that is worth it.
pub fn encode_delta(old: &[u8; PAGE], new: &[u8; PAGE], into: &mut Vec<u8>) -> bool {
    delta::encode(old, new, into)
}

/// zstd, as a channel's sender uses it.
#[allow(missing_debug_implementations)] // for benches
pub struct Zstd(zstd::Packer);

impl Zstd {
    /// At a level.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn new(level: i32) -> std::io::Result<Self> {
        zstd::Packer::new(level).map(Self)
    }

    /// The payload for pages, at the start of `into`: how many bytes, if they fit there.
    pub fn encode(&mut self, level: i32, pages: &[u8], into: &mut [u8]) -> Option<usize> {
        self.0.pack(level, pages, into)
    }
}
