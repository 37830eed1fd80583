//! The encoder against the decoder, with a guest that writes at the worst of times.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mig_core::domain::CHUNK_PAGES;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::encoding::decoder::Decoder;
use crate::encoding::{counts, delta};
use crate::memory::tests::two_regions;

/// Pages of two regions, the second of which starts with a chunk of its own.
const FIRST: u64 = 600;
const SECOND: u64 = 40;
const SECOND_PAGE: u64 = 2 * CHUNK_PAGES;

/// A guest's write: `bytes` of one `value`, within a page.
#[derive(Debug, Clone, Copy)]
struct Write {
    page: u64,
    at: usize,
    bytes: usize,
    value: u8,
}

/// A source, a destination, and the dirty log between them.
struct Pair {
    guest: Arc<GuestMemoryMmap>,
    source: Pages,
    destination: Pages,
    _keep: Arc<GuestMemoryMmap>,
    dirty: BTreeSet<u64>,
    encoder: Encoder,
    decoder: Decoder,
    /// Pages that the destination holds with content.
    filled: BTreeSet<u64>,
    counts: mig_core::progress::PageCounts,
    /// What a MiB takes, because of the cap.
    link: Duration,
}

impl Pair {
    fn new(compress: &str, cache_pages: usize) -> Self {
        Self::with(compress, cache_pages, Capabilities::PAGE_ENCODINGS)
    }

    fn with(compress: &str, cache_pages: usize, understood: Capabilities) -> Self {
        Self::paused(compress, cache_pages, understood, InPause::Capped)
    }

    fn paused(compress: &str, cache_pages: usize, understood: Capabilities, in_pause: InPause) -> Self {
        let (guest, source) = two_regions(FIRST as usize, SECOND as usize);
        let (keep, destination) = two_regions(FIRST as usize, SECOND as usize);
        let compress = compress.parse().unwrap();
        let settings =
            Settings { compress, understood, channels: 1, cache_bytes: cache_pages * PAGE, in_pause };
        let dirty = (0..FIRST).chain(SECOND_PAGE..SECOND_PAGE + SECOND).collect();
        let encoder = Encoder::new(&source, &settings);
        Self {
            guest,
            source,
            destination,
            _keep: keep,
            dirty,
            encoder,
            decoder: Decoder::default(),
            filled: BTreeSet::new(),
            counts: Default::default(),
            // so low a cap that what saves bytes pays
            link: Duration::from_millis(200),
        }
    }

    fn write(&mut self, write: Write) {
        let Write { page, at, bytes, value } = write;
        let address = self.source.domain().guest_address(page).unwrap() + at as u64;
        self.guest.write_slice(&vec![value; bytes.min(PAGE - at)], GuestAddress(address)).unwrap();
        self.dirty.insert(page);
    }

    /// Sends what is dirty; of `writes` some come between the encoding of a batch and its way to the socket, the
    /// others between its parts on that way.
    fn round(&mut self, moment: Moment, writes: &mut impl Iterator<Item = Write>) {
        let dirty: Vec<u64> = std::mem::take(&mut self.dirty).into_iter().collect();
        for batch in dirty.chunks(150) {
            let same_run = |a: &u64, b: &u64| a + 1 == *b && !b.is_multiple_of(CHUNK_PAGES);
            let runs = batch.chunk_by(same_run).map(|run| PageRun { first: run[0], count: run.len() as u64 });
            self.encoder.allow_for(Duration::from_secs(1), self.encoder.links.at(moment));
            self.encoder.encode(&self.source, moment, &runs.collect::<Vec<_>>());
            writes.by_ref().take(2).for_each(|write| self.write(write));
            self.deliver(writes);
        }
    }

    fn deliver(&mut self, writes: &mut impl Iterator<Item = Write>) {
        let mut payload = Vec::new();
        let parts = self.encoder.batch.pieces.len();
        for at in 0..parts {
            match self.encoder.payload().nth(at).unwrap() {
                Part::Bytes(bytes) => payload.extend_from_slice(bytes),
                Part::Pages(run) => {
                    let start = payload.len();
                    payload.resize(start + run.count as usize * PAGE, 0);
                    self.source.copy(run, &mut payload[start..]);
                }
            }
            if at % 3 == 0 {
                writes.by_ref().take(1).for_each(|write| self.write(write));
            }
        }
        let mut left = &payload[..];
        let table = self.encoder.table();
        self.counts += counts(table);
        for run in table {
            let (part, rest) = left.split_at(run.payload_bytes());
            left = rest;
            let pages = pages_of(run);
            let chunk = |page| page / CHUNK_PAGES;
            assert_eq!(chunk(pages.first), chunk(pages.first + pages.count - 1), "no run leaves its chunk");
            let each = pages.first..pages.first + pages.count;
            match run.encoding {
                Encoding::Zero => each.clone().for_each(|page| self.destination.clear(page)),
                Encoding::Raw => self.destination.place(pages, part),
                Encoding::Zstd { .. } | Encoding::Delta { .. } => {
                    let base = self.filled.contains(&pages.first);
                    assert!(base || !matches!(run.encoding, Encoding::Delta { .. }), "a base for {run:?}");
                    self.decoder.place(&self.destination, run, part).unwrap();
                }
            }
            match run.encoding {
                Encoding::Zero => self.filled.retain(|page| !each.contains(page)),
                _ => self.filled.extend(each),
            }
        }
        assert!(left.is_empty(), "every payload has a run");
        (0..20).for_each(|_| self.encoder.written(1 << 20, self.link, self.link));
    }

