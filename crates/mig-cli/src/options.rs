//! The options of both programs.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgGroup, Parser, ValueEnum};
use mig::Address;

use crate::bandwidth::{Cap, PauseCap};
use crate::console::ConsoleTo;
use crate::control::{GuestTime, Migrate, Word};
use crate::convergence::{OnStall, Priority};
use crate::estimate::Estimate;
use crate::failure::Failure;
use crate::units::{parse_duration, parse_size};

const GUESTS: &str = "\
Guests:
  idle[:fill=none|random|text|heap]
                               halts between timer ticks; fills memory with incompressible data, words or records
  dirtier[:rate=100MiB,working-set=256MiB,pattern=sequential|random|hot,fill=none|random|text|heap]
                               dirties pages at a rate (bytes a second), stamps and checks each
  state                        puts known values into registers and devices, and checks them for ever
  clock                        watches time stamps and timer ticks go forward";

const PRIORITIES: &str = "\
Priorities, for a guest whose rounds do not shrink enough:
  balanced           slowed to a fifth of its speed if need be, then paused for longer than --downtime
  shortest-pause     slowed to a twentieth, then paused for longer
  soonest-done       the same, and rounds end with the first pause that fits --downtime, however short the next
  never-over-budget  slowed to a twentieth, then left here";

const EXIT_CODES: &str = "\
Exit codes:
  0  the guest moved
  1  the migration failed; the guest went on here until it was ended
  2  nothing was started: an option, or what it names, is at fault
  3  in doubt: the guest was discarded here although it is not known whether it runs on the destination";

const SEND_EXAMPLES: &str = "\
Examples:
  mig-send --demo
  mig-send --to tcp:host.example:4444 --guest dirtier:rate=50MiB --memory 1GiB --cpus 2 --verify
  mig-send --to tcp:[::1]:4444 --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0'
  mig-send --kernel vmlinux --initrd initrd.img --cmdline 'console=ttyS0' --control unix:/run/guest.sock
  mig-send --vm unix:/run/guest.sock --to tcp:host.example:4444
  mig-send --vm unix:/run/guest.sock --resolve resume";

const RECV_EXAMPLES: &str = "\
Examples:
  mig-recv --listen tcp:0.0.0.0:4444
  mig-recv --listen tcp:[::]:0 --control unix:/run/guest.sock --console console.log --json

Exit codes:
  0  the guest ended well, moved on, or the program was told to end
  1  the guest ended badly
  2  nothing was started: an option, or what it names, is at fault
  3  in doubt: a complete copy was dropped although it may have been the last one";

/// Run a guest and move it, while it runs, to a mig-recv.
#[derive(Debug, Clone, Parser)]
#[command(name = "mig-send", version, after_help = format!("{GUESTS}\n\n{PRIORITIES}\n\n{EXIT_CODES}\n\n{SEND_EXAMPLES}"))]
#[command(override_usage = "mig-send <--guest NAME|--kernel FILE> [--to ADDR] [OPTIONS]\n       \
                            mig-send --vm unix:PATH --to ADDR [OPTIONS]\n       \
                            mig-send --vm unix:PATH --estimate [--bandwidth RATE] [OPTIONS]\n       \
                            mig-send --vm unix:PATH --resolve resume|discard [--json]\n       \
                            mig-send --vm unix:PATH --set-bandwidth RATE|off [--json]\n       \
                            mig-send --demo")]
