//! Guest memory: anonymous, private, on huge pages where the host has them. None is taken from the host before
//! the guest touches it, or a page of it arrives.

#![allow(unsafe_code)]

use mig::describe::Region;
use mig_kvm::dirty::WrittenPages;
use vm_memory::mmap::FromRangesError;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory, with the VMM's own writes tracked.
pub type Ram = GuestMemoryMmap<WrittenPages>;

const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Why there is no memory for a guest.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum MemoryError {
    #[error("mapping {bytes} bytes for the guest at {guest_address:#x} failed")]
    Map {
        guest_address: u64,
        bytes: u64,
        #[source]
        source: FromRangesError,
    },
    #[error("the guest is to have {bytes} bytes, and the host has {available_bytes} available")]
    NotAvailable { bytes: u64, available_bytes: u64 },
}

/// Maps the regions: zeros.
///
/// # Errors
/// [`MemoryError::NotAvailable`], so that nobody meets the kernel's out-of-memory killer instead;
/// [`MemoryError::Map`].
pub fn map(regions: &[Region]) -> Result<Ram, MemoryError> {
    let bytes = regions.iter().fold(0, |sum: u64, r| sum.saturating_add(r.bytes));
    if let Some(available_bytes) = available_bytes().filter(|available| bytes > *available) {
        return Err(MemoryError::NotAvailable { bytes, available_bytes });
    }
    let mapped = regions.iter().map(map_one).collect::<Result<Vec<_>, _>>()?;
    let failed = |_| {
        let Region { guest_address, bytes } =
            regions.first().copied().unwrap_or(Region { guest_address: 0, bytes: 0 });
        MemoryError::Map { guest_address, bytes, source: FromRangesError::InvalidGuestRegion }
    };
    Ram::from_regions(mapped).map_err(failed)
}

fn map_one(region: &Region) -> Result<GuestRegionMmap<WrittenPages>, MemoryError> {
    let Region { guest_address, bytes } = *region;
    let failed = |source| MemoryError::Map { guest_address, bytes, source };
    let size = usize::try_from(bytes).map_err(|_| failed(FromRangesError::InvalidGuestRegion))?;
    let mapping = aligned(size).map_err(|e| failed(e.into()))?;
    // SAFETY: the range is the mapping just made; the advice changes no content. A kernel without huge pages
    // refuses it, and nothing depends on it.
    unsafe { libc::madvise(mapping.as_ptr().cast(), size, libc::MADV_HUGEPAGE) };
    GuestRegionMmap::new(mapping, GuestAddress(guest_address))
        .ok_or_else(|| failed(FromRangesError::InvalidGuestRegion))
}

/// A mapping that starts at a huge page. Linux aligns large ones by itself (6.7 and later); before, mappings
/// grow downwards from one another, so that a filler of the odd size below the first try puts the second
/// right. A third is not worth having: the guest then has small pages at its ends.
fn aligned(size: usize) -> Result<MmapRegion<WrittenPages>, vm_memory::mmap::MmapRegionError> {
    let first = MmapRegion::new(size)?;
    let odd = (first.as_ptr() as usize).wrapping_sub(size) % HUGE_PAGE_BYTES;
    if size < HUGE_PAGE_BYTES || (first.as_ptr() as usize).is_multiple_of(HUGE_PAGE_BYTES) || odd == 0 {
        return Ok(first);
    }
    let _filler = MmapRegion::<WrittenPages>::new(odd)?;
    MmapRegion::new(size)
}

/// Bytes of memory the host could give (`MemAvailable`), where it says.
pub(crate) fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryBackend;

    use super::*;
    use crate::layout;

    #[test]
    fn memory_starts_at_a_huge_page() {
        for bytes in [2 << 20, 34 << 20] {
            let memory = map(&layout::regions(bytes)).unwrap();
            let start = memory.iter().next().unwrap().as_ptr() as usize;
            assert!(start.is_multiple_of(HUGE_PAGE_BYTES), "{start:#x}");
        }
    }

    #[test]
    fn more_memory_than_the_host_has_is_an_error_that_says_how_much() {
        let error = map(&layout::regions(1 << 55)).unwrap_err();
        assert!(matches!(error, MemoryError::NotAvailable { bytes, .. } if bytes == 1 << 55), "{error}");
        assert!(error.to_string().contains("36028797018963968 bytes"), "{error}");
    }
}
