//! `mig-send` with a guest of its own: boots it, moves it, and holds it if it could not be moved.

use std::sync::Arc;

use mig_vmm::workload::Guest;
use mig_vmm::{Console, Machine, MachineConfig};

use crate::console::ConsoleTo;
use crate::control::Server;
use crate::event::{Event, Started};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::hold::{attend, control_path, obey_signals, see_off, shown};
use crate::holder::{End, Holder};
use crate::machine::GuestEnd;
use crate::options::SendOptions;
use crate::output::{Output, Stream};
use crate::vmm::start_failure;
use crate::{attach, demo, keyboard, lease};

const SIDE: &str = "source";

/// Does what the options say.
pub fn run(options: &SendOptions) -> Exit {
    let console = console(options);
    let output = match (options.json, &console) {
        (true, _) => Output::json(),
        (false, ConsoleTo::Stdio) => Output::human(Stream::Stderr),
        (false, _) => Output::human(Stream::Stdout),
    };
    let done = if let Some(control) = &options.demo_receiver {
        demo::receiver(control)
    } else if options.demo {
        demo::run(options, &output)
    } else if let (Some(path), Some(to)) = (&options.vm, &options.to) {
        attach::run(path, &options.migrate(to), &output)
    } else if let (Some(path), Some(word)) = (&options.vm, options.resolve) {
        attach::resolve(path, word, &output)
    } else if let (Some(path), true) = (&options.vm, options.estimate) {
        attach::estimate(path, &options.estimate(), &output)
    } else if let (Some(path), Some(rate)) = (&options.vm, options.set_bandwidth) {
        attach::set_bandwidth(path, rate, &output)
    } else {
        own_guest(options, &console, &output)
    };
    let exit = done.unwrap_or_else(|failure| {
        output.tell(Event::Error(failure));
        Exit::Usage
    });
    output.flush();
    exit
}

fn console(options: &SendOptions) -> ConsoleTo {
    let default = if options.kernel.is_some() && !options.json { ConsoleTo::Stdio } else { ConsoleTo::None };
    options.console.clone().unwrap_or(default)
}

/// Boots the guest of the options, and runs it.
///
/// # Errors
/// It cannot be started; nothing was.
pub(crate) fn boot(options: &SendOptions, console: Console) -> Result<Machine, Failure> {
    let workload = match (&options.guest, &options.kernel) {
        (_, Some(kernel)) => mig_vmm::Workload::Kernel {
            kernel: kernel.clone(),
            initrd: options.initrd.clone(),
            cmdline: options.cmdline.clone().unwrap_or_default(),
        },
        (Some(guest), None) => mig_vmm::Workload::BuiltIn(guest.clone()),
        (None, None) => mig_vmm::Workload::BuiltIn(Guest::Clock),
    };
    let config = MachineConfig {
        memory_bytes: options.memory,
        vcpus: options.cpus,
        workload,
        console,
        tracking: options.dirty_log.into(),
    };
    let mut machine = Machine::boot(config).map_err(|e| start_failure(SIDE, &e))?;
    machine.run().map_err(|e| start_failure(SIDE, &e))?;
    Ok(machine)
}

/// What is told of a guest that was started.
pub(crate) fn started(machine: &Machine, control: Option<String>) -> Event {
    let monitor = machine.monitor();
    Event::Started(Started {
        guest: machine.workload().to_owned(),
        vcpus: monitor.vcpus().into(),
        memory_bytes: monitor.memory_bytes(),
        control,
    })
}

fn own_guest(options: &SendOptions, console: &ConsoleTo, output: &Output) -> Result<Exit, Failure> {
    if options.json && *console == ConsoleTo::Stdio {
        return Err(stdout_is_taken(SIDE));
    }
    let migration = options.to.as_ref().map(|to| options.migrate(to).settings()).transpose()?;
    let arbiter = lease::open(&options.lease, SIDE)?;
    let mut server = Server::bind(&control_path(&options.control, "mig-send"))?;
    let signals = obey_signals(server.socket());
    let typed = *console == ConsoleTo::Stdio;
    let console = console.open(SIDE)?;
    let machine = boot(options, console.clone())?;
    let started = started(&machine, Some(shown(server.path())));
    let holder: Arc<Holder<Machine>> = Holder::running(machine, output.clone(), SIDE, arbiter);
    attend(&holder, &mut server, &signals);
    output.tell(started);
    if typed {
        keyboard::attend(&holder, server.socket());
    }
    let was_to_move = migration.is_some();
    match migration {
        None => output.note(format!(
            "the guest runs here until it ends. To move it: mig-send --vm {} --to ADDR",
            shown(server.path())
        )),
        Some((to, settings)) => {
            if holder.wait_ended_for(options.after).is_none()
                && let Err(not_moved) = holder.migrate(&to, &settings, &|_| {})
            {
                if not_moved.report.is_none() {
                    output.tell(Event::Error(not_moved.failure));
                }
                say_what_now(&holder, &server, output, &to.to_string());
            }
        }
    }
    Ok(match see_off(&holder, server, &console) {
        End::Moved => Exit::Done,
        End::Quit { in_doubt: true } => Exit::InDoubt,
        End::Quit { in_doubt: false } | End::Guest(GuestEnd { good: true, .. }) if !was_to_move => Exit::Done,
        End::Quit { in_doubt: false } | End::Guest(_) => Exit::Failed,
    })
}

fn say_what_now(holder: &Holder<Machine>, server: &Server, output: &Output, to: &str) {
    let control = shown(server.path());
    match holder.status().state.as_str() {
        "running" => output.note(format!(
            "the guest goes on here. To try again: mig-send --vm {control} --to {to}\n\
             to end it: Ctrl-C, or {{\"cmd\": \"quit\"}} on {control}"
        )),
        "paused" => output.note(format!(
            "the guest is here, paused: {{\"cmd\": \"resume\"}} or {{\"cmd\": \"quit\"}} on {control}"
        )),
        _ => {}
    }
}

/// Both events and console want standard output.
pub(crate) fn stdout_is_taken(side: &str) -> Failure {
    Failure::new(
        side,
        "options",
        "--json and --console stdio both want standard output",
        "give --console a file, or none",
    )
}
