//! The guests on KVM: they beat, they are checked, and they find what was changed behind their backs.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_SLAVE};

use super::harness::{Machine, change_irqchip, kvm_exists};
use super::*;

const SMALL: &[(u64, usize)] = &[(0, 16 << 20)];

#[test]
fn every_guest_beats_and_has_nothing_to_complain_about() {
    if !kvm_exists() {
        return;
    }
    for name in [
        "idle",
        "idle:fill=random",
        "dirtier:working-set=8MiB",
        "dirtier:working-set=8MiB,fill=text",
        "state",
        "clock",
    ] {
        for vcpus in [1, 3] {
            let machine = Machine::start(name, SMALL, vcpus);
            machine.run_for_beats(400);
            let guest: Guest = name.parse().unwrap();
            machine.paused(|_, memory| {
                assert_eq!(Guest::in_memory(memory), Some(guest.clone()));
                guest.verify(memory).unwrap()
            });
            machine.run_for_beats(100);
        }
    }
}

#[test]
fn a_dirtier_writes_at_its_rate_and_its_stamps_agree_at_every_pause() {
    if !kvm_exists() {
        return;
    }
    for rate in ["20MiB", "400MiB", "1TiB"] {
        for (pattern, vcpus) in [("sequential", 1), ("random", 2), ("hot", 3)] {
            let name = format!("dirtier:rate={rate},working-set=4MiB,pattern={pattern}");
            let guest: Guest = name.parse().unwrap();
            let machine = Machine::start(&name, SMALL, vcpus);
            let mut written = 0;
            for _ in 0..20 {
                machine.run_for_beats(20);
                let verified = machine.paused(|_, memory| guest.verify(memory)).unwrap();
                assert!(verified.pages_written > written && verified.pages_checked > 1024, "{verified:?}");
                written = verified.pages_written;
            }
            assert_eq!(machine.ended(), None, "{}", machine.text());
        }
    }
}

#[test]
fn a_slow_dirtier_writes_no_more_than_it_was_told() {
    if !kvm_exists() {
        return;
    }
    let guest: Guest = "dirtier:rate=4MiB,working-set=1MiB".parse().unwrap();
    let machine = Machine::start(&guest.to_string(), SMALL, 2);
    let start = std::time::Instant::now();
    machine.run_for_beats(1000);
    let written = guest.pages_written(&machine.memory).unwrap();
    // A batch for each vCPU may be ahead of its time.
    let limit = start.elapsed().as_secs_f64() * 1024.0 + 2.0 * schedule::BATCH_PAGES as f64;
    assert!(written > 0 && (written as f64) < limit, "{written} pages, at most {limit}");
}

#[test]
fn a_working_set_goes_round_the_hole_below_4_gib() {
    if !kvm_exists() {
        return;
    }
    let regions = [(0, 4 << 20), (4 << 30, 12 << 20)];
    let guest: Guest = "dirtier:rate=1TiB,working-set=10MiB".parse().unwrap();
    let machine = Machine::start(&guest.to_string(), &regions, 2);
    machine.run_for_beats(100);
    machine.wait_until("a lap", || guest.pages_written(&machine.memory).unwrap() > 3 * 2560);
    machine.paused(|_, memory| guest.verify(memory)).unwrap();
    assert_eq!(image::read_u64(&machine.memory, (4 << 30) + 0x1000).unwrap() >> 36, 0x10_0001);
}

/// Pages of a dirtier with a working set of 4 MiB on one vCPU: its count, its schedule, two stamped ones.
const STALE: [(&str, u64); 4] =
    [("count", layout::AREAS), ("schedule", 0x10_0000), ("early", 0x10_8000), ("middle", 0x30_0000)];

