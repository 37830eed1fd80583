//! What this host's KVM can do, asked once.

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_EXCEPTION_PAYLOAD,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2, KVM_CAP_TSC_CONTROL, KVM_CAP_VCPU_ATTRIBUTES,
    KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, kvm_enable_cap,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::error::{Call, KvmError};

/// The capabilities that decide how a guest is tracked, saved and restored; plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE and KVM_DIRTY_LOG_INITIALLY_SET, where supported; 0 without
    /// manual protection.
    pub manual_dirty_log: u64,
    /// Size of the largest dirty ring in bytes whose accesses are ordered on every architecture; 0 where there
    /// is none.
    pub dirty_ring_acq_rel_bytes: u64,
    /// The same of a ring whose accesses are ordered by x86 only.
    pub dirty_ring_bytes: u64,
    /// Size of the XSAVE area in bytes, 4096 at least.
    pub xsave_bytes: usize,
    /// Whether KVM_GET_XSAVE2 exists.
    pub xsave2: bool,
    /// Largest nested state in bytes; 0 where nested state cannot be saved.
    pub nested_state_bytes: usize,
    /// Whether a guest's TSC can have another frequency than the host's.
    pub tsc_control: bool,
    /// Whether vCPUs may have attributes; whether the TSC offset is one is asked of the vCPU itself.
    pub vcpu_attributes: bool,
    /// Whether KVM_GET_CLOCK can report the host's real time beside the guest's.
    pub clock_realtime: bool,
    /// Whether KVM_GET_CLOCK can report the host's TSC beside the guest's time.
    pub clock_host_tsc: bool,
    /// Whether a guest that enabled kvmclock can be told that it was stopped.
    pub kvmclock_ctrl: bool,
    /// Whether pending exceptions keep their payload apart from DR6 and CR2.
    pub exception_payload: bool,
    /// Whether a pending triple fault can be saved.
    pub triple_fault_event: bool,
}

impl Caps {
    /// Asks the kernel.
    ///
    /// # Errors
    /// [`KvmError::Missing`] names what no guest can be moved without.
    pub fn probe(kvm: &Kvm, vm: &VmFd) -> Result<Self, KvmError> {
        let int = |cap: u32| u64::try_from(vm.check_extension_raw(cap.into())).unwrap_or(0);
        let required = [
            (kvm.check_extension(Cap::ImmediateExit), "KVM_CAP_IMMEDIATE_EXIT"),
            (int(KVM_CAP_SREGS2) != 0, "KVM_CAP_SREGS2"),
            (vm.check_extension(Cap::UserMemory), "KVM_CAP_USER_MEMORY"),
            (vm.check_extension(Cap::Irqchip), "KVM_CAP_IRQCHIP"),
            (vm.check_extension(Cap::PitState2), "KVM_CAP_PIT_STATE2"),
            (vm.check_extension(Cap::MpState), "KVM_CAP_MP_STATE"),
            (vm.check_extension(Cap::VcpuEvents), "KVM_CAP_VCPU_EVENTS"),
            (vm.check_extension(Cap::Debugregs), "KVM_CAP_DEBUGREGS"),
            (vm.check_extension(Cap::Xsave), "KVM_CAP_XSAVE"),
            (vm.check_extension(Cap::Xcrs), "KVM_CAP_XCRS"),
            (vm.check_extension(Cap::AdjustClock), "KVM_CAP_ADJUST_CLOCK"),
            (vm.check_extension(Cap::GetTscKhz), "KVM_CAP_GET_TSC_KHZ"),
            (kvm.check_extension(Cap::GetMsrFeatures), "KVM_CAP_GET_MSR_FEATURES"),
        ];
        if let Some((_, what)) = required.into_iter().find(|(there, _)| !there) {
            return Err(KvmError::Missing { what });
        }
        let xsave2_bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let clock = u64::try_from(vm.check_extension_int(Cap::AdjustClock)).unwrap_or(0);
        Ok(Self {
            manual_dirty_log: int(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
            dirty_ring_acq_rel_bytes: int(KVM_CAP_DIRTY_LOG_RING_ACQ_REL),
            dirty_ring_bytes: int(KVM_CAP_DIRTY_LOG_RING),
            xsave_bytes: xsave2_bytes.max(4096),
            xsave2: xsave2_bytes > 0,
            nested_state_bytes: usize::try_from(vm.check_extension_int(Cap::NestedState)).unwrap_or(0),
            tsc_control: int(KVM_CAP_TSC_CONTROL) != 0,
            vcpu_attributes: int(KVM_CAP_VCPU_ATTRIBUTES) != 0,
            clock_realtime: clock & u64::from(KVM_CLOCK_REALTIME) != 0,
            clock_host_tsc: clock & u64::from(KVM_CLOCK_HOST_TSC) != 0,
            kvmclock_ctrl: vm.check_extension(Cap::KvmclockCtrl),
            exception_payload: int(KVM_CAP_EXCEPTION_PAYLOAD) != 0,
            triple_fault_event: int(KVM_CAP_X86_TRIPLE_FAULT_EVENT) != 0,
        })
    }

    /// Has KVM report pending events in full. For a VM that has no vCPU yet; source and destination alike.
    ///
    /// # Errors
    /// The kernel's refusal of what it said it could.
    pub fn enable(&self, vm: &VmFd) -> Result<(), KvmError> {
        let events = [
            (self.exception_payload, KVM_CAP_EXCEPTION_PAYLOAD, "KVM_CAP_EXCEPTION_PAYLOAD"),
            (self.triple_fault_event, KVM_CAP_X86_TRIPLE_FAULT_EVENT, "KVM_CAP_X86_TRIPLE_FAULT_EVENT"),
        ];
        for (_, cap, call) in events.into_iter().filter(|(there, ..)| *there) {
            enable(vm, cap, 1, call)?;
        }
        Ok(())
    }
}

pub(crate) fn enable(vm: &VmFd, cap: u32, argument: u64, call: &'static str) -> Result<(), KvmError> {
    let enable = kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&enable).call(call)
}
