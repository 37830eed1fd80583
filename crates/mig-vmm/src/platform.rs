//! What a machine is made of on both sides, source and destination: VM, interrupt controllers, timer, memory
//! slots, vCPUs with their threads, devices; everything paused.

#![allow(unsafe_code)]

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use mig::Section;
use mig::describe::Region;
use mig_kvm::vcpu::{self, SaveContext};
use mig_kvm::{Caps, DirtyLog, Gate, Slot, Throttler, compat};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::Bus;
use crate::console::Console;
use crate::cpuid;
use crate::error::VmmError;
use crate::layout::{self, KVM_IDENTITY_MAP, KVM_TSS, MAX_MEMORY_BYTES, MAX_VCPUS, MIN_MEMORY_BYTES};
use crate::memory::{self, Ram};
use crate::monitor::Status;
use crate::tracking::Tracking;
use crate::vcpu::VcpuThread;

/// The parts of a machine. The order of fields is the order of their end: log and vCPUs before their VM.
pub(crate) struct Platform {
    pub(crate) throttler: Throttler,
    pub(crate) log: DirtyLog,
    pub(crate) vcpus: Arc<[Mutex<VcpuFd>]>,
    pub(crate) threads: Vec<JoinHandle<()>>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) status: Arc<Status>,
    pub(crate) memory: Arc<Ram>,
    pub(crate) memory_bytes: u64,
    pub(crate) caps: Caps,
    /// The frequency of the host's TSC.
    host_tsc_khz: u32,
    /// What saving needs; found out once the vCPUs have their CPUID.
    pub(crate) save_context: OnceLock<SaveContext>,
    /// What saving cost before the guest ran.
    pub(crate) save_cost: Duration,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) kvm: Kvm,
}

/// Opens KVM.
pub(crate) fn open_kvm() -> Result<Kvm, VmmError> {
    Kvm::new().map_err(|e| match e.errno() {
        libc::EACCES | libc::EPERM => VmmError::KvmDenied(e),
        _ => VmmError::NoKvm(e),
    })
}

/// Checks what was asked for.
pub(crate) fn check_size(memory_bytes: u64, vcpus: u32) -> Result<u8, VmmError> {
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes) || !memory_bytes.is_multiple_of(4096) {
        return Err(VmmError::MemorySize { bytes: memory_bytes });
    }
    u8::try_from(vcpus).ok().filter(|v| (1..=MAX_VCPUS).contains(v)).ok_or(VmmError::Vcpus { vcpus })
}

impl Platform {
    /// Makes everything; memory is zero and not touched, vCPUs are as after a reset, without CPUID.
    pub(crate) fn new(
        memory_bytes: u64,
        vcpus: u32,
        console: Console,
        tracking: Tracking,
    ) -> Result<Self, VmmError> {
        let count = check_size(memory_bytes, vcpus)?;
        let kvm = open_kvm()?;
        let memory = Arc::new(memory::map(&layout::regions(memory_bytes))?);

        let vm = Arc::new(kvm.create_vm().map_err(VmmError::kvm("creating a VM"))?);
        let caps = Caps::probe(&kvm, &vm)?;
        caps.enable(&vm)?;
        let rings = tracking.enable(&vm, &caps)?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP).map_err(VmmError::kvm("placing the identity map"))?;
        vm.set_tss_address(KVM_TSS as usize).map_err(VmmError::kvm("placing the task state segment"))?;
        vm.create_irq_chip().map_err(VmmError::kvm("creating the interrupt controllers"))?;
        // The speaker port with the timer's second channel, by which kernels calibrate.
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(VmmError::kvm("creating the timer"))?;
        let slots = add_slots(&vm, &memory)?;

