//! What every built-in guest is made of: the interrupt handlers, the APIC timer, the way an error is told, and
//! the assembling itself.
//!
//! Conventions. A program starts with interrupts off, its vCPU's index in RDI, its area in RBP and the stack at
//! the area's end. RSP stays inside the area for ever: handlers find the control page by rounding it down. An
//! error is told by [`Program::fail_unless_equal`]: expected in R8, found in R9.
//!
//! Only instructions that KVM's emulator knows are used: where a host interprets ring 0, nothing else works.

use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

use super::layout::{AREA_BYTES, SHARED, control};
use super::{EXIT_PORT, HEARTBEAT_INTERVAL_US, HEARTBEAT_PORT, exit_code};

/// Above the PIT's: KVM makes up for PIT ticks missed in a pause, in a row.
pub(super) const TIMER_VECTOR: u8 = 0x50;
pub(super) const PIT_VECTOR: u8 = 0x41;
const SPURIOUS_VECTOR: u8 = 0xff;
const EXCEPTIONS: u8 = 32;

/// KVM's APIC timer counts nanoseconds (APIC_BUS_CYCLE_NS is 1 in arch/x86/kvm/lapic.h) when divided by one.
pub(super) const TIMER_COUNT: u32 = HEARTBEAT_INTERVAL_US * 1000;
pub(super) const LVT_PERIODIC: u32 = 1 << 17;
pub(super) const LVT_DEADLINE: u32 = 2 << 17;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
pub(super) const DIVIDE_BY_ONE: u32 = 0b1011;

/// Model-specific registers of the x2APIC: 0x800 + the xAPIC's offset / 16.
pub(super) mod x2apic {
    pub(in super::super) const EOI: u32 = 0x80b;
    pub(in super::super) const SPURIOUS: u32 = 0x80f;
    pub(in super::super) const LVT_TIMER: u32 = 0x832;
    pub(in super::super) const INITIAL_COUNT: u32 = 0x838;
    pub(in super::super) const DIVIDE: u32 = 0x83e;
}
const MSR_APIC_BASE: u32 = 0x1b;
const APIC_BASE_X2APIC_AND_ENABLED: u32 = 0xc00;

const COM1: u32 = 0x3f8;
const COM1_LCR: u32 = COM1 + 3;
const COM1_LSR: u32 = COM1 + 5;
const LSR_TRANSMITTER_EMPTY: i32 = 0x20;

/// A word in the shared page, after each guest's own: who holds it may print.
const PRINT_LOCK: u64 = SHARED + 0xff8;

/// An assembled guest.
#[derive(Debug)]
pub(super) struct Code {
    /// The instructions, for the address they were assembled at.
    pub(super) bytes: Vec<u8>,
    /// Where every vCPU starts.
    pub(super) start: u64,
    /// Vectors and the addresses of their handlers.
    pub(super) handlers: Vec<(u8, u64)>,
    /// Addresses of the labels exported by [`Program::export`], in that order.
    pub(super) exports: Vec<u64>,
}

/// What to do at a vCPU's timer tick besides counting it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tick {
    /// Nothing: the timer is periodic.
    Periodic,
    /// Where the control page's `rearm` field (an offset) is not zero: set the deadline that many cycles ahead.
    Deadline {
        /// The offset of the field.
        rearm: u64,
    },
}

/// A guest being assembled.
pub(super) struct Program {
    pub(super) a: CodeAssembler,
    name: &'static str,
    start: CodeLabel,
    fail: CodeLabel,
    separator: CodeLabel,
    texts: Vec<(CodeLabel, String)>,
    exports: Vec<CodeLabel>,
    tick: Tick,
}

impl Program {
    /// A program whose first instruction is emitted next.
    pub(super) fn new(name: &'static str, tick: Tick) -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut start = a.create_label();
        a.set_label(&mut start)?;
        let (fail, separator) = (a.create_label(), a.create_label());
        Ok(Self { a, name, start, fail, separator, texts: Vec::new(), exports: Vec::new(), tick })
    }

