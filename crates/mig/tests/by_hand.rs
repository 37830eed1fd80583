//! A source that is spoken by hand, frame by frame: what a receiver makes of it when it is right, and when it
//! is not.

mod model;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use mig::describe::Region;
use mig::observe::PageCounts;
use mig::{Control, Description, Fault, Listener, ReceiveOptions, Received, Section, receive};
use mig_wire::frame::Fate;
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use mig_wire::hello::{Attach, Capabilities, Hello, Query, session_tag};
use mig_wire::pages::{self, Encoding, RoundEnd, Run};
use mig_wire::{Blame, Message};
use model::{Host, Model};

const SESSION: [u8; 16] = *b"spoken by hand!!";
/// Two chunks, one for each channel.
const PAGES: u64 = 1024;

struct Peer {
    stream: TcpStream,
    sequence: u64,
}

impl Peer {
    fn connect(address: &mig::Address) -> Self {
        let stream = TcpStream::connect(address.to_string().trim_start_matches("tcp:")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { stream, sequence: 0 }
    }

    fn say(&mut self, message: &Message) {
        let frame = message.encode(self.sequence, session_tag(&SESSION)).unwrap();
        self.sequence += 1;
        self.stream.write_all(&frame).unwrap();
    }

    /// The next message that is no ping; `None` at the end.
    fn hear(&mut self) -> Option<Message> {
        loop {
            let mut head = [0; HEADER_BYTES];
            self.stream.read_exact(&mut head).ok()?;
            let header = Header::decode(&head).unwrap();
            let mut body = vec![0; header.body_bytes()];
            self.stream.read_exact(&mut body).unwrap();
            match Message::decode(&header, &body).unwrap() {
                Message::Ping(_) => {}
                message => return Some(message),
            }
        }
    }

    fn frame(&mut self, kind: Kind, round: u32, items: u16, body: &[u8]) {
        let (sequence, session) = (self.sequence, session_tag(&SESSION));
        let length = body.len() as u32;
        let header = Header { kind, items, length, round, sequence, session, body_crc: 0 };
        self.sequence += 1;
        self.stream.write_all(&[&header.encode()[..], body].concat()).unwrap();
    }

    /// One page, all bytes `value`; as a page of zeros if that is 0.
    fn page(&mut self, round: u32, first_page: u64, value: u8) {
        let encoding = if value == 0 { Encoding::Zero } else { Encoding::Raw };
        let mut body = Vec::new();
        pages::encode_table(&[Run { first_page, count: 1, encoding }], &mut body);
        if value != 0 {
            body.extend_from_slice(&[value; 4096]);
        }
        self.frame(Kind::Pages, round, 1, &body);
    }

    /// Runs and what follows their table.
    fn runs(&mut self, round: u32, runs: &[Run], payload: &[u8]) {
        let mut body = Vec::new();
        pages::encode_table(runs, &mut body);
        body.extend_from_slice(payload);
        self.frame(Kind::Pages, round, runs.len() as u16, &body);
    }

    fn end_round(&mut self, round: u32, zero_pages: u64, raw_pages: u64) {
        self.frame(Kind::RoundEnd, round, 0, &RoundEnd { zero_pages, raw_pages }.encode());
    }
}

/// A source with two page channels attached, ready to send round 0.
struct Source {
    control: Peer,
    channels: [Peer; 2],
    address: mig::Address,
    secret: [u8; 16],
}

fn attach(address: &mig::Address, secret: [u8; 16], channel: u16) -> Peer {
    let mut peer = Peer::connect(address);
    peer.say(&Message::Attach(Attach { session: SESSION, secret, channel }));
    peer
}

fn hello(optional: Capabilities) -> Message {
    Message::Hello(Hello {
        version_min: 1,
        version_max: 1,
        required: 0,
        optional: optional.bits(),
        channels: 2,
        session: SESSION,
    })
}

impl Source {
    fn new(address: &mig::Address, optional: Capabilities) -> Self {
        let mut control = Peer::connect(address);
        control.say(&hello(optional));
        let Some(Message::Welcome(welcome)) = control.hear() else { panic!("no welcome") };
        assert_eq!(welcome.channels, 2);
        control.say(&Message::Describe(Box::new(Description {
            architecture: "model".into(),
            page_bytes: 4096,
            vcpus: 1,
            regions: vec![Region { guest_address: 0, bytes: PAGES * 4096 }],
            boot_id: None,
            schemas: Vec::new(),
            platform: Vec::new(),
        })));
        assert!(matches!(control.hear(), Some(Message::Accept(_))));
        let mut stranger = attach(address, [0; 16], 0);
        assert_eq!(stranger.hear(), None, "without the secret there is no channel");
        let mut channels = [0, 1].map(|channel| attach(address, welcome.secret, channel));
        for channel in &mut channels {
            assert_eq!(channel.hear(), Some(Message::Attached));
        }
        Self { control, channels, address: address.clone(), secret: welcome.secret }
    }

