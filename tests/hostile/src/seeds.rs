//! Valid inputs to start from: whole conversations with either side, and every golden frame.

use std::time::Duration;

use mig_wire::bytes::Reader;
use mig_wire::describe::Region;
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, DestinationCosts};
use mig_wire::header::{Header, Kind};
use mig_wire::hello::{Capabilities, Hello, SessionId, Welcome, session_tag};
use mig_wire::pages::{self, Encoding, RoundEnd, Run};
use mig_wire::{Description, Message, Section, section};

use crate::input::SCRIPT_BYTES;

/// The session of every seed.
pub const SESSION: SessionId = *b"0123456789abcdef";

/// All goes well on this side.
const SCRIPT: [u8; SCRIPT_BYTES] = [0; SCRIPT_BYTES];

/// A valid input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// What it is.
    pub name: String,
    /// The input.
    pub bytes: Vec<u8>,
}

/// Every one there is.
pub fn all() -> Vec<Seed> {
    [conversations(), golden_frames()].concat()
}

/// Conversations that go well, and some that end badly.
pub fn conversations() -> Vec<Seed> {
    let conversations = [
        ("destination takes a guest", to_destination(false, &[])),
        ("destination takes a guest and compares digests", to_destination(true, &[])),
        ("destination restores a machine", to_destination(false, &golden_state())),
        ("destination is told to abort", [opening(false), vec![message(&abort())]].concat()),
        ("source gives its guest away", to_source(&[ready(), running(), Message::Gap(None)])),
        ("source is promised that the guest never ran", to_source(&[ready(), abort()])),
        ("source finds that memory differs", to_source(&[mismatch()])),
        ("source loses its guest", to_source(&[ready(), Message::Lost(fault())])),
    ];
    conversations
        .map(|(name, frames)| {
            let numbered = (0..).zip(&frames).flat_map(|(sequence, frame)| numbered(frame, sequence));
            Seed { name: name.into(), bytes: SCRIPT.into_iter().chain(numbered).collect() }
        })
        .to_vec()
}

/// A frame of every kind, as every version wrote it.
pub fn golden_frames() -> Vec<Seed> {
    let seed = |line: &str| {
        let (name, digits) = line.split_once(": ").expect("NAME: HEX");
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal digits");
        let frame = (0..digits.len()).step_by(2).map(byte);
        Seed { name: format!("golden frame: {name}"), bytes: SCRIPT.into_iter().chain(frame).collect() }
    };
    include_str!("../../golden/v1/frames.hex").lines().map(seed).collect()
}

/// A small guest of two regions.
pub fn description() -> Description {
    let region = |guest_address, pages: u64| Region { guest_address, bytes: pages * 4096 };
    Description { regions: vec![region(0, 1000), region(1 << 32, 24)], ..golden_description() }
}

/// A frame with its place in the stream.
fn numbered(frame: &[u8], sequence: u64) -> Vec<u8> {
    let (head, body) = frame.split_first_chunk().expect("a header");
    let header = Header { sequence, ..Header::decode(head).expect("a valid one") };
    [&header.encode()[..], body].concat()
}

fn message(message: &Message) -> Vec<u8> {
    message.encode(0, session_tag(&SESSION)).expect("small messages")
}

fn page_frame(kind: Kind, items: usize, round: u32, body: &[u8]) -> Vec<u8> {
    let (length, session) = (body.len() as u32, session_tag(&SESSION));
    let header = Header { kind, items: items as u16, length, round, sequence: 0, session, body_crc: 0 };
    [&header.encode()[..], body].concat()
}

fn opening(verify: bool) -> Vec<Vec<u8>> {
    let required = if verify { Capabilities::VERIFY.bits() } else { 0 };
    let hello =
        Hello { version_min: 1, version_max: 1, required, optional: 0, channels: 2, session: SESSION };
    vec![message(&Message::Hello(hello)), message(&Message::Describe(Box::new(description())))]
}

/// A round of both channels: runs of zeros and one page with content.
fn round(number: u32) -> Vec<Vec<u8>> {
    let runs = [
        Run { first_page: 3, count: 200, encoding: Encoding::Zero },
        Run { first_page: 900, count: 1, encoding: Encoding::Raw },
        Run { first_page: 1024, count: 24, encoding: Encoding::Zero },
    ];
    let mut table = Vec::new();
    pages::encode_table(&runs, &mut table);
    table.resize(table.len() + pages::PAGE_BYTES, 7);
    let end = |zero_pages, raw_pages| {
        page_frame(Kind::RoundEnd, 0, number, &RoundEnd { zero_pages, raw_pages }.encode())
    };
    vec![page_frame(Kind::Pages, runs.len(), number, &table), end(224, 1), end(0, 0)]
}

fn to_destination(verify: bool, state: &[Section]) -> Vec<Vec<u8>> {
    let mut frames = opening(verify);
    frames.extend(round(0));
    frames.extend(round(1));
    frames.push(message(&Message::State { round: 1, sections: state.to_vec() }));
    if verify {
        // chunks of 512 pages: two for the first region, one for the second
        frames.push(message(&Message::Digests { first_chunk: 0, digests: vec![1, 2] }));
        frames.push(message(&Message::Digests { first_chunk: 2, digests: vec![3] }));
    }
    frames.push(message(&Message::Ping(1)));
    frames.push(message(&Message::Commit));
    frames
}

/// As a source with digests hears it: a round, the last round, and then `end`.
fn to_source(end: &[Message]) -> Vec<Vec<u8>> {
    let capabilities = Capabilities::VERIFY.bits();
    let costs = Duration::from_millis(1);
    let opening = [
        Message::Welcome(Welcome { version: 1, capabilities, channels: 2, secret: [0xa5; 16] }),
        Message::Accept(DestinationCosts { load: costs, resume: costs, verify: costs }),
        Message::Pong(1000),
        Message::RoundAck { round: 0 },
        Message::RoundAck { round: 1 },
    ];
    opening.iter().chain(end).map(message).collect()
}

fn ready() -> Message {
    Message::Ready { verify: Duration::from_millis(1), load: Duration::from_millis(1) }
}

fn running() -> Message {
    Message::Running { resume: Duration::from_millis(1) }
}

fn mismatch() -> Message {
    Message::Mismatch { chunks: 1, samples: vec![ChunkDigests { chunk: 1, pages: vec![9; 488] }] }
}

fn fault() -> Fault {
    Fault::new(Side::Destination, Step::Load, Blame::Local, "cause").remedy("remedy")
}

fn abort() -> Message {
    Message::Abort(fault())
}

/// The state of a real machine.
fn golden_state() -> Vec<Section> {
    let mut reader = Reader::new("state", include_bytes!("../../golden/v1/machine.sections"));
    section::read_all(&mut reader).expect("golden files can be read")
}

/// The description of that machine.
fn golden_description() -> Description {
    let mut reader = Reader::new("description", include_bytes!("../../golden/v1/machine.description"));
    Description::read(&mut reader).expect("golden files can be read")
}
