//! A page channel's encoder: turns a batch of pages into a table of runs and the payloads that follow it.
//!
//! Invariants:
//! - what is encoded was copied before, to memory of the encoder's own, since the guest writes meanwhile. Raw pages go
//!   straight from guest memory, unless the cache is to hold them: a torn one is sent again;
//! - what the cache holds of a page is what was sent of it last. A page that goes into it is sent from it, and one that
//!   is sent otherwise is forgotten: [`Deltas::choose`] decides that for each page but zeros, in every round but the first,
//!   in which the cache is empty.

mod deltas;
mod effort;
mod ladder;
mod packing;
mod worth;

use std::ops::Range;
use std::time::{Duration, Instant};

use mig_core::bitmap::PageRun;
use mig_core::pacing::InPause;
use mig_wire::hello::Capabilities;
use mig_wire::pages::{Encoding, MAX_ZSTD_PAGES, Run};

use self::deltas::Deltas;
use self::packing::Packing;
use self::worth::{Link, Links};
use super::cache::Slot;
use super::decoder::pages_of;
use super::{Compress, zero};
use crate::memory::{PAGE, Pages};
use crate::transport::Part;
use crate::untouched::Untouched;

/// How a channel's pages are to be encoded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    /// In which ways.
    pub(crate) compress: Compress,
    /// Those that the destination understands.
    pub(crate) understood: Capabilities,
    /// How many channels there are.
    pub(crate) channels: usize,
    /// What this one may keep of pages that it sent.
    pub(crate) cache_bytes: usize,
    /// What the link will be in the pause.
    pub(crate) in_pause: InPause,
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
    links: Links,
    /// When the batch was taken in.
    since: Instant,
    /// What a page of the last batches took, in nanoseconds.
    page_ns: f64,
}

/// Where a page is sent from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Guest,
    /// The place at which the cache now holds it.
    Cached(Slot),
    /// A range of what was encoded: what changed of it.
    Encoded(Range<usize>),
}

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

/// What a batch may take, about: nothing is sent meanwhile, and a cancel waits.
const BATCH_TIME: Duration = Duration::from_millis(50);
/// Fewer pages shrink too little together.
const LEAST_PAGES: usize = 8;

impl Encoder {
    pub(crate) fn new(pages: &Pages, settings: &Settings) -> Self {
        let packing = Packing::new(settings);
        // the first batch has as many pages as go together, until it is known what they take
        let first_pages = packing.as_ref().map_or(f64::INFINITY, |_| MAX_ZSTD_PAGES as f64);
        Self {
            untouched: Untouched::new(pages),
            found: Vec::new(),
            deltas: Deltas::new(settings),
            packing,
            origins: Vec::new(),
            batch: Batch::default(),
            links: Links::new(settings.in_pause, settings.channels),
            since: Instant::now(),
            page_ns: BATCH_TIME.as_nanos() as f64 / first_pages,
        }
    }

    /// How many pages a batch should have at most: zstd's highest levels take milliseconds for each, where channels
    /// share cores tens of them.
    pub(crate) fn pages_at_once(&self) -> usize {
        ((BATCH_TIME.as_nanos() as f64 / self.page_ns.max(1.0)) as usize).max(LEAST_PAGES)
    }

    /// Takes a batch in, in place of the one before.
    pub(crate) fn encode(&mut self, pages: &Pages, moment: Moment, runs: &[PageRun]) {
        let began = Instant::now();
        self.found.clear();
        for run in runs {
            zero::classify(pages, *run, &mut self.untouched, &mut self.found);
        }
        self.batch.clear();
        let passed = std::mem::replace(&mut self.since, began).elapsed();
        self.allow_for(passed, self.links.at(moment));
        if let Some(deltas) = &mut self.deltas {
            deltas.fit(moment, self.links.at(moment));
        }
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
        let pages = runs.iter().map(|run| run.count).sum::<u64>().max(1) as f64;
        let newer = (pages / 64.0).min(1.0);
        self.page_ns += (began.elapsed().as_nanos() as f64 / pages - self.page_ns) * newer;
    }

