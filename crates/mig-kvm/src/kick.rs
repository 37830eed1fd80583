//! Running vCPUs, and getting all of them out of KVM_RUN at once.
//!
//! Invariants, all under the gate's lock: a vCPU's `immediate_exit` is 1 exactly while the gate is not open or the
//! vCPU is held; a loop counts as running from before it could enter KVM_RUN until KVM_RUN has answered EINTR with the
//! gate shut for it (or the loop ended).
//!
//! Why no vCPU can be missed: closing first sets `immediate_exit` of every vCPU and then signals its thread.
//! KVM looks at `immediate_exit` on entry and at pending signals before the guest runs. A thread that is
//! not in KVM_RUN yet finds `immediate_exit` set; one that passed that look has the signal pending. The
//! handler itself does nothing.
//!
//! Why a port or MMIO access is never left half done: KVM completes the pending access at the start of
//! KVM_RUN, before it looks at `immediate_exit` (kvm_arch_vcpu_ioctl_run in arch/x86/kvm/x86.c), so EINTR
//! says that it is completed. If completing leads to a further exit, that one is handled first.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::errno;
use vmm_sys_util::signal::{SIGRTMIN, create_sigset, register_signal_handler};

use crate::error::{Call, KvmError};

/// What a vCPU's loop does after an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Runs on.
    Continue,
    /// Ends this vCPU's loop: the guest is over, or cannot go on.
    Stop,
}

/// Why a vCPU's loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its handler said [`Flow::Stop`].
    Stopped,
    /// [`Gate::end`] was called.
    Gate,
}

/// The VMM's side of a vCPU's exits. Called on the vCPU's thread, between two KVM_RUN.
pub trait ExitHandler {
    /// Handles an exit; reads fill the data it carries.
    fn exit(&mut self, exit: VcpuExit<'_>) -> Flow;

    /// Handles KVM_EXIT_INTERNAL_ERROR: KVM met an instruction it cannot emulate, as a rule. The suberror
    /// and the instruction's bytes are in the vCPU's `kvm_run`.
    fn emulation_failed(&mut self, vcpu: &mut VcpuFd) -> Flow;
}

/// Lets vCPUs run, or not: all of them alike.
pub struct Gate {
    state: Mutex<State>,
    /// The phase changed.
    phase: Condvar,
    /// A loop stopped running.
    idle: Condvar,
    /// The last loop went through the open gate.
    entry: Condvar,
    signal: libc::c_int,
}

struct State {
    phase: Phase,
    loops: Vec<Option<Loop>>,
    /// Which vCPUs are not let in although the gate is open.
    held: Vec<bool>,
    /// When the last loop went through the open gate.
    entered: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Closed,
    Open,
    Ended,
}

/// One vCPU's loop, registered by its thread while it is in [`Gate::drive`].
struct Loop {
    thread: libc::pthread_t,
    run: RunPage,
    running: bool,
}

impl Gate {
    /// A closed gate for this many vCPUs.
    ///
    /// # Errors
    /// When the kick's signal handler cannot be installed.
    pub fn new(vcpus: usize) -> Result<Self, KvmError> {
        let loops = (0..vcpus).map(|_| None).collect();
        let state = State { phase: Phase::Closed, loops, held: vec![false; vcpus], entered: None };
        let (phase, idle, entry) = (Condvar::new(), Condvar::new(), Condvar::new());
        Ok(Self { state: Mutex::new(state), phase, idle, entry, signal: kick_signal()? })
    }

    /// Lets every vCPU run.
    pub fn open(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            state.phase = Phase::Open;
            state.entered = None;
            state.let_in();
            self.phase.notify_all();
        }
    }

    /// Holds the vCPUs that `which` names, by their index, out of KVM_RUN until [`Gate::release`], and lets the others
    /// run as far as the gate is open. Returns before they are out.
    pub fn hold(&self, which: impl Fn(usize) -> bool) {
        let mut state = self.lock();
        for index in 0..state.held.len() {
            state.held[index] = which(index);
        }
        state.let_in();
        if state.phase == Phase::Open {
            self.kick(&state, |index| state.held[index]);
        }
        self.phase.notify_all();
    }

    /// Holds no vCPU any more.
    pub fn release(&self) {
        self.hold(|_| false);
    }