    /// Asks on a new connection; the answer.
    fn query(&self, secret: [u8; 16]) -> Option<Message> {
        let mut asking = Peer::connect(&self.address);
        asking.say(&Message::Query(Query { session: SESSION, secret }));
        asking.hear()
    }

    /// An empty guest, up to Ready.
    fn until_ready(&mut self) {
        self.end_round(0, [(0, 0), (0, 0)]);
        self.state(0);
        assert_eq!(self.control.hear(), Some(Message::RoundAck { round: 0 }));
        assert!(matches!(self.control.hear(), Some(Message::Ready { .. })));
    }

    fn end_round(&mut self, round: u32, counts: [(u64, u64); 2]) {
        for (channel, (zero, raw)) in self.channels.iter_mut().zip(counts) {
            channel.end_round(round, zero, raw);
        }
    }

    fn state(&mut self, round: u32) {
        self.control.say(&Message::State { round, sections: vec![Section::critical("model", 0, 1, &7u64)] });
    }
}

/// Runs a receiver against `speak`.
fn received(speak: impl FnOnce(&mut Source)) -> Received<Model> {
    received_with(Capabilities::PAGE_ENCODINGS, speak)
}

fn received_with(optional: Capabilities, speak: impl FnOnce(&mut Source)) -> Received<Model> {
    let listener = Listener::bind(&mig::Address::tcp("127.0.0.1", 0)).unwrap();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &Control::new(), &())
        });
        let mut source = Source::new(listener.address(), optional);
        speak(&mut source);
        drop(source);
        receiving.join().unwrap()
    })
}

fn refused(speak: impl FnOnce(&mut Source)) -> Fault {
    refused_with(Capabilities::PAGE_ENCODINGS, speak)
}

fn refused_with(optional: Capabilities, speak: impl FnOnce(&mut Source)) -> Fault {
    let outcome = received_with(optional, |source| {
        speak(source);
        assert!(matches!(source.control.hear(), Some(Message::Abort(_))), "it promises not to run the guest");
    });
    let Received::NotReceived(fault) = outcome else { panic!("received") };
    assert_eq!(fault.blame, Blame::Peer, "{fault}");
    fault
}

#[test]
fn a_page_that_becomes_zero_after_it_was_sent_is_zero_here() {
    let outcome = received(|source| {
        source.channels[0].page(0, 3, 0xaa);
        source.channels[0].page(0, 4, 0xbb);
        source.channels[1].page(0, 600, 0xcc);
        source.end_round(0, [(0, 2), (0, 1)]);
        assert_eq!(source.control.hear(), Some(Message::RoundAck { round: 0 }));
        source.channels[0].page(1, 3, 0);
        source.channels[1].page(1, 601, 0);
        source.end_round(1, [(1, 0), (1, 0)]);
        source.state(1);
        assert_eq!(source.control.hear(), Some(Message::RoundAck { round: 1 }));
        assert!(matches!(source.control.hear(), Some(Message::Ready { .. })));
        source.control.say(&Message::Commit);
        assert!(matches!(source.control.hear(), Some(Message::Running { .. })));
        assert!(matches!(source.control.hear(), Some(Message::Gap(_))));
    });
    let Received::Running { vm, report } = outcome else { panic!("not running") };
    assert_eq!([3, 4, 600, 601].map(|page| vm.first_byte(page)), [0, 0xbb, 0xcc, 0]);
    assert_eq!((report.pages.raw, report.pages.zero, report.rounds), (3, 2, 2));
}

#[test]
fn whoever_asks_with_the_secret_has_the_guest_back_and_a_commit_on_the_old_connection_meets_nobody() {
    let outcome = received(|source| {
        source.until_ready();
        assert_eq!(source.query(source.secret), Some(Message::Outcome(Fate::Never)));
        // the old connection was never lost: the other half of the network is slow, not dead
        source.control.say(&Message::Commit);
        while let Some(message) = source.control.hear() {
            assert!(!matches!(message, Message::Running { .. }), "{message:?}");
        }
        assert_eq!(
            source.query(source.secret),
            Some(Message::Outcome(Fate::Never)),
            "as often as it is asked"
        );
    });
    assert!(matches!(outcome, Received::NotReceived(_)));
}

