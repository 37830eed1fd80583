//! Instructions and system calls of the page path: counts, which do not depend on how busy the host is.
//!
//! The engine's own threads are counted, on both sides, as they move a guest without KVM over one channel. What a
//! page costs is the difference between a larger and a smaller guest, so that what is done once does not count.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::{Bench, Set};
use crate::callgrind;
use crate::child::{self, Role, Talking};
use crate::model::Content;
use crate::record::{Outcome, Results, cell};
use crate::text::{GIB, Table};

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
const SIDES: [&str; 2] = ["source", "destination"];
/// Pages of the smaller guest and of the larger one.
const PAGES: [u64; 2] = [16 << 10, 80 << 10];
/// What was counted before the page path was made fast, by content.
const BEFORE: &str = include_str!("instructions_before.json");

/// Counts by name, on each side.
type Counts = BTreeMap<String, BTreeMap<String, f64>>;

/// What was counted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Counted {
    /// By side and source file: instructions in user space a page.
    pub instructions_per_page: Counts,
    /// By side and name: system calls a GiB.
    pub calls_per_gib: Counts,
    /// Why something was not counted.
    pub missing: Vec<String>,
}

/// What was counted at another commit.
#[derive(Debug, Deserialize)]
struct Before {
    commit: String,
    contents: BTreeMap<String, Counted>,
}

impl Counted {
    /// For whoever watches.
    pub fn in_short(&self) -> String {
        let instructions = SIDES.map(|side| format!("{side} {:.0}", sum(&self.instructions_per_page, side)));
        let calls = SIDES.map(|side| format!("{side} {:.0}", sum(&self.calls_per_gib, side)));
        format!("instructions a page: {}; calls a GiB: {}", instructions.join(", "), calls.join(", "))
    }
}

fn sum(counts: &Counts, side: &str) -> f64 {
    counts.get(side).map_or(f64::NAN, |by_name| by_name.values().sum())
}

fn measure(bench: &mut Bench) -> Result<()> {
    for content in Content::ALL {
        let cell = cell([("pages", content.name().to_owned())]);
        for run in 1..=bench.runs {
            bench.run(&cell, "count", run, |_| count(content).map(Outcome::Counted))?;
        }
    }
    Ok(())
}

fn count(content: Content) -> Result<Counted> {
    let mut counted = Counted::default();
    match counts(content, instructions) {
        Ok([smaller, larger]) => {
            counted.instructions_per_page = each(&smaller, &larger, (PAGES[1] - PAGES[0]) as f64);
        }
        Err(error) => counted.missing.push(format!("instructions: {error:#}")),
    }
    match counts(content, calls) {
        Ok([smaller, larger]) => {
            counted.calls_per_gib = each(&smaller, &larger, ((PAGES[1] - PAGES[0]) * 4096) as f64 / GIB);
        }
        Err(error) => counted.missing.push(format!("calls: {error:#}")),
    }
    ensure!(counted.missing.len() < 2, "{}", counted.missing.join("; "));
    Ok(counted)
}

/// How a tool counts: its command, with the file or directory it is to write; and what is in that.
type Tool = (fn(&Path) -> Command, fn(&Path) -> Result<BTreeMap<String, u64>>);

fn counts(content: Content, tool: fn() -> Tool) -> Result<[BTreeMap<String, BTreeMap<String, u64>>; 2]> {
    let [smaller, larger] = PAGES.map(|pages| one(pages, content, tool()));
    Ok([smaller?, larger?])
}

/// Moves a guest, with both sides under a tool.
fn one(
    pages: u64,
    content: Content,
    (command, read): Tool,
) -> Result<BTreeMap<String, BTreeMap<String, u64>>> {
    let room = tempfile::tempdir()?;
    let within = |side: &str| {
        let directory = room.path().join(side);
        fs::create_dir(&directory).map(|()| directory)
    };
    let [here, there] = [within(SIDES[0])?, within(SIDES[1])?];
    let under = |directory: &Path| {
        let mut tool = command(directory);
        move |program: Command| {
            tool.arg(program.get_program());
            tool
        }
    };
    let mut destination = Talking::start(child::command(&Role::TakeModel, under(&there))?)?;
    let to: String = destination.hear().context("the destination does not start")?;
    let mut source = Talking::start(child::command(&Role::SendModel { pages, content }, under(&here))?)?;
    source.tell(&to)?;
    source.hear::<()>()?;
    source.wait()?;
    destination.wait()?;
    Ok(BTreeMap::from([(SIDES[0].to_owned(), read(&here)?), (SIDES[1].to_owned(), read(&there)?)]))
}

fn instructions() -> Tool {
    let command = |directory: &Path| {
        let mut valgrind = Command::new("valgrind");
        valgrind.args(["--quiet", "--tool=callgrind", "--separate-threads=yes"]);
        valgrind.arg(format!("--callgrind-out-file={}/out", directory.display()));
        valgrind
    };
    let read = |directory: &Path| {
        let mut sums = BTreeMap::new();
        for file in fs::read_dir(directory)? {
            let file = file?;
            // the first thread is not the engine's; a file without a thread's number has no costs
            let name = file.file_name().to_string_lossy().into_owned();
            if name.rsplit_once('-').is_some_and(|(_, thread)| thread != "01") {
                for (path, cost) in callgrind::by_file(&fs::read_to_string(file.path())?) {
                    *sums.entry(callgrind::short(&path)).or_default() += cost;
                }
            }
        }
        ensure!(!sums.is_empty(), "callgrind wrote nothing");
        Ok(sums)
    };
    (command, read)
}

