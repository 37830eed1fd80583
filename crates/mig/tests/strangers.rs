//! Whoever else connects to a receiver: scanners, clients of other protocols, early closers, the silent, second
//! sources, channels without the secret. None of them keeps a guest out, or ends its receive.

mod model;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mig::observe::Progress;
use mig::{
    Address, Control, Listener, Observer, Outcome, ReceiveOptions, Received, SourceOptions, migrate, receive,
};
use mig_wire::Message;
use mig_wire::header::{Header, Kind};
use mig_wire::hello::{Attach, Hello, Query, session_tag};
use model::{Flaw, Host, Model};

const BUSY: Duration = Duration::from_micros(100);
/// The session of every stranger that pretends to have one.
const SESSION: [u8; 16] = *b"not of this side";

/// Counts whom the receiver turned away.
#[derive(Default)]
struct Door {
    turned_away: AtomicUsize,
    causes: Mutex<Vec<String>>,
    accepted: AtomicBool,
}

impl Observer for Door {
    fn progress(&self, progress: &Progress) {
        if let Progress::TurnedAway { cause, .. } = progress {
            self.turned_away.fetch_add(1, Ordering::SeqCst);
            self.causes.lock().unwrap().push(cause.clone());
        }
        self.accepted.fetch_or(matches!(progress, Progress::Accepted), Ordering::SeqCst);
    }
}

fn listener() -> Listener {
    Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap()
}

fn connect(address: &Address) -> TcpStream {
    let stream = TcpStream::connect(address.to_string().trim_start_matches("tcp:")).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream
}

fn frame(message: &Message) -> Vec<u8> {
    message.encode(0, session_tag(&SESSION)).unwrap()
}

