//! Callgrind's output, as far as it is read here: instructions by source file, each line's own.
//!
//! The format is in Valgrind's manual, "Callgrind Format Specification": cost lines are `POSITION COST`; what
//! follows a `calls=` line is the callee's, and not the line's own.

use std::collections::BTreeMap;

/// Instructions by source file, from one output file.
pub fn by_file(text: &str) -> BTreeMap<String, u64> {
    let mut names: BTreeMap<&str, &str> = BTreeMap::new();
    let mut sums: BTreeMap<String, u64> = BTreeMap::new();
    let mut file = "";
    let mut is_callees = false;
    for line in text.lines() {
        if let Some((key, value)) = line.split_once('=') {
            match key {
                // the file of a function, of what is inlined in it, and the former again
                "fl" | "fi" | "fe" => file = resolve(value, &mut names),
                // shares the numbers of the files (a callee's file)
                "cfi" | "cfl" => _ = resolve(value, &mut names),
                "calls" => is_callees = true,
                _ => {}
            }
        } else if line.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '+' | '-' | '*'))
            && !std::mem::take(&mut is_callees)
            && let Some(cost) = line.split_whitespace().nth(1).and_then(|cost| cost.parse::<u64>().ok())
        {
            *sums.entry(file.to_owned()).or_default() += cost;
        }
    }
    sums
}

/// `(1) name` names a number, `(1)` is that name again.
fn resolve<'a>(value: &'a str, names: &mut BTreeMap<&'a str, &'a str>) -> &'a str {
    match value.split_once(' ') {
        Some((number, name)) if number.starts_with('(') => {
            names.insert(number, name);
            name
        }
        _ => names.get(value).copied().unwrap_or(value),
    }
}

/// The end of a path that tells one file from others: what follows `crates/` or a `src`, or the name alone.
pub fn short(path: &str) -> String {
    if let Some((_, ours)) = path.rsplit_once("crates/") {
        return ours.replace("/src/", "/");
    }
    let parts: Vec<&str> = path.rsplit('/').take(3).collect();
    parts.into_iter().rev().collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
version: 1
events: Ir

fl=(1) /w/crates/mig/src/source/worker.rs
fn=(1) run
10 5
+2 7
cfi=(2) /w/crates/mig/src/memory.rs
cfn=(2) copy
calls=3 20
* 900
fi=(2)
30 11
fe=(1)
13 1

fl=(2)
fn=(2)
20 900

totals: 924
";

    #[test]
    fn a_files_own_instructions_are_summed_without_its_callees() {
        let sums = by_file(OUTPUT);
        assert_eq!(sums["/w/crates/mig/src/source/worker.rs"], 13);
        assert_eq!(sums["/w/crates/mig/src/memory.rs"], 911);
        assert_eq!(sums.values().sum::<u64>(), 924);
    }

    #[test]
    fn paths_are_short_and_still_tell_files_apart() {
        assert_eq!(short("/w/crates/mig/src/source/worker.rs"), "mig/source/worker.rs");
        assert_eq!(short("/rustc/abc/library/core/src/ptr/mod.rs"), "src/ptr/mod.rs");
        assert_eq!(short("???"), "???");
    }
}
