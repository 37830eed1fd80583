//! Whole machines on real KVM: booted, looked at, and moved within this process.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mig::{BoxError, Incoming, RestoreState, SaveState, Section, SourceVm};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::bus::lock;
use crate::monitor::{End, RunState};
use crate::{Console, IncomingMachine, Machine, MachineConfig, Receiver, Tracking, Workload};

mod arrivals;
mod cancels;
mod console;
mod devices;
mod execution;
mod guests;
mod memtest;
mod rings;

/// How long a test waits for something that comes at once on an idle host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Whether machines can be made here. Fails where they must.
fn kvm() -> bool {
    let there = PathBuf::from("/dev/kvm").exists();
    assert!(there || std::env::var_os("MIG_REQUIRE_KVM").is_none(), "/dev/kvm is missing and required");
    if !there {
        eprintln!("SKIPPED: no /dev/kvm");
    }
    there
}

/// A console that a test reads.
#[derive(Clone, Default)]
struct Text(Arc<Mutex<Vec<u8>>>);

impl Text {
    fn console(&self) -> Console {
        Console::to(self.clone())
    }

    fn read(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0)).into_owned()
    }
}

impl std::io::Write for Text {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Waits until `done`; fails with what `state` says otherwise.
fn wait(what: &str, mut done: impl FnMut() -> bool, state: impl FnOnce() -> String) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "no {what} after {PATIENCE:?}:\n{}", state());
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A bzImage whose 32-bit entry is `code`, at 1 MiB.
pub(crate) fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 1024];
    image[0x1f1] = 1;
    image[0x201] = 0x6a;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020cu16.to_le_bytes());
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x3fff_ffffu32.to_le_bytes());
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    image.extend_from_slice(code);
    image
}

/// A machine of 4 MiB that runs 32-bit `code` from 1 MiB on.
fn machine_of(code: &[u8], console: Console) -> Machine {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bzimage(code)).unwrap();
    let workload = Workload::Kernel { kernel: file.path().into(), initrd: None, cmdline: "one two".into() };
    Machine::boot(MachineConfig {
        memory_bytes: 4 << 20,
        vcpus: 1,
        workload,
        console,
        tracking: Tracking::default(),
    })
    .unwrap()
}

/// Moves a machine within this process: everything but the engine. `edit` sees the sections on their way.
fn hop(machine: Machine, console: Console, edit: impl FnOnce(&mut Vec<Section>)) -> Machine {
    arrive(machine, console, edit).unwrap().into_machine().unwrap()
}

/// The same, up to where the guest may run.
fn arrive(
    mut machine: Machine,
    console: Console,
    edit: impl FnOnce(&mut Vec<Section>),
) -> Result<IncomingMachine, BoxError> {
    machine.pause().unwrap();
    let mut sections = machine.save().unwrap();
    let description = machine.describe().unwrap();
    let mut sent: Vec<_> = sections.iter().map(|s| (s.name.clone(), s.version)).collect();
    let mut said: Vec<_> = description.schemas.iter().map(|s| (s.name.clone(), s.version)).collect();
    sent.sort();
    sent.dedup();
    said.sort();
    assert_eq!(sent, said, "what was sent is what was announced");
    edit(&mut sections);

    let mut console = Some(console);
    let mut receiver = Receiver::new(move || console.take().unwrap_or(Console::none()));
    let mut incoming = match receiver.prepare(&description) {
        Ok(incoming) => incoming,
        Err(refusals) => panic!("refused: {refusals:?}"),
    };
    let here = incoming.platform_memory();
    for region in machine.platform().memory.iter() {
        let mut chunk = vec![0u8; 1 << 20];
        for at in (0..region.len()).step_by(chunk.len()) {
            let count = chunk.len().min((region.len() - at) as usize);
            let address = GuestAddress(region.start_addr().0 + at);
            machine.platform().memory.read_slice(&mut chunk[..count], address).unwrap();
            here.write_slice(&chunk[..count], address).unwrap();
        }
    }
    drop(machine);
    incoming.restore(&sections)?;
    Ok(incoming)
}
