//! A copy over plain sockets: what the host does with the same bytes when nobody looks at them.
//!
//! Two processes, a thread a stream on each side, blocking `write` and `read` of slices of memory, Nagle's
//! algorithm off. The time is the sender's: from before its first write to the receiver's word, a byte a stream,
//! that everything has arrived.

use std::io::{BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeValLike;
use serde::{Deserialize, Serialize};

use crate::child::{self, Role, Talking};
use crate::memory::Memory;
use crate::warmth::Warmth;

/// How to copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// Connections.
    pub streams: usize,
    /// What one `write` and one `read` is given at most.
    pub call_bytes: usize,
    /// Send and receive buffers that are asked for; the kernel's own choice without.
    pub buffer_bytes: Option<usize>,
}

/// What the receiver's memory is like before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Faulted in.
    Prefaulted,
    /// Never touched.
    Fresh,
}

/// A receiver's order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Receive {
    listen: String,
    bytes: usize,
    target: Target,
    way: Way,
}

/// How a copy went.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Copied {
    /// Over all streams.
    pub bytes: u64,
    /// The sender's time.
    pub elapsed_ms: f64,
    /// Processor time of the sender.
    pub source_cpu_s: f64,
    /// Processor time of the receiver, from the first byte on.
    pub destination_cpu_s: f64,
}

impl Copied {
    /// Bytes a second.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / (self.elapsed_ms / 1e3)
    }
}

/// Puts a command on the source's host and on the destination's.
pub type Place<'a> = &'a dyn Fn(Command) -> Command;

/// A process with memory full of incompressible bytes, which can be copied many times.
pub struct Source {
    child: Talking,
    bytes: usize,
}

impl Source {
    /// Starts it, and waits until the bytes are written.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn start(bytes: usize, place: Place<'_>) -> Result<Self> {
        let mut child = Talking::start(child::command(&Role::Send { bytes }, place)?)?;
        let Ready = child.hear()?;
        Ok(Self { child, bytes })
    }

    /// Copies all of it once, to a new process that listens on `listen` (an IP address).
    ///
    /// # Errors
    /// Whatever is in the way of a copy.
    pub fn copy(&mut self, way: Way, target: Target, listen: &str, place: Place<'_>) -> Result<Copied> {
        let order = Receive { listen: format!("{listen}:0"), bytes: self.bytes, target, way };
        let mut receiver = Talking::start(child::command(&Role::Receive(order), place)?)?;
        let address: String = receiver.hear()?;
        self.child.tell(&(address, way))?;
        let Ready = self.child.hear()?;
        // as it is for a migration
        let mut warmth = (target == Target::Fresh).then(|| Warmth::gather(self.bytes)).transpose()?;
        if let Some(warmth) = &mut warmth {
            warmth.follow(receiver.id())?;
        }
        self.child.tell(&Ready)?;
        let sent: Copied = self.child.hear()?;
        let destination_cpu_s = receiver.hear()?;
        Ok(Copied { destination_cpu_s, ..sent })
    }
}

#[derive(Serialize, Deserialize)]
struct Ready;

/// The child that sends.
pub(crate) fn send(bytes: usize) -> Result<()> {
    let mut memory = Memory::new(bytes)?;
    memory.fill();
    let (mut input, mut output) = (BufReader::new(std::io::stdin()), std::io::stdout());
    child::say(&mut output, &Ready)?;
    while let Some((address, way)) = child::hear::<(String, Way)>(&mut input)? {
        let streams = (0..way.streams)
            .map(|_| prepare(TcpStream::connect(&address).context("connecting")?, way))
            .collect::<Result<Vec<_>>>()?;
        child::say(&mut output, &Ready)?;
        let Some(Ready) = child::hear(&mut input)? else { return Ok(()) };
        let (start, cpu) = (Instant::now(), cpu_seconds()?);
        let parts = memory.bytes().chunks(bytes.div_ceil(way.streams));
        std::thread::scope(|scope| {
            let senders: Vec<_> = streams
                .iter()
                .zip(parts)
                .map(|(s, part)| scope.spawn(move || send_part(s, part, way)))
                .collect();
            senders.into_iter().try_for_each(|sender| sender.join().expect("a sender does not panic"))
        })?;
        let elapsed_ms = start.elapsed().as_secs_f64() * 1e3;
        let source_cpu_s = cpu_seconds()? - cpu;
        child::say(
            &mut output,
            &Copied { bytes: bytes as u64, elapsed_ms, source_cpu_s, destination_cpu_s: 0.0 },
        )?;
    }
    Ok(())
}

