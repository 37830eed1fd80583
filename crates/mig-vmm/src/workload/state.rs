//! The state guest: known values, others on each vCPU, in every register and device that keeps one; checked
//! for ever.
//!
//! A round: load the general registers, halt for some ticks (so most pauses find them loaded), check them, then
//! everything else. What is expected lies in the vCPU's control page, found from RSP, which is at
//! the area's end whenever no handler runs.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::{Code, DIVIDE_BY_ONE, LVT_PERIODIC, Program, TIMER_COUNT, TIMER_VECTOR, Tick, x2apic};
use super::contents::split_mix;
use super::entry::{CR0, CR4, EFER};
use super::exit_code;
use super::image::{Machine, Piece};
use super::layout::{AREA_BYTES, CODE, PML4};
use super::watch::{self, IOAPIC_PIN_0, IOAPIC_SELECT, IOAPIC_WINDOW};

/// In the control page, after what [`watch`] keeps there: the FXSAVE image to be loaded, and as it was found.
const FX: u64 = 0x800;
const FX_FOUND: u64 = 0xa00;
/// The values of [`GENERAL`], then of [`values`].
const GENERAL_VALUES: u64 = 0xc00;
const VALUES: u64 = 0xd00;

/// Most of the time is spent halted: an interpreted round takes 300 microseconds.
const TICKS_PER_ROUND: u32 = 4;

/// The legacy and SSE parts of an FXSAVE image; what follows is reserved.
const FX_BYTES: usize = 416;
/// MXCSR_MASK in the image is the processor's, not ours.
const FX_MASK: usize = 28;

const GENERAL: [(&str, AsmRegister64); 15] = [
    ("RAX", rax),
    ("RBX", rbx),
    ("RCX", rcx),
    ("RDX", rdx),
    ("RSI", rsi),
    ("RDI", rdi),
    ("RBP", rbp),
    ("R8", r8),
    ("R9", r9),
    ("R10", r10),
    ("R11", r11),
    ("R12", r12),
    ("R13", r13),
    ("R14", r14),
    ("R15", r15),
];

/// What is read into RAX, set from it, and compared.
#[derive(Clone, Copy)]
enum Place {
    Control(AsmRegisterCr),
    Debug(AsmRegisterDr),
    Msr(u32),
}

/// Every register with a value of its own: what it is called, where it is, and its value on a vCPU.
fn values(vcpu: u64) -> Vec<(&'static str, Place, u64)> {
    use Place::{Control, Debug, Msr};
    // Addresses that are canonical in any paging mode.
    let high = |low: u64| 0xffff_8000_0000_0000 | vcpu << 32 | low;
    let flat = |low: u64| vcpu << 32 | low;
    let masked = |vector: u64| 1 << 16 | vector;
    vec![
        ("CR0, alignment mask set", Control(cr0), CR0 | 1 << 18),
        ("CR2", Control(cr2), flat(0x00c2_0000)),
        ("CR3, write-through set", Control(cr3), PML4 | 1 << 3),
        ("CR4, debugging extensions and global pages set", Control(cr4), CR4 | 1 << 3 | 1 << 7),
        ("CR8", Control(cr8), 2),
        ("DR0", Debug(dr0), flat(0x00d0_0000)),
        ("DR1", Debug(dr1), flat(0x00d1_0000)),
        ("DR2", Debug(dr2), flat(0x00d2_0000)),
        ("DR3", Debug(dr3), flat(0x00d3_0000)),
        // Fixed ones and all four breakpoints hit; kinds and lengths, but no breakpoint enabled.
        ("DR6", Debug(dr6), 0xffff_0ff0 | 0xf),
        ("DR7", Debug(dr7), 0xdddd_0400 | (vcpu & 1) << 9),
        ("MSR EFER, no-execute set", Msr(0xc000_0080), EFER | 1 << 11),
        ("MSR STAR", Msr(0xc000_0081), 0x0013_0008_0000_0000 | vcpu),
        ("MSR LSTAR", Msr(0xc000_0082), high(0x1000)),
        ("MSR CSTAR", Msr(0xc000_0083), high(0x2000)),
        ("MSR SFMASK", Msr(0xc000_0084), 0x0004_7700 | vcpu & 0xff),
        ("MSR FS_BASE", Msr(0xc000_0100), high(0x3000)),
        ("MSR GS_BASE", Msr(0xc000_0101), high(0x4000)),
        ("MSR KERNEL_GS_BASE", Msr(0xc000_0102), high(0x5000)),
        // 32 bits, like the processor's own registers on AMD.
        ("MSR SYSENTER_CS", Msr(0x174), 0x10 + vcpu * 8),
        ("MSR SYSENTER_ESP", Msr(0x175), vcpu << 16 | 0x6000),
        ("MSR SYSENTER_EIP", Msr(0x176), vcpu << 16 | 0x7000),
        // The upper four types, which no page here selects.
        ("MSR PAT", Msr(0x277), 0x0106_0405_0007_0406),
        // Not valid ranges: bit 11 of the mask is clear.
        ("MSR MTRR_PHYSBASE0", Msr(0x200), 0x4000_0006 | vcpu << 12),
        ("MSR MTRR_PHYSMASK0", Msr(0x201), 0xf_c000_0000),
        ("APIC timer entry", Msr(x2apic::LVT_TIMER), (LVT_PERIODIC | u32::from(TIMER_VECTOR)).into()),
        ("APIC timer divider", Msr(x2apic::DIVIDE), DIVIDE_BY_ONE.into()),
        ("APIC timer initial count", Msr(x2apic::INITIAL_COUNT), TIMER_COUNT.into()),
        ("APIC LINT0 entry", Msr(0x835), masked(0x91)),
        ("APIC LINT1 entry", Msr(0x836), masked(0x92)),
        ("APIC error entry", Msr(0x837), masked(0x93)),
    ]
}

