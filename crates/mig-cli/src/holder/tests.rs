//! The holder's states, with a machine that only pretends.

use super::*;
use crate::estimate::Estimate;
use crate::event::examples;
use mig::observe::Progress;
use mig::{BoxError, Fault, Word};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Instant;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest that only counts what is done to it.
struct Fake {
    seen: Arc<Mutex<Vec<&'static str>>>,
    /// How its migrations end, in their order.
    endings: Receiver<Ending>,
    /// Whether it has ended by itself.
    over: Arc<AtomicBool>,
}

enum Ending {
    Moved,
    StillHere,
    InDoubt,
    /// Is in doubt, and stays so whatever anybody says.
    Deaf,
    /// Waits for a cancel, and stays.
    Hang,
}

struct FakeView {
    over: Arc<AtomicBool>,
}

impl View for FakeView {
    fn heartbeats(&self) -> u64 {
        7
    }
    fn vcpus(&self) -> u32 {
        2
    }
    fn memory_bytes(&self) -> u64 {
        4096
    }
    fn screen(&self) -> Vec<String> {
        vec![String::new(); 25]
    }
    fn takes_input(&self) -> bool {
        false
    }
    fn feed(&self, _: &mut dyn FnMut(usize) -> std::io::Result<Vec<u8>>) -> std::io::Result<()> {
        Ok(())
    }
    fn wait_end(&self, _: Duration) -> Option<GuestEnd> {
        let over = self.over.load(Ordering::SeqCst);
        over.then(|| GuestEnd { reason: "the guest ended with code 0".into(), good: true })
    }
}

impl Machine for Fake {
    fn view(&self) -> Arc<dyn View> {
        Arc::new(FakeView { over: Arc::clone(&self.over) })
    }
    fn pause(&mut self) -> Result<(), BoxError> {
        self.seen.lock().unwrap().push("pause");
        Ok(())
    }
    fn resume(&mut self) -> Result<(), BoxError> {
        self.seen.lock().unwrap().push("resume");
        Ok(())
    }
    fn check(&mut self) -> Result<String, String> {
        self.seen.lock().unwrap().push("check");
        Ok("all right".into())
    }
    fn watch(&mut self, over: Duration) -> Result<mig::dirtying::Dirtying, BoxError> {
        self.seen.lock().unwrap().push("watch");
        Ok(mig::dirtying::Dirtying {
            samples: vec![(over, 1)],
            filled_pages: 1,
            pages: 1,
            busy_percent: None,
            pause: Duration::ZERO,
            can_throttle: false,
        })
    }
    fn migrate(self, _: &Address, _: &Settings, control: &Control, observer: &dyn Observer) -> Moving<Self> {
        observer.progress(&mig::observe::Progress::Accepted);
        match self.endings.recv_timeout(PATIENCE).unwrap() {
            Ending::Moved => Moving::Moved(examples::moved()),
            Ending::StillHere => Moving::StillHere { machine: self, report: examples::refused() },
            Ending::Deaf => {
                observer.progress(&in_doubt(0));
                wait_until(|| control.word().is_some());
                observer.progress(&Progress::WordRefused { cause: "it runs there".into() });
                let _ = self.endings.recv_timeout(PATIENCE);
                Moving::StillHere { machine: self, report: examples::refused() }
            }
            Ending::InDoubt => {
                observer.progress(&in_doubt(0));
                wait_until(|| control.word().is_some());
                if control.word() == Some(Word::Discard) {
                    return Moving::Discarded(examples::refused());
                }
                self.seen.lock().unwrap().push("resume");
                Moving::StillHere { machine: self, report: examples::refused() }
            }
            Ending::Hang => {
                wait_until(|| control.is_cancelled());
                Moving::StillHere { machine: self, report: examples::refused() }
            }
        }
    }
    fn end(self) {
        self.seen.lock().unwrap().push("end");
    }
}

/// Waits for what takes a moment; a test that fails must not hang.
fn wait_until(mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !happened() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(1));
    }
}

/// What an engine tells.
fn in_doubt(asked: u32) -> Progress {
    Progress::InDoubt { fault: fault(), asked }
}

fn fault() -> Fault {
    examples::refused().fault.unwrap()
}

