//! Watches, inside a guest, what its users would notice after a live migration, and prints a line a second.
//!
//! `watch SEQ key=value ...` counts lines from 1; what was found wrong is told at once, `watch ERROR what: expected
//! ..., found ...`, and watching goes on. The last line is `watch END ...`. The exit code is 1 if anything was wrong.
//! It is an ordinary program and runs on a host as well.

mod across;
mod alarm;
mod clock;
mod duty;
mod files;
mod fpu;
mod heap;
mod memory;
mod options;
mod peer;
mod pipes;
mod priority;
mod random;
mod report;
mod sampler;
mod timer;

use std::process::ExitCode;
use std::sync::Arc;

use crate::options::Options;
use crate::report::Report;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("watch: {error}\n{}", options::USAGE);
            return ExitCode::from(2);
        }
    };
    if options.peer {
        return peer::run();
    }
    match watch(&options) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("watch: cannot start: {error}");
            ExitCode::from(2)
        }
    }
}

/// Runs every check for as long as it was told; answers how many errors there were.
fn watch(options: &Options) -> std::io::Result<u64> {
    let report = Arc::new(Report::new(options.late_limit));
    let mut duty = duty::Duty::begin(&report, options.spin);
    // Before any other thread: they inherit which signals are blocked.
    alarm::block()?;
    let pipes = pipes::Pipes::start()?;
    let files = files::Files::start(&options.directory)?;
    memory::start(&mut duty, options.memory);
    duty.start(files);
    duty.start(pipes);
    timer::start(&mut duty);
    alarm::start(&mut duty);
    fpu::start(&mut duty)?;
    across::start(&mut duty)?;
    sampler::start(&mut duty);
    timer::tick_every_second(&report, options.seconds)?;
    duty.end();
    Ok(report.end())
}
