//! What a source says of its guest before a page moves, and what a destination answers when it will not do.

use crate::bytes::{Reader, WireError, Writer};
use crate::section::{self, Section};

/// The most memory regions a guest may have.
pub const MAX_REGIONS: usize = 64;
/// The most schemas a description may list.
pub const MAX_SCHEMAS: usize = 256;
/// The most reasons one refusal may give.
pub const MAX_REFUSALS: usize = 256;
/// The longest text in a description or refusal, in bytes.
pub const MAX_TEXT_BYTES: usize = 1024;

/// A range of guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Region {
    /// Guest-physical address of its first byte, a multiple of the page size.
    pub guest_address: u64,
    /// Its length in bytes, a multiple of the page size, not zero.
    pub bytes: u64,
}

/// A kind of section the source is going to send.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Schema {
    /// The section's name.
    pub name: String,
    /// The version of its body.
    pub version: u16,
}

/// Everything a destination needs to accept or refuse a guest, and to prepare for it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Description {
    /// `x86_64` for example.
    pub architecture: String,
    /// Page size in bytes.
    pub page_bytes: u32,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory, ascending and apart from each other.
    pub regions: Vec<Region>,
    /// The source kernel's boot id (`/proc/sys/kernel/random/boot_id`), where there is one: equal ids mean
    /// that both sides share CLOCK_MONOTONIC and the TSC.
    pub boot_id: Option<[u8; 16]>,
    /// The sections that state will be sent as, so that an unknown one is refused before a page moves.
    pub schemas: Vec<Schema>,
    /// What hypervisor and VMM say of themselves: CPUID, MSRs, devices.
    pub platform: Vec<Section>,
}

impl Description {
    /// Appends the description.
    pub fn write(&self, writer: &mut Writer) {
        writer.text(&self.architecture, MAX_TEXT_BYTES).u32(self.page_bytes).u32(self.vcpus);
        writer.count(self.regions.len());
        for region in &self.regions {
            writer.u64(region.guest_address).u64(region.bytes);
        }
        writer.u8(u8::from(self.boot_id.is_some())).raw(self.boot_id.as_ref().map_or(&[], |id| id));
        writer.count(self.schemas.len());
        for schema in &self.schemas {
            writer.text(&schema.name, section::MAX_NAME_BYTES).u16(schema.version);
        }
        section::write_all(writer, &self.platform);
    }

    /// Reads what [`Description::write`] wrote.
    ///
    /// # Errors
    /// Any [`WireError`]: a bound exceeded, bytes missing.
    pub fn read(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (architecture, page_bytes, vcpus) = (reader.text(MAX_TEXT_BYTES)?, reader.u32()?, reader.u32()?);
        let regions = (0..reader.count(MAX_REGIONS, 16)?)
            .map(|_| Ok(Region { guest_address: reader.u64()?, bytes: reader.u64()? }))
            .collect::<Result<_, WireError>>()?;
        let boot_id = match reader.u8()? {
            0 => None,
            1 => Some(reader.id()?),
            value => {
                return Err(WireError::Unknown { what: "presence of a boot id", value: u64::from(value) });
            }
        };
        let schemas = (0..reader.count(MAX_SCHEMAS, 6)?)
            .map(|_| Ok(Schema { name: reader.text(section::MAX_NAME_BYTES)?, version: reader.u16()? }))
            .collect::<Result<_, WireError>>()?;
        Ok(Self {
            architecture,
            page_bytes,
            vcpus,
            regions,
            boot_id,
            schemas,
            platform: section::read_all(reader)?,
        })
    }
}

/// One reason why a destination will not take a guest.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Refusal {
    /// What does not fit, in a word or two: `memory`, `cpuid 7.0:ebx.avx512f`, `msr 0x10a`.
    pub what: String,
    /// Why, with both sides' values.
    pub cause: String,
    /// What somebody can do about it.
    pub remedy: String,
}

impl Refusal {
    /// A reason, its cause and its remedy.
    pub fn new(what: impl Into<String>, cause: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what: what.into(), cause: cause.into(), remedy: remedy.into() }
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.what, self.cause)?;
        if self.remedy.is_empty() { Ok(()) } else { write!(f, " ({})", self.remedy) }
    }
}

/// Appends reasons, the first [`MAX_REFUSALS`] of them.
pub fn write_refusals(writer: &mut Writer, refusals: &[Refusal]) {
    let refusals = &refusals[..refusals.len().min(MAX_REFUSALS)];
    writer.count(refusals.len());
    for refusal in refusals {
        for text in [&refusal.what, &refusal.cause, &refusal.remedy] {
            writer.text(text, MAX_TEXT_BYTES);
        }
    }
}

/// Reads what [`write_refusals`] wrote.
///
/// # Errors
/// Any [`WireError`]: a bound exceeded, bytes missing.
pub fn read_refusals(reader: &mut Reader<'_>) -> Result<Vec<Refusal>, WireError> {
    (0..reader.count(MAX_REFUSALS, 12)?)
        .map(|_| {
            Ok(Refusal {
                what: reader.text(MAX_TEXT_BYTES)?,
                cause: reader.text(MAX_TEXT_BYTES)?,
                remedy: reader.text(MAX_TEXT_BYTES)?,
            })
        })
        .collect()
}
