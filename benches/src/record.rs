//! Raw results: a JSON object a line, for every run, whatever became of it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::host::Host;
use crate::migration::Moved;
use crate::sets::cap::Capped;
use crate::sets::instructions::Counted;
use crate::yardstick::Copied;

/// What tells the runs of a set apart, by name.
pub type Cell = BTreeMap<String, String>;

/// A cell of these names and values.
pub fn cell<const N: usize>(pairs: [(&str, String); N]) -> Cell {
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// What became of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// A guest moved.
    Moved(Box<Moved>),
    /// A guest was left where it was, as its policy says.
    Stayed(Box<Moved>),
    /// A guest moved under a cap, and what left its host was watched.
    Capped(Box<Capped>),
    /// Bytes were copied.
    Copied(Copied),
    /// Instructions and calls were counted.
    Counted(Counted),
    /// Neither.
    Failed(String),
}

/// A run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The set it belongs to.
    pub set: String,
    /// What was measured.
    pub cell: Cell,
    /// `migration`, or which yardstick.
    pub what: String,
    /// Its number; 0 is the warm-up, which does not count.
    pub run: u32,
    /// What became of it.
    pub outcome: Outcome,
}

/// A line of raw results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// What follows was measured on this host.
    Host(Host),
    /// A run.
    Run(Run),
}

/// The file of raw results in a directory.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    file: File,
}

impl Store {
    /// Opens it, behind what is there.
    ///
    /// # Errors
    /// The directory or the file cannot be written.
    pub fn open(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
        let path = directory.join("raw.jsonl");
        let file = OpenOptions::new().create(true).append(true).open(&path);
        Ok(Self { file: file.with_context(|| path.display().to_string())?, path })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn add(&mut self, line: &Line) -> Result<()> {
        let text = serde_json::to_string(line)? + "\n";
        self.file.write_all(text.as_bytes()).with_context(|| self.path.display().to_string())
    }
}

/// What a report is made of: of each set the runs of the last session that measured it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Results {
    /// Each session's host, with the names of the sets whose runs are its.
    pub hosts: Vec<(Host, Vec<String>)>,
    /// The runs.
    pub runs: Vec<Run>,
}

