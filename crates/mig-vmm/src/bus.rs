//! Port I/O: who answers where. Everything else, memory-mapped I/O included, reads as ones and swallows
//! writes, as on a PC bus with nobody there; that is also how a kernel learns that there is no PCI.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::VmFd;

use crate::console::Console;
use crate::devices::{
    cmos::{self, Cmos},
    debug_exit,
    heartbeat::{self, Heartbeat},
    i8042::{self, I8042, Written},
    serial::{self, Com1},
};
use crate::monitor::End;

/// The devices of a machine; shared by its vCPUs.
pub(crate) struct Bus {
    pub(crate) serial: Mutex<Com1>,
    /// Where `serial` prints.
    pub(crate) console: Console,
    pub(crate) cmos: Mutex<Cmos>,
    pub(crate) i8042: Mutex<I8042>,
    pub(crate) heartbeat: Heartbeat,
}

impl Bus {
    pub(crate) fn new(vm: Arc<VmFd>, console: Console, memory_bytes: u64) -> Self {
        Self {
            serial: Mutex::new(Com1::new(vm, console.clone())),
            console,
            cmos: Mutex::new(Cmos::new(memory_bytes)),
            i8042: Mutex::default(),
            heartbeat: Heartbeat::default(),
        }
    }

    /// An OUT: items of `width` bytes, several for a string instruction. Answers how the machine ends, if
    /// that is what was written.
    pub(crate) fn out(&self, port: u16, width: usize, data: &[u8]) -> Option<End> {
        match port {
            heartbeat::PORT => {
                data.chunks(width).for_each(|_| self.heartbeat.beat());
                None
            }
            debug_exit::PORT => data.first().map(|code| End::Exit(*code)),
            // Devices here are a byte wide: wider items go to ports side by side.
            _ => data
                .chunks(width)
                .flat_map(|item| item.iter().zip(port..=u16::MAX))
                .find_map(|(value, port)| self.out_byte(port, *value)),
        }
    }

    /// An IN, of the same shape.
    pub(crate) fn input(&self, port: u16, width: usize, data: &mut [u8]) {
        data.fill(0xff);
        for item in data.chunks_mut(width) {
            for (value, port) in item.iter_mut().zip(port..=u16::MAX) {
                *value = self.in_byte(port);
            }
        }
    }

    fn out_byte(&self, port: u16, value: u8) -> Option<End> {
        match port {
            serial::FIRST_PORT..=serial::LAST_PORT => lock(&self.serial).write(port, value),
            cmos::INDEX_PORT | cmos::DATA_PORT => lock(&self.cmos).write(port, value),
            i8042::DATA_PORT | i8042::COMMAND_PORT => match lock(&self.i8042).write(port, value) {
                Written::Reset => return Some(End::Reset),
                Written::Nothing => {}
            },
            _ => {}
        }
        None
    }

    fn in_byte(&self, port: u16) -> u8 {
        match port {
            serial::FIRST_PORT..=serial::LAST_PORT => lock(&self.serial).read(port),
            cmos::INDEX_PORT | cmos::DATA_PORT => lock(&self.cmos).read(port),
            i8042::DATA_PORT | i8042::COMMAND_PORT => lock(&self.i8042).read(),
            _ => 0xff,
        }
    }
}

/// Devices are consistent between accesses, so a panic elsewhere leaves them usable.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
