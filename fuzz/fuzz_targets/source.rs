//! The source's machine with a hostile destination.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use mig_hostile::heap::Counting;
use mig_hostile::{Input, source};

#[global_allocator]
static HEAP: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    source::converse(&Input::new(bytes));
});

fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mig_fuzz::mutated(bytes, size, max_size, seed)
});
