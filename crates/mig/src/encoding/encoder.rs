//! A page channel's encoder: turns a batch of pages into a table of runs and the payloads that follow it.
//!
//! Invariants:
//! - what is encoded was copied before, to memory of the encoder's own, since the guest writes meanwhile. Raw pages go
//!   straight from guest memory, unless the cache is to hold them: a torn one is sent again;
//! - what the cache holds of a page is what was sent of it last. A page that goes into it is sent from it, and one that
//!   is sent otherwise is forgotten: [`Deltas::page`] decides that for each page but zeros, in every round but the first,
//!   in which the cache is empty.

mod deltas;
mod packing;

use std::ops::Range;

use mig_core::bitmap::PageRun;
use mig_wire::pages::{Encoding, MAX_ZSTD_PAGES, Run};

use self::deltas::{Deltas, Sent};
use self::packing::Packing;
use super::cache::Slot;
use super::decoder::pages_of;
use super::{Compress, zero};
use crate::memory::{PAGE, Pages};
use crate::transport::Part;
use crate::untouched::Untouched;

/// How a channel's pages are to be encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// In which ways, all of which the destination understands.
    pub(crate) compress: Compress,
    /// How many channels there are.
    pub(crate) channels: usize,
    /// What this one may keep of pages that it sent.
    pub(crate) cache_bytes: usize,
}

/// When pages are sent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// In which round.
    pub(crate) round: u32,
    /// Nothing follows: the guest is paused.
    pub(crate) is_last: bool,
}

/// Encodes the batches of one channel.
pub(crate) struct Encoder {
    untouched: Untouched,
    /// The batch, sorted into zeros and the rest.
    found: Vec<Run>,
    deltas: Option<Deltas>,
    packing: Option<Packing>,
    /// Where the pages of a run are sent from.
    origins: Vec<Origin>,
    batch: Batch,
}

/// Where a page is sent from: guest memory, or the place at which the cache now holds it.
type Origin = Option<Slot>;

/// What becomes of a batch.
#[derive(Default)]
struct Batch {
    table: Vec<Run>,
    pieces: Vec<Piece>,
    /// The payloads that were encoded.
    encoded: Vec<u8>,
}

/// Payload, in table order.
enum Piece {
    Guest(PageRun),
    Cached(Slot),
    /// A range of what was encoded.
    Encoded(Range<usize>),
}

impl Encoder {
    pub(crate) fn new(pages: &Pages, settings: &Settings) -> Self {
        Self {
            untouched: Untouched::new(pages),
            found: Vec::new(),
            deltas: Deltas::new(settings),
            packing: Packing::new(settings),
            origins: Vec::new(),
            batch: Batch::default(),
        }
    }

    /// Takes a batch in, in place of the one before.
    pub(crate) fn encode(&mut self, pages: &Pages, moment: Moment, runs: &[PageRun]) {
        self.found.clear();
        for run in runs {
            zero::classify(pages, *run, &mut self.untouched, &mut self.found);
        }
        self.batch.clear();
        let found = std::mem::take(&mut self.found);
        for run in &found {
            match run.encoding {
                Encoding::Zero => {
                    if let Some(deltas) = &mut self.deltas {
                        deltas.forget(pages_of(run));
                    }
                    self.batch.table.push(*run);
                }
                _ => self.content(pages, moment, pages_of(run)),
            }
        }
        self.found = found;
    }

    /// The batch's table.
    pub(crate) fn table(&self) -> &[Run] {
        &self.batch.table
    }

    /// What follows it.
    pub(crate) fn payload(&self) -> impl Iterator<Item = Part<'_>> {
        self.batch.pieces.iter().map(|piece| match piece {
            Piece::Guest(run) => Part::Pages(*run),
            Piece::Cached(slot) => Part::Bytes(content(self.deltas.as_ref(), *slot)),
            Piece::Encoded(range) => Part::Bytes(&self.batch.encoded[range.clone()]),
        })
    }

    /// A run of pages that are not zeros: first what can be sent as a change, then what lies between.
    fn content(&mut self, pages: &Pages, moment: Moment, run: PageRun) {
        let Self { deltas, packing, origins, batch, .. } = self;
        let first_of_run = batch.table.len();
        let (mut first, end) = (run.first, run.first + run.count);
        origins.clear();
        match deltas {
            Some(deltas) if moment.round > 0 => {
                for page in run.first..end {
                    match deltas.page(pages, moment, page, &mut batch.encoded) {
                        Sent::From(origin) => origins.push(origin),
                        Sent::Encoded(range) => {
                            batch.stretch(
                                pages,
                                first,
                                origins,
                                Some(deltas),
                                packing.as_mut(),
                                first_of_run,
                            );
                            batch.delta(page, range);
                            origins.clear();
                            first = page + 1;
                        }
                    }
                }
            }
            _ => origins.resize(run.count as usize, None),
        }
        batch.stretch(pages, first, origins, deltas.as_ref(), packing.as_mut(), first_of_run);
    }
}

