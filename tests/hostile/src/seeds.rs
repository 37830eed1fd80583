//! Valid inputs to start from: whole conversations with either side, and every golden frame.

use std::time::Duration;

use mig_core::switchover::ArbiterId;
use mig_wire::bytes::Reader;
use mig_wire::describe::Region;
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{ChunkDigests, DestinationCosts, Fate};
use mig_wire::header::{Header, Kind};
use mig_wire::hello::{Capabilities, Hello, Query, Secret, SessionId, Welcome, session_tag};
use mig_wire::pages::{self, Encoding, RoundEnd, Run};
use mig_wire::{Description, Message, Section, section};

use crate::input::SCRIPT_BYTES;

/// The session of every seed.
pub const SESSION: SessionId = *b"0123456789abcdef";
/// The destination's secret in every seed, and in the machine that hears it.
pub const SECRET: Secret = [0xa5; 16];
/// The arbiter of both machines, where the script has one.
pub const ARBITER: ArbiterId = [0x5a; 16];

/// The question that the machine takes for its source's.
pub fn query() -> Query {
    Query { session: SESSION, secret: SECRET }
}

/// All goes well on this side.
const SCRIPT: [u8; SCRIPT_BYTES] = [0; SCRIPT_BYTES];
/// The same, with an arbiter.
const ARBITRATED: [u8; SCRIPT_BYTES] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

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
    let (none, verify, arbiter) = (Capabilities::empty(), Capabilities::VERIFY, Capabilities::ARBITER);
    let abort = Message::Abort(fault());
    // out of turn after Commit: the source does not know what became of its guest
    let nonsense = Message::RoundAck { round: 9 };
    let [never, unknown] = [Fate::Never, Fate::Unknown].map(Message::Outcome);
    let ms = Duration::from_millis(1);
    let runs = Message::Outcome(Fate::Running { resume: ms, running_for: ms });
    let ready = Message::Ready { verify: ms, load: ms };
    let running = Message::Running { resume: ms };
    let started = Message::Started { since_ready: ms };
    let mismatch =
        Message::Mismatch { chunks: 1, samples: vec![ChunkDigests { chunk: 1, pages: vec![9; 488] }] };
    let told = [opening(none), vec![message(&abort)]].concat();
    let asked = [to_destination(none, &[]), vec![message(&Message::Query(query()))]].concat();
    let gap = Message::Gap(None);
    let conversations = [
        ("destination takes a guest", SCRIPT, to_destination(none, &[])),
        ("destination takes a guest and compares digests", SCRIPT, to_destination(verify, &[])),
        ("destination takes a guest by its arbiter", ARBITRATED, to_destination(arbiter, &[])),
        ("destination restores a machine", SCRIPT, to_destination(none, &golden_state())),
        ("destination is told to abort", SCRIPT, told),
        ("destination is asked", SCRIPT, asked),
        ("destination is left with a copy", SCRIPT, without_last(to_destination(none, &[]))),
        ("source gives its guest away", SCRIPT, to_source(verify, &[&ready, &running, &gap])),
        ("source hears how the start was timed", SCRIPT, {
            to_source(verify | Capabilities::STARTED, &[&ready, &running, &started, &gap])
        }),
        ("destination times its start, and chooses how many channels", SCRIPT, {
            to_destination(Capabilities::STARTED | Capabilities::SUITED_CHANNELS, &[])
        }),
        ("destination takes encoded pages", SCRIPT, encoded_to_destination()),
        ("source is promised that the guest never ran", SCRIPT, to_source(verify, &[&ready, &abort])),
        ("source asks and gets its guest back", SCRIPT, {
            to_source(verify, &[&ready, &nonsense, &unknown, &never])
        }),
        ("source asks and its guest is there", SCRIPT, to_source(verify, &[&ready, &nonsense, &runs])),
        ("source gets its guest back from its arbiter", ARBITRATED, {
            to_source(verify | arbiter, &[&ready, &nonsense])
        }),
        ("source finds that memory differs", SCRIPT, to_source(verify, &[&mismatch])),
        ("source loses its guest", SCRIPT, to_source(verify, &[&ready, &Message::Lost(fault())])),
    ];
    conversations
        .map(|(name, script, frames)| {
            let numbered = (0..).zip(&frames).flat_map(|(sequence, frame)| numbered(frame, sequence));
            Seed { name: name.into(), bytes: script.into_iter().chain(numbered).collect() }
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

fn without_last(mut frames: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
    frames.pop();
    frames
}

fn opening(capabilities: Capabilities) -> Vec<Vec<u8>> {
    let wishes = Capabilities::STARTED | Capabilities::SUITED_CHANNELS | Capabilities::PAGE_ENCODINGS;
    let (required, optional) = ((capabilities - wishes).bits(), (capabilities & wishes).bits());
    let hello = Hello { version_min: 1, version_max: 1, required, optional, channels: 2, session: SESSION };
    let mut description = description();
    if capabilities.contains(Capabilities::ARBITER) {
        let body = ARBITER.to_vec();
        let section = Section { name: "mig.arbiter".into(), instance: 0, version: 1, critical: true, body };
        description.platform.push(section);
    }
    vec![message(&Message::Hello(hello)), message(&Message::Describe(Box::new(description)))]
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

fn to_destination(capabilities: Capabilities, state: &[Section]) -> Vec<Vec<u8>> {
    let mut frames = opening(capabilities);
    frames.extend(round(0));
    frames.extend(round(1));
    frames.push(message(&Message::State { round: 1, sections: state.to_vec() }));
    if capabilities.contains(Capabilities::VERIFY) {
        // chunks of 512 pages: two for the first region, one for the second
        frames.push(message(&Message::Digests { first_chunk: 0, digests: vec![1, 2] }));
        frames.push(message(&Message::Digests { first_chunk: 2, digests: vec![3] }));
    }
    frames.push(message(&Message::Ping(1)));
    frames.push(message(&Message::Commit));
    frames
}

/// The same guest, with pages in every encoding there is.
fn encoded_to_destination() -> Vec<Vec<u8>> {
    let mut frames = opening(Capabilities::PAGE_ENCODINGS);
    frames.extend(round(0));
    let few = [[5; 900], [6; 900]].concat();
    let content = few.iter().chain(&[0; 200]).copied().cycle();
    let packed =
        [32, 1].map(|pages| sealed(&content.clone().take(pages * pages::PAGE_BYTES).collect::<Vec<u8>>()));
    // of the page that is decoded before it
    let mut changed: Vec<u8> = content.take(pages::PAGE_BYTES).collect();
    changed[40..42].fill(9);
    let delta = [&[40, 2, 9, 9][..], &pages::checksum(&changed)].concat();
    let bytes = |payload: &[u8]| payload.len() as u32;
    let runs = [
        Run { first_page: 3, count: 32, encoding: Encoding::Zstd { bytes: bytes(&packed[0]) } },
        Run { first_page: 899, count: 1, encoding: Encoding::Raw },
        Run { first_page: 1024, count: 1, encoding: Encoding::Zstd { bytes: bytes(&packed[1]) } },
        Run { first_page: 900, count: 1, encoding: Encoding::Delta { bytes: bytes(&delta) } },
    ];
    let mut body = Vec::new();
    pages::encode_table(&runs, &mut body);
    for payload in [&packed[0][..], &[7; pages::PAGE_BYTES], &packed[1], &delta] {
        body.extend_from_slice(payload);
    }
    frames.push(page_frame(Kind::Pages, runs.len(), 1, &body));
    for raw_pages in [35, 0] {
        frames.push(page_frame(Kind::RoundEnd, 0, 1, &RoundEnd { zero_pages: 0, raw_pages }.encode()));
    }
    frames.push(message(&Message::State { round: 1, sections: Vec::new() }));
    frames.push(message(&Message::Commit));
    frames
}

/// Pages, compressed and with their checksum.
fn sealed(pages: &[u8]) -> Vec<u8> {
    let frame = zstd::bulk::compress(pages, 3).expect("there is memory for it");
    [&frame[..], &pages::checksum(pages)].concat()
}

/// As a source hears it: a round, the last round, and then `end`.
fn to_source(capabilities: Capabilities, end: &[&Message]) -> Vec<Vec<u8>> {
    let ms = Duration::from_millis(1);
    let opening = [
        Message::Welcome(Welcome {
            version: 1,
            capabilities: capabilities.bits(),
            channels: 2,
            secret: SECRET,
        }),
        Message::Accept(DestinationCosts { load: ms, resume: ms, verify: ms }),
        Message::Pong(1000),
        Message::RoundAck { round: 0 },
        Message::RoundAck { round: 1 },
    ];
    opening.iter().chain(end.iter().copied()).map(message).collect()
}

fn fault() -> Fault {
    Fault::new(Side::Destination, Step::Load, Blame::Local, "cause").remedy("remedy")
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
