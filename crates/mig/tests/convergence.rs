//! A guest under a bandwidth cap, and one that is slowed, over real sockets.

mod model;

use std::sync::Mutex;
use std::time::{Duration, Instant};

use mig::observe::{Progress, Report};
use mig::pacing::{Bandwidth, InPause};
use mig::policy::{Decision, OnStall, Policy, StopReason};
use mig::{
    Address, Compress, Control, Listener, Observer, Outcome, ReceiveOptions, Received, SourceOptions,
    migrate, receive,
};
use model::{Flaw, Host, Model};

const CALM: Duration = Duration::from_millis(5);
const MBIT: u64 = 125_000;

/// Keeps what it was told, and does something at each step.
struct Watcher<F: Fn(&Progress) + Sync> {
    told: Mutex<Vec<Progress>>,
    then: F,
}

impl<F: Fn(&Progress) + Sync> Observer for Watcher<F> {
    fn progress(&self, progress: &Progress) {
        (self.then)(progress);
        self.told.lock().unwrap().push(progress.clone());
    }
}

fn watcher<F: Fn(&Progress) + Sync>(then: F) -> Watcher<F> {
    Watcher { told: Mutex::default(), then }
}

/// Moves `vm` over loopback, or not.
fn move_it(vm: Model, options: &SourceOptions, control: &Control, observer: &dyn Observer) -> Outcome<Model> {
    let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
    let hang_up = Control::new();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let received =
                receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &hang_up, &());
            if let Received::Running { vm, .. } = received {
                assert!(vm.makes_progress(), "the guest goes on at the destination");
            }
        });
        let outcome = migrate(vm, listener.address(), options, control, observer);
        receiving.join().unwrap();
        outcome
    })
}

fn moved(vm: Model, options: &SourceOptions, control: &Control) -> Report {
    match move_it(vm, options, control, &()) {
        Outcome::Moved(report) => report,
        Outcome::StillHere { report, .. } | Outcome::Discarded(report) => panic!("{report:?}"),
    }
}

/// Of pages as they are, so that their bytes are known.
fn capped(cap: u64, in_pause: InPause, channels: u16) -> SourceOptions {
    let bandwidth = Bandwidth { cap_bytes_per_second: Some(cap), in_pause };
    let (channels, compress) = (Some(channels), Compress::Off);
    SourceOptions { bandwidth, channels, compress, verify: true, ..SourceOptions::default() }
}

#[test]
fn a_cap_holds_over_all_channels_together() {
    for channels in [1, 3] {
        let vm = Model::running(2000, CALM, Flaw::None);
        let watcher = watcher(|_| {});
        let options = capped(80 * MBIT, InPause::Lifted, channels);
        let outcome = move_it(vm, &options, &Control::new(), &watcher);
        assert!(matches!(outcome, Outcome::Moved(_)));
        let told = watcher.told.into_inner().unwrap();
        let Some(Progress::Round(round)) = told.iter().find(|p| matches!(p, Progress::Round(_))) else {
            panic!("{told:?}")
        };
        let least = Duration::from_secs_f64(round.sent_bytes as f64 / (80 * MBIT) as f64);
        // but for the first grants, which come at once
        assert!(round.elapsed > least - Duration::from_millis(30), "{:?} for {least:?}", round.elapsed);
    }
}

