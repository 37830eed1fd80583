//! The payloads of encoded pages, decoded as a page channel does: to guest memory that is there once a thread.

use std::cell::RefCell;
use std::sync::Arc;

use mig::GuestRam;
use mig::kernels::GuestPages;
use mig_wire::pages::{Encoding, MAX_ZSTD_PAGES, PAGE_BYTES, Run};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::{bounds, heap};

thread_local! {
    static PAGES: RefCell<GuestPages> = RefCell::new(guest());
}

fn guest() -> GuestPages {
    let ranges = [(GuestAddress(0), MAX_ZSTD_PAGES * PAGE_BYTES)];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&ranges).expect("128 KiB of memory");
    GuestPages::new(GuestRam::from_vm_memory(Arc::new(memory))).expect("one region")
}

/// Decodes what follows a table, each run to the same place; how many of the encoded ones were right.
///
/// # Panics
/// When the decoder panics, or allocates beyond its bound. What zstd allocates by itself is not counted here; that it
/// is bounded, `mig`'s own tests show.
pub fn decode(runs: &[Run], mut payloads: &[u8]) -> u64 {
    let mut right = 0;
    for run in runs {
        let (payload, rest) = payloads.split_at(run.payload_bytes());
        payloads = rest;
        if matches!(run.encoding, Encoding::Zero | Encoding::Raw) {
            continue;
        }
        let here = Run { first_page: 0, ..*run };
        let decoded = PAGES.with_borrow_mut(|pages| {
            let (decoded, usage) = heap::measure(|| pages.decode(&here, payload));
            let (peak, bound) = (usage.peak_bytes, bounds::DECODED_PAGES);
            assert!(peak <= bound, "{peak} bytes allocated to decode {run:?}, at most {bound} may be");
            decoded
        });
        right += u64::from(decoded.is_ok());
    }
    right
}