#[command(group(ArgGroup::new("what").required(true).args(["guest", "kernel", "vm", "demo", "demo_receiver"])))]
#[command(group(ArgGroup::new("move").args(["to", "demo", "demo_receiver", "estimate"])))]
pub struct SendOptions {
    /// The receiver: tcp:HOST:PORT, an IPv6 address in brackets. Without it the guest runs here until it ends
    /// or is moved by --vm
    #[arg(long, value_name = "ADDR", value_parser = parse_receiver)]
    #[arg(required_unless_present_any = ["guest", "kernel", "demo", "demo_receiver", "resolve", "set_bandwidth", "estimate"])]
    #[arg(conflicts_with = "demo")]
    pub to: Option<Address>,
    /// Run a built-in guest (see below)
    #[arg(long, value_name = "NAME[:key=value,...]")]
    pub guest: Option<mig_vmm::workload::Guest>,
    /// Run a kernel: ELF with a PVH entry, or a bzImage
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with_all = ["guest", "vm", "demo"])]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", requires = "kernel", conflicts_with_all = ["guest", "vm", "demo"])]
    pub cmdline: Option<String>,
    /// Tell the holder of a guest to move it, to --resolve or to --set-bandwidth: the --control path of a mig-send or
    /// mig-recv
    #[arg(long, value_name = "unix:PATH", value_parser = parse_unix)]
    #[arg(conflicts_with_all = ["memory", "cpus", "dirty_log", "after", "control", "console", "lease"])]
    pub vm: Option<PathBuf>,
    /// Decide about a guest in doubt that the holder holds paused. resume: the other side does not run it and
    /// never will; if that is wrong, two guests run. discard: the other side runs it
    #[arg(long, value_name = "WORD", requires = "vm", hide_possible_values = true)]
    #[arg(conflicts_with_all = ["to", "guest", "kernel", "demo"])]
    pub resolve: Option<Word>,
    /// Start a receiver on this machine and show one live migration of a guest that dirties memory
    #[arg(long, conflicts_with_all = ["memory", "cpus", "after", "control", "console", "lease"])]
    pub demo: bool,
    /// The demo's receiver
    #[arg(long, hide = true, value_name = "PATH", exclusive = true)]
    pub demo_receiver: Option<PathBuf>,
    /// The guest's memory
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub memory: u64,
    /// The guest's vCPUs, 1 to 32
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub cpus: u8,
    /// How KVM notes what the guest writes while it moves
    #[arg(long, value_name = "WHAT", default_value = "bitmap")]
    pub dirty_log: DirtyLog,
    /// How long the guest runs before it moves
    #[arg(long, value_name = "TIME", default_value = "2s", requires = "to", value_parser = parse_duration)]
    pub after: Duration,
    /// The longest pause that is accepted [default: 300ms]
    #[arg(long, requires = "move", value_name = "TIME", value_parser = parse_duration)]
    pub downtime: Option<Duration>,
    /// The most rounds before the pause [default: 30]
    #[arg(long, requires = "move", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: Option<u32>,
    /// What matters most: balanced, shortest-pause, soonest-done, or never-over-budget (see below) [default: balanced]
    #[arg(long, requires = "move", value_name = "WHAT")]
    pub priority: Option<Priority>,
    /// When rounds do not shrink: stop-and-copy pauses the guest all the same, throttle slows it first, step by step,
    /// abort leaves it here [default: as the priority says]
    #[arg(long, requires = "move", value_name = "WHAT")]
    pub on_stall: Option<OnStall>,
    /// How much of its speed the guest keeps at least while it is slowed, in percent [default: as the priority says]
    #[arg(long, requires = "move", value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(1..=100))]
    pub keep_speed: Option<u8>,
    /// Connections that carry pages: 1 to 64, or auto for as many as suit the cores of both hosts, 2 to 8
    /// [default: auto]
    #[arg(long, requires = "move", value_name = "N|auto")]
    pub channels: Option<Channels>,
    /// Send fewer bytes, at the price of time on both sides: zstd compresses pages, at a level from 1 (fast) to 19;
    /// delta sends what changed of pages that are sent again and again; auto does either where that is measured to be
    /// faster than the link [default: off]
    #[arg(long, requires = "move", value_name = "auto|off|zstd[:LEVEL]|delta")]
    pub compress: Option<mig::Compress>,
    /// At most so much over all connections together, as 1Gbit or 100MiB a second, or off [default: off]
    #[arg(long, requires = "move", value_name = "RATE|off")]
    pub bandwidth: Option<Cap>,
    /// What the pause may take: lifted leaves it the whole link, capped keeps --bandwidth, and RATE is what the link
    /// is known to give, which the prediction then counts with [default: lifted]
    #[arg(long, requires = "bandwidth", value_name = "RATE|lifted|capped")]
    pub pause_bandwidth: Option<PauseCap>,
    /// Move nothing: watch the guest at --vm for two seconds, and say what a migration would come to, over a link that
    /// gives --bandwidth for each priority, or over links of 1 to 100 Gbit/s
    #[arg(long, requires = "vm", conflicts_with_all = ["to", "guest", "kernel", "resolve", "set_bandwidth"])]
    #[arg(conflicts_with_all = ["channels", "compress", "verify", "guest_time"])]
    pub estimate: bool,
    /// Change --bandwidth of the migration that runs at --vm
    #[arg(long, requires = "vm", value_name = "RATE|off", conflicts_with_all = ["to", "guest", "kernel", "resolve"])]
    pub set_bandwidth: Option<Cap>,
    /// Compare digests of all memory on both sides before the guest is handed over
    #[arg(long, requires = "move")]
    pub verify: bool,
    /// What the guest's time does across the pause
    #[arg(long, requires = "move", value_name = "WHAT", default_value = "advance")]
    pub guest_time: GuestTime,
    /// Where the guest's holder is controlled [default: a socket in XDG_RUNTIME_DIR or the temporary directory]
    #[arg(long, value_name = "unix:PATH", value_parser = parse_unix)]
    pub control: Option<PathBuf>,
    /// A file on storage that both hosts share, which decides who runs the guest when the hosts lose each other.
    /// Every receiver must be given the same; it is created if it is not there
    #[arg(long, value_name = "FILE")]
    pub lease: Option<PathBuf>,
    /// The guest's serial port: stdio types standard input to it too; a terminal's Ctrl-] is Ctrl-C then
    /// [default: none, stdio for a kernel without --json]
    #[arg(long, value_name = "FILE|stdio|none")]
    pub console: Option<ConsoleTo>,
    /// Print events as JSON, an object a line
    #[arg(long)]
    pub json: bool,
}

