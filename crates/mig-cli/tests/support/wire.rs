//! A link between two programs that can be cut at a frame of the test's choice, and mended.

#![allow(unreachable_pub)] // a part of a test program

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// Frames are told apart by their kind: u16 at 4 of a header of 40 bytes, whose u32 at 8 is the length of what
/// follows. docs/protocol.md.
const HEADER_BYTES: usize = 40;
pub const COMMIT: u16 = 15;
pub const RUNNING: u16 = 16;

pub struct Wire {
    address: String,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    is_cut: AtomicBool,
    /// The frame in whose place the link is cut; 0 is none.
    cut_at: AtomicU16,
    /// Both ends of every connection.
    ends: Mutex<Vec<TcpStream>>,
}

impl Wire {
    /// A link to `target`, an address as a receiver prints it.
    pub fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("tcp:{}", listener.local_addr().expect("an address"));
        let state = Arc::<State>::default();
        let (shared, target) = (Arc::clone(&state), target.trim_start_matches("tcp:").to_owned());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if shared.is_cut.load(Ordering::SeqCst) {
                    continue;
                }
                let far = TcpStream::connect(&target).expect("the receiver listens");
                let ends = [&near, &far].map(|end| end.try_clone().expect("a descriptor"));
                shared.ends.lock().expect("no panic").extend(ends);
                for (mut from, mut to) in [(&near, &far), (&far, &near)].map(|(from, to)| {
                    (from.try_clone().expect("a descriptor"), to.try_clone().expect("a descriptor"))
                }) {
                    let shared = Arc::clone(&shared);
                    thread::spawn(move || {
                        while pass_frame(&mut from, &mut to, &shared).is_some() {}
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
            }
        });
        Self { address, state }
    }

    pub fn address(&self) -> String {
        self.address.clone()
    }

    /// Cuts all connections, and refuses new ones, instead of passing a frame of this kind.
    pub fn cut_at(&self, kind: u16) {
        self.state.cut_at.store(kind, Ordering::SeqCst);
    }

    pub fn mend(&self) {
        self.state.cut_at.store(0, Ordering::SeqCst);
        self.state.is_cut.store(false, Ordering::SeqCst);
    }
}

/// None when there is no more to pass.
fn pass_frame(from: &mut TcpStream, to: &mut TcpStream, state: &State) -> Option<()> {
    let mut header = [0; HEADER_BYTES];
    from.read_exact(&mut header).ok()?;
    let kind = u16::from_le_bytes([header[4], header[5]]);
    if kind == state.cut_at.load(Ordering::SeqCst) {
        state.is_cut.store(true, Ordering::SeqCst);
        for end in state.ends.lock().expect("no panic").drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
        return None;
    }
    let length = u32::from_le_bytes([header[8], header[9], header[10], header[11]]);
    to.write_all(&header).ok()?;
    let passed = std::io::copy(&mut from.take(u64::from(length)), to).ok()?;
    (passed == u64::from(length)).then_some(())
}
