//! The link is lost around Commit: a wire that is cut at a chosen message and healed later, real sockets on
//! both of its ends. Whatever happens, one guest goes on, and never two.

mod model;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mig::observe::{OutcomeKind, Progress, Report};
use mig::{
    Address, Arbiter, BoxError, Control, Listener, Observer, Outcome, ReceiveOptions, Received, Side,
    SourceOptions, Word, migrate, receive,
};
use mig_wire::header::{HEADER_BYTES, Header, Kind};
use model::{Flaw, Host, Model};

const BUSY: Duration = Duration::from_micros(100);

/// What lies between the two sides. Cut, it drops what is on its way and refuses what comes.
struct Wire {
    address: Address,
    cut: Arc<AtomicBool>,
}

impl Wire {
    /// A wire to `to` that is cut by the first frame of this kind, which is lost.
    fn cut_at(kind: Kind, to: &Address) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = Address::tcp("127.0.0.1", listener.local_addr().unwrap().port());
        let cut = Arc::new(AtomicBool::new(false));
        let (cutting, to) = (cut.clone(), to.to_string().trim_start_matches("tcp:").to_owned());
        // ends with the process
        std::thread::spawn(move || {
            let struck = Arc::new(AtomicBool::new(false));
            let ends = Arc::new(Mutex::new(Vec::<TcpStream>::new()));
            for near in listener.incoming().map(Result::unwrap) {
                if cutting.load(Ordering::SeqCst) {
                    continue;
                }
                let far = TcpStream::connect(&to).unwrap();
                for stream in [&near, &far] {
                    stream.set_nodelay(true).unwrap();
                    ends.lock().unwrap().push(stream.try_clone().unwrap());
                }
                for (from, into) in [(&near, &far), (&far, &near)] {
                    let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                    let (cutting, struck, ends) = (cutting.clone(), struck.clone(), ends.clone());
                    std::thread::spawn(move || {
                        carry(&from, &into, |seen| {
                            let strikes = seen == kind && !struck.swap(true, Ordering::SeqCst);
                            if strikes {
                                cutting.store(true, Ordering::SeqCst);
                                for end in ends.lock().unwrap().drain(..) {
                                    let _ = end.shutdown(Shutdown::Both);
                                }
                            }
                            !strikes
                        });
                    });
                }
            }
        });
        Self { address, cut }
    }

    fn heal(&self) {
        self.cut.store(false, Ordering::SeqCst);
    }
}

/// Carries frames until the end, or one that does not pass.
fn carry(mut from: &TcpStream, mut into: &TcpStream, mut passes: impl FnMut(Kind) -> bool) {
    let mut frame = vec![0; HEADER_BYTES];
    while from.read_exact(&mut frame[..HEADER_BYTES]).is_ok() {
        let header = Header::decode(frame.first_chunk().unwrap()).unwrap();
        frame.resize(HEADER_BYTES + header.body_bytes(), 0);
        if !passes(header.kind)
            || from.read_exact(&mut frame[HEADER_BYTES..]).is_err()
            || into.write_all(&frame).is_err()
        {
            break;
        }
    }
    let _ = into.shutdown(Shutdown::Write);
}

/// Does something at a question that was in vain (0: as the doubt begins), and counts them.
struct AtDoubt<F> {
    asked: u32,
    act: F,
    refused: Mutex<Vec<String>>,
}

impl<F: Fn() + Sync> Observer for AtDoubt<F> {
    fn progress(&self, progress: &Progress) {
        match progress {
            Progress::InDoubt { asked, .. } if *asked == self.asked => (self.act)(),
            Progress::WordRefused { cause } => self.refused.lock().unwrap().push(cause.clone()),
            _ => {}
        }
    }
}

fn at_doubt<F: Fn() + Sync>(asked: u32, act: F) -> AtDoubt<F> {
    AtDoubt { asked, act, refused: Mutex::default() }
}

/// Both sides of a migration over a wire.
struct Sides {
    listener: Listener,
    wire: Wire,
    source: Control,
    destination: Control,
    arbiter: Option<Arc<dyn Arbiter>>,
}

impl Sides {
    fn cut_at(kind: Kind) -> Self {
        let listener = Listener::bind(&Address::tcp("127.0.0.1", 0)).unwrap();
        let wire = Wire::cut_at(kind, listener.address());
        Self { listener, wire, source: Control::new(), destination: Control::new(), arbiter: None }
    }