    /// Starts the APIC timer of the vCPU in EDI; ticks come once interrupts are on. Changes RAX, RCX and RDX.
    pub(super) fn start_periodic_timer(&mut self) -> Result<(), IcedError> {
        self.enable_x2apic()?;
        self.write_msr(x2apic::LVT_TIMER, (LVT_PERIODIC | u32::from(TIMER_VECTOR)).into())?;
        self.write_msr(x2apic::DIVIDE, DIVIDE_BY_ONE.into())?;
        self.write_msr(x2apic::INITIAL_COUNT, TIMER_COUNT.into())
    }

    /// Enables the APIC in its x2APIC form; vCPU 0 (in EDI) keeps the PICs' interrupts away.
    pub(super) fn enable_x2apic(&mut self) -> Result<(), IcedError> {
        self.a.mov(ecx, MSR_APIC_BASE)?;
        self.a.rdmsr()?;
        self.a.or(eax, APIC_BASE_X2APIC_AND_ENABLED as i32)?;
        self.a.wrmsr()?;
        self.write_msr(x2apic::SPURIOUS, 0x100 | u64::from(SPURIOUS_VECTOR))?;
        let mut other = self.a.create_label();
        self.a.test(edi, edi)?;
        self.a.jne(other)?;
        self.a.mov(al, 0xff_u32)?;
        self.a.out(0x21_u32, al)?;
        self.a.out(0xa1_u32, al)?;
        self.a.set_label(&mut other)?;
        self.a.nop()
    }

