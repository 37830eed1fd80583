//! What the engine does for every page, round and switchover, apart from moving bytes.

#![allow(missing_docs)] // criterion's macros make undocumented functions

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use mig_core::bitmap::{self, Bitmap, PageRun};
use mig_core::domain::{CHUNK_PAGES, Domain, PAGE_BYTES};
use mig_wire::describe::Region;
use mig_wire::header::Header;
use mig_wire::pages::{self, Encoding, Run};
use mig_wire::{HEADER_BYTES, Kind, Message, Section};

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

criterion_group!(kernels, bitmap_drain, page_table, state_sections, bitmap_set_run);
criterion_main!(kernels);
