//! The keyboard controller, as far as it resets a PC: command 0xfe pulses the reset line, command 0xd1 writes
//! the output port, whose bit 0 is that line. There is no keyboard: everything reads 0.

use serde::{Deserialize, Serialize};

pub(crate) const DATA_PORT: u16 = 0x60;
pub(crate) const COMMAND_PORT: u16 = 0x64;

const WRITE_OUTPUT_PORT: u8 = 0xd1;
const PULSE_RESET: u8 = 0xfe;

/// The controller, which is also its saved state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct I8042 {
    /// The next data byte goes to the output port.
    output_port_follows: bool,
}

/// Whether a write reset the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Written {
    Nothing,
    Reset,
}

impl I8042 {
    pub(crate) fn write(&mut self, port: u16, value: u8) -> Written {
        let follows = std::mem::take(&mut self.output_port_follows);
        match (port, value) {
            (COMMAND_PORT, PULSE_RESET) => return Written::Reset,
            (COMMAND_PORT, WRITE_OUTPUT_PORT) => self.output_port_follows = true,
            (DATA_PORT, line) if follows && line & 1 == 0 => return Written::Reset,
            _ => {}
        }
        Written::Nothing
    }

    pub(crate) fn read(&self) -> u8 {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_pull_the_reset_line_reset() {
        let mut controller = I8042::default();
        assert_eq!(controller.write(COMMAND_PORT, 0xfe), Written::Reset);
        assert_eq!(controller.write(DATA_PORT, 0), Written::Nothing);
        assert_eq!(controller.write(COMMAND_PORT, 0xd1), Written::Nothing);
        assert_eq!(controller.write(DATA_PORT, 0xdf), Written::Nothing);
        assert_eq!(controller.write(COMMAND_PORT, 0xd1), Written::Nothing);
        assert_eq!(controller.write(DATA_PORT, 0xde), Written::Reset);
    }
}
