//! Guest time across the pause: it goes on, or it stands still.
//!
//! One [`TimePlan`] is made for a guest as it is restored, and everything that counts time follows it: the
//! kvmclock by KVM_SET_CLOCK and every vCPU's TSC by one and the same shift of its offset, so that TSCs that
//! were equal stay exactly equal.
//!
//! The kernel's own way (KVM_CLOCK_REALTIME with KVM_CLOCK_HOST_TSC, and the formula in the documentation of
//! KVM_VCPU_TSC_OFFSET) needs flags that KVM_GET_CLOCK sets only while the host's TSC is its clock source
//! and all vCPUs agree. So host clocks are read here, together, and the formula is the same:
//! offset' = offset + scaled TSC when saved + elapsed * frequency - scaled TSC when restored.

#![allow(unsafe_code)]

use std::time::Duration;

use mig::Section;
use serde::{Deserialize, Serialize};

use crate::error::KvmError;

/// The name of the section in which a source says which [`GuestTime`] it wants.
pub const NAME: &str = "kvm.guest-time";
/// Its schema.
pub const SCHEMA: u16 = 1;

/// What guest time does between the save on one host and the restore on another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum GuestTime {
    /// It goes on: the guest sees the pause as time that passed.
    #[default]
    Advance,
    /// It stands still: the guest sees no pause, and falls behind the world by it.
    Stop,
}

impl GuestTime {
    /// The choice as a section of the guest's description: the destination must know it before a page moves,
    /// since not every KVM can let time stand still.
    pub fn to_section(self) -> Section {
        Section::critical(NAME, 0, SCHEMA, &self)
    }

    /// Reads what [`GuestTime::to_section`] made.
    ///
    /// # Errors
    /// [`KvmError::Name`], [`KvmError::Version`] or [`KvmError::Section`].
    pub fn from_section(section: &Section) -> Result<Self, KvmError> {
        crate::state::decode(section, NAME, SCHEMA)
    }
}

/// A host's clocks, read at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostClocks {
    /// The kernel's boot id: hosts with the same one are one host, with the same clocks.
    pub boot_id: Option<[u8; 16]>,
    /// CLOCK_BOOTTIME in nanoseconds.
    pub boottime_ns: u64,
    /// CLOCK_REALTIME in nanoseconds.
    pub realtime_ns: u64,
    /// The time stamp counter.
    pub tsc: u64,
}

impl HostClocks {
    /// Reads them: the tightest of a few readings, so that the clocks belong to one moment.
    pub fn read(boot_id: Option<[u8; 16]>) -> Self {
        let reading = || {
            let before = rdtsc();
            let boottime_ns = clock_ns(libc::CLOCK_BOOTTIME);
            let realtime_ns = clock_ns(libc::CLOCK_REALTIME);
            let width = rdtsc().wrapping_sub(before);
            (width, Self { boot_id, boottime_ns, realtime_ns, tsc: before.wrapping_add(width / 2) })
        };
        let best = (0..5).map(|_| reading()).min_by_key(|(width, _)| *width);
        best.expect("five readings").1
    }
}

/// How a guest's clocks continue on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimePlan {
    choice: GuestTime,
    saved: HostClocks,
    now: HostClocks,
    source_tsc_khz: u32,
    elapsed_ns: u64,
    source_ahead_ns: u64,
}

impl TimePlan {
    /// The plan for a guest saved at `saved`, on a host whose TSC runs at `source_tsc_khz`, restored now.
    pub fn new(choice: GuestTime, saved: HostClocks, source_tsc_khz: u32, boot_id: Option<[u8; 16]>) -> Self {
        Self::at(choice, saved, source_tsc_khz, HostClocks::read(boot_id))
    }

    fn at(choice: GuestTime, saved: HostClocks, source_tsc_khz: u32, now: HostClocks) -> Self {
        let (then_ns, now_ns) = match same_host(&saved, &now) {
            true => (saved.boottime_ns, now.boottime_ns),
            false => (saved.realtime_ns, now.realtime_ns),
        };
        let elapsed_ns = now_ns.saturating_sub(then_ns);
        let source_ahead_ns = then_ns.saturating_sub(now_ns);
        if source_ahead_ns > 0 {
            tracing::warn!(source_ahead_ns, "the source's wall clock is ahead: guest time does not advance");
        }
        Self { choice, saved, now, source_tsc_khz, elapsed_ns, source_ahead_ns }
    }

