//! Every log against memory itself: vCPUs write while rounds go on, and what was copied is what there is.

use std::sync::atomic::{AtomicBool, Ordering};

use mig::bitmap::PageRun;

use super::*;
use crate::testing::vcpu_writes;

const PAGES: u64 = 4096;
const VCPUS: u64 = 3;
const ROUNDS: u64 = 40;

/// A destination's memory.
struct Copied {
    bytes: Vec<u8>,
    domain: Domain,
}

impl Copied {
    /// A round: takes each chunk's pages, has them watched if vCPUs run, and only then reads them.
    fn round(&mut self, machine: &GuestMemoryMmap<WrittenPages>, dirty: &mut Bitmap, log: Option<&DirtyLog>) {
        let mut words = Vec::new();
        for chunk in 0..self.domain.chunks() {
            if dirty.take_words(self.domain.chunk_pages(chunk), &mut words) == 0 {
                continue;
            }
            if let Some(log) = log {
                log.rearm(chunk * CHUNK_PAGES, &words).unwrap();
            }
            for PageRun { first, count } in runs(chunk * CHUNK_PAGES, &words) {
                let bytes = &mut self.bytes[(first * PAGE) as usize..((first + count) * PAGE) as usize];
                machine.read_slice(bytes, GuestAddress(first * PAGE)).unwrap();
            }
        }
    }
}

fn memory_is_what_was_copied(protection: Protection, load: fn(&Machine)) {
    let entries = (protection == Protection::OnReset).then_some(1024);
    let Some(mut machine) = Machine::with_rings(VCPUS, &[(0, PAGES)], entries) else { return };
    load(&machine);
    let mut log = log(&mut machine, protection);
    let (rings, memory) = (machine.rings.clone(), machine.memory.clone());
    let domain = Domain::new(&[Region { guest_address: 0, bytes: PAGES * PAGE }]).unwrap();
    let mut copied = Copied { bytes: vec![0; (PAGES * PAGE) as usize], domain: domain.clone() };
    let mut dirty = Bitmap::full(&domain);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (id, vcpu) in (0u64..).zip(&mut machine.vcpus) {
            let (rings, done) = (rings.as_deref().map(|rings| (rings, id as usize)), &done);
            scope.spawn(move || {
                // All write every page in time, each a word of its own; the last one few pages, more often.
                let count = if id == VCPUS - 1 { 20 } else { 1500 };
                for n in 1u32.. {
                    let first = 16 + (u64::from(n) * 997) % (PAGES - 16 - count);
                    vcpu_writes(vcpu, rings, first * PAGE + 8 * id, PAGE, count, n);
                    if done.load(Ordering::SeqCst) {
                        break;
                    }
                }
            });
        }
        // A first attempt that comes to nothing.
        log.start().unwrap();
        for _ in 0..3 {
            copied.round(&memory, &mut dirty, Some(&log));
            log.sync(&mut dirty).unwrap();
        }
        log.stop().unwrap();

        log.start().unwrap();
        dirty = Bitmap::full(&domain);
        for round in 0..ROUNDS {
            copied.round(&memory, &mut dirty, Some(&log));
            memory.write_obj(round, GuestAddress((16 + round) * PAGE + 64)).unwrap();
            log.sync(&mut dirty).unwrap();
        }
        done.store(true, Ordering::SeqCst);
    });
    log.sync(&mut dirty).unwrap();
    copied.round(&memory, &mut dirty, None);
    let mut page = vec![0; PAGE as usize];
    for (number, copy) in (0..).zip(copied.bytes.chunks(PAGE as usize)) {
        memory.read_slice(&mut page, GuestAddress(number * PAGE)).unwrap();
        assert!(page == copy, "{protection:?}: page {number} is stale");
    }
    log.stop().unwrap();
}

#[test]
fn memory_is_what_was_copied_with_the_manual_log() {
    memory_is_what_was_copied(Protection::Manual, Machine::load_writer);
    memory_is_what_was_copied(Protection::Manual, Machine::load_native_writer);
}

#[test]
fn memory_is_what_was_copied_with_the_plain_log() {
    memory_is_what_was_copied(Protection::OnRead, Machine::load_writer);
    memory_is_what_was_copied(Protection::OnRead, Machine::load_native_writer);
}

#[test]
fn memory_is_what_was_copied_with_rings_that_get_full() {
    memory_is_what_was_copied(Protection::OnReset, Machine::load_writer);
    memory_is_what_was_copied(Protection::OnReset, Machine::load_native_writer);
}