/// What a stranger says first, of every sort there is.
fn greetings() -> Vec<Vec<u8>> {
    let header = |kind, length| {
        let (items, round, sequence, body_crc) = (0, 0, 0, 0);
        Header { kind, items, length, round, sequence, session: session_tag(&SESSION), body_crc }
            .encode()
            .to_vec()
    };
    let noise =
        |seed: u32| (0..300u32).map(move |at| ((at * 7919 + seed).wrapping_mul(2_654_435_761) >> 13) as u8);
    let attach = Message::Attach(Attach { session: SESSION, secret: [1; 16], channel: 0 });
    vec![
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: zgrab/0.x\r\nAccept: */*\r\n\r\n".to_vec(),
        // a TLS 1.2 ClientHello's first bytes
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), vec![0x5a; 506]].concat(),
        b"SSH-2.0-OpenSSH_9.7\r\n".to_vec(),
        noise(1).collect(),
        noise(77).collect(),
        vec![0; 4096],
        // nothing, or not even a header
        Vec::new(),
        b"MIG\x01".to_vec(),
        header(Kind::Hello, 38)[..39].to_vec(),
        // a header and no body, one with more than there may be, one of a kind that nobody begins with
        header(Kind::Hello, 38),
        header(Kind::Hello, 256),
        header(Kind::State, 16 << 20),
        header(Kind::Pages, 4 << 20),
        frame(&Message::Commit),
        frame(&Message::Ping(1)),
        // a damaged hello
        {
            let mut hello = frame(&hello());
            let last = hello.len() - 1;
            hello[last] ^= 1;
            hello
        },
        frame(&attach),
    ]
}

fn hello() -> Message {
    let session = SESSION;
    Message::Hello(Hello { version_min: 1, version_max: 1, required: 0, optional: 0, channels: 2, session })
}

/// Strangers, many at a time: `crowds` threads, each with `at_once` open connections, until `done` says so.
fn besiege(address: &Address, crowds: usize, at_once: usize, done: impl Fn(usize) -> bool + Sync) -> usize {
    let (greetings, number) = (greetings(), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..crowds {
            scope.spawn(|| {
                while !done(number.load(Ordering::SeqCst)) {
                    let crowd: Vec<TcpStream> = (0..at_once)
                        .map(|_| {
                            let greeting =
                                &greetings[number.fetch_add(1, Ordering::SeqCst) % greetings.len()];
                            let mut stream = connect(address);
                            // it may have been hung up on before the last byte
                            let _ = stream.write_all(greeting);
                            stream
                        })
                        .collect();
                    // half of them wait to be hung up on, as a client would
                    for mut stream in crowd.into_iter().step_by(2) {
                        let _ = stream.shutdown(std::net::Shutdown::Write);
                        let _ = stream.read(&mut [0; 64]);
                    }
                }
            });
        }
    });
    number.load(Ordering::SeqCst)
}

fn assert_moved(outcome: Outcome<Model>) {
    match outcome {
        Outcome::Moved(_) => {}
        Outcome::StillHere { report, .. } | Outcome::Discarded(report) => panic!("{:?}", report.fault),
    }
}

fn verified() -> SourceOptions {
    SourceOptions { verify: true, ..SourceOptions::default() }
}

#[test]
fn a_thousand_strangers_are_turned_away_and_then_a_guest_is_taken() {
    let (listener, door) = (listener(), Door::default());
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &Control::new(), &door)
        });
        let came = besiege(listener.address(), 8, 25, |number| number >= 1000);
        let outcome = migrate(
            Model::running(2000, BUSY, Flaw::None),
            listener.address(),
            &verified(),
            &Control::new(),
            &(),
        );
        assert_moved(outcome);
        assert!(matches!(receiving.join().unwrap(), Received::Running { .. }));
        let turned_away = door.turned_away.load(Ordering::SeqCst);
        assert!(came >= 1000 && turned_away > came / 2, "{turned_away} of {came} turned away");
    });
    let causes = door.causes.into_inner().unwrap();
    for words in ["GET / HTTP/1.1", "SSH-2.0", "closed", "neither hello nor attach", "checksum", "not here"] {
        assert!(causes.iter().any(|cause| cause.contains(words)), "nobody was turned away for: {words}");
    }
}

#[test]
fn strangers_and_second_sources_all_the_while_do_not_disturb_a_receive() {
    let (listener, door, moved) = (listener(), Door::default(), AtomicBool::new(false));
    let source = Door::default();
    let mut host = Host { flaw: Flaw::SlowRestore(Duration::from_millis(500)), ..Host::default() };
    std::thread::scope(|scope| {
        let receiving =
            scope.spawn(|| receive(&listener, &mut host, &ReceiveOptions::default(), &Control::new(), &door));
        let siege = scope
            .spawn(|| besiege(listener.address(), 3, 8, |came| came > 100 && moved.load(Ordering::SeqCst)));
        let sending = scope.spawn(|| {
            let vm = Model::running(20_000, BUSY, Flaw::None);
            migrate(vm, listener.address(), &verified(), &Control::new(), &source)
        });
        while !source.accepted.load(Ordering::SeqCst) && !sending.is_finished() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut refused = 0;
        while !sending.is_finished() {
            refused += usize::from(is_told_busy(listener.address()));
        }
        moved.store(true, Ordering::SeqCst);
        assert_moved(sending.join().unwrap());
        assert!(matches!(receiving.join().unwrap(), Received::Running { .. }));
        assert!(siege.join().unwrap() > 100);
        assert!(refused > 0, "a second source is told that this one is busy");
    });
}

/// Comes as a source while a guest is being received.
fn is_told_busy(address: &Address) -> bool {
    let (mut rival, mut answer) = (connect(address), Vec::new());
    rival.write_all(&frame(&hello())).is_ok()
        && rival.read_to_end(&mut answer).is_ok()
        && answer.windows(4).any(|word| word == b"busy")
}

#[test]
fn a_source_in_doubt_is_answered_although_strangers_wait_where_nobody_receives() {
    let listener = listener();
    let mut crowd: Vec<TcpStream> = Vec::new();
    for greeting in greetings().iter().cycle().take(200) {
        let mut stream = connect(listener.address());
        let _ = stream.write_all(greeting);
        crowd.push(stream);
    }
    let asked = Instant::now();
    let mut asking = connect(listener.address());
    asking.write_all(&frame(&Message::Query(Query { session: SESSION, secret: [1; 16] }))).unwrap();
    let mut answer = [0; 40];
    asking.read_exact(&mut answer).unwrap();
    assert_eq!(Header::decode(&answer).unwrap().kind, Kind::Outcome, "after {:?}", asked.elapsed());
}