    /// What was chosen.
    pub fn choice(&self) -> GuestTime {
        self.choice
    }

    /// Whether source and destination are one host, whose clocks went on: then [`TimePlan::elapsed`] is exact.
    /// Between two hosts it is off by what their wall clocks differ, and the guest's clock with it.
    pub fn same_host(&self) -> bool {
        same_host(&self.saved, &self.now)
    }

    /// By how much the guest's clocks were moved forward.
    pub fn advanced(&self) -> Duration {
        match self.choice {
            GuestTime::Advance => self.elapsed(),
            GuestTime::Stop => Duration::ZERO,
        }
    }

    /// How much time passed from save to restore by the clocks both hosts share: CLOCK_BOOTTIME on one host,
    /// the wall clocks on two.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.elapsed_ns)
    }

    /// By how much the source's wall clock was ahead of this host's at least: more than zero when it showed
    /// a later time at the save than this host at the restore.
    pub fn source_ahead(&self) -> Duration {
        Duration::from_nanos(self.source_ahead_ns)
    }

    /// The kvmclock that continues `saved_ns`, for KVM_SET_CLOCK right now.
    pub(crate) fn kvmclock_ns(&self, saved_ns: u64) -> u64 {
        match self.choice {
            GuestTime::Stop => saved_ns,
            GuestTime::Advance => {
                let since_plan = clock_ns(libc::CLOCK_BOOTTIME).saturating_sub(self.now.boottime_ns);
                saved_ns.saturating_add(self.elapsed_ns).saturating_add(since_plan)
            }
        }
    }

    /// What to add to the offset of each vCPU's TSC, of frequency `guest_khz` on this host of `host_khz`.
    pub(crate) fn tsc_shift(&self, guest_khz: u32, host_khz: u32) -> u64 {
        // On one host the counter simply went on.
        if self.choice == GuestTime::Advance && same_host(&self.saved, &self.now) {
            return 0;
        }
        let elapsed_ns = match self.choice {
            GuestTime::Advance => self.elapsed_ns,
            GuestTime::Stop => 0,
        };
        let elapsed = u128::from(elapsed_ns) * u128::from(guest_khz) / 1_000_000;
        scaled(self.saved.tsc, guest_khz, self.source_tsc_khz)
            .wrapping_add(elapsed as u64)
            .wrapping_sub(scaled(self.now.tsc, guest_khz, host_khz))
    }
}

/// The kernel's default `tsc_tolerance_ppm`: within it KVM gives the guest the host's frequency unscaled.
const TOLERANCE_PPM: u64 = 250;

/// Whether KVM runs a guest of `guest_khz` unscaled on a host of `host_khz` (kvm_set_tsc_khz in
/// arch/x86/kvm/x86.c).
pub(crate) fn within_tolerance(guest_khz: u32, host_khz: u32) -> bool {
    u64::from(guest_khz.abs_diff(host_khz)) * 1_000_000 <= u64::from(host_khz) * TOLERANCE_PPM
}

/// The host's TSC in units of the guest's.
pub(crate) fn scaled(tsc: u64, guest_khz: u32, host_khz: u32) -> u64 {
    if host_khz == 0 || within_tolerance(guest_khz, host_khz) {
        return tsc;
    }
    // Reduced to 64 bits as the kernel's kvm_scale_tsc does.
    (u128::from(tsc) * u128::from(guest_khz) / u128::from(host_khz)) as u64
}

fn same_host(a: &HostClocks, b: &HostClocks) -> bool {
    a.boot_id.is_some() && a.boot_id == b.boot_id
}

