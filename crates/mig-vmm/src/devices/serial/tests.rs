//! The port against a simpler one: a queue, registers that hold what is written, and two reasons to interrupt.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// What happens to a port.
#[derive(Debug, Clone)]
enum Step {
    Write(u8, u8),
    Read(u8),
    Type(Vec<u8>),
    Move,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Mostly what drivers do: read data and status, allow and forbid interrupts.
    let value = prop_oneof![Just(0), Just(1), Just(2), Just(3), Just(0x10), Just(0x83), any::<u8>()];
    let register = prop_oneof![Just(0u8), Just(1), 0..8u8];
    let step = prop_oneof![
        4 => (register, value).prop_map(|(register, value)| Step::Write(register, value)),
        8 => prop_oneof![Just(0u8), Just(0), Just(2), Just(5), 0..8u8].prop_map(Step::Read),
        2 => prop::collection::vec(any::<u8>(), 0..100).prop_map(Step::Type),
        1 => prop::collection::vec(any::<u8>(), 2000..3000).prop_map(Step::Type),
        2 => Just(Step::Move),
    ];
    prop::collection::vec(step, 0..200)
}

/// The simpler port.
#[derive(Default)]
struct Model {
    registers: [u8; 8],
    divisor: [u8; 2],
    /// With whether it was sent in loopback, since the port last moved.
    waiting: VecDeque<(u8, bool)>,
    told_empty: bool,
}

impl Model {
    fn loopback(&self) -> bool {
        self.registers[4] & 0x10 != 0
    }

    fn received(&self) -> bool {
        self.registers[1] & 1 != 0 && !self.waiting.is_empty()
    }

    fn empty(&self) -> bool {
        self.registers[1] & 2 != 0 && !self.told_empty
    }

    fn write(&mut self, register: u8, value: u8) -> Option<u8> {
        let latch = self.registers[3] & 0x80 != 0;
        match (register, latch) {
            (0 | 1, true) => self.divisor[usize::from(register)] = value,
            (0, false) => {
                self.told_empty = false;
                match self.loopback() {
                    false => return Some(value),
                    true if self.waiting.len() < RECEIVE_BYTES => self.waiting.push_back((value, true)),
                    true => {}
                }
            }
            (1, false) => {
                self.told_empty &= self.registers[1] & 2 != 0;
                self.registers[1] = value & 0x0f;
            }
            (4, _) => {
                self.registers[4] = value & 0x1f;
                let loopback = self.loopback();
                self.waiting.retain(|(_, looped)| loopback || !looped);
            }
            (register, _) => self.registers[usize::from(register)] = value,
        }
        None
    }

    fn read(&mut self, register: u8) -> u8 {
        let latch = self.registers[3] & 0x80 != 0;
        match (register, latch) {
            (0 | 1, true) => self.divisor[usize::from(register)],
            (0, false) => self.waiting.pop_front().map_or(0, |(byte, _)| byte),
            (2, _) if self.received() => 0xc4,
            (2, _) if self.empty() => {
                self.told_empty = true;
                0xc2
            }
            (2, _) => 0xc1,
            (5, _) => 0x60 | u8::from(!self.waiting.is_empty()),
            (6, _) if self.loopback() => {
                let out = |bit: u8| self.registers[4] >> bit & 1;
                out(1) << 4 | out(0) << 5 | out(2) << 6 | out(3) << 7
            }
            (6, _) => 0xb0,
            (register, _) => self.registers[usize::from(register)],
        }
    }
}

/// Through its saved state into a new port.
fn moved(uart: &Uart) -> Uart {
    Uart::try_from(SerialState::from(uart)).unwrap()
}

