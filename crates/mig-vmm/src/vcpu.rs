//! A vCPU's thread: what it does between two KVM_RUN.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVM_SYSTEM_EVENT_RESET, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use mig_kvm::{ExitHandler, Flow, Gate, Rings};
use vmm_sys_util::errno;

use crate::bus::{Bus, lock};
use crate::devices::serial;
use crate::fixup;
use crate::monitor::{End, Status};

/// How soon a vCPU that waits to print sees that it is to stop.
const PRINT_INTERVAL: Duration = Duration::from_millis(1);

/// What a vCPU's thread works with.
pub(crate) struct VcpuThread {
    pub(crate) index: usize,
    pub(crate) fds: Arc<[Mutex<VcpuFd>]>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) status: Arc<Status>,
    pub(crate) rings: Option<Arc<Rings>>,
}

impl VcpuThread {
    /// Runs the vCPU whenever the gate is open, until the guest or the machine ends.
    pub(crate) fn run(self) {
        let fd = &self.fds[self.index];
        let panic = EndOnPanic(&self);
        // On its own line: the lock must be free again for the gate.
        let run = RunPage::map(&lock(fd));
        let result = run.map_err(|e| e.to_string()).and_then(|run| {
            let mut exits = Exits { thread: &self, run };
            self.gate.drive(self.index, fd, &mut exits).map_err(|e| match std::error::Error::source(&e) {
                Some(source) => format!("{e}: {source}"),
                None => e.to_string(),
            })
        });
        std::mem::forget(panic);
        if let Err(e) = result {
            self.end(End::Error(format!("vCPU {}: {e}", self.index)));
        }
    }

    /// Waits while the console is full, but not when the vCPU is to stop: then it prints beyond.
    fn wait_to_print(&self) {
        while !self.bus.console.wait_room(PRINT_INTERVAL) && self.gate.is_open() {}
    }

    /// Ends the guest, on all vCPUs.
    fn end(&self, end: End) {
        self.status.end(end);
        self.gate.end();
    }
}

struct EndOnPanic<'a>(&'a VcpuThread);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        self.0.end(End::Error(format!("the thread of vCPU {} panicked", self.0.index)));
    }
}

struct Exits<'a> {
    thread: &'a VcpuThread,
    run: RunPage,
}

impl Exits<'_> {
    fn stop(&self, end: End) -> Flow {
        self.thread.end(end);
        Flow::Stop
    }

    /// Waits for the log's lock at most, which nobody holds who waits for this vCPU to stop.
    fn make_room(&self) -> Flow {
        match self.thread.rings.as_ref().map(|rings| rings.make_room(self.thread.index)) {
            Some(Ok(())) => Flow::Continue,
            Some(Err(error)) => self.give_up(format_args!("its dirty ring is full: {error}")),
            None => self.give_up("its dirty ring is full, and it has none"),
        }
    }

    fn give_up(&self, reason: impl std::fmt::Display) -> Flow {
        self.stop(End::Error(format!("vCPU {}: {reason}", self.thread.index)))
    }
}

impl ExitHandler for Exits<'_> {
    fn exit(&mut self, exit: VcpuExit<'_>) -> Flow {
        match exit {
            VcpuExit::IoOut(port, data) => {
                let width = self.run.io_width();
                // A wide access from a port below reaches it too.
                if serial::FIRST_PORT.checked_sub(port).is_some_and(|above| usize::from(above) < width) {
                    self.thread.wait_to_print();
                }
                match self.thread.bus.out(port, width, data) {
                    None => Flow::Continue,
                    Some(end) => self.stop(end),
                }
            }
            VcpuExit::IoIn(port, data) => {
                self.thread.bus.input(port, self.run.io_width(), data);
                Flow::Continue
            }
            VcpuExit::MmioRead(_, data) => {
                data.fill(0xff);
                Flow::Continue
            }
            VcpuExit::MmioWrite(..) => Flow::Continue,
            VcpuExit::Shutdown => self.stop(End::Shutdown),
            VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => self.stop(End::Reset),
            VcpuExit::SystemEvent(..) => self.stop(End::Shutdown),
            VcpuExit::FailEntry(reason, _) => {
                self.give_up(format_args!("KVM cannot enter the guest (reason {reason:#x})"))
            }
            VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL) => self.make_room(),
            other => self.give_up(format_args!("KVM exited with {other:?}, which nobody asked for")),
        }
    }

    fn emulation_failed(&mut self, vcpu: &mut VcpuFd) -> Flow {
        match fixup::complete(vcpu) {
            Ok(()) => Flow::Continue,
            Err(reason) => self.give_up(reason),
        }
    }
}

/// The vCPU's shared `kvm_run` page, mapped once more: kvm-ioctls hands out the data of a port access without
/// the width of its items, which tells a string instruction from a wide access.
struct RunPage {
    page: NonNull<libc::c_void>,
}

const RUN_PAGE_BYTES: usize = 4096;

impl RunPage {
    fn map(vcpu: &VcpuFd) -> Result<Self, errno::Error> {
        // SAFETY: a new mapping of the first page of the vCPU's `kvm_run`, which is at least that long.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_PAGE_BYTES,
                libc::PROT_READ,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(errno::Error::last());
        }
        Ok(Self { page: NonNull::new(page).expect("the kernel maps nothing at address 0 unasked") })
    }

    /// Bytes in an item of the port access under way: 1, 2 or 4.
    fn io_width(&self) -> usize {
        let run = self.page.as_ptr().cast::<kvm_run>();
        // SAFETY: the page is mapped while `self` lives and holds this field; KVM writes it during KVM_RUN
        // only, which this thread is not in.
        let width = unsafe { std::ptr::read_volatile(&raw const (*run).__bindgen_anon_1.io.size) };
        usize::from(width).max(1)
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, unmapped once.
        unsafe { libc::munmap(self.page.as_ptr(), RUN_PAGE_BYTES) };
    }
}
