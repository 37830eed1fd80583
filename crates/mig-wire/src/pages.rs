//! The table of page runs in front of page data, and its counterpart at the end of a round.
//!
//! ```text
//! items x { first_page u64, count u32, encoding u8, bytes u24 }   crc u32   payloads, in table order
//! ```
//!
//! The table's CRC covers the table only: a live page may change while it is sent, and is then sent again. An
//! encoded payload, whose pages were copied before, ends with the CRC of the pages that it decodes to. Its length is
//! the run's `bytes`; of a run of zeros and of a raw one, whose length follows from their pages, that is 0.

use crate::bytes::{Reader, WireError, Writer};
use crate::header::Header;

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// The most runs in a frame.
pub const MAX_RUNS: usize = 1024;
/// The most pages in a frame, zero pages included.
pub const MAX_PAGES: usize = 1024;
/// The most bytes behind the header of a frame of pages.
pub const MAX_FRAME_BYTES: usize = table_bytes(MAX_RUNS) + MAX_PAGES * PAGE_BYTES;
/// The most pages in a run of [`Encoding::Zstd`]: what a receiver sets aside to decode one.
pub const MAX_ZSTD_PAGES: usize = 32;
/// The pages in a run of [`Encoding::Delta`].
pub const DELTA_PAGES: usize = 1;
/// Bytes of the checksum at the end of an encoded payload.
pub const CHECKSUM_BYTES: usize = 4;

const RUN_BYTES: usize = 16;

/// How the pages of a run travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// All zero: no bytes.
    Zero,
    /// As they are.
    Raw,
    /// Together, as one zstd frame ([`Capabilities::ZSTD`](crate::hello::Capabilities::ZSTD)).
    Zstd {
        /// Bytes of the payload, its checksum included.
        bytes: u32,
    },
    /// As what changed since the page was sent before
    /// ([`Capabilities::DELTA`](crate::hello::Capabilities::DELTA)).
    Delta {
        /// Bytes of the payload, its checksum included.
        bytes: u32,
    },
}

impl Encoding {
    /// The encoding's byte, then the three of its length.
    fn encode(self) -> [u8; 4] {
        let (code, bytes) = match self {
            Self::Zero => (0, 0),
            Self::Raw => (1, 0),
            Self::Zstd { bytes } => (2, bytes),
            Self::Delta { bytes } => (3, bytes),
        };
        let [low, middle, high, above] = bytes.to_le_bytes();
        assert_eq!(above, 0, "a payload is less than its pages");
        [code, low, middle, high]
    }

    fn decode(field: u32) -> Result<Self, WireError> {
        let [code, low, middle, high] = field.to_le_bytes();
        match (code, u32::from_le_bytes([low, middle, high, 0])) {
            (0, 0) => Ok(Self::Zero),
            (1, 0) => Ok(Self::Raw),
            (2, bytes) => Ok(Self::Zstd { bytes }),
            (3, bytes) => Ok(Self::Delta { bytes }),
            _ => Err(WireError::Unknown { what: "page encoding", value: u64::from(field) }),
        }
    }
}

/// Pages with consecutive indices that travel in the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Run {
    /// Index of the first page.
    pub first_page: u64,
    /// How many; not zero.
    pub count: u32,
    /// How they travel.
    pub encoding: Encoding,
}

impl Run {
    /// Bytes of page data behind the table.
    pub fn payload_bytes(&self) -> usize {
        match self.encoding {
            Encoding::Zero => 0,
            Encoding::Raw => self.count as usize * PAGE_BYTES,
            Encoding::Zstd { bytes } | Encoding::Delta { bytes } => bytes as usize,
        }
    }

