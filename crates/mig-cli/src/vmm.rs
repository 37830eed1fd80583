//! mig-vmm's machines, as a holder needs them.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mig::dirtying::{self, Dirtying};
use mig::guest::ResumeCosts;
use mig::{
    Address, BoxError, Control, Description, DestinationVm, GuestRam, Incoming, Listener, Observer, Outcome,
    ReceiveOptions, Refusal, RestoreState, RunPermit, Section,
};
use mig_vmm::{IncomingMachine, KvmError, Machine, Monitor, Receiver, VmmError};

use crate::failure::{Failure, chain};
use crate::machine::{Arrival, GuestEnd, Held, Machine as HeldMachine, Moving, Settings, View};

/// What is wrong when a machine cannot be started.
pub fn start_failure(side: &str, error: &VmmError) -> Failure {
    let remedy = match error {
        VmmError::NoKvm(_) => "load the kvm module, or enable virtualisation in the firmware",
        VmmError::KvmDenied(_) => "join the group kvm, or ask for access to /dev/kvm",
        VmmError::MemorySize { .. } => "choose another --memory",
        VmmError::Vcpus { .. } => "choose another --cpus",
        VmmError::Memory(_) => "give the guest less --memory, or free some",
        VmmError::Boot(error) => error.remedy(),
        VmmError::State(KvmError::NoDirtyRings) => {
            "take --dirty-log bitmap, or a host with Linux 5.11 or later whose KVM has them"
        }
        _ => "see the cause",
    };
    let failure = Failure::new(side, "start", chain(error), remedy);
    match error {
        VmmError::Boot(_) | VmmError::MemorySize { .. } | VmmError::Vcpus { .. } => failure,
        _ => failure.local(),
    }
}

impl View for Monitor {
    fn heartbeats(&self) -> u64 {
        self.heartbeats()
    }

    fn vcpus(&self) -> u32 {
        self.vcpus().into()
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes()
    }

    fn screen(&self) -> Vec<String> {
        self.screen().to_vec()
    }

    fn takes_input(&self) -> bool {
        self.takes_input()
    }

    fn feed(&self, take: &mut dyn FnMut(usize) -> io::Result<Vec<u8>>) -> io::Result<()> {
        self.feed_serial(take).map(drop)
    }

    fn wait_end(&self, timeout: Duration) -> Option<GuestEnd> {
        use mig_vmm::End;
        self.wait_end(timeout).map(|end| GuestEnd {
            reason: end.to_string(),
            good: matches!(end, End::Exit(0) | End::Reset | End::Shutdown),
        })
    }
}

impl HeldMachine for Machine {
    fn view(&self) -> Arc<dyn View> {
        Arc::new(self.monitor())
    }

    fn pause(&mut self) -> Result<(), BoxError> {
        Ok(Machine::pause(self)?)
    }

    fn resume(&mut self) -> Result<(), BoxError> {
        Ok(self.run()?)
    }

    fn check(&mut self) -> Result<String, String> {
        match self.verify() {
            Ok(Some(verified)) => Ok(verified.to_string()),
            Ok(None) => Err("only built-in guests can be checked from outside".into()),
            Err(e) => Err(chain(&e)),
        }
    }

    fn watch(&mut self, over: Duration) -> Result<Dirtying, BoxError> {
        dirtying::watch(self, over)
    }

    fn migrate(
        mut self,
        to: &Address,
        settings: &Settings,
        control: &Control,
        observer: &dyn Observer,
    ) -> Moving<Self> {
        self.choose_guest_time(settings.guest_time);
        match mig::migrate(self, to, &settings.engine, control, observer) {
            Outcome::Moved(report) => Moving::Moved(report),
            Outcome::StillHere { vm, report } => Moving::StillHere { machine: vm, report },
            Outcome::Discarded(report) => Moving::Discarded(report),
        }
    }

    fn end(self) {
        Machine::end(self);
    }
}

impl Held<Machine> for mig::HeldCopy<Announced> {
    fn view(&self) -> Option<Arc<dyn View>> {
        let monitor = self.vm().machine.monitor()?;
        Some(Arc::new(monitor))
    }

    fn resume(self: Box<Self>) -> Result<Machine, (Box<dyn Held<Machine>>, BoxError)> {
        match mig::HeldCopy::resume(*self) {
            Ok(arrived) => Ok(into_machine(arrived)),
            Err(failed) => {
                let (copy, error) = *failed;
                Err((Box::new(copy), error))
            }
        }
    }
}

/// What a receiver is told of a guest that comes in.
pub trait Arriving: Send + Sync {
    /// It is all here, and paused.
    fn restored(&self, view: Arc<dyn View>);
    /// It is about to run here, which is before the source knows it.
    fn runs(&self);
}

/// Receives a guest.
pub fn receive(
    listener: &Listener,
    receiver: &mut Receiver,
    options: &ReceiveOptions,
    control: &Control,
    observer: &dyn Observer,
    arriving: Arc<dyn Arriving>,
) -> Arrival<Machine> {
    match mig::receive(listener, &mut Announcing { receiver, arriving }, options, control, observer) {
        mig::Received::Running { vm, report } => Arrival::Running { machine: into_machine(vm), report },
        mig::Received::NotReceived(fault) => Arrival::NotReceived(fault),
        mig::Received::Lost(copy) => {
            let fault = copy.fault().clone();
            Arrival::Lost { held: Box::new(copy), fault }
        }
    }
}

fn into_machine(arrived: Announced) -> Machine {
    arrived.machine.into_machine().expect("the engine resumes a guest only after restoring it")
}

/// A receiver whose guests say how they arrive.
struct Announcing<'a> {
    receiver: &'a mut Receiver,
    arriving: Arc<dyn Arriving>,
}

struct Announced {
    machine: IncomingMachine,
    arriving: Arc<dyn Arriving>,
}

impl Incoming for Announcing<'_> {
    type Vm = Announced;

    fn prepare(&mut self, description: &Description) -> Result<Announced, Vec<Refusal>> {
        let machine = self.receiver.prepare(description)?;
        Ok(Announced { machine, arriving: Arc::clone(&self.arriving) })
    }
}

impl RestoreState for Announced {
    fn restore(&mut self, sections: &[Section]) -> Result<(), BoxError> {
        self.machine.restore(sections)?;
        if let Some(monitor) = self.machine.monitor() {
            self.arriving.restored(Arc::new(monitor));
        }
        Ok(())
    }
}

impl DestinationVm for Announced {
    fn memory(&self) -> GuestRam {
        self.machine.memory()
    }

    fn resume_costs(&self) -> ResumeCosts {
        self.machine.resume_costs()
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), BoxError> {
        self.arriving.runs();
        self.machine.resume(permit)
    }

    fn running_since(&self) -> Option<Instant> {
        self.machine.running_since()
    }

    fn guest_gap(&mut self, patience: Duration) -> Option<Duration> {
        self.machine.guest_gap(patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_rings_where_there_are_none_is_told_what_is_missing_and_what_to_do() {
        let failure = start_failure("source", &VmmError::State(KvmError::NoDirtyRings));
        assert!(failure.cause.contains("KVM_CAP_DIRTY_LOG_RING_ACQ_REL"), "{failure:?}");
        assert!(failure.remedy.contains("--dirty-log bitmap"), "{failure:?}");
    }
}
