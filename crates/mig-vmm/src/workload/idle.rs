//! The idle guest: vCPU 0 halts between timer ticks, the others for ever.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::{Code, Program, Tick};
use super::layout::CODE;

pub(super) fn program() -> Result<Code, IcedError> {
    let mut p = Program::new("idle", Tick::Periodic)?;
    let mut halt = p.a.create_label();
    p.a.test(edi, edi)?;
    p.a.jne(halt)?;
    p.start_periodic_timer()?;
    p.a.set_label(&mut halt)?;
    p.a.sti()?;
    p.a.hlt()?;
    p.a.jmp(halt)?;
    p.assemble(CODE)
}
