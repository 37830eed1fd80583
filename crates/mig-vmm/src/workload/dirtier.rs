//! The dirtier: stamps pages at a given rate, in the order of a [`Share`] for each vCPU, and checks each
//! stamp before it raises it.
//!
//! What makes a stale page show, whichever it is:
//! - a page of the working set: its stamp is not the one that follows from the vCPU's lap and step, which are
//!   in registers; the guest finds it at the next visit, [`verify`] at once;
//! - a control page: its count is not the one in the vCPU's register (the guest), or the edge between
//!   generations is not where it says (`verify`);
//! - a page of the tables or of the code: it differs from the image, which is constant;
//! - of memory that was filled, a page that nobody writes, or what lies behind a stamp: it differs from the fill.

use std::ops::Range;

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::asm::{Code, Program, Tick};
use super::image::{Machine, Piece, constant, read_u64, write};
use super::layout::{AREA_BYTES, CODE, PAGE_BYTES, area, control};
use super::schedule::{
    BATCH_ADDRESSES, BATCH_COUNT, BATCH_PAGES, BATCH_SUM, GENERATION_BITS, STEP_BYTES, STEP_GENERATION,
    STEP_GENERATIONS_PER_LAP, Share, stamp as stamp_of,
};
use super::{Fill, Guest, Memory, WorkloadError, exit_code, fill};

/// Fields of the control page, set by the host before the start.
const STEPS: u64 = control::OWN;
const STEPS_END: u64 = control::OWN + 8;
const CYCLES_PER_PAGE: u64 = control::OWN + 16;
const CATCH_UP_CYCLES: u64 = control::OWN + 24;

/// What a vCPU missed longer ago than this, because the host did not run it, it does not make up for.
const CATCH_UP_MS: u64 = 20;

/// The quadword at the start of each page of the working set.
const STAMP_BYTES: usize = 8;

/// Puts all pages into their first generation.
pub(super) fn fill_and_stamp(guest: &Guest, memory: &Memory, machine: &Machine) -> Result<(), WorkloadError> {
    let plan = Plan::new(guest, machine)?;
    if plan.fill != Fill::None {
        fill::fill(plan.fill, memory, &plan.working_set)?;
        fill::fill(plan.fill, memory, &plan.rest)?;
    }
    for page in plan.shares.iter().flat_map(|share| share.batches.iter().flatten()) {
        write(memory, page * PAGE_BYTES, &stamp_of(*page, 0).to_le_bytes())?;
    }
    Ok(())
}

/// Checks every stamp, and all that was filled; the number of pages.
pub(super) fn verify(guest: &Guest, memory: &Memory, machine: &Machine) -> Result<u64, WorkloadError> {
    let plan = Plan::new(guest, machine)?;
    let mut checked = 0;
    for (vcpu, share) in (0..).zip(&plan.shares) {
        let counter = area(vcpu) + control::WRITTEN;
        let written = read_u64(memory, counter)?;
        let (generations, current) = share.after(written).ok_or_else(|| WorkloadError::Changed {
            what: "the count of writes, which grows by whole batches,",
            page: counter / PAGE_BYTES,
            address: counter,
            expected: written - written % BATCH_PAGES as u64,
            found: written,
        })?;
        for (index, (batch, generation)) in share.batches.iter().zip(generations).enumerate() {
            // The visit that was under way may have reached some page of its batch, and none after it.
            let mut begun = index == current;
            for &page in batch {
                let found = read_u64(memory, page * PAGE_BYTES)?;
                if begun && found == stamp_of(page, generation + 1) {
                    continue;
                }
                begun = false;
                if found != stamp_of(page, generation) {
                    return Err(WorkloadError::Stale {
                        page,
                        vcpu,
                        expected_generation: generation,
                        found_page: found >> GENERATION_BITS,
                        found_generation: found & ((1 << GENERATION_BITS) - 1),
                    });
                }
            }
            checked += batch.len() as u64;
        }
    }
    if plan.fill != Fill::None {
        fill::verify(plan.fill, memory, &plan.working_set, STAMP_BYTES)?;
        checked += fill::verify(plan.fill, memory, &plan.rest, 0)?;
    }
    Ok(checked)
}

