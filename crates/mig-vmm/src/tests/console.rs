//! What is typed and printed, across pauses and moves.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::execution::program;
use super::*;
use crate::{Fed, Monitor};

const COM1: u32 = 0x3f8;
/// The end of the stack, and where the interrupt table lies.
const STACK: u32 = 0x9000;
const IDT: u32 = 0x8000;

fn out(a: &mut CodeAssembler, port: u8, value: u32) -> Result<(), IcedError> {
    a.mov(eax, value)?;
    a.out(i32::from(port), al)
}

/// Sends every byte back, one for each interrupt: it falls silent when one is lost.
fn echo() -> Vec<u8> {
    program(|a| {
        let (mut over, mut nothing, mut sleep) = (a.create_label(), a.create_label(), a.create_label());
        a.call(over)?;
        // The handler. It does not return, but goes back to sleep on a new stack.
        a.mov(edx, COM1 + 5)?;
        a.in_(al, dx)?;
        a.test(al, 1)?;
        a.jz(nothing)?;
        a.mov(edx, COM1)?;
        a.in_(al, dx)?;
        a.out(dx, al)?;
        a.set_label(&mut nothing)?;
        out(a, 0x20, 0x20)?;
        a.jmp(sleep)?;
        a.set_label(&mut over)?;
        a.pop(eax)?;
        // Vector 0x24: IRQ 4 of a controller that begins at 0x20.
        a.mov(ebx, IDT + 0x24 * 8)?;
        a.mov(word_ptr(ebx), ax)?;
        a.shr(eax, 16)?;
        a.mov(word_ptr(ebx + 2), 0x10)?;
        a.mov(word_ptr(ebx + 4), 0x8e00)?;
        a.mov(word_ptr(ebx + 6), ax)?;
        a.mov(dword_ptr(IDT - 8), (IDT << 16) | 0xfff)?;
        a.mov(word_ptr(IDT - 4), (IDT >> 16) as i32)?;
        a.lidt(ptr(IDT - 8))?;
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xef)] {
            out(a, port, value)?;
        }
        a.mov(edx, COM1 + 1)?;
        a.mov(eax, 1)?;
        a.out(dx, al)?;
        a.mov(edx, COM1)?;
        a.mov(al, i32::from(b'>'))?;
        a.out(dx, al)?;
        a.set_label(&mut sleep)?;
        a.mov(esp, STACK)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(sleep)
    })
}

/// Prints 0, 1, 2 ... 255, 0, 1 ... as fast as it can.
fn counter() -> Vec<u8> {
    program(|a| {
        let mut again = a.create_label();
        a.mov(edx, COM1)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.out(dx, al)?;
        a.inc(eax)?;
        a.jmp(again)
    })
}

/// The same, with a word at the port below, whose second byte is the port's.
fn wide_counter() -> Vec<u8> {
    program(|a| {
        let mut again = a.create_label();
        a.mov(edx, COM1 - 1)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.out(dx, ax)?;
        a.inc(ah)?;
        a.jmp(again)
    })
}

fn numbered(count: usize) -> Vec<u8> {
    // Not a power of two, so that what a queue's length loses or doubles shows.
    (0..count).map(|n| (n % 251) as u8).collect()
}

/// The first place where two texts differ, rather than both.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8]) {
    let at = found.iter().zip(expected).position(|(f, e)| f != e).unwrap_or(found.len().min(expected.len()));
    assert!(
        found == expected,
        "{} bytes instead of {}; from {at} on {:?} instead of {:?}",
        found.len(),
        expected.len(),
        &found[at..found.len().min(at + 8)],
        &expected[at..expected.len().min(at + 8)]
    );
}

/// A terminal that is typed on at full speed, whoever reads it.
struct Keyboard {
    typed: Vec<u8>,
    taken: Mutex<usize>,
}

