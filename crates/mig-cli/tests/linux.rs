//! A Linux guest moves while it works: `tests/guests/linux` builds it, `MIG_LINUX` names the directory with its
//! `vmlinux` and `initrd.cpio`. `MIG_STOCK_KERNEL` names the `vmlinux` of Debian's cloud kernel, as
//! `tests/guests/linux/stock` gets it. `MIG_HOPS` sets the number of hops of the long tests.

#![allow(missing_docs)]

mod support;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::Value;
use support::terminal::Guest;
use support::{hops, kvm_is_there};

/// What a kernel prints when something went wrong, and our guest programs too.
const BAD_WORDS: [&str; 12] = [
    "ERROR",
    "BUG:",
    "WARNING:",
    "Oops",
    "panic",
    "soft lockup",
    "hard LOCKUP",
    "rcu_sched",
    "rcu: INFO",
    "blocked for more than",
    "unstable",
    "Call Trace",
];

/// What the watching program counts: checks of memory, the heap, clocks, TSCs of two CPUs against each other,
/// timers, pipes, signals, FPU and SSE registers, files.
const CHECKERS: [&str; 12] = [
    "patterns", "pages", "nodes", "clocks", "bounces", "ticks", "sleeps", "alarms", "echoes", "signals",
    "fpu", "files",
];

/// The built guest, where there is one.
fn linux() -> Option<(String, String)> {
    let Some(directory) = std::env::var_os("MIG_LINUX").map(PathBuf::from) else {
        eprintln!("SKIPPED: MIG_LINUX names no Linux guest (tests/guests/linux/build makes one)");
        return None;
    };
    let file = |name| {
        let path = directory.join(name);
        assert!(path.exists(), "MIG_LINUX: {} is missing", path.display());
        path.to_str().expect("a path in UTF-8").to_owned()
    };
    kvm_is_there().then(|| (file("vmlinux"), file("initrd.cpio")))
}

/// Boots it with `job` on its command line.
fn boot(job: &str, cpus: u8) -> Option<Guest> {
    let (kernel, initrd) = linux()?;
    let (cmdline, cpus) = (format!("quiet console=ttyS0 panic=-1 reboot=k {job}"), cpus.to_string());
    let files = ["--kernel", &kernel, "--initrd", &initrd, "--cmdline", &cmdline];
    Some(Guest::boot(&[&files[..], &["--memory", "128MiB", "--cpus", &cpus]].concat()))
}

/// Asserts that nobody complained: neither the kernel nor our programs.
fn assert_sound(text: &str) {
    let bad = text.lines().find(|line| BAD_WORDS.iter().any(|word| line.contains(word)));
    assert_eq!(bad, None, "in\n{text}");
}

/// A line of the watching program: its number, and what it says.
#[derive(Debug, Clone)]
struct Watch {
    number: u64,
    says: BTreeMap<String, f64>,
}

/// The whole lines that `program` printed, of the form `PROGRAM NUMBER key=value ...`.
fn lines_of(program: &str, text: &str) -> Vec<Watch> {
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    let said = whole.lines().filter_map(|line| line.strip_prefix(program)?.strip_prefix(' '));
    said.filter(|line| !line.starts_with("ERROR") && *line != "begins").map(watch).collect()
}

/// `NUMBER key=value ...`, or `NUMBER ok`.
fn watch(line: &str) -> Watch {
    let broken = || -> ! { panic!("a broken line: {line}") };
    let mut words = line.split_whitespace();
    let number = words.next().and_then(|n| n.parse().ok()).unwrap_or_else(|| broken());
    let says = words.filter(|word| *word != "ok").map(|word| {
        let (key, value) = word.split_once('=').unwrap_or_else(|| broken());
        (key.to_owned(), value.parse().unwrap_or_else(|_| broken()))
    });
    Watch { number, says: says.collect() }
}

/// Asserts that each number from 1 on is there, once, in order.
fn assert_every_number_once(lines: &[Watch], text: &str) {
    for (line, expected) in lines.iter().zip(1..) {
        assert_eq!(line.number, expected, "every line once, in order:\n{text}");
        assert!(line.says.keys().eq(lines[0].says.keys()), "line {expected} says the same things:\n{text}");
        assert!(line.says.get("errors").is_none_or(|errors| *errors == 0.0), "line {expected}:\n{text}");
    }
}