impl Results {
    /// Reads raw results.
    ///
    /// # Errors
    /// The file cannot be read, or a line is none of raw results.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("raw.jsonl");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let parse = |(number, line)| {
            serde_json::from_str(line).with_context(|| format!("{}, line {}", path.display(), number + 1))
        };
        Ok(Self::of(text.lines().enumerate().map(parse).collect::<Result<_>>()?))
    }

    fn of(lines: Vec<Line>) -> Self {
        let mut hosts = Vec::new();
        let mut sessions: BTreeMap<String, usize> = BTreeMap::new();
        let mut runs = Vec::new();
        for line in lines {
            match line {
                Line::Host(host) => hosts.push((host, Vec::new())),
                Line::Run(run) => {
                    sessions.insert(run.set.clone(), hosts.len());
                    runs.push((hosts.len(), run));
                }
            }
        }
        runs.retain(|(session, run)| sessions[&run.set] == *session);
        for (set, session) in sessions {
            if let Some((_, sets)) = session.checked_sub(1).and_then(|at| hosts.get_mut(at)) {
                sets.push(set);
            }
        }
        Self { hosts, runs: runs.into_iter().map(|(_, run)| run).collect() }
    }

    /// The runs of a set that count, and those that failed.
    pub fn set<'a>(&'a self, set: &'a str) -> impl Iterator<Item = &'a Run> + Clone {
        self.runs.iter().filter(move |run| run.set == set && run.run > 0)
    }

    /// The cells of a set, in the order in which they were measured first.
    pub fn cells(&self, set: &str) -> Vec<&Cell> {
        let mut cells = Vec::new();
        for run in self.runs.iter().filter(|run| run.set == set) {
            if !cells.contains(&&run.cell) {
                cells.push(&run.cell);
            }
        }
        cells
    }

    /// The migrations of a cell that moved a guest.
    pub fn moved<'a>(
        &'a self,
        set: &'a str,
        cell: &'a Cell,
    ) -> impl Iterator<Item = (u32, &'a Moved)> + Clone {
        self.set(set).filter(move |run| run.cell == *cell).filter_map(|run| match &run.outcome {
            Outcome::Moved(moved) => Some((run.run, &**moved)),
            _ => None,
        })
    }

    /// The migrations of a cell that ended as their policy says: that moved a guest, or left it where it was.
    pub fn ended<'a>(
        &'a self,
        set: &'a str,
        cell: &'a Cell,
    ) -> impl Iterator<Item = (u32, &'a Moved)> + Clone {
        self.set(set).filter(move |run| run.cell == *cell).filter_map(|run| match &run.outcome {
            Outcome::Moved(moved) | Outcome::Stayed(moved) => Some((run.run, &**moved)),
            _ => None,
        })
    }

    /// The copies of a cell over one yardstick.
    pub fn copied<'a>(
        &'a self,
        set: &'a str,
        cell: &'a Cell,
        what: &'a str,
    ) -> impl Iterator<Item = (u32, &'a Copied)> + Clone {
        self.set(set).filter(move |run| run.cell == *cell && run.what == what).filter_map(|run| {
            match &run.outcome {
                Outcome::Copied(copied) => Some((run.run, copied)),
                _ => None,
            }
        })
    }

    /// A paragraph on the runs of a set that failed; nothing if none did.
    pub fn failures(&self, set: &str) -> String {
        let failed: Vec<String> = self
            .runs
            .iter()
            .filter(|run| run.set == set)
            .filter_map(|run| match &run.outcome {
                Outcome::Failed(cause) => {
                    let warm_up = if run.run == 0 { " (warm-up)" } else { "" };
                    Some(format!("- {} {}, run {}{warm_up}: {cause}\n", run.what, label(&run.cell), run.run))
                }
                _ => None,
            })
            .collect();
        if failed.is_empty() {
            String::new()
        } else {
            format!("**Failed: {}**\n\n{}\n", failed.len(), failed.concat())
        }
    }
}

/// A cell in words.
pub fn label(cell: &Cell) -> String {
    cell.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(set: &str, run: u32) -> Line {
        let outcome = Outcome::Failed(format!("{set} {run}"));
        Line::Run(Run {
            set: set.into(),
            cell: cell([("n", "1".into())]),
            what: "migration".into(),
            run,
            outcome,
        })
    }

    #[test]
    fn a_set_that_was_measured_again_counts_from_its_last_session() {
        let host = |date: &str| Line::Host(Host { date: date.into(), ..Host::here() });
        let lines = vec![host("1"), run("a", 0), run("a", 1), run("b", 1), host("2"), run("a", 2)];
        let results = Results::of(lines);
        assert_eq!(results.runs.iter().map(|r| (&*r.set, r.run)).collect::<Vec<_>>(), [("b", 1), ("a", 2)]);
        let sets: Vec<_> = results.hosts.iter().map(|(host, sets)| (&*host.date, sets.concat())).collect();
        assert_eq!(sets, [("1", "b".to_owned()), ("2", "a".to_owned())]);
    }

    #[test]
    fn failures_are_told_and_warm_ups_do_not_count() {
        let results = Results::of(vec![run("a", 0), run("a", 1)]);
        assert_eq!(results.set("a").count(), 1);
        let told = results.failures("a");
        assert!(
            told.starts_with("**Failed: 2**") && told.contains("- migration n=1, run 0 (warm-up): a 0"),
            "{told}"
        );
        assert_eq!(results.failures("b"), "");
    }

    #[test]
    fn lines_are_read_back_as_they_were_written() {
        let line = run("a", 1);
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(
            text,
            r#"{"run":{"set":"a","cell":{"n":"1"},"what":"migration","run":1,"outcome":{"failed":"a 1"}}}"#
        );
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
        let directory = tempfile::tempdir().unwrap();
        Store::open(directory.path()).unwrap().add(&line).unwrap();
        Store::open(directory.path()).unwrap().add(&run("b", 1)).unwrap();
        assert_eq!(Results::read(directory.path()).unwrap().runs.len(), 2);
    }
}
