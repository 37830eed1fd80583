//! What is particular to dirty rings.

use kvm_bindings::KVM_EXIT_DIRTY_RING_FULL;
use kvm_ioctls::VcpuExit;

use super::*;
use crate::testing::vcpu_writes;

/// The fewest entries that KVM takes everywhere.
const FEW: u32 = 1024;

#[test]
fn a_full_ring_makes_room_and_nothing_is_lost() {
    let regions = [(0, 8192)];
    let Some(mut machine) = Machine::with_rings(1, &regions, Some(FEW)) else { return };
    machine.load_writer();
    let mut log = machine.ring_log();
    log.start().unwrap();
    let domain = Domain::new(&[Region { guest_address: 0, bytes: 8192 * PAGE }]).unwrap();
    let sync = |log: &mut DirtyLog| {
        let mut dirty = Bitmap::empty(&domain);
        log.sync(&mut dirty).unwrap();
        log.rearm(0, dirty.words()).unwrap();
        pages(&dirty)
    };
    for round in 0..3 {
        let first = 16 + round;
        machine.guest_writes(first * PAGE, PAGE, 8000);
        // And others, where rings run over.
        assert!(sync(&mut log).is_superset(&(first..first + 8000).collect()));
        machine.guest_writes(first * PAGE, 4000 * PAGE, 2);
        assert!(sync(&mut log).is_superset(&BTreeSet::from([first, first + 4000])), "they were armed");
    }
}

/// vCPUs that write natively to 32 MiB, with small rings and a log that is on.
fn native_writers(vcpus: u64) -> Option<(Machine, DirtyLog, Arc<Rings>, Domain)> {
    let mut machine = Machine::with_rings(vcpus, &[(0, 8192)], Some(FEW))?;
    machine.load_native_writer();
    let mut log = machine.ring_log();
    log.start().unwrap();
    let rings = log.rings().unwrap().clone();
    let domain = Domain::new(&[Region { guest_address: 0, bytes: 8192 * PAGE }]).unwrap();
    Some((machine, log, rings, domain))
}

#[test]
fn a_ring_that_is_full_of_native_writes_loses_none_and_invents_none() {
    let Some((mut machine, mut log, rings, domain)) = native_writers(2) else { return };
    let sync = |log: &mut DirtyLog| {
        let mut dirty = Bitmap::empty(&domain);
        log.sync(&mut dirty).unwrap();
        let mut found = pages(&dirty);
        // Where it shadows page tables, KVM may map what is read for writing too, and note it then.
        found.remove(&page_of(CODE));
        found
    };
    for round in 0..3 {
        let first = 16 + round;
        vcpu_writes(&mut machine.vcpus[1], Some((&rings, 1)), first * PAGE, PAGE, 8000, 1);
        let found = sync(&mut log);
        let written: BTreeSet<u64> = (first..first + 8000).collect();
        assert!(found == written, "{:?}", found.symmetric_difference(&written).take(20).collect::<Vec<_>>());
        // The rest of them, which no full ring had reset.
        let still_open = sync(&mut log);
        assert!(still_open.len() < 1024 && found.is_superset(&still_open), "{} pages", still_open.len());
        rearm_first(&log, &domain);
        assert_eq!(sync(&mut log), BTreeSet::new());
        machine.guest_writes(first * PAGE, 4000 * PAGE, 2);
        assert_eq!(sync(&mut log), BTreeSet::from([first, first + 4000]), "they were armed");
        rearm_first(&log, &domain);
    }
    // A page that is written over and over while it is open is noted once.
    machine.guest_writes(5000 * PAGE, 8, 5 * 512);
    machine.guest_writes(5000 * PAGE, 8, 5 * 512);
    let written = rings.written_by_vcpu();
    assert!(
        (3 * 2 + 5..3 * 2 + 50).contains(&written[0]) && (24_000..24_100).contains(&written[1]),
        "{written:?}"
    );
}

fn rearm_first(log: &DirtyLog, domain: &Domain) {
    log.rearm(0, &Bitmap::full(domain).words()[..CHUNK_PAGES as usize / 64]).unwrap();
}

