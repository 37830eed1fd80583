//! What connections that have said nothing yet cost a receiver: alone in its process, since memory is counted.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use mig::{Address, Listener};
use mig_wire::header::{Header, Kind};

/// The most connections that are heard at a time (docs/protocol.md).
const MAX_UNKNOWN: usize = 64;
/// How long one may take to say what it is.
const INTRODUCTION: Duration = Duration::from_secs(2);
/// The most memory that one of them may take here. Measured: see docs/protocol.md.
const MAX_BYTES_EACH: usize = 64 << 10;

/// A number from /proc/self/status.
fn status(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn wait_for(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < patience, "{what}: {} threads", status("Threads:"));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn connections_that_do_not_say_what_they_are_cost_little_and_are_few_at_a_time() {
    let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
    let address = listener.address().to_string();
    let address = address.trim_start_matches("tcp:");
    let header =
        Header { kind: Kind::Hello, items: 0, length: 256, round: 0, sequence: 0, session: 1, body_crc: 0 };
    // each has its header read and a body made ready for it, and waits there
    let crowd = |count: usize| -> Vec<TcpStream> {
        let mut streams: Vec<TcpStream> = (0..count).map(|_| TcpStream::connect(address).unwrap()).collect();
        streams.iter_mut().for_each(|stream| stream.write_all(&header.encode()).unwrap());
        streams
    };
    let threads = status("Threads:");
    // what the first ones cost is paid once
    drop(crowd(8));
    wait_for("they are let go", || status("Threads:") == threads);

    let resident = status("VmRSS:");
    let began = Instant::now();
    let silent = crowd(100);
    wait_for("as many as may be are heard", || status("Threads:") == threads + MAX_UNKNOWN);
    let each_bytes = status("VmRSS:").saturating_sub(resident) * 1024 / MAX_UNKNOWN;
    println!("{each_bytes} bytes each");
    assert!(each_bytes <= MAX_BYTES_EACH, "{each_bytes} bytes each");

    // the others wait in the kernel until these have had their time, of which this is a part: later one that goes
    // may still be counted beside the one that came for it
    while began.elapsed() < INTRODUCTION * 3 / 4 {
        let now = status("Threads:");
        assert_eq!(now, threads + MAX_UNKNOWN);
        std::thread::sleep(Duration::from_millis(5));
    }
    wait_for("all are let go", || status("Threads:") == threads);
    drop(silent);
}
