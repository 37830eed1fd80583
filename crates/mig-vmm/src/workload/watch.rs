//! Timers that must not stop: vCPU 0 watches the ticks of the other vCPUs' APIC timers and of the PIT, whose
//! interrupt comes through the IOAPIC, by its own ticks; and its own by the PIT's.
//!
//! Counted in ticks and not in time, because a guest's time may leap while it is moved.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::{PIT_VECTOR, Program};
use super::image::Machine;
use super::layout::{SHARED, area, control};
use super::{HEARTBEAT_INTERVAL_US, exit_code};

/// Ticks of the PIT, counted by its interrupt handler.
pub(super) const PIT_TICKS: u64 = SHARED + 8;

/// Without a tick of the watched timer in this long, by the watching timer, it has stopped. A host that starves
/// one vCPU for so long and not the other is not meant to exist.
const PATIENCE_MS: u32 = 3000;
const PATIENCE_TICKS: u32 = PATIENCE_MS * 1000 / HEARTBEAT_INTERVAL_US;
const PIT_HZ: u32 = 100;
const PIT_INPUT_HZ: u32 = 1_193_182;
const PATIENCE_PIT_TICKS: u32 = PATIENCE_MS * PIT_HZ / 1000;

/// A list of watches in vCPU 0's control page, up to one for each vCPU: the counter's address, its last value,
/// own ticks at the last change.
const WATCHES: u64 = control::OWN + 0x100;
const WATCH_BYTES: u64 = 24;
const LAST: u64 = 8;
const CHANGED_AT: u64 = 16;
/// Of vCPU 0's own ticks: the last value, the PIT's ticks at the last change.
const OWN_LAST: u64 = control::OWN + 0xf0;
const OWN_CHANGED_AT: u64 = control::OWN + 0xf8;

pub(super) const IOAPIC_SELECT: u64 = 0xfec0_0000;
pub(super) const IOAPIC_WINDOW: u64 = IOAPIC_SELECT + 0x10;
/// The register of pin 0's redirection entry; each pin has two.
pub(super) const IOAPIC_PIN_0: u32 = 0x10;

/// Starts the PIT's channel 0; for vCPU 0. Changes RAX and RDX.
pub(super) fn start_pit(p: &mut Program) -> Result<(), IcedError> {
    // A PC has it on pin 2, KVM's default routing on pin 0: whichever it is.
    for pin in [0, 2] {
        write_ioapic(p, IOAPIC_PIN_0 + 2 * pin + 1, 0)?;
        write_ioapic(p, IOAPIC_PIN_0 + 2 * pin, PIT_VECTOR.into())?;
    }
    let divisor = PIT_INPUT_HZ / PIT_HZ;
    p.out(0x43, 0x34)?; // channel 0, both bytes, mode 2
    p.out(0x40, divisor as u8)?;
    p.out(0x40, (divisor >> 8) as u8)
}

/// Changes RAX and RDX.
pub(super) fn write_ioapic(p: &mut Program, register: u32, value: u32) -> Result<(), IcedError> {
    p.a.mov(edx, IOAPIC_SELECT as u32)?;
    p.a.mov(dword_ptr(rdx), register as i32)?;
    p.a.mov(eax, value)?;
    p.a.mov(dword_ptr(rdx + (IOAPIC_WINDOW - IOAPIC_SELECT)), eax)
}

/// Lists what is to be watched.
pub(super) fn list(machine: &Machine, areas: &mut [u8]) {
    for (watch, counter) in watched(machine.vcpus).enumerate() {
        let at = (WATCHES + watch as u64 * WATCH_BYTES) as usize;
        areas[at..at + 8].copy_from_slice(&counter.to_le_bytes());
    }
}

fn watched(vcpus: u8) -> impl Iterator<Item = u64> {
    std::iter::once(PIT_TICKS).chain((1..vcpus).map(|vcpu| area(vcpu) + control::TICKS))
}

/// Looks at all once; for vCPU 0, RBP its control page. Changes RAX, RCX, RDX, RSI and R8 to R11.
pub(super) fn look(p: &mut Program, machine: &Machine) -> Result<(), IcedError> {
    let (mut next, mut same, mut going) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
    p.a.mov(r10, qword_ptr(rbp + control::TICKS))?;
    p.a.lea(rsi, qword_ptr(rbp + WATCHES))?;
    p.a.mov(r11d, watched(machine.vcpus).count() as u32)?;
    p.a.set_label(&mut next)?;
    p.a.mov(rax, qword_ptr(rsi))?;
    p.a.mov(r9, qword_ptr(rax))?;
    p.a.mov(r8, qword_ptr(rsi + LAST))?;
    p.a.cmp(r9, r8)?;
    p.a.je(same)?;
    let mut forward = p.a.create_label();
    p.a.ja(forward)?;
    p.fail(exit_code::TICKS_STALLED, "timer ticks went backwards, of the PIT or another vCPU")?;
    p.a.set_label(&mut forward)?;
    p.a.mov(qword_ptr(rsi + LAST), r9)?;
    p.a.mov(qword_ptr(rsi + CHANGED_AT), r10)?;
    p.a.jmp(going)?;
    p.a.set_label(&mut same)?;
    p.a.mov(rcx, r10)?;
    p.a.sub(rcx, qword_ptr(rsi + CHANGED_AT))?;
    p.a.cmp(rcx, PATIENCE_TICKS as i32)?;
    p.a.jbe(going)?;
    p.a.inc(r8)?;
    p.fail(exit_code::TICKS_STALLED, "ticks stopped, of the PIT or another vCPU's APIC timer, after some")?;
    p.a.set_label(&mut going)?;
    p.a.add(rsi, WATCH_BYTES as i32)?;
    p.a.dec(r11d)?;
    p.a.jne(next)?;

    let (mut changed, mut done) = (p.a.create_label(), p.a.create_label());
    p.a.mov(rcx, qword_ptr(PIT_TICKS))?;
    p.a.mov(r8, qword_ptr(rbp + OWN_LAST))?;
    p.a.cmp(r10, r8)?;
    p.a.jne(changed)?;
    p.a.sub(rcx, qword_ptr(rbp + OWN_CHANGED_AT))?;
    p.a.cmp(rcx, PATIENCE_PIT_TICKS as i32)?;
    p.a.jbe(done)?;
    p.a.mov(r9, r8)?;
    p.a.inc(r8)?;
    p.fail(exit_code::TICKS_STALLED, "the vCPU's own APIC timer stopped, after some ticks")?;
    p.a.set_label(&mut changed)?;
    p.a.mov(qword_ptr(rbp + OWN_LAST), r10)?;
    p.a.mov(qword_ptr(rbp + OWN_CHANGED_AT), rcx)?;
    p.a.set_label(&mut done)?;
    p.a.nop()
}
