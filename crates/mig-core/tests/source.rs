//! The source's machine, event by event.

use std::time::Duration;

use mig_core::policy::{Decision, OnStall, Policy, StopReason};
use mig_core::progress::{OutcomeKind, PageCounts, Progress, Report, Verification};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::{Blame, Fault, Side, Step};
use mig_wire::Message;
use mig_wire::describe::{Description, Refusal, Region};
use mig_wire::frame::{ChunkDigests, DestinationCosts};
use mig_wire::hello::{Attach, Hello, Welcome};

const MS: Duration = Duration::from_millis(1);

fn config() -> SourceConfig {
    SourceConfig {
        policy: Policy::default(),
        channels: 2,
        verify: true,
        session: [7; 16],
        description: description(),
        ram_bytes: 16 << 20,
        pause: MS,
        save: MS,
        verify_cost: MS,
    }
}

fn description() -> Description {
    Description {
        architecture: "x86_64".into(),
        page_bytes: 4096,
        vcpus: 1,
        regions: vec![Region { guest_address: 0, bytes: 16 << 20 }],
        boot_id: None,
        schemas: Vec::new(),
        platform: Vec::new(),
    }
}

fn welcome() -> Welcome {
    Welcome { version: 1, capabilities: 1, channels: 2, secret: [9; 16] }
}

fn fault(blame: Blame, step: Step) -> Fault {
    Fault::new(Side::Source, step, blame, "it broke")
}

fn sent(raw: u64) -> Event {
    Event::RoundSent { pages: PageCounts { zero: 0, raw }, bytes: raw * 4096 }
}

const READY: Message = Message::Ready { verify: Duration::ZERO, load: Duration::ZERO };
const RUNNING: Message = Message::Running { resume: Duration::ZERO };

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum At {
    Connecting,
    Greeting,
    Describing,
    Attaching,
    StartingLog,
    Copying,
    Measuring,
    Pausing,
    Saving,
    LastSync,
    LastRound,
    Arrived,
    Committed,
    AwaitingGap,
}

use At::*;

/// The stages of a migration that goes well, each with the events that lead on to the next.
fn way() -> Vec<(At, Vec<Event>)> {
    let hear = |message| vec![Event::Message(message)];
    let acknowledged = |round| Event::Message(Message::RoundAck { round });
    vec![
        (Connecting, vec![Event::Connected]),
        (Greeting, hear(Message::Welcome(welcome()))),
        (Describing, hear(Message::Accept(DestinationCosts::default()))),
        (Attaching, vec![Event::Attached]),
        (StartingLog, vec![Event::Tracking]),
        (Copying, vec![sent(4096), acknowledged(0)]),
        (Measuring, vec![Event::Synced { dirty_pages: 5 }]),
        (Pausing, vec![Event::Paused]),
        (Saving, vec![Event::Saved]),
        (LastSync, vec![Event::Synced { dirty_pages: 5 }]),
        (LastRound, vec![sent(5), acknowledged(1)]),
        (Arrived, hear(READY)),
        (Committed, hear(RUNNING)),
        (AwaitingGap, hear(Message::Gap(Some(MS)))),
    ]
}

/// A machine and its clock, which goes on by a millisecond an event.
struct Run {
    machine: Source,
    now: Duration,
}

impl Run {
    fn new(config: SourceConfig) -> Self {
        Self { machine: Source::new(config), now: Duration::from_secs(5) }
    }

    fn at(stage: At) -> Self {
        Self::up_to(stage, config())
    }

    fn up_to(stage: At, config: SourceConfig) -> Self {
        let mut run = Self::new(config);
        for (_, events) in way().into_iter().take_while(|(at, _)| *at != stage) {
            for event in events {
                run.tell(event);
            }
        }
        assert!(!run.machine.has_ended());
        run
    }

    fn resuming() -> Self {
        let mut run = Self::at(LastRound);
        assert_eq!(names(&run.tell(Event::Cancelled { reason: None })), ["resume", "send abort"]);
        run
    }

    fn tell(&mut self, event: Event) -> Vec<Action> {
        self.tell_after(MS, event)
    }

    fn tell_after(&mut self, time: Duration, event: Event) -> Vec<Action> {
        self.now += time;
        let (machine, actions) = self.machine.clone().handle(self.now, event);
        self.machine = machine;
        actions
    }