/// How KVM notes what a guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DirtyLog {
    /// A bit for each page; the better choice as a rule
    Bitmap,
    /// A list for each vCPU, which tells who writes; suits large guests that write few pages. Linux 5.11 or later
    Ring,
}

impl From<DirtyLog> for mig_vmm::Tracking {
    fn from(choice: DirtyLog) -> Self {
        match choice {
            DirtyLog::Bitmap => Self::Bitmap,
            DirtyLog::Ring => Self::RING,
        }
    }
}

/// How many page channels: a number, or none for `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels(pub Option<u16>);

impl std::str::FromStr for Channels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = || text.parse().ok().filter(|number| (1..=64).contains(number));
        match text {
            "auto" => Ok(Self(None)),
            _ => number().map(|n| Self(Some(n))).ok_or_else(|| "give 1 to 64, or auto".into()),
        }
    }
}

/// Receive a running guest from a mig-send, and run it.
#[derive(Debug, Clone, Parser)]
#[command(name = "mig-recv", version, after_help = RECV_EXAMPLES)]
pub struct RecvOptions {
    /// Where to listen: tcp:HOST:PORT, an IPv6 address in brackets; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDR")]
    pub listen: Address,
    /// Where the guest's holder is controlled [default: a socket in XDG_RUNTIME_DIR or the temporary directory]
    #[arg(long, value_name = "unix:PATH", value_parser = parse_unix)]
    pub control: Option<PathBuf>,
    /// The guest's serial port: stdio types standard input to it too; a terminal's Ctrl-] is Ctrl-C then
    /// [default: stdio; none with --json]
    #[arg(long, value_name = "FILE|stdio|none")]
    pub console: Option<ConsoleTo>,
    /// A file on storage that both hosts share, which decides who runs the guest when the hosts lose each other.
    /// The sender must be given the same; it is created if it is not there
    #[arg(long, value_name = "FILE")]
    pub lease: Option<PathBuf>,
    /// Refuse guests with more memory than this
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,
    /// How KVM notes what the guest writes when it moves on
    #[arg(long, value_name = "WHAT", default_value = "bitmap")]
    pub dirty_log: DirtyLog,
    /// Print events as JSON, an object a line
    #[arg(long)]
    pub json: bool,
}

