//! Two hosts with a link of a given bandwidth: network namespaces joined by a veth pair, with a token bucket
//! (`tc qdisc tbf`) on each end. Needs root and iproute2.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};

const ADDRESSES: [&str; 2] = ["10.78.0.1/24", "10.78.0.2/24"];
/// What each end of the link is called.
pub(crate) const INTERFACE: &str = "wire";

/// The source's host and the destination's. They go when this is dropped.
#[derive(Debug)]
pub struct Hosts {
    names: [String; 2],
}

impl Hosts {
    /// The address of the destination.
    pub const LISTEN: &'static str = "10.78.0.2";

    /// Two hosts, whose link takes so many bits a second each way; as many as it can, without.
    ///
    /// # Errors
    /// The reason why there cannot be any.
    pub fn start(bits_per_second: Option<u64>) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let hosts =
            Self { names: ["s", "d"].map(|side| format!("migb-{}-{number}{side}", std::process::id())) };
        let [source, destination] = &hosts.names;
        run("ip", &["netns", "add", source])?;
        run("ip", &["netns", "add", destination])?;
        let ends = ["netns", source, "type", "veth", "peer", "name", INTERFACE, "netns", destination];
        run("ip", &[&["link", "add", INTERFACE][..], &ends].concat())?;
        for (host, address) in hosts.names.iter().zip(ADDRESSES) {
            run("ip", &["-n", host, "address", "add", address, "dev", INTERFACE])?;
            run("ip", &["-n", host, "link", "set", INTERFACE, "up"])?;
            if let Some(rate) = bits_per_second {
                // a millisecond of the rate, and no less than what one send can hand over at once
                let burst = (rate / 8 / 1000).max(128 << 10);
                let (rate, burst) = (format!("{rate}bit"), burst.to_string());
                let bucket = ["root", "tbf", "rate", &rate, "burst", &burst, "latency", "20ms"];
                run("tc", &[&["-n", host, "qdisc", "add", "dev", INTERFACE][..], &bucket].concat())?;
            }
        }
        Ok(hosts)
    }

    /// The command, on the source's host.
    pub fn on_source(&self, command: Command) -> Command {
        self.on(0, &command)
    }

    /// The command, on the destination's host.
    pub fn on_destination(&self, command: Command) -> Command {
        self.on(1, &command)
    }

    fn on(&self, host: usize, command: &Command) -> Command {
        let mut there = Command::new("ip");
        there.args(["netns", "exec", &self.names[host]]).arg(command.get_program()).args(command.get_args());
        there
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.names {
            // one that could not be made cannot be taken away either
            let _ = run("ip", &["netns", "del", host]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let command = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).output().with_context(command)?;
    ensure!(output.status.success(), "{}: {}", command(), String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