impl Keyboard {
    /// Gives a machine what it takes, until it is gone or has all.
    fn feed(&self, monitor: &Monitor) {
        while *lock(&self.taken) < self.typed.len() && monitor.state() != RunState::Ended {
            let take = |room: usize| {
                let mut taken = lock(&self.taken);
                // Time for a pause to come between.
                thread::yield_now();
                let count = room.min(7).min(self.typed.len() - *taken);
                let bytes = self.typed[*taken..][..count].to_vec();
                *taken += count;
                Ok(bytes)
            };
            match monitor.feed_serial(take).unwrap() {
                Fed::Taken(_) => thread::yield_now(),
                Fed::Full | Fed::NotRunning => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

#[test]
fn what_is_typed_while_a_guest_hops_arrives_once_in_order_and_wakes_it() {
    if !kvm() {
        return;
    }
    let keyboard = Keyboard { typed: numbered(20_000), taken: Mutex::default() };
    let texts: Vec<Text> = (0..6).map(|_| Text::default()).collect();
    let printed = || texts.iter().map(|text| lock(&text.0).len()).sum::<usize>();
    thread::scope(|scope| {
        let mut machine = machine_of(&echo(), texts[0].console());
        for (hop_number, text) in texts.iter().enumerate() {
            let monitor = machine.monitor();
            machine.run().unwrap();
            scope.spawn(|| {
                let monitor = monitor;
                keyboard.feed(&monitor);
            });
            // A share of it here, the rest there.
            let share = 1 + keyboard.typed.len() * (hop_number + 1) / texts.len();
            wait("echo", || printed() >= share, || format!("{} of {share} after {hop_number}", printed()));
            assert!(!lock(&text.0).is_empty());
            if let Some(next) = texts.get(hop_number + 1) {
                machine = hop(machine, next.console(), |_| ());
            }
        }
        machine.end();
    });
    let printed: Vec<u8> = texts.iter().flat_map(|text| lock(&text.0).clone()).collect();
    assert_eq!(printed[0], b'>');
    assert_same(&printed[1..], &keyboard.typed);
}

#[test]
fn only_a_running_guest_takes_input_and_only_as_much_as_it_has_room_for() {
    if !kvm() {
        return;
    }
    let nobody_asks = |_: usize| -> io::Result<Vec<u8>> { panic!("input was taken") };
    let mut machine = machine_of(&counter(), Console::none());
    let monitor = machine.monitor();
    assert_eq!(monitor.feed_serial(nobody_asks).unwrap(), Fed::NotRunning);
    machine.run().unwrap();
    assert!(monitor.feed_serial(|_| Err(io::ErrorKind::WouldBlock.into())).is_err());
    assert_eq!(monitor.feed_serial(|room| Ok(numbered(room - 1))).unwrap(), Fed::Taken(4095));
    assert_eq!(monitor.feed_serial(|room| Ok(numbered(room))).unwrap(), Fed::Taken(1));
    assert_eq!(monitor.feed_serial(nobody_asks).unwrap(), Fed::Full);
    let mut machine = hop(machine, Console::none(), |_| ());
    let there = machine.monitor();
    assert_eq!(there.feed_serial(nobody_asks).unwrap(), Fed::NotRunning);
    machine.run().unwrap();
    assert_eq!(there.feed_serial(nobody_asks).unwrap(), Fed::Full);
    machine.end();
    assert_eq!(there.feed_serial(nobody_asks).unwrap(), Fed::NotRunning);
    assert_eq!(monitor.feed_serial(nobody_asks).unwrap(), Fed::NotRunning);
}

/// A reader that is away until it is told to come back.
struct Away {
    back: Receiver<()>,
    read: Text,
}

impl io::Write for Away {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // An error means for good.
        let _ = self.back.recv();
        self.read.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn away() -> (Console, Sender<()>, Text) {
    let (leave, back) = channel();
    let read = Text::default();
    (Console::to(Away { back, read: read.clone() }), leave, read)
}

#[test]
fn a_console_that_nobody_reads_stops_its_guest_but_no_pause_and_loses_nothing() {
    if !kvm() {
        return;
    }
    let (console, leave, read) = away();
    let mut machine = machine_of(&counter(), console.clone());
    machine.run().unwrap();
    wait("full console", || !console.wait_room(Duration::ZERO), String::new);
    for _ in 0..20 {
        // Fails if the vCPU waits for the reader.
        machine.pause().unwrap();
        machine.run().unwrap();
    }
    let there = Text::default();
    let second = there.console();
    let mut machine = hop(machine, second.clone(), |_| ());
    machine.run().unwrap();
    wait("output there", || lock(&there.0).len() > 1000, String::new);
    machine.pause().unwrap();
    second.flush(PATIENCE).unwrap();
    drop(leave);
    console.flush(PATIENCE).unwrap();
    let mut printed = lock(&read.0).clone();
    let here = printed.len();
    assert!((256 << 10..(256 << 10) + 100).contains(&here), "{here} bytes were queued");
    printed.extend(lock(&there.0).iter());
    let expected: Vec<u8> = (0..printed.len()).map(|n| n as u8).collect();
    assert_same(&printed, &expected);
}

#[test]
fn a_wide_access_that_reaches_the_port_waits_for_a_full_console_too() {
    if !kvm() {
        return;
    }
    let (console, leave, read) = away();
    let mut machine = machine_of(&wide_counter(), console.clone());
    machine.run().unwrap();
    wait("full console", || !console.wait_room(Duration::ZERO), String::new);
    std::thread::sleep(Duration::from_millis(300));
    machine.pause().unwrap();
    drop(leave);
    console.flush(PATIENCE).unwrap();
    let printed = lock(&read.0).clone();
    assert!((256 << 10..(256 << 10) + 10).contains(&printed.len()), "{} bytes were queued", printed.len());
    let expected: Vec<u8> = (0..printed.len()).map(|n| n as u8).collect();
    assert_same(&printed, &expected);
}

#[test]
fn what_is_printed_at_full_speed_is_split_between_the_consoles_without_loss() {
    if !kvm() {
        return;
    }
    let texts: Vec<Text> = (0..5).map(|_| Text::default()).collect();
    let mut consoles: Vec<Console> = Vec::new();
    let mut machine: Option<Machine> = None;
    for text in &texts {
        let console = text.console();
        consoles.push(console.clone());
        let mut here = match machine.take() {
            None => machine_of(&counter(), console),
            Some(machine) => hop(machine, console, |_| ()),
        };
        here.run().unwrap();
        wait("output", || lock(&text.0).len() > 2000, String::new);
        machine = Some(here);
    }
    machine.unwrap().pause().unwrap();
    consoles.iter().for_each(|console| console.flush(PATIENCE).unwrap());
    let printed: Vec<u8> = texts.iter().flat_map(|text| lock(&text.0).clone()).collect();
    let expected: Vec<u8> = (0..printed.len()).map(|n| n as u8).collect();
    assert_same(&printed, &expected);
}

#[test]
fn a_pause_waits_for_input_that_is_being_taken_so_that_its_interrupt_moves_too() {
    if !kvm() {
        return;
    }
    let (here, there) = (Text::default(), Text::default());
    let mut machine = machine_of(&echo(), here.console());
    machine.run().unwrap();
    wait("guest that listens", || here.read() == ">", || here.read());
    let monitor = machine.monitor();
    let (taking, begun) = channel();
    let taken = std::sync::atomic::AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let take = |_: usize| {
                taking.send(()).unwrap();
                thread::sleep(Duration::from_millis(100));
                taken.store(true, std::sync::atomic::Ordering::SeqCst);
                Ok(b"x".into())
            };
            assert_eq!(monitor.feed_serial(take).unwrap(), Fed::Taken(1));
        });
        begun.recv().unwrap();
        machine.pause().unwrap();
        assert!(taken.load(std::sync::atomic::Ordering::SeqCst), "paused while input is taken");
    });
    let mut machine = hop(machine, there.console(), |_| ());
    machine.run().unwrap();
    wait("echo", || there.read() == "x", || there.read());
}