/// Keeps one of the host's cores busy until it is dropped.
struct Load(Arc<AtomicBool>);

impl Load {
    fn new() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        std::thread::spawn(move || while !stopped.load(Ordering::Relaxed) {});
        Self(stop)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn tell(what: &str, hop: usize, report: &Value, more: &str) {
    println!(
        "{what} hop {hop}: {} after {} rounds, total {:.0} ms, downtime {:.2} ms (predicted {:.2}){more}",
        report["stop_reason"].as_str().unwrap_or("?"),
        report["rounds"],
        report["total_ms"].as_f64().unwrap_or(f64::NAN),
        report["downtime_ms"].as_f64().unwrap_or(f64::NAN),
        report["predicted_downtime_ms"].as_f64().unwrap_or(f64::NAN),
    );
    if report["downtime_ms"].as_f64() > Some(20.0) {
        println!("  {}", report["downtime"]);
    }
}

/// Waits for `more` further lines of `program`.
fn wait_for_lines(guest: &mut Guest, program: &str, more: usize) -> Vec<Watch> {
    let have = lines_of(program, &guest.text()).len();
    guest.wait(&format!("{more} further lines of {program}"), |text| {
        let lines = lines_of(program, text);
        (lines.len() >= have + more).then_some(lines)
    })
}

/// Moves a guest that watches itself `count` times while it and the host are busy.
fn watches_itself_over(count: usize, cpus: u8, clocksource: &str) {
    let Some(mut guest) = boot(&format!("job=watch watch.args=--spin {clocksource}"), cpus) else { return };
    let worst =
        |lines: &[Watch], key| lines.iter().filter_map(|l| l.says.get(key)).copied().fold(0.0, f64::max);
    let _load = Load::new();
    let still = wait_for_lines(&mut guest, "watch", 4);
    let what = format!("Linux, {cpus} vCPUs {clocksource}");
    let (jump, late) = (worst(&still[1..], "jump_ms"), worst(&still[1..], "late_ms"));
    println!("{what} before it moves: jumps of {jump:.1} ms, timers late by {late:.1} ms");
    for hop in 1..=count {
        let before = wait_for_lines(&mut guest, "watch", 1).len();
        let report = guest.hop();
        // the second in which it moved is told by the line after it, or the one after that
        let lines = wait_for_lines(&mut guest, "watch", 2);
        let (jump, late) = (worst(&lines[before..], "jump_ms"), worst(&lines[before..], "late_ms"));
        tell(
            &what,
            hop,
            &report,
            &format!(", the guest saw a jump of {jump:.2} ms, timers late by {late:.1} ms"),
        );
        // In these parts it certainly stood still; it may run before the source has heard so.
        let parts = ["save", "last_sync", "transfer", "load"].map(|part| report["downtime"][part].as_f64());
        let paused: f64 = parts.into_iter().map(|part| part.expect("a moved guest had a downtime")).sum();
        assert!(jump >= paused, "the pause is time that passed: {jump} {report}");
    }
    let text = guest.quit();
    let lines = lines_of("watch", &text);
    assert_every_number_once(&lines, &text);
    assert_every_checker_worked(&lines, cpus, &text);
    assert_sound(&text);
}

/// Asserts that each of the program's checkers got on between the first line and the last.
fn assert_every_checker_worked(lines: &[Watch], cpus: u8, text: &str) {
    let (first, last) = (&lines[0].says, &lines[lines.len() - 1].says);
    for checker in CHECKERS.into_iter().filter(|c| cpus > 1 || *c != "bounces") {
        assert!(last[checker] > first[checker], "{checker} stands still:\n{text}");
    }
}

#[test]
fn linux_with_one_vcpu_notices_nothing_but_the_pause() {
    watches_itself_over(hops(2), 1, "");
}

#[test]
fn linux_with_two_vcpus_notices_nothing_but_the_pause() {
    watches_itself_over(hops(4).div_ceil(2), 2, "");
}

#[test]
fn linux_on_kvmclock_notices_nothing_but_the_pause() {
    watches_itself_over(hops(4).div_ceil(4).max(2), 2, "clocksource=kvm-clock");
}

#[test]
fn linux_moves_in_its_early_boot_before_it_has_a_console() {
    for cpus in [1, 2] {
        let Some(mut guest) = boot("job=watch", cpus) else { return };
        for hop in 1..=8 {
            let report = guest.hop();
            let silent = guest.text().is_empty();
            assert!(silent || hop > 1, "the first one came too late:\n{}", guest.text());
            let when = if silent { "before it has a console" } else { "early" };
            tell(&format!("Linux, {cpus} vCPUs, {when}"), hop, &report, "");
            std::thread::sleep(Duration::from_millis(300));
        }
        wait_for_lines(&mut guest, "watch", 3);
        let text = guest.quit();
        assert_every_number_once(&lines_of("watch", &text), &text);
        assert_sound(&text);
    }
}

#[test]
fn linux_moves_while_it_unpacks_a_file() {
    let Some(mut guest) = boot("job=unpack", 1) else { return };
    wait_for_lines(&mut guest, "unpack", 1);
    for hop in 1..=hops(2).min(5) {
        tell("Linux, unpacking", hop, &guest.hop(), "");
        wait_for_lines(&mut guest, "unpack", 1);
    }
    let text = guest.quit();
    assert_every_number_once(&lines_of("unpack", &text), &text);
    assert_sound(&text);
}

#[test]
fn a_line_half_typed_at_the_source_is_ended_at_the_destination() {
    let Some(mut guest) = boot("job=shell", 1) else { return };
    guest.wait_for("guest# ");
    for hop in 1..=hops(2).min(5) {
        let words = format!("half{hop}");
        guest.type_in(&format!("echo {words}-$((40"));
        guest.wait_for(&format!("echo {words}-$((40"));
        tell("Linux, half a line", hop, &guest.hop(), "");
        guest.type_in("+2))\n");
        guest.wait_for(&format!("\n{words}-42\nguest# "));
    }
    assert_sound(&guest.quit());
}

#[test]
fn linux_moves_while_it_idles_and_wakes_when_somebody_types() {
    for cpus in [1, 2] {
        let Some(mut guest) = boot("job=shell", cpus) else { return };
        guest.wait_for("guest# ");
        for hop in 1..=hops(2).min(5) {
            std::thread::sleep(Duration::from_millis(500));
            tell(&format!("Linux, {cpus} vCPUs, idle"), hop, &guest.hop(), "");
            std::thread::sleep(Duration::from_millis(500));
            guest.type_in(&format!("echo awake{hop}\n"));
            guest.wait_for(&format!("\nawake{hop}\nguest# "));
        }
        assert_sound(&guest.quit());
    }
}

/// The guest calls it a lockup when a CPU has not got to its watchdog for 4 s, unless KVM told it that it was
/// stopped.
#[test]
fn a_guest_that_was_paused_for_long_does_not_take_it_for_a_lockup() {
    let Some(mut guest) = boot("job=shell watchdog_thresh=2", 2) else { return };
    guest.wait_for("guest# ");
    for what in ["paused", "moved"] {
        guest.command("pause");
        std::thread::sleep(Duration::from_secs(9));
        guest.command("resume");
        if what == "moved" {
            guest.hop();
        }
        guest.type_in(&format!("sleep 5; echo {what} before\n"));
        guest.wait_for(&format!("\n{what} before\nguest# "));
    }
    assert_sound(&guest.quit());
}

/// Moves a guest `delay` after it was told to end: it ends here, or it moves and ends there, and whoever holds it
/// says how it ended.
fn ends_while_it_moves(command: &str, last_words: &str, delay: Duration) {
    let Some(mut guest) = boot("job=shell", 1) else { return };
    guest.wait_for("guest# ");
    guest.type_in(&format!("{command}\n"));
    std::thread::sleep(delay);
    let report = guest.try_hop();
    let outcome = report["outcome"].as_str().unwrap_or("ended before");
    println!("{command} {delay:?} before the migration: {outcome}, {}", report["fault"]["cause"]);
    let (status, said, printed) = guest.end();
    assert!(said.contains(last_words), "{said}\n{printed}");
    assert!(!said.contains("panicked"), "{said}");
    assert_eq!(status.code(), Some(0), "{outcome}: {said}");
    assert_sound(&printed);
}

#[test]
fn a_guest_that_reboots_while_it_moves_ends_on_one_side_which_says_so() {
    for (command, delay_ms) in [("reboot -f", 300), ("reboot -f", 0), ("sleep 2; reboot -f", 0)] {
        ends_while_it_moves(command, "the guest reset the machine", Duration::from_millis(delay_ms));
    }
}

#[test]
fn a_guest_that_powers_off_while_it_moves_ends_on_one_side_which_says_so() {
    let command = "printf '\\0' | dd of=/dev/port bs=1 seek=244";
    for (command, delay_ms) in [(command.to_owned(), 200), (format!("sleep 2; {command}"), 0)] {
        ends_while_it_moves(&command, "the guest ended with code 0", Duration::from_millis(delay_ms));
    }
}

/// Without ACPI a kernel cannot power off: it halts its CPUs for ever, and is still somebody's guest.
#[test]
fn a_guest_that_halts_while_it_moves_is_halted_where_it_went() {
    let Some(mut guest) = boot("job=shell", 2) else { return };
    guest.wait_for("guest# ");
    guest.type_in("halt -f\n");
    for hop in 1..=3 {
        tell("Linux, halting", hop, &guest.hop(), "");
    }
    guest.wait_for("System halted");
    tell("Linux, halted", 4, &guest.hop(), "");
    assert_sound(&guest.quit());
}

/// As early as a kernel prints; without what KVM's emulator lacks where it interprets ring 0.
const STOCK_CMDLINE: &str = "earlyprintk=ttyS0,115200 console=ttyS0 nokaslr mitigations=off rodata=off nowatchdog \
    clearcpuid=smap,smep,fsgsbase,invpcid,pcid,erms,fsrm,rdpid,rdtscp,popcnt,xsave,cx16,clwb \
    memblock=debug initcall_debug loglevel=8";
/// The line up to which its boot is looked at.
const STOCK_END: &str = "Last level dTLB entries";

/// Its messages up to there, without numbers: times, sizes and addresses differ from boot to boot.
fn messages(text: &str) -> Vec<String> {
    let end = text.find(STOCK_END).unwrap_or_else(|| panic!("it did not get that far:\n{text}"));
    let numberless = |word: &str| match word.contains(|c: char| c.is_ascii_digit()) {
        true => "#".to_owned(),
        false => word.to_owned(),
    };
    // the time is padded, and so are some numbers
    let line = |line: &str| {
        let message = line.split_once("] ").map_or(line, |(_time, message)| message);
        let words =
            message.split_whitespace().flat_map(|w| w.split_inclusive(|c: char| !c.is_ascii_alphanumeric()));
        words.map(numberless).collect()
    };
    text[..end].lines().map(line).collect()
}

#[test]
fn debians_kernel_goes_on_in_the_middle_of_its_boot_where_its_console_stopped() {
    let Some(kernel) = std::env::var("MIG_STOCK_KERNEL").ok().filter(|_| kvm_is_there()) else {
        eprintln!("SKIPPED: MIG_STOCK_KERNEL names no stock kernel (tests/guests/linux/stock gets one)");
        return;
    };
    let options = ["--kernel", &kernel, "--cmdline", STOCK_CMDLINE, "--memory", "128MiB", "--cpus", "1"];
    let mut still = Guest::boot(&options);
    let mut guest = Guest::boot(&options);
    let mut hops = 0;
    while !guest.text().contains(STOCK_END) {
        hops += 1;
        assert!(hops < 100, "it gets no further:\n{}", guest.text());
        let report = guest.hop();
        let lines = guest.text().lines().count();
        tell("Debian's kernel", hops, &report, &format!(", {lines} lines so far"));
        std::thread::sleep(Duration::from_secs(2));
    }
    let found = messages(&guest.quit());
    still.wait_for(STOCK_END);
    let expected = messages(&still.quit());
    for (found, expected) in found.iter().zip(&expected) {
        assert_eq!(found, expected);
    }
    assert_eq!(found.len(), expected.len());
    println!("Debian's kernel: {} lines, the same as without the {hops} hops", found.len());
}