#[test]
fn an_old_copy_of_any_page_of_a_dirtier_is_found_by_host_and_guest() {
    if !kvm_exists() {
        return;
    }
    for pattern in ["sequential", "random", "hot"] {
        for (what, address) in STALE {
            let guest: Guest =
                format!("dirtier:rate=1TiB,working-set=4MiB,pattern={pattern}").parse().unwrap();
            let machine = Machine::start(&guest.to_string(), SMALL, 1);
            let mut old = vec![0; 4096];
            if what != "schedule" {
                machine.run_for_beats(20);
                machine.paused(|_, memory| image::read(memory, address, &mut old)).unwrap();
            }
            // The guest may be paused with its next count in a register and the comparison behind it: then it
            // writes over the old count, and nothing is lost or found.
            while machine.ended().is_none() {
                let written = guest.pages_written(&machine.memory).unwrap();
                machine.wait_until("laps", || {
                    machine.ended().is_some()
                        || guest.pages_written(&machine.memory).unwrap() > written + 12_000
                });
                if machine.ended().is_some() {
                    break;
                }
                let found = machine.paused(|_, memory| {
                    guest.verify(memory).unwrap();
                    image::write(memory, address, &old).unwrap();
                    guest.verify(memory)
                });
                let found = found.unwrap_err().to_string();
                if what == "early" || what == "middle" {
                    let page = address / 4096;
                    assert!(found.contains(&format!("page {page:#x} of vCPU 0 is stale")), "{found}");
                }
                if what != "count" {
                    break;
                }
            }
            let code = machine.wait_for_end();
            let text = machine.text();
            if what == "schedule" {
                // Whatever its zeros lead to: a jump to nowhere.
                assert_ne!(code, 0, "{text}");
            } else {
                assert_eq!(code, exit_code::STALE_MEMORY, "{pattern} {what}: {text}");
                assert!(
                    text.starts_with("guest dirtier: vCPU 0x0: ") && text.contains(", found 0x"),
                    "{text}"
                );
            }
        }
    }
}

#[test]
fn a_changed_page_of_a_filled_guest_is_found_by_the_host() {
    if !kvm_exists() {
        return;
    }
    for name in [
        "idle:fill=random",
        "idle:fill=text",
        "idle:fill=heap",
        "dirtier:working-set=4MiB,pattern=random,fill=heap",
        "dirtier:working-set=10MiB,fill=text", // behind the stamp of a page that is written
    ] {
        let guest: Guest = name.parse().unwrap();
        let machine = Machine::start(name, SMALL, 1);
        machine.run_for_beats(10);
        let text = machine.paused(|_, memory| {
            assert!(guest.verify(memory).unwrap().pages_checked > 3790);
            image::write(memory, 0x70_1238, &[0x55; 8]).unwrap();
            guest.verify(memory).unwrap_err().to_string()
        });
        let expected = "page 0x701 is not as it was loaded: the fill at 0x701238 should be 0x";
        assert!(text.contains(expected), "{name}: {text}");
    }
}

/// Where the redirection entries are in kvm_ioapic_state.
const REDIRECTION: usize = 24;

/// Changes something behind the guest's back.
type Change = fn(&kvm_ioctls::VmFd, &mut kvm_ioctls::VcpuFd);

