//! A guest as bytes in guest memory: put there by `load`, compared again by `verify`.
//!
//! Invariant: the image depends on nothing but the guest, the number of vCPUs, the TSC's frequency and the
//! memory's regions, so that the host can make it again whenever it wants to compare.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::asm::Code;
use super::entry::{Entry, SELECTOR_CODE, gdt, vcpu_entry};
use super::layout::{
    AREA_BYTES, AREAS, CODE, CODE_END, GDT, GIB, HIGH_DIRECTORIES, IDENTITY, IDT, LOW_DIRECTORIES,
    PAGE_BYTES, PDPT, PML4, SHARED, area, control, free_from,
};
use super::{
    Fill, Guest, MAX_VCPUS, Memory, Verified, WorkloadError, clock, dirtier, fill, idle, memory_bytes, state,
};

/// A contiguous piece of the image.
pub(super) struct Piece {
    pub(super) what: &'static str,
    pub(super) address: u64,
    pub(super) bytes: Vec<u8>,
    pub(super) kind: PieceKind,
}

/// How a piece may change while the guest runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum PieceKind {
    /// Not at all.
    Constant,
    /// The processor sets accessed and dirty bits in it.
    PageTable,
    /// As the guest likes.
    Variable,
}

/// What a guest's program may depend on.
pub(super) struct Machine {
    pub(super) vcpus: u8,
    pub(super) tsc_khz: u32,
    /// The numbers of all pages that the fixed layout leaves free, as ascending ranges.
    pub(super) free_pages: Vec<std::ops::Range<u64>>,
    memory_bytes: u64,
    end: u64,
}

impl Machine {
    fn new(memory: &Memory, vcpus: u8, tsc_khz: u32) -> Result<Self, WorkloadError> {
        if vcpus == 0 || vcpus > MAX_VCPUS {
            return Err(WorkloadError::Vcpus { vcpus });
        }
        let end = memory.last_addr().raw_value().saturating_add(1);
        if end > 512 * GIB {
            return Err(WorkloadError::MemoryTooLarge { end });
        }
        let first = free_from(end) / PAGE_BYTES;
        let free_pages = memory
            .iter()
            .map(|region| {
                let start = region.start_addr().raw_value();
                (start / PAGE_BYTES).max(first)..(start + region.len()) / PAGE_BYTES
            })
            .filter(|pages| !pages.is_empty())
            .collect();
        Ok(Self { vcpus, tsc_khz, free_pages, memory_bytes: memory_bytes(memory), end })
    }

    /// The error of a guest that needs `free_bytes` beyond the fixed layout.
    pub(super) fn too_small(&self, guest: &Guest, free_bytes: u64) -> WorkloadError {
        WorkloadError::MemoryTooSmall {
            guest: guest.clone(),
            needed_bytes: free_from(self.end).saturating_add(free_bytes),
            memory_bytes: self.memory_bytes,
        }
    }
}

/// What the identity page says.
pub(super) struct Identity {
    pub(super) vcpus: u8,
    pub(super) tsc_khz: u32,
    pub(super) name: String,
    pub(super) guest: Option<Guest>,
}

const MAGIC: [u8; 8] = *b"migguest";
const NAME_MAX_BYTES: usize = 256;

/// See [`Guest::load`].
pub(super) fn load(guest: &Guest, memory: &Memory, vcpus: u8, tsc_khz: u32) -> Result<Entry, WorkloadError> {
    let machine = Machine::new(memory, vcpus, tsc_khz)?;
    let (pieces, code) = image(guest, &machine)?;
    if machine.free_pages.is_empty() {
        return Err(machine.too_small(guest, PAGE_BYTES));
    }
    for piece in &pieces {
        write(memory, piece.address, &piece.bytes)?;
    }
    match guest {
        Guest::Idle { fill: Fill::None } | Guest::State | Guest::Clock => {}
        Guest::Idle { fill } => fill::fill(*fill, memory, &machine.free_pages)?,
        Guest::Dirtier { .. } => dirtier::fill_and_stamp(guest, memory, &machine)?,
    }
    Ok(Entry { vcpus: (0..vcpus).map(|vcpu| vcpu_entry(vcpu, code.start)).collect() })
}

