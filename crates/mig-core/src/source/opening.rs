//! From the connection to the dirty log: who is there, what the guest is, the page channels.

use std::time::Duration;

use mig_wire::describe::Refusal;
use mig_wire::fault::{Blame, Fault, Side, Step};
use mig_wire::frame::{DestinationCosts, Message};
use mig_wire::hello::{Capabilities, Hello, VERSIONS, Welcome};
use mig_wire::section::Section;

use super::{Action, Source, Stage};
use crate::progress::Progress;
use crate::switchover::ARBITER_SECTION;

impl Source {
    pub(super) fn connected(&mut self, now: Duration) -> Vec<Action> {
        let Stage::Connecting = self.stage else { return self.out_of_turn(now, "connected") };
        self.ledger.began = Some(now);
        self.stage = Stage::Greeting;
        let required = self.required().bits();
        vec![Action::Send(Message::Hello(Hello {
            version_min: *VERSIONS.start(),
            version_max: *VERSIONS.end(),
            required,
            optional: self.optional().bits(),
            channels: self.config.channels,
            session: self.config.session,
        }))]
    }

    fn required(&self) -> Capabilities {
        let mut required = Capabilities::empty();
        required.set(Capabilities::VERIFY, self.config.verify);
        required.set(Capabilities::ARBITER, self.config.arbiter.is_some());
        required
    }

    fn optional(&self) -> Capabilities {
        let mut optional = Capabilities::STARTED;
        optional.set(Capabilities::SUITED_CHANNELS, self.config.suited_channels);
        optional | self.config.page_encodings & Capabilities::PAGE_ENCODINGS
    }

    pub(super) fn welcomed(&mut self, now: Duration, welcome: Welcome) -> Vec<Action> {
        let Stage::Greeting = self.stage else { return self.out_of_turn(now, "welcome") };
        if !VERSIONS.contains(&welcome.version)
            || welcome.channels == 0
            || welcome.channels > self.config.channels
            || welcome.capabilities & !self.optional().bits() != self.required().bits()
        {
            return self.out_of_turn(now, "a welcome to something that was not offered");
        }
        self.stage = Stage::Describing;
        self.ledger.channels = welcome.channels;
        let agreed = Capabilities::from_bits_truncate(welcome.capabilities);
        self.ledger.start_is_told = agreed.contains(Capabilities::STARTED);
        self.ledger.page_encodings = agreed & Capabilities::PAGE_ENCODINGS;
        self.ledger.secret = welcome.secret;
        let mut description = self.config.description.clone();
        description.platform.extend(self.config.arbiter.map(|arbiter| Section {
            name: ARBITER_SECTION.into(),
            instance: 0,
            version: 1,
            critical: true,
            body: arbiter.to_vec(),
        }));
        vec![
            Action::Tell(Progress::Connected { version: welcome.version, channels: welcome.channels }),
            Action::Send(Message::Describe(Box::new(description))),
        ]
    }

    pub(super) fn accepted(&mut self, now: Duration, costs: DestinationCosts) -> Vec<Action> {
        let Stage::Describing = self.stage else { return self.out_of_turn(now, "accept") };
        self.estimate.load = costs.load;
        self.estimate.resume = costs.resume;
        if self.config.verify {
            // the destination compares once it has the source's digests
            self.estimate.verify += costs.verify;
        }
        self.stage = Stage::Attaching;
        let (channels, secret) = (self.ledger.channels, self.ledger.secret);
        vec![Action::Tell(Progress::Accepted), Action::Attach { channels, secret }]
    }

    pub(super) fn refused(&mut self, now: Duration, refusals: &[Refusal]) -> Vec<Action> {
        let (step, words) = match self.stage {
            Stage::Greeting => (Step::Handshake, "refused to speak"),
            Stage::Describing => (Step::Prepare, "refused the guest"),
            _ => return self.out_of_turn(now, "refuse"),
        };
        let reasons: Vec<String> = refusals.iter().map(|r| format!("{}: {}", r.what, r.cause)).collect();
        let mut remedies: Vec<&str> =
            refusals.iter().map(|r| r.remedy.as_str()).filter(|r| !r.is_empty()).collect();
        remedies.dedup();
        let fault =
            Fault::new(Side::Destination, step, Blame::Peer, format!("{words}: {}", reasons.join("; ")));
        self.give_up(now, fault.remedy(remedies.join("; ")), false)
    }

    pub(super) fn attached(&mut self) -> Vec<Action> {
        let Stage::Attaching = self.stage else { return Vec::new() };
        self.stage = Stage::StartingLog;
        self.ledger.tracking = true;
        vec![Action::StartTracking]
    }

    pub(super) fn tracking(&mut self, now: Duration) -> Vec<Action> {
        let Stage::StartingLog = self.stage else { return Vec::new() };
        self.ledger.copying_since = now;
        self.send_round(now, 0, 0, 0)
    }
}
