//! The clock guest: time-stamp counters never go backwards, on one vCPU and from one to another, and timer
//! ticks neither go backwards nor stop. Ticks come from the APIC's TSC deadline where the processor has it,
//! which is restored by other means than the periodic timer of the other guests.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::{Code, LVT_DEADLINE, Program, TIMER_VECTOR, Tick, x2apic};
use super::image::Machine;
use super::layout::{AREA_BYTES, CODE, SHARED, control};
use super::{HEARTBEAT_INTERVAL_US, exit_code, watch};

/// The latest reading of any vCPU.
pub(super) const LAST_TSC: u64 = SHARED + 0x10;
/// Cycles from a tick to the next; the guest zeroes it where there is no deadline.
const CYCLES_PER_TICK: u64 = control::OWN;
/// Readings between two ticks.
const READINGS: u32 = 16;
/// CPUID leaf 1, ECX.
const CPUID_TSC_DEADLINE: i32 = 1 << 24;

pub(super) fn program(machine: &Machine, areas: &mut [u8]) -> Result<Code, IcedError> {
    let cycles = u64::from(machine.tsc_khz) * u64::from(HEARTBEAT_INTERVAL_US) / 1000;
    for area in areas.chunks_exact_mut(AREA_BYTES as usize) {
        area[CYCLES_PER_TICK as usize..][..8].copy_from_slice(&cycles.to_le_bytes());
    }
    watch::list(machine, areas);

    let mut p = Program::new("clock", Tick::Deadline { rearm: CYCLES_PER_TICK })?;
    let (mut periodic, mut started, mut read, mut other, mut halt) =
        (p.a.create_label(), p.a.create_label(), p.a.create_label(), p.a.create_label(), p.a.create_label());
    p.a.mov(eax, 1_u32)?;
    p.a.xor(ecx, ecx)?;
    p.a.cpuid()?;
    p.a.test(ecx, CPUID_TSC_DEADLINE)?;
    p.a.je(periodic)?;
    p.enable_x2apic()?;
    p.write_msr(x2apic::LVT_TIMER, (LVT_DEADLINE | u32::from(TIMER_VECTOR)).into())?;
    // SDM volume 3, 11.5.4.1: the mode is set before the deadline is.
    p.a.mfence()?;
    p.a.mov(rcx, qword_ptr(rbp + CYCLES_PER_TICK))?;
    p.arm_deadline()?;
    p.a.jmp(started)?;
    p.a.set_label(&mut periodic)?;
    p.a.mov(qword_ptr(rbp + CYCLES_PER_TICK), 0_i32)?;
    p.start_periodic_timer()?;
    p.a.set_label(&mut started)?;
    p.a.test(edi, edi)?;
    p.a.jne(other)?;
    watch::start_pit(&mut p)?;
    p.a.set_label(&mut other)?;
    p.a.xor(r12d, r12d)?;
    p.a.sti()?;

    let mut again = p.a.create_label();
    p.a.set_label(&mut again)?;
    p.a.mov(r13d, READINGS)?;
    p.a.set_label(&mut read)?;
    p.a.mov(r8, qword_ptr(LAST_TSC))?;
    p.a.lfence()?;
    p.a.rdtsc()?;
    p.a.shl(rdx, 32_u32)?;
    p.a.or(rax, rdx)?;
    p.a.mov(r9, rax)?;
    // Whatever vCPU it was: its reading was over before this one began.
    let (mut behind_other, mut behind_itself) = (p.a.create_label(), p.a.create_label());
    p.a.cmp(r9, r8)?;
    p.a.jb(behind_other)?;
    p.a.cmp(r9, r12)?;
    p.a.jb(behind_itself)?;
    p.a.mov(r12, r9)?;
    p.a.mov(qword_ptr(LAST_TSC), r9)?;
    p.a.dec(r13d)?;
    p.a.jne(read)?;
    p.a.test(edi, edi)?;
    p.a.jne(halt)?;
    watch::look(&mut p, machine)?;
    p.a.set_label(&mut halt)?;
    p.a.hlt()?;
    p.a.jmp(again)?;

    p.a.set_label(&mut behind_other)?;
    p.fail(exit_code::TIME_BACKWARDS, "the time-stamp counter is behind an earlier reading on any vCPU")?;
    p.a.set_label(&mut behind_itself)?;
    p.a.mov(r8, r12)?;
    p.fail(exit_code::TIME_BACKWARDS, "the time-stamp counter is behind the vCPU's own earlier reading")?;
    p.assemble(CODE)
}