proptest! {
    #[test]
    fn a_port_is_a_queue_with_registers_wherever_it_moves(steps in steps()) {
        let mut uart = Uart::default();
        let mut model = Model { registers: [0, 0, 0, 3, 8, 0, 0, 0], divisor: [12, 0], ..Model::default() };
        // Whether the guest was interrupted since there was last no reason for it.
        let mut interrupted = false;
        for step in steps {
            let before = (model.received(), model.empty());
            match step {
                Step::Write(register, value) => {
                    prop_assert_eq!(uart.write(register, value), model.write(register, value));
                }
                Step::Read(register) => prop_assert_eq!(uart.read(register), model.read(register)),
                Step::Type(bytes) => {
                    let room = if model.loopback() { 0 } else { RECEIVE_BYTES - model.waiting.len() };
                    prop_assert_eq!(uart.room(), room);
                    let bytes = &bytes[..bytes.len().min(room)];
                    uart.receive(bytes);
                    model.waiting.extend(bytes.iter().map(|byte| (*byte, false)));
                }
                Step::Move => {
                    let there = moved(&uart);
                    // A cause that is not allowed to interrupt is none: allowing it makes it one.
                    prop_assert_eq!(SerialState::from(&there), SerialState::from(&uart));
                    uart = there;
                    model.waiting.iter_mut().for_each(|(_, looped)| *looped = false);
                }
            }
            let edge = uart.take_edge();
            let reasons = (model.received(), model.empty());
            prop_assert_eq!(uart.causes() != 1, reasons.0 || reasons.1);
            prop_assert!(!edge || reasons.0 || reasons.1, "interrupted for no reason");
            prop_assert!(edge || before.0 || !reasons.0, "not interrupted for what was received");
            prop_assert!(edge || before.1 || !reasons.1, "not interrupted by an empty transmitter");
            interrupted = (interrupted || edge) && (reasons.0 || reasons.1);
            prop_assert_eq!(interrupted, reasons.0 || reasons.1);
        }
    }

    #[test]
    fn a_driver_that_takes_few_bytes_an_interrupt_gets_them_all(
        lengths in prop::collection::vec(1..600usize, 1..6),
        at_a_time in prop_oneof![Just(1usize), Just(64), Just(256)],
    ) {
        let mut uart = Uart::default();
        uart.write(1, 1);
        let (mut typed, mut read) = (Vec::new(), Vec::new());
        for length in lengths {
            let bytes: Vec<u8> = (0..length).map(|n| (typed.len() + n) as u8).collect();
            uart.receive(&bytes);
            typed.extend(bytes);
            // An interrupt that comes while one is served is served after it.
            while uart.take_edge() {
                uart = moved(&uart);
                for _ in 0..at_a_time {
                    if uart.read(5) & 1 != 0 {
                        read.push(uart.read(0));
                    }
                }
            }
        }
        prop_assert_eq!(read, typed);
    }
}

/// As Linux up to 5.6 finds out how large the FIFO is (`size_fifo` in 8250_port.c).
#[test]
fn what_a_driver_sends_itself_in_a_test_is_not_taken_for_something_typed() {
    let mut uart = Uart::default();
    uart.receive(b"ls");
    uart.write(4, 0x10);
    (0..=255).for_each(|byte| assert_eq!(uart.write(0, byte), None));
    let read: Vec<u8> = (0..256).map(|_| uart.read(0)).collect();
    assert_eq!((&read[..2], &read[2..5]), (&b"ls"[..], &[0, 1, 2][..]));
    uart.write(4, 0x0b);
    assert_eq!(uart.read(5) & 1, 0, "nothing waits");
    uart.receive(b"pwd");
    assert_eq!([uart.read(0), uart.read(0), uart.read(0)], *b"pwd");
}

#[test]
fn a_state_with_more_input_than_fits_is_refused() {
    let mut state = SerialState::from(&Uart::default());
    state.received = vec![b'x'; RECEIVE_BYTES];
    assert_eq!(Uart::try_from(state.clone()).unwrap().room(), 0);
    state.received.push(b'y');
    assert!(Uart::try_from(state).unwrap_err().contains("4097"));
}
