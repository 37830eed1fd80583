//! A page channel's receiving thread: frames in, pages in place.

use crossbeam::channel::Sender;
use mig_core::bitmap::PageRun;
use mig_core::progress::PageCounts;
use mig_core::{Fault, Side, Step};
use mig_wire::WireError;
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use mig_wire::hello::Capabilities;
use mig_wire::pages::{self, Encoding, RoundEnd, Run};

use super::driver::Note;
use super::filled::Filled;
use super::placing::Placing;
use crate::encoding;
use crate::encoding::decoder::pages_of;
use crate::link::{ReadError, read_header};
use crate::memory::Pages;
use crate::source::channel_of;
use crate::transport::Stream;

/// Runs of fewer pages are faulted in by the read: that costs no more than asking for them first.
const MIN_POPULATED_PAGES: u64 = 8;

/// A page channel.
pub(super) struct Worker<'a> {
    pub(super) stream: &'a Stream,
    pub(super) pages: &'a Pages,
    pub(super) filled: &'a Filled,
    pub(super) session: u64,
    pub(super) channel: usize,
    pub(super) channels: usize,
    /// Those that were agreed on.
    pub(super) encodings: Capabilities,
}

impl Worker<'_> {
    /// Receives until the source ends the channel, which it may between frames only.
    pub(super) fn run(self, notes: &Sender<Note>) {
        let (mut round, mut sequence) = (0, 1);
        let mut counts = PageCounts::default();
        let mut bytes = 0;
        let mut buffers = Buffers::default();
        loop {
            let step = match self.next(sequence, round) {
                Ok(None) => return,
                Ok(Some(header)) => {
                    self.frame(&header, &mut counts, &mut buffers).map(|ended| (header, ended))
                }
                Err(error) => Err(error),
            };
            match step {
                Ok((header, ended)) => {
                    bytes += HEADER_BYTES as u64 + u64::from(header.length);
                    if ended {
                        let pages = std::mem::take(&mut counts);
                        let note = Note::ChannelEnded { round, pages, bytes: std::mem::take(&mut bytes) };
                        if notes.send(note).is_err() {
                            return;
                        }
                        round += 1;
                    }
                    sequence += 1;
                }
                Err(error) => {
                    let fault = error.fault(Side::Destination, Step::Round(round));
                    // the coordinator may be gone, and with it who would care
                    let _ = notes.send(Note::Failed(fault));
                    return;
                }
            }
        }
    }

    fn next(&self, sequence: u64, round: u32) -> Result<Option<Header>, ReadError> {
        let Some(header) = read_header(self.stream)? else { return Ok(None) };
        if header.session != self.session {
            return Err(ReadError::Order("another session"));
        }
        if header.sequence != sequence {
            return Err(ReadError::Order("a frame is missing"));
        }
        if header.round != round {
            return Err(ReadError::Order("a frame of another round"));
        }
        Ok(Some(header))
    }

    /// Takes a frame; says whether it ended the round.
    fn frame(
        &self,
        header: &Header,
        counts: &mut PageCounts,
        buffers: &mut Buffers,
    ) -> Result<bool, ReadError> {
        match header.kind {
            Kind::Pages => {
                *counts += self.pages(header, buffers)?;
                reach!(DestinationMidRound);
                Ok(false)
            }
            Kind::RoundEnd => {
                let mut body = vec![0; header.body_bytes()];
                self.stream.read_exact(&mut body).map_err(ReadError::from)?;
                let end = RoundEnd::decode(&body).map_err(ReadError::Wire)?;
                if (end.zero_pages, end.raw_pages) != (counts.zero, counts.with_bytes()) {
                    return Err(ReadError::Order("the round's pages are not those that were sent"));
                }
                Ok(true)
            }
            _ => Err(ReadError::Order("a message on a page channel")),
        }
    }

    fn pages(&self, header: &Header, buffers: &mut Buffers) -> Result<PageCounts, ReadError> {
        let table_bytes = pages::expected_table_bytes(header).map_err(ReadError::Wire)?;
        buffers.table.resize(table_bytes, 0);
        self.stream.read_exact(&mut buffers.table).map_err(ReadError::from)?;
        pages::decode_table(header, &buffers.table, &mut buffers.runs).map_err(ReadError::Wire)?;
        // all of them, before a byte lands
        for run in &buffers.runs {
            self.check(run)?;
        }
        for run in buffers.runs.iter().filter(|r| r.encoding != Encoding::Zero) {
            self.make_room(pages_of(run))?;
        }
        buffers.placing.place(self.stream, self.pages, &buffers.runs)?;
        self.note_placed(&buffers.runs);
        Ok(encoding::counts(&buffers.runs))
    }

    /// Has the host find memory for pages that come for the first time, before the socket is read: faulted in
    /// by the read itself, they would keep the socket locked while they are cleared. Where the kernel refuses
    /// memory rather than kill for it, that is an error here.
    fn make_room(&self, run: PageRun) -> Result<(), ReadError> {
        if run.count < MIN_POPULATED_PAGES || self.filled.contains(run.first) {
            return Ok(());
        }
        self.pages.populate(run).map_err(ReadError::Memory)
    }

    fn check(&self, run: &Run) -> Result<(), ReadError> {
        let count = u64::from(run.count);
        if !self.pages.domain().holds(run.first_page, count) {
            let limit = self.pages.domain().end_page();
            return Err(ReadError::Wire(WireError::TooMany {
                what: "page index",
                value: run.first_page,
                limit,
            }));
        }
        let (first, last) = (run.first_page, run.first_page + count - 1);
        let chunk = mig_core::domain::CHUNK_PAGES;
        if first / chunk != last / chunk || channel_of(first, self.channels) != self.channel {
            return Err(ReadError::Order("pages of another channel"));
        }
        let needed = match run.encoding {
            Encoding::Zero | Encoding::Raw => Capabilities::empty(),
            Encoding::Zstd { .. } => Capabilities::ZSTD,
            Encoding::Delta { .. } => Capabilities::DELTA,
        };
        if !self.encodings.contains(needed) {
            return Err(ReadError::Order("pages in an encoding that was not agreed on"));
        }
        if needed == Capabilities::DELTA && !self.filled.contains(first) {
            return Err(ReadError::Order("what changed of a page that was never sent"));
        }
        Ok(())
    }

    fn note_placed(&self, runs: &[Run]) {
        for run in runs {
            let pages = pages_of(run);
            match run.encoding {
                Encoding::Zero => self.filled.unfill(pages, |page| self.pages.clear(page)),
                Encoding::Raw | Encoding::Zstd { .. } | Encoding::Delta { .. } => self.filled.fill(pages),
            }
        }
    }
}

#[derive(Default)]
struct Buffers {
    table: Vec<u8>,
    runs: Vec<Run>,
    placing: Placing,
}

/// A fault of this side's own making.
pub(super) fn local(step: Step, error: impl std::fmt::Display) -> Fault {
    Fault::new(Side::Destination, step, mig_core::Blame::Local, error.to_string())
}
