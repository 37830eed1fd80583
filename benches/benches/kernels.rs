//! What the engine does for every page, round and switchover, apart from moving bytes.

#![allow(missing_docs)] // criterion's macros make undocumented functions

use std::hint::black_box;
use std::sync::Arc;

use criterion::measurement::WallTime;
use criterion::{BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use mig::GuestRam;
use mig::kernels::{GuestPages, Zstd, encode_delta};
use mig_benches::memory::Memory;
use mig_core::bitmap::{self, Bitmap, PageRun};
use mig_core::domain::{CHUNK_PAGES, Domain, PAGE_BYTES};
use mig_wire::describe::Region;
use mig_wire::header::Header;
use mig_wire::pages::{self, Encoding, Run};
use mig_wire::{HEADER_BYTES, Kind, Message, Section};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// What the zero test walks over: more than the caches of most hosts hold.
const WALK_BYTES: u64 = 512 << 20;

fn four_gib() -> Domain {
    Domain::new(&[
        Region { guest_address: 0, bytes: 3 << 30 },
        Region { guest_address: 4 << 30, bytes: 1 << 30 },
    ])
    .expect("two regions apart")
}

/// Draining a bitmap of 4 GiB into runs, by how it is filled.
fn bitmap_drain(criterion: &mut Criterion) {
    let domain = four_gib();
    let mut every_eighth = Bitmap::empty(&domain);
    (0..domain.pages()).step_by(8).for_each(|page| every_eighth.set(page));
    let mut group = criterion.benchmark_group("bitmap_drain_4gib");
    group.throughput(Throughput::Elements(domain.pages()));
    for (name, dirty) in
        [("clean", Bitmap::empty(&domain)), ("full", Bitmap::full(&domain)), ("every_8th", every_eighth)]
    {
        let mut words = Vec::new();
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                || dirty.clone(),
                |dirty| {
                    dirty.take_words(0..domain.end_page(), &mut words);
                    bitmap::runs(0, &words).map(|run| run.count).sum::<u64>()
                },
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

/// A run table of a full chunk, in the worst case (every other page zero).
fn page_table(criterion: &mut Criterion) {
    let runs: Vec<Run> = (0..CHUNK_PAGES)
        .map(|page| Run {
            first_page: page,
            count: 1,
            encoding: if page % 2 == 0 { Encoding::Raw } else { Encoding::Zero },
        })
        .collect();
    let mut table = Vec::new();
    pages::encode_table(&runs, &mut table);
    let payload: usize = runs.iter().map(Run::payload_bytes).sum();
    let header = Header {
        kind: Kind::Pages,
        items: 512,
        length: u32::try_from(table.len() + payload).expect("a frame's length"),
        round: 0,
        sequence: 0,
        session: 0,
        body_crc: 0,
    };
    let mut group = criterion.benchmark_group("run_table_512");
    group.throughput(Throughput::Elements(CHUNK_PAGES));
    group.bench_function("encode", |bencher| {
        let mut into = Vec::new();
        bencher.iter(|| {
            into.clear();
            pages::encode_table(black_box(&runs), &mut into);
        });
    });
    group.bench_function("decode", |bencher| {
        let mut into = Vec::new();
        bencher.iter(|| pages::decode_table(&header, black_box(&table), &mut into));
    });
    group.finish();
}

/// The state of 16 vCPUs of 16 KiB each.
fn state_sections(criterion: &mut Criterion) {
    let sections: Vec<Section> =
        (0..16).map(|vcpu| Section::critical("kvm.vcpu", vcpu, 1, &vec![0x5a_u8; 16 << 10])).collect();
    let message = Message::State { round: 3, sections };
    let frame = message.encode(0, 0).expect("within the limit");
    let (head, body) = frame.split_first_chunk::<HEADER_BYTES>().expect("a frame has a header");
    let header = Header::decode(head).expect("our own header");
    let mut group = criterion.benchmark_group("state_16_vcpus");
    group.throughput(Throughput::Bytes(body.len() as u64));
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(&message).encode(0, 0)));
    group.bench_function("decode", |bencher| bencher.iter(|| Message::decode(&header, black_box(body))));
    group.finish();
}

/// Setting a run of 1 GiB.
fn bitmap_set_run(criterion: &mut Criterion) {
    let domain = four_gib();
    let mut dirty = Bitmap::empty(&domain);
    let run = PageRun { first: 3, count: (1 << 30) / PAGE_BYTES };
    criterion.bench_function("bitmap_set_run_1gib", |bencher| bencher.iter(|| dirty.set_run(black_box(run))));
}

/// Guest memory that nobody has touched.
fn untouched(bytes: u64) -> (Arc<GuestMemoryMmap>, GuestPages) {
    let size = usize::try_from(bytes).expect("a size in memory");
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).expect("memory"));
    let ram = GuestRam::from_vm_memory(memory.clone()).skip_untouched();
    (memory, GuestPages::new(ram).expect("one region"))
}

