//! COM1: a 16550 on IRQ 4, its output to the console.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as Registers};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::errno;

use crate::console::Console;

pub(crate) const FIRST_PORT: u16 = 0x3f8;
pub(crate) const LAST_PORT: u16 = 0x3ff;
const IRQ: u32 = 4;

/// Raises the line for an instant: ISA interrupts are edges.
struct Line(Arc<VmFd>);

impl Trigger for Line {
    type E = errno::Error;

    fn trigger(&self) -> Result<(), errno::Error> {
        self.0.set_irq_line(IRQ, true)?;
        self.0.set_irq_line(IRQ, false)
    }
}

/// The port.
pub(crate) struct Com1 {
    uart: Serial<Line, NoEvents, Console>,
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
        Self { uart: Serial::new(Line(vm), console) }
    }

    /// Output that cannot be written and an interrupt that cannot be raised are lost, as on a loose cable.
    pub(crate) fn write(&mut self, port: u16, value: u8) {
        if let Err(e) = self.uart.write(register(port), value) {
            tracing::debug!("COM1: {e}");
        }
    }

    pub(crate) fn read(&mut self, port: u16) -> u8 {
        self.uart.read(register(port))
    }

    /// Queues input for the guest; returns how many bytes fit.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> usize {
        self.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    pub(crate) fn save(&self) -> SerialState {
        let Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer: received,
        } = self.uart.state();
        SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            received,
        }
    }

    /// Pulses IRQ 4 when an interrupt was pending: the interrupt controllers are to be restored after this.
    ///
    /// # Errors
    /// What is wrong with the state.
    pub(crate) fn restore(&mut self, vm: Arc<VmFd>, state: SerialState) -> Result<(), String> {
        let SerialState {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            received: in_buffer,
        } = state;
        let registers = Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable,
            interrupt_identification,
            line_control,
            line_status,
            modem_control,
            modem_status,
            scratch,
            in_buffer,
        };
        let console = std::mem::replace(self.uart.writer_mut(), Console::none());
        self.uart = Serial::from_state(&registers, Line(vm), NoEvents, console).map_err(|e| e.to_string())?;
        Ok(())
    }
}

fn register(port: u16) -> u8 {
    (port - FIRST_PORT) as u8
}
