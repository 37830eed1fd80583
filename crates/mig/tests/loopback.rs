//! A guest moves over real sockets, both sides in this process: the drivers with everything that can go wrong
//! around them.

mod model;

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use mig::observe::{OutcomeKind, Progress, Verification};
use mig::policy::{OnStall, Policy, StopReason};
use mig::{
    Address, Blame, Compress, Control, Listener, Observer, Outcome, ReceiveOptions, Received, Side,
    SourceOptions, Step, Word, migrate, receive,
};
use model::{Flaw, Host, Model};

const BUSY: Duration = Duration::from_micros(100);

type Moment = fn(&Progress) -> bool;

/// Keeps what it was told, and cancels at a chosen moment.
#[derive(Default)]
struct Notebook {
    progress: Mutex<Vec<Progress>>,
    cancel_when: Option<(Control, Moment)>,
}

impl Observer for Notebook {
    fn progress(&self, progress: &Progress) {
        if let Some((cancel, moment)) = &self.cancel_when
            && moment(progress)
        {
            cancel.cancel();
        }
        self.progress.lock().unwrap().push(progress.clone());
    }
}

fn listener() -> Listener {
    Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap()
}

/// Of pages as they are, which are counted.
fn verified() -> SourceOptions {
    SourceOptions { compress: Compress::Off, verify: true, ..SourceOptions::default() }
}

/// Moves `vm` to `host` over loopback.
fn move_between(
    vm: Model,
    mut host: Host,
    options: &SourceOptions,
    cancel: &Control,
    observer: &dyn Observer,
) -> (Outcome<Model>, Received<Model>) {
    let (listener, hang_up) = (listener(), Control::new());
    std::thread::scope(|scope| {
        let receiving =
            scope.spawn(|| receive(&listener, &mut host, &ReceiveOptions::default(), &hang_up, &()));
        let outcome = migrate(vm, listener.address(), options, cancel, observer);
        // a receiver that the source never reached would listen on
        let patience = Instant::now() + Duration::from_secs(10);
        while !receiving.is_finished() && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(1));
        }
        hang_up.cancel();
        (outcome, receiving.join().unwrap())
    })
}

fn assert_still_here(outcome: Outcome<Model>, step: Step, words: &str) -> Model {
    let Outcome::StillHere { vm, report } = outcome else { panic!("not still here: {}", name(&outcome)) };
    let fault = report.fault.unwrap();
    assert_eq!(report.outcome, OutcomeKind::StillHere);
    assert_eq!(fault.step, step, "{fault}");
    assert!(fault.to_string().contains(words), "{fault}");
    assert!(!vm.is_tracked(), "the dirty log is off");
    assert!(vm.makes_progress(), "the guest goes on");
    vm
}

fn name(outcome: &Outcome<Model>) -> String {
    match outcome {
        Outcome::Moved(report) | Outcome::StillHere { report, .. } => format!("{report:?}"),
        Outcome::Discarded(report) => format!("{report:?}"),
    }
}

#[test]
fn a_writing_guest_moves_and_every_digest_agrees() {
    for channels in [1, 2, 5] {
        let vm = Model::running(6000, BUSY, Flaw::None);
        let notebook = Notebook::default();
        let options = SourceOptions { channels: Some(channels), ..verified() };
        let (outcome, received) = move_between(vm, Host::default(), &options, &Control::new(), &notebook);
        let Outcome::Moved(report) = outcome else { panic!("{}", name(&outcome)) };
        let Received::Running { vm, report: receipt } = received else { panic!("not running") };
        assert!(vm.makes_progress(), "the guest goes on at the destination");
        assert_eq!(report.verification, Verification::Ok { chunks: 9 + 3 });
        assert_eq!(
            (report.pages, report.sent_bytes, report.rounds),
            (receipt.pages, receipt.received_bytes, receipt.rounds)
        );
        assert_eq!(report.guest_gap, Some(Duration::from_micros(1234)));
        assert_eq!(report.ram_bytes, 6000 * 4096);
        assert!(report.pages.raw >= 5998 && report.pages.zero >= 1, "{:?}", report.pages);
        let downtime = report.downtime.unwrap();
        assert_eq!(downtime.total(), downtime.parts().iter().map(|(_, d)| *d).sum());
        assert!(downtime.total() < report.total);
        let told = notebook.progress.into_inner().unwrap();
        assert!(matches!(told.first(), Some(Progress::Connected { version: 1, .. })));
        assert!(matches!(told.last(), Some(Progress::Running)));
        let rounds = told.iter().filter(|p| matches!(p, Progress::Round(_))).count();
        assert_eq!(rounds as u32 + 1, report.rounds);
    }
}

