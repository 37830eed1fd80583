//! Inputs made out of valid ones: damaged where it hurts, and sealed again.
//!
//! A mutation is plain data, so that proptest shrinks a list of them and a generator makes millions.

use mig_wire::bytes::Reader;
use mig_wire::describe::{MAX_REGIONS, MAX_SCHEMAS, MAX_TEXT_BYTES};
use mig_wire::header::{HEADER_BYTES, Kind};
use mig_wire::pages;
use mig_wire::section::{MAX_BODY_BYTES, MAX_NAME_BYTES, MAX_SECTIONS};

use crate::input::SCRIPT_BYTES;

/// The most frames and bytes a mutated stream has.
const MAX_FRAMES: usize = 64;
const MAX_STREAM_BYTES: usize = 1 << 20;

/// A change to an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mutation {
    /// Which one, modulo how many there are.
    pub how: u8,
    /// Which frame, modulo how many there are.
    pub frame: u8,
    /// Where in it, modulo how long it is.
    pub at: u32,
    /// With what.
    pub value: u64,
}

/// How much of an input's checksums is made right again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// All: lengths, tables, sections, bodies, headers.
    All,
    /// The headers' own alone.
    Headers,
    /// None.
    Nothing,
}

/// Numbers that lie on borders.
const BORDERS: [u64; 16] = [
    0,
    1,
    2,
    0x3f,
    0xff,
    0x100,
    0x200,
    0x1000,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 34,
    1 << 60,
    i64::MAX as u64,
    !0xfff,
    u64::MAX,
];

/// How many kinds of mutation there are.
const HOWS: u8 = 18;

/// A frame that is being changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawFrame {
    head: [u8; HEADER_BYTES],
    body: Vec<u8>,
    /// The length in its header is meant to be wrong.
    lies: bool,
}

/// Offsets of a header's fields (mig_wire::header).
const KIND: usize = 4;
const ITEMS: usize = 6;
const LENGTH: usize = 8;
const BODY_CRC: usize = 32;
const CRC: usize = 36;

/// A seed, split into frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    script: [u8; SCRIPT_BYTES],
    frames: Vec<RawFrame>,
}

impl Split {
    /// Splits an input; what is no whole frame at its end goes.
    pub fn new(bytes: &[u8]) -> Self {
        let (head, mut left) = bytes.split_at(bytes.len().min(SCRIPT_BYTES));
        let mut script = [0; SCRIPT_BYTES];
        script[..head.len()].copy_from_slice(head);
        let mut frames = Vec::new();
        while let Some((head, rest)) = left.split_first_chunk::<HEADER_BYTES>() {
            let length = (number(&head[LENGTH..LENGTH + 4]) as usize).min(rest.len());
            let (body, rest) = rest.split_at(length);
            frames.push(RawFrame { head: *head, body: body.to_vec(), lies: false });
            left = rest;
        }
        Self { script, frames }
    }

    /// Applies the mutations, with frames of `other` where they want some, and seals the result.
    pub fn mutated(&self, other: &Self, mutations: &[Mutation], sealing: Sealing) -> Vec<u8> {
        let mut copy = self.clone();
        for mutation in mutations {
            copy.mutate(other, *mutation);
        }
        copy.sealed(sealing)
    }

    fn mutate(&mut self, other: &Self, mutation: Mutation) {
        let Mutation { how, frame, at, value } = mutation;
        if how.is_multiple_of(HOWS) || self.frames.is_empty() {
            self.script[at as usize % SCRIPT_BYTES] = value as u8;
            return;
        }
        let chosen = usize::from(frame) % self.frames.len();
        match how % HOWS {
            1 => self.frames.truncate(chosen),
            2 => drop(self.frames.remove(chosen)),
            3 => self.repeat(chosen, 1),
            4 => self.repeat(chosen, at as usize % MAX_FRAMES),
            5 => {
                let with = at as usize % self.frames.len();
                self.frames.swap(chosen, with);
            }
            6 => {
                if let Some(guest) = other.frames.get(at as usize % other.frames.len().max(1)) {
                    self.frames.insert(chosen, guest.clone());
                }
            }
            how => self.frames[chosen].mutate(how, at, value, other),
        }
    }

    fn repeat(&mut self, frame: usize, times: usize) {
        let room = MAX_FRAMES.saturating_sub(self.frames.len());
        let copy = self.frames[frame].clone();
        let times = times.min(room).min(MAX_STREAM_BYTES / (copy.body.len() + HEADER_BYTES));
        self.frames.splice(frame..frame, std::iter::repeat_n(copy, times));
    }