impl Held<Fake> for Fake {
    fn resume(self: Box<Self>) -> Result<Fake, (Box<dyn Held<Fake>>, BoxError)> {
        if self.over.load(Ordering::SeqCst) {
            return Err((self, "no".into()));
        }
        self.seen.lock().unwrap().push("resume");
        Ok(*self)
    }
}

struct Stage {
    holder: Arc<Holder<Fake>>,
    endings: Sender<Ending>,
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<&'static str>>>,
}

impl Stage {
    fn wait_for(&self, state: &str) {
        wait_until(|| self.state() == state);
    }

    fn fake() -> (Fake, Sender<Ending>, Arc<Mutex<Vec<&'static str>>>) {
        let (endings, receiver) = channel();
        let seen = Arc::<Mutex<Vec<_>>>::default();
        (Fake { seen: Arc::clone(&seen), endings: receiver, over: Arc::default() }, endings, seen)
    }

    fn running() -> Self {
        let (fake, endings, seen) = Self::fake();
        let over = Arc::clone(&fake.over);
        Self { holder: Holder::running(fake, Output::sink(|_| {}), "source", None), endings, over, seen }
    }

    fn migrate(&self, ending: Ending) -> Result<Box<Report>, Box<NotMoved>> {
        self.endings.send(ending).unwrap();
        self.holder.migrate(&Address::tcp("h", 1), &Settings::default(), &|_| {})
    }

    fn state(&self) -> String {
        self.holder.status().state
    }

    fn seen(&self) -> Vec<&'static str> {
        self.seen.lock().unwrap().clone()
    }
}

#[test]
fn a_guest_that_stays_can_be_moved_again_and_one_that_moved_ends_the_holder() {
    let stage = Stage::running();
    let not_moved = stage.migrate(Ending::StillHere).unwrap_err();
    assert_eq!(not_moved.failure.step, "connect");
    assert_eq!(stage.state(), "running");
    stage.migrate(Ending::Moved).unwrap();
    assert_eq!(stage.holder.wait_ended_for(PATIENCE), Some(End::Moved));
    assert!(stage.holder.quit().is_err() && stage.holder.resume().is_err());
    assert_eq!(stage.seen(), Vec::<&str>::new());
}

#[test]
fn a_guest_in_doubt_is_resumed_or_dropped_on_the_operators_word_only() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::InDoubt));
        stage.wait_for("in-doubt");
        assert!(stage.migrate(Ending::Moved).is_err() && stage.holder.pause().is_err());
        assert!(stage.holder.check().is_err() && stage.holder.cancel().is_err());
        assert!(stage.holder.resume().unwrap_err().remedy.contains("resolve"));
        assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
        assert_eq!((stage.state().as_str(), stage.seen().len()), ("in-doubt", 0), "one Ctrl-C warns");
        assert_eq!(stage.holder.resolve(Word::Resume).unwrap(), "running");
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!((stage.state().as_str(), stage.seen()), ("running", vec!["resume"]));
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::InDoubt));
        stage.wait_for("in-doubt");
        stage.holder.interrupt();
        stage.holder.interrupt();
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!(stage.holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: true }));
}

#[test]
fn a_quit_that_comes_before_the_doubt_does_not_drop_the_guest() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope
            .spawn(|| stage.holder.migrate(&Address::tcp("h", 1), &Settings::default(), &|_| {}).is_err());
        wait_until(|| stage.state() == "migrating");
        stage.holder.quit().unwrap();
        stage.endings.send(Ending::InDoubt).unwrap();
        stage.wait_for("in-doubt");
        assert!(stage.seen().is_empty());
        stage.holder.quit().unwrap();
        assert!(migration.join().unwrap());
    });
    assert_eq!(stage.holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: true }));
}

#[test]
fn a_status_says_for_how_long_why_and_what_is_asked_for() {
    let stage = Stage::running();
    stage.holder.controlled_at("unix:/x".into());
    assert_eq!(stage.holder.status().doubt, None);
    assert!(stage.holder.resolve(Word::Resume).is_err(), "there is no doubt");
    let first = stage.holder.follow(&in_doubt(0));
    let status = stage.holder.status();
    assert_eq!(status.state, "in-doubt");
    let doubt = status.doubt.unwrap();
    assert_eq!((doubt.asked, doubt.failure.cause.as_str()), (0, "connection refused"));
    assert!(doubt.failure.remedy.ends_with("mig-send --vm unix:/x --resolve resume|discard"), "{doubt:?}");
    thread::sleep(Duration::from_millis(5));
    let (Event::InDoubt(first), Event::InDoubt(second)) = (first, stage.holder.follow(&in_doubt(3))) else {
        panic!("told otherwise");
    };
    assert!(first.for_ms <= doubt.for_ms && second.for_ms >= 5.0, "since the first");
    assert_eq!(second.asked, 3);
}