impl SendOptions {
    /// The migration that is asked for, as a holder is told it.
    pub fn migrate(&self, to: &Address) -> Migrate {
        Migrate {
            to: to.to_string(),
            downtime_ms: self.downtime.map(whole_ms),
            max_rounds: self.max_rounds,
            priority: self.priority,
            on_stall: self.on_stall,
            keep_speed_percent: self.keep_speed,
            channels: self.channels.and_then(|c| c.0),
            compress: self.compress.map(|c| c.to_string()),
            bandwidth: self.bandwidth,
            pause_bandwidth: self.pause_bandwidth,
            verify: Some(self.verify),
            guest_time: Some(self.guest_time),
            progress: true,
        }
    }
}

impl SendOptions {
    /// The estimate that is asked for, as a holder is told it.
    pub fn estimate(&self) -> Estimate {
        Estimate {
            downtime_ms: self.downtime.map(whole_ms),
            max_rounds: self.max_rounds,
            priority: self.priority,
            on_stall: self.on_stall,
            keep_speed_percent: self.keep_speed,
            bandwidth: self.bandwidth,
            pause_bandwidth: self.pause_bandwidth,
        }
    }
}

/// Rounded up, so that a limit below a millisecond is not mistaken for none at all.
fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

fn parse_receiver(text: &str) -> Result<Address, String> {
    let address: Address = text.parse().map_err(|e: mig::transport::AddressError| e.to_string())?;
    match address.to_string().ends_with(":0") {
        true => Err("port 0 is for listening; give the port that mig-recv printed".into()),
        false => Ok(address),
    }
}

fn parse_unix(text: &str) -> Result<PathBuf, String> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(path.into()),
        _ => Err(format!("'{text}' is no socket; write unix:PATH")),
    }
}

/// Where a holder is controlled that was not told.
pub fn default_control(program: &str) -> PathBuf {
    let directory = std::env::var_os("XDG_RUNTIME_DIR")
        .map(PathBuf::from)
        .filter(|d| d.is_absolute() && d.is_dir())
        .unwrap_or_else(std::env::temp_dir);
    directory.join(format!("{program}-{}.sock", std::process::id()))
}

/// What is wrong with the options; none if the text asked for (`--help`) is all there is.
pub fn usage_failure(program: &str, error: &clap::Error) -> Option<Failure> {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        return None;
    }
    let text = error.to_string();
    let cause: Vec<&str> = text
        .lines()
        .take_while(|l| !l.starts_with("Usage:") && !l.starts_with("For more information"))
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    // clap names the options of a group even where they are hidden.
    let cause = cause.join(" ").replace("|--demo-receiver <PATH>", "");
    let side = if program == "mig-recv" { "destination" } else { "source" };
    let remedy = format!("see {program} --help");
    Some(Failure::new(side, "options", cause.strip_prefix("error: ").unwrap_or(&cause), remedy))
}

#[cfg(test)]
mod tests {
    use mig::pacing::{Bandwidth, InPause};

    use super::*;

    fn send(line: &str) -> Result<SendOptions, clap::Error> {
        SendOptions::try_parse_from(std::iter::once("mig-send").chain(line.split_whitespace()))
    }

    fn recv(line: &str) -> Result<RecvOptions, clap::Error> {
        RecvOptions::try_parse_from(std::iter::once("mig-recv").chain(line.split_whitespace()))
    }

