use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::mpsc;
use std::thread;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{CODE, Machine};

const PATIENCE: Duration = Duration::from_secs(20);
const COUNTERS: u64 = 0x4000;

/// Answers every port read with a count and lets a test look at, or hold up, each exit.
struct Handler<F: FnMut(u64) -> Flow> {
    exits: u64,
    on_exit: F,
}

impl<F: FnMut(u64) -> Flow> ExitHandler for Handler<F> {
    fn exit(&mut self, exit: VcpuExit<'_>) -> Flow {
        self.exits += 1;
        match exit {
            VcpuExit::IoIn(_, data) => data.fill(self.exits as u8),
            VcpuExit::IoOut(..) => {}
            other => panic!("unexpected exit {other:?}"),
        }
        (self.on_exit)(self.exits)
    }

    fn emulation_failed(&mut self, _: &mut VcpuFd) -> Flow {
        panic!("these guests are emulated");
    }
}

fn handler<F: FnMut(u64) -> Flow>(on_exit: F) -> Handler<F> {
    Handler { exits: 0, on_exit }
}

/// again: inc dword [edi]; jmp again
const COUNTING: [u8; 4] = [0xff, 0x07, 0xeb, 0xfc];
/// again: in al, 0x30; mov [edi], al; jmp again
const READING: [u8; 6] = [0xe4, 0x30, 0x88, 0x07, 0xeb, 0xfa];

struct Guest {
    machine: Machine,
    vcpus: Arc<Vec<Mutex<VcpuFd>>>,
    gate: Arc<Gate>,
}

impl Guest {
    fn new(vcpus: u64, code: &[u8]) -> Option<Self> {
        let mut machine = Machine::new(vcpus)?;
        machine.load(code);
        for (index, vcpu) in machine.vcpus.iter().enumerate() {
            let mut regs = vcpu.get_regs().unwrap();
            (regs.rip, regs.rdi) = (CODE, COUNTERS + 64 * index as u64);
            vcpu.set_regs(&regs).unwrap();
        }
        let vcpus = Arc::new(machine.vcpus.drain(..).map(Mutex::new).collect::<Vec<_>>());
        let gate = Arc::new(Gate::new(vcpus.len()).unwrap());
        Some(Self { machine, vcpus, gate })
    }

    fn drive<F: FnMut(u64) -> Flow + Send + 'static>(
        &self,
        index: usize,
        on_exit: F,
    ) -> thread::JoinHandle<Result<Ended, KvmError>> {
        let (gate, vcpus) = (self.gate.clone(), self.vcpus.clone());
        thread::spawn(move || gate.drive(index, &vcpus[index], &mut handler(on_exit)))
    }

    fn counters(&self) -> Vec<u32> {
        let read = |i: usize| self.machine.memory.read_obj(GuestAddress(COUNTERS + 64 * i as u64)).unwrap();
        (0..self.vcpus.len()).map(read).collect()
    }

    fn wait_for_progress(&self, since: &[u32]) {
        while self.counters().iter().zip(since).any(|(now, then)| now == then) {
            thread::yield_now();
        }
    }
}

#[test]
fn a_closed_gate_means_that_no_vcpu_runs_and_every_vcpu_is_free_to_be_saved() {
    let Some(guest) = Guest::new(4, &COUNTING) else { return };
    let loops: Vec<_> = (0..4).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    for _ in 0..30 {
        let before = guest.counters();
        let opened = Instant::now();
        guest.gate.open();
        guest.wait_for_progress(&before);
        assert!(guest.gate.await_entry(PATIENCE).is_some_and(|at| at >= opened), "it knows when all were in");
        guest.gate.close(PATIENCE).unwrap();
        let stopped = guest.counters();
        for vcpu in guest.vcpus.iter() {
            vcpu.try_lock().expect("the loop has let go of it").get_regs().unwrap();
        }
        thread::sleep(Duration::from_millis(2));
        assert_eq!(guest.counters(), stopped);
    }
    guest.gate.end();
    for ended in loops {
        assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate);
    }
}

