//! A 16550's registers, with a deeper receive FIFO; no host in it.
//!
//! Not vm-superio's: there, reading a byte takes the received-data interrupt back although more bytes wait,
//! and so does reading the interrupt's cause. Linux's driver stops after 256 bytes at a time
//! (`serial8250_rx_chars`) and trusts that cause: a line that is pasted into went silent.
//!
//! Invariants: the interrupt's causes follow from the registers, as on the line of a real UART; `edge` is set
//! when the host has to raise that line anew, which is more often than its level rises: ISA interrupts are
//! edges, and a driver that takes a byte an interrupt must get one for each. One too many costs a look in
//! vain. What was received is taken away by reading it, and by nothing else: a FIFO reset is ignored, so
//! that what was typed ahead outlives a driver that begins, but for what the driver reads and throws away
//! itself (Linux's three bytes or so, `autoconfig` and `serial8250_do_startup`). What was sent to itself in
//! loopback is not input: it is gone when loopback ends.

use std::collections::VecDeque;

/// The most that waits to be read: a paste, or a script at the speed of a pipe.
pub(crate) const RECEIVE_BYTES: usize = 4096;

const IER_RECEIVED: u8 = 0x01;
const IER_EMPTY: u8 = 0x02;
/// What a 16550 has.
const IER_BITS: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
pub(crate) const IIR_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
/// FIFOs are there and on: a 16550A.
const IIR_FIFOS: u8 = 0xc0;
const LCR_DIVISOR: u8 = 0x80;
const MCR_BITS: u8 = 0x1f;
const MCR_LOOP: u8 = 0x10;
const LSR_RECEIVED: u8 = 0x01;
/// Holding register and transmitter are empty: bytes are sent at once.
const LSR_EMPTY: u8 = 0x60;
/// Clear to send, data set ready, carrier.
const MSR_CONNECTED: u8 = 0xb0;

/// The port's registers and what it received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uart {
    pub(crate) divisor: [u8; 2],
    pub(crate) interrupt_enable: u8,
    pub(crate) line_control: u8,
    pub(crate) modem_control: u8,
    pub(crate) modem_status: u8,
    pub(crate) scratch: u8,
    /// The transmitter ran empty, and nobody has been told.
    pub(crate) empty_pending: bool,
    pub(crate) received: VecDeque<u8>,
    /// How many of those at most, the last ones, were sent in loopback. Not part of the saved state: a guest
    /// that moves in the middle of a test of its UART may find more than it expects.
    pub(crate) looped: usize,
    /// The interrupt line is to be raised, again.
    pub(crate) edge: bool,
}

impl Default for Uart {
    fn default() -> Self {
        Self {
            divisor: [12, 0], // 9600 baud
            interrupt_enable: 0,
            line_control: 0x03,  // 8 bits
            modem_control: 0x08, // interrupts reach the bus
            modem_status: MSR_CONNECTED,
            scratch: 0,
            empty_pending: false,
            received: VecDeque::new(),
            looped: 0,
            edge: false,
        }
    }
}

impl Uart {
    /// Writes register `offset` of 8; answers the byte that goes out on the line, if one does.
    pub(crate) fn write(&mut self, offset: u8, value: u8) -> Option<u8> {
        match offset {
            0 | 1 if self.line_control & LCR_DIVISOR != 0 => self.divisor[usize::from(offset)] = value,
            0 => {
                self.transmitted();
                if self.modem_control & MCR_LOOP == 0 {
                    return Some(value);
                }
                if self.received.len() < RECEIVE_BYTES {
                    self.received.push_back(value);
                    self.looped += 1;
                    self.arrived();
                }
            }
            1 => {
                let enabled = value & IER_BITS & !self.interrupt_enable;
                self.interrupt_enable = value & IER_BITS;
                // As QEMU's serial_ioport_write says: allowing this interrupt asks for it, since the transmitter
                // is empty. Linux tests for it (serial8250_THRE_test).
                if enabled & IER_EMPTY != 0 {
                    self.empty_pending = true;
                } else if self.interrupt_enable & IER_EMPTY == 0 {
                    self.empty_pending = false;
                }
                let received = enabled & IER_RECEIVED != 0 && !self.received.is_empty();
                self.edge |= received || enabled & IER_EMPTY != 0;
            }
            3 => self.line_control = value,
            4 => {
                self.modem_control = value & MCR_BITS;
                if self.modem_control & MCR_LOOP == 0 {
                    let typed = self.received.len().saturating_sub(std::mem::take(&mut self.looped));
                    self.received.truncate(typed);
                }
            }
            7 => self.scratch = value,
            // FIFO control, and status registers that cannot be written.
            _ => {}
        }
        None
    }

