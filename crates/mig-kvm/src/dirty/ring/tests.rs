use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::FromRawFd;

use proptest::prelude::*;

use super::*;

/// KVM's side of a ring, as virt/kvm/dirty_ring.c has it, over a second mapping of the same memory.
struct Kernel {
    ring: Ring,
    dirty_index: usize,
    reset_index: usize,
}

impl Kernel {
    fn entry(&self, index: usize) -> &Entry {
        self.ring.entry(index)
    }

    fn is_full(&self) -> bool {
        self.dirty_index - self.reset_index == self.ring.len - 1
    }

    fn push(&mut self, slot: u32, offset: u64) {
        assert_eq!(self.entry(self.dirty_index).flags.load(Ordering::SeqCst), 0, "it is free");
        self.push_over(slot, offset);
    }

    fn push_over(&mut self, slot: u32, offset: u64) {
        let entry = self.entry(self.dirty_index);
        entry.slot.store(slot, Ordering::SeqCst);
        entry.offset.store(offset, Ordering::SeqCst);
        entry.flags.store(DIRTY, Ordering::SeqCst);
        self.dirty_index += 1;
    }

    /// Frees harvested entries, `most` at most.
    fn reset(&mut self, most: usize) -> usize {
        for freed in 0..most {
            let flags = &self.entry(self.reset_index).flags;
            if flags.load(Ordering::SeqCst) & RESET == 0 {
                return freed;
            }
            flags.store(0, Ordering::SeqCst);
            self.reset_index += 1;
        }
        most
    }
}

/// Both sides of a ring in memory of our own.
fn pair(len: usize) -> (Ring, Kernel) {
    // SAFETY: a name that ends in zero; the descriptor that is made belongs to nobody else.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"ring".as_ptr(), 0)) };
    let before = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE_BYTES;
    file.set_len(before + (len * ENTRY_BYTES).next_multiple_of(PAGE_BYTES as usize) as u64).unwrap();
    let map = || Ring::map(&file, len).unwrap();
    (map(), Kernel { ring: map(), dirty_index: 0, reset_index: 0 })
}