    #[test]
    fn the_documented_lines_are_understood() {
        let options = send(
            "--to tcp:[::1]:4 --guest dirtier:rate=20MiB --memory 512MiB --cpus 4 --after 500ms \
                            --downtime 10ms --max-rounds 3 --channels 8 --compress zstd --verify --guest-time stop --control unix:/x --json",
        )
        .unwrap();
        assert_eq!((options.memory, options.cpus, options.after), (512 << 20, 4, Duration::from_millis(500)));
        let migrate = options.migrate(options.to.as_ref().unwrap());
        assert_eq!((migrate.downtime_ms, migrate.max_rounds, migrate.channels), (Some(10), Some(3), Some(8)));
        assert_eq!((migrate.to.as_str(), migrate.verify), ("tcp:[::1]:4", Some(true)));
        assert_eq!(migrate.compress.as_deref(), Some("zstd:1"));
        assert_eq!(options.control, Some("/x".into()));
        assert!(send("--to tcp:h:1 --kernel vmlinux --initrd i --cmdline quiet").is_ok());
        assert!(send("--kernel vmlinux --console stdio").is_ok() && send("--guest idle --json").is_ok());
        assert!(send("--vm unix:/x --to tcp:h:1 --verify").is_ok());
        assert_eq!(send("--vm unix:/x --resolve discard --json").unwrap().resolve, Some(Word::Discard));
        assert_eq!(send("--guest idle --lease /l").unwrap().lease, Some("/l".into()));
        assert_eq!(recv("--listen tcp:h:1 --lease /l").unwrap().lease, Some("/l".into()));
        assert!(send("--demo").is_ok() && send("--demo-receiver /x").is_ok());
        let short = send("--to tcp:h:1 --guest idle --downtime 10us").unwrap();
        assert_eq!(short.migrate(short.to.as_ref().unwrap()).downtime_ms, Some(1));
        assert!(
            recv("--listen tcp:0.0.0.0:0 --control unix:/x --console none --max-memory 1GiB --json").is_ok()
        );
    }

    #[test]
    fn the_dirty_log_is_a_bitmap_unless_a_ring_is_asked_for() {
        let tracking = |line| mig_vmm::Tracking::from(send(line).unwrap().dirty_log);
        assert_eq!(tracking("--guest idle"), mig_vmm::Tracking::Bitmap);
        assert_eq!(tracking("--guest idle --dirty-log ring"), mig_vmm::Tracking::RING);
        assert_eq!(recv("--listen tcp:h:1").unwrap().dirty_log, DirtyLog::Bitmap);
        assert_eq!(recv("--listen tcp:h:1 --dirty-log ring").unwrap().dirty_log, DirtyLog::Ring);
        assert!(
            send("--vm unix:/x --to tcp:h:1 --dirty-log ring").is_err(),
            "it was chosen when the guest began"
        );
    }

    #[test]
    fn a_bandwidth_caps_the_rounds_and_says_what_the_pause_may_take() {
        let line = "--to tcp:h:1 --guest idle --bandwidth 1Gbit";
        let asked = |more: &str| {
            let migrate = send(&format!("{line} {more}")).unwrap().migrate(&"tcp:h:1".parse().unwrap());
            migrate.settings().unwrap().1.engine.bandwidth
        };
        let gbit = Some(125_000_000);
        assert_eq!(asked(""), Bandwidth { cap_bytes_per_second: gbit, in_pause: InPause::Lifted });
        let known = InPause::Known(1_250_000_000);
        assert_eq!(
            asked("--pause-bandwidth 10Gbit"),
            Bandwidth { cap_bytes_per_second: gbit, in_pause: known }
        );
        let estimate = send("--vm unix:/x --estimate --bandwidth 1Gbit --downtime 10ms").unwrap().estimate();
        assert_eq!((estimate.bandwidth, estimate.downtime_ms), (Some(Cap(gbit)), Some(10)));
        assert_eq!(send("--vm unix:/x --set-bandwidth off").unwrap().set_bandwidth, Some(Cap(None)));
    }

    #[test]
    fn channels_are_a_number_or_left_to_both_hosts() {
        let channels = |line| send(line).unwrap().migrate(&"tcp:h:1".parse().unwrap()).channels;
        assert_eq!(channels("--to tcp:h:1 --guest idle --channels 64"), Some(64));
        assert_eq!(channels("--to tcp:h:1 --guest idle --channels auto"), None);
    }

