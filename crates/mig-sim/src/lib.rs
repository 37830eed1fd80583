//! The engine in a simulated world: the very machines of `mig-core`, driven by a virtual clock and one seed.
//!
//! [`simulate`] draws a [`Scenario`] from a seed (guest, writer, tracker, links, costs, arbiter, operator, and
//! what goes wrong when), runs both machines against each other until nothing is left to happen, and checks
//! what must hold in every run:
//! - at most one side ever runs the guest, counted by the permits that are really spent;
//! - where the destination runs it, memory and state are those of the source at the pause;
//! - both sides end or are in doubt, and their ends fit together; nobody else waits for ever;
//! - a doubt ends once the link has healed, if neither side crashed: then exactly one copy runs;
//! - a complete copy is dropped on somebody's word only;
//! - a guest that stays runs, untracked, and a second attempt needs nothing from the first; what that may have
//!   left at a destination never runs;
//! - links, queues and machines hold no more than stated bounds at every step;
//! - the reported downtime is the one that passed.
//!
//! What goes wrong: links that are cut after any byte or frame, or at any step of a side, in one direction or
//! both, and heal or not; page channels that overtake each other; questions and answers that are late or lost;
//! an arbiter that cannot be asked for a while, whether it has decided or not; a crash of either side at any step
//! and between any two actions, with what is durable kept; failing actions, lost pages, senseless messages, words
//! of operators at the wrong moment, deadlines that pass although the peer lives, and a cancel at any moment.
//!
//! An operator's pause beside a migration is not among them: a guest that moves is lent to the engine for as long,
//! so there is nobody else who could pause it. A writer that rests for a while is.
//!
//! Nothing here depends on time, threads or the machine it runs on: a seed names a run.
#![forbid(unsafe_code)]

mod arbiter;
mod bounds;
pub mod checker;
mod destination;
mod guest;
mod judge;
mod link;
mod mishap;
mod mutant;
mod network;
mod operator;
mod permits;
mod queue;
mod random;
mod report;
mod scenario;
mod source;
mod strikes;
mod verdict;
mod world;
mod writer;

pub use mishap::{Blow, Last, Mishap, Work};
pub use mutant::Mutant;
pub use random::Random;
pub use scenario::Scenario;
pub use verdict::{DestinationEnd, SourceEnd, Summary, Violation};

use arbiter::Register;
use world::{Start, World};

/// Runs the scenario of a seed, and where the guest stayed, more attempts to move it, until one in which nothing
/// goes wrong moves it.
///
/// # Errors
/// The first [`Violation`] of what must hold.
pub fn simulate(seed: u64, mutant: Option<Mutant>, trace: bool) -> Result<Summary, Violation> {
    let mut random = Random::new(seed);
    let scenario = Scenario::draw(&mut random, mutant);
    let guest = guest::Guest::new(&scenario);
    let register = scenario.arbitrated.then(Register::default);
    let start = Start { guest, random, register, held: Vec::new(), attempt: 1 };
    let (mut summary, mut stayed) = attempt(scenario.clone(), start, trace)?;
    while let Some(mut start) = stayed {
        let again = summary.attempts == 1 && start.random.chance(50);
        let next = if again { scenario.with_other_mishaps(&mut start.random) } else { scenario.quiet() };
        let (end, left) = attempt(next, start, trace)?;
        if !again && end.source != SourceEnd::Moved {
            return Err(Violation::Ends(format!("with nothing going wrong, an attempt ended as {end:?}")));
        }
        (summary.attempts, stayed) = (summary.attempts + 1, left);
    }
    Ok(summary)
}

/// How it ended, and what another attempt starts with, where there can be one.
fn attempt(scenario: Scenario, start: Start, trace: bool) -> Result<(Summary, Option<Start>), Violation> {
    if trace {
        eprintln!("attempt {}: {scenario:#?}", start.attempt);
    }
    let mut world = World::new(scenario, start, trace);
    world.careless_words()?;
    world.run()?;
    let summary = world.judge()?;
    Ok((summary, world.guest_that_stayed()))
}
