use std::time::Duration;

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{CODE, END_PORT, Machine};
use crate::vcpu::msr;

const REGIONS: [(u64, u64); 1] = [(0, 256)];

/// Restores into vCPUs without CPUID.
fn restore_to(to: &mut Machine, state: &KvmState, choice: GuestTime) -> Result<TimePlan, KvmError> {
    let mut context = to.probe();
    let prepared = Prepared::read(&to.refs(), &context)?;
    let time = restore(&to.vm, &to.refs(), state, &prepared, &mut context, choice)?;
    to.context = context;
    Ok(time)
}

fn moved(from: &Machine, vcpus: u64, choice: GuestTime) -> (Machine, TimePlan) {
    let state = save(&from.vm, &from.refs(), &from.context).unwrap();
    let sections = state.to_sections();
    std::thread::sleep(Duration::from_millis(30));
    let mut to = Machine::bare(vcpus, &REGIONS).unwrap();
    let mut bytes = vec![0u8; 256 * 4096];
    from.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    to.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    let state = KvmState::from_sections(&sections, vcpus as usize).unwrap();
    let plan = restore_to(&mut to, &state, choice).unwrap();
    (to, plan)
}

fn guest_tsc(vcpu: &VcpuFd) -> u64 {
    msr::read(vcpu, &[msr::TSC]).unwrap()[0].data
}

/// Runs to the guest's next port write and completes it; what it wrote.
fn next(vcpu: &mut VcpuFd) -> u32 {
    let written = match vcpu.run() {
        Ok(VcpuExit::IoOut(END_PORT, data)) => u32::from_le_bytes(data.try_into().unwrap()),
        other => panic!("the guest left with {other:?}"),
    };
    vcpu.set_kvm_immediate_exit(1);
    assert_eq!(vcpu.run().unwrap_err().errno(), libc::EINTR);
    vcpu.set_kvm_immediate_exit(0);
    written
}

#[test]
fn a_guest_goes_on_in_another_vm_where_it_was_through_many_hops() {
    let Some(mut machine) = Machine::with_regions(2, &REGIONS) else { return };
    // again: inc eax; add [edi], eax; out END_PORT, eax; jmp again
    machine.load(&[0x40, 0x01, 0x07, 0xe7, END_PORT as u8, 0xeb, 0xf9]);
    for (index, vcpu) in machine.vcpus.iter().enumerate() {
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rax, regs.rdi) = (CODE, 1000 * index as u64, 0x4000 + 64 * index as u64);
        vcpu.set_regs(&regs).unwrap();
    }
    let mut expected = [0u32, 1000];
    let mut sums = [0u32, 0];
    for _ in 0..6 {
        for (index, vcpu) in machine.vcpus.iter_mut().enumerate() {
            for _ in 0..7 {
                expected[index] += 1;
                sums[index] += expected[index];
                assert_eq!(next(vcpu), expected[index]);
            }
        }
        machine = Machine { context: machine.context.clone(), ..moved(&machine, 2, GuestTime::Advance).0 };
    }
    for (index, sum) in sums.into_iter().enumerate() {
        let found: u32 = machine.memory.read_obj(GuestAddress(0x4000 + 64 * index as u64)).unwrap();
        assert_eq!(found, sum);
    }
}

#[test]
fn time_that_goes_on_counts_the_pause_on_every_vcpu_alike() {
    let Some(from) = Machine::with_regions(2, &REGIONS) else { return };
    let clock_before = from.vm.get_clock().unwrap().clock;
    let offsets = |machine: &Machine| {
        let state = save(&machine.vm, &machine.refs(), &from.context).unwrap();
        state.vcpus.iter().map(|v| v.tsc.offset).collect::<Vec<_>>()
    };
    let before = offsets(&from);
    let (to, plan) = moved(&from, 2, GuestTime::Advance);
    assert!(plan.elapsed() >= Duration::from_millis(30));
    let clock_after = to.vm.get_clock().unwrap().clock;
    assert!(clock_after - clock_before >= 30_000_000, "{clock_before} {clock_after}");
    // Where the offset is an attribute it is the same to the cycle; where it is measured, nearly.
    for (before, after) in before.into_iter().zip(offsets(&to)) {
        let apart = before.wrapping_sub(after).cast_signed().unsigned_abs();
        let exact = crate::ioctl::has_tsc_offset(&to.vcpus[0]);
        assert!(if exact { apart == 0 } else { apart < 100_000_000 }, "{apart} cycles apart");
    }
}

