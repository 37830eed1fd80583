//! The source's page channels: each sends its own chunks, waits while its link is full, and reads slowly.

use mig_core::domain::PAGE_BYTES;
use mig_core::progress::PageCounts;
use mig_core::source::Event;
use mig_core::{Side, Step, bitmap};

use crate::guest::Page;
use crate::link::{Cargo, FIRST_CHANNEL};
use crate::mishap::Work;
use crate::mutant::Mutant;
use crate::queue::Happening;
use crate::verdict::Violation;
use crate::world::World;

impl World {
    /// The channels send what is dirty, each its own chunks.
    pub(super) fn send_pages(&mut self, round: u32) {
        self.source.round = round;
        self.source.channels_done = 0;
        self.source.pages = PageCounts::default();
        let epoch = self.source.epoch;
        for channel in 0..self.source.channels {
            let delay = self.random.within(1..20_000);
            self.after(delay, Happening::Channel { epoch, channel, chunk: u64::from(channel) });
        }
    }

    pub(crate) fn channel_turns(&mut self, epoch: u32, channel: u16, chunk: u64) -> Result<(), Violation> {
        if epoch != self.source.epoch || self.source.machine.is_none() {
            return Ok(());
        }
        let link = FIRST_CHANNEL + usize::from(channel);
        let full = self.network.links[link].bytes_under_way >= self.scenario.window_bytes;
        if full && !self.scenario.is(Mutant::SendsIntoFullLink) {
            self.network.links[link].waiting = Some((epoch, chunk));
            return Ok(());
        }
        let mut words = Vec::new();
        let mut chunk = chunk;
        while chunk < self.guest.domain.chunks() {
            let range = self.guest.domain.chunk_pages(chunk);
            if self.source.dirty.take_words(range, &mut words) > 0 {
                break;
            }
            chunk += u64::from(self.source.channels);
        }
        if chunk >= self.guest.domain.chunks() {
            self.channel_has_sent(link);
            return Ok(());
        }
        if self.work_fails(Side::Source, Work::SendRound) {
            self.source_fails(Step::Round(self.source.round));
            return Ok(());
        }
        let pages = self.read_chunk(chunk, &words);
        let zero = pages.iter().filter(|(_, page)| page.is_zero()).count() as u64;
        let raw = pages.len() as u64 - zero;
        self.source.pages += PageCounts { zero, raw, ..PageCounts::default() };
        self.send(link, Cargo::Pages(pages));
        // a page is on the wire when the next chunk is turned to, where the link is an even one
        let delay = 2 * self.scenario.costs.read + raw * self.scenario.speed.nanos_per_page + 1;
        let chunk = chunk + u64::from(self.source.channels);
        self.after(delay, Happening::Channel { epoch, channel, chunk });
        Ok(())
    }

    fn channel_has_sent(&mut self, link: usize) {
        self.send(link, Cargo::RoundEnd(self.source.round));
        self.source.channels_done += 1;
        if self.source.channels_done == self.source.channels {
            let pages = self.source.pages;
            // the driver may note it long after the last byte left
            let delay = self.random.within(1..2 * (self.scenario.speed.latency + self.scenario.speed.jitter));
            let event = Event::RoundSent { pages, bytes: pages.raw * PAGE_BYTES };
            self.after(delay, Happening::Source(event));
        }
    }

    /// Re-arms a chunk and reads it, slowly: the guest goes on writing between any two of the steps.
    fn read_chunk(&mut self, chunk: u64, words: &[u64]) -> Vec<(u64, Page)> {
        let (now, read) = (self.now, self.scenario.costs.read);
        let first = self.guest.domain.chunk_pages(chunk).start;
        let late = self.scenario.is(Mutant::ReadBeforeRearm);
        if !late && !self.scenario.is(Mutant::RearmSkipped) {
            self.guest.rearm(now, first, words);
        }
        let indices = || bitmap::runs(first, words).flat_map(|run| run.first..run.first + run.count);
        self.guest.run_to(now + read);
        let mut pages: Vec<(u64, Page)> = indices().map(|at| (at, self.guest.memory[at as usize])).collect();
        self.guest.run_to(now + 2 * read);
        for (at, page) in &mut pages {
            page.back = self.guest.memory[*at as usize].back;
        }
        if late {
            self.guest.rearm(now + 2 * read, first, words);
        }
        pages
    }
}
