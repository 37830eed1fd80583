//! The destination's machine with a hostile source, down to the saved state that it is given.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use mig_hostile::heap::Counting;
use mig_hostile::{Input, destination};

#[global_allocator]
static HEAP: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    destination::converse(&Input::new(bytes));
});

fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mig_fuzz::mutated(bytes, size, max_size, seed)
});