#[test]
fn time_that_stands_still_does_not_count_the_pause() {
    let Some(from) = Machine::with_regions(2, &REGIONS) else { return };
    let state = save(&from.vm, &from.refs(), &from.context).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let mut to = Machine::bare(2, &REGIONS).unwrap();
    let restored = restore_to(&mut to, &state, GuestTime::Stop);
    // The source's clock and TSC went on; the destination's are behind them by the pause.
    let behind_ns = from.vm.get_clock().unwrap().clock - to.vm.get_clock().unwrap().clock;
    assert!(behind_ns >= 300_000_000, "{behind_ns}");
    if !Mover::probe(&from.vcpus[0]).unwrap().moves() {
        assert!(matches!(restored, Err(KvmError::Missing { .. })), "the tsc went on, and nobody said so");
        return;
    }
    assert!(restored.unwrap().elapsed() >= Duration::from_millis(300));
    let khz = from.context.host_tsc_khz;
    let behind = guest_tsc(&from.vcpus[1]).wrapping_sub(guest_tsc(&to.vcpus[1]));
    assert!(behind.cast_signed() >= 290 * i64::from(khz), "{behind} cycles at {khz} kHz");
    if crate::ioctl::has_tsc_offset(&to.vcpus[0]) {
        let shift = |i: usize| {
            let after = crate::ioctl::tsc_offset(&to.vcpus[i]).unwrap();
            after.wrapping_sub(state.vcpus[i].tsc.offset)
        };
        assert_eq!(shift(0), shift(1));
    }
}

#[test]
fn sections_that_are_missing_doubled_or_too_many_are_an_error() {
    let Some(from) = Machine::with_regions(2, &REGIONS) else { return };
    let sections = save(&from.vm, &from.refs(), &from.context).unwrap().to_sections();
    let read = |sections: &[Section]| KvmState::from_sections(sections, 2);
    assert!(read(&sections).is_ok());
    let foreign = Section { name: "serial".into(), ..sections[0].clone() };
    assert!(read(&[sections.as_slice(), &[foreign]].concat()).is_ok());
    for left_out in 0..sections.len() {
        let mut fewer = sections.clone();
        fewer.remove(left_out);
        assert!(read(&fewer).is_err());
        assert!(read(&[sections.as_slice(), &sections[left_out..=left_out]].concat()).is_err());
    }
    let third = Section { instance: 2, ..sections[2].clone() };
    assert!(read(&[sections.as_slice(), &[third]].concat()).is_err());
    let state = read(&sections).unwrap();
    let mut one = Machine::bare(1, &REGIONS).unwrap();
    assert!(restore_to(&mut one, &state, GuestTime::Advance).is_err());
}

#[test]
fn a_vcpu_that_was_told_of_another_cpu_gets_the_guest_s_and_hands_it_on() {
    let Some(from) = Machine::with_regions(2, &REGIONS) else { return };
    let section = crate::compat::platform_section(&from.vcpus[0], &from.context).unwrap();
    let state = save(&from.vm, &from.refs(), &from.context).unwrap();
    // As the guest's are, and with the second in a place that it does not have.
    for place in [1u32, 7] {
        let mut to = Machine::bare(2, &REGIONS).unwrap();
        let leaf_1 = |leaf: &mut crate::vcpu::saved::CpuidEntry| {
            if leaf.function == 1 {
                leaf.ebx = leaf.ebx & 0xff_ffff | place << 24;
            }
        };
        crate::compat::adopt(&to.refs(), &section, |_, leaf| leaf_1(leaf)).unwrap();
        let told = to.probe();
        assert_eq!(told.given[1] == from.context.given[1], place == 1);
        restore_to(&mut to, &state, GuestTime::Advance).unwrap();
        let again = save(&to.vm, &to.refs(), &to.context).unwrap();
        for (again, first) in again.vcpus.iter().zip(&state.vcpus) {
            assert_eq!(again.cpuid, first.cpuid);
        }
    }
}

#[test]
fn a_rehearsal_changes_nothing_and_fails_where_the_calls_do() {
    let Some(machine) = Machine::with_regions(2, &REGIONS) else { return };
    let state = save(&machine.vm, &machine.refs(), &machine.context).unwrap();
    rehearse_restore(&machine.refs(), &state, &machine.context).unwrap();
    let again = save(&machine.vm, &machine.refs(), &machine.context).unwrap();
    for (again, first) in again.vcpus.iter().zip(&state.vcpus) {
        for piece in crate::vcpu::RESTORE_ORDER {
            assert_eq!(crate::vcpu::difference(piece, first, again), None, "{}", piece.name());
        }
    }
    let mut odd = state.clone();
    odd.vcpus[1].lapic.truncate(7);
    assert!(rehearse_restore(&machine.refs(), &odd, &machine.context).is_err());
}
