//! Millions of mutated streams, those that proptest finds, and those that are kept.
//!
//! `MIG_HOSTILE_STREAMS=10000000 cargo test --release -p mig-hostile --test streams -- --nocapture` is the long
//! run. An input that breaks something is written to `target/tmp/hostile.bin`; it belongs into `corpus/` once
//! it is mended.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mig_core::progress::OutcomeKind;
use mig_hostile::heap::{self, Counting};
use mig_hostile::mutate::{Generator, Mutation, Sealing, Split};
use mig_hostile::{Reach, all, seeds};
use mig_wire::Kind;
use proptest::prelude::*;

#[global_allocator]
static HEAP: Counting = Counting;

/// Streams without `MIG_HOSTILE_STREAMS`: a few seconds of an unoptimised program.
const STREAMS: u64 = 50_000;
/// The most that one input may allocate at a time: what is made of it is far below the protocol's limits.
const PEAK_BYTES: usize = 16 << 20;

/// Writes the input that was tried when a panic goes by.
struct Evidence<'a>(&'a [u8]);

impl Drop for Evidence<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("hostile.bin");
            let written = std::fs::write(&path, self.0);
            eprintln!("{} bytes of evidence in {}: {written:?}", self.0.len(), path.display());
        }
    }
}

/// Gives an input to everything.
fn survive(bytes: &[u8]) -> Reach {
    let evidence = Evidence(bytes);
    let reach = all(evidence.0);
    assert!(reach.peak_bytes <= PEAK_BYTES, "{} bytes at a time", reach.peak_bytes);
    reach
}

fn corpus() -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "bin"));
    files.sort();
    files.into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect()
}

fn generator() -> Generator {
    let (conversations, frames, kept) = (seeds::conversations(), seeds::golden_frames(), corpus());
    // most of the deep code is in conversations
    let often = std::iter::repeat_n(&conversations, 24).flatten();
    let seeds = often.chain(&frames).map(|seed| &seed.bytes[..]);
    Generator::new(seeds.chain(kept.iter().map(|(_, bytes)| &bytes[..])))
}

/// What a number of streams reached.
#[derive(Debug, Default)]
struct Tally {
    streams: u64,
    bytes: u64,
    frames: u64,
    decoded: u64,
    whole: u64,
    kinds: u32,
    in_rounds: u64,
    committed: u64,
    outcomes: [u64; 3],
    accepted: u64,
    restored: u64,
    sections: u64,
    bad_sections: u64,
    held: u64,
    resumed: u64,
    peak_bytes: usize,
}

impl Tally {
    fn add(&mut self, bytes: usize, reach: &Reach) {
        self.streams += 1;
        self.bytes += bytes as u64;
        self.frames += reach.stream.frames;
        self.decoded += reach.stream.decoded;
        self.whole += u64::from(reach.stream.whole);
        self.kinds |= reach.stream.kinds;
        self.in_rounds += u64::from(reach.source.rounds > 0);
        self.committed += u64::from(reach.source.committed);
        let outcome = match reach.source.outcome.expect("every run ends") {
            OutcomeKind::Moved => 0,
            OutcomeKind::StillHere => 1,
            OutcomeKind::Discarded => 2,
        };
        self.outcomes[outcome] += 1;
        self.accepted += u64::from(reach.destination.accepted);
        self.restored += u64::from(reach.destination.sections > 0);
        self.sections += reach.destination.sections;
        self.bad_sections += reach.destination.bad_sections;
        self.held += u64::from(reach.destination.held);
        self.resumed += u64::from(reach.destination.resumed);
        self.peak_bytes = self.peak_bytes.max(reach.peak_bytes);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let percent = |part: u64| part as f64 * 100.0 / self.streams.max(1) as f64;
        writeln!(f, "{} streams, {} bytes each", self.streams, self.bytes / self.streams.max(1))?;
        writeln!(f, "  decoded to the last byte {:.1} %", percent(self.whole))?;
        writeln!(f, "  frames accepted          {:.2} a stream", self.frames as f64 / self.streams as f64)?;
        writeln!(f, "  encoded pages            {} runs decoded", self.decoded)?;
        writeln!(f, "  source sent rounds       {:.1} %", percent(self.in_rounds))?;
        writeln!(f, "  source committed         {:.1} %", percent(self.committed))?;
        let [moved, still_here, discarded] = self.outcomes;
        writeln!(
            f,
            "  source ended             moved {moved}, still here {still_here}, discarded {discarded}"
        )?;
        writeln!(f, "  destination accepted     {:.1} %", percent(self.accepted))?;
        writeln!(f, "  destination read state   {:.1} %", percent(self.restored))?;
        writeln!(f, "  sections                 {} read, {} refused", self.sections, self.bad_sections)?;
        writeln!(f, "  destination held a copy  {:.1} %", percent(self.held))?;
        writeln!(f, "  destination resumed      {:.1} %", percent(self.resumed))?;
        write!(f, "  most allocated at a time {} KiB", self.peak_bytes >> 10)
    }
}

