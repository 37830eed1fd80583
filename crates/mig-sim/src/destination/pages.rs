//! What arrives on page channels.

use mig_core::destination::Event;

use crate::guest::Page;
use crate::link::Cargo;
use crate::mishap::Mishap;
use crate::mutant::Mutant;
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(crate) fn channel_receives(&mut self, cargo: Cargo) -> Result<(), Violation> {
        if self.destination.machine.is_none() {
            return Ok(());
        }
        match cargo {
            Cargo::Attach => {
                self.destination.attached += 1;
                if self.destination.attached < self.destination.accepts {
                    return Ok(());
                }
                self.tell_destination(Event::Attached)?;
                let delay = self.scenario.speed.latency;
                self.after(delay, Happening::AttachAnswered);
                Ok(())
            }
            Cargo::Pages(pages) => {
                for (at, page) in pages {
                    self.place(at as usize, page);
                }
                Ok(())
            }
            Cargo::RoundEnd(round) => self.tell_destination(Event::ChannelEnded { round }),
            Cargo::Control(..) | Cargo::Closed => Ok(()),
        }
    }

    fn place(&mut self, at: usize, page: Page) {
        let lost = self.mishaps.strikes(|mishap| match mishap {
            Mishap::LosesPage { after } => Some(*after),
            _ => None,
        });
        // memory is zero at first: a zero page clears only what was received before
        let nothing_to_clear = !self.destination.received[at] || self.scenario.is(Mutant::ZeroPagesSkipped);
        if lost || page.is_zero() && nothing_to_clear {
            return;
        }
        self.destination.received[at] = true;
        self.destination.memory[at] = page;
    }
}
