//! The link between two hosts cut at every point, in both directions or in one, and healed.

use std::time::Duration;

use mig::fault_points::Point::{self, *};

use crate::crowd;
use crate::ending::{self, Ending};
use crate::hosts::{Cut, Hosts};
use crate::killed;
use crate::pair::{Pair, Side, Whereabouts, always_reached};
use crate::table;

/// The cases wait for seconds, most of the time.
const AT_ONCE: usize = 14;
/// Much shorter than what a side takes for silence.
const SHORT: Duration = Duration::from_millis(400);
const ATTEMPTS: usize = 3;

/// How it ends when the link is healed before anybody notices.
fn soon(point: Point, cut: Cut) -> &'static [Ending] {
    match (point, cut) {
        // there is no way to connect, which is known at once
        (SourceConnecting | SourceDescribeSent | SourceAcceptHeard, Cut::Unplugged) => &[Ending::Stayed],
        // a receiver hears a stranger for 2 s only
        (SourceConnected, Cut::Unplugged | Cut::ToDestination) => &[Ending::Moved, Ending::Stayed],
        // the page channels are being connected
        (DestinationAcceptSent, Cut::Unplugged) => &[Ending::Moved, Ending::Stayed],
        _ => &[Ending::Moved],
    }
}

/// How it ends when the link is healed after both sides have noticed.
fn late(point: Point, cut: Cut) -> Ending {
    use Ending::{Moved, Stayed};
    match Side::of(point) {
        Side::Source if point <= SourceStateSent => Stayed,
        // what is lost: Running, or Commit
        Side::Source if point <= SourceCommitting && cut == Cut::ToSource => Moved,
        Side::Source if point <= SourceCommitting => Stayed,
        Side::Source => Moved,
        // what is lost: Ready, or Commit
        Side::Destination if point <= DestinationLoaded => Stayed,
        Side::Destination => Moved,
    }
}

/// Whether it depends on the guest and the link if anybody is in doubt then.
fn may_doubt(point: Point, cut: Cut) -> bool {
    match point {
        // the copy is complete if all that is left fits into a window without acknowledgements
        SourceRoundSent
        | SourceRoundAcknowledged
        | SourcePaused
        | SourceSaved
        | SourceLastSync
        | SourceStateSent => cut == Cut::ToSource,
        // there may be another round to send; if not, what was sent may have arrived
        DestinationRoundAcknowledged | DestinationStateHeard => true,
        _ => false,
    }
}

/// Cuts the link of a pair held at `point`, and lets it go on.
fn cut_at(point: Point, cut: Cut) -> Pair {
    let pair = Pair::start(&[(point, "hold")], Some(Hosts::start().unwrap()));
    pair.wait_held_and_far(point);
    pair.cut(cut);
    pair.release(point);
    pair
}

fn healed_soon(point: Point, cut: Cut) -> &'static str {
    let possible = soon(point, cut);
    let mut attempts = 0;
    loop {
        let mut pair = cut_at(point, cut);
        std::thread::sleep(SHORT);
        pair.heal(cut);
        let (ending, _) = ending::settle(&mut pair, &[Ending::Moved, Ending::Stayed]);
        attempts += 1;
        // on a machine that stands still for seconds a short cut is a long one
        if possible.contains(&ending) || attempts == ATTEMPTS {
            assert!(possible.contains(&ending), "{ending:?} at {point:?}, {cut:?}, {attempts} times");
            return ending::cell(ending, possible);
        }
    }
}

fn healed_late(point: Point, cut: Cut) -> [String; 4] {
    let mut pair = cut_at(point, cut);
    let noticed = Side::BOTH.map(|side| pair.wait_noticed(side));
    let running = Side::BOTH.into_iter().find(|side| noticed[*side as usize] == Whereabouts::Runs);
    let alive = pair.guests_alive(running);
    pair.heal(cut);
    let possible = late(point, cut);
    let (ending, resolved_by) = ending::settle(&mut pair, &[possible]);
    let resolved_by = if may_doubt(point, cut) { ending::MAYBE_QUESTION } else { resolved_by };
    let alive = match (point, cut) {
        // without another round to send Commit is sent, and lost
        (DestinationRoundAcknowledged, Cut::ToDestination) => "0 or 1".into(),
        _ => alive.to_string(),
    };
    [alive, ending::cell(ending, &[]).into(), resolved_by.into(), "1".into()]
}