#[test]
fn a_page_that_the_dirty_log_lost_is_named_and_the_guest_stays() {
    let vm = Model::running(2000, Duration::ZERO, Flaw::ForgetsPage(1));
    let (outcome, received) = move_between(vm, Host::default(), &verified(), &Control::new(), &());
    let Outcome::StillHere { report, .. } = &outcome else { panic!("{}", name(&outcome)) };
    assert_eq!(report.verification, Verification::Mismatch { guest_addresses: vec![4096] });
    assert_still_here(outcome, Step::Verify, "0x1000");
    assert!(matches!(received, Received::NotReceived(fault) if fault.step == Step::Verify));
}

#[test]
fn a_guest_moves_at_the_second_attempt_after_the_first_was_cancelled_in_a_round() {
    let vm = Model::running(20_000, BUSY, Flaw::None);
    let cancel = Control::new();
    let notebook = Notebook {
        cancel_when: Some((cancel.clone(), |p| matches!(p, Progress::Round(_)))),
        ..Notebook::default()
    };
    let (outcome, received) = move_between(vm, Host::default(), &verified(), &cancel, &notebook);
    let Outcome::StillHere { vm, report } = outcome else { panic!("{}", name(&outcome)) };
    assert_eq!(report.fault.unwrap().cause, "cancelled");
    assert!(!vm.is_tracked() && vm.makes_progress());
    assert!(matches!(received, Received::NotReceived(fault) if fault.cause == "cancelled"));
    let (outcome, _received) = move_between(vm, Host::default(), &verified(), &Control::new(), &());
    assert!(matches!(outcome, Outcome::Moved(_)), "{}", name(&outcome));
}

#[test]
fn a_cancel_in_the_pause_lets_the_guest_run_on() {
    let vm = Model::running(2000, BUSY, Flaw::None);
    let cancel = Control::new();
    let notebook = Notebook {
        cancel_when: Some((cancel.clone(), |p| matches!(p, Progress::Paused))),
        ..Notebook::default()
    };
    let slow = Host { flaw: Flaw::SlowRestore(Duration::from_millis(300)), ..Host::default() };
    let (outcome, received) = move_between(vm, slow, &SourceOptions::default(), &cancel, &notebook);
    let Outcome::StillHere { vm, report } = outcome else { panic!("{}", name(&outcome)) };
    assert_eq!(report.fault.unwrap().cause, "cancelled");
    assert!(vm.makes_progress());
    assert!(matches!(received, Received::NotReceived(_)));
}

#[test]
fn a_refused_guest_stays_and_every_reason_is_given() {
    let vm = Model::running(2000, BUSY, Flaw::None);
    let host = Host { max_bytes: Some(1 << 20), ..Host::default() };
    let (outcome, _) = move_between(vm, host, &SourceOptions::default(), &Control::new(), &());
    let words = "memory: 8192000 bytes needed, 1048576 free; colour: blue is not green; free some memory";
    assert_still_here(outcome, Step::Prepare, words);
}

#[test]
fn a_failure_of_either_side_before_commit_leaves_the_guest_here() {
    for (flaw, step) in [(Flaw::FailsToPause, Step::Pause), (Flaw::FailsToSave, Step::Save)] {
        let vm = Model::running(2000, BUSY, flaw);
        let (outcome, _) = move_between(vm, Host::default(), &SourceOptions::default(), &Control::new(), &());
        assert_still_here(outcome, step, "source");
    }
    let vm = Model::running(2000, BUSY, Flaw::None);
    let host = Host { flaw: Flaw::FailsToRestore, ..Host::default() };
    let (outcome, _) = move_between(vm, host, &SourceOptions::default(), &Control::new(), &());
    assert_still_here(outcome, Step::Load, "destination, load: a register cannot be written");
}

