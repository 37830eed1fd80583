//! Which chunks are tried less and less, since an encoding of their pages never pays.
//!
//! After a failure as many tries are left out as before it, and one more, twice over: 1, 3, 7 and so on, up to 63. A
//! success forgets them all. Counted for each chunk of 2 MiB, since what lies together is often alike.

use mig_core::domain::CHUNK_PAGES;

const MOST_LEFT_OUT: u8 = 63;

#[derive(Debug, Clone, Copy, Default)]
struct Chunk {
    /// Tries to leave out now.
    left_out: u8,
    /// Tries that were left out after the last failure.
    last_left_out: u8,
}

/// What is known of the chunks of one channel.
#[derive(Debug)]
pub(crate) struct Reluctance {
    channels: usize,
    chunks: Vec<Chunk>,
}

impl Reluctance {
    pub(crate) fn new(channels: usize) -> Self {
        Self { channels, chunks: Vec::new() }
    }

    /// Whether to try now, for a page and those around it.
    pub(crate) fn tries(&mut self, page: u64) -> bool {
        let chunk = self.chunk(page);
        let tries = chunk.left_out == 0;
        chunk.left_out = chunk.left_out.saturating_sub(1);
        tries
    }

    /// What came of it.
    pub(crate) fn tried(&mut self, page: u64, paid: bool) {
        let chunk = self.chunk(page);
        let left_out = if paid { 0 } else { (2 * chunk.last_left_out + 1).min(MOST_LEFT_OUT) };
        *chunk = Chunk { left_out, last_left_out: left_out };
    }

    /// A channel has every `channels`th chunk.
    fn chunk(&mut self, page: u64) -> &mut Chunk {
        let index = (page / CHUNK_PAGES) as usize / self.channels;
        if index >= self.chunks.len() {
            self.chunks.resize(index + 1, Chunk::default());
        }
        &mut self.chunks[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tries(reluctance: &mut Reluctance, page: u64, occasions: usize, pays: bool) -> Vec<usize> {
        let mut tried = Vec::new();
        for occasion in 0..occasions {
            if reluctance.tries(page) {
                reluctance.tried(page, pays);
                tried.push(occasion);
            }
        }
        tried
    }

    #[test]
    fn a_chunk_that_never_pays_is_tried_less_and_less_but_never_given_up() {
        let mut reluctance = Reluctance::new(2);
        assert_eq!(tries(&mut reluctance, 5, 300, false), [0, 2, 6, 14, 30, 62, 126, 190, 254]);
        assert_eq!(tries(&mut reluctance, 5, 100, true).len(), 100 - 18, "and once it pays, always");
    }

    #[test]
    fn chunks_are_known_apart() {
        let mut reluctance = Reluctance::new(2);
        tries(&mut reluctance, 0, 10, false);
        assert!(!reluctance.tries(CHUNK_PAGES - 1), "the same chunk");
        assert!(reluctance.tries(2 * CHUNK_PAGES), "the channel's next");
    }
}