    fn hear(&mut self, message: Message) -> Vec<Action> {
        self.tell(Event::Message(message))
    }
}

/// What a list of actions does, without what it tells observers.
fn names(actions: &[Action]) -> Vec<String> {
    let name = |action: &Action| {
        Some(match action {
            Action::Tell(_) => return None,
            Action::Send(message) => format!("send {:?}", message.kind()).to_lowercase(),
            Action::Attach { channels, .. } => format!("attach {channels}"),
            Action::StartTracking => "start tracking".into(),
            Action::SendRound { round } => format!("round {round}"),
            Action::Sync => "sync".into(),
            Action::Pause => "pause".into(),
            Action::Save => "save".into(),
            Action::SendLast { round, verify } => format!("last round {round} {verify}"),
            Action::Locate(_) => "locate".into(),
            Action::Commit(_) => "commit".into(),
            Action::Resume(_) => "resume".into(),
            Action::StopTracking => "stop tracking".into(),
            Action::End(report) => report.outcome.name().into(),
        })
    };
    actions.iter().filter_map(name).collect()
}

fn report(actions: &[Action]) -> &Report {
    match actions.last() {
        Some(Action::End(report)) => report,
        other => panic!("no end, but {other:?}"),
    }
}

/// Carries on to the end where the guest is being resumed; the outcome.
fn outcome(run: &mut Run, actions: Vec<Action>) -> (OutcomeKind, Vec<String>) {
    let mut all = names(&actions);
    let mut last = actions;
    if !run.machine.has_ended() {
        last = run.tell(Event::Resumed);
        all.extend(names(&last));
    }
    (report(&last).outcome, all)
}

/// Every message there is, none of which is right at every stage.
fn every_message() -> Vec<Message> {
    let hello =
        Hello { version_min: 1, version_max: 1, required: 0, optional: 0, channels: 1, session: [0; 16] };
    vec![
        Message::Hello(hello),
        Message::Welcome(welcome()),
        Message::Describe(Box::new(description())),
        Message::Accept(DestinationCosts::default()),
        Message::Refuse(vec![Refusal::new("a", "b", "c")]),
        Message::Attach(Attach { session: [0; 16], secret: [0; 16], channel: 0 }),
        Message::Attached,
        Message::RoundAck { round: 0 },
        Message::RoundAck { round: 1 },
        Message::State { round: 0, sections: Vec::new() },
        Message::Digests { first_chunk: 0, digests: Vec::new() },
        READY,
        Message::Mismatch { chunks: 1, samples: Vec::new() },
        Message::Commit,
        RUNNING,
        Message::Gap(None),
        Message::Lost(fault(Blame::Local, Step::Resume)),
        Message::Ping(1),
        Message::Pong(1),
    ]
}

fn in_turn(at: At, message: &Message) -> bool {
    matches!(
        (at, message),
        (Greeting, Message::Welcome(_) | Message::Refuse(_))
            | (Describing, Message::Accept(_) | Message::Refuse(_))
            | (Copying, Message::RoundAck { round: 0 })
            | (LastRound, Message::RoundAck { round: 1 })
            | (LastRound | Arrived, Message::Mismatch { .. })
            | (Arrived, Message::Ready { .. })
            | (Committed, Message::Running { .. } | Message::Lost(_))
            | (AwaitingGap, Message::Gap(_))
    )
}

#[test]
fn a_migration_that_goes_well_acts_in_this_order() {
    let mut run = Run::new(config());
    let mut all = Vec::new();
    for (_, events) in way() {
        for event in events {
            all.extend(names(&run.tell(event)));
        }
    }
    assert_eq!(
        all,
        [
            "send hello",
            "send describe",
            "attach 2",
            "start tracking",
            "round 0",
            "sync",
            "pause",
            "save",
            "sync",
            "last round 1 true",
            "commit",
            "stop tracking",
            "moved"
        ]
    );
    assert!(run.machine.has_ended());
}