    /// An encoded run holds few enough pages to be decoded aside, a checksum, and less than it would hold raw.
    fn check(self) -> Result<Self, WireError> {
        let most_pages = match self.encoding {
            Encoding::Zero | Encoding::Raw => return Ok(self),
            Encoding::Zstd { .. } => MAX_ZSTD_PAGES,
            Encoding::Delta { .. } => DELTA_PAGES,
        };
        let too_many =
            |what, value, limit| WireError::TooMany { what, value: value as u64, limit: limit as u64 };
        let (pages, bytes) = (self.count as usize, self.payload_bytes());
        if pages > most_pages {
            return Err(too_many("page count of an encoded run", pages, most_pages));
        }
        if bytes < CHECKSUM_BYTES {
            return Err(WireError::Truncated { what: "encoded pages", needed: CHECKSUM_BYTES, left: bytes });
        }
        if bytes >= pages * PAGE_BYTES {
            return Err(too_many("encoded pages", bytes, pages * PAGE_BYTES - 1));
        }
        Ok(self)
    }
}

/// What stands at the end of an encoded payload.
pub fn checksum(decoded: &[u8]) -> [u8; CHECKSUM_BYTES] {
    crc32c::crc32c(decoded).to_le_bytes()
}

/// An encoded payload without its checksum, and that.
///
/// # Errors
/// It is shorter than a checksum.
pub fn split_checksum(payload: &[u8]) -> Result<(&[u8], [u8; CHECKSUM_BYTES]), WireError> {
    let (encoded, checksum) = payload.split_last_chunk().ok_or(WireError::Truncated {
        what: "encoded pages",
        needed: CHECKSUM_BYTES,
        left: payload.len(),
    })?;
    Ok((encoded, *checksum))
}

/// Whether pages are those that were encoded.
///
/// # Errors
/// They are not.
pub fn verify(decoded: &[u8], claimed: [u8; CHECKSUM_BYTES]) -> Result<(), WireError> {
    let (claimed, actual) = (u32::from_le_bytes(claimed), crc32c::crc32c(decoded));
    if claimed == actual {
        Ok(())
    } else {
        Err(WireError::Checksum { what: "decoded pages", claimed, actual })
    }
}

/// Bytes of a table of `runs` runs.
pub const fn table_bytes(runs: usize) -> usize {
    runs * RUN_BYTES + 4
}

/// The table's bytes.
pub fn encode_table(runs: &[Run], into: &mut Vec<u8>) {
    let start = into.len();
    for run in runs {
        into.extend_from_slice(&run.first_page.to_le_bytes());
        into.extend_from_slice(&run.count.to_le_bytes());
        into.extend_from_slice(&run.encoding.encode());
    }
    let crc = crc32c::crc32c(&into[start..]);
    into.extend_from_slice(&crc.to_le_bytes());
}

/// How long the table behind a `Pages` header is.
///
/// # Errors
/// The header claims more runs than allowed, none, or fewer bytes than its table takes.
pub fn expected_table_bytes(header: &Header) -> Result<usize, WireError> {
    let runs = usize::from(header.items);
    if runs == 0 || runs > MAX_RUNS {
        return Err(WireError::TooMany { what: "run count", value: runs as u64, limit: MAX_RUNS as u64 });
    }
    let needed = table_bytes(runs);
    if needed > header.body_bytes() {
        return Err(WireError::Truncated { what: "run table", needed, left: header.body_bytes() });
    }
    Ok(needed)
}

