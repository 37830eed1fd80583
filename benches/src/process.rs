//! What a process costs, as its host counts it: processor time without its guest's vCPUs, and memory without
//! its guest's.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;

/// How often a process is looked at that may end at any moment.
const INTERVAL: Duration = Duration::from_millis(20);
/// What the names of vCPU threads start with.
const VCPU: &str = "vcpu-";

/// A process at a moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Processor time of all its threads, those that have ended among them.
    pub cpu: Duration,
    /// Of its vCPU threads alone.
    pub vcpus: Duration,
    /// The most memory it had resident since [`Process::forget_peak`].
    pub peak_bytes: u64,
}

/// A process of this host.
#[derive(Debug, Clone, Copy)]
pub struct Process {
    pid: u32,
}

impl Process {
    /// The process of that number.
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    fn read(self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.pid);
        fs::read_to_string(&path).with_context(|| path)
    }

    /// Processor time so far; also of one that has ended and was not waited for.
    ///
    /// # Errors
    /// There is no such process.
    pub fn cpu(self) -> Result<Duration> {
        let pid = Pid::from_raw(i32::try_from(self.pid)?);
        Ok(clock_getcpuclockid(pid)?.now()?.into())
    }

    /// Starts a new peak from what is resident now (proc(5), `clear_refs`).
    ///
    /// # Errors
    /// The host does not let this user.
    pub fn forget_peak(self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.pid);
        fs::write(&path, "5").with_context(|| path)
    }

    /// As it is now.
    ///
    /// # Errors
    /// It has ended.
    pub fn sample(self) -> Result<Sample> {
        let peak_bytes = status_bytes(&self.read("status")?, "VmHWM:").context("no VmHWM: it has ended")?;
        Ok(Sample { cpu: self.cpu()?, vcpus: self.vcpu_time()?, peak_bytes })
    }

    /// Processor time of the vCPU threads there are (`schedstat` counts nanoseconds).
    fn vcpu_time(self) -> Result<Duration> {
        let mut sum = Duration::ZERO;
        for task in fs::read_dir(format!("/proc/{}/task", self.pid))? {
            let task = task?.path();
            // A thread may end between the listing and the look.
            let (Ok(name), Ok(stat)) =
                (fs::read_to_string(task.join("comm")), fs::read_to_string(task.join("schedstat")))
            else {
                continue;
            };
            if name.starts_with(VCPU) {
                let on_cpu = stat.split_whitespace().next().and_then(|ns| ns.parse().ok());
                sum += Duration::from_nanos(on_cpu.context("no time in schedstat")?);
            }
        }
        Ok(sum)
    }

    /// Resident bytes, quickly.
    ///
    /// # Errors
    /// It has ended.
    pub fn resident_bytes(self) -> Result<u64> {
        let pages = self.read("statm")?.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
        Ok(pages.context("no pages in statm")? * 4096)
    }

    /// Resident bytes of all mappings, and of the guest's memory among them.
    ///
    /// # Errors
    /// It has ended.
    pub fn resident(self) -> Result<Resident> {
        Ok(Resident::parse(&self.read("smaps")?))
    }
}

/// Resident memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Resident {
    /// Of all mappings.
    pub all_bytes: u64,
    /// Of the guest's memory: mappings that asked for huge pages, which nothing else in these programs does.
    pub guest_bytes: u64,
}

impl Resident {
    fn parse(smaps: &str) -> Self {
        let mut sum = Self::default();
        let mut rss = 0;
        for line in smaps.lines() {
            if let Some(bytes) = status_bytes(line, "Rss:") {
                rss = bytes;
                sum.all_bytes += bytes;
            } else if let Some(flags) = line.strip_prefix("VmFlags:")
                && flags.split_whitespace().any(|flag| flag == "hg")
            {
                sum.guest_bytes += rss;
            }
        }
        sum
    }
}

/// The value of a line `NAME:  123 kB`, in bytes.
fn status_bytes(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Looks at processes again and again, so that the last look at one that ends is a recent one.
#[derive(Debug)]
pub struct Watch {
    last: Arc<Mutex<BTreeMap<u32, Sample>>>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Starts to look.
    pub fn start(pids: &[u32]) -> Self {
        let last = Arc::<Mutex<BTreeMap<u32, Sample>>>::default();
        let ended = Arc::new(AtomicBool::new(false));
        let (mine, end, pids) = (last.clone(), ended.clone(), pids.to_vec());
        let thread = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                look(&pids, &mine);
                std::thread::sleep(INTERVAL);
            }
        });
        Self { last, ended, thread: Some(thread) }
    }

    /// Looks once more; the last sample of each process.
    pub fn finish(mut self, pids: &[u32]) -> Vec<Sample> {
        self.stop();
        look(pids, &self.last);
        let last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        pids.iter().map(|pid| last.get(pid).cloned().unwrap_or_default()).collect()
    }

    fn stop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the watching thread does not panic");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Keeps what is known of a process that has ended, but for its processor time, which goes on being known.
fn look(pids: &[u32], last: &Mutex<BTreeMap<u32, Sample>>) {
    for pid in pids {
        let process = Process::new(*pid);
        let sample = process.sample();
        let mut last = last.lock().unwrap_or_else(|e| e.into_inner());
        let entry = last.entry(*pid).or_default();
        match (sample, process.cpu()) {
            (Ok(sample), _) if sample.vcpus >= entry.vcpus => *entry = sample,
            // vCPU threads that have ended are counted in the whole still
            (Ok(Sample { cpu, .. }), _) | (Err(_), Ok(cpu)) => entry.cpu = cpu,
            (Err(_), Err(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0100000000 rw-p 00000000 00:00 0
Size:            4194304 kB
Rss:             1048576 kB
VmFlags: rd wr mr mw me ac sd hg
7f0200000000-7f0200001000 r-xp 00000000 08:01 42   /usr/lib/x.so
Rss:                   4 kB
VmFlags: rd ex mr mw me sd
7f0300000000-7f0380000000 rw-p 00000000 00:00 0
Rss:                   8 kB
VmFlags: rd wr mr mw me ac sd hg
";

    #[test]
    fn the_guests_memory_is_what_asked_for_huge_pages() {
        let expected = Resident { all_bytes: (1 << 30) + 12 * 1024, guest_bytes: (1 << 30) + 8 * 1024 };
        assert_eq!(Resident::parse(SMAPS), expected);
    }

    #[test]
    fn lines_of_status_are_in_bytes() {
        assert_eq!(status_bytes("VmPeak:\t  9 kB\nVmHWM:\t   12 kB\n", "VmHWM:"), Some(12 << 10));
        assert_eq!(status_bytes("VmPeak:\t  9 kB\n", "VmHWM:"), None);
    }

    #[test]
    fn a_process_that_works_uses_processor_time() {
        let me = Process::new(std::process::id());
        let before = me.sample().unwrap();
        let until = std::time::Instant::now() + Duration::from_millis(30);
        while std::time::Instant::now() < until {}
        let after = me.sample().unwrap();
        assert!(after.cpu > before.cpu && after.peak_bytes > 0 && after.vcpus == Duration::ZERO);
        assert!(me.resident().unwrap().all_bytes > 0 && me.resident_bytes().unwrap() > 0);
    }
}
