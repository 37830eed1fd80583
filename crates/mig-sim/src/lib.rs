//! The engine in a simulated world: the very machines of `mig-core`, driven by a virtual clock and one seed.
//!
//! [`simulate`] draws a [`Scenario`] from a seed (guest, writer, tracker, links, costs, and what goes wrong
//! when), runs both machines against each other until nothing is left to happen, and checks what must hold
//! in every run:
//! - at most one side ever runs the guest, counted by the permits that are really spent;
//! - where the destination runs it, memory and state are those of the source at the pause;
//! - both sides end, and their ends fit together; nobody waits for ever;
//! - a guest that stays runs, untracked, and a second attempt needs nothing from the first;
//! - links, queues and machines hold no more than stated bounds at every step;
//! - the reported downtime is the one that passed.
//!
//! What goes wrong: links that are cut after any byte or frame, in one direction or both, and heal or not;
//! page channels that overtake each other; a crash of either side at any step and between any two actions;
//! failing actions, lost pages, senseless messages, deadlines that pass although the peer lives, and a
//! cancel at any moment. An operator's pause beside a migration is not among them: a guest that moves belongs to
//! the engine (`VmControl` is lent to it for as long), so there is nobody else who could pause it.
//!
//! Nothing here depends on time, threads or the machine it runs on: a seed names a run.
#![forbid(unsafe_code)]

mod bounds;
pub mod checker;
mod destination;
mod guest;
mod judge;
mod link;
mod mishap;
mod mutant;
mod network;
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

use world::World;

/// Runs the scenario of a seed, and a second attempt where the guest stayed.
///
/// # Errors
/// The first [`Violation`] of what must hold.
pub fn simulate(seed: u64, mutant: Option<Mutant>, trace: bool) -> Result<Summary, Violation> {
    let mut random = Random::new(seed);
    let scenario = Scenario::draw(&mut random, mutant);
    if trace {
        eprintln!("seed {seed}: {scenario:#?}");
    }
    let quiet = scenario.without_mishaps();
    let guest = guest::Guest::new(&scenario);
    let mut world = World::new(scenario, guest, random, trace);
    world.run()?;
    let mut summary = world.judge()?;
    if let Some((guest, random)) = world.guest_that_stayed() {
        let mut world = World::new(quiet, guest, random, trace);
        world.run()?;
        let second = world.judge()?;
        if second.source != SourceEnd::Moved {
            return Err(Violation::Ends(format!("a second attempt ended as {second:?}")));
        }
        summary.second_attempt = true;
    }
    Ok(summary)
}