#[test]
fn a_cap_can_be_lifted_while_the_guest_moves() {
    let vm = Model::running(2000, CALM, Flaw::None);
    let control = Control::new();
    let watcher = watcher(|progress| {
        if matches!(progress, Progress::Accepted) {
            control.change_bandwidth(None);
        }
    });
    let began = Instant::now();
    // at this rate it would take 65 s
    let outcome = move_it(vm, &capped(MBIT, InPause::Lifted, 2), &control, &watcher);
    assert!(matches!(outcome, Outcome::Moved(_)));
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn the_pause_has_the_whole_link_unless_it_is_told_otherwise() {
    let transfer = |in_pause| {
        let vm = Model::running(500, CALM, Flaw::ReportsEveryPage);
        let options = SourceOptions {
            policy: Policy { max_rounds: 1, ..Policy::default() },
            ..capped(40 * MBIT, in_pause, 2)
        };
        let report = moved(vm, &options, &Control::new());
        (report.downtime.unwrap().transfer, report.predicted_downtime.unwrap().transfer)
    };
    let least = Duration::from_secs_f64(490.0 * 4096.0 / (40 * MBIT) as f64);
    let (kept, predicted) = transfer(InPause::Capped);
    assert!(kept > least && predicted > least, "{kept:?}, {predicted:?}");
    let (lifted, _) = transfer(InPause::Lifted);
    assert!(lifted < kept / 3, "{lifted:?} of {kept:?}");
    let (known, predicted) = transfer(InPause::Known(4000 * MBIT));
    assert!(known < kept / 3 && predicted < least / 3, "{known:?}, {predicted:?}");
}

/// No pause fits, and every page is dirtied in every round.
fn hopeless(on_stall: OnStall) -> SourceOptions {
    let policy = Policy {
        downtime_limit: Duration::from_micros(1),
        few_pages: 0,
        traffic_factor: 100,
        least_kept_percent: 20,
        on_stall,
        ..Policy::default()
    };
    SourceOptions { policy, compress: Compress::Off, verify: true, ..SourceOptions::default() }
}

#[test]
fn a_guest_that_dirties_all_that_is_sent_is_slowed_step_by_step_and_then_moved_all_the_same() {
    let vm = Model::running(2000, CALM, Flaw::ReportsEveryPage);
    let watcher = watcher(|_| {});
    let Outcome::Moved(report) = move_it(vm, &hopeless(OnStall::StopAndCopy), &Control::new(), &watcher)
    else {
        panic!("it stays")
    };
    assert_eq!(report.stop_reason, Some(StopReason::NoProgress));
    assert!(report.slowed.unwrap().held < report.slowed.unwrap().lasted);
    assert!(report.shortfall.unwrap().could_slow_more);
    let told = watcher.told.into_inner().unwrap();
    let steps: Vec<u8> = told
        .iter()
        .filter_map(|p| match p {
            Progress::Round(round) => match round.decision {
                Decision::Throttle(throttle) => Some(throttle.percent()),
                _ => None,
            },
            _ => None,
        })
        .collect();
    assert!(steps.is_sorted() && steps[0] >= 40, "{steps:?}");
    assert_eq!(Some(&report.slowed.unwrap().most.percent()), steps.last());
}

#[test]
fn a_guest_that_was_slowed_in_vain_stays_with_all_its_speed() {
    let vm = Model::running(2000, CALM, Flaw::ReportsEveryPage);
    let outcome = move_it(vm, &hopeless(OnStall::Abort), &Control::new(), &());
    let Outcome::StillHere { vm, report } = outcome else { panic!("it moved") };
    assert!(report.fault.unwrap().to_string().contains("did not converge"));
    // how many steps depends on how long rounds took on this host
    let throttles = vm.throttles();
    let (last, steps) = throttles.split_last().unwrap();
    assert!(*last == 0 && !steps.is_empty() && steps.is_sorted() && steps[0] >= 40, "{throttles:?}");
}

#[test]
fn a_cancel_gives_a_slowed_guest_its_speed_back() {
    let vm = Model::running(2000, CALM, Flaw::ReportsEveryPage);
    let control = Control::new();
    let watcher = watcher(|progress| {
        if matches!(progress, Progress::Round(round) if matches!(round.decision, Decision::Throttle(_))) {
            control.cancel();
        }
    });
    let Outcome::StillHere { vm, .. } = move_it(vm, &hopeless(OnStall::StopAndCopy), &control, &watcher)
    else {
        panic!("it moved")
    };
    assert_eq!(vm.throttles().last(), Some(&0));
    assert!(vm.throttles()[0] > 0);
}

#[test]
fn pages_that_are_dirty_in_every_round_are_held_back_and_sent_in_the_pause() {
    let vm = Model::running(500, CALM, Flaw::ReportsEveryPageTwice);
    let watcher = watcher(|_| {});
    // all of its pages take 400 ms
    let policy = Policy { downtime_limit: Duration::from_millis(360), ..Policy::default() };
    let policy = Policy { least_kept_percent: 100, traffic_factor: 100, ..policy };
    let options = SourceOptions { policy, ..capped(40 * MBIT, InPause::Capped, 2) };
    let Outcome::Moved(report) = move_it(vm, &options, &Control::new(), &watcher) else { panic!("it stays") };
    let told = watcher.told.into_inner().unwrap();
    let rounds: Vec<_> =
        told.iter().filter_map(|p| if let Progress::Round(r) = p { Some(r) } else { None }).collect();
    assert!(matches!(rounds[1].decision, Decision::HoldBack { .. }), "{rounds:?}");
    let held = rounds[2].held_pages;
    assert!(held >= 125 && rounds[2].pages.total() == 500 - held, "{rounds:?}");
    assert_eq!(report.stop_reason, Some(StopReason::WithinBudget));
    let before: u64 = rounds.iter().map(|round| round.pages.total()).sum();
    assert!(report.pages.total() - before >= held, "{report:?}");
}

#[test]
fn a_guest_that_cannot_be_slowed_after_all_moves_without() {
    let vm = Model::running(2000, CALM, Flaw::FailsToThrottle);
    let report = moved(vm, &hopeless(OnStall::StopAndCopy), &Control::new());
    assert_eq!(report.stop_reason, Some(StopReason::NoProgress));
}

#[test]
fn an_embedder_that_panics_and_goes_on_has_a_guest_at_its_full_speed() {
    let vm = Model::running(2000, CALM, Flaw::ReportsEveryPage);
    let watch = vm.watch();
    let observer = watcher(|progress| {
        let slowed = |round: &mig::observe::RoundReport| !round.throttle.is_none();
        assert!(!matches!(progress, Progress::Round(round) if slowed(round)), "the observer is broken");
    });
    let attempt = std::panic::AssertUnwindSafe(|| {
        let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
        let hang_up = Control::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &hang_up, &())
            });
            // the receiver ends with the connection
            migrate(vm, listener.address(), &hopeless(OnStall::StopAndCopy), &Control::new(), &observer)
        })
    });
    assert!(std::panic::catch_unwind(attempt).is_err());
    let throttles = watch();
    assert!(throttles.len() > 1 && throttles.ends_with(&[0]), "{throttles:?}");
}