impl Batch {
    fn clear(&mut self) {
        self.table.clear();
        self.pieces.clear();
        self.encoded.clear();
    }

    fn delta(&mut self, page: u64, payload: Range<usize>) {
        let encoding = Encoding::Delta { bytes: payload.len() as u32 };
        self.table.push(Run { first_page: page, count: 1, encoding });
        self.pieces.push(Piece::Encoded(payload));
    }

    /// Adds neighbours from `first` on, compressed where that pays.
    fn stretch(
        &mut self,
        pages: &Pages,
        first: u64,
        origins: &[Origin],
        deltas: Option<&Deltas>,
        mut packing: Option<&mut Packing>,
        first_of_run: usize,
    ) {
        for (origins, first) in origins.chunks(MAX_ZSTD_PAGES).zip((first..).step_by(MAX_ZSTD_PAGES)) {
            let stretch = Stretch { pages, first, origins, deltas };
            let packed = packing.as_mut().and_then(|packing| packing.pack(&stretch, &mut self.encoded));
            if let Some(payload) = packed {
                let encoding = Encoding::Zstd { bytes: payload.len() as u32 };
                self.table.push(Run { first_page: first, count: origins.len() as u32, encoding });
                self.pieces.push(Piece::Encoded(payload));
                continue;
            }
            for (origin, run) in stretch.parts() {
                self.raw(origin, run, first_of_run);
            }
        }
    }

    /// Adds pages as they are. Entries of the table from `first_of_run` on may be neighbours: those before are of
    /// another run, in another chunk perhaps.
    fn raw(&mut self, origin: Origin, run: PageRun, first_of_run: usize) {
        let count = run.count as u32;
        let neighbour = self.table[first_of_run..].last_mut().filter(|last| {
            last.encoding == Encoding::Raw && last.first_page + u64::from(last.count) == run.first
        });
        let joined = neighbour.is_some();
        match neighbour {
            Some(last) => last.count += count,
            None => self.table.push(Run { first_page: run.first, count, encoding: Encoding::Raw }),
        }
        match (origin, self.pieces.last_mut()) {
            (Some(slot), _) => self.pieces.push(Piece::Cached(slot)),
            (None, Some(Piece::Guest(before))) if joined => before.count += run.count,
            (None, _) => self.pieces.push(Piece::Guest(run)),
        }
    }
}

/// Neighbours, and where each is sent from.
struct Stretch<'a> {
    pages: &'a Pages,
    first: u64,
    origins: &'a [Origin],
    deltas: Option<&'a Deltas>,
}

impl Stretch<'_> {
    /// The pages of one origin together, those of the cache one by one.
    fn parts(&self) -> impl Iterator<Item = (Origin, PageRun)> {
        let mut first = self.first;
        self.origins.chunk_by(|a, b| a.is_none() && b.is_none()).map(move |part| {
            let run = PageRun { first, count: part.len() as u64 };
            first += run.count;
            (part[0], run)
        })
    }

    /// All of them as they are to be sent, copied.
    fn copy(&self, mut into: &mut [u8]) {
        for (origin, run) in self.parts() {
            let (part, rest) = into.split_at_mut(run.count as usize * PAGE);
            match origin {
                None => self.pages.copy(run, part),
                Some(slot) => part.copy_from_slice(content(self.deltas, slot)),
            }
            into = rest;
        }
    }
}

fn content(deltas: Option<&Deltas>, slot: Slot) -> &[u8] {
    deltas.expect("without a cache nothing comes from there").content(slot)
}

#[cfg(test)]
mod tests;