#[test]
fn mutated_streams_are_survived_and_reach_everything() {
    assert!(heap::is_counted());
    let streams = std::env::var("MIG_HOSTILE_STREAMS").map_or(STREAMS, |n| n.parse().expect("a number"));
    let first = std::env::var("MIG_HOSTILE_FIRST").map_or(0, |n| n.parse().expect("a number"));
    let (generator, started, mut tally) = (generator(), Instant::now(), Tally::default());
    for number in first..first + streams {
        let input = generator.input(number);
        tally.add(input.len(), &survive(&input));
    }
    let seconds = started.elapsed().as_secs_f64();
    println!("{tally}\n  {:.0} streams a second", streams as f64 / seconds);
    if let Ok(status) = std::fs::read_to_string("/proc/self/status") {
        status
            .lines()
            .filter(|l| l.starts_with("VmHWM"))
            .for_each(|line| println!("  whole process: {line}"));
    }
    // else it tried the door only
    let Tally {
        whole,
        in_rounds,
        committed,
        outcomes,
        restored,
        held,
        resumed,
        bad_sections,
        kinds,
        decoded,
        ..
    } = tally;
    assert!(whole * 4 > streams, "the decoder accepts many of them");
    for (what, times) in [
        ("the source sends rounds", in_rounds),
        ("it commits", committed),
        ("moved", outcomes[0]),
        ("still here", outcomes[1]),
        ("discarded, after it asked in vain", outcomes[2]),
        ("a copy is held", held),
        ("saved state is read", restored),
        ("the destination resumes", resumed),
    ] {
        assert!(times * 200 > streams, "{what}: {times} times of {streams}");
    }
    assert!(bad_sections > 0, "saved state is refused at times");
    assert!(decoded > 0, "encoded pages are decoded at times");
    for kind in Kind::ALL {
        assert!(kinds & 1 << kind as u32 != 0, "{kind:?} is accepted at times");
    }
}

#[test]
fn seeds_are_read_whole_and_go_as_their_names_say() {
    for seed in seeds::all() {
        let Reach { stream, source, destination, .. } = survive(&seed.bytes);
        assert!(stream.whole && stream.frames > 0, "{}", seed.name);
        let outcome = source.outcome.unwrap();
        match seed.name.as_str() {
            "destination takes a guest"
            | "destination takes a guest and compares digests"
            | "destination takes a guest by its arbiter"
            | "destination times its start, and chooses how many channels"
            | "destination is asked" => assert!(destination.running, "{}: {destination:?}", seed.name),
            "destination takes encoded pages" => {
                assert!(destination.running);
                assert_eq!(stream.decoded, 3, "each of them");
            }
            "destination restores a machine" => {
                assert_eq!((destination.sections, destination.bad_sections), (7, 0));
                assert!(destination.running);
            }
            "destination is left with a copy" => assert!(destination.held && !destination.resumed),
            "source gives its guest away"
            | "source hears how the start was timed"
            | "source asks and its guest is there" => {
                assert_eq!(outcome, OutcomeKind::Moved, "{}", seed.name);
            }
            "source finds that memory differs" => {
                assert_eq!((outcome, source.committed), (OutcomeKind::StillHere, false));
            }
            "source is promised that the guest never ran"
            | "source asks and gets its guest back"
            | "source gets its guest back from its arbiter" => {
                assert_eq!((outcome, source.committed), (OutcomeKind::StillHere, true), "{}", seed.name);
            }
            "source loses its guest" => {
                assert_eq!((outcome, source.doubted), (OutcomeKind::Discarded, true));
            }
            name => assert!(!destination.resumed && !source.committed, "{name}"),
        }
    }
}

#[test]
fn what_is_kept_is_survived() {
    let kept = corpus();
    assert!(!kept.is_empty());
    for (path, bytes) in kept {
        println!("{}: {:?}", path.display(), survive(&bytes));
    }
}

fn mutation() -> impl Strategy<Value = Mutation> {
    any::<(u8, u8, u32, u64)>().prop_map(|(how, frame, at, value)| Mutation { how, frame, at, value })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 5000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_mutations_of_any_seeds_are_survived(
        seed in any::<prop::sample::Index>(),
        other in any::<prop::sample::Index>(),
        mutations in proptest::collection::vec(mutation(), 0..8),
        sealing in prop_oneof![4 => Just(Sealing::All), 1 => Just(Sealing::Headers), 1 => Just(Sealing::Nothing)],
    ) {
        let seeds = seeds::all();
        let (seed, other) = (Split::new(&seed.get(&seeds).bytes), Split::new(&other.get(&seeds).bytes));
        survive(&seed.mutated(&other, &mutations, sealing));
    }

    #[test]
    fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        survive(&bytes);
        survive(&mig_hostile::mutate::seal(&bytes));
    }
}
