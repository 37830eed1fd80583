//! A list whose nodes lie in shuffled order, walked by its pointers, with a checksum in each node; values and links
//! are changed all the time.

use std::time::Duration;

use crate::duty::Check;
use crate::random::{Random, checksum, mix};
use crate::report::{Count, Fault, Report};

/// Nodes that a step visits.
const VISITED: usize = 1024;

struct Node {
    seq: u64,
    value: u64,
    check: u64,
    next: Option<Box<Node>>,
    _other_cache_line: [u64; 4],
}

impl Node {
    fn set(&mut self, value: u64) {
        self.value = value;
        self.check = checksum(&[self.seq, value]);
    }
}

/// Nodes at the front were visited longest ago.
pub(crate) struct Heap {
    front: Option<Box<Node>>,
    /// Visited in the walk that goes on, in reverse.
    visited: Option<Box<Node>>,
    /// Sums over all nodes, kept outside of them.
    nodes: u64,
    values: u64,
    /// The same as found in this walk.
    found_nodes: u64,
    found_values: u64,
}

impl Heap {
    pub(crate) const NODE_BYTES: usize = size_of::<Node>();

    pub(crate) fn new(nodes: usize) -> Self {
        let mut random = Random::new(nodes as u64);
        let mut boxes: Vec<Box<Node>> = (0..nodes as u64)
            .map(|_| Box::new(Node { seq: 0, value: 0, check: 0, next: None, _other_cache_line: [0; 4] }))
            .collect();
        // Fisher-Yates, so that links lead all over the memory.
        for i in (1..boxes.len()).rev() {
            boxes.swap(i, random.below(i + 1));
        }
        let mut heap = Self {
            front: None,
            visited: None,
            nodes: nodes as u64,
            values: 0,
            found_nodes: 0,
            found_values: 0,
        };
        for (mut node, seq) in boxes.into_iter().zip(0..) {
            node.seq = seq;
            node.set(mix(seq));
            heap.values = heap.values.wrapping_add(node.value);
            node.next = heap.front.take();
            heap.front = Some(node);
        }
        heap
    }

    /// Moves the first node over to the visited ones and changes it; false at the end of the list.
    fn visit(&mut self) -> Result<bool, Fault> {
        let Some(mut node) = self.front.take() else { return Ok(false) };
        self.front = node.next.take();
        let right = checksum(&[node.seq, node.value]);
        let found = node.check;
        let (seq, value) = (node.seq, node.value);
        self.found_nodes += 1;
        self.found_values = self.found_values.wrapping_add(value);
        node.set(mix(value));
        self.values = self.values.wrapping_sub(value).wrapping_add(node.value);
        self.found_values = self.found_values.wrapping_sub(value).wrapping_add(node.value);
        node.next = self.visited.take();
        self.visited = Some(node);
        if found == right {
            return Ok(true);
        }
        let expected = format!("checksum {right:#x} of node {seq} with value {value:#x}");
        Err(Fault::new("checksum of a heap node", expected, format!("{found:#x}")))
    }

    /// A walk is over: the next one goes the other way.
    fn turn(&mut self) -> Result<(), Fault> {
        self.front = self.visited.take();
        let expected = (self.nodes, self.values);
        let found = (self.found_nodes, self.found_values);
        // After an error, what there is counts.
        (self.nodes, self.values) = found;
        (self.found_nodes, self.found_values) = (0, 0);
        if expected == found {
            return Ok(());
        }
        let text = |(nodes, values): (u64, u64)| format!("{nodes} nodes whose values add up to {values:#x}");
        Err(Fault::new("walk over the heap", text(expected), text(found)))
    }
}

impl Check for Heap {
    const NAME: &'static str = "heap";
    const PERIOD: Duration = Duration::from_millis(400);

    fn step(&mut self, report: &Report) -> Result<(), Fault> {
        let mut result = Ok(());
        for _ in 0..VISITED {
            match self.visit() {
                Ok(true) => report.checked(Count::Nodes, 1),
                Ok(false) => return result.and(self.turn()),
                Err(fault) => result = result.and(Err(fault)),
            }
        }
        result
    }
}

impl Drop for Heap {
    /// One by one: the nodes' own way is recursion.
    fn drop(&mut self) {
        for list in [&mut self.front, &mut self.visited] {
            while let Some(mut node) = list.take() {
                *list = node.next.take();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: usize = 3000;

    fn walk(heap: &mut Heap) -> Vec<Fault> {
        let report = Report::new(Duration::from_secs(5));
        (0..NODES / VISITED + 1).filter_map(|_| heap.step(&report).err()).collect()
    }

    #[test]
    fn walks_find_nothing_wrong_in_a_heap_that_is_right() {
        let mut heap = Heap::new(NODES);
        for _ in 0..5 {
            assert_eq!(walk(&mut heap), []);
        }
        assert_eq!(heap.nodes, NODES as u64);
    }

    #[test]
    fn a_changed_value_is_found() {
        let mut heap = Heap::new(NODES);
        let mut node = heap.front.as_mut().unwrap();
        for _ in 0..100 {
            node = node.next.as_mut().unwrap();
        }
        node.value ^= 4;
        let faults = walk(&mut heap);
        assert_eq!(faults[0].what, "checksum of a heap node");
    }

    #[test]
    fn a_node_as_it_was_before_is_found_although_its_checksum_is_right() {
        let mut heap = Heap::new(NODES);
        let node = heap.front.as_ref().unwrap();
        let (seq, value) = (node.seq, node.value);
        assert_eq!(walk(&mut heap), []);
        let mut node = heap.front.as_mut().unwrap();
        while node.seq != seq {
            node = node.next.as_mut().unwrap();
        }
        node.set(value);
        let faults = walk(&mut heap);
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert_eq!(faults[0].what, "walk over the heap");
        assert_eq!(walk(&mut heap), []);
    }

    #[test]
    fn lost_nodes_are_found() {
        let mut heap = Heap::new(NODES);
        let second = heap.front.as_mut().unwrap().next.as_mut().unwrap();
        second.next = second.next.take().and_then(|mut lost| lost.next.take());
        let faults = walk(&mut heap);
        assert_eq!(faults.len(), 1, "{faults:?}");
        assert!(faults[0].found.starts_with("2999 nodes"), "{faults:?}");
    }
}
