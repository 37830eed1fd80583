//! Each piece of a vCPU's state gets a value of its own, is saved, and restored with and without the call
//! that restores it: with it the vCPU reads back the same, without it it does not.

use kvm_bindings::{KVM_MP_STATE_HALTED, kvm_mp_state, kvm_xcr};

use super::compare::{difference, read_back};
use super::pieces::{NESTED_HEADER_BYTES, set_xsave, xsave};
use super::saved::{DebugRegs, Regs};
use super::tsc::Mover;
use super::*;
use crate::testing::Machine;
use crate::time::GuestTime;

const REGIONS: [(u64, u64); 1] = [(0, 256)];

fn source() -> Option<Machine> {
    Machine::with_regions(1, &REGIONS)
}

fn target() -> Machine {
    Machine::bare(1, &REGIONS).expect("there was kvm a moment ago")
}

/// A target that was told before what CPU the guest has.
fn told_target(state: &VcpuState) -> Machine {
    let target = target();
    cpuid::write(&target.vcpus[0], &state.cpuid).unwrap();
    msr::write(&target.vcpus[0], &state.feature_msrs).unwrap();
    target
}

fn context<'a>(machine: &'a Machine, saved: &Machine) -> RestoreContext<'a> {
    let vm = crate::vm::save(&saved.vm, &saved.context).unwrap();
    let boot_id = saved.context.boot_id;
    let time = TimePlan::new(GuestTime::Advance, vm.clock.host, vm.clock.host_tsc_khz, boot_id);
    let mover = Mover::probe(&machine.vcpus[0]).unwrap();
    RestoreContext { caps: &machine.caps, host_tsc_khz: machine.context.host_tsc_khz, mover, time }
}

/// A machine's vCPU, with the MSRs that `known` has.
fn save_as(machine: &Machine, known: &Machine) -> VcpuState {
    let vcpu = &machine.vcpus[0];
    super::save(vcpu, &Given::read(vcpu).unwrap(), &known.context).unwrap()
}

fn save(machine: &Machine) -> VcpuState {
    save_as(machine, machine)
}

fn restore_to(target: &Machine, state: &VcpuState, source: &Machine) -> Result<bool, KvmError> {
    let fresh = save_as(target, source);
    super::restore(&target.vcpus[0], state, &fresh, &context(target, source))
}

/// Restores these pieces, whatever the vCPU holds already.
fn restore_only(
    target: &Machine,
    state: &VcpuState,
    source: &Machine,
    pieces: &[Piece],
) -> Result<(), KvmError> {
    let fresh = save_as(target, source);
    restore_pieces(&target.vcpus[0], state, &fresh, &context(target, source), pieces)
}

fn set_msr(vcpu: &VcpuFd, index: u32, data: u64) {
    msr::write(vcpu, &[saved::Msr { index, data }]).unwrap();
}

fn set_lapic(vcpu: &VcpuFd, registers: &[(usize, u32)]) {
    let mut lapic = vcpu.get_lapic().unwrap();
    for (at, value) in registers {
        for (to, from) in lapic.regs[*at..*at + 4].iter_mut().zip(value.to_le_bytes()) {
            *to = from.cast_signed();
        }
    }
    vcpu.set_lapic(&lapic).unwrap();
}

const LAPIC_TPR: usize = 0x80;
const LAPIC_SPURIOUS: usize = 0xf0;
const LAPIC_LVT_TIMER: usize = 0x320;
const LAPIC_LVT_LINT0: usize = 0x350;
const TSC_DEADLINE_MODE: u32 = 0b10 << 17;