    fn sealed(mut self, sealing: Sealing) -> Vec<u8> {
        let bytes: usize = self.frames.iter().map(|f| HEADER_BYTES + f.body.len()).sum();
        let mut input = Vec::with_capacity(SCRIPT_BYTES + bytes);
        input.extend_from_slice(&self.script);
        for frame in &mut self.frames {
            frame.seal(sealing);
            input.extend_from_slice(&frame.head);
            input.extend_from_slice(&frame.body);
        }
        input
    }
}

impl RawFrame {
    fn mutate(&mut self, how: u8, at: u32, value: u64, other: &Split) {
        let length = self.body.len();
        let place = at as usize % (length + 1);
        let border = BORDERS[value as usize % BORDERS.len()];
        match how {
            // a bit or a byte of the body
            7 => self.body.get_mut(place).into_iter().for_each(|byte| *byte ^= 1 << (value % 8)),
            8 => self.body.get_mut(place).into_iter().for_each(|byte| *byte = value as u8),
            // a length, a count, an address: aligned as often as not
            9 => overwrite(&mut self.body, place, &(border as u32).to_le_bytes()),
            10 => overwrite(&mut self.body, place / 4 * 4, &border.to_le_bytes()),
            11 => self.body.truncate(place),
            12 => {
                let more = (value as usize % 5000).min(MAX_STREAM_BYTES.saturating_sub(length));
                self.body.resize(length + more, value as u8);
            }
            // what looks like a length or a count
            16 => {
                let small = |bytes: &[u8]| (1..5000).contains(&number(bytes));
                let found = self.body[place..].windows(8).position(small);
                let start = place + found.unwrap_or(0);
                overwrite(&mut self.body, start, &border.to_le_bytes());
            }
            17 => self.resize_section(at as usize, value),
            // a piece of another message
            13 => {
                let from = value as usize;
                if let Some(guest) = other.frames.get(from % other.frames.len().max(1)) {
                    let start = from / 64 % (guest.body.len() + 1);
                    let end = (start + from / 65536 % 64).min(guest.body.len());
                    overwrite(&mut self.body, place, &guest.body[start..end]);
                }
            }
            // another kind
            14 => {
                let kind =
                    Kind::ALL.get(value as usize % (Kind::ALL.len() + 1)).map_or(0x7fff, |k| *k as u16);
                self.head[KIND..KIND + 2].copy_from_slice(&kind.to_le_bytes());
            }
            // a field of the header
            _ => {
                let place = at as usize % HEADER_BYTES;
                self.lies |= (LENGTH..LENGTH + 4).contains(&place);
                let bytes = border.to_le_bytes();
                let count = (1 + value as usize / 16 % 8).min(HEADER_BYTES - place);
                self.head[place..place + count].copy_from_slice(&bytes[..count]);
            }
        }
    }

    /// Cuts the body of a section, or makes it longer in the middle.
    fn resize_section(&mut self, at: usize, value: u64) {
        let seals = find_seals(number(&self.head[KIND..KIND + 2]), &self.body);
        let Some(Seal { body, end, .. }) = seals.get(at % seals.len().max(1)) else { return };
        let place = body + at / 64 % (end - body + 1);
        let (gone, more) = if value & 1 == 0 {
            ((value as usize / 2 % 64).min(end - place), 0)
        } else {
            (0, value as usize / 2 % 64)
        };
        let length = (end - body - gone + more) as u32;
        overwrite(&mut self.body, body - 4, &length.to_le_bytes());
        self.body.splice(place..place + gone, std::iter::repeat_n(value as u8, more));
    }

    fn seal(&mut self, sealing: Sealing) {
        if sealing == Sealing::Nothing {
            return;
        }
        if sealing == Sealing::All {
            if !self.lies {
                self.head[LENGTH..LENGTH + 4].copy_from_slice(&(self.body.len() as u32).to_le_bytes());
            }
            let kind = number(&self.head[KIND..KIND + 2]);
            let mut body_crc = 0;
            if kind == Kind::Pages as u64 {
                self.seal_table();
            } else if kind != Kind::RoundEnd as u64 {
                seal_sections(kind, &mut self.body);
                body_crc = crc32c::crc32c(&self.body);
            }
            self.head[BODY_CRC..BODY_CRC + 4].copy_from_slice(&body_crc.to_le_bytes());
        }
        let crc = crc32c::crc32c(&self.head[..CRC]);
        self.head[CRC..].copy_from_slice(&crc.to_le_bytes());
    }

