//! Measures, and writes a report that a person can read: `report --help`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;
use mig_benches::child;
use mig_benches::host::Host;
use mig_benches::programs::Programs;
use mig_benches::record::{Line, Results, Store};
use mig_benches::sets::{self, Bench, Set};

/// Measure live migrations on this machine, and write DIR/report.md, DIR/*.svg and every run's raw result in
/// DIR/raw.jsonl.
#[derive(Debug, Parser)]
#[command(after_help = after_help())]
struct Options {
    /// The sets to measure [default: all]
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    only: Vec<String>,
    /// Runs of each case, after one that does not count [default: as listed]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: Option<u32>,
    /// Less of everything, with small guests: to see whether it works, not for figures
    #[arg(long)]
    quick: bool,
    /// Where to write; results that are there are kept, and a set that is measured again replaces them in the
    /// report
    #[arg(long, value_name = "DIR", default_value = "target/report")]
    out: PathBuf,
    /// Measure nothing: write the report again from what is in DIR
    #[arg(long)]
    render: bool,
    /// Where mig-send and mig-recv are [default: beside this program, built first under cargo run]
    #[arg(long, value_name = "DIR")]
    programs: Option<PathBuf>,
    /// What the engine gives to one write, for the yardstick that does as it does
    #[arg(long, value_name = "BYTES", default_value_t = 2 << 20)]
    engine_call_bytes: usize,
    /// The socket buffers that the engine asks for, for the same [default: none]
    #[arg(long, value_name = "BYTES")]
    engine_buffer_bytes: Option<usize>,
}

fn after_help() -> String {
    let sets: Vec<String> =
        sets::ALL.iter().map(|set| format!("  {:<14}{} ({} runs)", set.name, set.about, set.runs)).collect();
    format!(
        "Sets:\n{}\n\nWhat the figures mean is in docs/benchmarks/README.md. Nothing else should run on the machine.",
        sets.join("\n")
    )
}

fn main() -> ExitCode {
    child::run_if_asked();
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let chosen = chosen(&options.only)?;
    if !options.render {
        let programs = Programs::find(options.programs.as_deref())?;
        let mut store = Store::open(&options.out)?;
        let host = Host::here();
        if host.is_busy() {
            eprintln!("the machine is busy (load {}): the figures will be worse than it can do", host.load);
        }
        store.add(&Line::Host(host))?;
        let mut bench = Bench::new(programs, store, options.out.clone());
        bench.quick = options.quick;
        bench.engine_call_bytes = options.engine_call_bytes;
        bench.engine_buffer_bytes = options.engine_buffer_bytes;
        for set in chosen {
            bench.measure(
                set,
                options.runs.unwrap_or(if options.quick { set.runs.min(2) } else { set.runs }),
            )?;
            write(options)?;
        }
    }
    write(options)?;
    eprintln!("{}", options.out.join("report.md").display());
    Ok(())
}

fn chosen(only: &[String]) -> Result<Vec<&'static Set>> {
    for name in only {
        if !sets::ALL.iter().any(|set| set.name == name) {
            let names: Vec<_> = sets::ALL.iter().map(|set| set.name).collect();
            bail!("there is no set {name}; there are {}", names.join(", "));
        }
    }
    Ok(sets::ALL.iter().filter(|set| only.is_empty() || only.iter().any(|name| name == set.name)).collect())
}

/// Writes the report from the raw results.
fn write(options: &Options) -> Result<()> {
    let results = Results::read(&options.out)?;
    let mut text = String::from("# Live migration, measured\n\n");
    for (host, sets) in results.hosts.iter().filter(|(_, sets)| !sets.is_empty()) {
        text += &format!("{}: {}.\n\n", sets.join(", "), host.describe());
    }
    text += "Minimum / median / maximum of the runs that count; what each figure means is in \
             docs/benchmarks/README.md, every run in raw.jsonl.\n\n";
    for set in &sets::ALL {
        if results.runs.iter().any(|run| run.set == set.name) {
            text += &format!("## {}\n\n{}.\n\n", set.name, set.about);
            text += &(set.render)(&results, &options.out)?;
        }
    }
    let path = options.out.join("report.md");
    std::fs::write(&path, text.trim_end().to_owned() + "\n").with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_are_chosen_by_name_and_others_are_refused() {
        let names = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|n| (*n).to_owned()).collect();
            chosen(&only).map(|sets| sets.iter().map(|s| s.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), sets::ALL.len());
        assert_eq!(names(&["budget", "wire"]).unwrap(), ["wire", "budget"]);
        assert!(names(&["speed"]).unwrap_err().to_string().contains("there are wire, untouched"));
    }

    #[test]
    fn the_help_names_every_set() {
        let help = <Options as clap::CommandFactory>::command().render_long_help().to_string();
        assert!(sets::ALL.iter().all(|set| help.contains(set.name)), "{help}");
    }
}
