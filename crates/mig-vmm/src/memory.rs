//! Guest memory: anonymous, private, on huge pages where the host has them, and faulted in before it is
//! needed: a fault costs the guest, or a page's arrival, tens of times more than touching it here.

#![allow(unsafe_code)]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use mig::describe::Region;
use mig_kvm::dirty::WrittenPages;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};
use vmm_sys_util::errno;

/// Guest memory, with the VMM's own writes tracked.
pub type Ram = GuestMemoryMmap<WrittenPages>;

/// What one thread faults in at a time.
const PREFAULT_BYTES: usize = 64 << 20;
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
    #[error("the host has no {bytes} bytes of memory to back the guest with")]
    Populate {
        bytes: u64,
        #[source]
        source: errno::Error,
    },
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

/// Faults all memory in, on as many threads as the host has cores.
///
/// # Errors
/// [`MemoryError::Populate`] when the host has not so much.
pub fn prefault(memory: &Ram) -> Result<(), MemoryError> {
    let pieces: Vec<(usize, usize)> = memory.iter().flat_map(pieces).collect();
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(pieces.len());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&(address, bytes)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if let Err(e) = populate(address, bytes) {
                        failed.lock().unwrap_or_else(|e| e.into_inner()).replace(e);
                        return;
                    }
                }
            });
        }
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        None => Ok(()),
        Some(source) => Err(MemoryError::Populate { bytes: memory.iter().map(|r| r.len()).sum(), source }),
    }
}

fn pieces(region: &GuestRegionMmap<WrittenPages>) -> impl Iterator<Item = (usize, usize)> + use<> {
    let (start, size) = (region.as_ptr() as usize, region.size());
    (0..size).step_by(PREFAULT_BYTES).map(move |at| (start + at, PREFAULT_BYTES.min(size - at)))
}

fn populate(address: usize, bytes: usize) -> Result<(), errno::Error> {
    // SAFETY: the range lies in a mapping of guest memory, which the caller holds; populating it changes no
    // content.
    match unsafe { libc::madvise(address as *mut libc::c_void, bytes, libc::MADV_POPULATE_WRITE) } {
        0 => Ok(()),
        _ => match errno::Error::last() {
            // Linux before 5.14 does not know the advice: pages come when they are touched.
            e if e.errno() == libc::EINVAL => Ok(()),
            e => Err(e),
        },
    }
}

/// Bytes of memory the host could give (`MemAvailable`), where it says.
pub(crate) fn available_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;
    use vm_memory::bitmap::Bitmap;

    use super::*;
    use crate::layout;

    #[test]
    fn prefaulted_memory_is_resident_zero_and_unmarked() {
        let memory = map(&layout::regions(6 << 20)).unwrap();
        prefault(&memory).unwrap();
        let region = memory.iter().next().unwrap();
        let mut resident = vec![0u8; 6 << 8];
        // SAFETY: the vector has a byte for each page of the mapping.
        let code = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), resident.as_mut_ptr()) };
        assert_eq!(code, 0);
        assert!(resident.iter().all(|r| r & 1 == 1), "every page is resident");
        assert_eq!(memory.read_obj::<u64>(GuestAddress(5 << 20)).unwrap(), 0);
        let mapping: &MmapRegion<WrittenPages> = region;
        assert!(!mapping.bitmap().dirty_at(5 << 20));
    }

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