    fn migrate(
        &self,
        at_source: &(dyn Observer + Sync),
        at_destination: &(dyn Observer + Sync),
    ) -> (Outcome<Model>, Received<Model>) {
        std::thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let options = ReceiveOptions { arbiter: self.arbiter.clone() };
                receive(&self.listener, &mut Host::default(), &options, &self.destination, at_destination)
            });
            let options = SourceOptions { arbiter: self.arbiter.clone(), ..SourceOptions::default() };
            let vm = Model::running(2000, BUSY, Flaw::None);
            let outcome = migrate(vm, &self.wire.address, &options, &self.source, at_source);
            (outcome, receiving.join().unwrap())
        })
    }
}

fn one_runs_at_the_source(outcome: Outcome<Model>, received: Received<Model>) -> Report {
    let Outcome::StillHere { vm, report } = outcome else { panic!("not still here") };
    assert!(vm.makes_progress() && !vm.is_tracked());
    assert!(matches!(received, Received::NotReceived(_)));
    report
}

fn one_runs_at_the_destination(outcome: Outcome<Model>, received: Received<Model>) -> Report {
    let Received::Running { vm, .. } = received else { panic!("not running") };
    assert!(vm.makes_progress());
    match outcome {
        Outcome::Moved(report) | Outcome::Discarded(report) => report,
        Outcome::StillHere { .. } => panic!("still here"),
    }
}

#[test]
fn a_guest_whose_commit_was_lost_comes_back_once_the_link_is_whole() {
    let sides = Sides::cut_at(Kind::Commit);
    let heals = at_doubt(3, || sides.wire.heal());
    let (outcome, received) = sides.migrate(&heals, &());
    let report = one_runs_at_the_source(outcome, received);
    assert_eq!(report.outcome, OutcomeKind::StillHere);
    let remedy = report.fault.unwrap().remedy;
    assert!(remedy.contains("the destination gave it back"), "{remedy}");
}

#[test]
fn a_copy_of_a_guest_that_was_never_committed_is_given_up_once_the_link_is_whole() {
    let sides = Sides::cut_at(Kind::Ready);
    let heals = at_doubt(0, || sides.wire.heal());
    let (outcome, received) = sides.migrate(&(), &heals);
    let Received::NotReceived(fault) = &received else { panic!("received") };
    assert!(fault.cause.contains("has it back"), "{fault}");
    one_runs_at_the_source(outcome, received);
}

#[test]
fn a_guest_that_runs_there_has_moved_though_the_news_was_lost_and_the_pause_is_known() {
    let sides = Sides::cut_at(Kind::Running);
    let began = Instant::now();
    let healed = Mutex::new(Duration::ZERO);
    let heals = at_doubt(2, || {
        *healed.lock().unwrap() = began.elapsed();
        sides.wire.heal();
    });
    let (outcome, received) = sides.migrate(&heals, &());
    let report = one_runs_at_the_destination(outcome, received);
    assert_eq!(report.outcome, OutcomeKind::Moved);
    // the questions in vain, at least the wait after the first, are no part of the pause
    let healed = *healed.lock().unwrap();
    assert!(healed > Duration::from_millis(250) && report.total > healed);
    let downtime = report.downtime.unwrap().total();
    assert!(downtime + Duration::from_millis(250) <= report.total, "{downtime:?} of {:?}", report.total);
}

#[test]
fn a_receive_that_ended_is_answered_for_by_its_listener() {
    let sides = Sides::cut_at(Kind::Running);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let options = ReceiveOptions::default();
            receive(&sides.listener, &mut Host::default(), &options, &sides.destination, &())
        });
        let vm = Model::running(2000, BUSY, Flaw::None);
        let moving =
            scope.spawn(|| migrate(vm, &sides.wire.address, &SourceOptions::default(), &sides.source, &()));
        let received = receiving.join().unwrap();
        assert!(!moving.is_finished(), "the source cannot know");
        sides.wire.heal();
        one_runs_at_the_destination(moving.join().unwrap(), received);
        let vm = Model::running(2000, BUSY, Flaw::None);
        let another = migrate(vm, sides.listener.address(), &SourceOptions::default(), &Control::new(), &());
        let Outcome::StillHere { report, .. } = another else { panic!("there is no room for two") };
        assert!(report.fault.unwrap().to_string().contains("this receiver has its guest already"));
    });
}

#[test]
fn an_operator_at_the_source_is_obeyed_at_once_though_nobody_answers() {
    let sides = Sides::cut_at(Kind::Commit);
    let resumes = at_doubt(1, || sides.source.resolve(Word::Resume));
    // as whoever gives that word must
    let discards = at_doubt(0, || sides.destination.resolve(Word::Discard));
    let (outcome, received) = sides.migrate(&resumes, &discards);
    let report = one_runs_at_the_source(outcome, received);
    assert!(report.fault.unwrap().remedy.contains("operator"));
}

