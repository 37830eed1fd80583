//! A hostile peer: any bytes, given to everything that reads a peer's bytes, with the bounds that must hold.
//!
//! An [`Input`] is a script of 16 bytes (what happens on this side meanwhile) and a stream of frames as a peer
//! sends them. [`all`] gives it to the decoders and both machines, which panic or not: the proptest run, the
//! run of millions, the kept corpus and libFuzzer's targets all call it. [`mutate`] makes inputs out of valid
//! ones and repairs their checksums, since a CRC32C would otherwise turn nearly all of them away at the door.
//!
//! Invariant: every bound that is checked here is a number in [`bounds`], and docs/protocol.md states it.

pub mod bounds;
pub mod destination;
pub mod heap;
pub mod input;
pub mod mutate;
pub mod payload;
pub mod seeds;
pub mod source;
pub mod stream;

pub use input::Input;

/// How far an input came, so that a run can show that it reached what it is meant to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// The stream as such.
    pub stream: stream::Reading,
    /// The source's machine.
    pub source: source::Reach,
    /// The destination's machine.
    pub destination: destination::Reach,
    /// The most bytes that were allocated at a time; 0 without [`heap::Counting`].
    pub peak_bytes: usize,
}

/// Gives an input to everything.
///
/// # Panics
/// When something that reads a peer's bytes panics, allocates more than its bound, or does what no peer may
/// bring it to.
pub fn all(bytes: &[u8]) -> Reach {
    let input = Input::new(bytes);
    let (reach, usage) = heap::measure(|| {
        let stream = stream::read(&input);
        let (source, destination) = (source::converse(&input), destination::converse(&input));
        Reach { stream, source, destination, peak_bytes: 0 }
    });
    Reach { peak_bytes: usage.peak_bytes, ..reach }
}
