use std::collections::HashMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::sync::Barrier;

use proptest::prelude::*;

use super::*;

const SIDES: [Side; 2] = [Side::Source, Side::Destination];

fn directory() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn lease(directory: &tempfile::TempDir) -> LeaseFile {
    LeaseFile::open(directory.path().join("lease")).unwrap()
}

fn contents(lease: &LeaseFile) -> Vec<u8> {
    std::fs::read(lease.path()).unwrap()
}

#[test]
fn the_first_side_that_asks_is_given_the_guest_and_keeps_it() {
    for [first, second] in [SIDES, [SIDES[1], SIDES[0]]] {
        let directory = directory();
        let lease = lease(&directory);
        lease.begin(&[1; 16]).unwrap();
        for _ in 0..3 {
            assert!(lease.claim(&[1; 16], first).unwrap());
            assert!(!lease.claim(&[1; 16], second).unwrap());
        }
    }
}

#[test]
fn a_session_that_was_never_begun_or_is_over_is_given_to_nobody() {
    let directory = directory();
    let lease = lease(&directory);
    assert!(!lease.claim(&[1; 16], Side::Source).unwrap());
    lease.begin(&[1; 16]).unwrap();
    assert!(lease.claim(&[1; 16], Side::Source).unwrap());
    lease.begin(&[2; 16]).unwrap();
    for side in SIDES {
        assert!(!lease.claim(&[1; 16], side).unwrap());
    }
    assert!(lease.claim(&[2; 16], Side::Destination).unwrap());
}

#[test]
fn a_session_is_not_begun_again_once_it_is_decided() {
    let directory = directory();
    let lease = lease(&directory);
    lease.begin(&[1; 16]).unwrap();
    lease.begin(&[1; 16]).unwrap();
    assert!(lease.claim(&[1; 16], Side::Source).unwrap());
    assert!(matches!(lease.begin(&[1; 16]), Err(LeaseError::Decided { .. })));
    assert!(!lease.claim(&[1; 16], Side::Destination).unwrap());
}