/// The FXSAVE image of a vCPU: all x87 and SSE registers, rounding modes that nobody has by default.
fn fx_image(vcpu: u8) -> [u8; 512] {
    let mut image = [0; 512];
    image[0..2].copy_from_slice(&0x0b7f_u16.to_le_bytes()); // FCW: round up, all masked
    image[2..4].copy_from_slice(&0x3900_u16.to_le_bytes()); // FSW: top is 7, C0
    image[4] = 0xff; // all registers in use
    image[24..28].copy_from_slice(&0x5f80_u32.to_le_bytes()); // MXCSR: round up, all masked
    let mut state = 0xf0 + u64::from(vcpu);
    for register in image[32..160].chunks_exact_mut(16) {
        register[..8].copy_from_slice(&(split_mix(&mut state) | 1 << 63).to_le_bytes());
        register[8..10].copy_from_slice(&0x3fff_u16.to_le_bytes()); // a normal number in [1, 2)
    }
    for half in image[160..FX_BYTES].chunks_exact_mut(8) {
        half.copy_from_slice(&split_mix(&mut state).to_le_bytes());
    }
    image
}

/// Where an expectation is, from RSP at the area's end.
fn own(offset: u64) -> AsmMemoryOperand {
    qword_ptr(rsp + (offset as i32 - AREA_BYTES as i32))
}