    fn assert_same(&self) {
        for page in (0..FIRST).chain(SECOND_PAGE..SECOND_PAGE + SECOND) {
            let [mut here, mut there] = [[0; PAGE]; 2];
            self.source.copy(PageRun { first: page, count: 1 }, &mut here);
            self.destination.copy(PageRun { first: page, count: 1 }, &mut there);
            assert!(here == there, "page {page} differs");
        }
    }
}

/// Mostly small writes to few pages at few places with few values: what changes is little, again and again, and often
/// back to what it was. (What was sent and is not what was kept harms only where a byte becomes again what was kept.)
fn write() -> impl Strategy<Value = Write> {
    let page = prop_oneof![
        6 => 0..4u64,
        2 => 0..30u64,
        1 => 0..FIRST,
        2 => FIRST - 30..FIRST,
        1 => CHUNK_PAGES - 3..CHUNK_PAGES + 3,
        2 => SECOND_PAGE..SECOND_PAGE + SECOND,
    ];
    let place = prop_oneof![
        6 => (0..4usize).prop_map(|place| (place * 1000, 9)),
        1 => (0..PAGE, 1..30usize),
        1 => (0..PAGE, 1..PAGE),
        1 => Just((0, PAGE)),
    ];
    (page, place, prop_oneof![4 => 0..3u8, 1 => any::<u8>()]).prop_map(|(page, (at, bytes), value)| Write {
        page,
        at,
        bytes,
        value,
    })
}

fn moment(round: u32) -> Moment {
    Moment { round, is_last: false }
}

fn migrate(
    compress: &str,
    cache_pages: usize,
    first: Vec<Write>,
    rounds: Vec<(Vec<Write>, Vec<Write>)>,
) -> Pair {
    let mut pair = Pair::new(compress, cache_pages);
    first.into_iter().for_each(|write| pair.write(write));
    let last = rounds.len() as u32 + 1;
    for ((between, during), round) in rounds.into_iter().zip(0..) {
        between.into_iter().for_each(|write| pair.write(write));
        pair.round(moment(round), &mut during.into_iter());
    }
    pair.round(Moment { round: last, is_last: true }, &mut std::iter::empty());
    pair.assert_same();
    pair
}

fn writes(most: usize) -> impl Strategy<Value = Vec<Write>> {
    proptest::collection::vec(write(), 0..most)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn memory_arrives_as_it_is_in_the_end_whatever_the_guest_wrote_on_the_way(
        compress in prop_oneof![Just("off"), Just("zstd"), Just("delta"), Just("auto")],
        cache_pages in prop_oneof![Just(0), Just(4), Just(32), Just(1000)],
        first in writes(300),
        rounds in proptest::collection::vec((writes(80), writes(60)), 1..9),
    ) {
        migrate(compress, cache_pages, first, rounds);
    }
}

#[test]
fn pages_that_are_dirtied_again_and_again_travel_as_what_changed() {
    let all = |round: u8| (0..FIRST).map(move |page| Write { page, at: 100, bytes: 9, value: round + 1 });
    let rounds = (0..5).map(|round| (all(round).collect(), Vec::new())).collect();
    let counts = migrate("delta", 1000, Vec::new(), rounds).counts;
    // raw in round 0 and, to be kept, in round 1
    assert_eq!((counts.raw, counts.delta), (2 * FIRST, 3 * FIRST));
}

