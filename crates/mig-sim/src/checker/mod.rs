//! A model checker over the switchover: the very machines of `mig-core`, in every state of a small world.
//!
//! [`check`] visits all of it. See [`Config`] for what the world holds and [`Property`] for what must hold in
//! each of its states; [`Mutant`] puts in a mistake that must be found.

mod line;
mod machines;
mod possible;
mod property;
mod search;
mod state;
mod step;
mod world;

use std::collections::BTreeSet;
use std::fmt;

use search::Graph;
use state::State;
use step::Step;
use world::World;

/// What the world holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Config {
    /// Digests are compared, and may differ.
    pub verify: bool,
    /// A round may leave so much dirty that another one follows before the pause.
    pub more_rounds: bool,
    /// Who decides in doubt.
    pub arbiter: Arbiter,
    /// What an operator says.
    pub operator: Operator,
    /// How many questions of a source in doubt may go without an answer, or get one that says nothing.
    pub questions_in_vain: u8,
    /// A mistake.
    pub mutant: Option<Mutant>,
}

/// The arbiter of a world.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Arbiter {
    /// There is none.
    #[default]
    None,
    /// It always answers.
    Reliable,
    /// Any question to it and any answer may be lost.
    Unreliable,
}

/// What an operator says to sides in doubt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Operator {
    /// Nothing.
    #[default]
    Silent,
    /// `resume` only where the other side does not run the guest and will not unless he says so; `discard` only
    /// where the other side runs it, or where there is an arbiter.
    Truthful,
    /// Anything, at any moment.
    Anything,
}

/// What must hold in every state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Property {
    /// At most one side holds a live run permit; one that crashed holds none.
    TwoRun,
    /// A destination that said it never ran the guest and never will does not run it.
    PromiseBroken,
    /// A source that ends with `moved` gave the guest to a destination that ran it; one that ends with
    /// `still-here` runs it.
    EndsDoNotFit,
    /// Where both processes live, no resume failed and both machines have ended, somebody runs the guest.
    NobodyRuns,
    /// While both processes live it can all still end, with one side running the guest, without another fault.
    NeverEnds,
    /// Whatever has happened, an operator can end it.
    BeyondWords,
    /// Without an arbiter a guest in doubt can still come to run somewhere, by an operator's word if need be. (An
    /// arbiter holds to what it said also when the side it gave the guest to has died.)
    OutOfReach,
}

/// A mistake, made where the drivers meet the machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// When Commit cannot be written the source takes that for proof that it was not received.
    FailedSendMeansNotReceived,
    /// When anything fails after Commit the source runs the guest again.
    ResumeOnAnyError,
    /// The destination answers `Never` and does not give its copy up.
    NeverWithoutRevoking,
    /// The source takes `Unknown` for `Never`.
    UnknownTakenForNever,
    /// The destination's listener answers `Never` for a session that it does not know (any more).
    ForgottenMeansNever,
    /// A destination with a complete copy runs it when the source is gone.
    CompleteCopyRunsWhenTheSourceIsGone,
    /// The destination runs the guest although the arbiter gave it to the source.
    DestinationIgnoresDenied,
    /// The source asks the arbiter, the destination does not.
    ArbiterOnOneSide,
    /// A source that gives up before Commit runs the guest whatever the arbiter says.
    RunsOnUnclaimed,
    /// A source in doubt does not ask.
    NeverAsks,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Different states of the world.
    pub states: usize,
    /// Steps between them.
    pub transitions: u64,
    /// The longest of the shortest ways to a state, in steps.
    pub depth: u32,
    /// How the two sides ended together, in every state in which both had: `crashed` where they did.
    pub ends: BTreeSet<(&'static str, &'static str)>,
    /// Different states of the two machines, and transitions of theirs.
    pub machines: (usize, usize),
    /// The shortest way to a state that breaks a property.
    pub broken: Option<Trace>,
}

/// A way to a state that breaks a property.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// What is broken.
    pub property: Property,
    /// What happened, in words, each with who may run the guest after it (`S-`, `-D`, `SD`, `--`).
    pub steps: Vec<String>,
}

/// Visits every state, or all those up to the first that breaks a property.
pub fn check(config: &Config) -> Verdict {
    let mut world = World::new(*config);
    let graph = search::search(&mut world);
    let broken = graph.broken.or_else(|| out_of_reach(&world, &graph));
    let broken = broken.map(|(at, property)| {
        let holders = |state: State| {
            let mark = |permit, letter| if permit { letter } else { '-' };
            format!("{}{}", mark(state.source.permit, 'S'), mark(state.destination.permit, 'D'))
        };
        let tells =
            |(step, after): (Step, State)| format!("{}  {}", holders(after), step.tells(&world.machines));
        Trace { property, steps: graph.way_to(at).into_iter().map(tells).collect() }
    });
    Verdict {
        states: graph.states().len(),
        transitions: graph.transitions,
        depth: graph.depth,
        ends: graph.states().iter().filter_map(State::ends).collect(),
        machines: world.machines.seen(),
        broken,
    }
}

/// The first state from which something cannot be reached that must be.
fn out_of_reach(world: &World, graph: &Graph<World>) -> Option<(u32, Property)> {
    let config = world.config;
    let first = |reaches: Vec<bool>, must: &dyn Fn(&State) -> bool| {
        let at = graph.states().iter().zip(reaches).position(|(state, reaches)| !reaches && must(state))?;
        Some(at as u32)
    };
    let settles = graph.can_reach(step::NATURAL, State::is_settled);
    if let Some(at) = first(settles, &|state| !world.is_excused(state)) {
        return Some((at, Property::NeverEnds));
    }
    if config.operator == Operator::Silent {
        return None;
    }
    let ends = graph.can_reach(step::WITH_WORDS, State::all_over);
    if let Some(at) = first(ends, &|_| true) {
        return Some((at, Property::BeyondWords));
    }
    let runs = graph.can_reach(step::WITH_WORDS, |state| state.runners() == 1);
    let lost = first(runs, &|state| world.is_held(state)).filter(|_| config.arbiter == Arbiter::None);
    Some((lost?, Property::OutOfReach))
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { states, transitions, depth, machines: (kept, moves), .. } = self;
        write!(
            f,
            "{states} states, {transitions} steps, depth {depth}; of the machines {kept} states, {moves} transitions"
        )?;
        if let Some(Trace { property, steps }) = &self.broken {
            write!(f, "\n{property:?} after {} steps:", steps.len())?;
            for (number, step) in (1..).zip(steps) {
                write!(f, "\n  {number:>2}  {step}")?;
            }
        }
        Ok(())
    }
}