/// See [`Guest::verify`].
pub(super) fn verify(guest: &Guest, memory: &Memory) -> Result<Verified, WorkloadError> {
    let identity = expect(guest, memory)?;
    let machine = Machine::new(memory, identity.vcpus, identity.tsc_khz)?;
    let (pieces, _) = image(guest, &machine)?;
    let mut pages_checked = 0;
    for piece in pieces.iter().filter(|piece| piece.kind != PieceKind::Variable) {
        pages_checked += compare(memory, piece)?;
    }
    let pages_written = pages_written(guest, memory)?;
    pages_checked += match guest {
        Guest::Idle { fill: Fill::None } | Guest::State | Guest::Clock => 0,
        Guest::Idle { fill } => fill::verify(*fill, memory, &machine.free_pages, 0)?,
        Guest::Dirtier { .. } => dirtier::verify(guest, memory, &machine)?,
    };
    Ok(Verified { pages_checked, pages_written })
}

/// See [`Guest::pages_written`].
pub(super) fn pages_written(guest: &Guest, memory: &Memory) -> Result<u64, WorkloadError> {
    let identity = expect(guest, memory)?;
    (0..identity.vcpus).map(|vcpu| read_u64(memory, area(vcpu) + control::WRITTEN)).sum()
}

/// The identity page, if it is one.
pub(super) fn identity(memory: &Memory) -> Option<Identity> {
    let mut page = [0; 32 + NAME_MAX_BYTES];
    memory.read_slice(&mut page, GuestAddress(IDENTITY)).ok()?;
    let (magic, rest) = page.split_first_chunk()?;
    let (tsc_khz, rest) = rest.split_first_chunk()?;
    let (vcpus, rest) = rest.split_first()?;
    let (length, rest) = rest.split_first_chunk()?;
    if *magic != MAGIC {
        return None;
    }
    let name = std::str::from_utf8(rest.get(..u16::from_le_bytes(*length).into())?).ok()?.to_owned();
    Some(Identity { vcpus: *vcpus, tsc_khz: u32::from_le_bytes(*tsc_khz), guest: name.parse().ok(), name })
}

fn identity_page(guest: &Guest, machine: &Machine) -> Vec<u8> {
    let name = guest.to_string();
    assert!(name.len() <= NAME_MAX_BYTES, "a guest's name is three numbers and words");
    let mut page = MAGIC.to_vec();
    page.extend(machine.tsc_khz.to_le_bytes());
    page.push(machine.vcpus);
    page.extend((name.len() as u16).to_le_bytes());
    page.extend(name.bytes());
    page.resize(PAGE_BYTES as usize, 0);
    page
}

fn expect(guest: &Guest, memory: &Memory) -> Result<Identity, WorkloadError> {
    let other = |found: String| WorkloadError::OtherGuest { expected: guest.clone(), found };
    let identity = identity(memory).ok_or_else(|| other("no built-in guest".to_owned()))?;
    if identity.guest.as_ref() == Some(guest) { Ok(identity) } else { Err(other(identity.name)) }
}

/// Everything but fill and stamps.
fn image(guest: &Guest, machine: &Machine) -> Result<(Vec<Piece>, Code), WorkloadError> {
    let mut pieces = vec![
        constant("the identity page", IDENTITY, identity_page(guest, machine)),
        constant("the descriptor table", GDT, page_of(&gdt())),
        Piece { what: "shared memory", address: SHARED, bytes: page_of(&[]), kind: PieceKind::Variable },
    ];
    pieces.extend(page_tables(machine.end));
    let mut areas = vec![0; usize::from(machine.vcpus) * AREA_BYTES as usize];
    for (vcpu, area) in areas.chunks_exact_mut(AREA_BYTES as usize).enumerate() {
        area[..4].copy_from_slice(&(vcpu as u32).to_le_bytes());
    }
    let (code, own) = match guest {
        Guest::Idle { .. } => (idle::program()?, Vec::new()),
        Guest::Dirtier { .. } => dirtier::program(guest, machine, &mut areas)?,
        Guest::State => state::program(machine, &mut areas)?,
        Guest::Clock => (clock::program(machine, &mut areas)?, Vec::new()),
    };
    let room_bytes = (CODE_END - CODE) as usize;
    if code.bytes.len() > room_bytes {
        return Err(WorkloadError::CodeTooLarge { bytes: code.bytes.len(), room_bytes });
    }
    pieces.push(Piece { what: "the control pages", address: AREAS, bytes: areas, kind: PieceKind::Variable });
    pieces.push(constant("the interrupt table", IDT, idt(&code.handlers)));
    pieces.push(constant("the code", CODE, code.bytes.clone()));
    pieces.extend(own);
    Ok((pieces, code))
}