#[test]
fn a_cancel_before_commit_leaves_the_guest_here_running_and_untracked_and_the_peer_told() {
    for (at, _) in way().into_iter().filter(|(at, _)| *at < Committed) {
        let mut run = Run::at(at);
        let actions = run.tell(Event::Cancelled { reason: None });
        let (outcome, all) = outcome(&mut run, actions);
        assert_eq!(outcome, OutcomeKind::StillHere, "{at:?}");
        let did = |what: &str| all.iter().filter(|name| *name == what).count();
        assert_eq!(did("resume"), usize::from(at >= Pausing), "{at:?}");
        assert_eq!(did("stop tracking"), usize::from(at >= StartingLog), "{at:?}");
        assert_eq!(did("send abort"), usize::from(at >= Greeting), "{at:?}");
        assert_eq!(did("commit"), 0);
    }
}

#[test]
fn a_cancel_after_commit_is_too_late() {
    for at in [Committed, AwaitingGap] {
        let mut run = Run::at(at);
        assert!(run.machine.is_committed());
        assert!(run.tell(Event::Cancelled { reason: None }).is_empty());
        assert!(!run.machine.has_ended());
    }
}

#[test]
fn a_failure_before_commit_leaves_the_guest_here_and_after_it_nobody_knows_until_the_peer_said_running() {
    for blame in [Blame::Local, Blame::Network, Blame::Peer, Blame::Configuration] {
        for (at, _) in way() {
            let mut run = Run::at(at);
            let actions = run.tell(Event::Failed(fault(blame, Step::Track)));
            let (outcome, all) = outcome(&mut run, actions);
            let expected = match at {
                Committed => OutcomeKind::InDoubt,
                AwaitingGap => OutcomeKind::Moved,
                _ => OutcomeKind::StillHere,
            };
            assert_eq!(outcome, expected, "{at:?} {blame:?}");
            let resumed = all.contains(&"resume".to_owned());
            assert_eq!(resumed, (Pausing..Committed).contains(&at), "{at:?} {blame:?}");
        }
    }
}

#[test]
fn in_doubt_keeps_the_cause_says_what_to_find_out_and_switches_the_log_off() {
    let mut run = Run::at(Committed);
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Commit)));
    assert_eq!(names(&actions), ["stop tracking", "in-doubt"]);
    let fault = report(&actions).fault.clone().unwrap();
    assert_eq!(fault.cause, "it broke");
    assert!(fault.remedy.contains("find out whether the destination runs the guest"));
}

#[test]
fn every_message_out_of_turn_ends_it_on_the_safe_side_and_is_blamed_on_the_peer() {
    for (at, _) in way() {
        for message in every_message().into_iter().filter(|message| !in_turn(at, message)) {
            let mut run = Run::at(at);
            let actions = run.hear(message.clone());
            let (outcome, _) = outcome(&mut run, actions);
            let expected = match at {
                Committed => OutcomeKind::InDoubt,
                AwaitingGap => OutcomeKind::Moved,
                _ => OutcomeKind::StillHere,
            };
            assert_eq!(outcome, expected, "{at:?} {message:?}");
        }
    }
    let mut run = Run::at(Copying);
    let actions = run.hear(Message::Commit);
    assert_eq!(names(&actions), ["send abort", "stop tracking", "still-here"]);
    let fault = report(&actions).fault.as_ref().unwrap();
    assert_eq!((fault.blame, fault.step), (Blame::Peer, Step::Round(0)));
    assert!(fault.cause.ends_with("out of turn"), "{}", fault.cause);
}

#[test]
fn an_abort_of_the_peer_s_brings_the_guest_back_even_after_commit_and_is_not_answered() {
    for (at, _) in way().into_iter().filter(|(at, _)| *at < AwaitingGap) {
        let mut run = Run::at(at);
        let theirs = Fault::new(Side::Destination, Step::Load, Blame::Local, "no room");
        let actions = run.hear(Message::Abort(theirs));
        let (outcome, all) = outcome(&mut run, actions);
        assert_eq!(outcome, OutcomeKind::StillHere, "{at:?}");
        assert_eq!(all.contains(&"resume".into()), at >= Pausing, "{at:?}");
        assert!(!all.contains(&"send abort".into()), "{at:?}");
    }
}

#[test]
fn lost_after_commit_leaves_it_in_doubt() {
    let mut run = Run::at(Committed);
    let actions = run.hear(Message::Lost(fault(Blame::Local, Step::Resume)));
    assert_eq!(names(&actions), ["stop tracking", "in-doubt"]);
}