    /// Stops every vCPU and returns when each is proven out of KVM_RUN with no access half done, and has
    /// released its `VcpuFd`: how long that took. Loops that ended or never began are out already.
    ///
    /// # Errors
    /// [`KvmError::NotPaused`] after `patience`, naming a vCPU that is still in; the gate stays closed, and
    /// may be opened again.
    pub fn close(&self, patience: Duration) -> Result<Duration, KvmError> {
        let start = Instant::now();
        let mut state = self.lock();
        if state.phase == Phase::Open {
            state.phase = Phase::Closed;
            self.kick(&state, |_| true);
        }
        loop {
            let Some(vcpu) = state.loops.iter().position(|l| l.as_ref().is_some_and(|l| l.running)) else {
                return Ok(start.elapsed());
            };
            let Some(left) = patience.checked_sub(start.elapsed()).filter(|l| !l.is_zero()) else {
                return Err(KvmError::NotPaused { vcpu, patience });
            };
            state = self.idle.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// When the last vCPU went through the gate since it was opened; waits for that as long as `patience`. `None`
    /// if not all have by then, and where there are none.
    pub fn await_entry(&self, patience: Duration) -> Option<Instant> {
        let waiting = |state: &mut State| state.phase == Phase::Open && state.entered.is_none();
        let waited = self.entry.wait_timeout_while(self.lock(), patience, waiting);
        waited.unwrap_or_else(PoisonError::into_inner).0.entered
    }

    /// The processor time that each vCPU's thread has used so far, that of its exits included; zero for one whose loop
    /// does not run.
    pub fn processor_times(&self) -> Vec<Duration> {
        let state = self.lock();
        // while they are registered their threads live, and they leave only under this lock
        state.loops.iter().map(|l| l.as_ref().map_or(Duration::ZERO, |l| thread_time(l.thread))).collect()
    }

    /// Whether vCPUs are to run: for a handler that waits for something, which must not hold up a close.
    pub fn is_open(&self) -> bool {
        self.lock().phase == Phase::Open
    }

    /// Has every loop return, now and for ever. Does not wait for them.
    pub fn end(&self) {
        let mut state = self.lock();
        state.phase = Phase::Ended;
        self.kick(&state, |_| true);
        self.phase.notify_all();
    }

    /// Runs vCPU `index` whenever the gate is open, until the gate ends or the handler stops it. To be
    /// called on the vCPU's own thread. The vCPU is locked while it runs and free while the gate is closed,
    /// for a coordinator that saves or restores it.
    ///
    /// If the handler panics, the vCPU counts as out of KVM_RUN and its mutex is poisoned.
    ///
    /// # Errors
    /// KVM_RUN's own failure, or [`KvmError::NoSuchVcpu`].
    pub fn drive(
        &self,
        index: usize,
        vcpu: &Mutex<VcpuFd>,
        handler: &mut impl ExitHandler,
    ) -> Result<Ended, KvmError> {
        unblock(self.signal)?;
        let run = RunPage::map(&vcpu.lock().unwrap_or_else(PoisonError::into_inner))?;
        let registration = self.register(index, run)?;
        while registration.wait_until_open() {
            let mut fd = vcpu.lock().unwrap_or_else(PoisonError::into_inner);
            let outcome = self.run_while_open(index, &mut fd, handler);
            drop(fd);
            registration.set_running(false);
            if let Some(ended) = outcome? {
                return Ok(ended);
            }
        }
        Ok(Ended::Gate)
    }

    /// `None` when the gate is no longer open for it.
    fn run_while_open(
        &self,
        index: usize,
        fd: &mut VcpuFd,
        handler: &mut impl ExitHandler,
    ) -> Result<Option<Ended>, KvmError> {
        loop {
            let flow = match fd.run() {
                Ok(VcpuExit::InternalError) => handler.emulation_failed(fd),
                Ok(VcpuExit::Intr) => Flow::Continue,
                Ok(exit) => handler.exit(exit),
                Err(e) if e.errno() == libc::EINTR => {
                    if !self.lock().lets_in(index) {
                        return Ok(None);
                    }
                    Flow::Continue
                }
                // A vCPU that waits for its start-up signal, woken for another reason.
                Err(e) if e.errno() == libc::EAGAIN => Flow::Continue,
                Err(e) => return Err(e).call("KVM_RUN"),
            };
            if flow == Flow::Stop {
                return Ok(Some(Ended::Stopped));
            }
        }
    }

    fn register(&self, index: usize, run: RunPage) -> Result<Registration<'_>, KvmError> {
        let mut state = self.lock();
        let shut = !state.lets_in(index);
        let place = state.loops.get_mut(index).filter(|place| place.is_none());
        let place = place.ok_or(KvmError::NoSuchVcpu { vcpu: index })?;
        run.set_immediate_exit(shut);
        // SAFETY: has no preconditions.
        let thread = unsafe { libc::pthread_self() };
        *place = Some(Loop { thread, run, running: false });
        Ok(Registration { gate: self, index })
    }

    /// Gets those that `which` names out.
    fn kick(&self, state: &State, which: impl Fn(usize) -> bool) {
        let loops = || {
            state.loops.iter().enumerate().filter(|(index, _)| which(*index)).filter_map(|(_, l)| l.as_ref())
        };
        for running in loops() {
            running.run.set_immediate_exit(true);
        }
        for running in loops().filter(|l| l.running) {
            // SAFETY: the thread is alive: it removes itself from `loops`, under the lock we hold, before it
            // leaves `drive`.
            unsafe { libc::pthread_kill(running.thread, self.signal) };
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Whether a vCPU may run; one that there is not may not.
    fn lets_in(&self, index: usize) -> bool {
        self.phase == Phase::Open && self.held.get(index) == Some(&false)
    }

    /// Has KVM_RUN take those that may run.
    fn let_in(&self) {
        for (index, l) in self.loops.iter().enumerate() {
            if let Some(l) = l.as_ref().filter(|_| self.lets_in(index)) {
                l.run.set_immediate_exit(false);
            }
        }
    }
}

/// A loop's presence at the gate, ended by leaving `drive` in whatever way, a panic too.
struct Registration<'a> {
    gate: &'a Gate,
    index: usize,
}

impl Registration<'_> {
    /// Marks the loop as running once the gate is open; `false` when the gate ended instead.
    fn wait_until_open(&self) -> bool {
        let mut state = self.gate.lock();
        while state.phase != Phase::Ended && !state.lets_in(self.index) {
            state = self.gate.phase.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let open = state.phase == Phase::Open;
        if let Some(entry) = &mut state.loops[self.index] {
            entry.running = open;
        }
        if open && state.entered.is_none() && state.loops.iter().flatten().all(|l| l.running) {
            state.entered = Some(Instant::now());
            self.gate.entry.notify_all();
        }
        open
    }

    fn set_running(&self, running: bool) {
        if let Some(entry) = &mut self.gate.lock().loops[self.index] {
            entry.running = running;
        }
        self.gate.idle.notify_all();
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        self.gate.lock().loops[self.index] = None;
        self.gate.idle.notify_all();
    }
}

/// A vCPU's shared `kvm_run` page, mapped a second time for its `immediate_exit` alone, which another thread
/// must be able to set while the `VcpuFd` is locked.
struct RunPage {
    page: NonNull<libc::c_void>,
}

// SAFETY: the page is accessed by atomic operations only.
unsafe impl Send for RunPage {}

const RUN_PAGE_BYTES: usize = 4096;

impl RunPage {
    fn map(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        // SAFETY: a new shared mapping of the first page of the vCPU's `kvm_run`, which is at least that long.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        if page == libc::MAP_FAILED {
            return Err(errno::Error::last()).call("mapping kvm_run");
        }
        Ok(Self { page: NonNull::new(page).expect("the kernel maps nothing at address 0 unasked") })
    }

    fn set_immediate_exit(&self, on: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte lies in the page, which is mapped while `self` lives; this process writes it
        // through this atomic only (kvm-ioctls' own mapping is at another address and not asked to).
        let byte = unsafe { AtomicU8::from_ptr(self.page.as_ptr().cast::<u8>().add(offset)) };
        byte.store(u8::from(on), Ordering::SeqCst);
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`, unmapped once.
        unsafe { libc::munmap(self.page.as_ptr(), RUN_PAGE_BYTES) };
    }
}

/// The processor time that a living thread has used; zero where the host does not say.
fn thread_time(thread: libc::pthread_t) -> Duration {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the caller vouches for the thread; both calls write what they are given a pointer to.
    let known = unsafe {
        libc::pthread_getcpuclockid(thread, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    let whole = u64::try_from(time.tv_sec).unwrap_or(0);
    let rest = u32::try_from(time.tv_nsec).unwrap_or(0);
    if known { Duration::new(whole, rest) } else { Duration::ZERO }
}

/// The signal that gets a thread out of KVM_RUN; installs its handler, which has nothing to do.
fn kick_signal() -> Result<libc::c_int, KvmError> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static INSTALLED: OnceLock<Result<libc::c_int, errno::Error>> = OnceLock::new();
    let install = || {
        // Not the first: debuggers and libraries like SIGRTMIN itself.
        let signal = SIGRTMIN() + 5;
        // Without SA_RESTART.
        register_signal_handler(signal, ignore).map(|()| signal)
    };
    (*INSTALLED.get_or_init(install)).call("installing the kick's signal handler")
}

fn unblock(signal: libc::c_int) -> Result<(), KvmError> {
    let set = create_sigset(&[signal]).call("sigemptyset")?;
    // SAFETY: a valid set, and no old one asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        code => Err(errno::Error::new(code)).call("pthread_sigmask"),
    }
}

#[cfg(test)]
mod tests;
