//! The source's machine, event by event.

mod asking;
mod ends;
mod holding;
mod slowing;
mod way;

use std::time::Duration;

use mig_core::policy::{Decision, OnStall, Policy, StopReason};
use mig_core::progress::{OutcomeKind, PageCounts, Progress, Verification};
use mig_core::source::{Action, Event, Source, SourceConfig};
use mig_core::{Blame, Step};
use mig_wire::Message;
use mig_wire::describe::Refusal;
use mig_wire::frame::{ChunkDigests, DestinationCosts};
use mig_wire::hello::{Capabilities, Welcome};

use way::*;

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
fn a_source_that_leaves_channels_to_both_sides_says_so_and_takes_fewer() {
    for (suited_channels, optional) in [(false, 8), (true, 8 + 4)] {
        let (_, actions) = Source::new(SourceConfig { suited_channels, ..config() })
            .handle(Duration::ZERO, Event::Connected);
        let [Action::Send(Message::Hello(hello))] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(hello.optional, optional);
    }
    let source = Source::new(SourceConfig { suited_channels: true, ..config() });
    let (source, _) = source.handle(Duration::ZERO, Event::Connected);
    for capabilities in [1, 1 + 4, 1 + 4 + 8] {
        let fewer = Message::Welcome(Welcome { channels: 1, capabilities, ..welcome() });
        let (_, actions) = source.clone().handle(Duration::ZERO, Event::Message(fewer));
        assert_eq!(names(&actions), ["send describe"], "capabilities {capabilities}");
    }
}

#[test]
fn pages_are_encoded_only_in_ways_that_both_sides_know_and_this_one_wants() {
    let (zstd, both) = (Capabilities::ZSTD, Capabilities::PAGE_ENCODINGS);
    for (wanted, known, used) in [
        (both, both, both),
        (both, zstd, zstd),
        (both, Capabilities::empty(), Capabilities::empty()),
        (zstd, zstd, zstd),
    ] {
        let source = Source::new(SourceConfig { page_encodings: wanted | Capabilities::VERIFY, ..config() });
        let (source, actions) = source.handle(Duration::ZERO, Event::Connected);
        let [Action::Send(Message::Hello(hello))] = &actions[..] else { panic!("{actions:?}") };
        assert_eq!(hello.optional, (Capabilities::STARTED | wanted).bits());
        let granted = Message::Welcome(Welcome { capabilities: 1 | known.bits(), ..welcome() });
        let (source, actions) = source.handle(Duration::ZERO, Event::Message(granted));
        assert_eq!(names(&actions), ["send describe"]);
        assert_eq!(source.page_encodings(), used);
    }
    let source = Source::new(SourceConfig { page_encodings: zstd, ..config() });
    let (source, _) = source.handle(Duration::ZERO, Event::Connected);
    let too_much = Message::Welcome(Welcome { capabilities: 1 | both.bits(), ..welcome() });
    let (source, _) = source.handle(Duration::ZERO, Event::Message(too_much));
    assert!(source.has_ended(), "it did not offer a delta");
}

#[test]
fn a_round_of_encoded_pages_teaches_what_pages_take_not_what_their_bytes_do() {
    let predicted = |pages: PageCounts, bytes| {
        let policy = Policy { downtime_limit: Duration::ZERO, ..Policy::default() };
        let mut run = Run::up_to(Measuring, SourceConfig { policy, ..config() });
        run.tell(Event::Synced { dirty_pages: 3000, hot_pages: 0 });
        run.tell(Event::RoundSent { pages, bytes });
        run.hear(Message::RoundAck { round: 1 });
        let actions = run.tell(Event::Synced { dirty_pages: 1000, hot_pages: 0 });
        let Some(Action::Tell(Progress::Round(round))) = actions.first() else { panic!("{actions:?}") };
        (round.predicted_downtime, round.sent_bytes)
    };
    let raw = predicted(PageCounts { raw: 3000, ..PageCounts::default() }, 3000 * 4096);
    let delta = predicted(PageCounts { delta: 3000, ..PageCounts::default() }, 3000 * 40);
    assert_eq!((raw.0, delta.1), (delta.0, 3000 * 40), "the same time, for as many pages");
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
    run.tell_after(3 * MS, Event::Synced { dirty_pages: 5, hot_pages: 0 });
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
fn the_way_of_the_news_of_running_is_no_part_of_the_downtime() {
    // Ready after 10, the pages noted as sent 2 later, and so Commit; the news comes another 50 later
    let told = |since_ready: u32| {
        let mut run = Run::at(LastRound);
        run.tell_after(4 * MS, Event::Message(Message::RoundAck { round: 1 }));
        run.tell_after(6 * MS, Event::Message(Message::Ready { verify: MS, load: 2 * MS }));
        run.tell_after(2 * MS, sent(5));
        run.tell_after(50 * MS, Event::Message(Message::Running { resume: 3 * MS }));
        run.hear(Message::Started { since_ready: since_ready * MS });
        report(&run.hear(Message::Gap(None))).downtime.unwrap().commit.as_millis()
    };
    // 3 of the 6 ms before Ready were no work of the destination's; then 2 here, and half of what is left of the
    // 13 without them and the 3 of resuming
    assert_eq!(told(13), 3 + 2 + 4);
    assert_eq!(told(0), 3 + 2, "the destination cannot make it less than what passed here");
    assert_eq!(told(1_000_000), 3 + 2 + 50 - 3, "nor more");
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
    let actions = run.tell(Event::Synced { dirty_pages: 4000, hot_pages: 0 });
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
    assert_eq!(names(&run.tell(Event::Synced { dirty_pages: 3000, hot_pages: 0 })), ["round 1"]);
    run.tell(sent(3000));
    run.hear(Message::RoundAck { round: 1 });
    assert_eq!(names(&run.tell(Event::Synced { dirty_pages: 3, hot_pages: 0 })), ["pause"]);
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
