//! What the source's jobs come to.

use mig_core::source::Event;
use mig_core::{Bitmap, Blame, Fault, Side, Step};
use mig_wire::frame::ChunkDigests;
use mig_wire::section::Section;

use crate::mishap::Work;
use crate::mutant::Mutant;
use crate::queue::Job;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    pub(crate) fn source_did(&mut self, job: Job) -> Result<(), Violation> {
        self.source.jobs -= 1;
        if self.source.crashed {
            return Ok(());
        }
        let work = job.work();
        let fails = self.work_fails(Side::Source, work);
        let (step, event) = match (job, work) {
            (Job::Locate(guest_addresses), _) => {
                if !fails {
                    self.source.differing = Some(guest_addresses.clone());
                }
                (Step::Verify, Event::Located { guest_addresses })
            }
            (Job::Resume(permit), _) => {
                drop(permit);
                self.source.resuming = false;
                if fails {
                    self.source.resume_failed = true;
                    self.permits.gone(Side::Source);
                } else {
                    self.source.ran_again = true;
                    self.guest.resume(self.now);
                }
                (Step::Resume, Event::Resumed)
            }
            (_, Work::StartTracking) => {
                self.start_tracking();
                (Step::Track, Event::Tracking)
            }
            (_, Work::Pause) => {
                // a pause that fails may have stopped the guest all the same
                if !fails || self.random.chance(50) {
                    self.guest.pause(self.now);
                    self.source.paused_at = self.now;
                }
                (Step::Pause, Event::Paused)
            }
            (_, Work::Save) => {
                self.save();
                (Step::Save, Event::Saved)
            }
            _ => {
                if !self.scenario.is(Mutant::SyncBeforeSave) || self.guest.runs {
                    self.guest.sync(self.now, &mut self.source.dirty);
                }
                let hot_pages = if self.guest.runs {
                    self.source.hot.synced(&mut self.source.dirty)
                } else {
                    self.source.hot.release(&mut self.source.dirty);
                    0
                };
                (Step::LastSync, Event::Synced { dirty_pages: self.source.dirty.count(), hot_pages })
            }
        };
        if fails {
            let fault = Fault::new(Side::Source, step, Blame::Local, "it was made to fail");
            return self.tell_source(Event::Failed(fault));
        }
        self.tell_source(event)
    }

    fn start_tracking(&mut self) {
        // the machine may have ended meanwhile, and switched the log off already
        if self.source.machine.is_some() {
            self.guest.start_tracking(self.now);
            self.source.dirty = match self.guest.old_dirty.take() {
                Some(old) if self.scenario.is(Mutant::StartKeepsOldPages) => old,
                _ => Bitmap::full(&self.guest.domain),
            };
        }
    }

    fn save(&mut self) {
        if self.scenario.is(Mutant::SyncBeforeSave) {
            self.guest.sync(self.now, &mut self.source.dirty);
        }
        let state = self.guest.save(self.scenario.save_writes_memory);
        let body = state.to_le_bytes().to_vec();
        let name = "sim.guest".into();
        self.source.sections = vec![Section { name, instance: 0, version: 1, critical: true, body }];
    }

    /// Which pages of the sampled chunks differ, as a driver finds out from their digests.
    pub(super) fn differing(&self, samples: &[ChunkDigests]) -> Vec<u64> {
        let domain = &self.guest.domain;
        let pages = samples.iter().flat_map(|sample| domain.chunk_pages(sample.chunk).zip(&sample.pages));
        pages
            .filter(|(page, theirs)| self.guest.memory[*page as usize].digest() != **theirs)
            .filter_map(|(page, _)| domain.guest_address(page))
            .collect()
    }
}
