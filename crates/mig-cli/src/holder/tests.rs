//! The holder's states, with a machine that only pretends.

use super::*;
use crate::event::examples;
use mig::{BoxError, Word};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

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
    fn migrate(self, _: &Address, _: &Settings, control: &Control, observer: &dyn Observer) -> Moving<Self> {
        observer.progress(&mig::observe::Progress::Accepted);
        match self.endings.recv().unwrap() {
            Ending::Moved => Moving::Moved(examples::moved()),
            Ending::StillHere => Moving::StillHere { machine: self, report: examples::refused() },
            Ending::InDoubt => {
                let fault = examples::refused().fault.unwrap();
                observer.progress(&mig::observe::Progress::InDoubt { fault, asked: 0 });
                loop {
                    match control.word() {
                        Some(Word::Discard) => return Moving::Discarded(examples::refused()),
                        Some(Word::Resume) => {
                            self.seen.lock().unwrap().push("resume");
                            return Moving::StillHere { machine: self, report: examples::refused() };
                        }
                        None => thread::yield_now(),
                    }
                }
            }
            Ending::Hang => {
                while !control.is_cancelled() {
                    thread::yield_now();
                }
                Moving::StillHere { machine: self, report: examples::refused() }
            }
        }
    }
    fn end(self) {
        self.seen.lock().unwrap().push("end");
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
        while self.state() != state {
            thread::yield_now();
        }
    }

    fn fake() -> (Fake, Sender<Ending>, Arc<Mutex<Vec<&'static str>>>) {
        let (endings, receiver) = channel();
        let seen = Arc::<Mutex<Vec<_>>>::default();
        (Fake { seen: Arc::clone(&seen), endings: receiver, over: Arc::default() }, endings, seen)
    }

    fn running() -> Self {
        let (fake, endings, seen) = Self::fake();
        let over = Arc::clone(&fake.over);
        Self { holder: Holder::running(fake, Output::sink(|_| {}), "source"), endings, over, seen }
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
    assert_eq!(stage.holder.wait_ended(), End::Moved);
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
        assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
        assert_eq!(stage.state(), "in-doubt", "one Ctrl-C warns");
        stage.holder.resume().unwrap();
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
    assert_eq!(stage.holder.wait_ended(), End::Quit { in_doubt: true });
}

#[test]
fn a_quit_that_comes_before_the_doubt_does_not_drop_the_guest() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope
            .spawn(|| stage.holder.migrate(&Address::tcp("h", 1), &Settings::default(), &|_| {}).is_err());
        while stage.state() != "migrating" {
            thread::yield_now();
        }
        stage.holder.quit().unwrap();
        stage.endings.send(Ending::InDoubt).unwrap();
        stage.wait_for("in-doubt");
        assert!(stage.seen().is_empty());
        stage.holder.quit().unwrap();
        assert!(migration.join().unwrap());
    });
    assert_eq!(stage.holder.wait_ended(), End::Quit { in_doubt: true });
}

#[test]
fn ctrl_c_cancels_first_and_ends_then() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Hang));
        while stage.state() != "migrating" {
            thread::yield_now();
        }
        assert!(stage.holder.pause().is_err() && stage.holder.check().is_err());
        assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!(stage.state(), "running", "the guest stays");
    assert_eq!(stage.holder.interrupt(), Interrupted::Handled);
    assert_eq!(stage.holder.wait_ended(), End::Quit { in_doubt: false });
    assert_eq!(stage.seen(), ["end"]);
    assert_eq!(stage.holder.interrupt(), Interrupted::Ended);
}

#[test]
fn a_quit_during_a_migration_cancels_it_and_ends_the_guest_that_stayed() {
    let stage = Stage::running();
    thread::scope(|scope| {
        let migration = scope.spawn(|| stage.migrate(Ending::Hang));
        while stage.state() != "migrating" {
            thread::yield_now();
        }
        stage.holder.quit().unwrap();
        assert!(migration.join().unwrap().is_err());
    });
    assert_eq!(stage.holder.wait_ended(), End::Quit { in_doubt: false });
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
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination");
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
    let holder: Arc<Holder<Fake>> = Holder::receiving(Output::sink(|_| {}), "destination");
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
    assert!(matches!(stage.holder.wait_ended(), End::Guest(GuestEnd { good: true, .. })));
    assert_eq!(stage.seen(), ["end"]);
}

#[test]
fn a_guest_that_ended_while_it_was_to_move_is_not_said_to_go_on() {
    let stage = Stage::running();
    stage.over.store(true, Ordering::SeqCst);
    stage.migrate(Ending::StillHere).unwrap_err();
    assert_eq!(stage.state(), "ended");
    assert!(matches!(stage.holder.wait_ended(), End::Guest(GuestEnd { good: true, .. })));
    assert_eq!(stage.seen(), ["end"]);
}

#[test]
fn an_interrupt_after_the_end_is_told_apart_from_one_too_many() {
    let stage = Stage::running();
    stage.migrate(Ending::Moved).unwrap();
    assert_eq!(stage.holder.interrupt(), Interrupted::Ended);
}