/// This kernel's boot id.
///
/// # Errors
/// [`KvmError::DoesNotFit`] when the kernel gives none in the usual form.
pub fn boot_id() -> Result<[u8; 16], KvmError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let odd = |why: String| KvmError::DoesNotFit { why: format!("{path}: {why}") };
    let text = std::fs::read_to_string(path).map_err(|e| odd(e.to_string()))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    let value = u128::from_str_radix(&digits, 16).map_err(|e| odd(e.to_string()))?;
    Ok(value.to_be_bytes())
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec; both clocks used here exist on every Linux that has KVM.
    unsafe { libc::clock_gettime(clock, &mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

pub(crate) fn rdtsc() -> u64 {
    // SAFETY: RDTSC is there on every x86-64.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 2_000_000;

    fn clocks(boot: u8, boottime_ns: u64, realtime_ns: u64, tsc: u64) -> HostClocks {
        HostClocks { boot_id: Some([boot; 16]), boottime_ns, realtime_ns, tsc }
    }

    #[test]
    fn on_one_host_an_advancing_tsc_keeps_its_offset() {
        let plan = TimePlan::at(GuestTime::Advance, clocks(1, 100, 7, 1000), KHZ, clocks(1, 900, 3, 2600));
        assert_eq!((plan.tsc_shift(KHZ, KHZ), plan.elapsed()), (0, Duration::from_nanos(800)));
        assert!(plan.kvmclock_ns(50) >= 850);
    }

    #[test]
    fn a_standing_tsc_loses_exactly_what_the_host_counted() {
        let plan = TimePlan::at(GuestTime::Stop, clocks(1, 100, 7, 1000), KHZ, clocks(1, 900, 3, 2600));
        assert_eq!(plan.tsc_shift(KHZ, KHZ), 1600u64.wrapping_neg());
        assert_eq!(plan.kvmclock_ns(50), 50);
    }

    #[test]
    fn on_another_host_the_guest_tsc_advances_by_the_wall_clocks() {
        let saved = clocks(1, 100, 1_000_000, 5_000_000);
        let plan = TimePlan::at(GuestTime::Advance, saved, KHZ, clocks(2, 3, 3_000_000, 40));
        let (offset, passed) = (70u64, 2_000_000 * u64::from(KHZ) / 1_000_000);
        let guest_then = saved.tsc + offset;
        let guest_now = 40u64.wrapping_add(offset).wrapping_add(plan.tsc_shift(KHZ, KHZ));
        assert_eq!(guest_now - guest_then, passed);
    }

    #[test]
    fn on_a_host_of_another_frequency_the_guest_counts_on_at_its_own() {
        let saved = clocks(1, 0, 0, 8_000_000);
        let plan = TimePlan::at(GuestTime::Advance, saved, KHZ, clocks(2, 0, 1_000_000, 3_000_000));
        // This host counts 3 GHz: KVM scales 3,000,000 to 2,000,000 of the guest's.
        let guest_now = 2_000_000u64.wrapping_add(plan.tsc_shift(KHZ, 3_000_000));
        assert_eq!(guest_now, 8_000_000 + 2_000_000);
    }

    #[test]
    fn a_source_whose_wall_clock_is_ahead_is_reported_and_time_never_runs_back() {
        let plan = TimePlan::at(GuestTime::Advance, clocks(1, 0, 900, 0), KHZ, clocks(2, 0, 400, 0));
        assert_eq!((plan.elapsed(), plan.source_ahead()), (Duration::ZERO, Duration::from_nanos(500)));
        assert!(plan.kvmclock_ns(50) >= 50);
    }

    #[test]
    fn a_choice_is_read_as_it_was_sent_and_an_unknown_one_is_refused() {
        for choice in [GuestTime::Advance, GuestTime::Stop] {
            assert_eq!(GuestTime::from_section(&choice.to_section()).unwrap(), choice);
        }
        assert_eq!(GuestTime::Stop.to_section().body, [1, 0, 0, 0], "as version 1 has it");
        let third = Section { body: mig::body::encode(&2u32), ..GuestTime::Stop.to_section() };
        assert!(matches!(GuestTime::from_section(&third), Err(KvmError::Section(_))));
    }

    #[test]
    fn hosts_without_a_boot_id_are_not_one_host() {
        let nameless = |ns| HostClocks { boot_id: None, ..clocks(0, ns, ns, ns) };
        let plan = TimePlan::at(GuestTime::Advance, nameless(10), KHZ, nameless(1_000_010));
        assert_ne!(plan.tsc_shift(KHZ, KHZ), 0);
    }

    #[test]
    fn the_boot_id_is_that_of_this_kernel() {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let digits: String = boot_id().unwrap().iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digits, text.trim().replace('-', ""));
    }
}
