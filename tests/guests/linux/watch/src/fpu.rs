//! Floating-point and vector registers: each thread fills its own with other values, and finds them again after it
//! computed and after it slept while others ran.

#![allow(unsafe_code)]

use std::arch::asm;
use std::io;
use std::time::Duration;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::duty::{Check, Duty};
use crate::random::Random;
use crate::report::{Count, Fault, Report};

/// What FXSAVE64 stores (SDM volume 1, table 10-2).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(16))]
struct Image([u8; 512]);

/// Control word, status word, abridged tag word.
const X87: std::ops::Range<usize> = 0..5;
const MXCSR: std::ops::Range<usize> = 24..28;
const ST0: usize = 32;
const XMM0: usize = 160;

impl Image {
    const ZERO: Self = Self([0; 512]);

    /// Values that no other seed has, with all exceptions masked and none pending.
    fn of(seed: u64) -> Self {
        let mut random = Random::new(seed << 32);
        let mut image = Self::ZERO;
        let mut number = |below: usize| u16::try_from(random.below(below)).expect("small");
        // Rounding and precision control; 1 is a reserved precision.
        let precision = [0, 2, 3][usize::from(number(3))];
        let control = 0x7f | precision << 8 | number(4) << 10;
        // Top of stack and condition codes.
        let status = number(8) << 11 | (number(8) << 8) | number(2) << 14;
        // Rounding, flush to zero, sticky flags.
        let mxcsr = 0x1f80 | u32::from(number(4)) << 13 | u32::from(number(2)) << 15 | u32::from(number(64));
        image.0[0..2].copy_from_slice(&control.to_le_bytes());
        image.0[2..4].copy_from_slice(&status.to_le_bytes());
        image.0[4] = 0xff;
        image.0[MXCSR].copy_from_slice(&mxcsr.to_le_bytes());
        for st in 0..8 {
            let at = ST0 + st * 16;
            image.0[at..at + 8].copy_from_slice(&(random.next() | 1 << 63).to_le_bytes());
            let exponent = u16::try_from(1 + random.below(0x7ffd)).expect("15 bits");
            image.0[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
        }
        for half in image.0[XMM0..XMM0 + 256].chunks_mut(8) {
            half.copy_from_slice(&random.next().to_le_bytes());
        }
        image
    }

    /// Fills the registers, spins, sleeps, and answers what is in them then; all in one stretch of code that leaves
    /// them as they were.
    fn hold(&self, spins: u64, sleep: Duration) -> Self {
        let mut before = Self::ZERO;
        let mut found = Self::ZERO;
        let time = libc::timespec { tv_sec: 0, tv_nsec: i64::from(sleep.subsec_nanos()) };
        // SAFETY: the images are 512 writable bytes on a 16-byte boundary, and this one is a state that FXRSTOR
        // takes (reserved bits are 0). All registers that it loads are restored before the block ends. nanosleep
        // reads one timespec, writes nothing, and clobbers what SYSCALL does.
        unsafe {
            asm!(
                "fxsave64 [{before}]",
                "fxrstor64 [{image}]",
                "2: dec {spins}",
                "jnz 2b",
                "mov eax, {nanosleep}",
                "xor esi, esi",
                "syscall",
                "fxsave64 [{found}]",
                "fxrstor64 [{before}]",
                before = in(reg) &raw mut before,
                image = in(reg) &raw const *self,
                found = in(reg) &raw mut found,
                spins = inout(reg) spins.max(1) => _,
                nanosleep = const libc::SYS_nanosleep,
                in("rdi") &raw const time,
                out("rsi") _,
                out("rax") _,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        found
    }

    /// The first register that is not as it was; pointers to the last instruction are nobody's.
    fn compare(&self, found: &Self) -> Result<(), Fault> {
        let registers =
            [("x87 control, status and tags", X87), ("MXCSR", MXCSR)].map(|(n, r)| (n.to_string(), r));
        let st = (0..8).map(|i| (format!("ST{i}"), ST0 + i * 16..ST0 + i * 16 + 10));
        let xmm = (0..16).map(|i| (format!("XMM{i}"), XMM0 + i * 16..XMM0 + i * 16 + 16));
        for (name, range) in registers.into_iter().chain(st).chain(xmm) {
            let (right, is) = (&self.0[range.clone()], &found.0[range]);
            if right != is {
                return Err(Fault::new("FPU and SSE registers", format!("{name} {}", hex(right)), hex(is)));
            }
        }
        Ok(())
    }
}

/// A little-endian number.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::from("0x"), |text, byte| text + &format!("{byte:02x}"))
}

/// Two threads on each of the first two CPUs, so that they take turns there.
pub(crate) fn start(duty: &mut Duty) -> io::Result<()> {
    let mut seed = 0;
    for cpu in cpus()?.into_iter().take(2) {
        for _ in 0..2 {
            seed += 1;
            let spins = if duty.spin { 4_000_000 } else { 100_000 };
            duty.start(Registers { cpu: Some(cpu), image: Image::of(seed), seed, spins });
        }
    }
    Ok(())
}

/// The CPUs that this process may use.
pub(crate) fn cpus() -> io::Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false)).collect())
}

/// Has this thread stay on a CPU.
pub(crate) fn pin(cpu: usize) -> Result<(), Fault> {
    let mut only = CpuSet::new();
    only.set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &only))
        .map_err(|e| Fault::new("pinning a thread to a CPU", "success", e))
}

struct Registers {
    /// To go to, at the first step.
    cpu: Option<usize>,
    image: Image,
    seed: u64,
    spins: u64,
}

impl Check for Registers {
    const NAME: &'static str = "registers";
    const PERIOD: Duration = Duration::from_millis(400);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        if let Some(cpu) = self.cpu.take() {
            pin(cpu)?;
        }
        // One of a CPU's two sleeps longer, so that they meet in ever other ways.
        let sleep = Duration::from_millis(20 + 7 * (self.seed % 2));
        let found = self.image.hold(self.spins, sleep);
        report.checked(Count::Fpu, 1);
        let compared = self.image.compare(&found);
        self.seed += 4;
        self.image = Image::of(self.seed);
        compared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_found_as_they_were_filled() {
        for seed in 0..50 {
            let image = Image::of(seed);
            assert_eq!(image.compare(&image.hold(1000, Duration::from_millis(1))), Ok(()), "seed {seed}");
        }
        let sum: f64 = (1..=100).map(f64::from).sum();
        assert_eq!(sum.to_bits(), 5050_f64.to_bits(), "this thread's own state came back");
    }

    #[test]
    fn every_register_that_differs_is_named() {
        let image = Image::of(1);
        let differing = [
            (0, "x87"),
            (3, "x87"),
            (4, "x87"),
            (25, "MXCSR"),
            (32, "ST0 "),
            (32 + 7 * 16 + 9, "ST7 "),
            (160, "XMM0 "),
            (160 + 255, "XMM15 "),
        ];
        for (at, name) in differing {
            let mut found = image;
            found.0[at] ^= 1;
            let fault = image.compare(&found).unwrap_err();
            assert!(fault.expected.starts_with(name), "byte {at}: {fault:?}");
        }
        let mut found = image;
        found.0[8..24].fill(7);
        assert_eq!(image.compare(&found), Ok(()), "instruction pointers are not compared");
    }

    #[test]
    fn the_registers_of_another_thread_are_found() {
        let (mine, other) = (Image::of(1), Image::of(2));
        assert!(mine.compare(&other.hold(1, Duration::ZERO)).is_err());
    }
}