#[test]
fn whatever_is_changed_behind_the_state_guest_it_reports() {
    if !kvm_exists() {
        return;
    }
    let msr = |fd: &kvm_ioctls::VcpuFd, index, data| {
        let msrs = kvm_bindings::Msrs::from_entries(&[kvm_bindings::kvm_msr_entry {
            index,
            data,
            ..Default::default()
        }]);
        assert_eq!(fd.set_msrs(&msrs.unwrap()).unwrap(), 1);
    };
    // One class of state each, and what the guest is to name.
    let changes: [(&str, Change); 19] = [
        ("R13", |_, fd| {
            let mut regs = fd.get_regs().unwrap();
            regs.r13 ^= 1;
            fd.set_regs(&regs).unwrap();
        }),
        ("x87 or SSE registers", |_, fd| {
            let mut fpu = fd.get_fpu().unwrap();
            fpu.xmm[11][3] ^= 1;
            fd.set_fpu(&fpu).unwrap();
        }),
        ("x87 or SSE registers", |_, fd| {
            let mut fpu = fd.get_fpu().unwrap();
            fpu.fpr[5][3] ^= 1;
            fd.set_fpu(&fpu).unwrap();
        }),
        ("x87 control", |_, fd| {
            let mut fpu = fd.get_fpu().unwrap();
            fpu.fcw = 0x37f;
            fd.set_fpu(&fpu).unwrap();
        }),
        ("CR2", |_, fd| sregs(fd, |s| s.cr2 ^= 8)),
        ("CR8", |_, fd| sregs(fd, |s| s.cr8 = 1)),
        ("CR0", |_, fd| sregs(fd, |s| s.cr0 ^= 1 << 18)),
        ("CR4", |_, fd| sregs(fd, |s| s.cr4 ^= 1 << 3)),
        ("MSR FS_BASE", |_, fd| sregs(fd, |s| s.fs.base ^= 8)),
        ("DR3", |_, fd| {
            let mut debug = fd.get_debug_regs().unwrap();
            debug.db[3] ^= 1;
            fd.set_debug_regs(&debug).unwrap();
        }),
        ("DR6", |_, fd| {
            let mut debug = fd.get_debug_regs().unwrap();
            debug.dr6 ^= 1;
            fd.set_debug_regs(&debug).unwrap();
        }),
        ("APIC LINT0 entry", |_, fd| {
            let mut lapic = fd.get_lapic().unwrap();
            lapic.regs[0x350] ^= 1;
            fd.set_lapic(&lapic).unwrap();
        }),
        ("APIC timer initial count", |_, fd| {
            let mut lapic = fd.get_lapic().unwrap();
            lapic.regs[0x380] ^= 1;
            fd.set_lapic(&lapic).unwrap();
        }),
        ("APIC timer entry", |_, fd| {
            let mut lapic = fd.get_lapic().unwrap();
            lapic.regs[0x322] ^= 2;
            fd.set_lapic(&lapic).unwrap();
        }),
        ("PIC 2 mask", |vm, _| {
            change_irqchip(vm, KVM_IRQCHIP_PIC_SLAVE, |pic| pic[2] = 0); // kvm_pic_state.imr
        }),
        ("IOAPIC entry of pin 9, low", |vm, _| {
            change_irqchip(vm, KVM_IRQCHIP_IOAPIC, |ioapic| ioapic[REDIRECTION + 9 * 8] ^= 1);
        }),
        ("PIT channel 2 mode", |vm, _| {
            let mut pit = vm.get_pit2().unwrap();
            pit.channels[2].mode = 3;
            vm.set_pit2(&pit).unwrap();
        }),
        ("PIT channel 2 count", |vm, _| {
            let mut pit = vm.get_pit2().unwrap();
            pit.channels[2].count = 0x1_0000;
            vm.set_pit2(&pit).unwrap();
        }),
        ("ticks stopped, of the PIT", |vm, _| {
            change_irqchip(vm, KVM_IRQCHIP_IOAPIC, |ioapic| {
                for pin in [0, 2] {
                    ioapic[REDIRECTION + pin * 8 + 2] |= 1; // masked
                }
            });
        }),
    ];
    let expect = |what: &str, machine: &Machine| {
        let code = machine.wait_for_end();
        assert!(code != 0 && machine.text().contains(&format!(": {what}")), "{what}: {}", machine.text());
    };
    for (what, change) in changes {
        let machine = Machine::start("state", SMALL, 1);
        machine.run_for_beats(10);
        machine.halted(0, change);
        expect(what, &machine);
    }
    for (what, index) in [
        ("MSR STAR", 0xc000_0081),
        ("MSR LSTAR", 0xc000_0082),
        ("MSR CSTAR", 0xc000_0083),
        ("MSR SFMASK", 0xc000_0084),
        ("MSR KERNEL_GS_BASE", 0xc000_0102),
        ("MSR SYSENTER_EIP", 0x176),
        ("MSR PAT", 0x277),
        ("MSR MTRR_PHYSBASE0", 0x200),
    ] {
        let machine = Machine::start("state", SMALL, 1);
        machine.run_for_beats(10);
        machine.halted(0, |_, fd| msr(fd, index, 0));
        expect(what, &machine);
    }
    for (what, register) in
        [("serial scratch", 7), ("serial line control", 3), ("serial interrupt", 1), ("serial modem", 4)]
    {
        let machine = Machine::start("state", SMALL, 1);
        machine.run_for_beats(10);
        machine.change_serial(register, 0);
        expect(what, &machine);
    }
    // Another vCPU than the first, by its own values.
    let machine = Machine::start("state", SMALL, 3);
    machine.run_for_beats(10);
    machine.halted(2, |_, fd| msr(fd, 0xc000_0082, 0));
    expect("MSR LSTAR: expected 0xffff800200001000, found 0x0", &machine);
    assert!(machine.text().starts_with("guest state: vCPU 0x2: "), "{}", machine.text());
}