fn send_part(mut stream: &TcpStream, part: &[u8], way: Way) -> Result<()> {
    for piece in part.chunks(way.call_bytes) {
        stream.write_all(piece)?;
    }
    let mut word = [0];
    stream.read_exact(&mut word).context("waiting for the receiver's word")
}

/// The child that receives.
pub(crate) fn receive(order: &Receive) -> Result<()> {
    let Receive { listen, bytes, target, way } = order;
    let mut memory = Memory::new(*bytes)?;
    if *target == Target::Prefaulted {
        memory.populate()?;
    }
    let listener = TcpListener::bind(listen).with_context(|| listen.clone())?;
    if let Some(bytes) = way.buffer_bytes {
        // inherited; has to be known before a connection is made for a large window
        setsockopt(&listener, sockopt::RcvBuf, &bytes)?;
    }
    let mut output = std::io::stdout();
    child::say(&mut output, &listener.local_addr()?.to_string())?;
    let streams =
        (0..way.streams).map(|_| prepare(listener.accept()?.0, *way)).collect::<Result<Vec<_>>>()?;
    // the time of the streams, not of what came before
    streams.first().context("no streams")?.peek(&mut [0])?;
    let cpu = cpu_seconds()?;
    let parts = memory.bytes_mut().chunks_mut(bytes.div_ceil(way.streams));
    std::thread::scope(|scope| {
        let receivers: Vec<_> = streams
            .iter()
            .zip(parts)
            .map(|(s, part)| scope.spawn(move || receive_part(s, part, *way)))
            .collect();
        receivers.into_iter().try_for_each(|receiver| receiver.join().expect("a receiver does not panic"))
    })?;
    child::say(&mut output, &(cpu_seconds()? - cpu))
}

fn receive_part(mut stream: &TcpStream, part: &mut [u8], way: Way) -> Result<()> {
    let mut filled = 0;
    while filled < part.len() {
        let end = part.len().min(filled + way.call_bytes);
        let count = stream.read(&mut part[filled..end])?;
        ensure!(count > 0, "the sender ended early");
        filled += count;
    }
    Ok(stream.write_all(&[1])?)
}

fn prepare(stream: TcpStream, way: Way) -> Result<TcpStream> {
    stream.set_nodelay(true)?;
    if let Some(bytes) = way.buffer_bytes {
        setsockopt(&stream, sockopt::SndBuf, &bytes)?;
        setsockopt(&stream, sockopt::RcvBuf, &bytes)?;
    }
    Ok(stream)
}

/// Processor time of this process, the kernel's for it included.
fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?).as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_arrives_over_streams_of_unequal_parts() {
        let way = Way { streams: 3, call_bytes: 1000, buffer_bytes: None };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let sent: Vec<u8> = (0..100_001u32).map(|i| (i % 251) as u8).collect();
        let mut received = vec![0; sent.len()];
        let address = listener.local_addr().unwrap();
        let pairs: Vec<_> = (0..way.streams)
            .map(|_| {
                let there = TcpStream::connect(address).unwrap();
                (prepare(there, way).unwrap(), prepare(listener.accept().unwrap().0, way).unwrap())
            })
            .collect();
        let part_bytes = sent.len().div_ceil(way.streams);
        std::thread::scope(|scope| {
            let parts = sent.chunks(part_bytes).zip(received.chunks_mut(part_bytes));
            for ((there, here), (from, to)) in pairs.iter().zip(parts) {
                scope.spawn(move || send_part(there, from, way).unwrap());
                scope.spawn(move || receive_part(here, to, way).unwrap());
            }
        });
        assert!(sent == received);
    }
}