#[test]
fn a_held_vcpu_stands_still_while_the_others_run_and_goes_on_when_it_is_released() {
    let Some(guest) = Guest::new(3, &COUNTING) else { return };
    let loops: Vec<_> = (0..3).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    guest.gate.open();
    guest.wait_for_progress(&guest.counters());
    for turn in 0..30 {
        let held = turn % 3;
        guest.gate.hold(|index| index == held);
        // it is out once its mutex is free
        let patience = Instant::now() + PATIENCE;
        while guest.vcpus[held].try_lock().is_err() {
            assert!(Instant::now() < patience, "it is not held");
            thread::yield_now();
        }
        let then = guest.counters();
        let others = |counters: &[u32]| [counters[(held + 1) % 3], counters[(held + 2) % 3]];
        while others(&guest.counters()).iter().zip(others(&then)).any(|(now, then)| *now == then) {
            thread::yield_now();
        }
        assert_eq!(guest.counters()[held], then[held]);
        guest.gate.release();
        guest.wait_for_progress(&guest.counters());
    }
    // held as it opens, closed while it is held, and ended too
    guest.gate.hold(|_| true);
    guest.gate.close(PATIENCE).unwrap();
    let stopped = guest.counters();
    guest.gate.open();
    thread::sleep(Duration::from_millis(5));
    assert_eq!(guest.counters(), stopped, "an open gate does not let in who is held");
    guest.gate.end();
    loops.into_iter().for_each(|ended| assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate));
}

#[test]
fn a_vcpu_uses_processor_time_while_it_runs_and_none_while_it_is_held() {
    let Some(guest) = Guest::new(2, &COUNTING) else { return };
    assert_eq!(guest.gate.processor_times(), [Duration::ZERO; 2]);
    let loops: Vec<_> = (0..2).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    guest.gate.open();
    let patience = Instant::now() + PATIENCE;
    while guest.gate.processor_times().iter().any(|time| *time < Duration::from_millis(10)) {
        assert!(Instant::now() < patience, "{:?}", guest.gate.processor_times());
        thread::sleep(Duration::from_millis(1));
    }
    guest.gate.close(PATIENCE).unwrap();
    thread::sleep(Duration::from_millis(2));
    let then = guest.gate.processor_times();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.gate.processor_times(), then);
    guest.gate.end();
    loops.into_iter().for_each(|ended| assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate));
}

#[test]
fn a_throttled_guest_is_slower_and_has_its_speed_back_at_once() {
    let Some(guest) = Guest::new(1, &COUNTING) else { return };
    let ended = guest.drive(0, |_| Flow::Continue);
    let mut throttler = crate::Throttler::new(guest.gate.clone());
    guest.gate.open();
    let mut counted = |percent| {
        throttler.set(mig::policy::Throttle::of_percent(percent)).unwrap();
        let (before, began) = (guest.counters()[0], Instant::now());
        thread::sleep(Duration::from_millis(300));
        f64::from(guest.counters()[0].wrapping_sub(before)) / began.elapsed().as_secs_f64()
    };
    counted(0);
    let (mut free, mut slow) = (0.0, 0.0);
    for _ in 0..5 {
        free += counted(0);
        slow += counted(90);
    }
    // a tenth is right; a busy host takes from both alike
    assert!(slow < free / 2.0, "{slow} to {free}");
    drop(throttler);
    guest.wait_for_progress(&guest.counters());
    guest.gate.end();
    assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate);
}

/// Two vCPUs that count, slowed by 90 % by the pages that they are said to have written, until `enough` of this holds: for
/// how long they were slowed, and how often each was seen held.
fn slowed_by_pages(
    pages: impl Fn([u32; 2]) -> Vec<u64> + Send + Sync + 'static,
    enough: impl Fn(Duration, [u32; 2]) -> bool,
) {
    let Some(guest) = Guest::new(2, &COUNTING).map(Arc::new) else { return };
    let loops: Vec<_> = (0..2).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    let counting = guest.clone();
    let counts = move || pages([0, 1].map(|i| counting.counters()[i]));
    let mut throttler = crate::Throttler::by_pages(guest.gate.clone(), Box::new(counts));
    guest.gate.open();
    guest.wait_for_progress(&guest.counters());
    throttler.set(mig::policy::Throttle::of_percent(90)).unwrap();
    let (began, mut seen) = (Instant::now(), [0; 2]);
    while !enough(began.elapsed(), seen) {
        assert!(began.elapsed() < PATIENCE, "{seen:?}");
        let held = guest.gate.lock().held.clone();
        seen = [0, 1].map(|i: usize| seen[i] + u32::from(held[i]));
        thread::sleep(Duration::from_millis(1));
    }
    drop(throttler);
    guest.wait_for_progress(&guest.counters());
    guest.gate.end();
    loops.into_iter().for_each(|ended| assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate));
}

