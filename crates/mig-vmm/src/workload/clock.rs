//! The clock guest.

use super::asm::Code;
use super::image::Machine;
use super::layout::SHARED;
use iced_x86::IcedError;

/// Ticks of the PIT, counted by its interrupt handler.
pub(super) const PIT_TICKS: u64 = SHARED + 8;

pub(super) fn program(_: &Machine) -> Result<Code, IcedError> {
    super::idle::program()
}