#[test]
fn an_operator_at_the_destination_runs_what_may_be_the_last_copy() {
    let sides = Sides::cut_at(Kind::Commit);
    let gone = at_doubt(1, || sides.source.resolve(Word::Discard));
    let held = at_doubt(0, || sides.destination.resolve(Word::Resume));
    let (outcome, received) = sides.migrate(&gone, &held);
    let report = one_runs_at_the_destination(outcome, received);
    assert_eq!(report.outcome, OutcomeKind::Discarded);
}

#[test]
fn a_cancel_of_either_side_changes_nothing_about_a_doubt() {
    let sides = Sides::cut_at(Kind::Commit);
    let cancels = at_doubt(1, || {
        sides.source.cancel();
        sides.wire.heal();
    });
    let held = at_doubt(0, || sides.destination.cancel());
    let (outcome, received) = sides.migrate(&cancels, &held);
    let Received::NotReceived(fault) = &received else { panic!("received") };
    assert!(fault.cause.contains("has it back"), "{fault}");
    one_runs_at_the_source(outcome, received);
}

/// A register in memory.
#[derive(Default)]
struct Register {
    session: Mutex<Option<([u8; 16], Option<Side>)>>,
}

impl Arbiter for Register {
    fn identity(&self) -> [u8; 16] {
        [3; 16]
    }

    fn begin(&self, session: &[u8; 16]) -> Result<(), BoxError> {
        *self.session.lock().unwrap() = Some((*session, None));
        Ok(())
    }

    fn claim(&self, session: &[u8; 16], side: Side) -> Result<bool, BoxError> {
        Ok(match &mut *self.session.lock().unwrap() {
            Some((current, owner)) if current == session => *owner.get_or_insert(side) == side,
            _ => false,
        })
    }
}

#[test]
fn with_an_arbiter_a_guest_comes_back_though_the_link_never_does_and_the_copy_cannot_be_run() {
    let mut sides = Sides::cut_at(Kind::Commit);
    sides.arbiter = Some(Arc::new(Register::default()));
    let held = AtDoubt {
        asked: 0,
        act: || {
            // the source has claimed by the time it is back
            std::thread::sleep(Duration::from_millis(500));
            sides.destination.resolve(Word::Resume);
            sides.destination.resolve(Word::Discard);
        },
        refused: Mutex::default(),
    };
    let (outcome, received) = sides.migrate(&(), &held);
    let report = one_runs_at_the_source(outcome, received);
    assert!(report.fault.unwrap().remedy.contains("the arbiter gave it back"));
    let refused = held.refused.into_inner().unwrap();
    assert_eq!(refused, ["the arbiter has given the guest to the source"]);
}

#[test]
fn with_an_arbiter_a_guest_that_runs_there_is_not_resumed_here_by_a_wrong_word() {
    let mut sides = Sides::cut_at(Kind::Running);
    sides.arbiter = Some(Arc::new(Register::default()));
    let wrong = at_doubt(1, || sides.source.resolve(Word::Resume));
    struct ThenHeals<'a, F>(&'a AtDoubt<F>, &'a Wire);
    impl<F: Fn() + Sync> Observer for ThenHeals<'_, F> {
        fn progress(&self, progress: &Progress) {
            self.0.progress(progress);
            if matches!(progress, Progress::WordRefused { .. }) {
                self.1.heal();
            }
        }
    }
    let (outcome, received) = sides.migrate(&ThenHeals(&wrong, &sides.wire), &());
    one_runs_at_the_destination(outcome, received);
    assert_eq!(wrong.refused.into_inner().unwrap().len(), 1);
}

#[test]
fn an_arbiter_on_one_side_only_is_refused_before_anything_moves() {
    let sides = Sides::cut_at(Kind::Pong);
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let options = ReceiveOptions::default();
            receive(&sides.listener, &mut Host::default(), &options, &sides.destination, &())
        });
        let options =
            SourceOptions { arbiter: Some(Arc::new(Register::default())), ..SourceOptions::default() };
        let vm = Model::running(2000, BUSY, Flaw::None);
        let outcome = migrate(vm, sides.listener.address(), &options, &sides.source, &());
        let Outcome::StillHere { report, .. } = outcome else { panic!("not still here") };
        let fault = report.fault.unwrap().to_string();
        assert!(fault.contains("the source uses one to decide in doubt, the destination none"), "{fault}");
        assert!(matches!(receiving.join().unwrap(), Received::NotReceived(_)));
    });
}