/// A piece that nobody writes once it is loaded.
pub(super) fn constant(what: &'static str, address: u64, bytes: Vec<u8>) -> Piece {
    Piece { what, address, bytes, kind: PieceKind::Constant }
}

fn page_of(quadwords: &[u64]) -> Vec<u8> {
    let mut page: Vec<u8> = quadwords.iter().flat_map(|q| q.to_le_bytes()).collect();
    page.resize(PAGE_BYTES as usize, 0);
    page
}

/// 64-bit interrupt gates (SDM volume 3, figure 7-8).
fn idt(handlers: &[(u8, u64)]) -> Vec<u8> {
    let mut table = [0_u64; 512];
    for &(vector, address) in handlers {
        let at = usize::from(vector) * 2;
        table[at] =
            address & 0xffff | u64::from(SELECTOR_CODE) << 16 | 0x8e << 40 | (address >> 16 & 0xffff) << 48;
        table[at + 1] = address >> 32;
    }
    page_of(&table)
}

/// Maps 4 GiB, or up to `end` when that is more, one to one with 2 MiB pages.
fn page_tables(end: u64) -> Vec<Piece> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const UNCACHED: u64 = 1 << 4 | 1 << 3;
    let table = |what, address, entries: &[u64]| Piece {
        what,
        address,
        bytes: page_of(entries),
        kind: PieceKind::PageTable,
    };
    let directory = |gib: u64| {
        if gib < 4 { LOW_DIRECTORIES + gib * PAGE_BYTES } else { HIGH_DIRECTORIES + (gib - 4) * PAGE_BYTES }
    };
    let gibs = end.div_ceil(GIB).max(4);
    let mut pieces = vec![
        table("a page table", PML4, &[PDPT | PRESENT_WRITABLE]),
        table("a page table", PDPT, &(0..gibs).map(|g| directory(g) | PRESENT_WRITABLE).collect::<Vec<_>>()),
    ];
    for gib in 0..gibs {
        let entries: Vec<u64> = (0..512)
            .map(|i| {
                let address = gib * GIB + i * (2 << 20);
                // The last 32 MiB below 4 GiB hold devices (IOAPIC, APIC) on every PC.
                let device = (0xfe00_0000..1 << 32).contains(&address);
                address | PRESENT_WRITABLE | LARGE | if device { UNCACHED } else { 0 }
            })
            .collect();
        pieces.push(table("a page table", directory(gib), &entries));
    }
    pieces
}

/// Compares a piece with memory; the number of pages that were compared.
fn compare(memory: &Memory, piece: &Piece) -> Result<u64, WorkloadError> {
    const ACCESSED_AND_DIRTY: u64 = 1 << 6 | 1 << 5;
    let mut found = vec![0; piece.bytes.len()];
    read(memory, piece.address, &mut found)?;
    let mask = if piece.kind == PieceKind::PageTable { !ACCESSED_AND_DIRTY } else { !0 };
    let quadword = |bytes: &[u8]| {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(padded) & mask
    };
    for (i, (expected, found)) in piece.bytes.chunks(8).zip(found.chunks(8)).enumerate() {
        let (expected, found) = (quadword(expected), quadword(found));
        if expected != found {
            let address = piece.address + i as u64 * 8;
            let what = piece.what;
            return Err(WorkloadError::Changed {
                what,
                page: address / PAGE_BYTES,
                address,
                expected,
                found,
            });
        }
    }
    Ok((piece.bytes.len() as u64).div_ceil(PAGE_BYTES))
}

pub(super) fn write(memory: &Memory, address: u64, bytes: &[u8]) -> Result<(), WorkloadError> {
    memory
        .write_slice(bytes, GuestAddress(address))
        .map_err(|source| WorkloadError::Memory { address, source })
}

pub(super) fn read(memory: &Memory, address: u64, bytes: &mut [u8]) -> Result<(), WorkloadError> {
    memory
        .read_slice(bytes, GuestAddress(address))
        .map_err(|source| WorkloadError::Memory { address, source })
}

pub(super) fn read_u64(memory: &Memory, address: u64) -> Result<u64, WorkloadError> {
    let mut bytes = [0; 8];
    read(memory, address, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
