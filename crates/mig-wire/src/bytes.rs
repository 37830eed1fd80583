//! A bounded cursor over a peer's bytes, and its counterpart that writes them.
//!
//! Invariant: a [`Reader`] never looks beyond its slice and never allocates more than the slice holds;
//! [`Reader::finish`] makes unread bytes an error, so two readings of one message cannot differ.

use thiserror::Error;

/// What is wrong with a peer's bytes. The peer is to blame for all of these.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[allow(missing_docs)] // the fields are named in the message
pub enum WireError {
    #[error("{what} ends early: {needed} bytes needed, {left} left")]
    Truncated { what: &'static str, needed: usize, left: usize },
    #[error("{what} is followed by {left} unread bytes")]
    Unread { what: &'static str, left: usize },
    #[error("{what} is {value}, above its limit {limit}")]
    TooMany { what: &'static str, value: u64, limit: u64 },
    #[error("{what} has no meaning with the value {value}")]
    Unknown { what: &'static str, value: u64 },
    #[error("{what} is not UTF-8 text")]
    NotText { what: &'static str },
    #[error("{what} has checksum {claimed:#010x}, its bytes have {actual:#010x}")]
    Checksum { what: &'static str, claimed: u32, actual: u32 },
    #[error("not this protocol: the peer sent {first_bytes}")]
    NotOurs { first_bytes: String },
    #[error("{what}: {cause}")]
    Body { what: &'static str, cause: String },
}

/// Reads little-endian fields off the front of a slice.
#[derive(Debug)]
pub struct Reader<'a> {
    what: &'static str,
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts reading `bytes`; `what` names the thing read in every error.
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, left: bytes }
    }

    /// What has not been read yet.
    pub fn left(&self) -> &'a [u8] {
        self.left
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when fewer are left.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let truncated = WireError::Truncated { what: self.what, needed: count, left: self.left.len() };
        let (head, rest) = self.left.split_at_checked(count).ok_or(truncated)?;
        self.left = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let truncated = WireError::Truncated { what: self.what, needed: N, left: self.left.len() };
        let (head, rest) = self.left.split_first_chunk::<N>().ok_or(truncated)?;
        self.left = rest;
        Ok(*head)
    }

    /// The next byte.
    ///
    /// # Errors
    /// [`WireError::Truncated`] at the end.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[b]| b)
    }

    /// The next two bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when fewer are left.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when fewer are left.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes as a number.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when fewer are left.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        self.array().map(u64::from_le_bytes)
    }

    /// The next sixteen bytes.
    ///
    /// # Errors
    /// [`WireError::Truncated`] when fewer are left.
    pub fn id(&mut self) -> Result<[u8; 16], WireError> {
        self.array()
    }

    /// A `u32` count that must not exceed `limit`, nor promise more items of `item_bytes` than are left.
    ///
    /// # Errors
    /// [`WireError::TooMany`] above the limit, [`WireError::Truncated`] beyond what is left.
    pub fn count(&mut self, limit: usize, item_bytes: usize) -> Result<usize, WireError> {
        let claimed = self.u32()?;
        let too_many = WireError::TooMany { what: self.what, value: u64::from(claimed), limit: limit as u64 };
        let count = usize::try_from(claimed).ok().filter(|c| *c <= limit).ok_or(too_many)?;
        let needed = count.saturating_mul(item_bytes);
        if needed > self.left.len() {
            return Err(WireError::Truncated { what: self.what, needed, left: self.left.len() });
        }
        Ok(count)
    }

    /// Text behind a `u32` length, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Reader::count`], and [`WireError::NotText`].
    pub fn text(&mut self, limit: usize) -> Result<String, WireError> {
        let bytes = self.blob(limit)?;
        String::from_utf8(bytes).map_err(|_| WireError::NotText { what: self.what })
    }

    /// Bytes behind a `u32` length, of at most `limit` bytes.
    ///
    /// # Errors
    /// As [`Reader::count`].
    pub fn blob(&mut self, limit: usize) -> Result<Vec<u8>, WireError> {
        let count = self.count(limit, 1)?;
        Ok(self.take(count)?.to_vec())
    }

    /// Ends the reading.
    ///
    /// # Errors
    /// [`WireError::Unread`] when bytes are left.
    pub fn finish(self) -> Result<(), WireError> {
        match self.left.len() {
            0 => Ok(()),
            left => Err(WireError::Unread { what: self.what, left }),
        }
    }
}

/// Writes the fields that [`Reader`] reads.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.raw(&[value])
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// Appends a count of our own.
    ///
    /// # Panics
    /// When it does not fit 32 bits: our own messages are far smaller.
    pub fn count(&mut self, count: usize) -> &mut Self {
        self.u32(u32::try_from(count).expect("own counts fit 32 bits"))
    }

    /// Appends bytes behind their length.
    pub fn blob(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len()).raw(bytes)
    }

    /// Appends text behind its length, cut at a character when it is longer than `limit` bytes.
    pub fn text(&mut self, text: &str, limit: usize) -> &mut Self {
        self.blob(&text.as_bytes()[..text.floor_char_boundary_at(limit)])
    }

    /// The bytes written so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The bytes written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }
}

trait FloorCharBoundary {
    fn floor_char_boundary_at(&self, limit: usize) -> usize;
}

impl FloorCharBoundary for str {
    // std's own is newer than our minimum Rust version
    fn floor_char_boundary_at(&self, limit: usize) -> usize {
        (0..=limit.min(self.len())).rev().find(|at| self.is_char_boundary(*at)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_that_promises_more_than_is_there_is_refused_before_allocation() {
        let bytes = [0xff, 0xff, 0xff, 0x7f, 1, 2, 3];
        let mut reader = Reader::new("test", &bytes);
        assert!(matches!(reader.count(usize::MAX, 1), Err(WireError::Truncated { .. })));
        let mut reader = Reader::new("test", &bytes);
        assert!(matches!(reader.blob(16), Err(WireError::TooMany { limit: 16, .. })));
    }

    #[test]
    fn unread_bytes_are_an_error() {
        let mut reader = Reader::new("test", &[1, 2]);
        reader.u8().unwrap();
        assert_eq!(reader.finish(), Err(WireError::Unread { what: "test", left: 1 }));
    }

    #[test]
    fn text_is_cut_at_a_character() {
        let mut writer = Writer::new();
        writer.text("aé", 2);
        assert_eq!(writer.into_bytes(), [1, 0, 0, 0, b'a']);
    }
}