/// Puts a value into the piece that no fresh vCPU has.
fn distinguish(machine: &Machine, piece: Piece) {
    let vcpu = &machine.vcpus[0];
    match piece {
        Piece::Cpuid => {
            let mut cpuid = vcpu.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
            let brand = |e: &&mut kvm_bindings::kvm_cpuid_entry2| e.function == 0x8000_0002;
            cpuid.as_mut_slice().iter_mut().find(brand).unwrap().eax = u32::from_le_bytes(*b"mig ");
            vcpu.set_cpuid2(&cpuid).unwrap();
        }
        Piece::FeatureMsrs => set_msr(vcpu, 0x8b, 0x1234_5678_0000_0000),
        Piece::Sregs => {
            let mut sregs = ioctl::sregs2(vcpu).unwrap();
            (sregs.cr2, sregs.cr3, sregs.cr8) = (0xdead_0000, 0x5000, 5);
            (sregs.fs.base, sregs.gs.selector) = (0x7_7000, 0x28);
            (sregs.gdt.base, sregs.gdt.limit, sregs.idt.base) = (0x1230, 0x37, 0x4560);
            ioctl::set_sregs2(vcpu, &sregs).unwrap();
        }
        Piece::TscKhz => {
            let host_khz = machine.context.host_tsc_khz;
            vcpu.set_tsc_khz(host_khz + host_khz / 10_000).unwrap();
        }
        // A value from outside cannot be given to these: they have tests of their own.
        Piece::Nested | Piece::TscOffset => {}
        Piece::Regs => {
            let mut regs = Regs::from(vcpu.get_regs().unwrap());
            regs.general = std::array::from_fn(|i| 0x0101_0101_0101_0101 * (i as u64 + 1));
            (regs.rip, regs.rflags) = (0x4321, 0x246);
            vcpu.set_regs(&(&regs).into()).unwrap();
        }
        Piece::Xsave => {
            let mut area = xsave(vcpu, &machine.caps).unwrap();
            area[XMM0] = 0x1357_9bdf;
            area[YMM0_HIGH] = 0x2468_ace0;
            area[XSTATE_BV] |= 0b111;
            set_xsave(vcpu, &area, &machine.caps).unwrap();
        }
        Piece::Xcrs => {
            let mut xcrs = vcpu.get_xcrs().unwrap();
            xcrs.xcrs[0] = kvm_xcr { xcr: 0, reserved: 0, value: 0b111 };
            vcpu.set_xcrs(&xcrs).unwrap();
        }
        Piece::Lapic => {
            set_lapic(vcpu, &[(LAPIC_SPURIOUS, 0x1fe), (LAPIC_LVT_LINT0, 0x700), (LAPIC_TPR, 0x30)])
        }
        Piece::Msrs => {
            let star = 0xc000_0081;
            let lstar = 0xc000_0082;
            let kernel_gs_base = 0xc000_0102;
            let mtrr_default = 0x2ff;
            set_msr(vcpu, star, 0x0013_0008_0000_0000);
            set_msr(vcpu, lstar, 0xffff_8000_1234_5678);
            set_msr(vcpu, kernel_gs_base, 0xffff_8000_0000_1000);
            set_msr(vcpu, mtrr_default, 0xc06);
        }
        Piece::Events => {
            let mut events = vcpu.get_vcpu_events().unwrap();
            (events.nmi.masked, events.nmi.pending, events.interrupt.shadow) = (1, 1, 1);
            vcpu.set_vcpu_events(&events).unwrap();
        }
        Piece::MpState => vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_HALTED }).unwrap(),
        Piece::TscDeadline => {
            set_lapic(vcpu, &[(LAPIC_SPURIOUS, 0x1ff), (LAPIC_LVT_TIMER, 0xef | TSC_DEADLINE_MODE)]);
            set_msr(vcpu, msr::TSC_DEADLINE, far_future());
        }
        Piece::DebugRegs => {
            let debug = DebugRegs { db: [0x1000, 0x2000, 0x3000, 0x4000], dr6: 0xffff_0ff1, dr7: 0x403 };
            vcpu.set_debug_regs(&(&debug).into()).unwrap();
        }
    }
}