fn calls() -> Tool {
    let command = |directory: &Path| {
        let mut strace = Command::new("strace");
        strace.args(["-f", "-c", "-U", "calls,name", "-o"]).arg(directory.join("out"));
        strace
    };
    let read = |directory: &Path| {
        let text = fs::read_to_string(directory.join("out"))?;
        let counts = parse_calls(&text);
        ensure!(!counts.is_empty(), "strace wrote nothing");
        Ok(counts)
    };
    (command, read)
}

/// Lines of `CALLS NAME`, between two rules.
fn parse_calls(text: &str) -> BTreeMap<String, u64> {
    let pairs = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
    });
    pairs.map(|(count, name): (u64, String)| (name, count)).filter(|(name, _)| name != "total").collect()
}

/// By how much the larger counts are larger, for each of `units`; what rounds to nothing is left out.
fn each(
    smaller: &BTreeMap<String, BTreeMap<String, u64>>,
    larger: &BTreeMap<String, BTreeMap<String, u64>>,
    units: f64,
) -> Counts {
    let of = |side: &String, by_name: &BTreeMap<String, u64>| {
        by_name
            .iter()
            .map(|(name, count)| {
                let before = smaller.get(side).and_then(|s| s.get(name)).copied().unwrap_or(0);
                (name.clone(), (*count as f64 - before as f64) / units)
            })
            .filter(|(_, count)| count.abs() >= 0.01)
            .collect()
    };
    larger.iter().map(|(side, by_name)| (side.clone(), of(side, by_name))).collect()
}

fn render(results: &Results, _: &Path) -> Result<String> {
    let before: Before = serde_json::from_str(BEFORE).context("instructions_before.json")?;
    let of_before = format!("at {}", before.commit);
    let mut table = Table::new(&[
        "pages",
        "side",
        "instructions a page",
        &of_before,
        "where",
        "calls a GiB",
        &of_before,
        "which",
    ]);
    let mut missing = String::new();
    for content in Content::ALL {
        let cell = cell([("pages", content.name().to_owned())]);
        let last = results.set(NAME).filter(|run| run.cell == cell).filter_map(|run| match &run.outcome {
            Outcome::Counted(counted) => Some(counted),
            _ => None,
        });
        let Some(now) = last.last() else { continue };
        let then = before.contents.get(content.name()).cloned().unwrap_or_default();
        for side in SIDES {
            table.row(&[
                content.name().to_owned(),
                side.to_owned(),
                number(sum(&now.instructions_per_page, side)),
                number(sum(&then.instructions_per_page, side)),
                most(&now.instructions_per_page, side),
                number(sum(&now.calls_per_gib, side)),
                number(sum(&then.calls_per_gib, side)),
                most(&now.calls_per_gib, side),
            ]);
        }
        missing.extend(now.missing.iter().map(|why| format!("- {}: {why}\n", content.name())));
    }
    if !missing.is_empty() {
        missing = format!("Not counted:\n\n{missing}\n");
    }
    Ok(results.failures(NAME) + &table.finish() + &missing)
}

fn number(value: f64) -> String {
    match value {
        _ if !value.is_finite() => "-".into(),
        _ if value.abs() < 10.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// The three largest, by name.
fn most(counts: &Counts, side: &str) -> String {
    let mut sorted: Vec<_> = counts.get(side).into_iter().flatten().collect();
    sorted.sort_by(|a, b| b.1.total_cmp(a.1));
    sorted
        .iter()
        .take(3)
        .map(|(name, count)| format!("{name} {}", number(**count)))
        .collect::<Vec<_>>()
        .join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_read_between_the_rules() {
        let text = "    calls syscall\n--------- ----------------\n       12 sendmsg\n        3 read\n--------- ----------------\n       15 total\n";
        assert_eq!(parse_calls(text), BTreeMap::from([("sendmsg".into(), 12), ("read".into(), 3)]));
    }

    #[test]
    fn what_is_done_once_does_not_count() {
        let of = |run: u64, once: u64| {
            let counts = BTreeMap::from([("run".to_owned(), run), ("once".to_owned(), once)]);
            BTreeMap::from([("source".to_owned(), counts)])
        };
        let each = each(&of(100, 7), &of(300, 7), 100.0);
        assert_eq!(each["source"], BTreeMap::from([("run".to_owned(), 2.0)]));
        assert_eq!((sum(&each, "source"), most(&each, "source")), (2.0, "run 2.00".to_owned()));
    }

    #[test]
    fn what_was_counted_before_can_be_read() {
        let before: Before = serde_json::from_str(BEFORE).unwrap();
        assert!(Content::ALL.iter().all(|c| before.contents.contains_key(c.name())), "{}", before.commit);
    }
}