#[test]
fn a_word_that_is_refused_is_answered_with_the_reason_and_the_doubt_goes_on() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Deaf));
        stage.wait_for("in-doubt");
        let refused = stage.holder.resolve(Word::Resume).unwrap_err();
        assert_eq!(refused.cause, "it runs there");
        assert!(refused.remedy.contains("discard"));
        assert_eq!(stage.state(), "in-doubt");
        stage.endings.send(Ending::StillHere).unwrap();
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!((stage.state().as_str(), stage.holder.status().doubt), ("running", None));
}

#[test]
fn ctrl_c_in_doubt_warns_then_discards_and_then_ends_the_program() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Deaf));
        stage.wait_for("in-doubt");
        for _ in 0..2 {
            assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
        }
        assert_eq!(stage.holder.interrupt(), Interrupted::ExitNow { in_doubt: true });
        stage.endings.send(Ending::StillHere).unwrap();
        assert!(migration.join().unwrap().is_err());
    });
}

#[test]
fn a_copy_in_doubt_is_discarded_on_a_word_and_another_guest_awaited() {
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination", None);
    let control = holder.begin_receive().unwrap();
    let (fake, _endings, seen) = Stage::fake();
    holder.restored(Machine::view(&fake));
    holder.follow(&in_doubt(0));
    let status = holder.status();
    assert_eq!((status.state.as_str(), status.vcpus), ("in-doubt", 2));
    assert!(holder.cancel().is_err() && holder.resume().is_err());
    thread::scope(|scope| {
        let resolved = scope.spawn(|| holder.resolve(Word::Discard));
        wait_until(|| control.word() == Some(Word::Discard));
        holder.not_received();
        assert_eq!(resolved.join().unwrap().unwrap(), "receiving");
    });
    assert_eq!((holder.status().state.as_str(), holder.status().vcpus), ("receiving", 0));
    let control = holder.begin_receive().unwrap();
    holder.follow(&in_doubt(0));
    for _ in 0..2 {
        holder.interrupt();
    }
    assert_eq!(control.word(), Some(Word::Discard));
    holder.not_received();
    assert_eq!(holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: true }));
    assert!(seen.lock().unwrap().is_empty());
}

#[test]
fn a_quit_before_a_copy_is_in_doubt_does_not_drop_it() {
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination", None);
    holder.begin_receive().unwrap();
    holder.quit().unwrap();
    holder.follow(&in_doubt(0));
    assert_eq!(holder.status().state, "in-doubt");
    let (fake, _endings, seen) = Stage::fake();
    holder.received(fake);
    assert_eq!((holder.status().state.as_str(), seen.lock().unwrap().len()), ("running", 0));
}

#[test]
fn a_copy_that_could_not_be_started_is_held_and_resolved_like_one_in_doubt() {
    for word in [Word::Resume, Word::Discard] {
        let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination", None);
        let (fake, _endings, seen) = Stage::fake();
        let stuck = Arc::clone(&fake.over);
        stuck.store(true, Ordering::SeqCst);
        holder.quit().unwrap();
        holder.received_lost(Box::new(fake), fault().into());
        assert_eq!(holder.status().state, "in-doubt");
        assert_eq!(holder.resolve(Word::Resume).unwrap_err().cause, "no");
        stuck.store(false, Ordering::SeqCst);
        let state = holder.resolve(word).unwrap();
        match word {
            Word::Resume => {
                assert_eq!((state.as_str(), seen.lock().unwrap().as_slice()), ("running", &["resume"][..]))
            }
            Word::Discard => assert_eq!(holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: true })),
        }
    }
}

#[test]
fn ctrl_c_cancels_first_and_ends_then() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Hang));
        wait_until(|| stage.state() == "migrating");
        assert!(stage.holder.pause().is_err() && stage.holder.check().is_err());
        assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!(stage.state(), "running", "the guest stays");
    assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
    assert_eq!(stage.holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: false }));
    assert_eq!(stage.seen(), ["end"]);
    assert_eq!(stage.holder.interrupt(), Interrupted::Ended);
}