#[derive(Debug, Clone)]
enum Operation {
    Push(usize),
    Harvest,
    Reset,
    /// A reset that is interrupted, with new entries before it is noticed.
    Interrupted {
        after: usize,
        then: usize,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (1..12usize).prop_map(Operation::Push),
        3 => Just(Operation::Harvest),
        2 => Just(Operation::Reset),
        1 => (0..10usize, 0..12usize).prop_map(|(after, then)| Operation::Interrupted { after, then }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_entry_is_harvested_once_and_told_until_it_is_freed(
        operations in proptest::collection::vec(operation(), 80)
    ) {
        let (mut ring, mut kernel) = pair(16);
        // What KVM has not freed, oldest first, and how many of those were harvested.
        let (mut there, mut harvested) = (VecDeque::new(), 0);
        let mut next = 0;
        for operation in operations {
            let mut push = |kernel: &mut Kernel, there: &mut VecDeque<_>, count: usize| {
                for _ in 0..count {
                    if kernel.is_full() {
                        break;
                    }
                    next += 1;
                    kernel.push(next as u32 % 7, next);
                    there.push_back((next as u32 % 7, next));
                }
            };
            match operation {
                Operation::Push(count) => push(&mut kernel, &mut there, count),
                Operation::Harvest => {
                    let mut told = Vec::new();
                    let written = ring.written;
                    ring.harvest(|slot, offset| told.push((slot, offset)));
                    prop_assert!(there.iter().eq(&told), "{there:?} {told:?}");
                    prop_assert_eq!(ring.written - written, (there.len() - harvested) as u64);
                    harvested = there.len();
                }
                Operation::Reset => {
                    prop_assert_eq!(ring.to_free(), harvested);
                    prop_assert_eq!(kernel.reset(usize::MAX), harvested);
                    ring.freed(harvested);
                    there.drain(..harvested);
                    harvested = 0;
                }
                Operation::Interrupted { after, then } => {
                    let freed = kernel.reset(after);
                    there.drain(..freed);
                    harvested -= freed;
                    push(&mut kernel, &mut there, then);
                    prop_assert_eq!(ring.seems_freed(), freed);
                    ring.freed(freed);
                }
            }
            prop_assert_eq!(ring.to_free(), harvested);
            prop_assert_eq!(ring.waiting(), (there.len() - harvested) as u64);
        }
    }
}

#[derive(Debug, Clone)]
enum Over {
    Push(usize),
    Harvest,
    /// By the vCPU's thread, which is out of KVM_RUN and resets too.
    HarvestOwn,
    Reset,
}

fn over() -> impl Strategy<Value = Over> {
    prop_oneof![
        3 => (1..8usize).prop_map(Over::Push),
        1 => (8..24usize).prop_map(Over::Push),
        3 => Just(Over::Harvest),
        2 => Just(Over::HarvestOwn),
        4 => Just(Over::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_ring_that_runs_over_says_so_and_is_put_right(operations in proptest::collection::vec(over(), 60)) {
        const LEN: usize = 16;
        let (mut ring, mut kernel) = pair(LEN);
        let reset = |ring: &mut Ring, kernel: &mut Kernel| {
            let to_free = ring.to_free();
            let freed = kernel.reset(usize::MAX);
            assert_eq!(freed, to_free, "with nothing between, KVM frees what it is to");
            ring.freed(freed);
        };
        let (mut next, mut untold) = (0, std::collections::BTreeSet::new());
        for operation in operations {
            match operation {
                Over::Push(count) => {
                    // KVM does not run a vCPU whose ring is full, but does not stop it in time either.
                    for _ in 0..count {
                        if kernel.dirty_index - kernel.reset_index >= LEN + LEN / 2 {
                            break;
                        }
                        next += 1;
                        untold.insert(next);
                        kernel.push_over(3, next);
                    }
                }
                Over::Harvest | Over::HarvestOwn => {
                    let found = |_, page| { untold.remove(&page); };
                    let harvest = match operation {
                        Over::Harvest => ring.harvest(found),
                        _ => ring.harvest_own(found),
                    };
                    match harvest {
                        Harvest::Complete => prop_assert!(untold.is_empty(), "{untold:?}"),
                        Harvest::Overrun => untold.clear(),
                    }
                    if matches!(operation, Over::HarvestOwn) {
                        reset(&mut ring, &mut kernel);
                    }
                }
                Over::Reset => reset(&mut ring, &mut kernel),
            }
        }
        // The vCPU's thread may have to come twice: for what ran over, and for what ran over meanwhile.
        for _ in 0..2 {
            ring.harvest_own(|_, _| {});
            reset(&mut ring, &mut kernel);
        }
        for _ in 0..3 {
            kernel.push_over(3, next);
            let mut told = 0;
            prop_assert_eq!(ring.harvest(|_, page| told = page), Harvest::Complete);
            prop_assert_eq!(told, next);
            reset(&mut ring, &mut kernel);
            prop_assert_eq!(kernel.dirty_index, kernel.reset_index, "KVM has all of the ring again");
            next += 1;
        }
    }
}

#[test]
fn no_entry_is_lost_while_one_side_fills_and_the_other_empties() {
    const COUNT: u64 = 200_000;
    let (mut ring, mut kernel) = pair(1024);
    // How many entries the kernel is asked to free; it answers with 0.
    let asked = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let asked = &asked;
        scope.spawn(move || {
            let mut number = 0;
            while number < COUNT || kernel.dirty_index != kernel.reset_index {
                let most = asked.load(Ordering::SeqCst) as usize;
                if most > 0 {
                    assert_eq!(kernel.reset(most), most);
                    asked.store(0, Ordering::SeqCst);
                }
                if number == COUNT || kernel.is_full() {
                    std::thread::yield_now();
                } else {
                    number += 1;
                    kernel.push(3, number);
                }
            }
        });
        let mut seen = 0;
        while seen < COUNT {
            let mut told = Vec::new();
            assert_eq!(ring.harvest(|slot, offset| told.push((slot, offset))), Harvest::Complete);
            let new = seen + 1..=seen + told.len() as u64;
            assert!(told.iter().copied().eq(new.map(|number| (3, number))));
            seen += told.len() as u64;
            asked.store(ring.to_free() as u64, Ordering::SeqCst);
            while asked.load(Ordering::SeqCst) > 0 {
                std::thread::yield_now();
            }
            ring.freed(told.len());
        }
    });
}
