//! Tests that belong to no single crate: see `tests/`.