#[test]
fn what_a_ring_lost_that_ran_over_is_found_by_the_sync_that_sees_it() {
    let Some(mut machine) = Machine::with_rings(1, &[(0, 4096)], Some(FEW)) else { return };
    machine.load_writer();
    let mut log = machine.ring_log();
    let domain = Domain::new(&[Region { guest_address: 0, bytes: 4096 * PAGE }]).unwrap();
    for round in 0..20 {
        log.start().unwrap();
        // Where a ring runs over at all, it does so by another number each time.
        machine.guest_writes(4000 * PAGE, PAGE, 1 + round * 4);
        let vcpu = &mut machine.vcpus[0];
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rdi, regs.rbx, regs.rcx) = (CODE, 16 * PAGE, PAGE, 3900);
        vcpu.set_regs(&regs).unwrap();
        while !matches!(vcpu.run(), Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL))) {}
        let written = vcpu.get_regs().unwrap().rdi / PAGE;
        // The only one, as in a pause.
        let mut dirty = Bitmap::empty(&domain);
        log.sync(&mut dirty).unwrap();
        assert!(pages(&dirty).is_superset(&(16..written).collect()), "{written}");
        log.stop().unwrap();
    }
}

#[test]
fn what_a_full_ring_held_is_armed_before_it_is_reported() {
    let regions = [(0, 4096)];
    let Some(mut machine) = Machine::with_rings(1, &regions, Some(FEW)) else { return };
    machine.load_writer();
    let mut log = machine.ring_log();
    log.start().unwrap();
    machine.guest_writes(16 * PAGE, PAGE, 4000);
    let domain = Domain::new(&[Region { guest_address: 0, bytes: 4096 * PAGE }]).unwrap();
    let mut dirty = Bitmap::empty(&domain);
    log.sync(&mut dirty).unwrap();
    // The first pages went through a full ring, long ago. No `rearm` is needed to find them again.
    machine.guest_writes(16 * PAGE, PAGE, 3);
    let mut dirty = Bitmap::empty(&domain);
    log.sync(&mut dirty).unwrap();
    assert!([16, 17, 18].iter().all(|page| dirty.contains(*page)));
}

#[test]
fn pages_are_reported_until_the_rings_are_reset_and_then_armed() {
    let Some((mut machine, mut log)) = clean(Protection::OnReset) else { return };
    machine.guest_writes(5 * PAGE, PAGE, 2);
    assert_eq!(sync(&mut log), BTreeSet::from([5, 6]));
    machine.guest_writes(6 * PAGE, PAGE, 2);
    assert_eq!(sync(&mut log), BTreeSet::from([5, 6, 7]));
    // One for all: any window will do.
    rearm(&log, &BTreeSet::from([900]));
    assert_eq!(sync(&mut log), BTreeSet::new());
    machine.guest_writes(6 * PAGE, PAGE, 1);
    assert_eq!(sync(&mut log), BTreeSet::from([6]));
}

#[test]
fn what_each_vcpu_writes_is_counted_as_it_writes() {
    let Some(mut machine) = Machine::with_rings(3, &REGIONS, Some(FEW)) else { return };
    machine.load_writer();
    let mut log = machine.ring_log();
    log.start().unwrap();
    let rings = log.rings().unwrap().clone();
    // KVM that interprets a guest notes each of its writes, else what is written while a page is open is not.
    let assert_counted = |fewest: [u64; 3], most: [u64; 3]| {
        let counted = rings.written_by_vcpu();
        assert!((0..3).all(|v| (fewest[v]..=most[v]).contains(&counted[v])), "{counted:?}");
    };
    assert_counted([0; 3], [0; 3]);
    vcpu_writes(&mut machine.vcpus[1], Some((&rings, 1)), 8 * PAGE, PAGE, 5, 1);
    assert_counted([0, 5, 0], [0, 5, 0]);
    assert_eq!(sync(&mut log), (8..13).collect());
    vcpu_writes(&mut machine.vcpus[2], Some((&rings, 2)), 20 * PAGE, PAGE, 2, 1);
    vcpu_writes(&mut machine.vcpus[1], Some((&rings, 1)), 20 * PAGE, PAGE, 3, 1);
    assert_counted([0, 6, 2], [0, 8, 2]);
    rearm(&log, &all());
    vcpu_writes(&mut machine.vcpus[0], Some((&rings, 0)), 20 * PAGE, PAGE, 1, 1);
    assert_counted([1, 6, 2], [1, 8, 2]);
    // More than the ring holds; some of it is not counted where that runs over.
    vcpu_writes(&mut machine.vcpus[0], Some((&rings, 0)), REGIONS[1].0, PAGE, 700, 1);
    vcpu_writes(&mut machine.vcpus[0], Some((&rings, 0)), 32 * PAGE, PAGE, 900, 1);
    assert_counted([1025, 6, 2], [1601, 8, 2]);
    log.stop().unwrap();
    assert_counted([1025, 6, 2], [1601, 8, 2]);
    log.start().unwrap();
    assert_counted([0; 3], [0; 3]);
}

