//! The KVM calls that kvm-ioctls 0.25.1 does not wrap, or wraps with an allocation a call.
//!
//! Numbers and structs are those of the kernel's `include/uapi/linux/kvm.h`.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1,
    kvm_device_attr, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1, kvm_nested_state, kvm_sregs2,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

use crate::error::{Call, KvmError};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
ioctl_iowr_nr!(KVM_GET_NESTED_STATE, KVMIO, 0xbe, kvm_nested_state);
ioctl_iow_nr!(KVM_SET_NESTED_STATE, KVMIO, 0xbf, kvm_nested_state);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

fn done(result: i32, call: &'static str) -> Result<(), KvmError> {
    if result < 0 { Err(errno::Error::last()).call(call) } else { Ok(()) }
}

/// Sets a slot's flags.
///
/// # Safety
/// The region is mapped in this process and stays mapped while the VM lives.
pub(crate) unsafe fn set_memory_region(
    vm: &VmFd,
    region: kvm_userspace_memory_region,
) -> Result<(), KvmError> {
    // SAFETY: the caller's promise is the wrapped function's condition.
    unsafe { vm.set_user_memory_region(region) }.call("KVM_SET_USER_MEMORY_REGION")
}

/// Reads a slot's dirty log into `words`.
///
/// # Safety
/// The slot has at most `words.len() * 64` pages: the kernel writes a bit for each of its pages.
pub(crate) unsafe fn dirty_log(vm: &VmFd, slot: u32, words: &mut [u64]) -> Result<(), KvmError> {
    let log = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: words.as_mut_ptr().cast() },
    };
    // SAFETY: the kernel writes at most as many bytes as the buffer has, by the caller's promise.
    done(unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &log) }, "KVM_GET_DIRTY_LOG")
}

/// Watches again the pages of `words` whose bits are set, from `first_page` of the slot.
///
/// # Panics
/// When `words` does not hold a bit for each of `pages`.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> Result<(), KvmError> {
    assert!(words.len() as u64 * 64 >= u64::from(pages), "a bit for each page");
    let log = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the kernel only reads the bitmap, a bit for each page rounded up to whole words.
    done(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &log) }, "KVM_CLEAR_DIRTY_LOG")
}

/// Has KVM free the harvested entries of all dirty rings and protect their pages: how many entries it freed, fewer
/// than there are when it was interrupted.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> Result<usize, KvmError> {
    // SAFETY: the call has no argument.
    let freed = unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) };
    match usize::try_from(freed).map_err(|_| errno::Error::last()) {
        Ok(freed) => Ok(freed),
        Err(e) if e.errno() == libc::EINTR => Ok(0),
        Err(e) => Err(e).call("KVM_RESET_DIRTY_RINGS"),
    }
}

/// Segment, descriptor-table and control registers with the PDPTRs.
pub(crate) fn sregs2(vcpu: &VcpuFd) -> Result<kvm_sregs2, KvmError> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel fills exactly this struct.
    done(unsafe { ioctl_with_mut_ref(vcpu, KVM_GET_SREGS2(), &mut sregs) }, "KVM_GET_SREGS2")?;
    Ok(sregs)
}

/// Sets what [`sregs2`] reads.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> Result<(), KvmError> {
    // SAFETY: the kernel reads exactly this struct.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_SREGS2(), sregs) }, "KVM_SET_SREGS2")
}

/// Reads the XSAVE area; `xsave2` when the kernel has KVM_CAP_XSAVE2.
///
/// # Safety
/// `area` has at least the size the kernel reports for KVM_CAP_XSAVE2, and 4096 bytes.
pub(crate) unsafe fn xsave(vcpu: &VcpuFd, xsave2: bool, area: &mut [u32]) -> Result<(), KvmError> {
    let (request, call) =
        if xsave2 { (KVM_GET_XSAVE2(), "KVM_GET_XSAVE2") } else { (KVM_GET_XSAVE(), "KVM_GET_XSAVE") };
    // SAFETY: the kernel writes no more than the area has, by the caller's promise.
    done(unsafe { ioctl_with_mut_ptr(vcpu, request, area.as_mut_ptr()) }, call)
}

