//! Two instructions that KVM's emulator lacks and guests need: FWAIT and INT3.
//!
//! Where KVM has no VMX or SVM it interprets ring 0 code; elsewhere it interprets a little real-mode code at
//! most. It gives up on what it does not know with KVM_EXIT_INTERNAL_ERROR. These two are completed here, as
//! the SDM has them; anything else is reported with its bytes and ends the guest.

#![allow(unsafe_code)]

use kvm_bindings::{KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno;

const FWAIT: u8 = 0x9b;
const INT3: u8 = 0xcc;
/// Exceptions: breakpoint, no coprocessor, coprocessor error.
const BP: u8 = 3;
const NM: u8 = 7;
const MF: u8 = 16;
/// CR0: monitor coprocessor, task switched.
const CR0_MP: u64 = 1 << 1;
const CR0_TS: u64 = 1 << 3;
/// x87 status word: an unmasked exception is pending.
const FSW_ES: u16 = 1 << 7;

/// Completes the instruction at which KVM gave up.
///
/// # Errors
/// Why the guest cannot go on.
pub(crate) fn complete(vcpu: &mut VcpuFd) -> Result<(), String> {
    let failure = Failure::of(vcpu);
    let failed = |e: errno::Error| format!("{failure}, and its registers cannot be had: {e}");
    let mut regs = vcpu.get_regs().map_err(failed)?;
    let sregs = vcpu.get_sregs().map_err(failed)?;
    let at = |what: &str| format!("{failure} at {:#x}:{:#x}{what}", sregs.cs.selector, regs.rip);
    if failure.suberror != KVM_INTERNAL_ERROR_EMULATION {
        return Err(at(""));
    }
    match failure.bytes.first() {
        // WAIT/FWAIT: SDM volume 2.
        Some(&FWAIT) => {
            if sregs.cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
                return raise(vcpu, NM).map_err(failed);
            }
            if vcpu.get_fpu().map_err(failed)?.fsw & FSW_ES != 0 {
                return raise(vcpu, MF).map_err(failed);
            }
            regs.rip += 1;
            vcpu.set_regs(&regs).map_err(failed)
        }
        // A trap: the return address is behind it. From an outer ring the gate's privilege decides, which is
        // for the processor to look at.
        Some(&INT3) if sregs.cs.dpl == 0 => {
            regs.rip += 1;
            vcpu.set_regs(&regs).map_err(failed)?;
            raise(vcpu, BP).map_err(failed)
        }
        _ => Err(at(
            "; this host's KVM interprets ring 0 code and lacks the instruction: take another guest or host",
        )),
    }
}

/// What KVM said.
struct Failure {
    suberror: u32,
    bytes: Vec<u8>,
}

impl Failure {
    fn of(vcpu: &mut VcpuFd) -> Self {
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so this is the union's field; all its bits are
        // plain numbers.
        let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
        let has_bytes = failure.suberror == KVM_INTERNAL_ERROR_EMULATION
            && failure.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        // SAFETY: the union has one variant.
        let instruction = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
        let count =
            if has_bytes { usize::from(instruction.insn_size).min(instruction.insn_bytes.len()) } else { 0 };
        Self { suberror: failure.suberror, bytes: instruction.insn_bytes[..count].to_vec() }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return write!(f, "KVM gave up (suberror {})", self.suberror);
        }
        write!(f, "KVM cannot emulate the instruction")?;
        self.bytes.iter().try_for_each(|b| write!(f, " {b:02x}"))
    }
}

/// Has the vCPU take an exception without an error code as it goes on.
fn raise(vcpu: &VcpuFd, vector: u8) -> Result<(), errno::Error> {
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 1;
    events.exception.nr = vector;
    events.exception.has_error_code = 0;
    vcpu.set_vcpu_events(&events)
}
