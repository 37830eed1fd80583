//! The CMOS: a clock that shows the host's time in UTC, and battery-backed bytes that say how much memory
//! there is.
//!
//! Time is never state: after a move the clock shows the new host's time. What moves is the index register,
//! the status registers and the bytes.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::layout::{HIGH_START, HOLE_START};

pub(crate) const INDEX_PORT: u16 = 0x70;
pub(crate) const DATA_PORT: u16 = 0x71;

const BYTES: usize = 128;
const STATUS_A: usize = 0x0a;
const STATUS_B: usize = 0x0b;
const STATUS_D: usize = 0x0d;
const CENTURY: usize = 0x32;
/// Status B: hours count to 24; values are binary instead of BCD.
const HOURS_24: u8 = 1 << 1;
const BINARY: u8 = 1 << 2;

/// The device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cmos {
    index: u8,
    bytes: [u8; BYTES],
}

/// What moves with the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CmosState {
    index: u8,
    bytes: Vec<u8>,
}

impl Cmos {
    pub(crate) fn new(memory_bytes: u64) -> Self {
        let mut bytes = [0; BYTES];
        // 32768 Hz, 1024 Hz periodic rate; battery good.
        (bytes[STATUS_A], bytes[STATUS_B], bytes[STATUS_D]) = (0x26, HOURS_24, 0x80);
        let low = memory_bytes.min(HOLE_START);
        let kib = |bytes: u64| u16::try_from(bytes >> 10).unwrap_or(u16::MAX);
        let blocks = u16::try_from(low.saturating_sub(16 << 20) >> 16).unwrap_or(u16::MAX);
        let mut word = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        // KiB of base memory; KiB above 1 MiB, twice; 64 KiB blocks above 16 MiB.
        word(0x15, 639);
        word(0x17, kib(low - HIGH_START));
        word(0x30, kib(low - HIGH_START));
        word(0x34, blocks);
        // 64 KiB blocks above 4 GiB, three bytes.
        let high = memory_bytes.saturating_sub(HOLE_START) >> 16;
        bytes[0x5b..0x5e].copy_from_slice(&high.to_le_bytes()[..3]);
        Self { index: 0, bytes }
    }

    pub(crate) fn write(&mut self, port: u16, value: u8) {
        match (port, usize::from(self.index)) {
            // The top bit masks NMIs.
            (INDEX_PORT, _) => self.index = value & 0x7f,
            // Time is the host's; C and D are read-only.
            (_, 0..=9 | 0x0c | STATUS_D | CENTURY) => {}
            // Bit 7 says that an update is under way, which it never is.
            (_, STATUS_A) => self.bytes[STATUS_A] = value & 0x7f,
            (_, index) => self.bytes[index] = value,
        }
    }

    pub(crate) fn read(&self, port: u16) -> u8 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        self.read_at(port, now)
    }

    fn read_at(&self, port: u16, unix_seconds: u64) -> u8 {
        // The index register is write-only.
        if port == INDEX_PORT {
            return 0xff;
        }
        let index = usize::from(self.index);
        let time = Utc::from_unix(unix_seconds);
        match index {
            0x00 => self.number(time.second),
            0x02 => self.number(time.minute),
            0x04 if self.bytes[STATUS_B] & HOURS_24 == 0 => {
                let afternoon = if time.hour >= 12 { 0x80 } else { 0 };
                self.number((time.hour + 11) % 12 + 1) | afternoon
            }
            0x04 => self.number(time.hour),
            0x06 => time.weekday,
            0x07 => self.number(time.day),
            0x08 => self.number(time.month),
            0x09 => self.number((time.year % 100) as u8),
            CENTURY => self.number((time.year / 100) as u8),
            _ => self.bytes[index],
        }
    }

    fn number(&self, value: u8) -> u8 {
        if self.bytes[STATUS_B] & BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    pub(crate) fn save(&self) -> CmosState {
        CmosState { index: self.index, bytes: self.bytes.to_vec() }
    }

    /// `None` when the state is not of a CMOS.
    pub(crate) fn from_state(state: &CmosState) -> Option<Self> {
        let bytes = state.bytes.as_slice().try_into().ok()?;
        (usize::from(state.index) < BYTES).then_some(Self { index: state.index, bytes })
    }
}

/// A date and time of day.
struct Utc {
    year: u64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

impl Utc {
    /// Howard Hinnant's `civil_from_days`, for days that are not before 1970.
    fn from_unix(seconds: u64) -> Self {
        let (days, of_day) = (seconds / 86_400, seconds % 86_400);
        let shifted = days + 719_468;
        let (era, of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted_month = (5 * of_year + 2) / 153;
        let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
        Self {
            year: year_of_era + era * 400 + u64::from(month <= 2),
            month: month as u8,
            day: (of_year - (153 * shifted_month + 2) / 5 + 1) as u8,
            hour: (of_day / 3600) as u8,
            minute: (of_day / 60 % 60) as u8,
            second: (of_day % 60) as u8,
            weekday: ((days + 4) % 7 + 1) as u8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(cmos: &mut Cmos, unix_seconds: u64) -> Vec<u8> {
        [CENTURY, 9, 8, 7, 6, 4, 2, 0]
            .map(|index| {
                cmos.write(INDEX_PORT, index as u8);
                cmos.read_at(DATA_PORT, unix_seconds)
            })
            .to_vec()
    }

    #[test]
    fn the_clock_shows_dates_in_bcd_and_in_binary() {
        let mut cmos = Cmos::new(32 << 20);
        // 2000-02-29 was a Tuesday.
        assert_eq!(clock(&mut cmos, 951_865_445), [0x20, 0x00, 0x02, 0x29, 3, 0x23, 0x04, 0x05]);
        assert_eq!(clock(&mut cmos, 0), [0x19, 0x70, 0x01, 0x01, 5, 0, 0, 0]);
        cmos.write(INDEX_PORT, 0x0b);
        cmos.write(DATA_PORT, BINARY);
        assert_eq!(clock(&mut cmos, 951_865_445), [20, 0, 2, 29, 3, 11 | 0x80, 4, 5]);
    }

    #[test]
    fn the_memory_registers_say_how_much_there_is() {
        let mut cmos = Cmos::new(5 << 30);
        let mut at = |index: u8| {
            cmos.write(INDEX_PORT, index);
            u32::from(cmos.read(DATA_PORT))
        };
        assert_eq!(at(0x34) | at(0x35) << 8, ((3u32 << 30) - (16 << 20)) >> 16);
        assert_eq!(at(0x5b) | at(0x5c) << 8 | at(0x5d) << 16, (2u32 << 30) >> 16);
    }

    #[test]
    fn index_and_bytes_come_back() {
        let mut cmos = Cmos::new(32 << 20);
        for (port, value) in [(INDEX_PORT, 0x40), (DATA_PORT, 0xa5), (INDEX_PORT, 0x40)] {
            cmos.write(port, value);
        }
        let restored = Cmos::from_state(&cmos.save()).unwrap();
        assert_eq!((restored.read(DATA_PORT), &restored), (0xa5, &cmos));
        assert_eq!(Cmos::from_state(&CmosState { index: 200, bytes: vec![0; BYTES] }), None);
        assert_eq!(Cmos::from_state(&CmosState { index: 0, bytes: vec![0; 3] }), None);
    }
}