/// The program; fills in the control pages.
pub(super) fn program(machine: &Machine, areas: &mut [u8]) -> Result<(Code, Vec<Piece>), IcedError> {
    watch::list(machine, areas);
    for (vcpu, area) in (0..).zip(areas.chunks_exact_mut(AREA_BYTES as usize)) {
        area[FX as usize..][..512].copy_from_slice(&fx_image(vcpu));
        let mut state = u64::from(vcpu);
        let general = (0..GENERAL.len()).map(|_| split_mix(&mut state));
        let listed = values(vcpu.into()).into_iter().map(|(_, _, value)| value);
        for (at, values) in
            [(GENERAL_VALUES, general.collect::<Vec<_>>()), (VALUES, listed.collect::<Vec<_>>())]
        {
            for (place, value) in area[at as usize..].chunks_exact_mut(8).zip(values) {
                place.copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok((assemble(machine)?, Vec::new()))
}

fn assemble(machine: &Machine) -> Result<Code, IcedError> {
    let mut p = Program::new("state", Tick::Periodic)?;
    let (mut started, mut first, mut round) = (p.a.create_label(), p.a.create_label(), p.a.create_label());
    p.enable_x2apic()?;
    for (slot, (_, place, _)) in (0..).zip(values(0)) {
        set(&mut p, place, own(VALUES + slot * 8))?;
    }
    p.a.lea(rax, own(FX))?;
    p.a.fxrstor(xmmword_ptr(rax))?;
    p.a.test(edi, edi)?;
    p.a.jne(started)?;
    for device in DEVICES {
        p.out(device.port, device.value)?;
    }
    set_up_others(&mut p)?;
    watch::start_pit(&mut p)?;
    p.a.set_label(&mut started)?;
    p.a.sti()?;

    p.a.set_label(&mut round)?;
    for (slot, (_, register)) in (0..).zip(GENERAL) {
        p.a.mov(register, own(GENERAL_VALUES + slot * 8))?;
    }
    for _ in 0..TICKS_PER_ROUND {
        p.a.hlt()?;
    }
    for (slot, (name, register)) in (0..).zip(GENERAL) {
        let mut good = p.a.create_label();
        p.a.cmp(register, own(GENERAL_VALUES + slot * 8))?;
        p.a.je(good)?;
        p.a.mov(r9, register)?;
        p.a.mov(r8, own(GENERAL_VALUES + slot * 8))?;
        p.fail(exit_code::WRONG_STATE, name)?;
        p.a.set_label(&mut good)?;
    }
    p.a.lea(rbp, own(0))?;
    check_fx(&mut p)?;
    for (slot, (name, place, _)) in (0..).zip(values(0)) {
        read(&mut p, place)?;
        p.a.mov(r8, own(VALUES + slot * 8))?;
        p.fail_unless_equal(exit_code::WRONG_STATE, name)?;
    }
    p.a.cmp(dword_ptr(rbp), 0)?;
    p.a.je(first)?;
    p.a.jmp(round)?;
    p.a.set_label(&mut first)?;
    check_devices(&mut p)?;
    watch::look(&mut p, machine)?;
    p.a.jmp(round)?;
    p.assemble(CODE)
}

/// Changes RAX, RCX and RDX.
fn set(p: &mut Program, place: Place, value: AsmMemoryOperand) -> Result<(), IcedError> {
    p.a.mov(rax, value)?;
    match place {
        Place::Control(register) => p.a.mov(register, rax),
        Place::Debug(register) => p.a.mov(register, rax),
        Place::Msr(msr) => {
            p.a.mov(rdx, rax)?;
            p.a.shr(rdx, 32_u32)?;
            p.a.mov(ecx, msr)?;
            p.a.wrmsr()
        }
    }
}

/// Into R9. Changes RAX, RCX and RDX.
fn read(p: &mut Program, place: Place) -> Result<(), IcedError> {
    match place {
        Place::Control(register) => p.a.mov(r9, register),
        Place::Debug(register) => p.a.mov(r9, register),
        Place::Msr(msr) => {
            p.a.mov(ecx, msr)?;
            p.a.rdmsr()?;
            p.a.shl(rdx, 32_u32)?;
            p.a.or(rax, rdx)?;
            p.a.mov(r9, rax)
        }
    }
}

/// RBP is the control page. Changes RAX, RCX, RSI and RDI.
fn check_fx(p: &mut Program) -> Result<(), IcedError> {
    p.a.lea(rax, qword_ptr(rbp + FX_FOUND))?;
    p.a.fxsave(ptr(rax))?;
    for (what, from, to) in [
        ("x87 control, status or MXCSR, four bytes of the FXSAVE image", 0, FX_MASK),
        ("x87 or SSE registers, four bytes of the FXSAVE image", FX_MASK + 4, FX_BYTES),
    ] {
        let mut good = p.a.create_label();
        p.a.lea(rsi, qword_ptr(rbp + (FX + from as u64)))?;
        p.a.lea(rdi, qword_ptr(rbp + (FX_FOUND + from as u64)))?;
        p.a.mov(ecx, ((to - from) / 4) as u32)?;
        p.a.repe().cmpsd()?;
        p.a.je(good)?;
        p.a.mov(r8d, dword_ptr(rsi - 4))?;
        p.a.mov(r9d, dword_ptr(rdi - 4))?;
        p.fail(exit_code::WRONG_STATE, what)?;
        p.a.set_label(&mut good)?;
    }
    Ok(())
}

/// A register of a device that is read where it was written.
struct Device {
    name: &'static str,
    port: u16,
    value: u8,
}

const fn device(name: &'static str, port: u16, value: u8) -> Device {
    Device { name, port, value }
}

/// Interrupts that nobody raises are unmasked, so that masks differ from a reset PIC's.
const DEVICES: [Device; 7] = [
    device("PIC 1 mask", 0x21, 0xfb),
    device("PIC 2 mask", 0xa1, 0xdf),
    device("PIC 2 level-triggered lines", 0x4d1, 0x0c),
    device("serial scratch", 0x3ff, 0x5a),
    device("serial line control", 0x3fb, 0x1b),
    device("serial interrupt enable", 0x3f9, 0x05),
    device("serial modem control", 0x3fc, 0x0b),
];
const SERIAL: u16 = 0x3f8;
const SERIAL_LCR: u16 = SERIAL + 3;
const LCR: u8 = 0x1b;
const LCR_DIVISOR_LATCH: u8 = 0x80;
const DIVISOR: [u8; 2] = [0x0c, 0x01];

/// PIT channel 2: both bytes, mode 2, and a count far below the 65536 it has when it was lost.
const PIT_MODE: u8 = 0xb4;
const PIT_STATUS: u8 = 0x34;
const PIT_COUNT: u16 = 0x0100;

/// Registers of the IOAPIC: its identity, and the entry of a pin that nobody raises.
const IOAPIC: [(&str, u32, u32); 3] = [
    ("IOAPIC identity", 0, 0x0500_0000),
    ("IOAPIC entry of pin 9, low", IOAPIC_PIN_0 + 18, 1 << 16 | 1 << 13 | 0x59),
    ("IOAPIC entry of pin 9, high", IOAPIC_PIN_0 + 19, 0x0100_0000),
];

fn set_up_others(p: &mut Program) -> Result<(), IcedError> {
    p.out(SERIAL_LCR, LCR | LCR_DIVISOR_LATCH)?;
    p.out(SERIAL, DIVISOR[0])?;
    p.out(SERIAL + 1, DIVISOR[1])?;
    p.out(SERIAL_LCR, LCR)?;
    p.out(0x43, PIT_MODE)?;
    p.out(0x42, PIT_COUNT as u8)?;
    p.out(0x42, (PIT_COUNT >> 8) as u8)?;
    for (_, register, value) in IOAPIC {
        watch::write_ioapic(p, register, value)?;
    }
    Ok(())
}

fn check_devices(p: &mut Program) -> Result<(), IcedError> {
    for device in DEVICES {
        check_port(p, device.name, device.port, device.value)?;
    }
    p.out(SERIAL_LCR, LCR | LCR_DIVISOR_LATCH)?;
    check_port(p, "serial divisor, low", SERIAL, DIVISOR[0])?;
    check_port(p, "serial divisor, high", SERIAL + 1, DIVISOR[1])?;
    p.out(SERIAL_LCR, LCR)?;

    // The status of channel 2 (read-back command), without its output and null-count bits.
    p.out(0x43, 0xe8)?;
    p.a.in_(al, 0x42_u32)?;
    p.a.and(eax, 0x3f_i32)?;
    p.a.mov(r9d, eax)?;
    p.a.mov(r8d, u32::from(PIT_STATUS))?;
    p.fail_unless_equal(exit_code::WRONG_STATE, "PIT channel 2 mode")?;
    // Its count, latched: anything up to where it starts from.
    let mut good = p.a.create_label();
    p.out(0x43, 0x80)?;
    p.a.in_(al, 0x42_u32)?;
    p.a.movzx(r9d, al)?;
    p.a.in_(al, 0x42_u32)?;
    p.a.movzx(eax, al)?;
    p.a.shl(eax, 8_u32)?;
    p.a.or(r9d, eax)?;
    p.a.mov(r8d, u32::from(PIT_COUNT))?;
    p.a.cmp(r9, r8)?;
    p.a.jbe(good)?;
    p.fail(exit_code::WRONG_STATE, "PIT channel 2 count, at most")?;
    p.a.set_label(&mut good)?;

    for (name, register, value) in IOAPIC {
        p.a.mov(edx, IOAPIC_SELECT as u32)?;
        p.a.mov(dword_ptr(rdx), register as i32)?;
        p.a.mov(r9d, dword_ptr(rdx + (IOAPIC_WINDOW - IOAPIC_SELECT)))?;
        p.a.mov(r8d, value)?;
        p.fail_unless_equal(exit_code::WRONG_STATE, name)?;
    }
    Ok(())
}

fn check_port(p: &mut Program, name: &str, port: u16, value: u8) -> Result<(), IcedError> {
    p.a.mov(edx, u32::from(port))?;
    p.a.in_(al, dx)?;
    p.a.movzx(r9d, al)?;
    p.a.mov(r8d, u32::from(value))?;
    p.fail_unless_equal(exit_code::WRONG_STATE, name)
}
