//! The wire's golden frames: each kind of frame, byte for byte as every version wrote it.

mod golden;

use std::collections::BTreeSet;
use std::sync::Once;
use std::time::Duration;

use mig_wire::describe::{Region, Schema};
use mig_wire::frame::{ChunkDigests, DestinationCosts, Fate};
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use mig_wire::hello::{Attach, Hello, Query, Welcome};
use mig_wire::pages::{self, Encoding, RoundEnd, Run};
use mig_wire::{Blame, Description, Fault, Message, Refusal, Section, Side, Step};

const FILE: &str = "frames.hex";
const SEQUENCE: u64 = 0x0102_0304_0506_0708;
const SESSION: u64 = 0x1112_1314_1516_1718;
const ROUND: u32 = 5;

/// What a golden frame means.
#[derive(Debug, PartialEq)]
enum Meaning {
    Message(Box<Message>),
    Pages(Vec<Run>, Vec<u8>),
    RoundEnd(RoundEnd),
}

/// What version 1 meant by each line of its file.
fn version_1() -> Vec<(&'static str, Meaning)> {
    let section = |name: &str, critical| Section {
        name: name.into(),
        instance: 3,
        version: 1,
        critical,
        body: vec![0, 1, 0xfe, 0xff],
    };
    let fault = |side, step, blame| Fault::new(side, step, blame, "cause \u{e9}").remedy("remedy");
    let ms = Duration::from_millis;
    let description = Description {
        architecture: "x86_64".into(),
        page_bytes: 4096,
        vcpus: 2,
        regions: vec![
            Region { guest_address: 0, bytes: 0xc000_0000 },
            Region { guest_address: 1 << 32, bytes: 1 << 20 },
        ],
        boot_id: Some([9; 16]),
        schemas: vec![Schema { name: "kvm.vcpu".into(), version: 1 }],
        platform: vec![section("kvm.cpu", true)],
    };
    let refusal = Refusal::new("memory", "the guest has 2, this host 1", "free some");
    let samples = vec![ChunkDigests { chunk: 6, pages: vec![1, u64::MAX] }];
    let messages = [
        (
            "hello",
            Message::Hello(Hello {
                version_min: 1,
                version_max: 1,
                required: 1,
                optional: 0x8000_0000_0000_0000,
                channels: 4,
                session: *b"0123456789abcdef",
            }),
        ),
        (
            "welcome",
            Message::Welcome(Welcome { version: 1, capabilities: 1, channels: 2, secret: [0xa5; 16] }),
        ),
        (
            "describe without a boot id",
            Message::Describe(Box::new(Description { boot_id: None, ..description.clone() })),
        ),
        ("describe", Message::Describe(Box::new(description))),
        ("accept", Message::Accept(DestinationCosts { load: ms(1), resume: ms(2), verify: ms(3) })),
        ("refuse", Message::Refuse(vec![refusal.clone(), refusal])),
        ("attach", Message::Attach(Attach { session: *b"0123456789abcdef", secret: [0xa5; 16], channel: 1 })),
        ("attached", Message::Attached),
        ("round acknowledgement", Message::RoundAck { round: ROUND }),
        ("state", Message::State { round: ROUND, sections: vec![section("a", true), section("b.c", false)] }),
        ("digests", Message::Digests { first_chunk: 8192, digests: vec![7, u64::MAX, 0] }),
        ("ready", Message::Ready { verify: ms(4), load: ms(5) }),
        ("mismatch", Message::Mismatch { chunks: 9, samples }),
        ("commit", Message::Commit),
        ("running", Message::Running { resume: ms(6) }),
        ("gap", Message::Gap(Some(ms(7)))),
        ("gap that is not known", Message::Gap(None)),
        ("lost", Message::Lost(fault(Side::Destination, Step::Resume, Blame::Local))),
        ("ping", Message::Ping(0x2122_2324_2526_2728)),
        ("pong", Message::Pong(0x2122_2324_2526_2728)),
    ];
    let mut all: Vec<_> = messages.into_iter().map(|(n, m)| (n, Meaning::Message(Box::new(m)))).collect();
    let faults = [
        ("abort at connect", Side::Source, Step::Connect, Blame::Local),
        ("abort at handshake", Side::Destination, Step::Handshake, Blame::Peer),
        ("abort at describe", Side::Source, Step::Describe, Blame::Network),
        ("abort at prepare", Side::Destination, Step::Prepare, Blame::Configuration),
        ("abort at attach", Side::Source, Step::Attach, Blame::Local),
        ("abort at track", Side::Source, Step::Track, Blame::Local),
        ("abort at a round", Side::Source, Step::Round(77), Blame::Local),
        ("abort at pause", Side::Source, Step::Pause, Blame::Local),
        ("abort at save", Side::Source, Step::Save, Blame::Local),
        ("abort at last sync", Side::Source, Step::LastSync, Blame::Local),
        ("abort at last round", Side::Source, Step::LastRound, Blame::Local),
        ("abort at verify", Side::Source, Step::Verify, Blame::Local),
        ("abort at load", Side::Source, Step::Load, Blame::Local),
        ("abort at commit", Side::Source, Step::Commit, Blame::Local),
        ("abort at resume", Side::Source, Step::Resume, Blame::Local),
    ];
    all.extend(faults.map(|(name, side, step, blame)| {
        (name, Meaning::Message(Box::new(Message::Abort(fault(side, step, blame)))))
    }));
    let runs = vec![
        Run { first_page: 0x1_0000_0000, count: 2, encoding: Encoding::Zero },
        Run { first_page: 513, count: 1, encoding: Encoding::Raw },
    ];
    let page = (0..4096).map(|i| (i % 251) as u8).collect();
    all.push(("pages", Meaning::Pages(runs, page)));
    all.push(("round end", Meaning::RoundEnd(RoundEnd { zero_pages: 2, raw_pages: 1 })));
    // kinds that came later stand at the end
    let later = [
        ("query", Message::Query(Query { session: *b"0123456789abcdef", secret: [0xa5; 16] })),
        ("outcome never", Message::Outcome(Fate::Never)),
        ("outcome running", Message::Outcome(Fate::Running { resume: ms(6), running_for: ms(8) })),
        ("outcome lost", Message::Outcome(Fate::Lost)),
        ("outcome unknown", Message::Outcome(Fate::Unknown)),
        ("started", Message::Started { since_ready: ms(9) }),
    ];
    all.extend(later.map(|(name, message)| (name, Meaning::Message(Box::new(message)))));
    // and encodings that came later
    let encoded = vec![
        Run { first_page: 7, count: 1, encoding: Encoding::Raw },
        Run { first_page: 1024, count: 32, encoding: Encoding::Zstd { bytes: 0x01_02 } },
        Run { first_page: 8, count: 1, encoding: Encoding::Delta { bytes: 11 } },
    ];
    let payload = (0..4096 + 0x01_02 + 11).map(|i| (i % 241) as u8).collect();
    all.push(("encoded pages", Meaning::Pages(encoded, payload)));
    all
}