#[test]
fn a_destination_that_does_not_understand_an_encoding_gets_none_of_it() {
    for (understood, [zstd, delta]) in [
        (Capabilities::empty(), [false, false]),
        (Capabilities::ZSTD, [true, false]),
        (Capabilities::DELTA, [false, true]),
    ] {
        let used = |compress| {
            let mut pair = Pair::with(compress, 1000, understood);
            for round in 0..30 {
                (0..FIRST)
                    .for_each(|page| pair.write(Write { page, at: 100, bytes: 9, value: round as u8 + 1 }));
                pair.round(moment(round), &mut std::iter::empty());
            }
            pair.assert_same();
            [pair.counts.zstd > 0, pair.counts.delta > 0]
        };
        assert_eq!(used("auto"), [zstd, delta], "{understood:?}");
        assert_eq!([used("zstd")[0], used("delta")[1]], [zstd, delta], "{understood:?}");
    }
}

#[test]
fn in_the_pause_pages_are_compressed_if_that_pays_on_the_link_as_it_is_then() {
    let compressed = |in_pause, compress| {
        let mut pair = Pair::paused(compress, 0, Capabilities::ZSTD, in_pause);
        let fill = |pair: &mut Pair, value| {
            (0..FIRST).for_each(|page| pair.write(Write { page, at: 0, bytes: PAGE, value }));
        };
        for round in 0..5 {
            fill(&mut pair, round as u8 + 1);
            pair.round(moment(round), &mut std::iter::empty());
        }
        let before = pair.counts.zstd;
        assert!(before > FIRST, "it pays in the rounds");
        fill(&mut pair, 99);
        pair.round(Moment { round: 5, is_last: true }, &mut std::iter::empty());
        pair.assert_same();
        pair.counts.zstd - before
    };
    assert_eq!(compressed(InPause::Capped, "auto"), FIRST);
    assert_eq!(compressed(InPause::Known(5 << 20), "auto"), FIRST);
    assert_eq!(compressed(InPause::Known(1 << 50), "auto"), 0);
    assert_eq!(compressed(InPause::Lifted, "auto"), 0, "nothing but the cap made writes wait");
    assert_eq!(compressed(InPause::Lifted, "zstd"), FIRST, "it is what was asked for");
}

#[test]
fn the_cache_takes_memory_only_where_it_pays() {
    let bytes_for_cache = |in_rounds: Duration, change: usize| {
        let mut pair = Pair::new("auto", 1000);
        for round in 0..30 {
            for page in 0..FIRST {
                let value = ((page + u64::from(round)) % 250) as u8 + 1;
                pair.write(Write { page, at: 0, bytes: change, value });
            }
            pair.link = in_rounds;
            pair.round(moment(round), &mut std::iter::empty());
        }
        pair.assert_same();
        (pair.encoder.deltas.as_ref().unwrap().is_full(), pair.counts.delta)
    };
    let [slow, fast] = [200, 0].map(Duration::from_millis);
    let (full, deltas) = bytes_for_cache(slow, 9);
    assert!(full && deltas > 20 * FIRST, "{deltas}");
    assert_eq!(bytes_for_cache(slow, PAGE), (false, 0), "pages that change as a whole");
    assert!(!bytes_for_cache(fast, 9).0, "a link that is faster than any encoding");
}

#[test]
fn on_a_slow_link_what_changes_is_sent_from_the_second_time_on_that_a_page_is_dirty() {
    let mut pair = Pair::new("auto", 1000);
    for round in 0..3 {
        for page in 0..FIRST {
            let value = ((page + u64::from(round)) % 250) as u8 + 1;
            pair.write(Write { page, at: 0, bytes: 9, value });
        }
        pair.round(moment(round), &mut std::iter::empty());
    }
    pair.assert_same();
    assert_eq!(pair.counts.delta, FIRST, "kept in the first round in which not all are sent");
}

#[test]
fn a_batch_is_so_small_that_encoding_it_takes_no_long_time() {
    let pages = |compress| {
        let mut pair = Pair::with(compress, 0, Capabilities::PAGE_ENCODINGS);
        let first = pair.encoder.pages_at_once();
        pair.encoder.page_ns = 20e6;
        let slow = pair.encoder.pages_at_once();
        pair.round(moment(0), &mut std::iter::empty());
        assert!(pair.encoder.page_ns < 20e6, "it is measured");
        (first, slow)
    };
    assert_eq!(pages("zstd:19"), (MAX_ZSTD_PAGES, LEAST_PAGES));
    assert!(pages("off").0 > 1000);
}

