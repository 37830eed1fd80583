use std::collections::BTreeSet;

use mig::bitmap::runs;
use mig::domain::CHUNK_PAGES;
use vm_memory::Bytes;
use vm_memory::bitmap::AtomicBitmap;

use super::*;
use crate::testing::{CODE, Machine, PAGE, REGIONS};

mod rings;
mod rounds;

/// Page index in the domain of [`REGIONS`] of a guest address.
fn page_of(address: u64) -> u64 {
    let (second, _) = REGIONS[1];
    if address >= second { 1536 + (address - second) / PAGE } else { address / PAGE }
}

fn address_of(page: u64) -> u64 {
    if page >= 1536 { REGIONS[1].0 + (page - 1536) * PAGE } else { page * PAGE }
}

fn domain() -> Domain {
    Domain::new(&REGIONS.map(|(guest_address, pages)| Region { guest_address, bytes: pages * PAGE })).unwrap()
}

fn all() -> BTreeSet<u64> {
    pages(&Bitmap::full(&domain()))
}

fn pages(bitmap: &Bitmap) -> BTreeSet<u64> {
    runs(0, bitmap.words()).flat_map(|r| r.first..r.first + r.count).collect()
}

/// Every log there is.
const ALL: [Protection; 3] = [Protection::Manual, Protection::OnRead, Protection::OnReset];

/// A machine, with dirty rings where the log is kept in them.
fn machine(protection: Protection) -> Option<Machine> {
    let entries = (protection == Protection::OnReset).then_some(MOST_RING_ENTRIES);
    Machine::with_rings(1, &REGIONS, entries)
}

fn log(machine: &mut Machine, protection: Protection) -> DirtyLog {
    let source = match protection {
        Protection::Manual => Source::Manual,
        Protection::OnRead => Source::OnRead,
        Protection::OnReset => return machine.ring_log(),
    };
    let (vm, slots, memory) = (machine.vm.clone(), machine.slots.clone(), machine.memory.clone());
    DirtyLog::with_source(vm, slots, memory, &machine.caps, |_| Ok(source)).unwrap()
}

fn sync(log: &mut DirtyLog) -> BTreeSet<u64> {
    let mut dirty = Bitmap::empty(&domain());
    log.sync(&mut dirty).unwrap();
    pages(&dirty)
}

/// Re-arms exactly these pages, a chunk at a time as the engine does.
fn rearm(log: &DirtyLog, pages: &BTreeSet<u64>) {
    let domain = domain();
    let mut bitmap = Bitmap::empty(&domain);
    pages.iter().for_each(|p| bitmap.set(*p));
    let mut words = Vec::new();
    for chunk in 0..domain.chunks() {
        bitmap.take_words(domain.chunk_pages(chunk), &mut words);
        log.rearm(chunk * CHUNK_PAGES, &words).unwrap();
    }
}

/// A log that was started and of which every page was re-armed and found clean.
fn clean(protection: Protection) -> Option<(Machine, DirtyLog)> {
    let mut machine = machine(protection)?;
    machine.load_writer();
    let mut log = log(&mut machine, protection);
    log.start().unwrap();
    rearm(&log, &all());
    assert_eq!(sync(&mut log), BTreeSet::new());
    Some((machine, log))
}

#[test]
fn the_manual_log_is_chosen_where_kvm_has_it() {
    let Some(machine) = Machine::new(1) else { return };
    let mut caps = machine.caps.clone();
    let best = |caps: &Caps| {
        DirtyLog::new(machine.vm.clone(), machine.slots.clone(), machine.memory.clone(), caps).unwrap()
    };
    caps.manual_dirty_log = 3;
    assert_eq!(best(&caps).protection(), Protection::Manual);
    caps.manual_dirty_log = 0;
    assert_eq!(best(&caps).protection(), Protection::OnRead);
}

