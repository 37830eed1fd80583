//! The bytes of a lease: what they say, and what to write to have them say something else. No files here.
//!
//! ```text
//! mig-lease 1
//! id 9f86d081884c7d659a2feaa0c55ad015
//! record 0000000000000004 session 60303ae22b998861bce3b28f33eec1be owner source      sum 5c2d0b0f32b4c1aa
//! record 0000000000000003 session 60303ae22b998861bce3b28f33eec1be owner none        sum 0d4f5c2b9f7a5310
//! ```
//!
//! The record with the greater number counts. The next one is written over the *other*, so at any instant the
//! one that counts is whole: a write that was torn leaves a record whose sum (xxh3 of the id and of the line)
//! is wrong, and then what counted before still does. Bytes are read strictly: the length is fixed, each
//! record is as it would be written or is no record, and without one that is right nothing is decided. So a
//! file that was cut short is refused, never taken for an older one of itself.

use mig_core::Side;
use mig_wire::hello::SessionId;
use xxhash_rust::xxh3::xxh3_64;

const MAGIC: &str = "mig-lease 1\n";
const HEADER_BYTES: usize = 48;
const RECORD_BYTES: usize = 104;
/// The length of every lease.
pub(super) const LEASE_BYTES: usize = HEADER_BYTES + 2 * RECORD_BYTES;

/// Names a lease.
pub(super) type LeaseId = [u8; 16];

/// What a lease says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Register {
    pub(super) id: LeaseId,
    number: u64,
    /// Where the record that counts stands, 0 or 1.
    slot: usize,
    pub(super) session: SessionId,
    pub(super) owner: Option<Side>,
}

/// A write that makes a lease say something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) offset: usize,
    pub(super) record: [u8; RECORD_BYTES],
}

/// Why bytes are no lease that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unreadable {
    /// They never were one.
    NotALease,
    /// They look like one that came to harm.
    Damaged,
}

impl Register {
    /// The bytes of a new lease. `session` should be known to nobody: it stands for none.
    pub(super) fn create(id: LeaseId, session: SessionId) -> [u8; LEASE_BYTES] {
        let mut bytes = [0; LEASE_BYTES];
        let (header, records) = bytes.split_at_mut(HEADER_BYTES);
        header.copy_from_slice(format!("{MAGIC}id {}\n", hex(&id)).as_bytes());
        for (number, record) in records.chunks_exact_mut(RECORD_BYTES).enumerate() {
            record.copy_from_slice(
                &Self { id, number: number as u64, slot: number, session, owner: None }.record(),
            );
        }
        bytes
    }

    /// What `bytes` say.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        if !bytes.starts_with(MAGIC.as_bytes()) {
            return Err(Unreadable::NotALease);
        }
        let bytes: &[u8; LEASE_BYTES] = bytes.try_into().map_err(|_| Unreadable::Damaged)?;
        let (header, records) = bytes.split_at(HEADER_BYTES);
        let id = field(header, MAGIC.len() + 3, 32).and_then(unhex).ok_or(Unreadable::Damaged)?;
        if header != format!("{MAGIC}id {}\n", hex(&id)).as_bytes() {
            return Err(Unreadable::Damaged);
        }
        let (first, second) = records.split_at(RECORD_BYTES);
        match (Self::read_record(id, 0, first), Self::read_record(id, 1, second)) {
            // Never written: it does not say which counts.
            (Some(a), Some(b)) if a.number == b.number => Err(Unreadable::Damaged),
            (Some(a), Some(b)) => Ok(if a.number > b.number { a } else { b }),
            (Some(only), None) | (None, Some(only)) => Ok(only),
            (None, None) => Err(Unreadable::Damaged),
        }
    }

    /// The write after which it says this. None after 2^64 writes.
    pub(super) fn change(&self, session: SessionId, owner: Option<Side>) -> Option<Change> {
        let next =
            Self { id: self.id, number: self.number.checked_add(1)?, slot: 1 - self.slot, session, owner };
        Some(Change { offset: HEADER_BYTES + next.slot * RECORD_BYTES, record: next.record() })
    }

    fn record(&self) -> [u8; RECORD_BYTES] {
        let owner = match self.owner {
            None => "none",
            Some(Side::Source) => "source",
            Some(Side::Destination) => "destination",
        };
        let text =
            format!("record {:016x} session {} owner {owner:<11} sum ", self.number, hex(&self.session));
        let sum = xxh3_64(&[&self.id, text.as_bytes()].concat());
        let mut record = [0; RECORD_BYTES];
        record.copy_from_slice(format!("{text}{sum:016x}\n").as_bytes());
        record
    }

    /// A record that is byte for byte as it would be written.
    fn read_record(id: LeaseId, slot: usize, record: &[u8]) -> Option<Self> {
        let number = u64::from_str_radix(field(record, 7, 16)?, 16).ok()?;
        let session = unhex(field(record, 32, 32)?)?;
        let owner = match field(record, 71, 11)?.trim_end() {
            "none" => None,
            "source" => Some(Side::Source),
            "destination" => Some(Side::Destination),
            _ => return None,
        };
        let read = Self { id, number, slot, session, owner };
        (read.record() == record).then_some(read)
    }
}

fn field(bytes: &[u8], offset: usize, length: usize) -> Option<&str> {
    std::str::from_utf8(bytes.get(offset..offset + length)?).ok()
}

fn hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}

