//! `mig-recv`: waits for a guest, runs it, and holds it until it ends or moves on.

use std::sync::Arc;

use mig::observe::Progress;
use mig::{Listener, ReceiveOptions};
use mig_vmm::{Machine, Receiver};

use crate::console::ConsoleTo;
use crate::control::Server;
use crate::event::{Arrived, Event, Received, Running};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::hold::{attend, control_path, obey_signals, see_off};
use crate::holder::{End, Following, Holder};
use crate::keyboard;
use crate::lease;
use crate::machine::{Arrival, View};
use crate::options::RecvOptions;
use crate::output::{Output, Stream};
use crate::send::stdout_is_taken;
use crate::vmm::{Arriving, receive, start_failure};

const SIDE: &str = "destination";

/// Does what the options say.
pub fn run(options: &RecvOptions) -> Exit {
    let default = if options.json { ConsoleTo::None } else { ConsoleTo::Stdio };
    let console = options.console.clone().unwrap_or(default);
    let output = match (options.json, &console) {
        (true, _) => Output::json(),
        (false, ConsoleTo::Stdio) => Output::human(Stream::Stderr),
        (false, _) => Output::human(Stream::Stdout),
    };
    let exit = run_with(options, &console, &output).unwrap_or_else(|failure| {
        output.tell(Event::Error(failure));
        Exit::Usage
    });
    output.flush();
    exit
}

/// The same, with a voice of the caller's.
///
/// # Errors
/// Nothing was begun.
pub(crate) fn run_with(options: &RecvOptions, console: &ConsoleTo, output: &Output) -> Result<Exit, Failure> {
    if options.json && *console == ConsoleTo::Stdio {
        return Err(stdout_is_taken(SIDE));
    }
    kvm_can_be_opened()?;
    let tracking = mig_vmm::Tracking::from(options.dirty_log);
    tracking.check().map_err(|e| start_failure(SIDE, &e))?;
    let arbiter = lease::open(&options.lease, SIDE)?;
    let typed = *console == ConsoleTo::Stdio;
    let console = console.open(SIDE)?;
    let listener = Listener::bind(&options.listen)
        .map_err(|fault| Failure { step: "listen".into(), ..Failure::from(fault) })?;
    let mut server = Server::bind(&control_path(&options.control, "mig-recv"))?;
    let guests_console = console.clone();
    let mut receiver = Receiver::new(move || guests_console.clone()).tracking(tracking);
    if let Some(bytes) = options.max_memory {
        receiver = receiver.max_memory_bytes(bytes);
    }
    let signals = obey_signals(server.socket());
    let holder: Arc<Holder<Machine>> = Holder::receiving(output.clone(), SIDE, arbiter.clone());
    attend(&holder, &mut server, &signals);
    if typed {
        keyboard::attend(&holder, server.socket());
    }
    output.tell(Event::Listening { addr: listener.address().to_string() });
    receive_one(&holder, &listener, &mut receiver, &ReceiveOptions { arbiter }, output);
    let end = see_off(&holder, server, &console);
    // Only now: a source that is in doubt asks here what became of its guest.
    drop(listener);
    Ok(match end {
        End::Moved | End::Quit { in_doubt: false } => Exit::Done,
        End::Guest(end) => {
            if end.good {
                Exit::Done
            } else {
                Exit::Failed
            }
        }
        End::Quit { in_doubt: true } => Exit::InDoubt,
    })
}

/// Receives until a guest is here, or the holder is told to quit.
fn receive_one(
    holder: &Arc<Holder<Machine>>,
    listener: &Listener,
    receiver: &mut Receiver,
    options: &ReceiveOptions,
    output: &Output,
) {
    while let Some(control) = holder.begin_receive() {
        let observer = |progress: &Progress| {
            // `running` is told with what was received, when the guest can be controlled.
            if !matches!(progress, Progress::Running) {
                output.tell(holder.follow(progress));
            }
        };
        let arriving = Arc::new(Waiting(Arc::clone(holder)));
        match receive(listener, receiver, options, &control, &Following(&observer), arriving) {
            Arrival::Running { machine, report } => {
                let guest_time = machine.arrival().map(Arrived::from);
                holder.received(machine);
                let received = Received { guest_time, ..Received::from(&report) };
                output.tell(Event::Running(Running { received: Some(received) }));
                return;
            }
            Arrival::Lost { held, fault } => return holder.received_lost(held, fault.into()),
            Arrival::NotReceived(fault) => {
                holder.not_received();
                if holder.begin_receive().is_some() {
                    output.tell(Event::NotReceived(fault.into()));
                }
            }
        }
    }
}

/// A holder that waits for its guest.
struct Waiting(Arc<Holder<Machine>>);

impl Arriving for Waiting {
    fn restored(&self, view: Arc<dyn View>) {
        self.0.restored(view);
    }

    fn runs(&self) {
        self.0.arriving();
    }
}

/// Finds out now rather than when a guest is on its way.
fn kvm_can_be_opened() -> Result<(), Failure> {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|e| {
        let remedy = match e.kind() {
            std::io::ErrorKind::PermissionDenied => "join the group kvm, or ask for access to /dev/kvm",
            _ => "load the kvm module, or enable virtualisation in the firmware",
        };
        Failure::new(SIDE, "start", format!("/dev/kvm cannot be opened: {e}"), remedy).local()
    })
}
