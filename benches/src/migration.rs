//! One live migration by the real programs, with everything that is measured of it.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::events::{Event, Report, Round};
use crate::netns::Hosts;
use crate::process::{Process, Sample, Watch};
use crate::programs::{Program, Programs};
use crate::warmth::Warmth;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(300);
/// What is warmed beyond what the guest has touched: programs, page tables, sockets.
const MARGIN_BYTES: u64 = 256 << 20;

/// What is moved, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// `--guest`.
    pub guest: String,
    /// `--memory`, in bytes.
    pub memory_bytes: u64,
    /// `--cpus`.
    pub vcpus: u32,
    /// `--channels`; the program's own choice without.
    pub channels: Option<String>,
    /// `--downtime`; the program's own without.
    pub downtime_ms: Option<u64>,
    /// How long the guest runs before it moves.
    pub after: Duration,
}

impl Plan {
    /// An idle guest with the program's defaults.
    pub fn idle(memory_bytes: u64, vcpus: u32) -> Self {
        let after = Duration::from_millis(300);
        Self { guest: "idle".into(), memory_bytes, vcpus, channels: None, downtime_ms: None, after }
    }
}

/// What a side has used.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Processor time from the order to the report, without the guest's vCPUs.
    pub cpu_s: f64,
    /// The most memory that was resident, without the guest's.
    pub beyond_guest_bytes: u64,
    /// Of the guest's memory, what was resident: before on the source, after on the destination.
    pub guest_bytes: u64,
}

/// How a migration went.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Moved {
    /// Connections that carried pages.
    pub channels: u32,
    /// The source's report.
    pub report: Report,
    /// Each round but the last.
    pub rounds: Vec<Round>,
    /// The source's cost.
    pub source: Cost,
    /// The destination's.
    pub destination: Cost,
}

/// Moves a guest once: both programs are started for it, and none is left.
///
/// The guest is held first; memory for what it has touched is warmed; then the order is given.
///
/// # Errors
/// The guest did not move, with the program's words for it.
pub fn run(programs: &Programs, plan: &Plan, hosts: Option<&Hosts>) -> Result<Moved> {
    let room = tempfile::tempdir()?;
    let socket = |name: &str| format!("unix:{}", room.path().join(name).display());
    let mut receive = place(hosts, Hosts::on_destination, Command::new(&programs.recv));
    receive.arg("--listen").arg(format!("tcp:{}:0", hosts.map_or("127.0.0.1", |_| Hosts::LISTEN)));
    receive.args(["--json", "--control", &socket("r")]);
    let mut destination = Program::start(receive)?;
    let to = destination.wait_for(PATIENCE, |event| match event {
        Event::Listening { addr } => Some(addr),
        _ => None,
    })?;

    let mut hold = place(hosts, Hosts::on_source, Command::new(&programs.send));
    hold.args(["--guest", &plan.guest, "--memory", &plan.memory_bytes.to_string()]);
    hold.args(["--cpus", &plan.vcpus.to_string(), "--json", "--control", &socket("s")]);
    let mut source = Program::start(hold)?;
    source.wait_for(PATIENCE, |event| (event == Event::Started {}).then_some(()))?;
    std::thread::sleep(plan.after);

    let pids = [source.id(), destination.id()];
    let [here, there] = pids.map(Process::new);
    let guest_before = here.resident()?.guest_bytes;
    here.forget_peak()?;
    let mut warmth = Warmth::gather(usize::try_from(guest_before + MARGIN_BYTES)?)?;
    let before = [here.sample()?, there.sample()?];
    let watch = Watch::start(&pids);

    let mut order = Command::new(&programs.send);
    order.args(["--vm", &socket("s"), "--to", &to, "--json"]);
    if let Some(channels) = &plan.channels {
        order.args(["--channels", channels]);
    }
    if let Some(ms) = plan.downtime_ms {
        order.args(["--downtime", &format!("{ms}ms")]);
    }
    warmth.follow(destination.id())?;
    let mut order = Program::start(order)?;
    let (mut channels, mut rounds) = (None, Vec::new());
    let report = order.wait_for(PATIENCE, |event| {
        match event {
            Event::Connected { channels: count } => channels = Some(count),
            Event::Round(round) => rounds.push(round),
            Event::Report(report) => return Some(*report),
            _ => {}
        }
        None
    });
    let after = watch.finish(&pids);
    let report = report?;
    if report.outcome != "moved" {
        match &report.fault {
            Some(fault) => bail!("{}: {fault}", report.outcome),
            None => bail!("{}", report.outcome),
        }
    }
    let guest_after = there.resident()?.guest_bytes;
    order.wait_for_end(PATIENCE)?;
    source.wait_for_end(PATIENCE)?;
    Ok(Moved {
        channels: channels.context("no word of channels")?,
        report,
        rounds,
        source: cost(&before[0], &after[0], guest_before),
        destination: cost(&before[1], &after[1], guest_after),
    })
}

fn place(hosts: Option<&Hosts>, on: fn(&Hosts, Command) -> Command, command: Command) -> Command {
    match hosts {
        Some(hosts) => on(hosts, command),
        None => command,
    }
}

fn cost(before: &Sample, after: &Sample, guest_bytes: u64) -> Cost {
    let vcpus = after.vcpus.saturating_sub(before.vcpus);
    let cpu_s = after.cpu.saturating_sub(before.cpu).saturating_sub(vcpus).as_secs_f64();
    Cost { cpu_s, beyond_guest_bytes: after.peak_bytes.saturating_sub(guest_bytes), guest_bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_side_does_not_pay_for_its_guest() {
        let at = |cpu, vcpus, peak_bytes| Sample {
            cpu: Duration::from_millis(cpu),
            vcpus: Duration::from_millis(vcpus),
            peak_bytes,
        };
        let found = cost(&at(1000, 400, 0), &at(3000, 900, 5 << 20), 3 << 20);
        assert_eq!(found, Cost { cpu_s: 1.5, beyond_guest_bytes: 2 << 20, guest_bytes: 3 << 20 });
    }
}