#[test]
fn a_quit_during_a_migration_cancels_it_and_ends_the_guest_that_stayed() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Hang));
        wait_until(|| stage.state() == "migrating");
        stage.holder.quit().unwrap();
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!(stage.holder.wait_ended_for(PATIENCE), Some(End::Quit { in_doubt: false }));
    assert_eq!(stage.seen(), ["end"]);
}

#[test]
fn a_check_pauses_a_guest_that_runs_and_leaves_a_paused_one_paused() {
    let stage = Stage::running();
    assert_eq!(stage.holder.check().unwrap().found, "all right");
    assert_eq!(stage.seen(), ["pause", "check", "resume"]);
    stage.holder.pause().unwrap();
    assert!(stage.holder.pause().is_err());
    stage.holder.check().unwrap();
    assert_eq!((stage.state().as_str(), stage.seen().len()), ("paused", 5));
    assert!(stage.migrate(Ending::Moved).is_err(), "a paused guest is not moved");
}

#[test]
fn a_command_waits_for_a_guest_that_is_arriving() {
    let (fake, _endings, _) = Stage::fake();
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination", None);
    let status = holder.status();
    assert_eq!((status.state.as_str(), status.vcpus), ("receiving", 0));
    assert!(holder.screen().is_err() && holder.pause().is_err());
    assert!(holder.begin_receive().is_some());
    holder.arriving();
    thread::scope(|scope| {
        let status = scope.spawn(|| holder.status());
        holder.received(fake);
        let status = status.join().unwrap();
        assert_eq!((status.state.as_str(), status.heartbeats, status.vcpus), ("running", 7, 2));
    });
    assert!(holder.begin_receive().is_none(), "one guest is enough");
}

#[test]
fn a_receive_that_is_cancelled_is_followed_by_another_until_the_holder_quits() {
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination", None);
    let first = holder.begin_receive().unwrap();
    holder.cancel().unwrap();
    assert!(first.is_cancelled());
    let second = holder.begin_receive().unwrap();
    assert!(!second.is_cancelled());
    holder.quit().unwrap();
    assert!(second.is_cancelled() && holder.begin_receive().is_none());
    let (late, _endings, seen) = Stage::fake();
    holder.received(late);
    assert_eq!(*seen.lock().unwrap(), ["end"], "a guest that comes too late is ended");
}

#[test]
fn a_guest_that_ends_by_itself_ends_the_holder() {
    let stage = Stage::running();
    stage.over.store(true, Ordering::SeqCst);
    stage.holder.watch_guest();
    assert!(matches!(stage.holder.wait_ended_for(PATIENCE), Some(End::Guest(GuestEnd { good: true, .. }))));
    assert_eq!(stage.seen(), ["end"]);
}

#[test]
fn a_guest_that_ended_while_it_was_to_move_is_not_said_to_go_on() {
    let stage = Stage::running();
    stage.over.store(true, Ordering::SeqCst);
    stage.migrate(Ending::StillHere).unwrap_err();
    assert_eq!(stage.state(), "ended");
    assert!(matches!(stage.holder.wait_ended_for(PATIENCE), Some(End::Guest(GuestEnd { good: true, .. }))));
    assert_eq!(stage.seen(), ["end"]);
}

#[test]
fn an_interrupt_after_the_end_is_told_apart_from_one_too_many() {
    let stage = Stage::running();
    stage.migrate(Ending::Moved).unwrap();
    assert_eq!(stage.holder.interrupt(), Interrupted::Ended);
}

#[test]
fn only_a_guest_that_runs_is_watched() {
    let stage = Stage::running();
    let estimated = stage.holder.estimate(&Estimate::default()).unwrap();
    assert!(estimated.forecasts.iter().all(|forecast| forecast.moves));
    let wrong = Estimate { keep_speed_percent: Some(0), ..Estimate::default() };
    assert!(stage.holder.estimate(&wrong).unwrap_err().cause.contains("keep_speed_percent"));
    stage.holder.pause().unwrap();
    let refused = stage.holder.estimate(&Estimate::default()).unwrap_err();
    assert!(refused.cause.contains("estimate") && refused.remedy.contains("resume"), "{refused:?}");
    assert_eq!(stage.seen(), ["watch", "pause"]);
}
