//! What may be held at most at any instant: on links, in queues, in machines.
//!
//! The control channel is nearly lockstep, so a handful of messages is all that can be on its way at once;
//! a page channel waits when its link is full; a coordinator has one job under way, and a second one only
//! where a failure made it resume the guest meanwhile; a machine keeps what the accepted description allows.

use crate::link::{FIRST_CHANNEL, Link};
use crate::verdict::Violation;
use crate::world::World;

/// Control messages on their way in one direction.
const MESSAGES: usize = 6;
/// The largest frame of pages: the 8 pages that a chunk of a guest here has at most, with their descriptors.
const FRAME_BYTES: u64 = 40 + 8 * (4096 + 16);
/// Frames on a page channel: one a chunk, and the end of a round.
const FRAMES: usize = 5;
/// Jobs of a coordinator.
const JOBS: usize = 2;
/// What is scheduled, besides what is on its way.
const SCHEDULED: usize = 10;
/// What a machine keeps, by the length of its text: the description and what it accepts, digests and state.
const MACHINE_TEXT: usize = 3000;

impl World {
    pub(crate) fn check_bounds(&mut self) -> Result<(), Violation> {
        let window = self.scenario.window_bytes;
        for (at, link) in self.network.links.iter().enumerate() {
            let fits = if at < FIRST_CHANNEL {
                link.under_way() <= MESSAGES
            } else {
                link.under_way() <= FRAMES && link.bytes_under_way <= window + FRAME_BYTES
            };
            if !fits {
                return Err(Violation::Unbounded { what: "a link", held: link.under_way() as u64 });
            }
        }
        let frames: usize = self.network.links.iter().map(Link::under_way).sum();
        let held = self.queue.len();
        if held > SCHEDULED + frames {
            return Err(Violation::Unbounded { what: "the queue", held: held as u64 });
        }
        for held in [self.source.jobs, self.destination.jobs] {
            if held > JOBS {
                return Err(Violation::Unbounded { what: "jobs", held: held as u64 });
            }
        }
        self.check_machines()
    }

    /// Looks at what the machines keep, now and then: it takes long.
    fn check_machines(&self) -> Result<(), Violation> {
        if !self.now.is_multiple_of(16) {
            return Ok(());
        }
        let source = self.source.machine.as_ref().map(|machine| format!("{machine:?}"));
        let destination = self.destination.machine.as_ref().map(|machine| format!("{machine:?}"));
        for text in [source, destination].into_iter().flatten() {
            if text.len() > MACHINE_TEXT {
                return Err(Violation::Unbounded { what: "a machine", held: text.len() as u64 });
            }
        }
        Ok(())
    }
}