    #[test]
    fn what_is_not_given_has_the_documented_default() {
        let options = send("--to tcp:h:1 --guest idle").unwrap();
        assert_eq!((options.memory, options.cpus, options.after), (1 << 30, 2, Duration::from_secs(2)));
        let (_, settings) = options.migrate(options.to.as_ref().unwrap()).settings().unwrap();
        assert_eq!(settings.guest_time, mig_vmm::GuestTime::Advance);
        let engine = settings.engine;
        assert_eq!(engine.policy, mig::policy::Policy::default());
        assert_eq!((engine.channels, engine.compress, engine.verify), (None, mig::Compress::Off, false));
        let help = <SendOptions as clap::CommandFactory>::command().render_long_help().to_string();
        for word in [
            "300ms",
            "default: 30",
            "default: auto]",
            "dirtier",
            "in doubt",
            "unix:PATH",
            "1GiB",
            "--resolve",
            "--lease",
            "--compress",
        ] {
            assert!(help.contains(word), "{word} is in\n{help}");
        }
    }

    #[test]
    fn lines_that_make_no_sense_are_refused_with_side_step_cause_and_remedy() {
        let lines = [
            "",
            "--to tcp:h:1",
            "--guest idle --after 1s",
            "--guest idle --verify",
            "--vm unix:/x",
            "--guest idle --to nowhere",
            "--guest idle --to tcp:h:0",
            "--guest nosuch --to tcp:h:1",
            "--guest idle --kernel k --to tcp:h:1",
            "--guest idle --to tcp:h:1 --cpus 0",
            "--guest idle --to tcp:h:1 --cpus 33",
            "--guest idle --to tcp:h:1 --channels 65",
            "--guest idle --to tcp:h:1 --channels 0",
            "--guest idle --to tcp:h:1 --channels many",
            "--guest idle --to tcp:h:1 --priority all",
            "--guest idle --to tcp:h:1 --on-stall wait",
            "--guest idle --to tcp:h:1 --keep-speed 0",
            "--guest idle --to tcp:h:1 --keep-speed 101",
            "--guest idle --to tcp:h:1 --bandwidth fast",
            "--guest idle --to tcp:h:1 --bandwidth 1Kbit",
            "--guest idle --to tcp:h:1 --pause-bandwidth capped",
            "--guest idle --bandwidth 1Gbit",
            "--vm unix:/x --set-bandwidth 1",
            "--guest idle --estimate",
            "--vm unix:/x --estimate --to tcp:h:1",
            "--vm unix:/x --estimate --verify",
            "--vm unix:/x --to tcp:h:1 --set-bandwidth 1Gbit",
            "--guest idle --set-bandwidth 1Gbit",
            "--guest idle --to tcp:h:1 --memory big",
            "--guest idle --to tcp:h:1 --after 5",
            "--guest idle --to tcp:h:1 --initrd i",
            "--vm /x --to tcp:h:1",
            "--vm unix:/x --to tcp:h:1 --cpus 3",
            "--demo --to tcp:h:1",
            "--demo --lease /l",
            "--vm unix:/x --to tcp:h:1 --lease /l",
            "--vm unix:/x --to tcp:h:1 --resolve resume",
            "--vm unix:/x --resolve maybe",
            "--vm unix:/x --resolve resume --verify",
            "--guest idle --resolve resume",
            "--resolve resume",
            "--guest idle --to tcp:h:1 --max-rounds 0",
            "--guest idle --to tcp:h:1 --guest-time rewind",
        ];
        for line in lines {
            let failure = usage_failure("mig-send", &send(line).expect_err(line)).unwrap();
            for answer in [&failure.side, &failure.step, &failure.cause, &failure.remedy] {
                assert!(!answer.is_empty(), "{line}: {failure:?}");
            }
            assert!(!failure.cause.contains('\n') && !failure.cause.starts_with("error"), "{failure:?}");
        }
        let failure = usage_failure("mig-send", &send("").unwrap_err()).unwrap();
        assert!(failure.cause.contains("--demo") && !failure.cause.contains("receiver"), "{failure:?}");
        let failure = usage_failure("mig-send", &send("--guest idle --to udp:h:1").unwrap_err()).unwrap();
        assert!(failure.cause.contains("udp"), "{failure:?}");
        assert!(usage_failure("mig-send", &send("--help").unwrap_err()).is_none());
    }
}