#[test]
fn a_guest_is_watched_without_being_moved_and_its_log_is_off_afterwards() {
    let mut vm = Model::running(2000, Duration::from_millis(1), Flaw::None);
    let seen = mig::dirtying::watch(&mut vm, Duration::from_millis(300)).unwrap();
    assert!(!vm.is_tracked());
    // all but the last page of each region was written before, and those it may write now
    assert!((1998..=2000).contains(&seen.filled_pages) && seen.pages == 2000, "{seen:?}");
    let counts: Vec<u64> = seen.samples.iter().map(|(_, pages)| *pages).collect();
    assert!(counts.len() >= 5 && counts.is_sorted(), "{counts:?}");
    // a write a millisecond at most
    assert!(counts[0] < 100 && (1..=1000).contains(counts.last().unwrap()), "{counts:?}");
    assert!(seen.can_throttle && vm.makes_progress());
    let prospect = mig::forecast::Prospect {
        bytes_per_second: 1000 * MBIT,
        pause_bytes_per_second: 1000 * MBIT,
        filled_pages: seen.filled_pages,
        ram_bytes: seen.pages * 4096,
        fixed_pause: seen.pause,
        needed_percent: 100,
        can_throttle: true,
    };
    let forecast = mig::forecast::foresee(&Policy::default(), &seen.curve(), &prospect);
    assert!(forecast.moves && forecast.fits, "{forecast:?}");
    moved(vm, &capped(1000 * MBIT, InPause::Capped, 2), &Control::new());
}
