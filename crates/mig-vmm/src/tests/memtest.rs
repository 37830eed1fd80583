//! memtest86+: a guest that nobody here wrote, and that checks its own memory.

use super::*;

/// The stock binary, or none with a loud word.
fn memtest() -> Option<PathBuf> {
    let path = std::env::var_os("MIG_MEMTEST").map_or("/boot/memtest86+x64.bin".into(), PathBuf::from);
    if !path.exists() {
        eprintln!("SKIPPED: no memtest86+ at {} (set MIG_MEMTEST)", path.display());
        return None;
    }
    Some(path)
}

fn boot(kernel: PathBuf) -> Machine {
    let workload = Workload::Kernel { kernel, initrd: None, cmdline: "nosmp".into() };
    Machine::boot(MachineConfig {
        memory_bytes: 24 << 20,
        vcpus: 1,
        workload,
        console: Console::none(),
        tracking: Tracking::default(),
    })
    .unwrap()
}

/// What the screen says of the work done, and that it says nothing of errors.
fn progress(screen: &[String]) -> String {
    let text = screen.join("\n");
    if let Some(errors) = text.split("Errors:").nth(1) {
        let count = errors.split_whitespace().next().unwrap_or_default();
        assert_eq!(count, "0", "{text}");
    }
    text
}

#[test]
fn memtest_tests_memory_and_goes_on_after_each_of_three_hops() {
    let Some(kernel) = memtest().filter(|_| kvm()) else { return };
    let mut machine = boot(kernel);
    machine.run().unwrap();
    let monitor = machine.monitor();
    let started = || monitor.screen().join("\n").contains("Errors: 0");
    wait("test", started, || format!("{:?}\n{}", monitor.end(), monitor.screen().join("\n")));
    drop(monitor);
    for _ in 0..3 {
        machine = hop(machine, Console::none(), |_| ());
        let monitor = machine.monitor();
        let before = progress(&monitor.screen());
        machine.run().unwrap();
        let moved = || progress(&monitor.screen()) != before;
        wait("progress", moved, || format!("{:?}\n{}", monitor.end(), monitor.screen().join("\n")));
        assert_eq!(monitor.state(), RunState::Running);
    }
}
