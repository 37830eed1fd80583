//! A wire between a source and a destination that a test holds in its hand: it stops the migration right before
//! a chosen message, holds pages back, or lets them through a few at a time.
//!
//! Knows of the protocol only where frames begin and of what kind they are, so that it serves tests of programs
//! that must not depend on the wire format.

#![allow(unreachable_pub, missing_docs, dead_code)] // a part of several test programs

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

/// Far more than anything here takes: a test that waits so long hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const HEADER_BYTES: usize = 40;

/// Messages that a test stops at, by their numbers on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Describe = 3,
    Accept = 4,
    Attach = 6,
    Attached = 7,
    Pages = 8,
    RoundEnd = 9,
    RoundAck = 10,
    State = 11,
    Ready = 13,
    Commit = 15,
    Running = 16,
}

/// How a stream flows in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    Open,
    /// Nothing is read: soon the sender's socket is full.
    Shut,
    /// So many bytes a second are let through.
    Slow(u64),
    /// All is read, and nothing let through.
    Lost,
}

/// Where a stream begins and what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ControlToDestination,
    ControlToSource,
    PagesToDestination,
    PagesToSource,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trap {
    None,
    /// From a frame of that kind on the stream flows like that in that direction.
    From(u16, Flow),
    /// When so many bytes of pages went through: they flow like that from then on.
    AfterPageBytes(u64, Flow),
}

/// The gate. All connections are cut when it is dropped.
pub struct Gate {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    flows: [Flow; 4],
    trap: Trap,
    sprung: bool,
    closed: bool,
    page_bytes: u64,
    streams: Vec<TcpStream>,
}

