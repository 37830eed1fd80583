//! Pages compressed together, as one zstd frame (RFC 8878): the sender's half and the receiver's.
//!
//! Invariant: neither half writes beyond the buffer it is given, and the receiver's takes exactly the one frame that
//! decodes to exactly the pages announced: not several, nothing behind it, no dictionary, no skippable frame.

use std::io;

use mig_wire::WireError;
use mig_wire::pages::{CHECKSUM_BYTES, checksum, split_checksum, verify};
use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, DCtx};

/// Compresses, one piece after the other.
pub(crate) struct Packer {
    compressor: Compressor<'static>,
    level: i32,
}

impl Packer {
    /// # Errors
    /// There is no memory for it.
    pub(crate) fn new(level: i32) -> io::Result<Self> {
        Ok(Self { compressor: Compressor::new(level)?, level })
    }

    /// Bytes that the payload of `page_bytes` may have, for the trouble to be worth it: an eighth is to be saved.
    pub(crate) fn most_bytes(page_bytes: usize) -> usize {
        page_bytes / 8 * 7
    }

    /// The payload that stands for `pages`, at the start of `into`: how many bytes it has, if that is as many as
    /// fit there.
    pub(crate) fn pack(&mut self, level: i32, pages: &[u8], into: &mut [u8]) -> Option<usize> {
        if level != self.level {
            self.compressor.set_compression_level(level).ok()?;
            self.level = level;
        }
        let room = into.len().checked_sub(CHECKSUM_BYTES)?;
        // the one thing that goes wrong here is that it does not fit
        let bytes = self.compressor.compress_to_buffer(pages, &mut into[..room]).ok()?;
        into[bytes..bytes + CHECKSUM_BYTES].copy_from_slice(&checksum(pages));
        Some(bytes + CHECKSUM_BYTES)
    }
}

/// Decompresses, one piece after the other.
pub(crate) struct Unpacker {
    context: DCtx<'static>,
}

impl Unpacker {
    /// # Errors
    /// There is no memory for it.
    pub(crate) fn new() -> io::Result<Self> {
        DCtx::try_create().map(|context| Self { context }).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// Fills `pages` with what a peer's payload stands for.
    ///
    /// # Errors
    /// It stands for something else, or for nothing.
    pub(crate) fn unpack(&mut self, payload: &[u8], pages: &mut [u8]) -> Result<(), WireError> {
        const WHAT: &str = "compressed pages";
        let refused = |code| WireError::Body { what: WHAT, cause: zstd_safe::get_error_name(code).into() };
        let (frame, claimed) = split_checksum(payload)?;
        match zstd_safe::find_frame_compressed_size(frame) {
            Ok(first) if first == frame.len() => {}
            Ok(first) => {
                return Err(WireError::Unread { what: WHAT, left: frame.len().saturating_sub(first) });
            }
            Err(code) => return Err(refused(code)),
        }
        let bytes = self.context.decompress(pages, frame).map_err(refused)?;
        if bytes != pages.len() {
            return Err(WireError::Truncated { what: WHAT, needed: pages.len(), left: bytes });
        }
        verify(pages, claimed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::PAGE;

    /// Pages that shrink, the more the fewer `values` their bytes have.
    fn pages(count: usize, values: u8, seed: u64) -> Vec<u8> {
        let mut state = seed | 1;
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % u64::from(values.max(1))) as u8
        };
        (0..count * PAGE).map(|_| byte()).collect()
    }

    fn packed(pages: &[u8]) -> Option<Vec<u8>> {
        let mut into = vec![0xee; Packer::most_bytes(pages.len())];
        let bytes = Packer::new(1).unwrap().pack(1, pages, &mut into)?;
        into.truncate(bytes);
        Some(into)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_was_packed_is_unpacked_by_the_same_context_again_and_again(
            pieces in proptest::collection::vec((1..33usize, 1..80u8, any::<u64>()), 1..6)
        ) {
            let (mut packer, mut unpacker) = (Packer::new(1).unwrap(), Unpacker::new().unwrap());
            for ((count, values, seed), level) in pieces.into_iter().zip(1..) {
                let sent = pages(count, values, seed);
                let mut payload = vec![0; Packer::most_bytes(sent.len())];
                let bytes = packer.pack(level, &sent, &mut payload).expect("at most 80 values shrink");
                let mut received = vec![0xaa; sent.len()];
                unpacker.unpack(&payload[..bytes], &mut received).unwrap();
                prop_assert!(received == sent);
            }
        }

        /// The same pages by the library's simplest call: a frame is a frame, whoever made it.
        #[test]
        fn frames_of_any_level_are_unpacked(level in 1..20i32, count in 1..5usize, seed in any::<u64>()) {
            let sent = pages(count, 30, seed);
            let mut payload = ::zstd::bulk::compress(&sent, level).unwrap();
            payload.extend_from_slice(&checksum(&sent));
            let mut received = vec![0; sent.len()];
            Unpacker::new().unwrap().unpack(&payload, &mut received).unwrap();
            prop_assert!(received == sent);
        }

        #[test]
        fn damaged_payloads_are_refused_and_nothing_panics(
            at in any::<prop::sample::Index>(), with in 1..=255u8, cut in any::<prop::sample::Index>(), seed in any::<u64>()
        ) {
            let sent = pages(2, 20, seed);
            let payload = packed(&sent).unwrap();
            let mut received = vec![0; sent.len()];
            let mut unpacker = Unpacker::new().unwrap();
            let mut damaged = payload.clone();
            damaged[at.index(payload.len())] ^= with;
            // a bit of the frame's header may change nothing of what it decodes to
            if unpacker.unpack(&damaged, &mut received).is_ok() {
                prop_assert!(received == sent);
            }
            prop_assert!(unpacker.unpack(&payload[..cut.index(payload.len())], &mut received).is_err());
            unpacker.unpack(&payload, &mut received).unwrap();
            prop_assert!(received == sent, "a refused one leaves the context as it was");
        }

        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic in any::<bool>()) {
            let head: &[u8] = if magic { &[0x28, 0xb5, 0x2f, 0xfd] } else { &[] };
            let _ = Unpacker::new().unwrap().unpack(&[head, &bytes].concat(), &mut [0; PAGE]);
        }
    }

