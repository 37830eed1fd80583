//! A page channel's sending thread: batches in, frames out.

use std::time::Instant;

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

    fn send(&mut self, moment: Moment, runs: &[PageRun]) -> std::io::Result<()> {
        self.encoder.encode(self.pages, moment, runs);
        let table = self.encoder.table();
        self.counts += encoding::counts(table);
        let payload: usize = table.iter().map(Run::payload_bytes).sum();
        let (items, length) = (table.len(), pages::table_bytes(table.len()) + payload);
        let header = self.header(Kind::Pages, items, length, moment.round);
        self.head.clear();
        self.head.extend_from_slice(&header.encode());
        pages::encode_table(self.encoder.table(), &mut self.head);
        self.bytes += (HEADER_BYTES + length) as u64;
        let began = Instant::now();
        self.stream.write_pages(
            &self.head,
            self.pages,
            self.encoder.payload(),
            &mut self.vectors,
            self.pacer,
        )?;
        self.encoder.written(HEADER_BYTES + length, began.elapsed());
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