    /// Reads register `offset` of 8.
    pub(crate) fn read(&mut self, offset: u8) -> u8 {
        match offset {
            0 | 1 if self.line_control & LCR_DIVISOR != 0 => self.divisor[usize::from(offset)],
            0 => {
                let byte = self.received.pop_front().unwrap_or(0);
                self.looped = self.looped.min(self.received.len());
                self.edge |= self.cause() != IIR_NONE;
                byte
            }
            1 => self.interrupt_enable,
            2 => {
                let cause = self.cause();
                if cause == IIR_EMPTY {
                    self.empty_pending = false;
                }
                cause | IIR_FIFOS
            }
            3 => self.line_control,
            4 => self.modem_control,
            5 => self.line_status(),
            6 if self.modem_control & MCR_LOOP != 0 => {
                // The outputs are the inputs: RTS is CTS, DTR DSR, OUT1 RI, OUT2 DCD.
                let out = self.modem_control;
                (self.modem_status & 0x0f) | (out & 0x02) << 3 | (out & 0x01) << 5 | (out & 0x0c) << 4
            }
            6 => self.modem_status,
            7 => self.scratch,
            _ => 0xff,
        }
    }

    /// How many bytes can be received: none in loopback, where the line is cut off.
    pub(crate) fn room(&self) -> usize {
        match self.modem_control & MCR_LOOP {
            0 => RECEIVE_BYTES.saturating_sub(self.received.len()),
            _ => 0,
        }
    }

    /// Bytes come in on the line; those that there is no room for are lost.
    pub(crate) fn receive(&mut self, bytes: &[u8]) {
        let count = bytes.len().min(self.room());
        if count > 0 {
            self.received.extend(&bytes[..count]);
            self.arrived();
        }
    }

    /// Whether the interrupt line is to be raised, again; asked once after each of the above.
    pub(crate) fn take_edge(&mut self) -> bool {
        std::mem::take(&mut self.edge)
    }

    pub(crate) fn line_status(&self) -> u8 {
        LSR_EMPTY | if self.received.is_empty() { 0 } else { LSR_RECEIVED }
    }

    /// Every cause of an interrupt that there is, a bit each, or [`IIR_NONE`].
    pub(crate) fn causes(&self) -> u8 {
        let received = self.interrupt_enable & IER_RECEIVED != 0 && !self.received.is_empty();
        let empty = self.interrupt_enable & IER_EMPTY != 0 && self.empty_pending;
        match (received, empty) {
            (false, false) => IIR_NONE,
            (received, empty) => (u8::from(received) * IIR_RECEIVED) | (u8::from(empty) * IIR_EMPTY),
        }
    }

    /// The most urgent of them, as the identification register has it.
    fn cause(&self) -> u8 {
        match self.causes() {
            causes if causes & IIR_RECEIVED != 0 => IIR_RECEIVED,
            causes => causes,
        }
    }

    fn transmitted(&mut self) {
        if self.interrupt_enable & IER_EMPTY != 0 && !self.empty_pending {
            self.empty_pending = true;
            self.edge = true;
        }
    }

    fn arrived(&mut self) {
        self.edge |= self.interrupt_enable & IER_RECEIVED != 0;
    }
}
