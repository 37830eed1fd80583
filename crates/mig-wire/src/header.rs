//! The fixed header in front of every frame.
//!
//! ```text
//! magic  u32   "MIG\x01"                  sequence u64   frames sent before this one on the same stream
//! kind   u16   see Kind                   session  u64   first half of the session id
//! items  u16   entries in the table       body_crc u32   CRC32C of a message's body; 0 for pages
//! length u32   bytes behind the header    crc      u32   CRC32C of the 36 bytes before it
//! round  u32   the round it belongs to
//! ```
//!
//! The header's CRC stands apart from what follows, so that a length is trusted before its bytes are read.

use crate::bytes::{Reader, WireError, Writer};
use crate::pages;

/// Bytes in a header.
pub const HEADER_BYTES: usize = 40;

const MAGIC: u32 = u32::from_le_bytes(*b"MIG\x01");

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[allow(missing_docs)] // named after the messages in `frame`
pub enum Kind {
    Hello = 1,
    Welcome = 2,
    Describe = 3,
    Accept = 4,
    Refuse = 5,
    Attach = 6,
    Attached = 7,
    Pages = 8,
    RoundEnd = 9,
    RoundAck = 10,
    State = 11,
    Digests = 12,
    Ready = 13,
    Mismatch = 14,
    Commit = 15,
    Running = 16,
    Gap = 17,
    Abort = 18,
    Lost = 19,
    Ping = 20,
    Pong = 21,
    Query = 22,
    Outcome = 23,
    /// How the destination timed its start.
    Started = 24,
}

impl Kind {
    /// Every kind there is.
    pub const ALL: [Self; 24] = [
        Self::Hello,
        Self::Welcome,
        Self::Describe,
        Self::Accept,
        Self::Refuse,
        Self::Attach,
        Self::Attached,
        Self::Pages,
        Self::RoundEnd,
        Self::RoundAck,
        Self::State,
        Self::Digests,
        Self::Ready,
        Self::Mismatch,
        Self::Commit,
        Self::Running,
        Self::Gap,
        Self::Abort,
        Self::Lost,
        Self::Ping,
        Self::Pong,
        Self::Query,
        Self::Outcome,
        Self::Started,
    ];

    fn from_wire(value: u16) -> Result<Self, WireError> {
        let known = Self::ALL.into_iter().find(|k| *k as u16 == value);
        known.ok_or(WireError::Unknown { what: "frame kind", value: u64::from(value) })
    }

