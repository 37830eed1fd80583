//! The smallest machine a built-in guest runs on, for the tests beside it.

#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_HALTED, kvm_irqchip, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{EXIT_PORT, Guest, HEARTBEAT_PORT, Memory};

/// A running guest.
pub(super) struct Machine {
    pub(super) memory: Memory,
    pub(super) vm: VmFd,
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    vcpus: Vec<Mutex<VcpuFd>>,
    pausing: AtomicBool,
    ending: AtomicBool,
    beats: AtomicU64,
    ended: AtomicBool,
    /// Means something once it has ended.
    code: AtomicU8,
    serial: Mutex<Serial>,
}

/// A 16550 that only remembers.
#[derive(Default)]
struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
    text: String,
}

impl Serial {
    fn access(&mut self, register: usize) -> Option<&mut u8> {
        match register {
            0 | 1 if self.registers[3] & 0x80 != 0 => Some(&mut self.divisor[register]),
            0 | 2 | 5 | 6 => None,
            _ => Some(&mut self.registers[register]),
        }
    }

    fn write(&mut self, register: usize, value: u8) {
        match self.access(register) {
            Some(place) => *place = value,
            None if register == 0 => self.text.push(value.into()),
            None => {}
        }
    }

    fn read(&mut self, register: usize) -> u8 {
        self.access(register).map_or(if register == 5 { 0x60 } else { 0 }, |place| *place)
    }
}

/// Whether there is a KVM to test on; a machine that must have one fails without.
pub(super) fn kvm_exists() -> bool {
    let exists = std::path::Path::new("/dev/kvm").exists();
    if !exists {
        assert!(std::env::var_os("MIG_REQUIRE_KVM").is_none_or(|v| v != "1"), "no /dev/kvm");
        eprintln!("SKIPPED: no /dev/kvm");
    }
    exists
}

/// Changes the bytes of one of KVM's interrupt controllers.
pub(super) fn change_irqchip(vm: &VmFd, chip_id: u32, change: impl FnOnce(&mut [u8; 512])) {
    let mut bytes = [0_u8; 512];
    let mut chip = kvm_irqchip { chip_id, ..Default::default() };
    vm.get_irqchip(&mut chip).unwrap();
    // SAFETY: KVM copies the whole union out, and bytes are always valid.
    bytes.iter_mut().zip(unsafe { chip.chip.dummy }).for_each(|(to, from)| *to = from as u8);
    change(&mut bytes);
    chip.chip.dummy = bytes.map(|byte| byte as _);
    vm.set_irqchip(&chip).unwrap();
}