#[test]
fn a_destination_that_cannot_start_the_committed_guest_leaves_it_in_doubt_until_somebody_decides() {
    for word in [Word::Resume, Word::Discard] {
        let vm = Model::running(2000, BUSY, Flaw::None);
        let host = Host { flaw: Flaw::FailsToResume, ..Host::default() };
        let control = Control::new();
        let decides = Deciding { control: control.clone(), word };
        let (outcome, received) = move_between(vm, host, &SourceOptions::default(), &control, &decides);
        assert!(matches!(received, Received::Lost(_)));
        match (word, outcome) {
            (Word::Resume, Outcome::StillHere { vm, report }) => {
                assert!(vm.makes_progress() && !vm.is_tracked());
                assert!(report.fault.unwrap().remedy.contains("operator"));
            }
            (Word::Discard, Outcome::Discarded(report)) => {
                assert_eq!(report.outcome, OutcomeKind::Discarded);
            }
            (_, outcome) => panic!("{word:?}: {}", name(&outcome)),
        }
    }
}

/// An operator who decides as soon as there is doubt.
struct Deciding {
    control: Control,
    word: Word,
}

impl Observer for Deciding {
    fn progress(&self, progress: &Progress) {
        if matches!(progress, Progress::InDoubt { .. }) {
            self.control.resolve(self.word);
        }
    }
}

#[test]
fn a_guest_that_dirties_all_that_is_sent_stays_if_stalls_abort() {
    let vm = Model::running(3000, BUSY, Flaw::ReportsEveryPage);
    let policy = Policy {
        downtime_limit: Duration::ZERO,
        max_rounds: 4,
        few_pages: 0,
        traffic_factor: 100,
        on_stall: OnStall::Abort,
        ..Policy::default()
    };
    let options = SourceOptions { policy, ..SourceOptions::default() };
    let (outcome, _) = move_between(vm, Host::default(), &options, &Control::new(), &());
    let Outcome::StillHere { vm, report } = outcome else { panic!("{}", name(&outcome)) };
    assert!(matches!(report.stop_reason, Some(StopReason::RoundLimit | StopReason::NoProgress)));
    assert!(report.fault.unwrap().to_string().contains("did not converge"));
    assert!(vm.makes_progress());
}

#[test]
fn a_name_that_does_not_resolve_and_a_port_where_nobody_listens_are_told_apart() {
    let unresolved = Address::tcp("no-such-host.invalid", 1);
    let vm = Model::running(2000, BUSY, Flaw::None);
    let outcome = migrate(vm, &unresolved, &SourceOptions::default(), &Control::new(), &());
    let vm = assert_still_here(outcome, Step::Connect, "cannot resolve tcp:no-such-host.invalid:1");
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let outcome =
        migrate(vm, &Address::tcp("127.0.0.1", closed), &SourceOptions::default(), &Control::new(), &());
    let Outcome::StillHere { report, .. } = &outcome else { panic!("{}", name(&outcome)) };
    assert_eq!(report.fault.as_ref().unwrap().blame, Blame::Network);
    assert_still_here(outcome, Step::Connect, "start mig-recv there");
}

#[test]
fn a_peer_that_speaks_http_is_recognised() {
    let web = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = Address::tcp("127.0.0.1", web.local_addr().unwrap().port());
    let server = std::thread::spawn(move || {
        let (mut socket, _) = web.accept().unwrap();
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").unwrap();
        socket
    });
    let vm = Model::running(2000, BUSY, Flaw::None);
    let outcome = migrate(vm, &address, &SourceOptions::default(), &Control::new(), &());
    drop(server.join().unwrap());
    assert_still_here(outcome, Step::Handshake, "not this protocol: the peer sent HTTP/1.1 400 Bad Request");
}