#[test]
fn an_abort_after_running_does_not_undo_the_move() {
    let mut run = Run::at(AwaitingGap);
    assert!(run.hear(Message::Abort(fault(Blame::Local, Step::Resume))).is_empty());
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Commit)));
    assert_eq!(names(&actions), ["moved"]);
    assert_eq!(report(&actions).guest_gap, None);
}

#[test]
fn a_refusal_names_every_reason_and_every_remedy_once() {
    for at in [Greeting, Describing] {
        let mut run = Run::at(at);
        let actions = run.hear(Message::Refuse(vec![
            Refusal::new("memory", "16 MiB is too much", "give it more"),
            Refusal::new("cpuid 7.0:ebx.avx2", "missing", "use an older model"),
            Refusal::new("msr 0x10a", "missing", "use an older model"),
            Refusal::new("vcpus", "1 is too many", ""),
        ]));
        assert_eq!(names(&actions), ["still-here"], "a refusal needs no answer");
        let fault = report(&actions).fault.clone().unwrap();
        for word in ["memory: 16 MiB is too much", "cpuid 7.0:ebx.avx2: missing", "msr 0x10a", "vcpus"] {
            assert!(fault.cause.contains(word), "{word} in {}", fault.cause);
        }
        assert_eq!(fault.remedy, "give it more; use an older model");
    }
}

#[test]
fn a_welcome_to_something_that_was_not_offered_ends_it() {
    let wrong = [
        Welcome { channels: 3, ..welcome() },
        Welcome { channels: 0, ..welcome() },
        Welcome { version: 2, ..welcome() },
        Welcome { version: 0, ..welcome() },
        Welcome { capabilities: 0, ..welcome() },
        Welcome { capabilities: 3, ..welcome() },
    ];
    for welcome in wrong {
        let mut run = Run::at(Greeting);
        let actions = run.hear(Message::Welcome(welcome.clone()));
        assert_eq!(names(&actions), ["send abort", "still-here"], "{welcome:?}");
    }
    let mut run = Run::at(Greeting);
    run.hear(Message::Welcome(Welcome { channels: 1, ..welcome() }));
    let actions = run.hear(Message::Accept(DestinationCosts::default()));
    assert_eq!(names(&actions), ["attach 1"], "fewer channels than asked for are fine");
}

#[test]
fn a_round_is_measured_once_it_was_sent_and_has_arrived_whichever_is_noted_first() {
    let mut run = Run::at(Copying);
    assert!(run.hear(Message::RoundAck { round: 0 }).is_empty());
    assert_eq!(names(&run.tell(sent(4096))), ["sync"]);
    let mut run = Run::at(Copying);
    assert!(run.tell(sent(4096)).is_empty());
    assert_eq!(names(&run.hear(Message::RoundAck { round: 0 })), ["sync"]);
}

#[test]
fn a_round_that_is_acknowledged_twice_or_is_another_ends_it() {
    for (first, second) in [(0, 0), (1, 0)] {
        let mut run = Run::at(Copying);
        let mut actions = run.hear(Message::RoundAck { round: first });
        if actions.is_empty() {
            actions = run.hear(Message::RoundAck { round: second });
        }
        assert_eq!(names(&actions), ["send abort", "stop tracking", "still-here"]);
    }
}

#[test]
fn a_ready_that_comes_before_the_last_round_is_noted_as_sent_waits_for_it() {
    let waiting = || {
        let mut run = Run::at(LastRound);
        assert!(run.hear(Message::RoundAck { round: 1 }).is_empty());
        assert!(run.hear(READY).is_empty());
        run
    };
    assert_eq!(names(&waiting().tell(sent(5))), ["commit"]);
    let mut run = waiting();
    let actions = run.tell(Event::Failed(fault(Blame::Local, Step::LastRound)));
    assert_eq!(names(&actions), ["resume", "send abort"], "nothing was committed yet");
    let mut run = waiting();
    let actions = run.hear(READY);
    assert_eq!(names(&actions), ["resume", "send abort"], "once is enough");
}

