//! A migration that is cancelled leaves nothing behind that slows the guest.

use std::sync::atomic::{AtomicBool, Ordering};

use mig::observe::Progress;
use mig::policy::{OnStall, Policy};
use mig::{Control, Listener, Observer, Outcome, ReceiveOptions, SourceOptions};

use super::*;

const MEMORY_BYTES: u64 = 16 << 20;

/// Cancels when the first round is over, and looks whether the slots are logged then.
struct CancelsAfterARound {
    vm: Arc<kvm_ioctls::VmFd>,
    control: Control,
    was_logged: AtomicBool,
}

impl Observer for CancelsAfterARound {
    fn progress(&self, progress: &Progress) {
        if matches!(progress, Progress::Round(_)) {
            self.was_logged.store(is_logged(&self.vm), Ordering::SeqCst);
            self.control.cancel();
        }
    }
}

/// Whether KVM logs the first slot's pages: of a slot that it does not log it has nothing to tell
/// (kvm_get_dirty_log in virt/kvm/kvm_main.c).
fn is_logged(vm: &kvm_ioctls::VmFd) -> bool {
    match vm.get_dirty_log(0, MEMORY_BYTES as usize) {
        Ok(_) => true,
        Err(e) if e.errno() == libc::ENOENT => false,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn kvm_logs_no_page_any_more_after_a_cancel() {
    if !kvm() {
        return;
    }
    let workload = Workload::BuiltIn("dirtier:rate=20MiB,working-set=4MiB".parse().unwrap());
    let config = MachineConfig {
        memory_bytes: MEMORY_BYTES,
        vcpus: 1,
        workload,
        console: Console::none(),
        tracking: Tracking::default(),
    };
    let mut machine = Machine::boot(config).unwrap();
    machine.run().unwrap();
    let vm = machine.platform.vm.clone();
    assert!(!is_logged(&vm));
    let listener = Listener::bind(&mig::Address::tcp("127.0.0.1", 0)).unwrap();
    let control = Control::new();
    let observer = CancelsAfterARound { vm: vm.clone(), control: control.clone(), was_logged: false.into() };
    std::thread::scope(|scope| {
        let (listener, hang_up) = (&listener, Control::new());
        scope.spawn(move || {
            let mut receiver = Receiver::new(Console::none);
            mig::receive(listener, &mut receiver, &ReceiveOptions::default(), &hang_up, &())
        });
        // no pause is short enough: it does not move, however late the cancel is seen
        let policy = Policy {
            downtime_limit: Duration::ZERO,
            few_pages: 0,
            on_stall: OnStall::Abort,
            ..Policy::default()
        };
        let options = SourceOptions { policy, ..SourceOptions::default() };
        let outcome = mig::migrate(machine, listener.address(), &options, &control, &observer);
        let Outcome::StillHere { vm: machine, .. } = outcome else { panic!("it moved") };
        assert!(observer.was_logged.load(Ordering::SeqCst), "it was logged before");
        assert!(!is_logged(&vm), "and is not after");
        machine.end();
    });
}
