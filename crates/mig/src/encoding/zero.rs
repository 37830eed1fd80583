//! Splits runs of dirty pages into those of zeros, which need no bytes, and the rest.

use mig_core::bitmap::PageRun;
use mig_wire::pages::{Encoding, Run};

use crate::memory::Pages;
use crate::untouched::Untouched;

/// Appends the runs of `run` to `table`, adjacent pages of one kind together. Untouched pages are not read.
pub(crate) fn classify(pages: &Pages, run: PageRun, untouched: &mut Untouched, table: &mut Vec<Run>) {
    let first_of_run = table.len();
    untouched.look(pages, run);
    for page in run.first..run.first + run.count {
        let zero = untouched.contains(page) || pages.is_zero(page);
        let encoding = if zero { Encoding::Zero } else { Encoding::Raw };
        match table[first_of_run..].last_mut() {
            Some(last) if last.encoding == encoding => last.count += 1,
            _ => table.push(Run { first_page: page, count: 1, encoding }),
        }
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::tests::two_regions;

    #[test]
    fn neighbours_of_one_kind_share_a_run() {
        let (memory, pages) = two_regions(8, 1);
        for page in [2u64, 3, 6] {
            memory.write_obj(1u8, GuestAddress(page * 4096 + 4095)).unwrap();
        }
        let mut table = Vec::new();
        let mut untouched = Untouched::new(&pages);
        classify(&pages, PageRun { first: 1, count: 6 }, &mut untouched, &mut table);
        let shape: Vec<_> = table.iter().map(|r| (r.first_page, r.count, r.encoding)).collect();
        assert_eq!(
            shape,
            [(1, 1, Encoding::Zero), (2, 2, Encoding::Raw), (4, 2, Encoding::Zero), (6, 1, Encoding::Raw)]
        );
    }
}