#[test]
fn a_page_counts_once_a_round_for_the_vcpu_that_wrote_it_first() {
    let Some((mut machine, mut log, rings, domain)) = native_writers(2) else { return };
    // The program's own page may be among them.
    let assert_counted = |expected: [u64; 2]| {
        let counted = rings.pages_by_vcpu();
        assert!(
            (0..2).all(|v| (expected[v]..=expected[v] + 3).contains(&counted[v])),
            "{counted:?} {expected:?}"
        );
    };
    assert_counted([0, 0]);
    for round in 1..=3 {
        let writes = |machine: &mut Machine, vcpu: usize, first: u64, count: u64| {
            vcpu_writes(&mut machine.vcpus[vcpu], Some((&rings, vcpu)), first * PAGE, PAGE, count, 1);
        };
        writes(&mut machine, 1, 16, 3000);
        // Most went through a full ring, and are noted again.
        writes(&mut machine, 1, 16, 3000);
        writes(&mut machine, 0, 20, 500);
        writes(&mut machine, 0, 5000, 40);
        assert_counted([40 * round, 3000 * round]);
        log.sync(&mut Bitmap::empty(&domain)).unwrap();
        rearm_first(&log, &domain);
    }
    assert!(rings.written_by_vcpu()[1] > 4 * 3000, "it was noted again");
    log.stop().unwrap();
    log.start().unwrap();
    assert_counted([0, 0]);
}

#[test]
fn pages_that_were_reported_before_anybody_asked_who_wrote_them_count_again_when_they_are_written_again() {
    let Some((mut machine, mut log, rings, domain)) = native_writers(1) else { return };
    let mut writes = || vcpu_writes(&mut machine.vcpus[0], Some((&rings, 0)), 16 * PAGE, PAGE, 100, 1);
    writes();
    log.sync(&mut Bitmap::empty(&domain)).unwrap();
    assert_eq!(rings.pages_by_vcpu(), [0], "between two rounds");
    rearm_first(&log, &domain);
    writes();
    // the program's own page may be among them
    let counted = rings.pages_by_vcpu()[0];
    assert!((100..=103).contains(&counted), "{counted}");
}

#[test]
fn after_an_interrupted_reset_every_page_is_reported_and_armed() {
    let Some(mut machine) = Machine::with_rings(1, &REGIONS, Some(FEW)) else { return };
    // Natively: a write that is interpreted is noted whether its page is protected or not.
    machine.load_native_writer();
    let mut log = machine.ring_log();
    log.start().unwrap();
    machine.guest_writes(16 * PAGE, PAGE, 1);
    log.rings().unwrap().interrupted();
    machine.guest_writes(16 * PAGE, PAGE, 1);
    assert!(sync(&mut log) == all());
    rearm(&log, &all());
    sync(&mut log);
    rearm(&log, &all());
    machine.guest_writes(16 * PAGE, PAGE, 2);
    assert!(sync(&mut log).is_superset(&BTreeSet::from([16, 17])));
}

#[test]
fn rings_are_of_the_best_kind_and_of_a_size_that_kvm_takes() {
    let Some(kvm) = crate::testing::kvm() else { return };
    let size = |entries| {
        let vm = kvm.create_vm().unwrap();
        RingSize::enable(&vm, &Caps::probe(&kvm, &vm).unwrap(), entries).unwrap().entries()
    };
    assert_eq!(size(0), FEW);
    assert_eq!(size(5000), 8192);
    assert_eq!(size(u32::MAX), MOST_RING_ENTRIES);

    let vm = kvm.create_vm().unwrap();
    let mut caps = Caps::probe(&kvm, &vm).unwrap();
    assert!(rings_supported(&caps).is_ok());
    let only_x86 = Caps { dirty_ring_acq_rel_bytes: 0, ..caps.clone() };
    if only_x86.dirty_ring_bytes > 0 {
        let vm = kvm.create_vm().unwrap();
        assert_eq!(RingSize::enable(&vm, &only_x86, FEW).unwrap().entries(), FEW);
    }
    let _vcpu = vm.create_vcpu(0).unwrap();
    assert!(RingSize::enable(&vm, &caps, FEW).is_err(), "a vCPU has no ring yet");
    (caps.dirty_ring_acq_rel_bytes, caps.dirty_ring_bytes) = (0, 0);
    let missing = RingSize::enable(&vm, &caps, FEW).unwrap_err().to_string();
    assert!(missing.contains("KVM_CAP_DIRTY_LOG_RING_ACQ_REL"), "{missing}");
    assert_eq!(rings_supported(&caps).unwrap_err().to_string(), missing);
}