#[test]
fn a_vcpu_that_does_not_write_is_not_held_with_the_one_that_does() {
    let enough = |_, seen: [u32; 2]| {
        assert_eq!(seen[1], 0);
        seen[0] >= 50
    };
    slowed_by_pages(|[first, _]| vec![first.into(), 0], enough);
}

#[test]
fn a_guest_that_writes_nothing_is_not_held() {
    let enough = |slowed, seen: [u32; 2]| {
        assert_eq!(seen, [0; 2]);
        slowed > Duration::from_millis(500)
    };
    slowed_by_pages(|_| vec![0, 0], enough);
}

#[test]
fn closing_and_opening_at_any_moment_never_misses_a_vcpu() {
    let Some(guest) = Guest::new(3, &READING) else { return };
    let loops: Vec<_> = (0..3).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    for round in 0..500u64 {
        guest.gate.open();
        // From no delay at all to some exits later.
        (0..(round % 50) * 20).for_each(|_| std::hint::spin_loop());
        guest.gate.close(PATIENCE).unwrap();
    }
    guest.gate.end();
    loops.into_iter().for_each(|ended| assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate));
}

#[test]
fn a_port_read_is_completed_before_the_gate_is_closed() {
    let Some(guest) = Guest::new(1, &READING) else { return };
    let (arrived, at_exit) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let ended = guest.drive(0, move |exits| {
        arrived.send(exits).unwrap();
        released.recv().unwrap_or(Flow::Stop)
    });
    guest.gate.open();
    let answered = at_exit.recv().unwrap();
    let gate = guest.gate.clone();
    let closing = thread::spawn(move || gate.close(PATIENCE));
    while guest.gate.lock().phase == Phase::Open {
        thread::yield_now();
    }
    assert!(!closing.is_finished(), "the vcpu's exit is still being handled");
    release.send(Flow::Continue).unwrap();
    closing.join().unwrap().unwrap();
    let regs = guest.vcpus[0].lock().unwrap().get_regs().unwrap();
    assert_eq!((regs.rip, regs.rax & 0xff), (CODE + 2, answered & 0xff));
    guest.gate.end();
    assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate);
}

#[test]
fn a_vcpu_that_waits_for_its_start_or_halts_is_closed_too() {
    // cli; hlt
    let Some(guest) = Guest::new(2, &[0xfa, 0xf4]) else { return };
    let waiting = kvm_bindings::kvm_mp_state { mp_state: kvm_bindings::KVM_MP_STATE_UNINITIALIZED };
    guest.vcpus[1].lock().unwrap().set_mp_state(waiting).unwrap();
    let loops: Vec<_> = (0..2).map(|i| guest.drive(i, |_| Flow::Continue)).collect();
    for _ in 0..3 {
        guest.gate.open();
        while !guest.gate.lock().loops.iter().all(|l| l.as_ref().is_some_and(|l| l.running)) {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(5));
        guest.gate.close(PATIENCE).unwrap();
    }
    guest.gate.end();
    loops.into_iter().for_each(|ended| assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate));
}

