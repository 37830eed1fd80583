//! SIGSTOP for the side that comes to a point, and SIGCONT when the other has noticed: a host that hangs, and
//! comes back without knowing that it was away.

use std::time::{Duration, Instant};

use mig::fault_points::Point::{self, *};

use crate::crowd;
use crate::ending::{self, Ending};
use crate::pair::{Pair, Side, Whereabouts, always_reached};
use crate::table;

/// The cases wait for seconds, most of the time.
const AT_ONCE: usize = 14;

/// How it ends when the side that comes to `point` thaws.
fn thawed(point: Point) -> &'static [Ending] {
    use Ending::{Moved, Stayed};
    match point {
        // nobody has heard of it, so nobody misses it
        SourceConnecting | SourceConnected => &[Moved],
        // its Commit comes too late, and it asks
        _ if point <= SourceCommitting => &[Stayed],
        _ if point <= SourceGapHeard => &[Moved],
        _ if point <= DestinationLoaded => &[Stayed],
        // it finds Commit there, and the source's question beside it
        DestinationReadySent => &[Moved, Stayed],
        _ => &[Moved],
    }
}

pub fn at_every_point() {
    let found = crowd::run(&always_reached(), AT_ONCE, |&point| {
        let side = Side::of(point);
        let mut pair = Pair::start(&[(point, "stop")], None);
        pair.wait_stopped(side);
        if point >= SourceHelloSent {
            pair.wait_reached(Side::Destination, DestinationHelloHeard);
        }
        let began = Instant::now();
        let noticed = pair.wait_noticed(side.other());
        let after = began.elapsed();
        let runs = noticed == Whereabouts::Runs;
        let alive = pair.guests_alive(runs.then_some(side.other()));
        assert_eq!(alive, usize::from(runs), "{}", pair.describe());
        pair.thaw(side);
        let possible = thawed(point);
        let (ending, resolved_by) = ending::settle(&mut pair, possible);
        // what it finds in its sockets may make the copy complete, and the source's question is there beside it
        let may_doubt = (DestinationRoundAcknowledged..=DestinationLoaded).contains(&point);
        let resolved_by = if may_doubt { ending::MAYBE_QUESTION } else { resolved_by };
        let row = [
            point.name(),
            noticed.name(),
            &alive.to_string(),
            ending::cell(ending, possible),
            resolved_by,
            "1",
        ];
        let after = (noticed != Whereabouts::Moved).then_some(after);
        (after, row.map(str::to_owned).to_vec())
    });
    let (after, rows): (Vec<Option<Duration>>, Vec<Vec<String>>) = found.into_iter().unzip();
    // not where it never heard of a peer, or had heard all and said farewell
    let waited: Vec<Duration> = after.into_iter().flatten().filter(|t| *t > Duration::from_secs(2)).collect();
    if let (Some(least), Some(most)) = (waited.iter().min(), waited.iter().max()) {
        println!("a frozen peer was noticed after {least:.1?} to {most:.1?}, {} times", waited.len());
    }
    let columns = [
        "frozen at",
        "the other side",
        "guests alive meanwhile",
        "thawed: the guest",
        "resolved by",
        "guests alive",
    ];
    table::assert_as_written("frozen", &columns, &rows);
}