#[test]
fn what_the_guest_writes_is_found_and_nothing_else() {
    for protection in ALL {
        let Some((mut machine, mut log)) = clean(protection) else { return };
        machine.guest_writes(5 * PAGE, PAGE, 3);
        machine.guest_writes(REGIONS[1].0 + 699 * PAGE, PAGE, 1);
        machine.guest_writes(1026 * PAGE, PAGE, 1);
        assert_eq!(sync(&mut log), BTreeSet::from([5, 6, 7, 1026, 1536 + 699]), "{protection:?}");
        log.stop().unwrap();
    }
}

#[test]
fn what_this_process_writes_is_found_once() {
    for protection in ALL {
        let Some((machine, mut log)) = clean(protection) else { return };
        machine.memory.write_obj(7u64, GuestAddress(9 * PAGE - 4)).unwrap();
        machine.memory.write_slice(&[1; 5000], GuestAddress(REGIONS[1].0)).unwrap();
        assert_eq!(sync(&mut log), BTreeSet::from([8, 9, 1536, 1537]), "{protection:?}");
        assert_eq!(sync(&mut log), BTreeSet::new());
    }
}

#[test]
fn the_bitmap_of_vm_memory_itself_serves_too() {
    let Some(machine) = Machine::new(1) else { return };
    let ranges = REGIONS.map(|(start, pages)| (GuestAddress(start), (pages * PAGE) as usize));
    let memory = Arc::new(GuestMemoryMmap::<AtomicBitmap>::from_ranges(&ranges).unwrap());
    let mut slots = machine.slots.clone();
    for (slot, region) in slots.iter_mut().zip(memory.iter()) {
        slot.host_address = region.as_ptr() as u64;
    }
    let log = DirtyLog::new(machine.vm.clone(), slots, memory.clone(), &machine.caps).unwrap();
    let taken = || {
        let mut dirty = Bitmap::empty(&domain());
        log.own_writes(&mut dirty);
        pages(&dirty)
    };
    memory.write_slice(&[1; 5000], GuestAddress(1025 * PAGE - 1)).unwrap();
    memory.write_obj(7u64, GuestAddress(REGIONS[1].0 + 699 * PAGE)).unwrap();
    assert_eq!(taken(), BTreeSet::from([1024, 1025, 1026, 1536 + 699]));
    assert_eq!(taken(), BTreeSet::new());
}

#[test]
fn our_writes_from_before_the_start_are_forgotten() {
    // With the manual log every page is reported at first.
    for protection in [Protection::OnRead, Protection::OnReset] {
        let Some(mut machine) = machine(protection) else { return };
        machine.load_writer();
        let mut log = log(&mut machine, protection);
        log.start().unwrap();
        assert!(!sync(&mut log).contains(&page_of(CODE)), "{protection:?}");
    }
}

#[test]
fn a_page_that_is_not_re_armed_is_reported_again_and_again() {
    let Some((mut machine, mut log)) = clean(Protection::Manual) else { return };
    machine.guest_writes(5 * PAGE, PAGE, 2);
    assert_eq!(sync(&mut log), BTreeSet::from([5, 6]));
    assert_eq!(sync(&mut log), BTreeSet::from([5, 6]));
    rearm(&log, &BTreeSet::from([6]));
    assert_eq!(sync(&mut log), BTreeSet::from([5]));
}

#[test]
fn reading_the_plain_log_re_arms_by_itself() {
    let Some((mut machine, mut log)) = clean(Protection::OnRead) else { return };
    for _ in 0..3 {
        machine.guest_writes(5 * PAGE, PAGE, 2);
        assert_eq!(sync(&mut log), BTreeSet::from([5, 6]));
        assert_eq!(sync(&mut log), BTreeSet::new());
    }
}

