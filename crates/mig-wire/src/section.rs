//! State sections: a named, versioned, checksummed piece of device or vCPU state.
//!
//! ```text
//! name    u32 length, UTF-8          critical  u8 (0 or 1)
//! instance u32                       body      u32 length, bytes
//! version  u16                       crc       u32, CRC32C of everything before it
//! ```
//!
//! A destination that does not know a critical section refuses it, skips any other, and treats bytes that a
//! known section leaves unread as an error ([`crate::body::decode`]).

use crate::bytes::{Reader, WireError, Writer};

/// The longest section name, in bytes.
pub const MAX_NAME_BYTES: usize = 64;
/// The largest section body, in bytes.
pub const MAX_BODY_BYTES: usize = 4 << 20;
/// The most sections one message may carry: 64 for each of 32 vCPUs, and then some.
pub const MAX_SECTIONS: usize = 4096;
/// The least bytes a section takes on the wire.
const MIN_SECTION_BYTES: usize = 4 + 4 + 2 + 1 + 4 + 4;

/// One piece of saved state.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Section {
    /// What it is, `kvm.vcpu` for example; at most [`MAX_NAME_BYTES`].
    pub name: String,
    /// Which one of several, the vCPU's index for example.
    pub instance: u32,
    /// The schema of the body.
    pub version: u16,
    /// Whether a destination that does not know it must refuse the guest.
    pub critical: bool,
    /// The state itself, usually made by [`crate::body::encode`]; at most [`MAX_BODY_BYTES`].
    pub body: Vec<u8>,
}

impl Section {
    /// A critical section with a body made from a saved state type.
    pub fn critical<T: serde::Serialize>(name: &str, instance: u32, version: u16, state: &T) -> Self {
        Self { name: name.into(), instance, version, critical: true, body: crate::body::encode(state) }
    }

    /// A section that a destination may skip when it does not know it.
    pub fn optional<T: serde::Serialize>(name: &str, instance: u32, version: u16, state: &T) -> Self {
        Self { critical: false, ..Self::critical(name, instance, version, state) }
    }
}

/// Appends sections behind their count.
pub fn write_all(writer: &mut Writer, sections: &[Section]) {
    writer.count(sections.len());
    for section in sections {
        let mut one = Writer::new();
        one.text(&section.name, MAX_NAME_BYTES)
            .u32(section.instance)
            .u16(section.version)
            .u8(u8::from(section.critical))
            .blob(&section.body);
        let bytes = one.into_bytes();
        writer.raw(&bytes).u32(crc32c::crc32c(&bytes));
    }
}

/// Reads what [`write_all`] wrote.
///
/// # Errors
/// Any [`WireError`]: a bound exceeded, a checksum that does not match, bytes missing.
pub fn read_all(reader: &mut Reader<'_>) -> Result<Vec<Section>, WireError> {
    let count = reader.count(MAX_SECTIONS, MIN_SECTION_BYTES)?;
    (0..count).map(|_| read_one(reader)).collect()
}

fn read_one(reader: &mut Reader<'_>) -> Result<Section, WireError> {
    let before = reader.left();
    let section = Section {
        name: reader.text(MAX_NAME_BYTES)?,
        instance: reader.u32()?,
        version: reader.u16()?,
        critical: match reader.u8()? {
            0 => false,
            1 => true,
            other => return Err(WireError::Unknown { what: "critical bit", value: u64::from(other) }),
        },
        body: reader.blob(MAX_BODY_BYTES)?,
    };
    let covered = &before[..before.len() - reader.left().len()];
    let (claimed, actual) = (reader.u32()?, crc32c::crc32c(covered));
    if claimed != actual {
        return Err(WireError::Checksum { what: "state section", claimed, actual });
    }
    Ok(section)
}
