//! Each device's state moves; and a test notices where it does not.

use super::*;
use crate::bus::Bus;

/// A device's section, something that changes its state, and whether it shows.
struct Piece {
    section: &'static str,
    change: fn(&Bus),
    shows: fn(&Bus) -> bool,
}

fn get(bus: &Bus, port: u16) -> u8 {
    let mut data = [0];
    bus.input(port, 1, &mut data);
    data[0]
}

fn put(bus: &Bus, port: u16, value: u8) {
    assert_eq!(bus.out(port, 1, &[value]), None);
}

const PIECES: [Piece; 4] = [
    Piece {
        section: "vmm.serial",
        change: |bus| {
            // Divisor, format, interrupts, modem lines, scratch; and input that nobody has read.
            for (port, value) in [
                (0x3fb, 0x83),
                (0x3f8, 0x34),
                (0x3f9, 0x12),
                (0x3fb, 0x1b),
                (0x3f9, 0x05),
                (0x3fc, 0x0b),
                (0x3ff, 0xa5),
            ] {
                put(bus, port, value);
            }
            assert_eq!(lock(&bus.serial).feed(|_| Ok(b"xy".into())).unwrap(), Some(2));
        },
        shows: |bus| {
            let registers = [0x3fb, 0x3f9, 0x3fc, 0x3ff, 0x3fd, 0x3f8, 0x3f8].map(|port| get(bus, port));
            put(bus, 0x3fb, 0x80);
            let divisor = [0x3f8, 0x3f9].map(|port| get(bus, port));
            registers == [0x1b, 0x05, 0x0b, 0xa5, 0x61, b'x', b'y'] && divisor == [0x34, 0x12]
        },
    },
    Piece {
        section: "vmm.cmos",
        change: |bus| {
            [(0x70, 0x41), (0x71, 0x5a)].into_iter().for_each(|(port, value)| put(bus, port, value))
        },
        shows: |bus| get(bus, 0x71) == 0x5a,
    },
    Piece {
        section: "vmm.i8042",
        change: |bus| put(bus, 0x64, 0xd1),
        shows: |bus| bus.out(0x60, 1, &[0]) == Some(End::Reset),
    },
    Piece {
        section: "vmm.machine",
        change: |bus| (0..3).for_each(|_| put(bus, 0xe0, 1)),
        shows: |bus| bus.heartbeat.count() == 3 && bus.heartbeat.last_ns() != 0,
    },
];

#[test]
fn every_devices_state_moves_and_its_loss_shows() {
    if !kvm() {
        return;
    }
    let fresh = || machine_of(&[0xf4], Console::none());
    let mut blank = fresh();
    let blank = blank.save().unwrap();
    for Piece { section, change, shows } in PIECES {
        let changed = || {
            let machine = fresh();
            change(&machine.platform().bus);
            machine
        };
        let moved = hop(changed(), Console::none(), |_| ());
        assert!(shows(&moved.platform().bus), "{section} did not move");

        let lost = hop(changed(), Console::none(), |sections| {
            for ours in sections.iter_mut().filter(|s| s.name == section) {
                *ours = blank.iter().find(|s| s.name == section).unwrap().clone();
            }
        });
        assert!(!shows(&lost.platform().bus), "the test does not notice that {section} is lost");

        let missing = arrive(changed(), Console::none(), |sections| sections.retain(|s| s.name != section));
        let error = missing.err().expect("a missing section is an error").to_string();
        assert!(error.contains(section) && error.contains("missing"), "{error}");
    }
}

#[test]
fn what_no_device_answers_reads_as_ones() {
    if !kvm() {
        return;
    }
    let machine = machine_of(&[0xf4], Console::none());
    let bus = &machine.platform().bus;
    put(bus, 0xcf8, 0);
    assert_eq!([0xcf8, 0xcfc, 0x2f8, 0x92].map(|port| get(bus, port)), [0xff; 4]);
    let mut wide = [0; 4];
    bus.input(0xcfc, 4, &mut wide);
    assert_eq!(wide, [0xff; 4]);
}
