//! What the benches and the report share: the real programs as processes, a raw-socket copy as the yardstick,
//! and what becomes of the figures.
//!
//! `docs/benchmarks/README.md` says what each figure means.

pub mod callgrind;
pub mod child;
pub(crate) mod control;
pub mod estimate;
pub mod events;
#[cfg(test)]
pub(crate) mod examples;
pub mod host;
pub mod memory;
pub mod migration;
pub mod model;
pub mod netns;
pub mod plot;
pub mod process;
pub mod programs;
pub mod record;
pub mod sets;
pub mod speed;
pub mod spread;
pub mod text;
pub mod traffic;
pub mod warmth;
pub mod yardstick;