/// The program and its tables; fills in the control pages.
pub(super) fn program(
    guest: &Guest,
    machine: &Machine,
    areas: &mut [u8],
) -> Result<(Code, Vec<Piece>), WorkloadError> {
    let plan = Plan::new(guest, machine)?;
    let code = assemble()?;
    let mut tables = Vec::new();
    let cycles_per_second = u128::from(machine.tsc_khz) * 1000;
    let cycles_per_page =
        cycles_per_second * u128::from(PAGE_BYTES) * u128::from(machine.vcpus) / u128::from(plan.rate);
    for (share, area) in plan.shares.iter().zip(areas.chunks_exact_mut(AREA_BYTES as usize)) {
        let address = plan.tables_at + tables.len() as u64;
        tables.extend(share.tables(address, &code.exports));
        for (field, value) in [
            (STEPS, share.steps_at(address)),
            (STEPS_END, share.steps_at(address) + share.steps.len() as u64 * STEP_BYTES),
            (CYCLES_PER_PAGE, cycles_per_page as u64),
            (CATCH_UP_CYCLES, u64::from(machine.tsc_khz) * CATCH_UP_MS),
        ] {
            area[field as usize..field as usize + 8].copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok((code, vec![constant("the dirtier's schedule", plan.tables_at, tables)]))
}

/// Where everything is: tables from the first free page on, then the working set, which may go around holes, then
/// what nobody writes.
struct Plan {
    tables_at: u64,
    working_set: Vec<Range<u64>>,
    rest: Vec<Range<u64>>,
    shares: Vec<Share>,
    rate: u64,
    fill: Fill,
}

impl Plan {
    fn new(guest: &Guest, machine: &Machine) -> Result<Self, WorkloadError> {
        let &Guest::Dirtier { rate_bytes_per_second, working_set_bytes, pattern, fill } = guest else {
            unreachable!("only a dirtier has a plan")
        };
        let count = working_set_bytes / PAGE_BYTES;
        let vcpus = u64::from(machine.vcpus);
        if count < vcpus {
            return Err(WorkloadError::WorkingSetTooSmall { working_set_bytes, vcpus: machine.vcpus });
        }
        let free: u64 = machine.free_pages.iter().map(|range| range.end - range.start).sum();
        // Before any list is made: the number is the user's.
        if count > free {
            return Err(machine.too_small(guest, working_set_bytes));
        }
        // Tables depend on the number of pages only, so their size is known before the pages are.
        let shares = |pages: &[u64]| -> Vec<Share> {
            let at = |vcpu: u64| (pages.len() as u64 * vcpu / vcpus) as usize;
            (0..vcpus).map(|vcpu| Share::new(pattern, &pages[at(vcpu)..at(vcpu + 1)])).collect()
        };
        let table_bytes: u64 = shares(&(0..count).collect::<Vec<_>>()).iter().map(Share::bytes).sum();
        let table_pages = table_bytes.div_ceil(PAGE_BYTES);
        let fits_in_front =
            machine.free_pages.first().is_some_and(|range| table_pages <= range.end - range.start);
        if !fits_in_front || table_pages + count > free {
            return Err(machine.too_small(guest, working_set_bytes.saturating_add(table_pages * PAGE_BYTES)));
        }
        let working_set = part(&machine.free_pages, table_pages, count);
        let rest = part(&machine.free_pages, table_pages + count, free);
        let pages: Vec<u64> = working_set.iter().cloned().flatten().collect();
        let tables_at = machine.free_pages[0].start * PAGE_BYTES;
        let shares = shares(&pages);
        Ok(Self { tables_at, working_set, rest, shares, rate: rate_bytes_per_second, fill })
    }
}

/// Of the pages in `ranges`, those behind the first `skipped`, and at most `count` of them.
fn part(ranges: &[Range<u64>], mut skipped: u64, mut count: u64) -> Vec<Range<u64>> {
    let mut part = Vec::new();
    for range in ranges {
        let start = range.end.min(range.start + skipped);
        let end = range.end.min(start + count);
        skipped -= start - range.start;
        count -= end - start;
        if start < end {
            part.push(start..end);
        }
    }
    part
}

/// The loop over steps: some 25 instructions for a batch and three for a page. A host that interprets ring 0
/// takes half a microsecond for each.
///
/// RBP control page, RSI step, RDI end of the steps, RBX batch, R12 lap, R13 pages written, R14 when the next
/// step is due, R15 cycles for a page.
fn assemble() -> Result<Code, IcedError> {
    let mut p = Program::new("dirtier", Tick::Periodic)?;
    p.start_periodic_timer()?;
    let a = &mut p.a;
    let (mut step, mut due, mut early, mut late, mut stale, mut lost) = (
        a.create_label(),
        a.create_label(),
        a.create_label(),
        a.create_label(),
        a.create_label(),
        a.create_label(),
    );
    a.mov(rsi, qword_ptr(rbp + STEPS))?;
    a.mov(rdi, qword_ptr(rbp + STEPS_END))?;
    a.mov(r15, qword_ptr(rbp + CYCLES_PER_PAGE))?;
    a.xor(r12d, r12d)?;
    a.xor(r13d, r13d)?;
    a.rdtsc()?;
    a.shl(rdx, 32_u32)?;
    a.lea(r14, qword_ptr(rax + rdx))?;
    a.sti()?;

    a.set_label(&mut step)?;
    a.rdtsc()?;
    a.shl(rdx, 32_u32)?;
    a.or(rax, rdx)?;
    a.sub(rax, r14)?;
    a.js(early)?;
    a.cmp(rax, qword_ptr(rbp + CATCH_UP_CYCLES))?;
    a.ja(late)?;

    a.set_label(&mut due)?;
    a.mov(rbx, qword_ptr(rsi))?;
    a.mov(eax, dword_ptr(rsi + STEP_GENERATION))?;
    a.mov(r8d, dword_ptr(rsi + STEP_GENERATIONS_PER_LAP))?;
    a.imul_2(r8, r12)?;
    a.add(r8, rax)?;
    a.mov(rcx, qword_ptr(rbx + BATCH_COUNT))?;
    a.imul_2(r8, rcx)?;
    a.add(r8, qword_ptr(rbx + BATCH_SUM))?;
    a.xor(r9d, r9d)?;
    a.jmp(qword_ptr(rbx))?;
    let mut slots = Vec::new();
    for slot in 0..BATCH_PAGES as u64 {
        let mut entry = a.create_label();
        a.set_label(&mut entry)?;
        slots.push(entry);
        a.mov(rax, qword_ptr(rbx + (BATCH_ADDRESSES + slot * 8)))?;
        a.add(r9, qword_ptr(rax))?;
        a.inc(qword_ptr(rax))?;
    }
    // R9 is the sum of the stamps found. A lost write makes a stamp smaller, never larger: losses add up.
    a.cmp(r9, r8)?;
    a.jne(stale)?;
    a.cmp(qword_ptr(rbp + control::WRITTEN), r13)?;
    a.jne(lost)?;
    a.add(r13, rcx)?;
    a.mov(qword_ptr(rbp + control::WRITTEN), r13)?;
    a.imul_2(rcx, r15)?;
    a.add(r14, rcx)?;
    a.add(rsi, STEP_BYTES as i32)?;
    a.cmp(rsi, rdi)?;
    a.jne(step)?;
    a.mov(rsi, qword_ptr(rbp + STEPS))?;
    a.inc(r12)?;
    a.jmp(step)?;

    // Not due yet: until the next tick.
    a.set_label(&mut early)?;
    a.hlt()?;
    a.jmp(step)?;

    // Too far behind: what is older than the limit is forgotten.
    a.set_label(&mut late)?;
    a.sub(rax, qword_ptr(rbp + CATCH_UP_CYCLES))?;
    a.add(r14, rax)?;
    a.jmp(due)?;

    // Which page was it? All of the batch are one generation further by now.
    let (mut search, mut found) = (a.create_label(), a.create_label());
    a.set_label(&mut stale)?;
    a.mov(r10d, dword_ptr(rsi + STEP_GENERATION))?;
    a.mov(r11d, dword_ptr(rsi + STEP_GENERATIONS_PER_LAP))?;
    a.imul_2(r11, r12)?;
    a.add(r10, r11)?;
    a.lea(rdx, qword_ptr(rbx + (BATCH_ADDRESSES + BATCH_PAGES as u64 * 8)))?;
    a.set_label(&mut search)?;
    a.sub(rdx, 8_i32)?;
    a.mov(rax, qword_ptr(rdx))?;
    a.mov(r9, qword_ptr(rax))?;
    a.dec(r9)?;
    a.mov(r8, rax)?;
    a.shl(r8, GENERATION_BITS - PAGE_BYTES.trailing_zeros())?;
    a.add(r8, r10)?;
    a.cmp(r8, r9)?;
    a.jne(found)?;
    a.dec(rcx)?;
    a.jne(search)?;
    a.set_label(&mut found)?;
    p.fail(exit_code::STALE_MEMORY, "a page's stamp (its number << 36 | its generation) is stale")?;

    p.a.set_label(&mut lost)?;
    p.a.mov(r8, r13)?;
    p.a.mov(r9, qword_ptr(rbp + control::WRITTEN))?;
    p.fail(exit_code::STALE_MEMORY, "the control page's count of pages written is stale")?;
    for slot in slots {
        p.export(slot);
    }
    p.assemble(CODE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_ranges_go_round_holes_and_leave_nothing_out() {
        let ranges = [10..13, 20..21, 30..34];
        let all: Vec<u64> = ranges.iter().cloned().flatten().collect();
        for skipped in 0..10 {
            for count in 0..10 {
                let found: Vec<u64> = part(&ranges, skipped, count).into_iter().flatten().collect();
                let expected: Vec<u64> =
                    all.iter().copied().skip(skipped as usize).take(count as usize).collect();
                assert_eq!(found, expected, "{skipped} {count}");
            }
        }
    }
}