#[test]
fn a_page_that_went_raw_in_between_is_no_base_for_what_changed_later() {
    let mut pair = Pair::new("delta", 1000);
    let write = |pair: &mut Pair, page, bytes, value| pair.write(Write { page, at: 0, bytes, value });
    for (round, [first, second]) in
        [[9, 9], [9, 9], [PAGE, 9], [9, 9], [9, 9], [9, 9]].into_iter().enumerate()
    {
        // after the first page has changed as a whole, the second is not tried once
        write(&mut pair, 0, first, 2 * round as u8 + 1);
        write(&mut pair, 1, second, 2 * round as u8 + 2);
        pair.round(moment(round as u32), &mut std::iter::empty());
        pair.assert_same();
    }
    // raw, taken in, [raw, raw], delta and [taken in again], then deltas
    assert_eq!(pair.counts.delta, 1 + 2 * 2);
}

#[test]
fn a_page_that_changed_too_much_goes_as_it_was_kept_whatever_the_guest_writes_then() {
    let mut pair = Pair::new("delta", 1000);
    let (all, byte) =
        (Write { page: 1, at: 0, bytes: PAGE, value: 5 }, Write { page: 1, at: 70, bytes: 1, value: 5 });
    pair.write(Write { value: 1, ..byte });
    pair.round(moment(0), &mut std::iter::empty());
    pair.write(Write { value: 2, ..byte });
    pair.round(moment(1), &mut std::iter::empty());
    pair.write(all);
    pair.round(moment(2), &mut [Write { value: 9, ..byte }].into_iter());
    // the first of the chunk's pages is left out after that
    pair.write(Write { page: 0, ..byte });
    pair.write(byte);
    pair.round(moment(3), &mut std::iter::empty());
    pair.assert_same();
    assert_eq!(pair.counts.delta, 1);
}

#[test]
fn what_is_compressed_of_a_page_that_is_kept_is_what_was_kept() {
    let mut pair = Pair::new("delta", 1000);
    let byte = Write { page: 1, at: 70, bytes: 1, value: 5 };
    pair.dirty.clear();
    pair.write(byte);
    pair.round(moment(1), &mut std::iter::empty());
    let Some(Piece::Cached(slot)) = pair.encoder.batch.pieces.first() else { panic!("it was taken in") };
    let origins = [Origin::Guest, Origin::Cached(*slot)];
    pair.write(Write { value: 9, ..byte });
    pair.write(Write { page: 0, value: 9, ..byte });
    let deltas = pair.encoder.deltas.as_ref();
    let mut copy = vec![0; 2 * PAGE];
    Stretch { pages: &pair.source, first: 0, origins: &origins, deltas }.copy(&mut copy);
    assert_eq!((copy[70], copy[PAGE + 70]), (9, 5));
}

#[test]
fn what_changed_too_much_goes_raw_and_is_tried_less_and_less() {
    let mut state = 1u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let mut pair = Pair::new("delta", 1000);
    for round in 0..20 {
        for page in 0..100 {
            let content: Vec<u8> = (0..PAGE).map(|_| random()).collect();
            pair.guest.write_slice(&content, GuestAddress(page * 4096)).unwrap();
            pair.dirty.insert(page);
        }
        pair.round(moment(round), &mut std::iter::empty());
    }
    pair.assert_same();
    assert_eq!((pair.counts.raw, pair.counts.delta), (2000, 0));
}

/// Ends the guest, even if the test fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The same with a guest that really runs beside, so that pages are torn in the middle.
#[test]
fn memory_arrives_as_it_is_in_the_end_with_a_guest_that_writes_while_pages_are_copied() {
    for compress in ["zstd", "delta", "auto"] {
        let mut pair = Pair::new(compress, 64);
        (0..100).for_each(|page| pair.write(Write { page, at: 9, bytes: 1, value: 1 }));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let guest = pair.guest.clone();
            let writing = scope.spawn({
                let stop = &stop;
                move || {
                    let mut count = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        count += 1;
                        let page = count.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
                        let at = page % 100 * 4096 + count * 8 % 4096;
                        // back and forth, so that what was kept comes back
                        guest.write_obj(1 + count % 2, GuestAddress(at)).unwrap();
                    }
                }
            });
            let stops = StopOnDrop(&stop);
            for round in 0..30 {
                pair.dirty.extend(0..100);
                pair.round(moment(round), &mut std::iter::empty());
            }
            drop(stops);
            writing.join().unwrap();
        });
        pair.dirty.extend(0..100);
        pair.round(Moment { round: 30, is_last: true }, &mut std::iter::empty());
        pair.assert_same();
        assert!(pair.counts.encoded() > 1000, "{compress}: {:?}", pair.counts);
    }
}

#[test]
fn a_payload_is_never_larger_than_it_may_be_on_the_wire() {
    const { assert!(delta::MOST_BYTES < PAGE) };
    assert!(
        (1..=MAX_ZSTD_PAGES).all(|pages| super::super::zstd::Packer::most_bytes(pages * PAGE) < pages * PAGE)
    );
}