#[test]
fn whoever_asks_without_the_secret_learns_nothing_and_changes_nothing() {
    let outcome = received(|source| {
        assert_eq!(
            source.query(source.secret),
            Some(Message::Outcome(Fate::Unknown)),
            "nothing can be in doubt"
        );
        source.until_ready();
        let mut close = source.secret;
        close[15] ^= 1;
        for wrong in [close, [0; 16]] {
            assert_eq!(source.query(wrong), Some(Message::Outcome(Fate::Unknown)));
        }
        source.control.say(&Message::Commit);
        assert!(matches!(source.control.hear(), Some(Message::Running { .. })));
        assert!(matches!(source.control.hear(), Some(Message::Gap(_))));
        let answer = loop {
            match source.query(source.secret) {
                Some(Message::Outcome(Fate::Unknown)) | None => {}
                answer => break answer,
            }
        };
        assert!(matches!(answer, Some(Message::Outcome(Fate::Running { .. }))), "{answer:?}");
        assert_eq!(source.query(close), Some(Message::Outcome(Fate::Unknown)));
    });
    assert!(matches!(outcome, Received::Running { .. }));
}

#[test]
fn a_page_on_the_channel_of_another_is_refused() {
    let fault = refused(|source| source.channels[0].page(0, 600, 1));
    assert!(fault.cause.contains("another channel"), "{fault}");
}

#[test]
fn a_page_beyond_the_guests_memory_is_refused() {
    let fault = refused(|source| source.channels[0].page(0, PAGES, 1));
    assert!(fault.cause.contains("page index"), "{fault}");
    let fault = refused(|source| source.channels[0].page(0, u64::MAX, 1));
    assert!(fault.cause.contains("page index"), "{fault}");
}

/// Pages that are all `value`, compressed.
fn compressed(first_page: u64, count: u32, value: u8) -> (Run, Vec<u8>) {
    let content = vec![value; count as usize * 4096];
    let payload = [zstd::bulk::compress(&content, 1).unwrap(), pages::checksum(&content).to_vec()].concat();
    let encoding = Encoding::Zstd { bytes: payload.len() as u32 };
    (Run { first_page, count, encoding }, payload)
}

/// What changed of a page that was all `old`, and is so but for its byte `at`.
fn changed(first_page: u64, old: u8, at: u8, new: u8) -> (Run, Vec<u8>) {
    let mut content = [old; 4096];
    content[usize::from(at)] = new;
    let payload = [&[at, 1, new][..], &pages::checksum(&content)].concat();
    (Run { first_page, count: 1, encoding: Encoding::Delta { bytes: payload.len() as u32 } }, payload)
}

#[test]
fn raw_and_encoded_pages_of_one_frame_come_to_their_places() {
    let outcome = received(|source| {
        let raw = |first_page| Run { first_page, count: 1, encoding: Encoding::Raw };
        let zeros = Run { first_page: 50, count: 9, encoding: Encoding::Zero };
        let (three, packed) = compressed(3, 32, 3);
        let (other, packed_too) = compressed(100, 1, 4);
        let payload = [&[1; 4096][..], &packed, &[2; 4096], &packed_too].concat();
        source.channels[0].runs(0, &[raw(0), three, zeros, raw(40), other], &payload);
        source.end_round(0, [(9, 35), (0, 0)]);
        assert_eq!(source.control.hear(), Some(Message::RoundAck { round: 0 }));
        let ((run, delta), (again, more)) = (changed(40, 2, 0, 9), changed(34, 3, 7, 9));
        let zero = Run { first_page: 3, count: 1, encoding: Encoding::Zero };
        let payload = [&delta[..], &[5; 4096], &more].concat();
        source.channels[0].runs(1, &[run, raw(41), again, zero], &payload);
        source.end_round(1, [(1, 3), (0, 0)]);
        source.state(1);
        assert_eq!(source.control.hear(), Some(Message::RoundAck { round: 1 }));
        assert!(matches!(source.control.hear(), Some(Message::Ready { .. })));
        source.control.say(&Message::Commit);
        assert!(matches!(source.control.hear(), Some(Message::Running { .. })));
        assert!(matches!(source.control.hear(), Some(Message::Gap(_))));
    });
    let Received::Running { vm, report } = outcome else { panic!("not running") };
    let pages = [0, 2, 3, 4, 34, 35, 40, 41, 42, 100, 101];
    assert_eq!(pages.map(|page| vm.first_byte(page)), [1, 0, 0, 3, 3, 0, 9, 5, 0, 4, 0]);
    let PageCounts { zero, raw, zstd, delta } = report.pages;
    assert_eq!((zero, raw, zstd, delta), (10, 3, 33, 2));
}