/// Reads a table into `runs`, whose old content goes.
///
/// # Errors
/// A bad checksum, an unknown encoding, an empty run, more pages than a frame may have, or a payload that is
/// not the one the header announces.
pub fn decode_table(header: &Header, table: &[u8], runs: &mut Vec<Run>) -> Result<(), WireError> {
    runs.clear();
    let (body, tail) = table.split_at_checked(table.len().saturating_sub(4)).unwrap_or((table, &[]));
    let (claimed, actual) = (Reader::new("run table", tail).u32()?, crc32c::crc32c(body));
    if claimed != actual {
        return Err(WireError::Checksum { what: "run table", claimed, actual });
    }
    let mut reader = Reader::new("run table", body);
    let (mut pages, mut payload) = (0usize, 0usize);
    for _ in 0..header.items {
        let run = read_run(&mut reader)?;
        pages = pages.saturating_add(run.count as usize);
        if pages > MAX_PAGES {
            return Err(WireError::TooMany {
                what: "page count",
                value: pages as u64,
                limit: MAX_PAGES as u64,
            });
        }
        payload += run.payload_bytes();
        runs.push(run);
    }
    reader.finish()?;
    match header.body_bytes().checked_sub(table.len()) {
        Some(announced) if announced == payload => Ok(()),
        announced => {
            Err(WireError::Truncated { what: "page data", needed: payload, left: announced.unwrap_or(0) })
        }
    }
}

fn read_run(reader: &mut Reader<'_>) -> Result<Run, WireError> {
    let (first_page, count) = (reader.u64()?, reader.u32()?);
    let encoding = Encoding::decode(reader.u32()?)?;
    match count {
        0 => Err(WireError::Unknown { what: "page count of a run", value: 0 }),
        count => Run { first_page, count, encoding }.check(),
    }
}

/// What a channel says it sent in a round, so that the other end can tell that all of it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RoundEnd {
    /// Pages of zeros.
    pub zero_pages: u64,
    /// All others: sent as they are, or encoded.
    pub raw_pages: u64,
}

