//! COM1: a 16550 on IRQ 4, its output to the console.

use std::io;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use super::uart::{IIR_EMPTY, RECEIVE_BYTES, Uart};
use crate::console::Console;

pub(crate) const FIRST_PORT: u16 = 0x3f8;
pub(crate) const LAST_PORT: u16 = 0x3ff;
const IRQ: u32 = 4;

/// The port.
pub(crate) struct Com1 {
    uart: Uart,
    vm: Arc<VmFd>,
    console: Console,
}

/// What moves with the guest: every register, and received bytes that the guest has not read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    received: Vec<u8>,
}

impl Com1 {
    pub(crate) fn new(vm: Arc<VmFd>, console: Console) -> Self {
        Self { uart: Uart::default(), vm, console }
    }

    pub(crate) fn write(&mut self, port: u16, value: u8) {
        if let Some(byte) = self.uart.write(register(port), value) {
            self.console.print(byte);
        }
        self.interrupt();
    }

    pub(crate) fn read(&mut self, port: u16) -> u8 {
        let value = self.uart.read(register(port));
        self.interrupt();
        value
    }

    pub(crate) fn has_room(&self) -> bool {
        self.uart.room() > 0
    }

    /// Has `take` fetch as many bytes as there is room for at most, and queues them for the guest: how many
    /// there were. `take` is not called when there is no room, which is `None`.
    ///
    /// # Errors
    /// What `take` met with.
    pub(crate) fn feed(
        &mut self,
        take: impl FnOnce(usize) -> io::Result<Vec<u8>>,
    ) -> io::Result<Option<usize>> {
        let room = self.uart.room();
        if room == 0 {
            return Ok(None);
        }
        let bytes = take(room)?;
        debug_assert!(bytes.len() <= room, "a source of input takes no more than it is told");
        self.uart.receive(&bytes);
        self.interrupt();
        Ok(Some(bytes.len()))
    }

    pub(crate) fn save(&self) -> SerialState {
        SerialState::from(&self.uart)
    }

    /// Raises no interrupt: the interrupt controllers know what is pending.
    ///
    /// # Errors
    /// What is wrong with the state.
    pub(crate) fn restore(&mut self, state: SerialState) -> Result<(), String> {
        self.uart = Uart::try_from(state)?;
        Ok(())
    }

    /// Raises the line for an instant if it is to be: ISA interrupts are edges. One that cannot be raised is
    /// lost, as on a loose cable.
    fn interrupt(&mut self) {
        if self.uart.take_edge() {
            let raised = self.vm.set_irq_line(IRQ, true).and_then(|()| self.vm.set_irq_line(IRQ, false));
            if let Err(e) = raised {
                tracing::debug!("COM1: {e}");
            }
        }
    }
}

impl From<&Uart> for SerialState {
    fn from(uart: &Uart) -> Self {
        Self {
            baud_divisor_low: uart.divisor[0],
            baud_divisor_high: uart.divisor[1],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.causes(),
            line_control: uart.line_control,
            line_status: uart.line_status(),
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.received.iter().copied().collect(),
        }
    }
}

impl TryFrom<SerialState> for Uart {
    type Error = String;

    fn try_from(state: SerialState) -> Result<Self, String> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status: _,
            modem_control,
            modem_status,
            scratch,
            received,
        } = state;
        if received.len() > RECEIVE_BYTES {
            return Err(format!("{} bytes wait to be read, {RECEIVE_BYTES} can", received.len()));
        }
        Ok(Self {
            divisor: [baud_divisor_low, baud_divisor_high],
            interrupt_enable,
            line_control,
            modem_control,
            modem_status,
            scratch,
            empty_pending: interrupt_identification & IIR_EMPTY != 0,
            received: received.into(),
            looped: 0,
            edge: false,
        })
    }
}

fn register(port: u16) -> u8 {
    (port - FIRST_PORT) as u8
}

#[cfg(test)]
mod tests;