    /// Changes RAX, RCX and RDX.
    pub(super) fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), IcedError> {
        self.a.mov(ecx, msr)?;
        self.a.mov(eax, value as u32)?;
        self.a.mov(edx, (value >> 32) as u32)?;
        self.a.wrmsr()
    }

    /// `out port, value`. Changes RAX and RDX.
    pub(super) fn out(&mut self, port: u16, value: u8) -> Result<(), IcedError> {
        self.a.mov(dx, u32::from(port))?;
        self.a.mov(al, u32::from(value))?;
        self.a.out(dx, al)
    }

    /// Ends the guest with `code` and a text unless R8, what was expected, equals R9, what was found.
    pub(super) fn fail_unless_equal(&mut self, code: u8, what: &str) -> Result<(), IcedError> {
        let mut good = self.a.create_label();
        self.a.cmp(r8, r9)?;
        self.a.je(good)?;
        self.fail(code, what)?;
        self.a.set_label(&mut good)
    }

    /// Ends the guest with `code` and a text that has R8 as expected and R9 as found.
    pub(super) fn fail(&mut self, code: u8, what: &str) -> Result<(), IcedError> {
        let text = self.text(format!("{what}: expected 0x"));
        self.a.lea(rsi, ptr(text))?;
        self.a.lea(rbx, ptr(self.separator))?;
        self.a.mov(eax, u32::from(code))?;
        self.a.jmp(self.fail)
    }

    /// Makes a label's address known in [`Code::exports`].
    pub(super) fn export(&mut self, label: CodeLabel) {
        self.exports.push(label);
    }

    /// A zero-terminated text, placed after the code.
    fn text(&mut self, text: String) -> CodeLabel {
        if let Some((label, _)) = self.texts.iter().find(|(_, t)| *t == text) {
            return *label;
        }
        let label = self.a.create_label();
        self.texts.push((label, text));
        label
    }

    /// Adds handlers and texts, and assembles all for `address`.
    pub(super) fn assemble(mut self, address: u64) -> Result<Code, IcedError> {
        let mut handlers = self.exceptions()?;
        let mut timer = self.a.create_label();
        self.a.set_label(&mut timer)?;
        self.timer_handler()?;
        handlers.push((TIMER_VECTOR, timer));

        let mut pit = self.a.create_label();
        self.a.set_label(&mut pit)?;
        self.a.push(rax)?;
        self.a.push(rcx)?;
        self.a.push(rdx)?;
        self.a.inc(qword_ptr(super::watch::PIT_TICKS))?;
        self.end_of_interrupt()?;

        let mut spurious = self.a.create_label();
        self.a.set_label(&mut spurious)?;
        self.a.iretq()?;
        handlers.extend([(PIT_VECTOR, pit), (SPURIOUS_VECTOR, spurious)]);

        self.failure()?;
        for (mut label, text) in std::mem::take(&mut self.texts) {
            self.a.set_label(&mut label)?;
            self.a.db(text.as_bytes())?;
            self.a.db(&[0])?;
        }
        let result = self.a.assemble_options(address, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        Ok(Code {
            start: result.label_ip(&self.start)?,
            handlers: handlers
                .into_iter()
                .map(|(vector, label)| Ok((vector, result.label_ip(&label)?)))
                .collect::<Result<_, IcedError>>()?,
            exports: self.exports.iter().map(|l| result.label_ip(l)).collect::<Result<_, _>>()?,
            bytes: result.inner.code_buffer,
        })
    }

    /// Counts the tick and beats, if this is vCPU 0.
    fn timer_handler(&mut self) -> Result<(), IcedError> {
        let mut silent = self.a.create_label();
        self.a.push(rax)?;
        self.a.push(rcx)?;
        self.a.push(rdx)?;
        self.a.mov(rax, rsp)?;
        self.a.and(rax, -(AREA_BYTES as i32))?;
        self.a.inc(qword_ptr(rax + control::TICKS))?;
        self.a.cmp(dword_ptr(rax + control::VCPU), 0)?;
        self.a.jne(silent)?;
        self.a.out(u32::from(HEARTBEAT_PORT), al)?;
        self.a.set_label(&mut silent)?;
        if let Tick::Deadline { rearm } = self.tick {
            let mut periodic = self.a.create_label();
            self.a.mov(rcx, qword_ptr(rax + rearm))?;
            self.a.test(rcx, rcx)?;
            self.a.je(periodic)?;
            self.arm_deadline()?;
            self.a.set_label(&mut periodic)?;
        }
        self.end_of_interrupt()
    }

    /// Sets the APIC's deadline RCX cycles ahead. Changes RAX, RCX and RDX.
    pub(super) fn arm_deadline(&mut self) -> Result<(), IcedError> {
        self.a.rdtsc()?;
        self.a.shl(rdx, 32)?;
        self.a.or(rax, rdx)?;
        self.a.add(rax, rcx)?;
        self.a.mov(rdx, rax)?;
        self.a.shr(rdx, 32)?;
        self.a.mov(ecx, MSR_TSC_DEADLINE)?;
        self.a.wrmsr()
    }

    fn end_of_interrupt(&mut self) -> Result<(), IcedError> {
        self.write_msr(x2apic::EOI, 0)?;
        self.a.pop(rdx)?;
        self.a.pop(rcx)?;
        self.a.pop(rax)?;
        self.a.iretq()
    }

    /// Handlers that tell vector and instruction.
    fn exceptions(&mut self) -> Result<Vec<(u8, CodeLabel)>, IcedError> {
        let mut tell = self.a.create_label();
        let mut handlers = Vec::new();
        for vector in 0..EXCEPTIONS {
            let mut handler = self.a.create_label();
            self.a.set_label(&mut handler)?;
            // SDM volume 3, table 6-1: these push an error code, the others get a zero in its place.
            if !matches!(vector, 8 | 10..=14 | 17 | 21 | 29 | 30) {
                self.a.push(0_i32)?;
            }
            self.a.push(i32::from(vector))?;
            self.a.jmp(tell)?;
            handlers.push((vector, handler));
        }
        self.a.set_label(&mut tell)?;
        self.a.mov(r8, qword_ptr(rsp))?;
        self.a.mov(r9, qword_ptr(rsp + 16))?;
        let (what, at) = (self.text("exception 0x".to_owned()), self.text(" at 0x".to_owned()));
        self.a.lea(rsi, ptr(what))?;
        self.a.lea(rbx, ptr(at))?;
        self.a.mov(eax, u32::from(exit_code::EXCEPTION))?;
        self.a.jmp(self.fail)?;
        Ok(handlers)
    }

    /// Prints "guest NAME: vCPU N: " RSI R8 RBX R9, and ends the guest with AL. One vCPU only gets to it.
    fn failure(&mut self) -> Result<(), IcedError> {
        let (mut print, mut put, mut hex) =
            (self.a.create_label(), self.a.create_label(), self.a.create_label());
        let guest = self.text(format!("guest {}: vCPU 0x", self.name));
        let (colon, newline) = (self.text(": ".to_owned()), self.text("\r\n".to_owned()));
        let separator = (self.separator, ", found 0x".to_owned());
        self.texts.push(separator);

        let mut fail = self.fail;
        self.a.set_label(&mut fail)?;
        self.a.cli()?;
        self.a.mov(r12, rsi)?;
        self.a.mov(r13d, eax)?;
        let (mut lock, mut locked) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut lock)?;
        self.a.mov(ecx, 1_u32)?;
        self.a.xchg(dword_ptr(PRINT_LOCK), ecx)?;
        self.a.test(ecx, ecx)?;
        self.a.je(locked)?;
        self.a.pause()?;
        self.a.jmp(lock)?;
        self.a.set_label(&mut locked)?;
        // Eight bits and no divisor latch, whatever the guest made of the port.
        self.a.mov(edx, COM1_LCR)?;
        self.a.mov(eax, 3_u32)?;
        self.a.out(dx, al)?;
        self.a.lea(rsi, ptr(guest))?;
        self.a.call(print)?;
        // Outside handlers the stack is empty: RSP is the next vCPU's area.
        self.a.lea(rax, qword_ptr(rsp - 8))?;
        self.a.and(rax, -(AREA_BYTES as i32))?;
        self.a.mov(eax, dword_ptr(rax + control::VCPU))?;
        self.a.call(hex)?;
        self.a.lea(rsi, ptr(colon))?;
        self.a.call(print)?;
        self.a.mov(rsi, r12)?;
        self.a.call(print)?;
        self.a.mov(rax, r8)?;
        self.a.call(hex)?;
        self.a.mov(rsi, rbx)?;
        self.a.call(print)?;
        self.a.mov(rax, r9)?;
        self.a.call(hex)?;
        self.a.lea(rsi, ptr(newline))?;
        self.a.call(print)?;
        self.a.mov(eax, r13d)?;
        self.a.out(u32::from(EXIT_PORT), al)?;
        let mut ended = self.a.create_label();
        self.a.set_label(&mut ended)?;
        self.a.hlt()?;
        self.a.jmp(ended)?;

        // The text at RSI.
        let mut printed = self.a.create_label();
        self.a.set_label(&mut print)?;
        self.a.lodsb()?;
        self.a.test(al, al)?;
        self.a.je(printed)?;
        self.a.call(put)?;
        self.a.jmp(print)?;
        self.a.set_label(&mut printed)?;
        self.a.ret()?;

        // RAX without leading zeros.
        let (mut skip, mut digit, mut decimal) =
            (self.a.create_label(), self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut hex)?;
        self.a.mov(r14, rax)?;
        self.a.mov(r15d, 16_u32)?;
        self.a.set_label(&mut skip)?;
        self.a.rol(r14, 4_u32)?;
        self.a.dec(r15d)?;
        self.a.je(digit)?;
        self.a.test(r14b, 0xf_i32)?;
        self.a.je(skip)?;
        self.a.set_label(&mut digit)?;
        self.a.mov(eax, r14d)?;
        self.a.and(eax, 0xf_i32)?;
        self.a.add(eax, i32::from(b'0'))?;
        self.a.cmp(eax, i32::from(b'9'))?;
        self.a.jbe(decimal)?;
        self.a.add(eax, i32::from(b'a' - b'9') - 1)?;
        self.a.set_label(&mut decimal)?;
        self.a.call(put)?;
        self.a.rol(r14, 4_u32)?;
        self.a.dec(r15d)?;
        self.a.jns(digit)?;
        self.a.ret()?;

        // AL, after a bounded wait for the transmitter: a broken port must not keep the exit from happening.
        let (mut wait, mut ready) = (self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut put)?;
        self.a.mov(r10d, eax)?;
        self.a.mov(r11d, 10_000_u32)?;
        self.a.mov(edx, COM1_LSR)?;
        self.a.set_label(&mut wait)?;
        self.a.in_(al, dx)?;
        self.a.test(al, LSR_TRANSMITTER_EMPTY)?;
        self.a.jne(ready)?;
        self.a.dec(r11d)?;
        self.a.jne(wait)?;
        self.a.set_label(&mut ready)?;
        self.a.mov(edx, COM1)?;
        self.a.mov(eax, r10d)?;
        self.a.out(dx, al)?;
        self.a.ret()
    }
}