    /// Time has passed, in which something may be tried.
    fn allow_for(&mut self, passed: Duration, link: Link) {
        if let Some(deltas) = &mut self.deltas {
            deltas.allow_for(passed, link);
        }
        if let Some(packing) = &mut self.packing {
            packing.allow_for(passed, link);
        }
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

    /// So many bytes of a batch were written, which took so long; of that they were held to the cap for so long.
    pub(crate) fn written(&mut self, bytes: usize, took: Duration, held: Duration) {
        self.links.written(bytes, took, held, self.since.elapsed());
    }

    /// A run of pages that are not zeros: those that are sent as what changed, and what lies between them.
    fn content(&mut self, pages: &Pages, moment: Moment, run: PageRun) {
        let Self { deltas, packing, origins, batch, links, .. } = self;
        let link = links.at(moment);
        let first_of_run = batch.table.len();
        origins.clear();
        match deltas {
            Some(deltas) if moment.round > 0 => {
                deltas.choose(pages, moment, run, link, &mut batch.encoded, origins);
            }
            _ => origins.resize(run.count as usize, Origin::Guest),
        }
        let mut first = run.first;
        for part in origins.chunk_by(|a, b| !a.is_encoded() && !b.is_encoded()) {
            let stretch = Stretch { pages, first, origins: part, deltas: deltas.as_ref() };
            match &part[0] {
                Origin::Encoded(payload) => batch.delta(first, payload.clone()),
                _ => batch.stretch(&stretch, moment, link, packing.as_mut(), first_of_run),
            }
            first += part.len() as u64;
        }
    }
}

impl Origin {
    fn is_encoded(&self) -> bool {
        matches!(self, Self::Encoded(_))
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

    /// Adds neighbours, a piece at a time: compressed, or as they are.
    fn stretch(
        &mut self,
        all: &Stretch<'_>,
        moment: Moment,
        link: Link,
        mut packing: Option<&mut Packing>,
        first_of_run: usize,
    ) {
        let mut left = *all;
        while !left.origins.is_empty() {
            let together =
                packing.as_mut().map_or(0, |packing| packing.pages_together(left.first, moment, link));
            let piece = left.split_off(if together == 0 { MAX_ZSTD_PAGES } else { together });
            let packed = packing
                .as_mut()
                .filter(|_| together > 0)
                .and_then(|packing| packing.pack(&piece, moment, link, &mut self.encoded));
            match packed {
                Some(payload) => {
                    let (count, bytes) = (piece.origins.len() as u32, payload.len() as u32);
                    let encoding = Encoding::Zstd { bytes };
                    self.table.push(Run { first_page: piece.first, count, encoding });
                    self.pieces.push(Piece::Encoded(payload));
                }
                None => piece.parts().for_each(|(origin, run)| self.raw(origin, run, first_of_run)),
            }
        }
    }

    /// Adds pages as they are. Entries of the table from `first_of_run` on may be neighbours: those before are of
    /// another run, in another chunk perhaps.
    fn raw(&mut self, origin: &Origin, run: PageRun, first_of_run: usize) {
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
            (Origin::Cached(slot), _) => self.pieces.push(Piece::Cached(*slot)),
            (Origin::Encoded(_), _) => unreachable!("what changed is no neighbour of what is sent as it is"),
            (Origin::Guest, Some(Piece::Guest(before))) if joined => before.count += run.count,
            (Origin::Guest, _) => self.pieces.push(Piece::Guest(run)),
        }
    }
}

/// Neighbours, and where each is sent from.
#[derive(Clone, Copy)]
struct Stretch<'a> {
    pages: &'a Pages,
    first: u64,
    origins: &'a [Origin],
    deltas: Option<&'a Deltas>,
}

impl Stretch<'_> {
    /// Takes the first pages off, so many or all.
    fn split_off(&mut self, pages: usize) -> Self {
        let (origins, left) = self.origins.split_at(pages.min(self.origins.len()));
        let piece = Self { origins, ..*self };
        (self.first, self.origins) = (self.first + origins.len() as u64, left);
        piece
    }

    /// The pages of one origin together, those of the cache one by one.
    fn parts(&self) -> impl Iterator<Item = (&Origin, PageRun)> {
        let mut first = self.first;
        self.origins.chunk_by(|a, b| [a, b] == [&Origin::Guest; 2]).map(move |part| {
            let run = PageRun { first, count: part.len() as u64 };
            first += run.count;
            (&part[0], run)
        })
    }

    /// All of them as they are to be sent, copied.
    fn copy(&self, mut into: &mut [u8]) {
        for (origin, run) in self.parts() {
            let (part, rest) = into.split_at_mut(run.count as usize * PAGE);
            match origin {
                Origin::Guest => self.pages.copy(run, part),
                Origin::Cached(slot) => part.copy_from_slice(content(self.deltas, *slot)),
                Origin::Encoded(_) => unreachable!("what changed is no neighbour of what is sent as it is"),
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