/// Guest memory in which every page has `word` at its `offset`, and zeros elsewhere; all of it faulted in.
fn marked(bytes: u64, offset: u64, word: u64) -> (Arc<GuestMemoryMmap>, GuestPages) {
    let (memory, pages) = untouched(bytes);
    for page in 0..bytes / PAGE_BYTES {
        let at = GuestAddress(page * PAGE_BYTES + offset);
        memory.write_obj(1u64, at).expect("in memory");
        memory.write_obj(word, at).expect("in memory");
    }
    (memory, pages)
}

/// The zero test over memory that no cache holds, beside a plain read of memory of the same size; and over one
/// page in the cache. A page with its first word set shows what a test costs that ends at once.
fn zero_test(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zero_test_512mib");
    group.throughput(Throughput::Bytes(WALK_BYTES)).sample_size(10);
    let mut plain = Memory::new(usize::try_from(WALK_BYTES).expect("a size in memory")).expect("memory");
    plain.fill();
    group.bench_function("plain_read", |bencher| {
        bencher.iter(|| {
            let (words, _) = plain.bytes().as_chunks::<8>();
            words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word))
        });
    });
    drop(plain);
    let cases = [("zero", 0, 0), ("last_word_set", PAGE_BYTES - 8, 1), ("first_word_set", 0, 1)];
    for (name, offset, word) in cases {
        let (_memory, pages) = marked(WALK_BYTES, offset, word);
        group.bench_function(name, |bencher| {
            bencher.iter(|| (0..WALK_BYTES / PAGE_BYTES).filter(|page| pages.is_zero(*page)).count());
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("zero_test_page_in_cache");
    group.throughput(Throughput::Bytes(PAGE_BYTES));
    for (name, offset, word) in cases {
        let (_memory, pages) = marked(PAGE_BYTES, offset, word);
        group.bench_function(name, |bencher| bencher.iter(|| pages.is_zero(black_box(0))));
    }
    group.finish();
}

/// Splitting a chunk's pages into runs: all of one kind, the worst case, in turns, and memory without
/// pages.
fn classify(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("classify_chunk");
    group.throughput(Throughput::Bytes(CHUNK_PAGES * PAGE_BYTES));
    for (name, step) in [("zero", None), ("raw", Some(1)), ("in_turns", Some(2))] {
        let (memory, mut pages) = marked(CHUNK_PAGES * PAGE_BYTES, 0, 0);
        if let Some(step) = step {
            for page in (0..CHUNK_PAGES).step_by(step) {
                memory.write_obj(1u64, GuestAddress(page * PAGE_BYTES)).expect("in memory");
            }
        }
        classify_all(&mut group, name, &mut pages);
    }
    let (_memory, mut pages) = untouched(CHUNK_PAGES * PAGE_BYTES);
    classify_all(&mut group, "untouched", &mut pages);
    group.finish();
}

fn classify_all(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, pages: &mut GuestPages) {
    let mut table = Vec::new();
    group.bench_function(name, |bencher| {
        bencher.iter(|| {
            table.clear();
            pages.classify(0, CHUNK_PAGES, &mut table)
        });
    });
}

/// Memory of three kinds: words and numbers; objects with pointers, counters and names, and room between them; noise.
fn content(kind: &str, bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut memory = Vec::with_capacity(bytes + 64);
    while memory.len() < bytes {
        let number = random();
        match kind {
            "text" if number % 9 == 0 => {
                memory.extend_from_slice(format!("{} ", number >> 8 & 0xffff).as_bytes())
            }
            "text" => {
                const WORDS: [&str; 12] = [
                    "the ",
                    "guest ",
                    "of ",
                    "kernel: ",
                    "memory ",
                    "was ",
                    "sent ",
                    "GET /index.html ",
                    "systemd[1]: ",
                    "failed\n",
                    "user ",
                    "session ",
                ];
                memory.extend_from_slice(WORDS[(number >> 8) as usize % WORDS.len()].as_bytes());
            }
            "heap" => {
                let mut object = [0; 64];
                object[..8].copy_from_slice(&(0x7f12_3400_0000 + (number & 0xff_ffff) * 16).to_le_bytes());
                object[8..12].copy_from_slice(&((number >> 40) as u32 % 1000).to_le_bytes());
                object[32..41].copy_from_slice(b"customer-");
                object[41..45].copy_from_slice(&(random() as u32 % 9999).to_le_bytes());
                memory.extend_from_slice(&object);
            }
            _ => memory.extend_from_slice(&number.to_le_bytes()),
        }
    }
    memory.truncate(bytes);
    memory
}

/// zstd on as many pages as go together, and on one; the throughput is that of the pages.
fn zstd(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("zstd");
    group.sample_size(20);
    for kind in ["text", "heap", "random"] {
        for (pages, level) in [(32, -5), (32, 1), (32, 3), (1, 1)] {
            let memory = content(kind, pages * PAGE_BYTES as usize);
            let mut zstd = Zstd::new(level).expect("memory for a context");
            let mut payload = vec![0; memory.len() / 8 * 7];
            group.throughput(Throughput::Bytes(memory.len() as u64));
            let name = format!("{kind}_{pages}_pages_level_{level}");
            group.bench_function(format!("encode_{name}"), |bencher| {
                bencher.iter(|| zstd.encode(level, black_box(&memory), &mut payload));
            });
            let Some(bytes) = zstd.encode(level, &memory, &mut payload) else { continue };
            let encoding = Encoding::Zstd { bytes: bytes as u32 };
            let run = Run { first_page: 0, count: pages as u32, encoding };
            let (_memory, mut guest) = marked(32 * PAGE_BYTES, 0, 1);
            group.bench_function(format!("decode_{name}"), |bencher| {
                bencher.iter(|| guest.decode(&run, black_box(&payload[..bytes])));
            });
        }
    }
    group.finish();
}

/// What changed of a page: nothing, a word, a word in each cache line, all of it (which is found not to be worth it).
fn delta(criterion: &mut Criterion) {
    let old: Box<[u8; 4096]> = content("heap", 4096).into_boxed_slice().try_into().expect("a page");
    let mut group = criterion.benchmark_group("delta_page");
    group.throughput(Throughput::Bytes(PAGE_BYTES));
    for (name, step) in
        [("same", None), ("a_word", Some(4096)), ("a_word_a_line", Some(64)), ("all", Some(8))]
    {
        let mut new = old.clone();
        for at in step.into_iter().flat_map(|step| (0..4096).step_by(step)) {
            new[at..at + 8].iter_mut().for_each(|byte| *byte = !*byte);
        }
        let mut payload = Vec::new();
        group.bench_function(format!("encode_{name}"), |bencher| {
            bencher.iter(|| {
                payload.clear();
                encode_delta(black_box(&old), &new, &mut payload)
            });
        });
        payload.clear();
        if !encode_delta(&old, &new, &mut payload) {
            continue;
        }
        // applied again and again, it makes the same page
        let (memory, mut guest) = marked(PAGE_BYTES, 0, 1);
        memory.write_slice(&old[..], GuestAddress(0)).expect("in memory");
        let encoding = Encoding::Delta { bytes: payload.len() as u32 };
        let run = Run { first_page: 0, count: 1, encoding };
        group.bench_function(format!("decode_{name}"), |bencher| {
            bencher.iter(|| guest.decode(&run, black_box(&payload)).expect("our own"));
        });
    }
    group.finish();
}

/// A frame's header, with its checksum.
fn header_codec(criterion: &mut Criterion) {
    let header = Header {
        kind: Kind::Pages,
        items: 1,
        length: 2 << 20,
        round: 3,
        sequence: 4711,
        session: 0x0123_4567_89ab_cdef,
        body_crc: 0,
    };
    let bytes = header.encode();
    let mut group = criterion.benchmark_group("header");
    group.throughput(Throughput::Elements(1));
    group.bench_function("encode", |bencher| bencher.iter(|| black_box(&header).encode()));
    group.bench_function("decode", |bencher| bencher.iter(|| Header::decode(black_box(&bytes))));
    group.finish();
}

criterion_group!(
    kernels,
    zero_test,
    classify,
    zstd,
    delta,
    bitmap_drain,
    page_table,
    header_codec,
    state_sections,
    bitmap_set_run
);
criterion_main!(kernels);
