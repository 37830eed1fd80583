//! Breadth-first search of a finite model, to its end: every state that can be reached is visited once.
//!
//! Invariants: states are told apart by equality, never by a hash alone, so that none is taken for another;
//! the way to a state is a shortest one; the search ends with the first broken property or with every state.
//! `stateright` (0.31) was weighed and left out: it keeps 64-bit fingerprints in place of states, its `eventually`
//! overlooks joins and cycles (its own source says so), and it brings a web server that has no switch. Given the
//! same model it visits the same states and takes the same steps, to the last one.

use std::collections::HashMap;
use std::hash::Hash;

/// What is searched.
pub(super) trait Model {
    /// A state of the world, small: all of them are kept.
    type State: Copy + Eq + Hash;
    /// What leads from one to the next.
    type Step: Copy;
    /// What a state may break.
    type Property: Copy;

    /// Where it starts.
    fn start(&mut self) -> Self::State;
    /// Everything that can happen in a state, each with the state after it.
    fn steps(&mut self, state: &Self::State, steps: &mut Vec<(Self::Step, Self::State)>);
    /// The property that a state breaks, if it does.
    fn broken(&self, state: &Self::State) -> Option<Self::Property>;
    /// Whether a step belongs to the graph that is kept for [`Graph::can_reach`], and in which class.
    fn class(&self, step: &Self::Step) -> Option<u8>;
}

/// What was found.
pub(super) struct Graph<M: Model> {
    states: Vec<M::State>,
    /// For each state but the first the step that found it, and where from.
    found_by: Vec<Option<(u32, M::Step)>>,
    /// From, to, class.
    kept: Vec<(u32, u32, u8)>,
    /// Steps taken, those to known states included.
    pub(super) transitions: u64,
    /// The longest of the shortest ways to a state, in steps.
    pub(super) depth: u32,
    /// The first state that breaks a property.
    pub(super) broken: Option<(u32, M::Property)>,
}

/// Searches all of it, or until a property is broken.
pub(super) fn search<M: Model>(model: &mut M) -> Graph<M> {
    let start = model.start();
    let mut known = HashMap::from([(start, 0u32)]);
    let mut graph = Graph {
        states: vec![start],
        found_by: vec![None],
        kept: Vec::new(),
        transitions: 0,
        depth: 0,
        broken: model.broken(&start).map(|property| (0, property)),
    };
    let (mut at, mut end_of_depth, mut steps) = (0usize, 1usize, Vec::new());
    while at < graph.states.len() && graph.broken.is_none() {
        if at == end_of_depth {
            graph.depth += 1;
            end_of_depth = graph.states.len();
        }
        model.steps(&graph.states[at], &mut steps);
        graph.transitions += steps.len() as u64;
        for (step, state) in steps.drain(..) {
            let next = graph.states.len() as u32;
            let to = *known.entry(state).or_insert(next);
            if let Some(class) = model.class(&step) {
                graph.kept.push((at as u32, to, class));
            }
            if to == next {
                graph.states.push(state);
                graph.found_by.push(Some((at as u32, step)));
                if let (None, Some(property)) = (&graph.broken, model.broken(&state)) {
                    graph.broken = Some((next, property));
                }
            }
        }
        at += 1;
    }
    graph
}

impl<M: Model> Graph<M> {
    /// All states, in the order in which they were found.
    pub(super) fn states(&self) -> &[M::State] {
        &self.states
    }

    /// A shortest way to a state: each step, and the state after it.
    pub(super) fn way_to(&self, state: u32) -> Vec<(M::Step, M::State)> {
        let mut way = Vec::new();
        let mut at = state;
        while let Some((from, step)) = self.found_by[at as usize] {
            way.push((step, self.states[at as usize]));
            at = from;
        }
        way.reverse();
        way
    }

    /// For every state whether steps of classes up to `class` lead from it to one that is a goal.
    pub(super) fn can_reach(&self, class: u8, goal: impl Fn(&M::State) -> bool) -> Vec<bool> {
        let edges = || self.kept.iter().filter(|(_, _, of)| *of <= class);
        // the edges into each state, side by side
        let mut first = vec![0u32; self.states.len() + 1];
        edges().for_each(|(_, to, _)| first[*to as usize + 1] += 1);
        (1..first.len()).for_each(|i| first[i] += first[i - 1]);
        let (mut free, mut into) = (first.clone(), vec![0u32; first[self.states.len()] as usize]);
        for (from, to, _) in edges() {
            into[free[*to as usize] as usize] = *from;
            free[*to as usize] += 1;
        }
        let mut reaches: Vec<bool> = self.states.iter().map(goal).collect();
        let mut open: Vec<usize> = (0..reaches.len()).filter(|at| reaches[*at]).collect();
        while let Some(at) = open.pop() {
            for &from in &into[first[at] as usize..first[at + 1] as usize] {
                if !std::mem::replace(&mut reaches[from as usize], true) {
                    open.push(from as usize);
                }
            }
        }
        reaches
    }
}
