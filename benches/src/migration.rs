//! One live migration by the real programs, with everything that is measured of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::estimate::Estimate;
use crate::events::{Event, Report, Round};
use crate::netns::Hosts;
use crate::process::{Process, Sample, Watch};
use crate::programs::{Program, Programs};
use crate::speed::{Count, Speed};
use crate::warmth::Warmth;

/// Far more than anything here takes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
/// What is warmed beyond what the guest has touched: programs, page tables, sockets.
const MARGIN_BYTES: u64 = 256 << 20;
/// Over how long a guest's speed is taken before and after.
const LOOK: Duration = Duration::from_millis(700);

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
    /// `--bandwidth`; none without.
    #[serde(default)]
    pub bandwidth: Option<String>,
    /// `--pause-bandwidth`; the program's own without.
    #[serde(default)]
    pub pause_bandwidth: Option<String>,
    /// `--priority`; the program's own without. With `never-over-budget` a guest that stays is no failure.
    #[serde(default)]
    pub priority: Option<String>,
    /// `--on-stall`; as the priority says without. With `abort` a guest that stays is no failure.
    #[serde(default)]
    pub on_stall: Option<String>,
    /// `--compress`; the program's own without.
    #[serde(default)]
    pub compress: Option<String>,
    /// Whether the guest's speed is taken before, during and after: only of a built-in guest.
    #[serde(default)]
    pub has_speed_taken: bool,
    /// Whether an estimate is asked for before.
    #[serde(default)]
    pub is_estimated: bool,
    /// How long the guest runs before it moves.
    pub after: Duration,
}

impl Plan {
    /// An idle guest with the program's defaults.
    pub fn idle(memory_bytes: u64, vcpus: u32) -> Self {
        let after = Duration::from_millis(300);
        Self {
            guest: "idle".into(),
            memory_bytes,
            vcpus,
            channels: None,
            downtime_ms: None,
            bandwidth: None,
            pause_bandwidth: None,
            priority: None,
            on_stall: None,
            compress: None,
            has_speed_taken: false,
            is_estimated: false,
            after,
        }
    }

    /// The options of the order, but for where from and where to.
    fn options(&self) -> Vec<String> {
        let others = given([("--channels", &self.channels), ("--compress", &self.compress)]);
        self.policy_options().chain(others).collect()
    }

    /// Those of them that an estimate takes, too.
    pub(crate) fn policy_options(&self) -> impl Iterator<Item = String> {
        let downtime = self.downtime_ms.map(|ms| format!("{ms}ms"));
        given([
            ("--downtime", &downtime),
            ("--bandwidth", &self.bandwidth),
            ("--pause-bandwidth", &self.pause_bandwidth),
            ("--priority", &self.priority),
            ("--on-stall", &self.on_stall),
        ])
    }
}

/// Options that have a value.
fn given<const N: usize>(options: [(&str, &Option<String>); N]) -> impl Iterator<Item = String> + use<N> {
    options
        .map(|(name, value)| value.as_ref().map(|value| [name.to_owned(), value.clone()]))
        .into_iter()
        .flatten()
        .flatten()
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
    /// The guest's speed, where it was taken.
    #[serde(default)]
    pub speed: Option<Speed>,
    /// What was foretold, where that was asked for.
    #[serde(default)]
    pub estimate: Option<Estimate>,
    /// The source's cost.
    pub source: Cost,
    /// The destination's.
    pub destination: Cost,
}

impl Moved {
    /// Whether the guest was left where it was, since its pause would have been over the budget.
    pub fn is_here_still(&self) -> bool {
        self.report.outcome == "still-here" && gave_up(&self.rounds)
    }
}

/// A source that moves its guest, for whoever does something meanwhile.
#[derive(Debug)]
pub struct Moving {
    /// Its control socket.
    pub socket: PathBuf,
    /// Its process.
    pub pid: u32,
    over: Receiver<()>,
}

impl Moving {
    /// Waits until the migration is over, but no longer than this; whether it is.
    pub fn is_over_within(&self, patience: Duration) -> bool {
        self.over.recv_timeout(patience) != Err(RecvTimeoutError::Timeout)
    }
}

/// Moves a guest as [`run_beside`], and does nothing else.
///
/// # Errors
/// As there.
pub fn run(programs: &Programs, plan: &Plan, hosts: Option<&Hosts>) -> Result<Moved> {
    Ok(run_beside(programs, plan, hosts, |_| Ok(()))?.0)
}