/// Sets the XSAVE area.
///
/// # Safety
/// As for [`xsave`].
pub(crate) unsafe fn set_xsave(vcpu: &VcpuFd, area: &[u32]) -> Result<(), KvmError> {
    // SAFETY: the kernel reads no more than the area has, by the caller's promise.
    done(unsafe { ioctl_with_ptr(vcpu, KVM_SET_XSAVE(), area.as_ptr()) }, "KVM_SET_XSAVE")
}

/// Bytes before the data in the kernel's `struct kvm_nested_state`, and where its `size` is.
const NESTED_HEADER_BYTES: usize = size_of::<kvm_nested_state>();
const NESTED_SIZE_AT: std::ops::Range<usize> = 4..8;

/// The nested virtualisation state, of at most `most_bytes` (what KVM_CAP_NESTED_STATE reports).
pub(crate) fn nested_state(vcpu: &VcpuFd, most_bytes: usize) -> Result<Vec<u8>, KvmError> {
    let most_bytes = most_bytes.max(NESTED_HEADER_BYTES);
    // Words, because the kernel's struct is aligned to 8 bytes.
    let mut words = vec![0u64; most_bytes.div_ceil(8)];
    words[0] = (most_bytes as u64) << 32;
    // SAFETY: `size` in the header (upper half of the first word) tells the kernel how much there is.
    let result = unsafe { ioctl_with_mut_ptr(vcpu, KVM_GET_NESTED_STATE(), words.as_mut_ptr()) };
    done(result, "KVM_GET_NESTED_STATE")?;
    let bytes = usize::try_from(words[0] >> 32).unwrap_or(usize::MAX).min(most_bytes);
    let mut state: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    state.truncate(bytes);
    Ok(state)
}

/// Sets what [`nested_state`] read.
pub(crate) fn set_nested_state(vcpu: &VcpuFd, state: &[u8]) -> Result<(), KvmError> {
    let claimed = state.get(NESTED_SIZE_AT).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes);
    if state.len() < NESTED_HEADER_BYTES || claimed.map(|c| c as usize) != Some(state.len()) {
        return Err(KvmError::DoesNotFit { why: "nested state is not as long as it says".into() });
    }
    let mut words = vec![0u64; state.len().div_ceil(8)];
    for (word, bytes) in words.iter_mut().zip(state.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_le_bytes(padded);
    }
    // SAFETY: the kernel reads as much as the header's `size` says, which is what there is.
    let result = unsafe { ioctl_with_ptr(vcpu, KVM_SET_NESTED_STATE(), words.as_ptr()) };
    done(result, "KVM_SET_NESTED_STATE")
}

fn tsc_offset_attribute(value: *mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: value as u64,
    }
}

/// Whether the vCPU has the TSC offset attribute.
pub(crate) fn has_tsc_offset(vcpu: &impl AsRawFd) -> bool {
    let attribute = tsc_offset_attribute(std::ptr::null_mut());
    // SAFETY: the kernel only looks the attribute up.
    unsafe { ioctl_with_ref(vcpu, KVM_HAS_DEVICE_ATTR(), &attribute) == 0 }
}

/// Guest TSC minus (scaled) host TSC.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, KvmError> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the kernel writes one u64 to the address, which is that of a live local.
    done(unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) }, "KVM_VCPU_TSC_OFFSET (get)")?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] reads.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut offset: u64) -> Result<(), KvmError> {
    let attribute = tsc_offset_attribute(&raw mut offset);
    // SAFETY: the kernel reads one u64 from the address, which is that of a live local.
    done(unsafe { ioctl_with_ref(vcpu, KVM_SET_DEVICE_ATTR(), &attribute) }, "KVM_VCPU_TSC_OFFSET (set)")
}
