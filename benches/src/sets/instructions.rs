//! Instructions and system calls of the page path: counts, which do not depend on how busy the host is.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use super::{Bench, Set};
use crate::record::Results;

/// The set.
pub const SET: Set = Set {
    name: NAME,
    about: "instructions a page and system calls a GiB of the send and receive paths, counted by valgrind and strace \
            on a guest without KVM",
    runs: 1,
    measure,
    render,
};

const NAME: &str = "instructions";

/// What was counted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Counted {
    /// By side, `source` or `destination`: instructions of user space a page.
    pub instructions_per_page: BTreeMap<String, f64>,
}

impl Counted {
    /// For whoever watches.
    pub fn in_short(&self) -> String {
        format!("{:?}", self.instructions_per_page)
    }
}

fn measure(_: &mut Bench) -> Result<()> {
    Ok(())
}

fn render(_: &Results, _: &Path) -> Result<String> {
    Ok(String::new())
}