impl Machine {
    /// Starts the guest called `guest` in `regions` (address and bytes) of memory.
    pub(super) fn start(guest: &str, regions: &[(u64, usize)], vcpus: u8) -> Self {
        let guest: Guest = guest.parse().unwrap();
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        vm.create_pit2(kvm_pit_config::default()).unwrap();
        let ranges: Vec<_> = regions.iter().map(|&(start, size)| (GuestAddress(start), size)).collect();
        let memory = Memory::from_ranges(&ranges).unwrap();
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: memory.get_host_address(region.start_addr()).unwrap() as u64,
            };
            // SAFETY: the memory is a mapping that lives as long as the VM, in one `Machine`.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        let fds: Vec<VcpuFd> = (0..vcpus).map(|vcpu| vm.create_vcpu(vcpu.into()).unwrap()).collect();
        let tsc_khz = fds[0].get_tsc_khz().unwrap();
        let entry = guest.load(&memory, vcpus, tsc_khz).unwrap();
        for (id, (fd, entry)) in (0..).zip(fds.iter().zip(&entry.vcpus)) {
            let mut cpuid = cpuid.clone();
            for leaf in cpuid.as_mut_slice() {
                match leaf.function {
                    1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | id << 24,
                    0xb | 0x1f => leaf.edx = id,
                    _ => {}
                }
            }
            fd.set_cpuid2(&cpuid).unwrap();
            let mut sregs = fd.get_sregs().unwrap();
            entry.apply(&mut sregs);
            fd.set_sregs(&sregs).unwrap();
            fd.set_regs(&entry.regs).unwrap();
            fd.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 }).unwrap();
        }
        extern "C" fn interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), interrupt).unwrap();
        let shared = Arc::new(Shared {
            vcpus: fds.into_iter().map(Mutex::new).collect(),
            pausing: AtomicBool::new(false),
            ending: AtomicBool::new(false),
            beats: AtomicU64::new(0),
            code: AtomicU8::new(0),
            ended: AtomicBool::new(false),
            serial: Mutex::default(),
        });
        let threads = (0..usize::from(vcpus))
            .map(|vcpu| {
                let shared = Arc::clone(&shared);
                std::thread::spawn(move || shared.run(vcpu))
            })
            .collect();
        Self { memory, vm, shared, threads }
    }

    pub(super) fn beats(&self) -> u64 {
        self.shared.beats.load(Ordering::Relaxed)
    }

    /// What the guest wrote to COM1.
    pub(super) fn text(&self) -> String {
        self.shared.serial.lock().unwrap().text.clone()
    }

    /// The code the guest ended with, if it has.
    pub(super) fn ended(&self) -> Option<u8> {
        let ended = self.shared.ended.load(Ordering::Acquire);
        ended.then(|| self.shared.code.load(Ordering::Relaxed))
    }

    /// Runs on until the guest ends; what it ended with.
    pub(super) fn wait_for_end(&self) -> u8 {
        self.wait_until("the guest ends", || self.ended().is_some());
        self.ended().unwrap()
    }

    /// Runs on until `condition` holds.
    pub(super) fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{what}: not within a minute; {}",
                self.text()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Runs on until the guest has beaten `beats` times more, and is well.
    pub(super) fn run_for_beats(&self, beats: u64) {
        let start = self.beats();
        self.wait_until("heartbeats", || self.ended().is_some() || self.beats() >= start + beats);
        assert_eq!(self.ended(), None, "{}", self.text());
    }

    /// Calls `f` while no vCPU runs and none has an access pending.
    pub(super) fn paused<R>(&self, f: impl FnOnce(&mut [MutexGuard<'_, VcpuFd>], &Memory) -> R) -> R {
        self.shared.pausing.store(true, Ordering::SeqCst);
        let mut guards: Vec<_> =
            self.shared.vcpus.iter().zip(&self.threads).map(|(vcpu, thread)| stopped(vcpu, thread)).collect();
        for vcpu in &mut guards {
            vcpu.set_kvm_immediate_exit(1);
            let _ = vcpu.run();
            vcpu.set_kvm_immediate_exit(0);
        }
        let result = f(&mut guards, &self.memory);
        drop(guards);
        self.shared.pausing.store(false, Ordering::SeqCst);
        result
    }

    /// Calls `f` while no vCPU runs and the one asked for halts between two ticks.
    pub(super) fn halted(&self, vcpu: usize, mut f: impl FnMut(&VmFd, &mut VcpuFd)) {
        self.wait_until("the vCPU halts", || {
            self.paused(|vcpus, _| {
                let halts = vcpus[vcpu].get_mp_state().unwrap().mp_state == KVM_MP_STATE_HALTED;
                if halts {
                    f(&self.vm, &mut vcpus[vcpu]);
                }
                halts
            })
        });
    }

    /// Changes the serial port's registers behind the guest's back.
    pub(super) fn change_serial(&self, register: usize, value: u8) {
        self.shared.serial.lock().unwrap().registers[register] = value;
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::SeqCst);
        for (vcpu, thread) in self.shared.vcpus.iter().zip(&self.threads) {
            drop(stopped(vcpu, thread));
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn stopped<'a>(vcpu: &'a Mutex<VcpuFd>, thread: &JoinHandle<()>) -> MutexGuard<'a, VcpuFd> {
    loop {
        match vcpu.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(guard)) => return guard.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let _ = thread.kill(SIGRTMIN());
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

impl Shared {
    fn run(&self, vcpu: usize) {
        while !self.ending.load(Ordering::SeqCst) && !self.ended.load(Ordering::SeqCst) {
            if self.pausing.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            let mut vcpu = self.vcpus[vcpu].lock().unwrap();
            while !self.pausing.load(Ordering::SeqCst) && !self.ending.load(Ordering::SeqCst) {
                let failure = match vcpu.run() {
                    Ok(VcpuExit::IoOut(port, data)) => {
                        match port {
                            HEARTBEAT_PORT => {
                                self.beats.fetch_add(1, Ordering::Relaxed);
                            }
                            EXIT_PORT => {
                                self.code.store(data[0], Ordering::Relaxed);
                                self.ended.store(true, Ordering::Release);
                                return;
                            }
                            0x3f8..0x400 => {
                                self.serial.lock().unwrap().write(usize::from(port - 0x3f8), data[0]);
                            }
                            _ => {}
                        }
                        continue;
                    }
                    Ok(VcpuExit::IoIn(port @ 0x3f8..0x400, data)) => {
                        data[0] = self.serial.lock().unwrap().read(usize::from(port - 0x3f8));
                        continue;
                    }
                    Ok(other) => format!("{other:?}"),
                    Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => continue,
                    Err(error) => error.to_string(),
                };
                let regs = vcpu.get_regs().unwrap();
                // SAFETY: reading a union of plain integers.
                let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
                let text = format!("vCPU stopped: {failure}; {regs:x?}; {:x?}", &internal.data[..4]);
                self.serial.lock().unwrap().text.push_str(&text);
                self.code.store(0xff, Ordering::Relaxed);
                self.ended.store(true, Ordering::Release);
                return;
            }
        }
    }
}
