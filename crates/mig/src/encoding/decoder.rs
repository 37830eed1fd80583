//! The receiver's half: what a peer encoded, to guest memory.
//!
//! Invariant: what a payload decodes to is not larger than what is set aside for it ([`MAX_ZSTD_PAGES`]), whatever a
//! peer says, and reaches guest memory whole and checked, or not at all.
//!
//! [`MAX_ZSTD_PAGES`]: mig_wire::pages::MAX_ZSTD_PAGES

use std::io;

use mig_core::bitmap::PageRun;
use mig_wire::WireError;
use mig_wire::pages::{Encoding, Run};

use super::{delta, zstd};
use crate::memory::{PAGE, Pages};

/// Decodes the payloads of one channel: what it needs for that is set aside with the first.
#[derive(Default)]
pub(crate) struct Decoder {
    unpacker: Option<zstd::Unpacker>,
    pages: Vec<u8>,
}

/// Why pages were not decoded.
#[derive(Debug)]
pub(crate) enum DecodeError {
    Wire(WireError),
    /// There is no memory for it.
    Memory(io::Error),
}

impl From<WireError> for DecodeError {
    fn from(error: WireError) -> Self {
        Self::Wire(error)
    }
}

impl Decoder {
    /// Decodes a payload and puts its pages in their place; raw pages and zeros have none here.
    ///
    /// # Errors
    /// The payload is none, or there is no memory to decode it.
    pub(crate) fn place(&mut self, pages: &Pages, run: &Run, payload: &[u8]) -> Result<(), DecodeError> {
        let place = pages_of(run);
        match run.encoding {
            Encoding::Zero | Encoding::Raw => return Ok(()),
            Encoding::Zstd { .. } => {
                let unpacker = match &mut self.unpacker {
                    Some(unpacker) => unpacker,
                    none => none.insert(zstd::Unpacker::new().map_err(DecodeError::Memory)?),
                };
                self.pages.resize(run.count as usize * PAGE, 0);
                unpacker.unpack(payload, &mut self.pages)?;
                pages.place(place, &self.pages);
            }
            Encoding::Delta { .. } => {
                let mut page = [0; PAGE];
                pages.copy(place, &mut page);
                delta::apply(payload, &mut page)?;
                pages.place(place, &page);
            }
        }
        Ok(())
    }
}

/// The pages of a run.
pub(crate) fn pages_of(run: &Run) -> PageRun {
    PageRun { first: run.first_page, count: u64::from(run.count) }
}
