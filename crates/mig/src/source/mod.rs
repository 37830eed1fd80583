//! Moving a guest away: [`migrate`].

pub(crate) mod busy;
mod dial;
mod driver;
mod plan;
mod worker;

use std::sync::Arc;

use mig_core::pacing::Bandwidth;
use mig_core::policy::Policy;
use mig_core::progress::{OutcomeKind, Report};
use mig_core::{Blame, Fault, Side, Step};

use crate::arbiter::Arbiter;
use crate::control::Control;
use crate::encoding::Compress;
use crate::guest::SourceVm;
use crate::observe::Observer;
use crate::transport::Address;

pub(crate) use plan::channel_of;

/// How to migrate.
#[derive(Clone, Default)]
pub struct SourceOptions {
    /// When to stop sending rounds.
    pub policy: Policy,
    /// Page channels, 1 to [`mig_wire::hello::MAX_CHANNELS`]; `None` for as many as both hosts have cores for.
    pub channels: Option<u16>,
    /// Whether pages are encoded, where the destination understands that.
    pub compress: Compress,
    /// What the source may keep of pages that it sent, over all channels, where it sends what changed of them; none for
    /// [an eighth of guest memory](SourceOptions::cache_bytes). Only what is used takes memory, and with
    /// [`Compress::Auto`] little of it before that pays.
    pub delta_cache_bytes: Option<u64>,
    /// What they may take of the link together.
    pub bandwidth: Bandwidth,
    /// Compare digests of all memory before the guest is committed. Both sides read all of it in the pause.
    pub verify: bool,
    /// Who decides in doubt. The destination must use the same one, or none where this is none; it costs the
    /// pause one [`Arbiter::claim`] there; one that fails in its last round, one here before the guest runs on.
    pub arbiter: Option<Arc<dyn Arbiter>>,
}

impl std::fmt::Debug for SourceOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { policy, channels, compress, delta_cache_bytes, bandwidth, verify, arbiter } = self;
        let arbiter = arbiter.as_ref().map(|arbiter| arbiter.identity());
        f.debug_struct("SourceOptions")
            .field("policy", policy)
            .field("channels", channels)
            .field("compress", compress)
            .field("delta_cache_bytes", delta_cache_bytes)
            .field("bandwidth", bandwidth)
            .field("verify", verify)
            .field("arbiter", &arbiter)
            .finish()
    }
}

impl SourceOptions {
    /// What the source of a guest of `ram_bytes` may keep of pages that it sent.
    ///
    /// By itself an eighth of the guest's memory, since a cache smaller than the working set helps with a part of it
    /// only; at least 64 MiB, which every host can spare while it moves a guest away, and at most 1 GiB.
    pub fn cache_bytes(&self, ram_bytes: u64) -> u64 {
        self.delta_cache_bytes.unwrap_or((ram_bytes / 8).clamp(64 << 20, 1 << 30)).min(ram_bytes)
    }
}

/// How a migration ended, with the guest where it is to be found here.
#[derive(Debug)]
#[must_use]
pub enum Outcome<V> {
    /// It runs on the destination; here it is gone.
    Moved(Report),
    /// It runs here; the report's `fault` says why.
    StillHere {
        /// The guest: running, unless resuming it is what failed ([`Step::Resume`]).
        vm: V,
        /// How it went.
        report: Report,
    },
    /// It was in doubt, and an operator said that the destination runs it; here it is gone.
    Discarded(Report),
}

/// Moves a running guest to the receiver at `to`.
///
/// Blocks until it is over. `observer` is told of each step on this thread; `control` ends it from any other,
/// with the guest still here, unless it has been committed.
///
/// Where the link is lost after the guest was committed, nobody here knows whether the destination runs it.
/// Then this call stays: it holds the guest paused, tells [`Progress::InDoubt`], and asks the destination, on
/// new connections, until that has answered, the arbiter has decided, or [`Control::resolve`] was called.
///
/// [`Progress::InDoubt`]: crate::observe::Progress::InDoubt
pub fn migrate<V: SourceVm>(
    mut vm: V,
    to: &Address,
    options: &SourceOptions,
    control: &Control,
    observer: &dyn Observer,
) -> Outcome<V> {
    let report = driver::run(&mut vm, to, options, control, observer);
    match report.outcome {
        OutcomeKind::Moved => Outcome::Moved(report),
        OutcomeKind::StillHere => Outcome::StillHere { vm, report },
        OutcomeKind::Discarded => Outcome::Discarded(report),
    }
}

/// A failure of this host's own.
fn local(step: Step, error: impl std::fmt::Display) -> Fault {
    Fault::new(Side::Source, step, Blame::Local, error.to_string())
}
