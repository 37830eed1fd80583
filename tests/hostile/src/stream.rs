//! The decoders: headers, messages, tables of pages, ends of rounds.

use mig_wire::Message;
use mig_wire::header::{HEADER_BYTES, Kind};
use mig_wire::pages::{self, MAX_PAGES, MAX_RUNS};

use crate::input::{Frame, Frames, Input, Read};
use crate::{bounds, heap, payload};

/// How far a stream was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reading {
    /// Frames that were accepted.
    pub frames: u64,
    /// The kinds of them, a bit each.
    pub kinds: u32,
    /// Runs of encoded pages that were decoded.
    pub decoded: u64,
    /// Whether it was read to its last byte.
    pub whole: bool,
}

impl Reading {
    /// Whether a frame of this kind was accepted.
    pub fn accepted(&self, kind: Kind) -> bool {
        self.kinds & 1 << kind as u32 != 0
    }
}

/// Reads all of it.
///
/// # Panics
/// When a decoder panics, allocates beyond its bound, or accepts two encodings of one message.
pub fn read(input: &Input<'_>) -> Reading {
    let (mut frames, mut reading) = (input.frames(), Reading::default());
    let most = input.stream.len() / HEADER_BYTES + 1;
    for _ in 0..=most {
        match next(&mut frames) {
            None => return Reading { whole: true, ..reading },
            Some(Err(_)) => return reading,
            Some(Ok(read)) => {
                assert_one_encoding(&read);
                if let Frame::Pages { runs, .. } = &read.frame {
                    let table = pages::table_bytes(runs.len());
                    reading.decoded += payload::decode(runs, &read.body[table..]);
                }
                reading.frames += 1;
                reading.kinds |= 1 << read.header.kind as u32;
            }
        }
    }
    panic!("{most} frames of {} bytes and no end", input.stream.len());
}

/// The next frame, within the bound for it.
pub(crate) fn next<'a>(frames: &mut Frames<'a>) -> Option<Result<Read<'a>, mig_wire::WireError>> {
    let (read, usage) = heap::measure(|| frames.next());
    let (body, peak) = (frames.body_bytes, usage.peak_bytes);
    let bound = bounds::decoding(body);
    assert!(peak <= bound, "{peak} bytes allocated to read a body of {body}, at most {bound} may be");
    read
}

fn assert_one_encoding(read: &Read<'_>) {
    match &read.frame {
        Frame::Message(message) => {
            let again = message.encode(read.header.sequence, read.header.session).expect("within its limit");
            let (head, body) = again.split_at(HEADER_BYTES);
            assert!(head == read.header.encode() && body == read.body, "two encodings: {message:?}");
            assert_bounded(message);
        }
        Frame::Pages { runs, .. } => {
            let mut table = Vec::new();
            pages::encode_table(runs, &mut table);
            let (found, payload) = read.body.split_at(table.len());
            assert!(found == table, "two encodings: {runs:?}");
            assert_eq!(payload.len(), runs.iter().map(pages::Run::payload_bytes).sum::<usize>());
            assert!(
                runs.len() <= MAX_RUNS && runs.iter().map(|r| r.count as usize).sum::<usize>() <= MAX_PAGES
            );
        }
        Frame::RoundEnd { end, .. } => assert_eq!(end.encode(), read.body),
    }
}

/// What the next layer relies on.
fn assert_bounded(message: &Message) {
    match message {
        Message::State { sections, .. } => assert!(sections.len() <= mig_wire::section::MAX_SECTIONS),
        Message::Digests { digests, .. } => assert!(digests.len() <= mig_wire::frame::MAX_DIGESTS),
        Message::Describe(description) => {
            assert!(description.regions.len() <= mig_wire::describe::MAX_REGIONS);
            assert!(description.schemas.len() <= mig_wire::describe::MAX_SCHEMAS);
        }
        _ => {}
    }
}