    /// The most bytes that may follow the header of such a frame: what a receiver allocates at most.
    pub fn max_body_bytes(self) -> usize {
        match self {
            Self::Hello | Self::Welcome | Self::Attach | Self::Attached | Self::Query => 256,
            Self::Describe => 1 << 20,
            Self::Refuse => 1 << 20,
            Self::State => 16 << 20,
            Self::Pages => pages::MAX_FRAME_BYTES,
            Self::Digests => 128 << 10,
            Self::Mismatch => 64 << 10,
            Self::Abort | Self::Lost => 8 << 10,
            Self::Accept
            | Self::RoundEnd
            | Self::RoundAck
            | Self::Ready
            | Self::Commit
            | Self::Running
            | Self::Gap
            | Self::Ping
            | Self::Pong
            | Self::Outcome
            | Self::Started => 64,
        }
    }
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Header {
    /// What follows.
    pub kind: Kind,
    /// Entries in the run table of a `Pages` frame, otherwise 0.
    pub items: u16,
    /// Bytes that follow, within [`Kind::max_body_bytes`].
    pub length: u32,
    /// The round that pages belong to, otherwise 0.
    pub round: u32,
    /// Frames sent before this one on the same stream and in the same direction.
    pub sequence: u64,
    /// The first half of the session id.
    pub session: u64,
    /// CRC32C of the body of a message; 0 for pages, whose table has its own and whose bytes have none.
    pub body_crc: u32,
}

impl Header {
    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut writer = Writer::new();
        writer
            .u32(MAGIC)
            .u16(self.kind as u16)
            .u16(self.items)
            .u32(self.length)
            .u32(self.round)
            .u64(self.sequence)
            .u64(self.session)
            .u32(self.body_crc);
        let crc = crc32c::crc32c(&writer.as_bytes()[..HEADER_BYTES - 4]);
        writer.u32(crc);
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(writer.as_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::NotOurs`] when the first bytes are another protocol's, otherwise what does not hold.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let mut reader = Reader::new("frame header", bytes);
        if reader.u32()? != MAGIC {
            return Err(WireError::NotOurs {
                first_bytes: bytes.escape_ascii().take(60).map(char::from).collect(),
            });
        }
        let (kind, items, length, round) = (reader.u16()?, reader.u16()?, reader.u32()?, reader.u32()?);
        let (sequence, session, body_crc, claimed) =
            (reader.u64()?, reader.u64()?, reader.u32()?, reader.u32()?);
        let actual = crc32c::crc32c(&bytes[..HEADER_BYTES - 4]);
        if claimed != actual {
            return Err(WireError::Checksum { what: "frame header", claimed, actual });
        }
        let kind = Kind::from_wire(kind)?;
        let limit = kind.max_body_bytes() as u64;
        if u64::from(length) > limit {
            return Err(WireError::TooMany { what: "frame length", value: u64::from(length), limit });
        }
        let header = Self { kind, items, length, round, sequence, session, body_crc };
        header.check_unused()?;
        Ok(header)
    }

    /// Fields that a kind has no use for are 0, so that one message has one encoding.
    fn check_unused(&self) -> Result<(), WireError> {
        let (table, round) = match self.kind {
            Kind::Pages => (true, true),
            Kind::RoundEnd => (false, true),
            _ => (false, false),
        };
        let fields = [
            ("table entries of a frame without a table", !table, u64::from(self.items)),
            ("round of a message", !round, u64::from(self.round)),
            ("body checksum on a page channel", round, u64::from(self.body_crc)),
        ];
        let odd = fields.into_iter().find(|(_, unused, value)| *unused && *value != 0);
        odd.map_or(Ok(()), |(what, _, value)| Err(WireError::Unknown { what, value }))
    }

    /// The length as a size in memory.
    pub fn body_bytes(&self) -> usize {
        usize::try_from(self.length).unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header { kind: Kind::State, items: 0, length: 77, round: 0, sequence: 9, session: !7, body_crc: 5 }
    }

    #[test]
    fn a_header_comes_back_whatever_its_kind() {
        for kind in Kind::ALL {
            let message = Header { kind, length: 1, ..header() };
            let header = match kind {
                Kind::Pages => Header { items: 2, round: 3, body_crc: 0, ..message },
                Kind::RoundEnd => Header { round: 3, body_crc: 0, ..message },
                _ => message,
            };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn a_field_that_a_kind_has_no_use_for_is_zero() {
        let message = header();
        let pages = Header { kind: Kind::Pages, items: 1, round: 3, body_crc: 0, ..message };
        let round_end = Header { items: 0, kind: Kind::RoundEnd, length: 16, ..pages };
        for odd in [
            Header { items: 1, ..message },
            Header { round: 1, ..message },
            Header { body_crc: 1, ..pages },
            Header { items: 1, ..round_end },
            Header { body_crc: 1, ..round_end },
        ] {
            assert!(matches!(Header::decode(&odd.encode()), Err(WireError::Unknown { .. })), "{odd:?}");
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        for bit in 0..HEADER_BYTES * 8 {
            let mut bytes = header().encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bytes).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn another_protocol_is_recognised_and_quoted() {
        let bytes = *b"HTTP/1.1 400 Bad Request\r\nConnection: cl";
        let error = Header::decode(&bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            r"not this protocol: the peer sent HTTP/1.1 400 Bad Request\r\nConnection: cl"
        );
    }

    #[test]
    fn a_length_above_the_kinds_limit_is_refused() {
        let header = Header { kind: Kind::Commit, length: 65, ..header() };
        assert!(matches!(Header::decode(&header.encode()), Err(WireError::TooMany { limit: 64, .. })));
    }
}