#[test]
fn ready_before_the_last_pages_arrived_ends_it() {
    let mut run = Run::at(LastRound);
    let actions = run.hear(READY);
    assert_eq!(outcome(&mut run, actions).0, OutcomeKind::StillHere);
}

/// Goes from the order to pause to Moved with these times, and gives the parts in milliseconds.
fn downtime(ack: u32, ready: (u32, u32, u32), sent_late: u32, running: (u32, u32)) -> (Vec<u128>, u128) {
    let mut run = Run::at(Pausing);
    run.tell_after(MS, Event::Paused);
    run.tell_after(2 * MS, Event::Saved);
    run.tell_after(3 * MS, Event::Synced { dirty_pages: 5 });
    run.tell_after(ack * MS, Event::Message(Message::RoundAck { round: 1 }));
    let (at, verify, load) = ready;
    run.tell_after(at * MS, Event::Message(Message::Ready { verify: verify * MS, load: load * MS }));
    run.tell_after(sent_late * MS, sent(5));
    let (at, resume) = running;
    run.tell_after(at * MS, Event::Message(Message::Running { resume: resume * MS }));
    let actions = run.hear(Message::Gap(None));
    let downtime = report(&actions).downtime.unwrap();
    (downtime.parts().iter().map(|(_, part)| part.as_millis()).collect(), downtime.total().as_millis())
}

#[test]
fn the_parts_of_the_downtime_add_up_to_the_time_from_the_order_to_pause_to_the_news_of_running() {
    // pause, save, last_sync, transfer, verify, load, commit, resume
    let (parts, total) = downtime(10, (9, 4, 3), 0, (7, 5));
    assert_eq!((parts, total), (vec![1, 2, 3, 10, 4, 3, 4, 5], 6 + 10 + 9 + 7));
    let (parts, total) = downtime(10, (9, 4, 3), 6, (7, 5));
    assert_eq!((parts, total), (vec![1, 2, 3, 10, 4, 3, 10, 5], 6 + 10 + 9 + 6 + 7));
}

#[test]
fn an_acknowledgement_that_is_late_on_its_way_does_not_shorten_what_the_destination_did_meanwhile() {
    let (parts, total) = downtime(10, (1, 4, 3), 0, (7, 5));
    assert_eq!((parts, total), (vec![1, 2, 3, 4, 4, 3, 2, 5], 6 + 11 + 7));
}

#[test]
fn a_destination_cannot_claim_more_time_than_passed() {
    let (parts, total) = downtime(10, (9, 9000, 9000), 0, (7, 9000));
    assert_eq!((parts, total), (vec![1, 2, 3, 0, 19, 0, 0, 7], 6 + 10 + 9 + 7));
    let (parts, total) = downtime(10, (9, 4, u32::MAX), 0, (7, u32::MAX));
    assert_eq!((parts, total), (vec![1, 2, 3, 0, 4, 15, 0, 7], 6 + 10 + 9 + 7));
}

#[test]
fn a_policy_that_aborts_leaves_the_guest_running_without_a_pause_and_says_why() {
    let policy = Policy { max_rounds: 1, on_stall: OnStall::Abort, downtime_limit: MS, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, ..config() });
    let actions = run.tell(Event::Synced { dirty_pages: 4000 });
    assert_eq!(names(&actions), ["send abort", "stop tracking", "still-here"]);
    let Some(Action::Tell(Progress::Round(round))) = actions.first() else { panic!("{actions:?}") };
    assert_eq!(round.decision, Decision::Abort(StopReason::RoundLimit));
    let report = report(&actions);
    assert_eq!(report.stop_reason, Some(StopReason::RoundLimit));
    assert!(report.fault.as_ref().unwrap().cause.contains("did not converge (round-limit)"));
    assert_eq!(report.downtime, None);
}

#[test]
fn rounds_go_on_until_the_policy_is_content() {
    let policy = Policy { downtime_limit: Duration::ZERO, ..Policy::default() };
    let mut run = Run::up_to(Measuring, SourceConfig { policy, ..config() });
    assert_eq!(names(&run.tell(Event::Synced { dirty_pages: 3000 })), ["round 1"]);
    run.tell(sent(3000));
    run.hear(Message::RoundAck { round: 1 });
    assert_eq!(names(&run.tell(Event::Synced { dirty_pages: 3 })), ["pause"]);
}