/// In 32-bit words: XMM0 of the legacy area, XSTATE_BV of the header, YMM0's upper half of component 2.
const XMM0: usize = 160 / 4;
const XSTATE_BV: usize = 512 / 4;
const YMM0_HIGH: usize = 576 / 4;

fn far_future() -> u64 {
    1 << 60
}

fn with_and_without(piece: Piece) {
    let Some(source) = source() else { return };
    distinguish(&source, piece);
    let state = save(&source);
    let state = VcpuState::from_section(&state.to_section(0)).unwrap();

    // All pieces: none changes another that is not written because it was there.
    for with in [target(), told_target(&state)] {
        restore_to(&with, &state, &source).unwrap();
        let found = save_as(&with, &source);
        for other in RESTORE_ORDER {
            assert_eq!(difference(other, &state, &found), None, "{}", other.name());
        }
    }

    let without = target();
    let others: Vec<Piece> = RESTORE_ORDER.into_iter().filter(|p| *p != piece).collect();
    // Some pieces are what others stand on: then leaving them out is an error already.
    if restore_only(&without, &state, &source, &others).is_ok() {
        let found = save_as(&without, &source);
        assert_ne!(difference(piece, &state, &found), None, "{} does not matter", piece.name());
    }
}

macro_rules! every_piece_matters {
    ($($name:ident: $piece:ident,)* ; by themselves: $($other:ident,)*) => {
        $(#[test] fn $name() { with_and_without(Piece::$piece); })*

        /// A piece without a test breaks the build here.
        #[allow(dead_code)]
        fn every_piece_has_a_test(piece: Piece) {
            match piece { $(Piece::$piece => {})* $(Piece::$other => {})* }
        }
    };
}

every_piece_matters! {
    without_cpuid_a_vcpu_is_another: Cpuid,
    without_feature_msrs_a_vcpu_is_another: FeatureMsrs,
    without_segment_and_control_registers_a_vcpu_is_another: Sregs,
    without_the_tsc_frequency_a_vcpu_is_another: TscKhz,
    without_general_registers_a_vcpu_is_another: Regs,
    without_the_xsave_area_a_vcpu_is_another: Xsave,
    without_extended_control_registers_a_vcpu_is_another: Xcrs,
    without_the_local_apic_a_vcpu_is_another: Lapic,
    without_msrs_a_vcpu_is_another: Msrs,
    without_pending_events_a_vcpu_is_another: Events,
    without_the_mp_state_a_vcpu_is_another: MpState,
    without_the_tsc_deadline_a_vcpu_is_another: TscDeadline,
    without_debug_registers_a_vcpu_is_another: DebugRegs,
    ; by themselves: Nested, TscOffset,
}

/// A guest that runs guests of its own: where KVM cannot save that, restoring it must not pass for done.
#[test]
fn without_nested_state_a_vcpu_is_another() {
    let Some(source) = source() else { return };
    let mut state = save(&source);
    assert_eq!(state.nested.is_some(), source.caps.nested_state_bytes > 0);
    let target = target();
    restore_to(&target, &state, &source).unwrap();
    // A state as long as it says, of a format there is not.
    let mut nested = vec![0xffu8; NESTED_HEADER_BYTES + 4096];
    nested[4..8].copy_from_slice(&(NESTED_HEADER_BYTES as u32 + 4096).to_le_bytes());
    state.nested = Some(nested);
    assert!(restore_to(&target, &state, &source).is_err());
    let others: Vec<Piece> = RESTORE_ORDER.into_iter().filter(|p| *p != Piece::Nested).collect();
    restore_only(&target, &state, &source, &others).unwrap();
}

/// A KVM that cannot shift a guest's TSC says that it did: then the piece is what finds out.
#[test]
fn without_the_tsc_offset_a_vcpu_is_another() {
    let Some(source) = source() else { return };
    let mut state = save(&source);
    state.tsc.offset = state.tsc.offset.wrapping_add(1 << 50);
    let close = |machine: &Machine| {
        let found = save_as(machine, &source).tsc.offset;
        found.wrapping_sub(state.tsc.offset).cast_signed().unsigned_abs() < 1 << 40
    };
    let with = target();
    match restore_to(&with, &state, &source) {
        Ok(_) => assert!(close(&with)),
        Err(KvmError::Missing { .. }) => assert!(!Mover::probe(&source.vcpus[0]).unwrap().moves()),
        Err(other) => panic!("{other}"),
    }
    let without = target();
    let others: Vec<Piece> = RESTORE_ORDER.into_iter().filter(|p| *p != Piece::TscOffset).collect();
    restore_only(&without, &state, &source, &others).unwrap();
    assert!(!close(&without));
}

#[test]
fn every_piece_is_saved_and_restored_exactly_once() {
    for piece in SAVE_ORDER {
        assert_eq!(SAVE_ORDER.iter().filter(|p| **p == piece).count(), 1);
        assert_eq!(RESTORE_ORDER.iter().filter(|p| **p == piece).count(), 1);
    }
}

#[test]
fn all_pieces_at_once_come_back_and_a_second_hop_changes_nothing() {
    let Some(source) = source() else { return };
    // Events and MP state last: an earlier call might take a pending one away.
    for piece in RESTORE_ORDER {
        distinguish(&source, piece);
    }
    let state = save(&source);
    let (first, second) = (target(), target());
    restore_to(&first, &state, &source).unwrap();
    let again = save_as(&first, &source);
    restore_to(&second, &again, &source).unwrap();
    let found = save_as(&second, &source);
    for piece in RESTORE_ORDER {
        assert_eq!(difference(piece, &state, &found), None, "{}", piece.name());
    }
}

#[test]
fn only_a_guest_that_enabled_its_kvmclock_is_told_that_it_was_stopped() {
    let with = |index, data| VcpuState { msrs: vec![Msr { index, data }], ..Default::default() };
    assert!(with(0x4b56_4d01, 0x7001).has_kvmclock() && with(0x12, 0x7001).has_kvmclock());
    assert!(!with(0x4b56_4d01, 0x7000).has_kvmclock() && !with(0x4b56_4d02, 1).has_kvmclock());
}

#[test]
fn the_deadline_restored_before_the_apic_is_lost() {
    let Some(source) = source() else { return };
    distinguish(&source, Piece::TscDeadline);
    let state = save(&source);
    let target = target();
    let mut wrong: Vec<Piece> = RESTORE_ORDER.into_iter().filter(|p| *p != Piece::TscDeadline).collect();
    let apic = wrong.iter().position(|p| *p == Piece::Lapic).unwrap();
    wrong.insert(apic, Piece::TscDeadline);
    restore_only(&target, &state, &source, &wrong).unwrap();
    let found = save_as(&target, &source);
    assert_ne!(found.tsc_deadline, far_future(), "the order would not matter");
}

#[test]
fn what_reads_back_differently_is_an_error_that_names_it() {
    let Some(source) = source() else { return };
    let state = save(&source);
    let target = target();
    restore_to(&target, &state, &source).unwrap();
    let mut other = state.clone();
    other.regs.rip ^= 1;
    let error = read_back(&target.vcpus[0], &other, &context(&target, &source)).unwrap_err();
    assert!(matches!(error, KvmError::ReadBack { piece: "general registers", .. }), "{error}");
}

#[test]
fn an_msr_that_is_not_there_is_an_error_that_names_it_when_read_and_when_written() {
    let Some(machine) = source() else { return };
    let vcpu = &machine.vcpus[0];
    let indices = [0xc000_0081, 0xdead_beef, 0xc000_0082];
    let error = msr::read(vcpu, &indices).unwrap_err();
    assert!(matches!(error, KvmError::Msr { index: 0xdead_beef, .. }), "{error}");
    let msrs = indices.map(|index| saved::Msr { index, data: 0x1000 });
    let error = msr::write(vcpu, &msrs).unwrap_err();
    assert!(matches!(error, KvmError::Msr { index: 0xdead_beef, value: 0x1000, .. }), "{error}");
}

#[test]
fn a_read_only_msr_is_restored_only_where_it_has_the_value_already() {
    let Some(machine) = source() else { return };
    let vcpu = &machine.vcpus[0];
    let mtrr_capabilities = 0xfe;
    let here = msr::read(vcpu, &[mtrr_capabilities]).unwrap()[0];
    msr::write(vcpu, &[here]).unwrap();
    let other = saved::Msr { data: here.data ^ 1, ..here };
    assert!(matches!(msr::write(vcpu, &[other]), Err(KvmError::Msr { index: 0xfe, .. })));
}

#[test]
fn more_msrs_than_one_call_takes_are_all_read_and_written() {
    let Some(machine) = source() else { return };
    let vcpu = &machine.vcpus[0];
    let lstar = 0xc000_0082;
    let mut msrs = vec![saved::Msr { index: 0xc000_0081, data: 1 << 40 }; 2 * 255 + 5];
    msrs.push(saved::Msr { index: lstar, data: 0x7777_0000 });
    msr::write(vcpu, &msrs).unwrap();
    let indices: Vec<u32> = msrs.iter().map(|m| m.index).collect();
    assert_eq!(msr::read(vcpu, &indices).unwrap(), msrs);
}

#[test]
fn hostile_state_is_an_error() {
    let Some(source) = source() else { return };
    let state = save(&source);
    let refused = |change: &dyn Fn(&mut VcpuState)| {
        let mut state = state.clone();
        change(&mut state);
        let target = target();
        restore_only(&target, &state, &source, &RESTORE_ORDER).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|s| s.lapic.truncate(1000)));
    assert!(refused(&|s| s.xsave.resize(1 << 16, 0)));
    assert!(refused(&|s| s.xcrs = vec![s.xcrs[0]; 17]));
    assert!(refused(&|s| s.cpuid = vec![s.cpuid[0]; 300]));
    assert!(refused(&|s| s.cpuid.clear()), "without xsave in cpuid there is no xcr0 but 1");
    assert!(refused(&|s| s.nested = Some(vec![0; 4096])));
    assert!(refused(&|s| s.msrs.push(saved::Msr { index: 0xdead_beef, data: 1 })));
    assert!(refused(&|s| s.sregs.cr0 = !0));
    assert!(refused(&|s| s.mp_state = 99));
    if !source.caps.tsc_control {
        assert!(refused(&|s| s.tsc.khz /= 2));
    }
}

