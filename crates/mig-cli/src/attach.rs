//! `mig-send --vm`: tells the holder of a guest to move it, and shows how that goes; or what to do with it, when
//! it is in doubt.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bandwidth::Cap;
use crate::control::{Answer, Client, Finished, Migrate, Request, Word};
use crate::estimate::{Estimate, Estimated, WATCHED};
use crate::event::{Event, Report};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Output;
use crate::signals::{Signal, on_signal};
use crate::units;

/// Asks the holder at `path`, and waits for the end.
///
/// # Errors
/// There is no holder: nothing was begun.
pub fn run(path: &Path, migrate: &Migrate, output: &Output) -> Result<Exit, Failure> {
    let mut client = Client::connect(path)?;
    cancel_on_interrupt(path.to_owned(), output.clone());
    let finished = client.ask(&Request::Migrate(migrate.clone()), |event| output.tell(event));
    Ok(match finished {
        Finished::Answered(answer) => conclude(&answer, output),
        Finished::Lost(failure) => {
            output.tell(Event::Error(failure));
            Exit::InDoubt
        }
    })
}

/// Gives the holder at `path` an operator's word on its guest in doubt, and waits until that was obeyed.
///
/// # Errors
/// There is no holder: nothing was done.
pub fn resolve(path: &Path, word: Word, output: &Output) -> Result<Exit, Failure> {
    tell(path, &Request::Resolve { word }, output, |answer| {
        let state: String = answer.member("state").unwrap_or_default();
        match word {
            Word::Resume => format!("resumed on your word; the guest is {state}"),
            Word::Discard => format!("discarded on your word; the holder is {state}"),
        }
    })
}

/// Has the holder at `path` cap the migration that runs, or lift its cap.
///
/// # Errors
/// There is no holder: nothing was done.
pub fn set_bandwidth(path: &Path, rate: Cap, output: &Output) -> Result<Exit, Failure> {
    tell(path, &Request::Bandwidth { rate }, output, |_| match rate.0 {
        Some(rate) => format!("the rounds take at most {} from now on", units::rate(rate)),
        None => "the rounds take what the link gives from now on".into(),
    })
}

/// Has the holder at `path` watch its guest, and shows what migrations would come to.
///
/// # Errors
/// There is no holder: nothing was done.
pub fn estimate(path: &Path, estimate: &Estimate, output: &Output) -> Result<Exit, Failure> {
    let mut client = Client::connect(path)?;
    output.note(format!("watching the guest for {} s", WATCHED.as_secs()));
    Ok(match client.ask(&Request::Estimate(estimate.clone()), |_| {}) {
        Finished::Answered(answer) => match answer.members::<Estimated>().filter(|_| answer.is_ok()) {
            Some(estimated) => {
                output.tell(Event::Estimate(estimated));
                Exit::Done
            }
            None => {
                output.tell(Event::Error(reason(&answer)));
                Exit::Failed
            }
        },
        Finished::Lost(failure) => {
            output.tell(Event::Error(failure));
            Exit::Failed
        }
    })
}

/// Asks for something that is answered once it is done, and says so in `words`.
fn tell(
    path: &Path,
    request: &Request,
    output: &Output,
    words: impl FnOnce(&Answer) -> String,
) -> Result<Exit, Failure> {
    let mut client = Client::connect(path)?;
    Ok(match client.ask(request, |_| {}) {
        Finished::Answered(answer) if answer.is_ok() => {
            output.note(words(&answer));
            Exit::Done
        }
        Finished::Answered(answer) => {
            output.tell(Event::Error(reason(&answer)));
            Exit::Failed
        }
        Finished::Lost(failure) => {
            output.tell(Event::Error(failure));
            Exit::InDoubt
        }
    })
}

/// The exit code for an answer; tells what no event has told.
fn conclude(answer: &Answer, output: &Output) -> Exit {
    let report: Option<Report> = answer.member("report");
    match report.as_ref().map(|r| r.outcome.as_str()) {
        Some("moved") => Exit::Done,
        Some("discarded") => Exit::InDoubt,
        Some(_) => Exit::Failed,
        None => {
            output.tell(Event::Error(reason(answer)));
            Exit::Failed
        }
    }
}

fn reason(answer: &Answer) -> Failure {
    let unnamed = || Failure::new("source", "control", "the holder gave no reason", "");
    answer.member("error").unwrap_or_else(unnamed)
}

fn cancel_on_interrupt(path: PathBuf, output: Output) {
    let asked = AtomicBool::new(false);
    on_signal(move |signal| {
        if signal == Signal::Terminate || asked.swap(true, Ordering::SeqCst) {
            // The migration is the holder's, and goes on without somebody who watches.
            std::process::exit(Exit::InDoubt as i32);
        }
        output.note("cancelling the migration; Ctrl-C again leaves it to the holder");
        if let Ok(mut client) = Client::connect(&path) {
            let refused = match client.ask(&Request::Cancel, |_| {}) {
                Finished::Answered(answer) => (!answer.is_ok()).then(|| reason(&answer)),
                Finished::Lost(failure) => Some(failure),
            };
            if let Some(failure) = refused {
                output.tell(Event::Error(failure));
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::examples;

    #[test]
    fn the_exit_code_says_where_the_guest_is() {
        let output = Output::sink(|_| {});
        let code = |outcome: &str| {
            let report = Report { outcome: outcome.into(), ..(&examples::moved()).into() };
            conclude(&Answer::ok(&()).with_report(Some(&report)), &output)
        };
        assert_eq!(code("moved"), Exit::Done);
        assert_eq!(code("still-here"), Exit::Failed);
        assert_eq!(code("discarded"), Exit::InDoubt);
        let refused = Answer::error(&Failure::new("source", "control", "the guest is paused", "resume it"));
        assert_eq!(conclude(&refused, &output), Exit::Failed);
    }
}
