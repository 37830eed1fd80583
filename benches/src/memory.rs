//! Memory of the kind that guests have: anonymous, private, huge pages where the host has them.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};

const HUGE_PAGE_BYTES: usize = 2 << 20;
/// What one thread faults in or fills at a time.
const PIECE_BYTES: usize = 64 << 20;

/// Zeroed memory that nobody has touched yet.
#[derive(Debug)]
pub struct Memory {
    mapping: NonNull<c_void>,
    mapped_bytes: usize,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping is this value's own, like a boxed slice.
unsafe impl Send for Memory {}
// SAFETY: as above; a shared reference gives shared slices only.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps it, starting at a huge page.
    ///
    /// # Errors
    /// The host refuses.
    pub fn new(bytes: usize) -> Result<Self> {
        ensure!(bytes > 0, "no memory is asked for");
        let mapped_bytes = bytes.next_multiple_of(4096) + HUGE_PAGE_BYTES;
        let size = NonZeroUsize::new(mapped_bytes).context("no memory is asked for")?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new private mapping at an address of the kernel's choice.
        let mapping = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_PRIVATE) }
            .with_context(|| format!("mapping {bytes} bytes"))?;
        let odd = mapping.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - mapping.as_ptr().addr();
        // SAFETY: the mapping has room for a huge page more than was asked for.
        let start = unsafe { mapping.cast::<u8>().add(odd) };
        // A kernel without huge pages refuses, and nothing depends on it.
        // SAFETY: the range is this mapping's; the advice changes no content.
        let _ = unsafe { madvise(start.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) };
        Ok(Self { mapping, mapped_bytes, start, bytes })
    }

    /// Faults all of it in, on as many threads as the host has cores.
    ///
    /// # Errors
    /// The host has not so much.
    pub fn populate(&mut self) -> Result<()> {
        each_piece(self.bytes_mut(), |piece| {
            let start = NonNull::from(&mut *piece).cast();
            // SAFETY: the range is a slice of this mapping; the advice changes no content.
            unsafe { madvise(start, piece.len(), MmapAdvise::MADV_POPULATE_WRITE) }
                .with_context(|| format!("faulting in {} bytes", piece.len()))
        })
    }

    /// Fills it with bytes that do not compress, on as many threads as the host has cores.
    pub fn fill(&mut self) {
        let filled = each_piece(self.bytes_mut(), |piece| {
            let mut state = piece.as_ptr().addr() as u64;
            for word in piece.chunks_mut(8) {
                word.copy_from_slice(&split_mix(&mut state).to_le_bytes()[..word.len()]);
            }
            Ok(())
        });
        filled.expect("filling has no errors");
    }

    /// Gives bytes back to the host; they are zero when they are touched again.
    ///
    /// # Panics
    /// When there are no such bytes.
    pub fn release(&mut self, range: Range<usize>) {
        let piece = &mut self.bytes_mut()[range];
        let bytes = piece.len();
        // An error leaves the memory where it is, and nothing depends on its going.
        // SAFETY: the range is a slice of this mapping, borrowed by nobody else; zeros are bytes, too.
        let _ = unsafe { madvise(NonNull::from(piece).cast(), bytes, MmapAdvise::MADV_DONTNEED) };
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives, and borrowed from it.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.bytes) }
    }

    /// Its bytes, to write.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: mapped for as long as `self` lives, and borrowed from it alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.bytes) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own, and all slices of it are gone. There is no remedy for an error.
        let _ = unsafe { munmap(self.mapping, self.mapped_bytes) };
    }
}

/// SplitMix64.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Does the work on pieces of `bytes`, on all cores; the first error of each thread ends that thread.
fn each_piece(bytes: &mut [u8], work: impl Fn(&mut [u8]) -> Result<()> + Sync) -> Result<()> {
    let pieces = std::sync::Mutex::new(bytes.chunks_mut(PIECE_BYTES));
    let next = || pieces.lock().unwrap_or_else(|e| e.into_inner()).next();
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    while let Some(piece) = next() {
                        work(piece)?;
                    }
                    Ok(())
                })
            })
            .collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_starts_at_a_huge_page_and_is_filled_to_its_last_byte() {
        let mut memory = Memory::new((4 << 20) + 4096).unwrap();
        assert!(memory.bytes().as_ptr().addr().is_multiple_of(HUGE_PAGE_BYTES));
        memory.populate().unwrap();
        assert!(memory.bytes().iter().all(|b| *b == 0));
        memory.fill();
        let zeros = memory.bytes().iter().filter(|b| **b == 0).count();
        assert!(zeros < memory.bytes().len() / 128, "{zeros} zeros");
        assert!(memory.bytes()[(4 << 20) + 4088..].iter().any(|b| *b != 0));
        memory.release(0..2 << 20);
        assert!(memory.bytes()[..2 << 20].iter().all(|b| *b == 0));
        assert!(memory.bytes()[2 << 20..].iter().any(|b| *b != 0));
    }
}
