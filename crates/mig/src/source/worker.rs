//! A page channel's sending thread: batches in, frames out.

use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender};
use mig_core::bitmap::PageRun;
use mig_core::progress::PageCounts;
use mig_core::{Side, Step};
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use mig_wire::pages::{self, RoundEnd, Run};

use super::driver::Note;
use crate::encoding;
use crate::encoding::encoder::{Encoder, Moment, Settings};
use crate::link::ReadError;
use crate::memory::Pages;
use crate::pace::Pacer;
use crate::transport::Stream;

/// What a worker is to do.
#[derive(Debug)]
pub(super) enum Job {
    /// Send these pages, at most [`pages::MAX_PAGES`] of them.
    Batch {
        /// When.
        moment: Moment,
        /// The pages.
        runs: Vec<PageRun>,
    },
    /// Say that the round has ended.
    EndRound {
        /// The round.
        round: u32,
    },
}

/// A page channel.
pub(super) struct Worker<'a> {
    stream: &'a Stream,
    pages: &'a Pages,
    pacer: &'a Pacer,
    session: u64,
    sequence: u64,
    counts: PageCounts,
    bytes: u64,
    encoder: Encoder,
    /// The part of a batch that is sent together.
    part: Vec<PageRun>,
    head: Vec<u8>,
    vectors: Vec<libc::iovec>,
}

impl<'a> Worker<'a> {
    /// A worker on a stream on which the attach message was sent.
    pub(super) fn new(
        stream: &'a Stream,
        pages: &'a Pages,
        pacer: &'a Pacer,
        session: u64,
        settings: &Settings,
    ) -> Self {
        Self {
            stream,
            pages,
            pacer,
            session,
            sequence: 1,
            counts: PageCounts::default(),
            bytes: 0,
            encoder: Encoder::new(pages, settings),
            part: Vec::new(),
            head: Vec::new(),
            vectors: Vec::new(),
        }
    }

    /// Works until the jobs end or the stream fails. Used batches go back through `spent`.
    pub(super) fn run(mut self, jobs: &Receiver<Job>, spent: &Sender<Vec<PageRun>>, notes: &Sender<Note>) {
        for job in jobs {
            let (round, result) = match job {
                Job::Batch { moment, runs } => {
                    let result = self.send(moment, &runs);
                    // a full channel of spent batches lets this one go
                    let _ = spent.try_send(runs);
                    (moment.round, result)
                }
                Job::EndRound { round } => (round, self.end_round(round, notes)),
            };
            if let Err(error) = result {
                let fault = ReadError::from(error).fault(Side::Source, Step::Round(round));
                // the coordinator may be gone, and with it who would care
                let _ = notes.send(Note::Failed(fault));
                return;
            }
        }
    }

    /// As many pages at a time as are encoded soon.
    fn send(&mut self, moment: Moment, runs: &[PageRun]) -> std::io::Result<()> {
        let mut left = runs.iter().copied();
        let mut rest = None;
        loop {
            self.part.clear();
            rest = take(self.encoder.pages_at_once() as u64, rest, &mut left, &mut self.part);
            if self.part.is_empty() {
                return Ok(());
            }
            self.send_part(moment)?;
        }
    }

    fn send_part(&mut self, moment: Moment) -> std::io::Result<()> {
        self.encoder.encode(self.pages, moment, &self.part);
        let table = self.encoder.table();
        self.counts += encoding::counts(table);
        let payload: usize = table.iter().map(Run::payload_bytes).sum();
        let (items, length) = (table.len(), pages::table_bytes(table.len()) + payload);
        let header = self.header(Kind::Pages, items, length, moment.round);
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
        pages::encode_table(self.encoder.table(), &mut self.head);
        self.bytes += (HEADER_BYTES + length) as u64;
        let (began, mut held) = (Instant::now(), Duration::ZERO);
        let payload = self.encoder.payload();
        self.stream.write_pages(&self.head, self.pages, payload, &mut self.vectors, |wanted| {
            let asked = Instant::now();
            let granted = self.pacer.wait(wanted);
            held += asked.elapsed();
            granted
        })?;
        self.encoder.written(HEADER_BYTES + length, began.elapsed(), held);
        Ok(())
    }

    fn end_round(&mut self, round: u32, notes: &Sender<Note>) -> std::io::Result<()> {
        let end = RoundEnd { zero_pages: self.counts.zero, raw_pages: self.counts.with_bytes() };
        let body = end.encode();
        let mut frame = self.header(Kind::RoundEnd, 0, body.len(), round).encode().to_vec();
        frame.extend_from_slice(&body);
        self.bytes += frame.len() as u64;
        self.stream.write_all(&frame)?;
        let pages = std::mem::take(&mut self.counts);
        let bytes = std::mem::take(&mut self.bytes);
        // the coordinator may be gone, and with it who would care
        let _ = notes.send(Note::ChannelSent { pages, bytes });
        Ok(())
    }

    fn header(&mut self, kind: Kind, items: usize, length: usize, round: u32) -> Header {
        let sequence = self.sequence;
        self.sequence += 1;
        Header {
            kind,
            items: u16::try_from(items).expect("a batch has at most MAX_RUNS runs"),
            length: u32::try_from(length).expect("a batch has at most MAX_PAGES pages"),
            round,
            sequence,
            session: self.session,
            body_crc: 0,
        }
    }
}

/// Takes up to `pages` pages: of `rest` first, then of `left`. What is over of a run comes back.
fn take(
    mut pages: u64,
    rest: Option<PageRun>,
    left: &mut impl Iterator<Item = PageRun>,
    into: &mut Vec<PageRun>,
) -> Option<PageRun> {
    let mut next = rest.or_else(|| left.next());
    while let Some(run) = next {
        let count = run.count.min(pages);
        into.push(PageRun { count, ..run });
        pages -= count;
        if pages == 0 {
            let over = PageRun { first: run.first + count, count: run.count - count };
            return (over.count > 0).then_some(over);
        }
        next = left.next();
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_batch_is_taken_in_parts_of_the_size_asked_for_and_whole_in_the_end(
            counts in proptest::collection::vec(1..40u64, 0..30), sizes in proptest::collection::vec(1..90u64, 1..9)
        ) {
            let runs: Vec<PageRun> =
                counts.iter().enumerate().map(|(at, count)| PageRun { first: at as u64 * 100, count: *count }).collect();
            let pages = |runs: &[PageRun]| runs.iter().flat_map(|r| r.first..r.first + r.count).collect::<Vec<_>>();
            let (mut left, mut rest, mut taken) = (runs.iter().copied(), None, Vec::new());
            for size in sizes.iter().cycle() {
                let mut part = Vec::new();
                rest = take(*size, rest, &mut left, &mut part);
                let part = pages(&part);
                let over = counts.iter().sum::<u64>() - taken.len() as u64;
                prop_assert_eq!(part.len() as u64, over.min(*size));
                if part.is_empty() {
                    break;
                }
                taken.extend(part);
            }
            prop_assert_eq!(taken, pages(&runs));
        }
    }
}