/// Moves a guest once, or has it stay as its policy says: both programs are started for it, and none is left.
///
/// The guest is held first; memory for what it has touched is warmed; then the order is given. Another thread does
/// something `beside`, from the order on, and is waited for.
///
/// # Errors
/// The guest did not move, with the program's words for it; or what was done beside failed.
pub fn run_beside<T: Send>(
    programs: &Programs,
    plan: &Plan,
    hosts: Option<&Hosts>,
    beside: impl FnOnce(Moving) -> Result<T> + Send,
) -> Result<(Moved, T)> {
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
    thread::sleep(plan.after);

    let estimate = plan.is_estimated.then(|| Estimate::ask(programs, &socket("s"), plan)).transpose()?;

    let pids = [source.id(), destination.id()];
    let [here, there] = pids.map(Process::new);
    let guest_before = here.resident()?.guest_bytes;
    here.forget_peak()?;
    let mut warmth = Warmth::gather(usize::try_from(guest_before + MARGIN_BYTES)?)?;

    let mut order = Command::new(&programs.send);
    order.args(["--vm", &socket("s"), "--to", &to, "--json"]);
    order.args(plan.options());
    warmth.follow(destination.id())?;
    let [held_at, moved_to] = ["s", "r"].map(|name| room.path().join(name));
    let looks_before =
        plan.has_speed_taken.then(|| two_looks(Count::ask(&held_at)?, &held_at)).transpose()?;
    let before = [here.sample()?, there.sample()?];
    let watch = Watch::start(&pids);
    let mut order = Program::start(order)?;
    let (mut channels, mut rounds) = (None, Vec::new());
    let (report, done) = thread::scope(|scope| {
        let (is_on, over) = channel();
        let moving = Moving { socket: held_at.clone(), pid: source.id(), over };
        let beside = scope.spawn(move || beside(moving));
        let report = order.wait_for(PATIENCE, |event| {
            match event {
                Event::Connected { channels: count } => channels = Some(count),
                Event::Round(round) => rounds.push(round),
                Event::Report(report) => return Some(*report),
                _ => {}
            }
            None
        });
        drop(is_on);
        (report, beside.join().expect("what is done beside does not panic"))
    });
    let now_at = if gave_up(&rounds) { &held_at } else { &moved_to };
    let has_guest = matches!(&report, Ok(r) if r.outcome == "moved" || gave_up(&rounds));
    let look_after = (plan.has_speed_taken && has_guest).then(|| Count::ask(now_at)).transpose();
    let after = watch.finish(&pids);
    let report = report?;
    let stays = report.outcome == "still-here" && gave_up(&rounds);
    if report.outcome != "moved" && !stays {
        match &report.fault {
            Some(fault) => bail!("{}: {fault}", report.outcome),
            None => bail!("{}", report.outcome),
        }
    }
    let speed = match (looks_before, look_after?) {
        (Some(before), Some(after)) => Some(speed(before, two_looks(after, now_at)?)),
        _ => None,
    };
    // a destination that was given up has let go of what it had
    let guest_after = if stays { 0 } else { there.resident()?.guest_bytes };
    order.wait_for_end(PATIENCE)?;
    if !stays {
        source.wait_for_end(PATIENCE)?;
    }
    let moved = Moved {
        channels: channels.context("no word of channels")?,
        report,
        rounds,
        speed,
        estimate,
        source: cost(&before[0], &after[0], guest_before),
        destination: cost(&before[1], &after[1], guest_after),
    };
    Ok((moved, done?))
}

/// Whether the last word of the policy was to leave the guest where it is.
fn gave_up(rounds: &[Round]) -> bool {
    rounds.last().is_some_and(|round| round.decision == "abort")
}

/// A count, and another a moment later.
fn two_looks(first: Count, socket: &Path) -> Result<[Count; 2]> {
    thread::sleep(LOOK);
    Ok([first, Count::ask(socket)?])
}

fn speed(before: [Count; 2], after: [Count; 2]) -> Speed {
    Speed {
        before: before[0].until(&before[1]),
        during: before[1].until(&after[0]),
        after: after[0].until(&after[1]),
    }
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
    fn an_order_has_the_options_of_its_plan_and_no_others() {
        assert_eq!(Plan::idle(1 << 30, 2).options(), Vec::<String>::new());
        let some = |word: &str| Some(word.to_owned());
        let plan = Plan {
            downtime_ms: Some(50),
            bandwidth: some("1Gbit"),
            pause_bandwidth: some("capped"),
            priority: some("soonest-done"),
            compress: some("delta"),
            ..Plan::idle(1 << 30, 2)
        };
        assert_eq!(
            plan.options().join(" "),
            "--downtime 50ms --bandwidth 1Gbit --pause-bandwidth capped --priority soonest-done --compress delta"
        );
    }

    #[test]
    fn results_of_before_there_were_priorities_are_still_read() {
        let plan = r#"{"guest":"idle","memory_bytes":1,"vcpus":2,"channels":null,"downtime_ms":null,"after":{"secs":0,"nanos":1}}"#;
        assert_eq!(serde_json::from_str::<Plan>(plan).unwrap().bandwidth, None);
        let moved = r#"{"channels":2,"report":{"outcome":"moved","stop_reason":"within-budget","rounds":1,"total_ms":1.0,"downtime_ms":1.0,"downtime":null,"predicted_downtime_ms":1.0,"predicted_downtime":null,"guest_gap_ms":1.0,"sent_bytes":1,"pages":{"zero":1,"raw":2},"ram_bytes":1,"fault":null},"rounds":[{"round":0,"pages":{"zero":1,"raw":2},"sent_bytes":1,"elapsed_ms":1.0,"dirtied_pages":1,"dirty_pages_per_second":1,"predicted_downtime_ms":1.0}],"source":{"cpu_s":1.0,"beyond_guest_bytes":1,"guest_bytes":1},"destination":{"cpu_s":1.0,"beyond_guest_bytes":1,"guest_bytes":1}}"#;
        let moved: Moved = serde_json::from_str(moved).unwrap();
        assert_eq!((moved.speed, moved.report.slowed, moved.is_here_still()), (None, None, false));
    }

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
