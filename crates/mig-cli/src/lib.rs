//! The programs `mig-send` and `mig-recv`: holders of a guest that moves. `docs/cli.md` describes what they
//! say and what they are told.
//!
//! Layers, each knowing only those before it: `failure`, `units`, `exit`; `event`, which all else tells;
//! `render` and `output`, which show it; `machine`, the seam to a VMM; `control`, the socket; `holder`, the
//! owner of a guest; `vmm`, the machines of mig-vmm; `console`, `terminal` and `keyboard`, what is printed and
//! typed; and the programs.

pub mod attach;
pub mod bandwidth;
pub mod console;
pub mod control;
pub mod convergence;
pub mod demo;
pub mod estimate;
pub mod event;
pub mod exit;
pub mod failure;
pub mod hold;
pub mod holder;
pub mod keyboard;
pub mod lease;
pub mod machine;
pub mod options;
pub mod output;
pub mod recv;
pub mod render;
pub mod send;
pub mod signals;
pub mod terminal;
pub mod units;
pub mod vmm;

use std::process::ExitCode;

use clap::Parser;

/// Reads the program's options and runs it with them; what is wrong with them is said as every error is.
pub fn main<O: Parser>(program: &str, run: impl FnOnce(&O) -> exit::Exit) -> ExitCode {
    let _given_back = terminal::GivenBack;
    #[cfg(feature = "fault-points")]
    if let Err(error) = mig::fault_points::arm_from_environment() {
        return not_started(failure::Failure::new(program, "MIG_FAULT", error.to_string(), "see the cause"));
    }
    match O::try_parse() {
        Ok(options) => run(&options).into(),
        Err(error) => match options::usage_failure(program, &error) {
            None => error.exit(),
            Some(failure) => not_started(failure),
        },
    }
}

fn not_started(failure: failure::Failure) -> ExitCode {
    let json = std::env::args_os().any(|a| a == "--json");
    let output = if json { output::Output::json() } else { output::Output::human(output::Stream::Stderr) };
    output.tell(event::Event::Error(failure));
    output.flush();
    exit::Exit::Usage.into()
}