fn unhex(text: &str) -> Option<[u8; 16]> {
    u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: LeaseId = [0xa5; 16];
    const SIDES: [Side; 2] = [Side::Source, Side::Destination];

    fn apply(bytes: &mut [u8], change: &Change) {
        bytes[change.offset..change.offset + RECORD_BYTES].copy_from_slice(&change.record);
    }

    /// A lease that was written `writes` times, with `session` begun last and given to `owner`.
    fn lease(writes: usize, session: SessionId, owner: Option<Side>) -> [u8; LEASE_BYTES] {
        let mut bytes = Register::create(ID, [0; 16]);
        for n in 0..writes {
            let last = n + 1 == writes;
            let (session, owner) =
                if last { (session, owner) } else { ([n as u8; 16], SIDES.get(n % 3).copied()) };
            let change = Register::read(&bytes).unwrap().change(session, owner).unwrap();
            apply(&mut bytes, &change);
        }
        bytes
    }

    #[test]
    fn a_lease_is_as_it_is_documented() {
        let bytes = lease(2, [0x1f; 16], Some(Side::Source));
        let text = std::str::from_utf8(&bytes).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "mig-lease 1");
        assert_eq!(lines[1], format!("id {}", "a5".repeat(16)));
        assert!(
            lines[3].starts_with(&format!(
                "record 0000000000000003 session {} owner source      sum ",
                "1f".repeat(16)
            )),
            "{text}"
        );
        assert_eq!((lines.len(), text.ends_with('\n')), (4, true));
    }

    #[test]
    fn what_is_written_is_read_back() {
        for writes in 1..9 {
            for owner in [None, Some(Side::Source), Some(Side::Destination)] {
                let read = Register::read(&lease(writes, [9; 16], owner)).unwrap();
                assert_eq!((read.id, read.session, read.owner), (ID, [9; 16], owner));
            }
        }
    }

    #[test]
    fn a_write_that_stops_at_any_byte_leaves_what_was_or_what_is_to_be() {
        for writes in 1..5 {
            for before in [None, Some(Side::Source), Some(Side::Destination)] {
                for after in [None, Some(Side::Source), Some(Side::Destination)] {
                    let old = lease(writes, [1; 16], before);
                    let was = Register::read(&old).unwrap();
                    let change = was.change([2; 16], after).unwrap();
                    let mut new = old;
                    apply(&mut new, &change);
                    let is = Register::read(&new).unwrap();
                    for cut in 0..=RECORD_BYTES {
                        let end = change.offset + RECORD_BYTES;
                        let middle = change.offset + cut;
                        let mut forward = old;
                        forward[change.offset..middle].copy_from_slice(&new[change.offset..middle]);
                        let mut backward = old;
                        backward[middle..end].copy_from_slice(&new[middle..end]);
                        for torn in [forward, backward] {
                            let found = Register::read(&torn).unwrap();
                            assert_eq!(found, if torn == new { is } else { was }, "cut at {cut}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_lease_that_is_cut_or_grown_is_refused() {
        let whole = lease(3, [1; 16], Some(Side::Destination));
        for length in 0..LEASE_BYTES {
            let wanted = if length < MAGIC.len() { Unreadable::NotALease } else { Unreadable::Damaged };
            assert_eq!(Register::read(&whole[..length]), Err(wanted), "{length}");
        }
        assert_eq!(Register::read(&[&whole[..], b"\n"].concat()), Err(Unreadable::Damaged));
    }

    #[test]
    fn two_records_of_one_number_decide_nothing() {
        let mut bytes = lease(2, [1; 16], Some(Side::Source));
        let other = lease(2, [1; 16], Some(Side::Destination));
        let (first, second) = (HEADER_BYTES..HEADER_BYTES + RECORD_BYTES, HEADER_BYTES + RECORD_BYTES..);
        bytes[first].copy_from_slice(&other[second]);
        assert_eq!(Register::read(&bytes), Err(Unreadable::Damaged));
    }

    proptest! {
        #[test]
        fn a_write_of_which_any_bytes_arrived_leaves_what_was_or_what_is_to_be(
            arrived in prop::collection::vec(any::<bool>(), RECORD_BYTES),
            writes in 1_usize..6, before in 0_usize..3, after in 0_usize..3,
        ) {
            let old = lease(writes, [1; 16], SIDES.get(before).copied());
            let was = Register::read(&old).unwrap();
            let change = was.change([1; 16], SIDES.get(after).copied()).unwrap();
            let mut new = old;
            apply(&mut new, &change);
            let mut torn = old;
            for (n, _) in arrived.iter().enumerate().filter(|(_, arrived)| **arrived) {
                torn[change.offset + n] = new[change.offset + n];
            }
            let is = Register::read(&new).unwrap();
            prop_assert_eq!(Register::read(&torn).unwrap(), if torn == new { is } else { was });
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2 * LEASE_BYTES)) {
            prop_assert_eq!(Register::read(&bytes), Err(Unreadable::NotALease));
            let _ = Register::read(&[MAGIC.as_bytes(), &bytes].concat());
        }

        #[test]
        fn a_byte_that_was_changed_never_gives_the_guest_to_the_other_side(
            offset in 0..LEASE_BYTES, value: u8, given in 0_usize..2,
        ) {
            // begun, given; so the record before says none
            let mut bytes = lease(2, [1; 16], None);
            let change = Register::read(&bytes).unwrap().change([1; 16], Some(SIDES[given])).unwrap();
            apply(&mut bytes, &change);
            bytes[offset] = value;
            if let Ok(read) = Register::read(&bytes) {
                prop_assert_ne!(read.owner, Some(SIDES[1 - given]));
            }
        }
    }
}
