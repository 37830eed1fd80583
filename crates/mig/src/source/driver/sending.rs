//! A round on its way: planned a batch ahead, handed to the channels, counted as they send it.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use mig_core::Step;
use mig_core::bitmap::PageRun;
use mig_core::progress::{PageCounts, Progress};
use mig_core::source::Event;
use mig_wire::Message;
use mig_wire::frame::MAX_DIGESTS;

use super::Driver;
use crate::digest;
use crate::guest::SourceVm;
use crate::link::{Link, ReadError};
use crate::source::local;
use crate::source::plan::{Next, Plan};
use crate::source::worker::Job;

/// How often the page count is told at most.
const TELL_INTERVAL: Duration = Duration::from_millis(100);

/// A round on its way.
pub(super) struct Sending {
    plan: Plan,
    /// Jobs that were planned and wait for their channel.
    pub(super) waiting: VecDeque<(usize, Job)>,
    planned: bool,
    last: Option<LastRound>,
    channels_left: usize,
    pages: PageCounts,
    bytes: u64,
}

/// What follows the pages of the last round.
pub(super) struct LastRound {
    /// Digests of all memory are wanted.
    pub(super) verify: bool,
}

impl<'s, 'e: 's, V: SourceVm> Driver<'s, 'e, V> {
    pub(super) fn start_round(&mut self, round: u32, rearm: bool, last: Option<LastRound>) {
        let channels = self.jobs.len();
        self.sending = Some(Sending {
            plan: Plan::new(round, rearm, channels, &self.dirty),
            waiting: VecDeque::new(),
            planned: false,
            last,
            channels_left: channels,
            pages: PageCounts::default(),
            bytes: 0,
        });
    }

    pub(super) fn put_back(&mut self, channel: usize, job: Option<Job>) {
        if let (Some(sending), Some(job)) = (&mut self.sending, job) {
            sending.waiting.push_front((channel, job));
        }
    }

    /// Plans the next batch, unless one waits; at the end of the round, its end on every channel.
    pub(super) fn plan_ahead(&mut self) {
        let Some(sending) = &mut self.sending else { return };
        if sending.planned || !sending.waiting.is_empty() {
            return;
        }
        let spare = || self.spent.1.try_recv().map(cleared).unwrap_or_default();
        let next = sending.plan.next(self.pages.domain(), &mut self.dirty, self.vm.tracker(), spare);
        let (round, moment) = (sending.plan.round, sending.plan.moment());
        match next {
            Ok(Next::Batch(channel, runs)) => {
                reach!(SourceMidRound);
                sending.waiting.push_back((channel, Job::Batch { moment, runs }));
                self.tell_copying();
            }
            Ok(Next::Done) => {
                sending.planned = true;
                sending.waiting.extend((0..self.jobs.len()).map(|c| (c, Job::EndRound { round })));
                if let Some(last) = sending.last.take() {
                    self.send_state(round, &last);
                }
            }
            Err(error) => self.feed(Event::Failed(local(Step::Round(round), error))),
        }
    }

    pub(super) fn tell_copying(&mut self) {
        let Some(sending) = &self.sending else { return };
        if self.told.elapsed() < TELL_INTERVAL {
            return;
        }
        self.told = Instant::now();
        let (sent_pages, total_pages) = sending.plan.progress();
        let round = sending.plan.round;
        self.observer.progress(&Progress::Copying { round, sent_pages, total_pages });
    }

    /// For the rounds; the pause has its own.
    pub(super) fn change_bandwidth(&mut self, cap_bytes_per_second: Option<u64>) {
        self.bandwidth.cap_bytes_per_second = cap_bytes_per_second;
        let in_pause = self.sending.as_ref().is_some_and(|s| !s.plan.rearm);
        self.pacer.change(if in_pause {
            self.bandwidth.pause_cap_bytes_per_second()
        } else {
            cap_bytes_per_second
        });
    }

    /// The state goes out while the channels send the last pages, and digests are computed beside both.
    pub(super) fn send_state(&mut self, round: u32, last: &LastRound) {
        if last.verify {
            let (pages, link) = (self.pages.clone(), self.link);
            self.scope.spawn(move || {
                // a link that fails is seen by the thread that reads it
                let _ = send_digests(link, &digest::all_chunks(&pages));
            });
        }
        let sections = std::mem::take(&mut self.sections);
        if let Err(fault) = self.say(&Message::State { round, sections }) {
            self.feed(Event::Failed(fault));
        }
    }

    pub(super) fn channel_sent(&mut self, pages: PageCounts, bytes: u64) {
        let Some(sending) = &mut self.sending else { return };
        sending.pages += pages;
        sending.bytes += bytes;
        sending.channels_left -= 1;
        if sending.channels_left == 0 {
            let (pages, bytes) = (sending.pages, sending.bytes);
            self.sending = None;
            self.feed(Event::RoundSent { pages, bytes });
        }
    }
}

fn cleared(mut runs: Vec<PageRun>) -> Vec<PageRun> {
    runs.clear();
    runs
}

fn send_digests(link: &Link, digests: &[u64]) -> Result<(), ReadError> {
    for (part, at) in digests.chunks(MAX_DIGESTS).zip((0u64..).step_by(MAX_DIGESTS)) {
        link.send_patiently(&Message::Digests { first_chunk: at, digests: part.to_vec() })?;
    }
    Ok(())
}
