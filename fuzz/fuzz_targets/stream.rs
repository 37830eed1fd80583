//! The decoders: headers, messages, tables of pages, ends of rounds.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use mig_hostile::heap::Counting;
use mig_hostile::{Input, stream};

#[global_allocator]
static HEAP: Counting = Counting;

fuzz_target!(|bytes: &[u8]| {
    stream::read(&Input::new(bytes));
});

fuzz_mutator!(|bytes: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mig_fuzz::mutated(bytes, size, max_size, seed)
});
