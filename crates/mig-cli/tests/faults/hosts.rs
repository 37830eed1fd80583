//! Two hosts: network namespaces joined by a veth pair, whose link can be cut and healed.
//!
//! Needs root and iproute2. Where they cannot be made the tests say so loudly, and fail with
//! `MIG_REQUIRE_NETNS=1`.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::pair::Side;

/// Where the receiver listens, on its host.
pub const LISTEN: &str = "tcp:10.77.0.2:0";
const ADDRESSES: [&str; 2] = ["10.77.0.1/24", "10.77.0.2/24"];
const INTERFACE: &str = "wire";

/// What is wrong with the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Down, as if unplugged.
    Unplugged,
    /// Nothing reaches the destination.
    ToDestination,
    /// Nothing reaches the source.
    ToSource,
}

impl Cut {
    pub const ALL: [Self; 3] = [Self::Unplugged, Self::ToDestination, Self::ToSource];

    pub fn name(self) -> &'static str {
        match self {
            Self::Unplugged => "both ways",
            Self::ToDestination => "to destination",
            Self::ToSource => "to source",
        }
    }
}

/// The source's host and the destination's. They go when this is dropped.
pub struct Hosts {
    names: [String; 2],
}

impl Hosts {
    /// # Errors
    /// The reason why there cannot be any.
    pub fn start() -> Result<Self, String> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let names = ["s", "d"].map(|side| format!("mig-{}-{number}{side}", std::process::id()));
        let hosts = Self { names };
        let [source, destination] = &hosts.names;
        run("ip", &["netns", "add", source])?;
        run("ip", &["netns", "add", destination])?;
        let ends = ["netns", source, "type", "veth", "peer", "name", INTERFACE, "netns", destination];
        run("ip", &[&["link", "add", INTERFACE][..], &ends].concat())?;
        for (host, address) in hosts.names.iter().zip(ADDRESSES) {
            run("ip", &["-n", host, "address", "add", address, "dev", INTERFACE])?;
            run("ip", &["-n", host, "link", "set", INTERFACE, "up"])?;
        }
        Ok(hosts)
    }

    /// The command, on the host of a side.
    pub fn on(&self, side: Side, command: Command) -> Command {
        let mut there = Command::new("ip");
        there.args(["netns", "exec", &self.names[side as usize]]).arg(command.get_program());
        there
    }

    pub fn cut(&self, cut: Cut) {
        self.link(cut, ["down", "add"]);
    }

    pub fn heal(&self, cut: Cut) {
        self.link(cut, ["up", "del"]);
    }

    fn link(&self, cut: Cut, [state, queue]: [&str; 2]) {
        let [source, destination] = &self.names;
        let done = match cut {
            Cut::Unplugged => run("ip", &["-n", source, "link", "set", INTERFACE, state]),
            Cut::ToDestination => run("tc", &nowhere(source, queue)),
            Cut::ToSource => run("tc", &nowhere(destination, queue)),
        };
        done.expect("a link is cut and healed");
    }
}

/// A queue without room, which drops whatever is sent.
fn nowhere<'a>(host: &'a str, queue: &'a str) -> Vec<&'a str> {
    vec!["-n", host, "qdisc", queue, "dev", INTERFACE, "root", "pfifo", "limit", "0"]
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for host in &self.names {
            // one that could not be made cannot be taken away either
            let _ = run("ip", &["netns", "del", host]);
        }
    }
}

fn run(program: &str, arguments: &[&str]) -> Result<(), String> {
    let command = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program).args(arguments).output().map_err(|e| format!("{}: {e}", command()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("{}: {}", command(), String::from_utf8_lossy(&output.stderr).trim())),
    }
}

/// Whether two hosts can be had.
pub fn are_there() -> bool {
    match Hosts::start() {
        Ok(_) => true,
        Err(error) => {
            assert!(std::env::var_os("MIG_REQUIRE_NETNS").is_none(), "no two hosts: {error}");
            eprintln!("SKIPPED: no two hosts ({error})");
            false
        }
    }
}