#[test]
fn a_write_after_the_re_arming_is_found_and_one_before_it_is_not() {
    let Some((mut machine, mut log)) = clean(Protection::Manual) else { return };
    machine.guest_writes(5 * PAGE, PAGE, 1);
    // Whoever re-arms a page that will not be sent loses it: this is why only given bits are cleared.
    rearm(&log, &BTreeSet::from([5]));
    assert_eq!(sync(&mut log), BTreeSet::new());
    machine.guest_writes(5 * PAGE, PAGE, 1);
    rearm(&log, &BTreeSet::from([4, 6]));
    assert_eq!(sync(&mut log), BTreeSet::from([5]));
}

#[test]
fn a_started_manual_log_reports_every_page_that_was_never_re_armed() {
    let Some(mut machine) = machine(Protection::Manual) else { return };
    if machine.caps.manual_dirty_log & 2 == 0 {
        eprintln!("SKIPPED: KVM has no KVM_DIRTY_LOG_INITIALLY_SET");
        return;
    }
    let mut log = log(&mut machine, Protection::Manual);
    log.start().unwrap();
    assert_eq!(sync(&mut log), all());
    rearm(&log, &(0..512).collect());
    assert_eq!(sync(&mut log), all().into_iter().filter(|p| *p >= 512).collect());
}

#[test]
fn stopping_ends_the_log_and_starting_again_begins_a_new_one() {
    for protection in ALL {
        let Some((mut machine, mut log)) = clean(protection) else { return };
        machine.guest_writes(5 * PAGE, PAGE, 2);
        assert_eq!(sync(&mut log), BTreeSet::from([5, 6]));
        machine.guest_writes(8 * PAGE, PAGE, 1);
        log.stop().unwrap();
        log.stop().unwrap();
        machine.guest_writes(6 * PAGE, PAGE, 1);
        assert_eq!(sync(&mut log), BTreeSet::new(), "{protection:?}");
        log.start().unwrap();
        rearm(&log, &all());
        machine.guest_writes(7 * PAGE, PAGE, 1);
        assert_eq!(sync(&mut log), BTreeSet::from([7]), "{protection:?}");
    }
}

/// KVM has no log to read of a slot that lacks the flag (kvm_get_dirty_log in virt/kvm/kvm_main.c): whatever is
/// still slow then is not the log's doing.
#[test]
fn no_slot_is_logged_any_more_once_the_log_was_stopped() {
    let Some((machine, mut log)) = clean(Protection::Manual) else { return };
    let logged = |slot: &crate::dirty::Slot| {
        let bytes = usize::try_from(slot.region.bytes).unwrap();
        match machine.vm.get_dirty_log(slot.slot, bytes) {
            Ok(_) => true,
            Err(e) if e.errno() == libc::ENOENT => false,
            Err(e) => panic!("{e}"),
        }
    };
    assert!(machine.slots.iter().all(logged));
    log.stop().unwrap();
    assert!(!machine.slots.iter().any(logged));
    log.start().unwrap();
    assert!(machine.slots.iter().all(logged));
}

#[test]
fn windows_that_are_no_slot_s_are_refused() {
    for protection in ALL {
        let Some((_machine, log)) = clean(protection) else { return };
        let refused = |first, words: &[u64]| log.rearm_window(first, words).is_err();
        assert!(refused(1100, &[1]), "between the regions");
        assert!(refused(8, &[1]), "no multiple of 64");
        assert!(refused(1024, &[0b1000]), "past the end of a region of 1027 pages");
        assert!(refused(1024, &[1, 1]), "past the end by a word");
        assert!(refused(1 << 40, &[1]));
        assert!(!refused(1024, &[0b111]) && !refused(1024, &[1, 0]) && !refused(0, &[]));
    }
}

/// MSR_KVM_WALL_CLOCK_NEW: KVM writes the time of day to the address that it is set to (kvm_write_wall_clock in
/// arch/x86/kvm/x86.c).
const WALL_CLOCK: u32 = 0x4b56_4d00;

