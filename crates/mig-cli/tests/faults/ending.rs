//! How a migration whose both sides live ends, once nothing hinders them any more: with one guest, and nobody in
//! doubt.

use mig::fault_points::Point;

use crate::pair::{Pair, Side, Whereabouts};

/// Where the guest is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    Moved,
    Stayed,
}

/// What a side in doubt is resolved by, when both live.
pub const QUESTION: &str = "the source's question";
/// The same where two threads, or the guest and the link, race for whether there is any doubt.
pub const MAYBE_QUESTION: &str = "the source's question, if in doubt";

/// Waits for the end, counts the guests, and moves one that stayed after all. Gives how it ended and what
/// resolved it.
pub fn settle(pair: &mut Pair, possible: &[Ending]) -> (Ending, &'static str) {
    use Whereabouts::{Listens, Moved, Runs};
    let (ending, runs) = match pair.settle(Side::Source, &[Runs, Moved]) {
        Moved => (Ending::Moved, Side::Destination),
        _ => (Ending::Stayed, Side::Source),
    };
    pair.settle(Side::Destination, if ending == Ending::Moved { &[Runs] } else { &[Listens] });
    assert!(possible.contains(&ending), "{ending:?}, not {possible:?}: {}", pair.describe());
    assert_eq!(pair.guests_alive(Some(runs)), 1, "{}", pair.describe());
    pair.assert_never_two();
    pair.assert_guest_is_whole(runs);
    let doubted = |point| pair.reached(Side::of(point)).contains(&point);
    let doubted = doubted(Point::SourceAsking) || doubted(Point::DestinationInDoubt);
    if ending == Ending::Stayed {
        pair.assert_moves_there_after_all();
    }
    (ending, if doubted { QUESTION } else { "-" })
}

/// For a table: what was found, or all that may be.
pub fn cell(found: Ending, possible: &[Ending]) -> &'static str {
    match (found, possible) {
        (_, [_, _, ..]) => "moved or stayed",
        (Ending::Moved, _) => "moved",
        (Ending::Stayed, _) => "stayed",
    }
}
