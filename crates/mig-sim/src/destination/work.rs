//! What the destination's jobs come to.

use std::time::Duration;

use mig_core::destination::Event;
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::describe::Refusal;
use mig_wire::frame::{ChunkDigests, DestinationCosts};

use crate::guest;
use crate::mishap::Work;
use crate::mutant::Mutant;
use crate::queue::Job;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(crate) fn destination_did(&mut self, job: Job) -> Result<(), Violation> {
        self.destination.jobs -= 1;
        if self.destination.crashed {
            return Ok(());
        }
        let costs = self.scenario.costs;
        let work = job.work();
        let fails = self.work_fails(Side::Destination, work);
        let (step, event) = match job {
            Job::Verify(digests) => (Step::Verify, self.verdict_on(&digests)),
            Job::Load(sections) => {
                self.destination.loaded = Some(sections);
                if self.scenario.is(Mutant::RunsOnceLoaded) {
                    self.permits.taken_over(false, false)?;
                }
                (Step::Load, Event::Loaded)
            }
            Job::Resume(permit) => {
                drop(permit);
                self.destination.resumed_at = if fails { 0 } else { self.now };
                if fails {
                    self.permits.gone(Side::Destination);
                }
                (Step::Resume, Event::Resumed { at: None })
            }
            Job::Plain(Work::Prepare) if fails => {
                let reasons = vec![Refusal::new("memory", "too little", "")];
                return self.tell_destination(Event::Refused(reasons));
            }
            Job::Plain(Work::Prepare) => {
                let nanos = Duration::from_nanos;
                let (load, resume, verify) = (nanos(costs.load), nanos(costs.resume), nanos(costs.verify));
                (Step::Prepare, Event::Prepared(DestinationCosts { load, resume, verify }))
            }
            Job::Plain(_) | Job::Locate(_) => {
                let gap = (!fails).then(|| {
                    Duration::from_nanos(self.destination.resumed_at.saturating_sub(self.source.paused_at))
                });
                return self.tell_destination(Event::Gap(gap));
            }
        };
        if fails {
            let fault = Fault::new(Side::Destination, step, Blame::Local, "it was made to fail");
            return self.tell_destination(Event::Failed(fault));
        }
        self.tell_destination(event)
    }

    fn verdict_on(&self, digests: &[u64]) -> Event {
        let (domain, memory) = (&self.guest.domain, &self.destination.memory);
        let mine = guest::digests(domain, memory);
        let differing: Vec<u64> =
            (0..).zip(mine.iter().zip(digests)).filter(|(_, (a, b))| a != b).map(|(c, _)| c).collect();
        if differing.is_empty() || self.scenario.is(Mutant::VerifySkipped) {
            return Event::Verified;
        }
        let samples = differing.iter().map(|&chunk| {
            let pages = domain.chunk_pages(chunk).map(|page| memory[page as usize].digest()).collect();
            ChunkDigests { chunk, pages }
        });
        Event::Differs { chunks: differing.len() as u64, samples: samples.collect() }
    }
}