#[test]
fn sections_of_another_name_or_schema_are_refused() {
    let Some(source) = source() else { return };
    let section = save(&source).to_section(7);
    assert_eq!((section.instance, section.critical), (7, true));
    let newer = Section { version: SCHEMA + 1, ..section.clone() };
    assert!(matches!(VcpuState::from_section(&newer), Err(KvmError::Version { .. })));
    let other = Section { name: "other".into(), ..section };
    assert!(matches!(VcpuState::from_section(&other), Err(KvmError::Name { .. })));
}

#[test]
fn a_cpuid_that_is_there_already_counts_as_there_and_no_other_does() {
    let Some(source) = source() else { return };
    let vcpu = &source.vcpus[0];
    let cpuid = cpuid::read(vcpu).unwrap();
    assert!(cpuid::is_same(&cpuid, &cpuid));
    let with = |change: &dyn Fn(&mut CpuidEntry)| {
        let mut other = cpuid.clone();
        other.iter_mut().filter(|e| e.function == 1).for_each(change);
        cpuid::is_same(&other, &cpuid)
    };
    assert!(with(&|e| e.ecx ^= 1 << 27), "osxsave mirrors cr4");
    assert!(!with(&|e| e.ecx ^= 1 << 26));
    assert!(!with(&|e| e.ebx ^= 1 << 24), "the apic id");
    assert!(!cpuid::is_same(&cpuid[1..], &cpuid));
}