pub fn at_every_point() {
    let cases: Vec<(Point, Cut, bool)> = always_reached()
        .into_iter()
        .flat_map(|point| Cut::ALL.map(|cut| (point, cut)))
        .flat_map(|(point, cut)| [false, true].map(|soon| (point, cut, soon)))
        .collect();
    let found = crowd::run(&cases, AT_ONCE, |&(point, cut, soon)| match soon {
        true => vec![healed_soon(point, cut).to_owned()],
        false => healed_late(point, cut).to_vec(),
    });
    let rows: Vec<Vec<String>> = cases
        .chunks(2)
        .zip(found.chunks(2))
        .map(|(cases, found)| {
            let (point, cut, _) = cases[0];
            [&[point.name().to_owned(), cut.name().to_owned()], &found[1][..], &found[0]].concat()
        })
        .collect();
    let columns = [
        "fault point",
        "nothing arrives",
        "healed before it is noticed",
        "cut until noticed: guests alive",
        "healed then",
        "resolved by",
        "guests alive",
    ];
    table::assert_as_written("cut", &columns, &rows);
}

/// The points of doubt: the link is cut as Commit is sent, and both sides notice.
const DOUBT: [Point; 6] = [
    SourceAsking,
    SourceAnswered,
    DestinationInDoubt,
    DestinationAsked,
    DestinationAnswering,
    DestinationAnswered,
];

/// A pair in doubt, held at `point`. The link is healed, unless the doubt is only about to begin.
fn in_doubt_at(point: Point) -> Pair {
    let faults = [(SourceCommitting, "hold"), (point, "hold")];
    let pair = Pair::start(&faults, Some(Hosts::start().unwrap()));
    pair.wait_held_and_far(SourceCommitting);
    pair.cut(Cut::Unplugged);
    pair.release(SourceCommitting);
    pair.wait_reached(Side::Source, SourceAsking);
    pair.wait_reached(Side::Destination, DestinationInDoubt);
    if !is_begin(point) {
        pair.heal(Cut::Unplugged);
    }
    pair.wait_held_and_far(point);
    pair
}

fn is_begin(point: Point) -> bool {
    matches!(point, SourceAsking | DestinationInDoubt)
}

/// What becomes of the survivor when the other side is killed in doubt.
fn survivor_in_doubt(point: Point, victim: Side) -> &'static [Whereabouts] {
    use Whereabouts::{InDoubt, Listens, Runs};
    match (victim, point) {
        (Side::Source, SourceAsking | DestinationInDoubt) => &[InDoubt],
        // it gave the guest up, as the source wished to run it
        (Side::Source, _) => &[Listens],
        // it was answered before
        (Side::Destination, SourceAnswered | DestinationAnswered) => &[Runs],
        (Side::Destination, _) => &[InDoubt],
    }
}

pub fn and_one_side_killed_in_doubt() {
    let cases: Vec<(Point, Side)> =
        DOUBT.into_iter().flat_map(|point| Side::BOTH.map(|victim| (point, victim))).collect();
    let rows = crowd::run(&cases, AT_ONCE, |&(point, victim)| {
        let mut pair = in_doubt_at(point);
        pair.kill(victim);
        if is_begin(point) {
            pair.heal(Cut::Unplugged);
        }
        if victim != Side::of(point) {
            pair.release(point);
        }
        let found = killed::survive(&mut pair, victim.other(), survivor_in_doubt(point, victim));
        [vec![point.name().to_owned(), victim.name().to_owned()], found.to_vec()].concat()
    });
    table::assert_as_written("killed in doubt", &killed::COLUMNS, &rows);
}

/// The link cut again, as an answer is on its way.
pub fn again_in_doubt() {
    let answering = [SourceAnswered, DestinationAsked, DestinationAnswering, DestinationAnswered];
    let cases: Vec<(Point, Cut)> =
        answering.into_iter().flat_map(|point| Cut::ALL.map(|cut| (point, cut))).collect();
    let rows = crowd::run(&cases, AT_ONCE, |&(point, cut)| {
        let mut pair = in_doubt_at(point);
        pair.cut(cut);
        let asked = pair.times_reached(SourceAsking);
        pair.release(point);
        pair.wait("answer, or another question", || {
            pair.times_reached(SourceAsking) > asked || pair.whereabouts(Side::Source) == Whereabouts::Runs
        });
        pair.heal(cut);
        let (ending, resolved_by) = ending::settle(&mut pair, &[Ending::Stayed]);
        [point.name(), cut.name(), ending::cell(ending, &[]), resolved_by, "1"].map(str::to_owned).to_vec()
    });
    let columns = ["fault point", "nothing arrives", "healed then", "resolved by", "guests alive"];
    table::assert_as_written("cut in doubt", &columns, &rows);
}
