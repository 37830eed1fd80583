//! The host that was measured, for whoever reads the figures.

use std::ffi::OsString;
use std::fs;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// A host, and what was measured on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// The processor's name.
    pub cpu: String,
    /// Its cores.
    pub cores: usize,
    /// Bytes of memory, as `MemTotal` has it.
    pub memory_bytes: u64,
    /// System, release and architecture.
    pub kernel: String,
    /// Which KVM, by its modules.
    pub kvm: String,
    /// Where huge pages are used.
    pub huge_pages: String,
    /// The load of 1, 5 and 15 minutes at the start.
    pub load: String,
    /// At the start, UTC.
    pub date: String,
    /// The commit, with a plus where files differ from it.
    pub commit: String,
    /// The compiler.
    pub rustc: String,
}

impl Host {
    /// This one. What cannot be found is said to be unknown.
    pub fn here() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let commit = run("git", &["-C", env!("CARGO_MANIFEST_DIR"), "rev-parse", "--short=12", "HEAD"]);
        let changed =
            run("git", &["-C", env!("CARGO_MANIFEST_DIR"), "status", "--porcelain", "--untracked-files=no"]);
        Self {
            cpu: value(&read("/proc/cpuinfo"), "model name").unwrap_or_else(unknown),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            memory_bytes: value(&read("/proc/meminfo"), "MemTotal")
                .and_then(|kb| kb.strip_suffix("kB")?.trim().parse::<u64>().ok())
                .map_or(0, |kib| kib * 1024),
            kernel: run("uname", &["-srm"]).unwrap_or_else(unknown),
            kvm: kvm(fs::read_dir("/sys/module").into_iter().flatten().flatten().map(|e| e.file_name())),
            huge_pages: chosen(&read("/sys/kernel/mm/transparent_hugepage/enabled")).unwrap_or_else(unknown),
            load: read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" "),
            date: run("date", &["-u", "+%Y-%m-%d %H:%M"]).unwrap_or_else(unknown),
            commit: commit.unwrap_or_else(unknown) + if changed.is_some() { "+" } else { "" },
            rustc: run("rustc", &["--version"]).unwrap_or_else(unknown),
        }
    }

    /// Whether others were at work in the minute before.
    pub fn is_busy(&self) -> bool {
        let load = self.load.split_whitespace().next().and_then(|load| load.parse::<f64>().ok());
        load.is_some_and(|load| load > 0.5)
    }

    /// A line or two of prose.
    pub fn describe(&self) -> String {
        format!(
            "{} cores of {}, {:.1} GiB, {}, KVM: {}, huge pages: {}; load at the start {}; {} UTC, commit {}, {}",
            self.cores,
            self.cpu,
            self.memory_bytes as f64 / crate::text::GIB,
            self.kernel,
            self.kvm,
            self.huge_pages,
            self.load,
            self.date,
            self.commit,
            self.rustc,
        )
    }
}

fn unknown() -> String {
    "unknown".into()
}

/// The value of a line `NAME : VALUE`.
fn value(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Of `always [madvise] never`, what is in brackets.
fn chosen(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Of the kernel's modules, loaded or built in, those of KVM.
fn kvm(modules: impl Iterator<Item = OsString>) -> String {
    let mut names: Vec<_> =
        modules.filter_map(|name| name.into_string().ok()).filter(|name| name.starts_with("kvm")).collect();
    names.sort_unstable();
    if names.is_empty() { unknown() } else { names.join(", ") }
}

/// What a command prints, if it prints anything and succeeds.
fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok().filter(|o| o.status.success())?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_found_in_what_the_kernel_prints() {
        assert_eq!(
            value("processor\t: 0\nmodel name\t: A B @ 2\n", "model name").as_deref(),
            Some("A B @ 2")
        );
        assert_eq!(chosen("always [madvise] never\n").as_deref(), Some("madvise"));
        assert_eq!(kvm(["tun", "kvm_intel", "kvm"].into_iter().map(Into::into)), "kvm, kvm_intel");
        assert_eq!(kvm(std::iter::empty()), "unknown");
        let host = Host { load: "0.61 0.10 0.01".into(), ..Host::here() };
        assert!(host.describe().contains("cores of") && host.is_busy());
        assert!(!Host { load: "0.40 2.00 2.00".into(), ..host }.is_busy());
    }
}