#[test]
fn while_the_guest_is_resumed_only_the_resume_itself_matters() {
    let mut run = Run::resuming();
    for message in every_message() {
        assert!(run.hear(message).is_empty());
    }
    assert!(run.hear(Message::Abort(fault(Blame::Local, Step::Load))).is_empty());
    assert!(run.tell(Event::Failed(fault(Blame::Network, Step::Resume))).is_empty());
    assert!(run.tell(Event::Failed(fault(Blame::Local, Step::LastRound))).is_empty());
    assert!(run.tell(Event::Paused).is_empty() && run.tell(Event::Cancelled { reason: None }).is_empty());
    let actions = run.tell(Event::Resumed);
    assert_eq!(names(&actions), ["stop tracking", "still-here"]);
    assert_eq!(report(&actions).fault.as_ref().unwrap().cause, "cancelled");
}

#[test]
fn a_resume_that_fails_is_what_the_report_is_about() {
    let mut run = Run::resuming();
    let actions = run.tell(Event::Failed(fault(Blame::Local, Step::Resume)));
    assert_eq!(names(&actions), ["stop tracking", "still-here"]);
    assert_eq!(report(&actions).fault.as_ref().unwrap().cause, "it broke");
}

fn mismatch() -> Message {
    Message::Mismatch { chunks: 1, samples: vec![ChunkDigests { chunk: 0, pages: vec![1; 512] }] }
}

#[test]
fn a_mismatch_names_the_pages_though_the_destination_hangs_up_meanwhile() {
    for at in [LastRound, Arrived] {
        let mut run = Run::at(at);
        assert_eq!(names(&run.hear(mismatch())), ["locate"]);
        assert!(run.tell(Event::Failed(fault(Blame::Network, Step::Verify))).is_empty());
        let located = run.tell(Event::Located { guest_addresses: vec![0x3000, 0x5000] });
        assert_eq!(names(&located), ["resume"]);
        let actions = run.tell(Event::Resumed);
        let report = report(&actions);
        assert_eq!(report.outcome, OutcomeKind::StillHere);
        assert_eq!(report.verification, Verification::Mismatch { guest_addresses: vec![0x3000, 0x5000] });
        assert!(report.fault.as_ref().unwrap().cause.contains("0x3000, 0x5000"));
    }
}

#[test]
fn a_mismatch_stays_one_though_it_is_cancelled_and_its_pages_cannot_be_located() {
    let mut run = Run::at(Arrived);
    run.hear(mismatch());
    assert!(run.tell(Event::Cancelled { reason: None }).is_empty());
    let actions = run.tell(Event::Failed(fault(Blame::Local, Step::Verify)));
    assert_eq!(names(&actions), ["resume"]);
    let actions = run.tell(Event::Resumed);
    assert_eq!(report(&actions).verification, Verification::Mismatch { guest_addresses: Vec::new() });
}

#[test]
fn a_mismatch_where_no_digests_were_sent_is_out_of_turn() {
    let mut run = Run::new(SourceConfig { verify: false, ..config() });
    for (at, events) in way() {
        if at == Arrived {
            break;
        }
        for event in events {
            if at == Greeting {
                run.hear(Message::Welcome(Welcome { capabilities: 0, ..welcome() }));
            } else {
                run.tell(event);
            }
        }
    }
    assert_eq!(names(&run.hear(mismatch())), ["resume", "send abort"]);
}

#[test]
fn nothing_follows_the_end() {
    let mut run = Run::at(AwaitingGap);
    run.hear(Message::Gap(None));
    let now = run.machine.clone();
    for message in every_message() {
        assert!(run.hear(message).is_empty());
    }
    for event in
        [Event::Connected, Event::Resumed, Event::Cancelled { reason: None }, Event::Tracking, Event::Saved]
    {
        assert!(run.tell(event).is_empty());
    }
    assert_eq!(run.machine, now);
}

#[test]
fn a_failure_to_connect_is_reported_without_a_word_to_anybody() {
    let mut run = Run::new(config());
    let actions = run.tell(Event::Failed(fault(Blame::Network, Step::Connect)));
    assert_eq!(names(&actions), ["still-here"]);
    assert_eq!(report(&actions).total, Duration::ZERO);
}
