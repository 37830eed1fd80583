//! As for vCPUs: each piece with a value of its own, restored with and without its call.

use super::*;
use crate::testing::Machine;
use crate::time::GuestTime;

const REGIONS: [(u64, u64); 1] = [(0, 256)];
const HOUR_NS: u64 = 3_600_000_000_000;

fn machine() -> Option<Machine> {
    Machine::bare(1, &REGIONS)
}

fn plan(state: &VmState) -> TimePlan {
    let Clock { host, host_tsc_khz, .. } = state.clock;
    TimePlan::new(GuestTime::Advance, host, host_tsc_khz, host.boot_id)
}

fn distinguish(vm: &VmFd, piece: Piece) {
    match piece {
        Piece::PicPrimary => change_pic(vm, KVM_IRQCHIP_PIC_MASTER, 0x20),
        Piece::PicSecondary => change_pic(vm, KVM_IRQCHIP_PIC_SLAVE, 0x28),
        Piece::Ioapic => {
            let mut ioapic = read_ioapic(vm).unwrap();
            // Masked, level-triggered, vector 0x31, and a register selected.
            ioapic.redirections[9] = 1 << 56 | 1 << 16 | 1 << 15 | 0x31;
            ioapic.ioregsel = 0x12;
            write_ioapic(vm, &ioapic).unwrap();
        }
        Piece::Pit => {
            let mut pit = Pit::from(vm.get_pit2().unwrap());
            let channel = &mut pit.channels[0];
            (channel.count, channel.mode, channel.rw_mode, channel.gate) = (0x1234, 2, 3, 1);
            vm.set_pit2(&(&pit).into()).unwrap();
        }
        Piece::Clock => {
            vm.set_clock(&kvm_clock_data { clock: HOUR_NS, ..Default::default() }).unwrap();
        }
    }
}

fn change_pic(vm: &VmFd, chip: u32, irq_base: u8) {
    let mut pic = read_pic(vm, chip).unwrap();
    (pic.irq_base, pic.imr, pic.elcr, pic.init4) = (irq_base, 0xa5, pic.elcr_mask & 0x0c, 1);
    write_pic(vm, chip, &pic).unwrap();
}

fn same(piece: Piece, wanted: &VmState, found: &VmState) -> bool {
    match piece {
        Piece::PicPrimary => wanted.pics[0] == found.pics[0],
        Piece::PicSecondary => wanted.pics[1] == found.pics[1],
        Piece::Ioapic => wanted.ioapic == found.ioapic,
        Piece::Pit => wanted.pit == found.pit,
        Piece::Clock => found.clock.kvmclock_ns >= wanted.clock.kvmclock_ns,
    }
}

fn with_and_without(piece: Piece) {
    let Some(source) = machine() else { return };
    distinguish(&source.vm, piece);
    let state = save(&source.vm, &source.context).unwrap();
    let state = VmState::from_section(&state.to_section()).unwrap();
    let all = [Piece::Clock, CHIPS[0], CHIPS[1], CHIPS[2], CHIPS[3]];

    let with = machine().unwrap();
    restore_clock(&with.vm, &state, &plan(&state)).unwrap();
    restore_chips(&with.vm, &state, &plan(&state)).unwrap();
    assert!(same(piece, &state, &save(&with.vm, &with.context).unwrap()));

    let without = machine().unwrap();
    let others: Vec<Piece> = all.into_iter().filter(|p| *p != piece).collect();
    restore_pieces(&without.vm, &state, &plan(&state), &others).unwrap();
    assert!(!same(piece, &state, &save(&without.vm, &without.context).unwrap()));
}

macro_rules! every_piece_matters {
    ($($name:ident: $piece:ident,)*) => {
        $(#[test] fn $name() { with_and_without(Piece::$piece); })*

        /// A piece without a test breaks the build here.
        #[allow(dead_code)]
        fn every_piece_has_a_test(piece: Piece) {
            match piece { $(Piece::$piece => {})* }
        }
    };
}

every_piece_matters! {
    without_the_primary_pic_a_vm_is_another: PicPrimary,
    without_the_secondary_pic_a_vm_is_another: PicSecondary,
    without_the_ioapic_a_vm_is_another: Ioapic,
    without_the_pit_a_vm_is_another: Pit,
    without_the_clock_a_vm_is_another: Clock,
}

/// CLOCK_BOOTTIME, the guest's clock, and how long it took to read that: the tightest of a few.
fn clocks(vm: &VmFd) -> (i64, i64, i64) {
    let boottime = || HostClocks::read(None).boottime_ns as i64;
    let reading = || {
        let (before, kvmclock, after) = (boottime(), vm.get_clock().unwrap().clock as i64, boottime());
        (before + (after - before) / 2, kvmclock, after - before)
    };
    (0..3).map(|_| reading()).min_by_key(|(_, _, width)| *width).unwrap()
}

/// As for a guest that moves again and again: what the calls take must not add up.
#[test]
fn a_clock_that_moves_often_keeps_up_with_the_hosts() {
    let Some(source) = machine() else { return };
    let there = machine().unwrap();
    let mut moves: Vec<(i64, i64)> = Vec::new();
    for _ in 0..200 {
        let (began, counted_from, _) = clocks(&source.vm);
        let state = save(&source.vm, &source.context).unwrap();
        restore_clock(&there.vm, &state, &plan(&state)).unwrap();
        let (ended, counted_to, width) = clocks(&there.vm);
        moves.push((ended - began - (counted_to - counted_from), width));
    }
    moves.sort_unstable();
    let (lag, width) = moves[moves.len() / 2];
    println!("a move costs the clock {lag} ns; a reading takes {width} ns");
    // A call and a reading on either side.
    assert!(lag.abs() <= 4 * width, "a move costs the clock {lag} ns, a reading takes {width} ns");
}
