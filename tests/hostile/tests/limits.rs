//! Messages as large as their limits allow, which mutated streams never are: decoding them stays within its bound.

use mig_hostile::heap::{self, Counting};
use mig_hostile::{bounds, seeds};
use mig_wire::describe::{MAX_REFUSALS, MAX_REGIONS, MAX_SCHEMAS, Region, Schema};
use mig_wire::frame::{ChunkDigests, MAX_CHUNK_PAGES, MAX_DIGESTS, MAX_MISMATCHES};
use mig_wire::header::{HEADER_BYTES, Header};
use mig_wire::section::{MAX_BODY_BYTES, MAX_SECTIONS};
use mig_wire::{Description, Message, Refusal, Section};

#[global_allocator]
static HEAP: Counting = Counting;

fn sections(count: usize, body_bytes: usize) -> Vec<Section> {
    let body = vec![7; body_bytes];
    vec![Section { name: String::new(), instance: 0, version: 1, critical: true, body }; count]
}

fn describe(regions: usize, schemas: usize, platform: Vec<Section>) -> Message {
    Message::Describe(Box::new(Description {
        regions: vec![Region { guest_address: 0, bytes: 0 }; regions],
        schemas: vec![Schema { name: String::new(), version: 0 }; schemas],
        platform,
        ..seeds::description()
    }))
}

#[test]
fn the_largest_messages_and_those_of_the_smallest_items_are_decoded_within_their_bound() {
    assert!(heap::is_counted());
    let state = |sections| Message::State { round: 0, sections };
    let refusals = |count, bytes| {
        Message::Refuse(vec![Refusal::new("x".repeat(bytes), "x".repeat(bytes), "x".repeat(bytes)); count])
    };
    let samples = vec![ChunkDigests { chunk: 0, pages: vec![1; MAX_CHUNK_PAGES] }; MAX_MISMATCHES];
    let messages = [
        state(sections(MAX_SECTIONS, 0)),
        state(sections(MAX_SECTIONS, 1)),
        state(sections(MAX_SECTIONS, 4000)),
        state(sections(3, MAX_BODY_BYTES)),
        state(sections(1, 0)),
        describe(MAX_REGIONS, MAX_SCHEMAS, sections(MAX_SECTIONS, 200)),
        describe(1, MAX_SCHEMAS, Vec::new()),
        describe(1, 5, Vec::new()),
        refusals(MAX_REFUSALS, 1024),
        refusals(MAX_REFUSALS, 0),
        refusals(5, 0),
        Message::Digests { first_chunk: 0, digests: vec![1; MAX_DIGESTS] },
        Message::Digests { first_chunk: 0, digests: vec![1; 5] },
        Message::Mismatch { chunks: 9, samples },
    ];
    for message in messages {
        let frame = message.encode(0, 0).unwrap();
        let (head, body) = frame.split_first_chunk::<HEADER_BYTES>().unwrap();
        let header = Header::decode(head).unwrap();
        let (decoded, usage) = heap::measure(|| Message::decode(&header, body));
        assert!(decoded == Ok(message), "{:?} comes back", header.kind);
        let (peak, bound) = (usage.peak_bytes, bounds::decoding(body.len()));
        println!("{:?} of {} bytes: {peak} allocated, at most {bound}", header.kind, body.len());
        assert!(
            peak <= bound,
            "{:?} of {} bytes: {peak} allocated, at most {bound}",
            header.kind,
            body.len()
        );
    }
}
