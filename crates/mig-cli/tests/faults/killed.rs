//! SIGKILL for either side at every point.

use mig::fault_points::Point::{self, *};

use crate::crowd;
use crate::pair::{Pair, Side, Whereabouts, always_reached};
use crate::table;

/// What one host has room for: the cases wait most of the time.
const AT_ONCE: usize = 6;
pub const COLUMNS: [&str; 6] =
    ["fault point", "killed", "the other side", "guests alive", "resolved by", "guests alive then"];

/// What may become of the survivor when the other side is killed while one holds at `point`. More than one:
/// two threads of the survivor race.
fn survivor(point: Point, victim: Side) -> &'static [Whereabouts] {
    use Whereabouts::{InDoubt, Listens, Moved, Runs};
    match (victim, Side::of(point)) {
        (Side::Source, Side::Source) if point <= SourceStateSent => &[Listens],
        (Side::Source, Side::Source) if point <= SourceCommitting => &[InDoubt],
        (Side::Source, Side::Destination) if point <= DestinationMidRound => &[Listens],
        (Side::Source, Side::Destination) if point <= DestinationStateHeard => &[Listens, InDoubt],
        (Side::Source, Side::Destination) if point <= DestinationLoaded => &[InDoubt],
        (Side::Source, _) => &[Runs],
        (Side::Destination, Side::Source) if point <= SourceStateSent => &[Runs],
        (Side::Destination, Side::Source) if point <= SourceCommitting => &[InDoubt],
        (Side::Destination, Side::Destination) if point <= DestinationLoaded => &[Runs],
        (Side::Destination, Side::Destination) if point <= DestinationResumed => &[InDoubt],
        (Side::Destination, _) => &[Moved],
    }
}

/// The same for a side that kills itself at once, whatever the other is doing.
fn survivor_in_a_rush(point: Point) -> &'static [Whereabouts] {
    use Whereabouts::{InDoubt, Listens, Moved, Runs};
    match point {
        SourceLastRoundSent => &[Listens, InDoubt],
        SourceCommitSent => &[InDoubt, Runs],
        DestinationReadySent => &[Runs, InDoubt],
        DestinationRunningSent | DestinationGapSent => &[Moved, InDoubt],
        _ => survivor(point, Side::of(point)),
    }
}

/// What became of the survivor, and of the guest: brings it back where it is in doubt, and counts it.
pub fn survive(pair: &mut Pair, survivor: Side, possible: &[Whereabouts]) -> [String; 4] {
    let found = pair.settle(survivor, possible);
    let runs = |found| (found == Whereabouts::Runs).then_some(survivor);
    let alive = pair.guests_alive(runs(found));
    assert_eq!(alive, usize::from(found == Whereabouts::Runs), "{}", pair.describe());
    let (mut resolved_by, mut alive_then) = ("-", alive);
    if found == Whereabouts::InDoubt {
        resolved_by = "operator: resume";
        pair.resolve(survivor, "resume");
        pair.settle(survivor, &[Whereabouts::Runs]);
        alive_then = pair.guests_alive(Some(survivor));
        assert_eq!(alive_then, 1, "{}", pair.describe());
    }
    pair.assert_never_two();
    if alive_then == 1 {
        pair.assert_guest_is_whole(survivor);
    }
    if found == Whereabouts::Listens || survivor == Side::Source && alive_then == 1 {
        pair.assert_moves_again(survivor);
    }
    let name = possible.iter().map(|w| w.name()).collect::<Vec<_>>().join(" or ");
    match possible {
        [_] => [name, alive.to_string(), resolved_by.into(), alive_then.to_string()],
        // which of them it was this time says nothing
        _ => [name, "0".into(), "operator: resume, if in doubt".into(), "0 or 1".into()],
    }
}

pub fn at_every_point() {
    let cases: Vec<(Point, Side)> =
        always_reached().into_iter().flat_map(|point| Side::BOTH.map(|victim| (point, victim))).collect();
    let rows = crowd::run(&cases, AT_ONCE, |&(point, victim)| {
        let mut pair = Pair::start(&[(point, "hold")], None);
        pair.wait_held_and_far(point);
        pair.kill(victim);
        if victim != Side::of(point) {
            pair.release(point);
        }
        let found = survive(&mut pair, victim.other(), survivor(point, victim));
        [vec![point.name().to_owned(), victim.name().to_owned()], found.to_vec()].concat()
    });
    table::assert_as_written("killed", &COLUMNS, &rows);
}

pub fn by_its_own_hand_at_every_point() {
    crowd::run(&always_reached(), AT_ONCE, |&point| {
        let side = Side::of(point);
        let mut pair = Pair::start(&[(point, "kill")], None);
        pair.wait_killed(side);
        survive(&mut pair, side.other(), survivor_in_a_rush(point));
    });
}