#[test]
fn of_many_that_create_a_lease_at_once_all_get_the_same() {
    for _ in 0..50 {
        let directory = directory();
        let (path, start) = (directory.path().join("lease"), Barrier::new(8));
        let ids: Vec<_> = std::thread::scope(|scope| {
            let open = || {
                start.wait();
                LeaseFile::open(&path).unwrap().identity()
            };
            let openers: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            openers.into_iter().map(|o| o.join().unwrap()).collect()
        });
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        let names: Vec<_> = std::fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["lease"], "no draft is left");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[test]
fn an_identity_is_stable_its_own_and_shared_by_a_copy() {
    let (here, there) = (directory(), directory());
    let lease_here = lease(&here);
    lease_here.begin(&[1; 16]).unwrap();
    assert_eq!(lease(&here).identity(), lease_here.identity());
    assert_ne!(lease(&there).identity(), lease_here.identity());
    let copy = there.path().join("copy");
    std::fs::copy(lease_here.path(), &copy).unwrap();
    assert_eq!(LeaseFile::open(&copy).unwrap().identity(), lease_here.identity());
}

#[test]
fn many_threads_ask_and_one_side_is_given_each_session() {
    let directory = directory();
    let main = lease(&directory);
    let (start, end) = (Barrier::new(5), Barrier::new(5));
    let sessions: Vec<SessionId> = (1..=1000_u128).map(u128::to_be_bytes).collect();
    let answers: Vec<(Side, Vec<bool>)> = std::thread::scope(|scope| {
        let asking: Vec<_> = [SIDES, SIDES]
            .concat()
            .into_iter()
            .map(|side| {
                let (start, end, sessions) = (&start, &end, &sessions);
                let lease = LeaseFile::open(main.path()).unwrap();
                let ask = move |session| {
                    start.wait();
                    let answer = lease.claim(session, side).unwrap();
                    end.wait();
                    answer
                };
                scope.spawn(move || (side, sessions.iter().map(ask).collect()))
            })
            .collect();
        for session in &sessions {
            main.begin(session).unwrap();
            start.wait();
            end.wait();
        }
        asking.into_iter().map(|a| a.join().unwrap()).collect()
    });
    let mut won = HashMap::new();
    for n in 0..sessions.len() {
        let given = |wanted| {
            answers.iter().filter(|(side, _)| *side == wanted).map(|(_, a)| a[n]).collect::<Vec<_>>()
        };
        let (source, destination) = (given(Side::Source), given(Side::Destination));
        assert_ne!(source[0], destination[0], "session {n}: one side has it");
        assert!(source[0] == source[1] && destination[0] == destination[1], "session {n}: all of a side");
        *won.entry(source[0]).or_insert(0) += 1;
    }
    assert_eq!(won.len(), 2, "neither side was always first: {won:?}");
}

#[test]
fn a_lease_that_is_held_by_a_frozen_program_is_an_error_and_no_hang() {
    let directory = directory();
    let mut lease = lease(&directory);
    lease.begin(&[1; 16]).unwrap();
    let holder = lease.locked().unwrap();
    lease.lock_patience = Duration::from_millis(30);
    for error in [lease.claim(&[1; 16], Side::Source).unwrap_err(), lease.begin(&[2; 16]).unwrap_err()] {
        assert!(matches!(error, LeaseError::Locked { .. }), "{error}");
    }
    drop(holder);
    assert!(lease.claim(&[1; 16], Side::Source).unwrap());
}

#[test]
fn a_file_that_is_no_lease_is_refused_and_left_as_it_is() {
    let directory = directory();
    let path = directory.path().join("file");
    let good = contents(&lease(&directory));
    let foreign = [&b""[..], b"\n", b"mig-lease 2\n", b"#!/bin/sh\n", &[0xff; 256], &vec![b'x'; 5 << 20]];
    let harmed = [&good[..48], &good[..good.len() - 1], &[&good[..], b"\n"].concat(), b"mig-lease 1\n"]
        .map(<[u8]>::to_vec);
    let cases = foreign.iter().map(|c| (c.to_vec(), false)).chain(harmed.map(|c| (c, true)));
    for (bytes, damaged) in cases {
        std::fs::write(&path, &bytes).unwrap();
        let error = LeaseFile::open(&path).unwrap_err();
        assert_eq!(matches!(error, LeaseError::Damaged { .. }), damaged, "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(!error.remedy().is_empty());
        assert_eq!(std::fs::read(&path).unwrap(), bytes, "unchanged");
    }
}

#[test]
fn what_cannot_be_a_lease_is_refused_by_name_without_waiting() {
    let directory = directory();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let missing = directory.path().join("no/such/place");
    let dangling = directory.path().join("dangling");
    std::os::unix::fs::symlink(&missing, &dangling).unwrap();
    for path in [&pipe, directory.path(), &missing, &dangling, Path::new("/dev/null")] {
        let error = LeaseFile::open(path).unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    let names = std::fs::read_dir(&directory).unwrap().count();
    assert_eq!(names, 2, "nothing was left behind");
}

#[test]
fn a_lease_that_was_removed_or_replaced_gives_the_guest_to_nobody() {
    let directory = directory();
    let first = lease(&directory);
    first.begin(&[1; 16]).unwrap();
    std::fs::remove_file(first.path()).unwrap();
    assert!(matches!(first.claim(&[1; 16], Side::Source), Err(LeaseError::Io { .. })));
    let second = lease(&directory);
    second.begin(&[1; 16]).unwrap();
    assert!(matches!(first.claim(&[1; 16], Side::Source), Err(LeaseError::Replaced { .. })));
    assert!(matches!(first.begin(&[2; 16]), Err(LeaseError::Replaced { .. })));
    assert!(second.claim(&[1; 16], Side::Destination).unwrap());
}

#[test]
fn nobody_is_told_yes_before_it_is_durable_and_asking_again_writes_again() {
    let directory = directory();
    let sound = lease(&directory);
    let failing = LeaseFile { make_durable: |_| Err(io::ErrorKind::StorageFull.into()), ..sound.clone() };
    assert!(failing.begin(&[1; 16]).is_err());
    sound.begin(&[1; 16]).unwrap();
    for _ in 0..2 {
        assert!(matches!(failing.claim(&[1; 16], Side::Source), Err(LeaseError::Io { .. })));
    }
    // What it wrote may be in the page cache only. A yes that rested on it would not outlive a crash.
    let written = contents(&sound);
    assert!(sound.claim(&[1; 16], Side::Source).unwrap());
    assert_ne!(contents(&sound), written);
    assert!(!failing.claim(&[1; 16], Side::Destination).unwrap(), "a no needs no write");
}

#[test]
fn a_lease_is_one_small_file_that_stays_the_same_file() {
    let directory = directory();
    let lease = lease(&directory);
    let before = std::fs::metadata(lease.path()).unwrap();
    for n in 1..50 {
        lease.begin(&[n; 16]).unwrap();
        assert!(lease.claim(&[n; 16], Side::Source).unwrap());
    }
    let after = std::fs::metadata(lease.path()).unwrap();
    assert_eq!((after.ino(), after.len()), (before.ino(), before.len()));
    assert_eq!(after.len(), LEASE_BYTES as u64);
}

/// What a claim writes, cut at every byte, as a crash would leave it: whoever asks next gets the guest, and
/// nobody after that; the side whose write was cut was not told yes.
#[test]
fn a_claim_that_crashed_at_any_byte_has_given_the_guest_to_one_side_at_most() {
    let directory = directory();
    let lease = lease(&directory);
    for claimed in SIDES {
        lease.begin(&[claimed as u8 + 1; 16]).unwrap();
        let session = [claimed as u8 + 1; 16];
        let before = contents(&lease);
        assert!(lease.claim(&session, claimed).unwrap());
        let after = contents(&lease);
        let changed: Vec<usize> = (0..before.len()).filter(|n| before[*n] != after[*n]).collect();
        for cut in changed[0]..=changed[changed.len() - 1] + 1 {
            for next in SIDES {
                let torn = [&after[..cut], &before[cut..]].concat();
                std::fs::write(lease.path(), &torn).unwrap();
                let given = [next, SIDES[1 - next as usize]].map(|side| lease.claim(&session, side).unwrap());
                let whole = torn == after;
                let wanted = if whole && next != claimed { [false, true] } else { [true, false] };
                assert_eq!(given, wanted, "{claimed:?} cut at {cut}, then {next:?}");
            }
        }
    }
}

#[test]
fn a_lease_that_lost_its_end_gives_the_guest_to_nobody() {
    let directory = directory();
    let lease = lease(&directory);
    lease.begin(&[1; 16]).unwrap();
    assert!(lease.claim(&[1; 16], Side::Source).unwrap());
    let whole = contents(&lease);
    for length in 0..whole.len() {
        std::fs::write(lease.path(), &whole[..length]).unwrap();
        for side in SIDES {
            let error = lease.claim(&[1; 16], side).unwrap_err();
            assert!(
                matches!(error, LeaseError::Damaged { .. } | LeaseError::NotALease { .. }),
                "{length}: {error}"
            );
        }
        assert_eq!(contents(&lease), &whole[..length], "nothing is written to it");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Begin(u8),
    Claim(u8, Side),
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    let side = prop_oneof![Just(Side::Source), Just(Side::Destination)];
    prop_oneof![
        1 => (1_u8..5).prop_map(Step::Begin),
        3 => (1_u8..5, side).prop_map(|(session, side)| Step::Claim(session, side)),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The register as plain as it can be said.
    #[test]
    fn a_lease_answers_as_a_variable_would(steps in prop::collection::vec(step(), 1..60)) {
        let directory = directory();
        let mut lease = lease(&directory);
        let mut model: Option<(u8, Option<Side>)> = None;
        for step in steps {
            match step {
                Step::Begin(session) => {
                    let decided = matches!(model, Some((current, Some(_))) if current == session);
                    prop_assert_eq!(lease.begin(&[session; 16]).is_err(), decided);
                    if !decided {
                        model = Some((session, None));
                    }
                }
                Step::Claim(session, side) => {
                    let answer = lease.claim(&[session; 16], side).unwrap();
                    let wanted = match &mut model {
                        Some((current, owner)) if *current == session => *owner.get_or_insert(side) == side,
                        _ => false,
                    };
                    prop_assert_eq!(answer, wanted);
                }
                Step::Reopen => lease = LeaseFile::open(lease.path()).unwrap(),
            }
        }
    }
}