#[test]
fn a_clock_that_goes_backwards_or_stops_is_reported() {
    if !kvm_exists() {
        return;
    }
    // Not by writing the TSC, which some hosts ignore: by what the guest remembers of it.
    let machine = Machine::start("clock", SMALL, 2);
    machine.run_for_beats(50);
    machine.paused(|_, memory| image::write(memory, clock::LAST_TSC, &(1_u64 << 63).to_le_bytes())).unwrap();
    assert_eq!(machine.wait_for_end(), exit_code::TIME_BACKWARDS, "{}", machine.text());
    assert!(machine.text().contains("any vCPU: expected 0x8000000000000000, found 0x"), "{}", machine.text());
    let machine = Machine::start("clock", SMALL, 2);
    machine.run_for_beats(50);
    machine.halted(1, |_, fd| {
        let mut regs = fd.get_regs().unwrap();
        regs.r12 = 1 << 63;
        fd.set_regs(&regs).unwrap();
    });
    assert_eq!(machine.wait_for_end(), exit_code::TIME_BACKWARDS, "{}", machine.text());
    assert!(machine.text().contains("the vCPU's own earlier reading"), "{}", machine.text());
    // The timer of the second vCPU, then the first's own: masked.
    for (vcpu, text) in
        [(1, "of the PIT or another vCPU's APIC timer"), (0, "the vCPU's own APIC timer stopped")]
    {
        let machine = Machine::start("clock", SMALL, 2);
        machine.run_for_beats(50);
        machine.paused(|fds, _| {
            let mut lapic = fds[vcpu].get_lapic().unwrap();
            lapic.regs[0x322] |= 1;
            fds[vcpu].set_lapic(&lapic).unwrap();
        });
        assert_eq!(machine.wait_for_end(), exit_code::TICKS_STALLED, "{}", machine.text());
        assert!(machine.text().contains(text), "{}", machine.text());
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    for (name, bytes, vcpus, expected) in [
        ("dirtier", 64 << 20, 1, "give it more with --memory, or choose a smaller working-set"),
        ("dirtier:working-set=15MiB", 16 << 20, 1, "give it more"),
        ("dirtier:working-set=16777215TiB", 16 << 20, 1, "give it more"),
        ("dirtier:working-set=4KiB", 16 << 20, 2, "no page for each of 2 vCPUs"),
        ("idle", 1 << 20, 1, "needs 1052672 bytes"),
        ("idle", 16 << 20, 0, "1 to 64 vCPUs, not 0"),
        ("idle", 16 << 20, 65, "1 to 64 vCPUs, not 65"),
    ] {
        let memory = Memory::from_ranges(&[(vm_memory::GuestAddress(0), bytes)]).unwrap();
        let guest: Guest = name.parse().unwrap();
        let error = guest.load(&memory, vcpus, 2_000_000).unwrap_err().to_string();
        assert!(error.contains(expected), "{name}: {error}");
        assert!(matches!(guest.verify(&memory), Err(WorkloadError::OtherGuest { .. })));
    }
}

#[test]
fn every_guest_but_a_large_dirtier_fits_into_2_mib() {
    if !kvm_exists() {
        return;
    }
    for name in ["idle:fill=random", "dirtier:rate=1TiB,working-set=768KiB", "state", "clock"] {
        let machine = Machine::start(name, &[(0, 2 << 20)], 1);
        machine.run_for_beats(50);
        machine.paused(|_, memory| name.parse::<Guest>().unwrap().verify(memory)).unwrap();
    }
}

fn sregs(fd: &kvm_ioctls::VcpuFd, change: fn(&mut kvm_bindings::kvm_sregs)) {
    let mut sregs = fd.get_sregs().unwrap();
    change(&mut sregs);
    fd.set_sregs(&sregs).unwrap();
}