impl Gate {
    /// A gate before `to`, which is `HOST:PORT`, with `tcp:` before it or not.
    pub fn before(to: &str) -> Self {
        let to = to.trim_start_matches("tcp:").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = State {
            flows: [Flow::Open; 4],
            trap: Trap::None,
            sprung: false,
            closed: false,
            page_bytes: 0,
            streams: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let accepting = shared.clone();
        std::thread::spawn(move || {
            for source in listener.incoming() {
                let source = source.unwrap();
                if accepting.state().closed {
                    return;
                }
                // a receiver that is gone refuses, as it would without a gate
                let Ok(destination) = TcpStream::connect(&to) else { continue };
                let _ = (source.set_nodelay(true), destination.set_nodelay(true));
                let shared = accepting.clone();
                std::thread::spawn(move || shared.relay(source, destination));
            }
        });
        Self { address, shared }
    }

    pub fn address(&self) -> String {
        format!("tcp:{}", self.address)
    }

    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Stops right before the next message of that kind, in its direction.
    #[must_use]
    pub fn stop_before(self, kind: Kind) -> Self {
        self.shared.state().trap = Trap::From(kind as u16, Flow::Shut);
        self
    }

    /// Lets the next message of that kind, and what follows in its direction, flow like that.
    #[must_use]
    pub fn from(self, kind: Kind, flow: Flow) -> Self {
        self.shared.state().trap = Trap::From(kind as u16, flow);
        self
    }

    /// Lets pages flow like that after so many bytes of them.
    #[must_use]
    pub fn pages_after(self, bytes: u64, flow: Flow) -> Self {
        self.shared.state().trap = Trap::AfterPageBytes(bytes, flow);
        self
    }

    /// Lets everything to the destination flow like that.
    #[must_use]
    pub fn all_to_destination(self, flow: Flow) -> Self {
        let mut state = self.shared.state();
        for way in [Way::ControlToDestination, Way::PagesToDestination] {
            state.flows[way as usize] = flow;
        }
        drop(state);
        self
    }

    /// Waits until it has stopped where it should.
    pub fn wait(&self) {
        let state = self.shared.state();
        let waits = |state: &mut State| !state.sprung;
        let (_state, late) = self.shared.changed.wait_timeout_while(state, PATIENCE, waits).unwrap();
        assert!(!late.timed_out(), "the migration does not come to where it is to be stopped");
    }

    /// Lets everything through.
    pub fn open(&self) {
        let mut state = self.shared.state();
        (state.flows, state.trap) = ([Flow::Open; 4], Trap::None);
        drop(state);
        self.shared.changed.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let mut state = self.shared.state();
        state.closed = true;
        for stream in state.streams.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
        // it waits for a connection
        let _ = TcpStream::connect(self.address);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn relay(self: Arc<Self>, mut source: TcpStream, mut destination: TcpStream) {
        {
            let mut state = self.state();
            for stream in [&source, &destination] {
                state.streams.extend(stream.try_clone());
            }
        }
        // the first frame tells what the connection is
        let mut head = [0; HEADER_BYTES];
        if source.read_exact(&mut head).is_err() {
            return;
        }
        let (to_destination, to_source) = if kind_of(&head) == Kind::Attach as u16 {
            (Way::PagesToDestination, Way::PagesToSource)
        } else {
            (Way::ControlToDestination, Way::ControlToSource)
        };
        let back = self.clone();
        let (mut from, mut to) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        std::thread::spawn(move || back.carry(to_source, Vec::new(), &mut from, &mut to));
        self.carry(to_destination, head.to_vec(), &mut source, &mut destination);
    }

    /// Carries frames until the stream ends; `head` was read already.
    fn carry(&self, way: Way, mut head: Vec<u8>, from: &mut TcpStream, to: &mut TcpStream) {
        let mut left = 0;
        let mut buffer = vec![0; 64 << 10];
        loop {
            if left == 0 {
                while head.len() < HEADER_BYTES {
                    let missing = HEADER_BYTES - head.len();
                    self.wait_while_shut(way);
                    match from.read(&mut buffer[..missing]) {
                        Ok(count) if count > 0 => head.extend_from_slice(&buffer[..count]),
                        _ => {
                            let _ = self.pass(way, &head, to);
                            let _ = to.shutdown(Shutdown::Write);
                            return;
                        }
                    }
                }
                left = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
                self.spring(way, kind_of(&head));
                if !self.pass(way, &head, to) {
                    return;
                }
                head.clear();
                continue;
            }
            self.wait_while_shut(way);
            let most = left.min(buffer.len());
            match from.read(&mut buffer[..most]) {
                Ok(count) if count > 0 => {
                    left -= count;
                    if !self.pass(way, &buffer[..count], to) {
                        return;
                    }
                }
                _ => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
            }
        }
    }

    fn spring(&self, way: Way, kind: u16) {
        let mut state = self.state();
        if let Trap::From(wanted, flow) = state.trap
            && wanted == kind
        {
            state.flows[way as usize] = flow;
            (state.trap, state.sprung) = (Trap::None, true);
            drop(state);
            self.changed.notify_all();
        }
    }

    fn wait_while_shut(&self, way: Way) -> Flow {
        let waits = |state: &mut State| state.flows[way as usize] == Flow::Shut && !state.closed;
        self.changed.wait_while(self.state(), waits).unwrap().flows[way as usize]
    }

    /// Writes as the flow is; says whether that went well.
    fn pass(&self, way: Way, mut bytes: &[u8], to: &mut TcpStream) -> bool {
        while !bytes.is_empty() {
            let piece = match self.wait_while_shut(way) {
                Flow::Open => bytes.len(),
                Flow::Slow(rate) => {
                    let piece = bytes.len().min((rate / 20).max(1) as usize);
                    std::thread::sleep(Duration::from_secs_f64(piece as f64 / rate as f64));
                    piece
                }
                Flow::Lost => {
                    bytes = &[];
                    continue;
                }
                Flow::Shut => return false,
            };
            if to.write_all(&bytes[..piece]).is_err() {
                return false;
            }
            bytes = &bytes[piece..];
            if way == Way::PagesToDestination {
                self.count(piece as u64);
            }
        }
        true
    }

    fn count(&self, bytes: u64) {
        let mut state = self.state();
        state.page_bytes += bytes;
        if let Trap::AfterPageBytes(limit, flow) = state.trap
            && state.page_bytes >= limit
        {
            state.flows[Way::PagesToDestination as usize] = flow;
            (state.trap, state.sprung) = (Trap::None, true);
            drop(state);
            self.changed.notify_all();
        }
    }
}

fn kind_of(head: &[u8]) -> u16 {
    u16::from_le_bytes([head[4], head[5]])
}
