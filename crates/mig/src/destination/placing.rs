//! The payload of a frame of pages, from the socket into guest memory: raw pages by the kernel, straight to their
//! place; encoded ones decoded aside, checked, and then put there.
//!
//! Invariant: payloads are read where there is room for them ([`STAGE_BYTES`]), whatever a peer announces.

use mig_wire::pages::{Encoding, MAX_ZSTD_PAGES, PAGE_BYTES, Run};

use crate::encoding::decoder::{DecodeError, Decoder, pages_of};
use crate::link::ReadError;
use crate::memory::Pages;
use crate::transport::{Place, Stream};

/// Encoded payloads that are read at a time: two of the largest, or some hundred small ones.
const STAGE_BYTES: usize = 2 * MAX_ZSTD_PAGES * PAGE_BYTES;

/// What a channel sets aside for encoded pages: nothing before the first of them.
#[derive(Default)]
pub(super) struct Placing {
    vectors: Vec<libc::iovec>,
    staged: Vec<u8>,
    decoder: Decoder,
}

impl Placing {
    /// Reads the payload of `runs`, all of which were checked.
    ///
    /// # Errors
    /// The connection's, or an encoded payload that is none.
    pub(super) fn place(&mut self, stream: &Stream, pages: &Pages, runs: &[Run]) -> Result<(), ReadError> {
        let mut left = runs;
        while !left.is_empty() {
            let (together, rest) = left.split_at(staged_together(left));
            let staged_bytes = together.iter().map(staged_bytes).sum();
            if self.staged.len() < staged_bytes {
                self.staged.resize(STAGE_BYTES, 0);
            }
            let places = together.iter().filter_map(|run| match run.encoding {
                Encoding::Zero => None,
                Encoding::Raw => Some(Place::Pages(pages_of(run))),
                Encoding::Zstd { .. } | Encoding::Delta { .. } => Some(Place::Staged(run.payload_bytes())),
            });
            let staged = &mut self.staged[..staged_bytes];
            stream.read_pages(pages, places, staged, &mut self.vectors)?;
            let mut payloads = &*staged;
            for run in together {
                let (payload, behind) = payloads.split_at(self::staged_bytes(run));
                self.decoder.place(pages, run, payload).map_err(|e| match e {
                    DecodeError::Wire(e) => ReadError::Wire(e),
                    DecodeError::Memory(e) => ReadError::Memory(e),
                })?;
                payloads = behind;
            }
            left = rest;
        }
        Ok(())
    }
}

/// How many of the first runs are read together.
fn staged_together(runs: &[Run]) -> usize {
    let mut bytes = 0;
    let too_many = |run: &Run| {
        bytes += staged_bytes(run);
        bytes > STAGE_BYTES
    };
    runs.iter().position(too_many).unwrap_or(runs.len()).max(1)
}

fn staged_bytes(run: &Run) -> usize {
    match run.encoding {
        Encoding::Zero | Encoding::Raw => 0,
        Encoding::Zstd { .. } | Encoding::Delta { .. } => run.payload_bytes(),
    }
}