    fn seal_table(&mut self) {
        let items = number(&self.head[ITEMS..ITEMS + 2]) as usize;
        let end = pages::table_bytes(items);
        if end <= self.body.len() {
            let crc = crc32c::crc32c(&self.body[..end - 4]);
            self.body[end - 4..end].copy_from_slice(&crc.to_le_bytes());
        }
    }
}

/// Seals the sections of a State or Describe, as far as they can be found.
fn seal_sections(kind: u64, body: &mut [u8]) {
    for Seal { start, end, .. } in find_seals(kind, body) {
        let crc = crc32c::crc32c(&body[start..end]);
        body[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Where a section starts, where its body does, and where its checksum stands.
struct Seal {
    start: usize,
    body: usize,
    end: usize,
}

fn find_seals(kind: u64, body: &[u8]) -> Vec<Seal> {
    let mut seals = Vec::new();
    let mut reader = Reader::new("sections", body);
    let found = if kind == Kind::State as u64 {
        reader.u32().is_ok()
    } else {
        kind == Kind::Describe as u64 && skip_to_sections(&mut reader).is_ok()
    };
    if found {
        // an end in the middle is what a mutation did; what came before it counts
        let _ = walk_sections(&mut reader, body.len(), &mut seals);
    }
    seals
}

fn skip_to_sections(reader: &mut Reader<'_>) -> Result<(), mig_wire::WireError> {
    reader.text(MAX_TEXT_BYTES)?;
    reader.take(8)?;
    let regions = reader.count(MAX_REGIONS, 16)?;
    reader.take(16 * regions)?;
    if reader.u8()? == 1 {
        reader.id()?;
    }
    for _ in 0..reader.count(MAX_SCHEMAS, 6)? {
        let name = reader.count(MAX_NAME_BYTES, 1)?;
        reader.take(name + 2)?;
    }
    Ok(())
}

fn walk_sections(
    reader: &mut Reader<'_>,
    bytes: usize,
    seals: &mut Vec<Seal>,
) -> Result<(), mig_wire::WireError> {
    for _ in 0..reader.count(MAX_SECTIONS, 0)? {
        let start = bytes - reader.left().len();
        let name = reader.count(MAX_NAME_BYTES, 1)?;
        reader.take(name + 4 + 2 + 1)?;
        let length = reader.count(MAX_BODY_BYTES, 1)?;
        reader.take(length)?;
        let end = bytes - reader.left().len();
        reader.take(4)?;
        seals.push(Seal { start, body: end - length, end });
    }
    Ok(())
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    bytes[at..].iter_mut().zip(with).for_each(|(to, from)| *to = *from);
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Repairs every checksum and length of an input that something else has mutated.
pub fn seal(bytes: &[u8]) -> Vec<u8> {
    Split::new(bytes).sealed(Sealing::All)
}

/// Makes inputs without end: the same ones for the same number.
#[derive(Debug, Clone)]
pub struct Generator {
    seeds: Vec<Split>,
}

impl Generator {
    /// A generator that starts from these inputs.
    ///
    /// # Panics
    /// When there are none.
    pub fn new<'a>(seeds: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let seeds: Vec<Split> = seeds.into_iter().map(Split::new).collect();
        assert!(!seeds.is_empty(), "something to start from");
        Self { seeds }
    }

    /// Input number `number`: one to four mutations; three in four are sealed whole, one in eight not at all.
    pub fn input(&self, number: u64) -> Vec<u8> {
        let mut random = SplitMix64(number);
        let mut pick = |count: usize| (random.next() % count as u64) as usize;
        let (seed, other) = (pick(self.seeds.len()), pick(self.seeds.len()));
        let sealing = [Sealing::Headers, Sealing::Nothing].get(pick(8)).copied().unwrap_or(Sealing::All);
        let count = 1 + pick(4);
        let mut mutations = [Mutation { how: 0, frame: 0, at: 0, value: 0 }; 4];
        for mutation in &mut mutations[..count] {
            let bits = random.next();
            *mutation = Mutation {
                how: bits as u8,
                frame: (bits >> 8) as u8,
                at: (bits >> 16) as u32,
                value: random.next(),
            };
        }
        self.seeds[seed].mutated(&self.seeds[other], &mutations[..count], sealing)
    }
}

/// Sebastiano Vigna's splitmix64: every state gives another number.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seeds;

    #[test]
    fn an_input_that_was_not_mutated_is_sealed_as_it_was() {
        for seed in seeds::all() {
            assert!(seal(&seed.bytes) == seed.bytes, "{}", seed.name);
        }
    }
}