    #[test]
    fn what_does_not_shrink_by_an_eighth_is_left() {
        assert_eq!(packed(&pages(4, 255, 9)), None);
        assert!(packed(&pages(4, 100, 9)).is_some());
    }

    #[test]
    fn a_frame_of_fewer_or_more_pages_and_whatever_follows_a_frame_is_refused() {
        let sent = pages(2, 20, 1);
        let frame = ::zstd::bulk::compress(&sent, 1).unwrap();
        let mut unpacker = Unpacker::new().unwrap();
        let mut unpack = |frame: &[u8], bytes: usize| {
            let decoded = &sent[..bytes.min(sent.len())];
            let payload = [frame, &checksum(decoded)].concat();
            unpacker.unpack(&payload, &mut vec![0; bytes])
        };
        assert_eq!(unpack(&frame, 2 * PAGE), Ok(()));
        assert!(matches!(unpack(&frame, 3 * PAGE), Err(WireError::Truncated { .. })), "too short");
        assert!(matches!(unpack(&frame, PAGE), Err(WireError::Body { .. })), "a bomb");
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], &[0; 4]].concat();
        let empty = ::zstd::bulk::compress(&[], 1).unwrap();
        for tail in [&[0][..], &skippable, &empty, &frame] {
            let twice = [&frame, tail].concat();
            assert!(matches!(unpack(&twice, 2 * PAGE), Err(WireError::Unread { .. })), "{tail:?}");
        }
        assert!(unpack(&skippable, PAGE).is_err() && unpack(&empty, PAGE).is_err());
        let halves = [&sent[..PAGE], &sent[PAGE..]].map(|half| ::zstd::bulk::compress(half, 1).unwrap());
        assert!(unpack(&halves.concat(), 2 * PAGE).is_err(), "two frames for one");
    }

    #[test]
    fn what_the_receiver_sets_aside_is_bounded_whatever_windows_frames_ask_for() {
        let mut unpacker = Unpacker::new().unwrap();
        for level in [1, 9, 19, 22] {
            let sent = pages(32, 20, 3);
            let mut payload = ::zstd::bulk::compress(&sent, level).unwrap();
            payload.extend_from_slice(&checksum(&sent));
            unpacker.unpack(&payload, &mut vec![0; sent.len()]).unwrap();
            // a window of 128 MiB, written in the frame's header
            let mut compressor = Compressor::new(level).unwrap();
            compressor.set_parameter(zstd_safe::CParameter::WindowLog(27)).unwrap();
            compressor.include_contentsize(false).unwrap();
            let mut payload = compressor.compress(&sent).unwrap();
            payload.extend_from_slice(&checksum(&sent));
            let _ = unpacker.unpack(&payload, &mut vec![0; sent.len()]);
        }
        let bytes = unpacker.context.sizeof();
        assert!((1..256 << 10).contains(&bytes), "{bytes} bytes");
    }

    #[test]
    fn a_gigabyte_in_a_few_bytes_is_refused_before_it_is_there() {
        let bomb = ::zstd::bulk::compress(&vec![0; 64 << 20], 19).unwrap();
        let payload = [&bomb[..], &checksum(&[0; PAGE])].concat();
        assert!(Unpacker::new().unwrap().unpack(&payload, &mut [1; PAGE]).is_err());
    }
}