impl RoundEnd {
    /// The frame's body.
    pub fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new();
        writer.u64(self.zero_pages).u64(self.raw_pages);
        writer.into_bytes()
    }

    /// Reads the frame's body.
    ///
    /// # Errors
    /// The body has another length.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new("round end", body);
        let end = Self { zero_pages: reader.u64()?, raw_pages: reader.u64()? };
        reader.finish()?;
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::header::Kind;

    fn header(runs: &[Run]) -> Header {
        let payload: usize = runs.iter().map(Run::payload_bytes).sum();
        Header {
            kind: Kind::Pages,
            items: runs.len() as u16,
            length: (table_bytes(runs.len()) + payload) as u32,
            round: 1,
            sequence: 1,
            session: 1,
            body_crc: 0,
        }
    }

    fn run() -> impl Strategy<Value = Run> {
        (any::<u64>(), 1..9u32, 0..4u8, any::<u32>()).prop_map(|(first_page, count, code, bytes)| {
            let bytes_of = |pages| CHECKSUM_BYTES as u32 + bytes % (pages * 4096 - 4);
            match code {
                0 => Run { first_page, count, encoding: Encoding::Zero },
                1 => Run { first_page, count, encoding: Encoding::Raw },
                2 => Run { first_page, count, encoding: Encoding::Zstd { bytes: bytes_of(count) } },
                _ => Run { first_page, count: 1, encoding: Encoding::Delta { bytes: bytes_of(1) } },
            }
        })
    }

    /// The same table, read byte by byte without any of the code above.
    fn oracle(table: &[u8]) -> Vec<(u64, u32, u8, u32)> {
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let runs = table[..table.len() - 4].chunks(16);
        runs.map(|r| (number(&r[..8]), number(&r[8..12]) as u32, r[12], number(&r[13..]) as u32)).collect()
    }

    /// What the oracle should find.
    fn fields(run: &Run) -> (u64, u32, u8, u32) {
        let (code, bytes) = match run.encoding {
            Encoding::Zero => (0, 0),
            Encoding::Raw => (1, 0),
            Encoding::Zstd { bytes } => (2, bytes),
            Encoding::Delta { bytes } => (3, bytes),
        };
        (run.first_page, run.count, code, bytes)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// 200 tables of 50 to 100 runs: more than ten thousand runs.
        #[test]
        fn ten_thousand_random_runs_agree_with_a_slow_reading(runs in proptest::collection::vec(run(), 50..100)) {
            let mut table = Vec::new();
            encode_table(&runs, &mut table);
            prop_assert_eq!(expected_table_bytes(&header(&runs)), Ok(table.len()));
            prop_assert_eq!(oracle(&table), runs.iter().map(fields).collect::<Vec<_>>());
            let mut decoded = Vec::new();
            decode_table(&header(&runs), &table, &mut decoded).unwrap();
            prop_assert_eq!(decoded, runs);
        }

        #[test]
        fn any_bytes_decode_to_a_table_within_bounds_or_to_an_error(
            items in any::<u16>(), length in any::<u32>(), mut bytes in proptest::collection::vec(any::<u8>(), 0..400), seal in any::<bool>()
        ) {
            if seal && bytes.len() >= 4 {
                let at = bytes.len() - 4;
                let crc = crc32c::crc32c(&bytes[..at]);
                bytes[at..].copy_from_slice(&crc.to_le_bytes());
            }
            let header = Header { items, length, ..header(&[]) };
            let mut runs = Vec::new();
            if decode_table(&header, &bytes, &mut runs).is_ok() {
                prop_assert!(runs.iter().map(|r| r.count as usize).sum::<usize>() <= MAX_PAGES);
            }
        }
    }

    #[test]
    fn a_payload_other_than_announced_is_refused() {
        let runs = [Run { first_page: 0, count: 2, encoding: Encoding::Raw }];
        let mut table = Vec::new();
        encode_table(&runs, &mut table);
        for wrong in [-1i64, 1, -8192] {
            let right = header(&runs);
            let length = (i64::from(right.length) + wrong) as u32;
            assert!(decode_table(&Header { length, ..right }, &table, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn more_pages_than_a_frame_holds_and_empty_runs_are_refused() {
        for count in [0, MAX_PAGES as u32 + 1, u32::MAX] {
            let runs = [Run { first_page: 0, count, encoding: Encoding::Zero }];
            let mut table = Vec::new();
            encode_table(&runs, &mut table);
            assert!(decode_table(&header(&runs), &table, &mut Vec::new()).is_err());
        }
    }

    #[test]
    fn an_encoded_run_beyond_its_bounds_is_refused_and_at_them_is_not() {
        let decoded = |count, encoding| {
            let runs = [Run { first_page: 0, count, encoding }];
            let mut table = Vec::new();
            encode_table(&runs, &mut table);
            decode_table(&header(&runs), &table, &mut Vec::new()).is_ok()
        };
        for (count, bytes, fits) in [
            (32, 32 * 4096 - 1, true),
            (32, 32 * 4096, false),
            (33, 4096, false),
            (1, 4, true),
            (1, 3, false),
            (1, 4095, true),
            (1, 4096, false),
            (2, 8191, true),
        ] {
            assert_eq!(decoded(count, Encoding::Zstd { bytes }), fits, "{count} pages in {bytes}");
            assert_eq!(
                decoded(count, Encoding::Delta { bytes }),
                fits && count == 1,
                "{count} pages in {bytes}"
            );
        }
    }

    #[test]
    fn a_length_of_what_has_none_and_an_encoding_without_a_meaning_are_refused() {
        for field in [1 << 8, 1 | 1 << 8, 1 | 0xff << 24, 4, 0xff] {
            assert!(Encoding::decode(field).is_err(), "{field:#x}");
        }
        assert_eq!(Encoding::decode(2 | 0x0001_0203 << 8), Ok(Encoding::Zstd { bytes: 0x0001_0203 }));
    }

    #[test]
    fn a_payload_tells_whether_it_was_decoded_to_what_was_encoded() {
        let payload = [&b"encoded"[..], &checksum(b"decoded")].concat();
        let (encoded, claimed) = split_checksum(&payload).unwrap();
        assert_eq!((encoded, verify(b"decoded", claimed)), (&b"encoded"[..], Ok(())));
        assert!(matches!(verify(b"decodes", claimed), Err(WireError::Checksum { .. })));
        assert!(split_checksum(&payload[..3]).is_err());
    }
}