/// More payloads than are read at a time.
#[test]
fn a_frame_full_of_encoded_pages_comes_to_its_places() {
    let outcome = received(|source| {
        // half of each piece does not shrink
        let content: Vec<u8> = (0..500 * 4096u64)
            .map(|at| (at.wrapping_mul(at).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 51) as u8 | 1)
            .collect();
        let pieces = content.chunks(32 * 4096).zip((0..).step_by(32)).map(|(content, first_page)| {
            let mut half = content.to_vec();
            half[..content.len() / 2].fill(first_page as u8 + 1);
            let payload = [zstd::bulk::compress(&half, 1).unwrap(), pages::checksum(&half).to_vec()].concat();
            let encoding = Encoding::Zstd { bytes: payload.len() as u32 };
            (Run { first_page, count: (content.len() / 4096) as u32, encoding }, payload)
        });
        let (runs, payloads): (Vec<Run>, Vec<Vec<u8>>) = pieces.unzip();
        assert!(payloads.iter().map(Vec::len).sum::<usize>() > 512 << 10);
        source.channels[0].runs(0, &runs, &payloads.concat());
        source.end_round(0, [(0, 500), (0, 0)]);
        source.state(0);
        assert_eq!(source.control.hear(), Some(Message::RoundAck { round: 0 }));
        assert!(matches!(source.control.hear(), Some(Message::Ready { .. })));
        source.control.say(&Message::Commit);
        assert!(matches!(source.control.hear(), Some(Message::Running { .. })));
        assert!(matches!(source.control.hear(), Some(Message::Gap(_))));
    });
    let Received::Running { vm, .. } = outcome else { panic!("not running") };
    assert_eq!([0, 32, 480].map(|page| vm.first_byte(page)), [1, 33, 225]);
}

#[test]
fn an_encoded_payload_that_is_none_is_refused_by_what_is_wrong_with_it() {
    let words = |run: Run, payload: &[u8]| {
        let fault = refused(|source| {
            source.channels[0].page(0, 3, 7);
            source.channels[0].runs(0, &[run], payload);
        });
        fault.cause
    };
    let (run, payload) = compressed(3, 2, 1);
    let fewer = Run { count: 1, ..run };
    let mut damaged = payload.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let longer = Run { encoding: Encoding::Zstd { bytes: payload.len() as u32 + 1 }, ..run };
    let mut trailing = payload.clone();
    trailing.insert(payload.len() - 4, 0);
    for (run, payload, cause) in [
        (Run { count: 3, ..run }, &payload, "compressed pages ends early"),
        (fewer, &payload, "compressed pages: "),
        (run, &damaged, "decoded pages has checksum"),
        (longer, &trailing, "followed by 1 unread"),
    ] {
        assert!(words(run, payload).contains(cause), "{cause}: {}", words(run, payload));
    }
    let (run, payload) = changed(3, 6, 9, 1);
    assert!(words(run, &payload).contains("decoded pages has checksum"), "made for another page");
    let (run, payload) = changed(4, 0, 9, 1);
    assert!(words(run, &payload).contains("never sent"), "{}", words(run, &payload));
}

#[test]
fn encodings_that_were_not_agreed_on_are_refused() {
    for (optional, (run, payload)) in [
        (Capabilities::empty(), compressed(3, 1, 1)),
        (Capabilities::DELTA, compressed(3, 1, 1)),
        (Capabilities::ZSTD, changed(3, 7, 9, 1)),
    ] {
        let fault = refused_with(optional, |source| {
            source.channels[0].page(0, 3, 7);
            source.channels[0].runs(0, &[run], &payload);
        });
        assert!(fault.cause.contains("not agreed on"), "{fault}");
    }
}

#[test]
fn a_round_that_ends_with_fewer_pages_than_were_said_to_be_sent_is_refused() {
    let fault = refused(|source| {
        source.channels[0].page(0, 3, 1);
        source.channels[0].end_round(0, 0, 2);
    });
    assert!(fault.cause.contains("not those that were sent"), "{fault}");
}