fn encode(meaning: &Meaning) -> Vec<u8> {
    let (kind, items, body) = match meaning {
        Meaning::Message(message) => return message.encode(SEQUENCE, SESSION).unwrap(),
        Meaning::Pages(runs, data) => {
            let mut body = Vec::new();
            pages::encode_table(runs, &mut body);
            body.extend_from_slice(data);
            (Kind::Pages, runs.len(), body)
        }
        Meaning::RoundEnd(end) => (Kind::RoundEnd, 0, end.encode()),
    };
    let header = Header {
        kind,
        items: items as u16,
        length: body.len() as u32,
        round: ROUND,
        sequence: SEQUENCE,
        session: SESSION,
        body_crc: 0,
    };
    [&header.encode()[..], &body].concat()
}

fn decode(frame: &[u8]) -> (Kind, Meaning) {
    let (head, body) = frame.split_first_chunk::<HEADER_BYTES>().expect("a header");
    let header = Header::decode(head).unwrap();
    assert_eq!((header.sequence, header.session), (SEQUENCE, SESSION));
    assert_eq!(header.body_bytes(), body.len());
    let meaning = match header.kind {
        Kind::Pages => {
            let (table, data) = body.split_at(pages::expected_table_bytes(&header).unwrap());
            let mut runs = Vec::new();
            pages::decode_table(&header, table, &mut runs).unwrap();
            assert_eq!(header.round, ROUND);
            Meaning::Pages(runs, data.to_vec())
        }
        Kind::RoundEnd => {
            assert_eq!(header.round, ROUND);
            Meaning::RoundEnd(RoundEnd::decode(body).unwrap())
        }
        _ => Meaning::Message(Box::new(Message::decode(&header, body).unwrap())),
    };
    (header.kind, meaning)
}

fn hex(frame: &[u8]) -> String {
    frame.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(digits: &str) -> Vec<u8> {
    assert!(digits.is_ascii() && digits.len().is_multiple_of(2));
    let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("hexadecimal digits");
    (0..digits.len()).step_by(2).map(byte).collect()
}

/// The lines of a file, `NAME: HEX`.
fn lines(version: &str) -> Vec<(String, Vec<u8>)> {
    static BLESSED: Once = Once::new();
    BLESSED.call_once(|| {
        golden::bless(FILE, || {
            let line = |(name, meaning): &(&str, Meaning)| format!("{name}: {}\n", hex(&encode(meaning)));
            version_1().iter().map(line).collect::<String>().into_bytes()
        });
    });
    let text = String::from_utf8(golden::read(version, FILE)).unwrap();
    let line = |line: &str| {
        let (name, digits) = line.split_once(": ").expect("NAME: HEX");
        (name.to_owned(), unhex(digits))
    };
    text.lines().map(line).collect()
}

#[test]
fn every_frame_of_version_1_means_what_it_meant_and_is_written_the_same() {
    let meant = version_1();
    let frames = lines("v1");
    let names: Vec<&str> = frames.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, meant.iter().map(|(name, _)| *name).collect::<Vec<_>>());
    for ((name, frame), (_, meaning)) in frames.iter().zip(&meant) {
        assert_eq!(&decode(frame).1, meaning, "{name} is read as it was meant");
        assert_eq!(hex(&encode(meaning)), hex(frame), "{name} is written as it was");
    }
}

#[test]
fn there_is_a_golden_frame_of_every_kind() {
    let there: BTreeSet<u16> = lines(golden::CURRENT).iter().map(|(_, f)| decode(f).0 as u16).collect();
    let missing: Vec<Kind> = Kind::ALL.into_iter().filter(|k| !there.contains(&(*k as u16))).collect();
    assert_eq!(missing, []);
}
