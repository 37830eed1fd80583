//! What a run is made of: a script for this side, and the peer's frames.

use mig_core::switchover::Word;
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use mig_wire::pages::{self, RoundEnd, Run};
use mig_wire::{Message, WireError};

/// Bytes of script in front of the stream.
pub const SCRIPT_BYTES: usize = 16;

/// A script and a stream.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    script: [u8; SCRIPT_BYTES],
    /// The peer's frames, one behind the other.
    pub stream: &'a [u8],
}

/// What this side does before a frame is handed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Turn {
    /// Actions under way that are completed.
    pub completions: usize,
    /// How the next of them goes.
    pub luck: Luck,
    /// What somebody wants.
    pub wish: Option<Wish>,
    /// Milliseconds that pass.
    pub elapsed_ms: u64,
}

/// What somebody on this side wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// To cancel.
    Cancel,
    /// To resolve a guest in doubt.
    Resolve(Word),
}

/// How an action of this side goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Luck {
    /// As it should.
    Good,
    /// As it should, with the other of two answers: a refused guest, digests that differ, many dirty pages.
    Other,
    /// It fails.
    Bad,
}

impl Turn {
    /// All that is under way comes to a good end.
    pub const SETTLE: Self = Self { completions: usize::MAX, luck: Luck::Good, wish: None, elapsed_ms: 0 };
}

impl<'a> Input<'a> {
    /// Splits bytes; a script that is too short goes on with zeros.
    pub fn new(bytes: &'a [u8]) -> Self {
        let (head, stream) = bytes.split_at(bytes.len().min(SCRIPT_BYTES));
        let mut script = [0; SCRIPT_BYTES];
        script[..head.len()].copy_from_slice(head);
        Self { script, stream }
    }

    /// What happens before frame `at`; the script repeats itself, but for its last byte.
    pub fn turn(&self, at: usize) -> Turn {
        let byte = self.script[at % (SCRIPT_BYTES - 1)];
        let completions = match byte & 3 {
            0 | 1 => usize::MAX,
            2 => 1,
            _ => 0,
        };
        let (luck, wish) = match byte >> 2 & 15 {
            15 => (Luck::Good, Some(Wish::Cancel)),
            14 => (Luck::Bad, None),
            12 | 13 => (Luck::Other, None),
            11 => (Luck::Good, Some(Wish::Resolve(Word::Resume))),
            10 => (Luck::Good, Some(Wish::Resolve(Word::Discard))),
            _ => (Luck::Good, None),
        };
        Turn { completions, luck, wish, elapsed_ms: u64::from(byte >> 6) }
    }

    /// Whether this side uses an arbiter.
    pub fn is_arbitrated(&self) -> bool {
        self.script[SCRIPT_BYTES - 1] & 1 == 1
    }

    /// The frames, as far as they can be read: after an error there are no more.
    pub fn frames(&self) -> Frames<'a> {
        Frames { left: self.stream, body_bytes: 0 }
    }
}

/// A frame that was read.
#[derive(Debug)]
pub enum Frame {
    /// A message of the control channel.
    Message(Message),
    /// A table of pages; the pages themselves are skipped.
    Pages {
        /// The round the header names.
        round: u32,
        /// The runs.
        runs: Vec<Run>,
    },
    /// The end of a channel's part of a round.
    RoundEnd {
        /// The round the header names.
        round: u32,
        /// What was sent in it.
        end: RoundEnd,
    },
}

/// A frame, and the bytes it was read from.
#[derive(Debug)]
pub struct Read<'a> {
    /// What it means.
    pub frame: Frame,
    /// Its header.
    pub header: Header,
    /// What follows the header.
    pub body: &'a [u8],
}

/// Iterator made by [`Input::frames`].
#[derive(Debug, Clone)]
pub struct Frames<'a> {
    left: &'a [u8],
    /// Bytes of the body that was looked at last.
    pub(crate) body_bytes: usize,
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Read<'a>, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left.is_empty() {
            return None;
        }
        let read = self.read();
        if read.is_err() {
            self.left = &[];
        }
        Some(read)
    }
}

impl<'a> Frames<'a> {
    fn read(&mut self) -> Result<Read<'a>, WireError> {
        self.body_bytes = 0;
        let short = |needed, left| WireError::Truncated { what: "stream", needed, left };
        let (head, rest) = self
            .left
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or_else(|| short(HEADER_BYTES, self.left.len()))?;
        let header = Header::decode(head)?;
        let needed = header.body_bytes();
        assert!(needed <= header.kind.max_body_bytes(), "a header is refused above its kind's limit");
        let (body, rest) = rest.split_at_checked(needed).ok_or_else(|| short(needed, rest.len()))?;
        self.body_bytes = needed;
        let frame = decode(&header, body)?;
        self.left = rest;
        Ok(Read { frame, header, body })
    }
}

/// As the control channel's reader and the page channels' do together.
fn decode(header: &Header, body: &[u8]) -> Result<Frame, WireError> {
    Ok(match header.kind {
        Kind::Pages => {
            let table = pages::expected_table_bytes(header)?;
            let (table, _) = body.split_at(table);
            let mut runs = Vec::new();
            pages::decode_table(header, table, &mut runs)?;
            Frame::Pages { round: header.round, runs }
        }
        Kind::RoundEnd => Frame::RoundEnd { round: header.round, end: RoundEnd::decode(body)? },
        _ => Frame::Message(Message::decode(header, body)?),
    })
}