#[test]
fn a_receiver_turns_strangers_away_and_then_takes_a_guest() {
    let listener = listener();
    let port: u16 = listener.address().to_string().rsplit(':').next().unwrap().parse().unwrap();
    let notebook = Notebook::default();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &Control::new(), &notebook)
        });
        let mut curl = TcpStream::connect(("127.0.0.1", port)).unwrap();
        curl.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n").unwrap();
        let _silent = TcpStream::connect(("127.0.0.1", port)).unwrap();
        drop(TcpStream::connect(("127.0.0.1", port)).unwrap());
        let quotes_it = |p: &Progress| matches!(p, Progress::TurnedAway { cause, .. } if cause.contains("GET / HTTP/1.1"));
        let patience = Instant::now() + Duration::from_secs(60);
        while !notebook.progress.lock().unwrap().iter().any(quotes_it) {
            assert!(Instant::now() < patience, "{:?}", notebook.progress);
            std::thread::sleep(Duration::from_millis(1));
        }
        let vm = Model::running(2000, BUSY, Flaw::None);
        let outcome = migrate(vm, listener.address(), &verified(), &Control::new(), &());
        assert!(matches!(outcome, Outcome::Moved(_)), "{}", name(&outcome));
        assert!(matches!(receiving.join().unwrap(), Received::Running { .. }));
    });
}

#[test]
fn a_second_source_is_told_that_the_receiver_is_busy() {
    let listener = listener();
    let slow = &mut Host { flaw: Flaw::SlowRestore(Duration::from_millis(1500)), ..Host::default() };
    let paused = Control::new();
    std::thread::scope(|scope| {
        scope.spawn(|| receive(&listener, slow, &ReceiveOptions::default(), &Control::new(), &()));
        let first = scope.spawn(|| {
            let vm = Model::running(2000, BUSY, Flaw::None);
            // tells the second one when to come
            let notebook = Notebook {
                cancel_when: Some((paused.clone(), |p| matches!(p, Progress::Paused))),
                ..Notebook::default()
            };
            migrate(vm, listener.address(), &SourceOptions::default(), &Control::new(), &notebook)
        });
        while !paused.is_cancelled() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let vm = Model::running(2000, BUSY, Flaw::None);
        let second = migrate(vm, listener.address(), &SourceOptions::default(), &Control::new(), &());
        assert_still_here(second, Step::Handshake, "busy: another guest is being received");
        assert!(matches!(first.join().unwrap(), Outcome::Moved(_)));
    });
}

#[test]
fn a_receiver_that_is_cancelled_while_it_waits_returns() {
    let (listener, cancel) = (listener(), Control::new());
    cancel.cancel();
    let received = receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &cancel, &());
    assert!(matches!(received, Received::NotReceived(fault) if fault.side == Side::Destination));
}

#[test]
fn an_observer_that_panics_ends_the_migration_and_does_not_hang_it() {
    struct Panics;
    impl Observer for Panics {
        fn progress(&self, progress: &Progress) {
            assert!(!matches!(progress, Progress::Paused), "on purpose");
        }
    }
    let (listener, hang_up) = (listener(), Control::new());
    let address = listener.address().clone();
    let receiving = {
        let hang_up = hang_up.clone();
        std::thread::spawn(move || {
            receive(&listener, &mut Host::default(), &ReceiveOptions::default(), &hang_up, &())
        })
    };
    let sending = std::thread::spawn(move || {
        let vm = Model::running(500, BUSY, Flaw::None);
        migrate(vm, &address, &SourceOptions::default(), &Control::new(), &Panics)
    });
    let patience = Instant::now() + Duration::from_secs(60);
    while !(sending.is_finished() && receiving.is_finished()) {
        assert!(Instant::now() < patience, "both sides end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(sending.join().is_err(), "the panic comes through");
    let Received::NotReceived(fault) = receiving.join().unwrap() else { panic!("received") };
    assert_eq!(fault.blame, Blame::Network, "{fault}");
}