#[test]
fn what_kvm_writes_for_a_guest_that_does_not_run_is_found() {
    for protection in ALL {
        let Some((machine, mut log)) = clean(protection) else { return };
        let entry = kvm_bindings::kvm_msr_entry { index: WALL_CLOCK, data: 5 * PAGE, ..Default::default() };
        assert_eq!(
            machine.vcpus[0].set_msrs(&kvm_bindings::Msrs::from_entries(&[entry]).unwrap()).unwrap(),
            1
        );
        let version: u32 = machine.memory.read_obj(GuestAddress(5 * PAGE)).unwrap();
        assert_ne!(version, 0, "it was written");
        assert_eq!(sync(&mut log), BTreeSet::from([5]), "{protection:?}");
    }
}

#[test]
fn slots_that_are_not_the_memory_s_regions_are_refused() {
    let Some(machine) = Machine::new(1) else { return };
    let refused = |change: &dyn Fn(&mut Vec<Slot>)| {
        let mut slots = machine.slots.clone();
        change(&mut slots);
        DirtyLog::new(machine.vm.clone(), slots, machine.memory.clone(), &machine.caps).is_err()
    };
    assert!(!refused(&|slots| slots.reverse()), "their order does not matter");
    assert!(refused(&|slots| slots.truncate(1)));
    assert!(refused(&|slots| slots[1].host_address += PAGE));
    assert!(refused(&|slots| slots[0].region.bytes -= PAGE));
    assert!(refused(&|slots| slots[1].region.guest_address += PAGE));
}

#[test]
fn five_hundred_random_operations_agree_with_sets_of_pages() {
    for protection in ALL {
        let Some((mut machine, mut log)) = clean(protection) else { return };
        // What KVM's log and our own bitmap hold, and what the engine still has to send.
        let (mut logged, mut own, mut pending) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        // What a reset of the rings re-arms.
        let mut reported = BTreeSet::new();
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for _ in 0..500 {
            let region = random(2);
            let (first, count) = if region == 0 { (2, 1025) } else { (1536, 700) };
            let page = first + random(count);
            match random(4) {
                0 => {
                    let count = 1 + random(6).min(first + count - page - 1);
                    machine.guest_writes(address_of(page) + 8, PAGE, count);
                    logged.extend(page..page + count);
                }
                1 => {
                    machine.memory.write_obj(page, GuestAddress(address_of(page))).unwrap();
                    own.insert(page);
                }
                2 => {
                    let found = sync(&mut log);
                    assert_eq!(found, &logged | &own, "{protection:?}");
                    pending.extend(found);
                    own.clear();
                    match protection {
                        Protection::Manual => {}
                        Protection::OnRead => logged.clear(),
                        Protection::OnReset => reported.clone_from(&logged),
                    }
                }
                _ => {
                    let sent: BTreeSet<u64> = pending.iter().copied().filter(|_| random(3) > 0).collect();
                    rearm(&log, &sent);
                    pending.retain(|p| !sent.contains(p));
                    match protection {
                        Protection::Manual => logged.retain(|p| !sent.contains(p)),
                        Protection::OnRead => {}
                        Protection::OnReset => logged.retain(|p| !reported.contains(p)),
                    }
                    reported.clear();
                }
            }
        }
    }
}

#[test]
fn no_write_of_ours_is_lost_to_a_concurrent_sync() {
    let Some((machine, mut log)) = clean(Protection::OnRead) else { return };
    let done = std::sync::atomic::AtomicBool::new(false);
    let mut found = 0;
    let memory = machine.memory.clone();
    std::thread::scope(|scope| {
        // Each page is written once; a lost bit is a page never found.
        let writer = scope.spawn(|| {
            for page in 2..1027u64 {
                memory.write_obj(page, GuestAddress(page * PAGE)).unwrap();
                std::thread::yield_now();
            }
            done.store(true, std::sync::atomic::Ordering::SeqCst);
        });
        while !done.load(std::sync::atomic::Ordering::SeqCst) {
            found += sync(&mut log).len();
        }
        writer.join().unwrap();
    });
    found += sync(&mut log).len();
    assert_eq!(found, 1025);
}
