//! Who speaks, which versions and capabilities it knows, and how page channels prove that they belong.

use bitflags::bitflags;

use crate::bytes::{Reader, WireError, Writer};

/// The versions of the protocol that this crate speaks.
pub const VERSIONS: std::ops::RangeInclusive<u16> = 1..=1;
/// The most page channels a migration may have.
pub const MAX_CHANNELS: u16 = 64;

/// Names a migration; chosen at random by the source.
pub type SessionId = [u8; 16];
/// Proves that a connection belongs to a session; chosen at random by the destination.
pub type Secret = [u8; 16];

/// The half of a session id that stands in every header.
pub fn session_tag(id: &SessionId) -> u64 {
    let (half, _) = id.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    u64::from_le_bytes(*half)
}

bitflags! {
    /// What a side can do beyond the version's minimum.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Capabilities: u64 {
        /// Digests of all memory are compared before Commit.
        const VERIFY = 1;
        /// An arbiter, the same on both sides, decides who may run the guest.
        const ARBITER = 2;
        /// The number of page channels is what suits the source's cores: a destination grants as many as suit
        /// its own, if those are fewer.
        const SUITED_CHANNELS = 4;
        /// The destination tells how it timed its start, by `Started` after `Running`.
        const STARTED = 8;
        /// Pages may travel as [`Encoding::Zstd`](crate::pages::Encoding::Zstd).
        const ZSTD = 16;
        /// Pages may travel as [`Encoding::Delta`](crate::pages::Encoding::Delta).
        const DELTA = 32;
        /// Those of the two by which pages may travel otherwise than raw or as zeros.
        const PAGE_ENCODINGS = Self::ZSTD.bits() | Self::DELTA.bits();
    }
}

/// What this crate can do.
pub const CAPABILITIES: Capabilities = Capabilities::all();

/// The source's first message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Hello {
    /// Oldest version it speaks.
    pub version_min: u16,
    /// Newest version it speaks.
    pub version_max: u16,
    /// Bits of capabilities without which it will not go on.
    pub required: u64,
    /// Bits of capabilities that it could use.
    pub optional: u64,
    /// Page channels it wants.
    pub channels: u16,
    /// The session.
    pub session: SessionId,
}

impl Hello {
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.u16(self.version_min).u16(self.version_max).u64(self.required).u64(self.optional);
        writer.u16(self.channels).raw(&self.session);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            version_min: reader.u16()?,
            version_max: reader.u16()?,
            required: reader.u64()?,
            optional: reader.u64()?,
            channels: reader.u16()?,
            session: reader.id()?,
        })
    }

    /// The newest version that both sides speak.
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.version_max.min(*VERSIONS.end());
        (newest >= self.version_min.max(*VERSIONS.start())).then_some(newest)
    }

    /// The required capabilities that this side lacks, by name or bit.
    pub fn missing_capabilities(&self) -> Vec<String> {
        let missing = self.required & !CAPABILITIES.bits();
        (0..64).filter(|bit| missing >> bit & 1 == 1).map(|bit| format!("bit {bit}")).collect()
    }
}

/// The destination's answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Welcome {
    /// The version to speak.
    pub version: u16,
    /// Bits of the capabilities to use: all required, and of the optional ones those it has.
    pub capabilities: u64,
    /// Page channels it grants: 1 to what was asked for.
    pub channels: u16,
    /// What page channels must show.
    pub secret: Secret,
}

impl Welcome {
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.u16(self.version).u64(self.capabilities).u16(self.channels).raw(&self.secret);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            version: reader.u16()?,
            capabilities: reader.u64()?,
            channels: reader.u16()?,
            secret: reader.id()?,
        })
    }
}

/// A page channel's first message.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Attach {
    /// The session it belongs to.
    pub session: SessionId,
    /// The destination's secret.
    pub secret: Secret,
    /// Which channel it is, from 0.
    pub channel: u16,
}

impl Attach {
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.raw(&self.session).raw(&self.secret).u16(self.channel);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self { session: reader.id()?, secret: reader.id()?, channel: reader.u16()? })
    }
}

/// Asks what became of a session: the first message of a source that is in doubt, on a connection of its own.
///
/// Asking is not harmless: a destination that has not been told to run the guest gives it up before it
/// answers. So the secret is needed.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Query {
    /// The session.
    pub session: SessionId,
    /// The destination's secret.
    pub secret: Secret,
}

impl Query {
    pub(crate) fn write(&self, writer: &mut Writer) {
        writer.raw(&self.session).raw(&self.secret);
    }

    pub(crate) fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self { session: reader.id()?, secret: reader.id()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(version_min: u16, version_max: u16, required: u64) -> Hello {
        Hello { version_min, version_max, required, optional: 0, channels: 2, session: [7; 16] }
    }

    #[test]
    fn versions_are_negotiated_as_ranges() {
        assert_eq!(hello(0, 9, 0).common_version(), Some(1));
        assert_eq!(hello(2, 9, 0).common_version(), None);
        assert_eq!(hello(0, 0, 0).common_version(), None);
    }

    #[test]
    fn capabilities_that_are_missing_are_named() {
        assert!(hello(1, 1, Capabilities::VERIFY.bits()).missing_capabilities().is_empty());
        assert_eq!(hello(1, 1, 1 | 1 << 40).missing_capabilities(), ["bit 40"]);
    }
}