#[test]
fn a_vcpu_that_stops_or_panics_does_not_keep_the_gate_from_closing() {
    let Some(guest) = Guest::new(3, &READING) else { return };
    let running = guest.drive(0, |_| Flow::Continue);
    let stopped = guest.drive(1, |exits| if exits == 3 { Flow::Stop } else { Flow::Continue });
    let panicked = guest.drive(2, |exits| if exits == 3 { panic!("on purpose") } else { Flow::Continue });
    guest.gate.open();
    assert_eq!(stopped.join().unwrap().unwrap(), Ended::Stopped);
    assert!(panicked.join().is_err());
    guest.gate.close(PATIENCE).unwrap();
    guest.gate.end();
    assert_eq!(running.join().unwrap().unwrap(), Ended::Gate);
}

#[test]
fn a_vcpu_that_stays_in_its_handler_is_named_and_the_gate_can_be_opened_again() {
    let Some(guest) = Guest::new(2, &READING) else { return };
    let held = Arc::new(AtomicBool::new(true));
    let count = Arc::new(AtomicU64::new(0));
    let (held_there, count_there) = (held.clone(), count.clone());
    let stuck = guest.drive(1, move |exits| {
        count_there.store(exits, Ordering::SeqCst);
        while held_there.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        Flow::Continue
    });
    let running = guest.drive(0, |_| Flow::Continue);
    guest.gate.open();
    while count.load(Ordering::SeqCst) == 0 {
        thread::yield_now();
    }
    let error = guest.gate.close(Duration::from_millis(20)).unwrap_err();
    assert!(matches!(error, KvmError::NotPaused { vcpu: 1, .. }), "{error}");
    guest.gate.open();
    held.store(false, Ordering::SeqCst);
    while count.load(Ordering::SeqCst) < 10 {
        thread::yield_now();
    }
    guest.gate.close(PATIENCE).unwrap();
    guest.gate.end();
    for ended in [stuck, running] {
        assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate);
    }
}

#[test]
fn a_gate_without_loops_closes_and_a_loop_that_comes_late_finds_it_closed() {
    let Some(guest) = Guest::new(1, &COUNTING) else { return };
    guest.gate.close(PATIENCE).unwrap();
    let ended = guest.drive(0, |_| Flow::Continue);
    thread::sleep(Duration::from_millis(10));
    assert_eq!(guest.counters(), [0]);
    guest.gate.open();
    guest.wait_for_progress(&[0]);
    guest.gate.end();
    assert_eq!(ended.join().unwrap().unwrap(), Ended::Gate);
    assert_eq!(guest.drive(0, |_| Flow::Continue).join().unwrap().unwrap(), Ended::Gate);
}

#[test]
fn two_threads_cannot_drive_one_vcpu() {
    let Some(guest) = Guest::new(1, &COUNTING) else { return };
    let first = guest.drive(0, |_| Flow::Continue);
    guest.gate.open();
    guest.wait_for_progress(&[0]);
    guest.gate.close(PATIENCE).unwrap();
    let error = guest.drive(0, |_| Flow::Continue).join().unwrap().unwrap_err();
    assert!(matches!(error, KvmError::NoSuchVcpu { vcpu: 0 }));
    guest.gate.end();
    first.join().unwrap().unwrap();
}

#[test]
fn a_vcpu_whose_loop_stopped_as_the_gate_closed_can_be_driven_again() {
    let Some(guest) = Guest::new(1, &READING) else { return };
    let (arrived, at_exit) = mpsc::channel();
    let (release, released) = mpsc::channel::<()>();
    let stopping = guest.drive(0, move |_| {
        arrived.send(()).unwrap();
        released.recv().unwrap();
        Flow::Stop
    });
    guest.gate.open();
    at_exit.recv().unwrap();
    guest.gate.close(Duration::from_millis(1)).unwrap_err();
    release.send(()).unwrap();
    assert_eq!(stopping.join().unwrap().unwrap(), Ended::Stopped);
    guest.gate.open();
    // Its kvm_run still asks for an immediate exit, from the kick that the old loop never saw.
    let again = guest.drive(0, |exits| if exits == 5 { Flow::Stop } else { Flow::Continue });
    let deadline = Instant::now() + PATIENCE;
    while !again.is_finished() {
        assert!(Instant::now() < deadline, "it never enters the guest");
        thread::yield_now();
    }
    assert_eq!(again.join().unwrap().unwrap(), Ended::Stopped);
}