#[test]
fn a_missing_frame_is_noticed_on_either_kind_of_channel() {
    let fault = refused(|source| {
        source.channels[1].sequence += 1;
        source.channels[1].page(0, 600, 1);
    });
    assert!(fault.cause.contains("a frame is missing"), "{fault}");
    let fault = refused(|source| {
        source.control.sequence += 1;
        source.state(0);
    });
    assert!(fault.cause.contains("a message is missing"), "{fault}");
}

#[test]
fn a_commit_before_the_state_is_refused() {
    let fault = refused(|source| source.control.say(&Message::Commit));
    assert!(fault.cause.contains("commit out of turn"), "{fault}");
}

/// Pings for the control channel until it is closed.
fn keep_alive<'s>(scope: &'s std::thread::Scope<'s, '_>, control: &Peer) {
    let mut pinging = Peer { stream: control.stream.try_clone().unwrap(), sequence: control.sequence };
    scope.spawn(move || {
        let tag = session_tag(&SESSION);
        loop {
            let ping = Message::Ping(0).encode(pinging.sequence, tag).unwrap();
            pinging.sequence += 1;
            if pinging.stream.write_all(&ping).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    });
}

/// The destination's promise, with its reason, after all the pongs.
fn promise(control: &mut Peer) -> Fault {
    let last = (0..3000).map(|_| control.hear()).find(|m| !matches!(m, Some(Message::Pong(_))));
    let last = last.expect("more than the pongs of ten minutes");
    let Some(Message::Abort(fault)) = last else { panic!("no abort but {last:?}") };
    fault
}

#[test]
fn a_source_that_lives_but_never_goes_on_is_given_up_with_a_promise() {
    let listener = Listener::bind(&mig::Address::tcp("127.0.0.1", 0)).unwrap();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &Control::new(), &())
        });
        let mut control = Peer::connect(listener.address());
        control.say(&hello(Capabilities::empty()));
        assert!(matches!(control.hear(), Some(Message::Welcome(_))));
        // it is alive, so silence is not what ends it
        keep_alive(scope, &control);
        let fault = promise(&mut control);
        assert!(fault.cause.contains("has not gone on in time"), "{fault}");
        assert!(
            matches!(receiving.join().unwrap(), Received::NotReceived(fault) if fault.blame == Blame::Peer)
        );
    });
}

/// Inside a frame of pages, and inside the state; both at once, since each takes half a minute.
#[test]
fn a_source_that_lets_a_byte_a_second_through_is_given_up_with_a_promise() {
    let given_up = |drip: fn(&mut Source) -> Vec<u8>, on_control: bool| {
        let outcome = received(|source| {
            let frame = drip(source);
            std::thread::scope(|scope| {
                if !on_control {
                    keep_alive(scope, &source.control);
                }
                let from = if on_control { &source.control } else { &source.channels[0] };
                let mut from = from.stream.try_clone().unwrap();
                scope.spawn(move || {
                    for byte in frame {
                        // it hangs up in the middle, which it should
                        if from.write_all(&[byte]).is_err() {
                            return;
                        }
                        std::thread::sleep(Duration::from_secs(1));
                    }
                });
                let fault = promise(&mut source.control);
                eprintln!("{fault}");
                assert!(fault.cause.contains("bytes of the round in 3"), "{fault}");
                let _ = source.control.stream.shutdown(std::net::Shutdown::Both);
                let _ = source.channels[0].stream.shutdown(std::net::Shutdown::Both);
            });
        });
        assert!(matches!(outcome, Received::NotReceived(fault) if fault.blame == Blame::Peer));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| given_up(|_| header_of_pages(), false));
        scope.spawn(|| {
            let state = |source: &mut Source| {
                let sections = vec![Section::critical("model", 0, 1, &7u64)];
                Message::State { round: 0, sections }
                    .encode(source.control.sequence, session_tag(&SESSION))
                    .unwrap()
            };
            given_up(state, true);
        });
    });
}

/// The beginning of a frame with a page.
fn header_of_pages() -> Vec<u8> {
    let mut body = Vec::new();
    pages::encode_table(&[Run { first_page: 3, count: 1, encoding: Encoding::Raw }], &mut body);
    let length = body.len() as u32 + 4096;
    let session = session_tag(&SESSION);
    let header = Header { kind: Kind::Pages, round: 0, items: 1, length, sequence: 1, session, body_crc: 0 };
    [&header.encode()[..], &body, &[1; 4096]].concat()
}