        let fds = (0..count)
            .map(|id| vm.create_vcpu(id.into()).map_err(VmmError::kvm("creating a vCPU")))
            .collect::<Result<Vec<_>, _>>()?;
        let log = match rings {
            None => DirtyLog::new(vm.clone(), slots, memory.clone(), &caps)?,
            Some(size) => {
                let vcpus: Vec<&VcpuFd> = fds.iter().collect();
                DirtyLog::with_rings(vm.clone(), slots, memory.clone(), &caps, &vcpus, size)?
            }
        };
        let host_tsc_khz = vcpu::host_tsc_khz(&fds[0])?;
        let gate = Arc::new(Gate::new(count.into())?);
        let throttler = match log.rings().cloned() {
            None => Throttler::new(gate.clone()),
            Some(rings) => Throttler::by_pages(gate.clone(), Box::new(move || rings.pages_by_vcpu())),
        };
        let mut platform = Self {
            throttler,
            log,
            vcpus: fds.into_iter().map(Mutex::new).collect(),
            threads: Vec::new(),
            gate,
            bus: Arc::new(Bus::new(vm.clone(), console, memory_bytes)),
            status: Arc::new(Status::paused()),
            memory,
            memory_bytes,
            caps,
            host_tsc_khz,
            save_context: OnceLock::new(),
            save_cost: Duration::ZERO,
            vm,
            kvm,
        };
        platform.spawn()?;
        Ok(platform)
    }

    /// Starts the vCPUs' threads, which wait for the gate. Dropping the platform ends those that started.
    fn spawn(&mut self) -> Result<(), VmmError> {
        for index in 0..self.vcpus.len() {
            let thread = VcpuThread {
                index,
                fds: self.vcpus.clone(),
                gate: self.gate.clone(),
                bus: self.bus.clone(),
                status: self.status.clone(),
                rings: self.log.rings().cloned(),
            };
            let named = std::thread::Builder::new().name(format!("vcpu-{index}"));
            self.threads.push(named.spawn(move || thread.run()).map_err(VmmError::Thread)?);
        }
        Ok(())
    }

    /// Gives each vCPU what KVM supports and its place.
    pub(crate) fn set_cpuid(&self) -> Result<(), VmmError> {
        let supported = self
            .kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(VmmError::kvm("asking for the supported CPUID"))?;
        let tsc_deadline = self.kvm.check_extension(Cap::TscDeadlineTimer);
        for (index, vcpu) in (0u8..).zip(self.vcpus.iter()) {
            let entries = cpuid::of(&supported, index, self.vcpus.len() as u8, tsc_deadline);
            let cpuid =
                CpuId::from_entries(&entries).expect("a few more than KVM's own list, far below the limit");
            crate::bus::lock(vcpu).set_cpuid2(&cpuid).map_err(VmmError::kvm("setting CPUID"))?;
        }
        Ok(())
    }

    /// Describes the CPUs that the vCPUs were given, while they do not run. A few hundred calls: never in a
    /// pause.
    pub(crate) fn describe_cpu(&self) -> Result<Section, VmmError> {
        let context = self.save_context()?;
        Ok(compat::platform_section(&crate::bus::lock(&self.vcpus[0]), context)?)
    }

    /// What saving needs to know. First called once the vCPUs have their CPUID, while they do not run.
    pub(crate) fn save_context(&self) -> Result<&SaveContext, VmmError> {
        if let Some(context) = self.save_context.get() {
            return Ok(context);
        }
        let context = SaveContext::probe(&self.kvm, &self.locked_vcpus(), &self.caps, self.host_tsc_khz)?;
        Ok(self.save_context.get_or_init(|| context))
    }

    /// All vCPUs, which do not run.
    pub(crate) fn locked_vcpus(&self) -> Vec<MutexGuard<'_, VcpuFd>> {
        self.vcpus.iter().map(crate::bus::lock).collect()
    }
}

impl Drop for Platform {
    fn drop(&mut self) {
        self.gate.end();
        for thread in self.threads.drain(..) {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
        self.status.gone();
    }
}

fn add_slots(vm: &VmFd, memory: &Ram) -> Result<Vec<Slot>, VmmError> {
    let mut slots = Vec::new();
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let (guest_address, bytes) = (region.start_addr().0, region.len());
        let host_address = region.as_ptr() as u64;
        let kvm_region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: guest_address,
            memory_size: bytes,
            userspace_addr: host_address,
        };
        // SAFETY: the range is the region's mapping, which the machine keeps as long as the VM (both it and
        // the dirty log own `memory`).
        unsafe { vm.set_user_memory_region(kvm_region) }.map_err(VmmError::kvm("adding a memory slot"))?;
        slots.push(Slot { slot, region: Region { guest_address, bytes }, host_address });
    }
    Ok(slots)
}
