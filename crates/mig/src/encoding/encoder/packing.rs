//! Neighbours, compressed together where that pays.

use std::ops::Range;

use mig_wire::pages::MAX_ZSTD_PAGES;

use super::{Settings, Stretch};
use crate::encoding::Compress;
use crate::encoding::reluctance::Reluctance;
use crate::encoding::zstd::Packer;
use crate::memory::PAGE;

/// Compresses stretches of pages.
pub(super) struct Packing {
    packer: Packer,
    reluctance: Reluctance,
    copy: Vec<u8>,
}

impl Packing {
    /// None where it is not wanted, or there is no memory for it: then pages go raw.
    pub(super) fn new(settings: &Settings) -> Option<Self> {
        let Compress::Zstd(level) = settings.compress else { return None };
        let packer = Packer::new(level.into()).ok()?;
        let (reluctance, copy) = (Reluctance::new(settings.channels), vec![0; MAX_ZSTD_PAGES * PAGE]);
        Some(Self { packer, reluctance, copy })
    }

    /// Appends a stretch to `encoded`, if that pays: which range of it that is.
    pub(super) fn pack(&mut self, stretch: &Stretch<'_>, encoded: &mut Vec<u8>) -> Option<Range<usize>> {
        if !self.reluctance.tries(stretch.first) {
            return None;
        }
        let copy = &mut self.copy[..stretch.origins.len() * PAGE];
        stretch.copy(copy);
        let start = encoded.len();
        encoded.resize(start + Packer::most_bytes(copy.len()), 0);
        let bytes = self.packer.pack(copy, &mut encoded[start..]);
        encoded.truncate(start + bytes.unwrap_or(0));
        self.reluctance.tried(stretch.first, bytes.is_some());
        bytes.map(|bytes| start..start + bytes)
    }
}
