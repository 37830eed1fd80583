//! Small programs in 32-bit protected mode: how they see devices, and how they end.

use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::*;

/// Where programs lie.
const BASE: u64 = 0x10_0000;

pub(super) fn program(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut code = CodeAssembler::new(32).unwrap();
    write(&mut code).unwrap();
    code.assemble(BASE).unwrap()
}

/// Runs a program to its end.
fn end_of(code: &[u8]) -> (End, String) {
    let text = Text::default();
    let console = text.console();
    let mut machine = machine_of(code, console.clone());
    let monitor = machine.monitor();
    machine.run().unwrap();
    let end = monitor.wait_end(PATIENCE).expect("the program ends");
    assert_eq!(monitor.state(), RunState::Ended);
    assert!(machine.run().is_err() && machine.pause().is_err(), "an ended machine neither runs nor pauses");
    console.flush(PATIENCE).unwrap();
    (end, text.read())
}

fn exit(code: &mut CodeAssembler) -> Result<(), IcedError> {
    code.out(0xf4, al)
}

#[test]
fn a_byte_at_the_debug_exit_port_ends_the_machine() {
    if !kvm() {
        return;
    }
    for value in [0, 7] {
        let code = program(|a| {
            a.mov(al, value)?;
            exit(a)
        });
        assert_eq!(end_of(&code).0, End::Exit(value as u8));
    }
}

#[test]
fn resets_and_shutdowns_end_the_machine() {
    if !kvm() {
        return;
    }
    let reset = program(|a| {
        a.mov(al, 0xfe)?;
        a.out(0x64, al)
    });
    assert_eq!(end_of(&reset).0, End::Reset);
    // There is no IDT yet: a triple fault.
    assert_eq!(end_of(&program(|a| a.ud2())).0, End::Shutdown);
}

#[test]
fn single_wide_and_string_accesses_reach_the_serial_port_as_they_should() {
    if !kvm() {
        return;
    }
    let code = program(|a| {
        let mut over = a.create_label();
        a.mov(edx, 0x3f8)?;
        a.mov(al, i32::from(b'>'))?;
        a.out(dx, al)?;
        a.cld()?;
        // Four bytes through one port: not a wide access, which would go to four registers.
        a.call(over)?;
        a.db(b"abcd")?;
        a.set_label(&mut over)?;
        a.pop(esi)?;
        a.mov(ecx, 4)?;
        a.rep().outsb()?;
        // A wide one: the scratch register and nothing else.
        a.mov(edx, 0x3fe)?;
        a.mov(eax, 0x7700)?;
        a.out(dx, ax)?;
        a.mov(edx, 0x3ff)?;
        a.in_(al, dx)?;
        exit(a)
    });
    assert_eq!(end_of(&code), (End::Exit(0x77), ">abcd".into()));
}

#[test]
fn memory_that_is_not_there_reads_as_ones() {
    if !kvm() {
        return;
    }
    let code = program(|a| {
        a.mov(dword_ptr(0xd000_0000u32), 5)?;
        a.mov(eax, dword_ptr(0xd000_0000u32))?;
        a.inc(eax)?;
        exit(a)
    });
    assert_eq!(end_of(&code).0, End::Exit(0));
}

#[test]
fn fwait_and_int3_do_what_the_manual_says() {
    if !kvm() {
        return;
    }
    let code = program(|a| {
        let mut over = a.create_label();
        a.call(over)?;
        // The handler; it returns by hand, since KVM does not interpret a 32-bit IRET either.
        a.add(ebx, 10)?;
        a.pop(ecx)?;
        a.add(esp, 8)?;
        a.jmp(ecx)?;
        a.set_label(&mut over)?;
        // Gate 3 of a table at 0x8000: an interrupt gate to the handler through the flat code segment.
        a.pop(eax)?;
        a.mov(ebx, 0x8000 + 3 * 8)?;
        a.mov(word_ptr(ebx), ax)?;
        a.shr(eax, 16)?;
        a.mov(word_ptr(ebx + 2), 0x10)?;
        a.mov(word_ptr(ebx + 4), 0x8e00)?;
        a.mov(word_ptr(ebx + 6), ax)?;
        a.mov(dword_ptr(0x7ff0), 0x8000_0000u32 | 0xfff)?;
        a.mov(word_ptr(0x7ff4), 0)?;
        a.lidt(ptr(0x7ff0))?;
        a.xor(ebx, ebx)?;
        a.wait()?;
        a.inc(ebx)?;
        a.int3()?;
        // Where the handler returns to: behind the instruction.
        a.inc(ebx)?;
        a.mov(eax, ebx)?;
        exit(a)
    });
    assert_eq!(end_of(&code).0, End::Exit(12));
}

#[test]
fn a_pause_stops_the_guest_and_a_run_continues_it() {
    if !kvm() {
        return;
    }
    let code = program(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.out(0xe0, al)?;
        a.jmp(again)
    });
    let mut machine = machine_of(&code, Console::none());
    let monitor = machine.monitor();
    let beats_on = |from: u64| wait("heartbeat", || monitor.heartbeats() > from, String::new);
    assert_eq!((monitor.heartbeats(), monitor.state()), (0, RunState::Paused));
    machine.run().unwrap();
    beats_on(1000);
    assert_eq!(monitor.state(), RunState::Running);
    assert!(machine.save().is_err(), "a running machine is not saved");
    machine.pause().unwrap();
    let (count, last) = (monitor.heartbeats(), monitor.last_heartbeat_ns());
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((monitor.heartbeats(), monitor.last_heartbeat_ns()), (count, last));
    machine.run().unwrap();
    beats_on(count);
    machine.end();
    assert_eq!((monitor.state(), monitor.end()), (RunState::Ended, None));
}

#[test]
fn a_second_vcpu_waits_for_its_start_up_signal_and_then_runs() {
    if !kvm() {
        return;
    }
    let code = program(|a| {
        let (mut over, mut again) = (a.create_label(), a.create_label());
        // Real-mode code to 0x8000, where start-up vector 8 enters.
        a.cld()?;
        a.call(over)?;
        // 16-bit: mov al, 42; out 0xf4, al
        a.db(&[0xb0, 42, 0xe6, 0xf4])?;
        a.set_label(&mut over)?;
        a.pop(esi)?;
        a.mov(edi, 0x8000)?;
        a.mov(ecx, 16)?;
        a.rep().movsb()?;
        // Local APIC on; INIT, then start-up, to all others.
        a.mov(dword_ptr(0xfee0_00f0u32), 0x1ff)?;
        a.mov(dword_ptr(0xfee0_0300u32), 0xc_4500)?;
        a.mov(dword_ptr(0xfee0_0300u32), 0xc_4608)?;
        a.set_label(&mut again)?;
        a.pause()?;
        a.jmp(again)
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bzimage(&code)).unwrap();
    let workload = Workload::Kernel { kernel: file.path().into(), initrd: None, cmdline: String::new() };
    let config = MachineConfig {
        memory_bytes: 4 << 20,
        vcpus: 2,
        workload,
        console: Console::none(),
        tracking: Tracking::default(),
    };
    let mut machine = Machine::boot(config).unwrap();
    let monitor = machine.monitor();
    machine.run().unwrap();
    assert_eq!(monitor.wait_end(PATIENCE), Some(End::Exit(42)));
}

#[test]
fn an_elf_kernel_is_entered_with_the_pvh_start_info() {
    if !kvm() {
        return;
    }
    // Exit code: 0 when magic, one module with the initrd's first bytes, command line and memory map are there.
    let code = program(|a| {
        let mut wrong = a.create_label();
        a.cmp(dword_ptr(ebx), 0x336e_c578)?;
        a.jne(wrong)?;
        a.cmp(dword_ptr(ebx + 12), 1)?;
        a.jne(wrong)?;
        a.mov(eax, dword_ptr(ebx + 16))?;
        a.mov(eax, dword_ptr(eax))?;
        a.cmp(dword_ptr(eax), 0x7469_6e69)?;
        a.jne(wrong)?;
        a.mov(eax, dword_ptr(ebx + 24))?;
        a.cmp(dword_ptr(eax), 0x2065_6e6f)?;
        a.jne(wrong)?;
        a.cmp(dword_ptr(ebx + 48), 3)?;
        a.jne(wrong)?;
        a.xor(eax, eax)?;
        exit(a)?;
        a.set_label(&mut wrong)?;
        a.mov(al, 1)?;
        exit(a)
    });
    let dir = tempfile::tempdir().unwrap();
    let (kernel, initrd) = (dir.path().join("vmlinux"), dir.path().join("initrd"));
    std::fs::write(&kernel, elf(&code)).unwrap();
    std::fs::write(&initrd, b"initrd").unwrap();
    let workload = Workload::Kernel { kernel, initrd: Some(initrd), cmdline: "one two".into() };
    let config = MachineConfig {
        memory_bytes: 4 << 20,
        vcpus: 1,
        workload,
        console: Console::none(),
        tracking: Tracking::default(),
    };
    let mut machine = Machine::boot(config).unwrap();
    let monitor = machine.monitor();
    machine.run().unwrap();
    assert_eq!(monitor.wait_end(PATIENCE), Some(End::Exit(0)));
}

/// A 64-bit ELF with one segment, loaded at `BASE`, and a note that says that PVH enters there.
fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 2 * 56;
    const NOTE: u64 = 20;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1u32.to_le_bytes());
    file.extend([BASE, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0u32.to_le_bytes());
    file.extend([64u16, 56, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64| {
        file.extend([kind, 5].map(u32::to_le_bytes).concat());
        file.extend([offset, address, address, bytes, bytes, 4].map(u64::to_le_bytes).concat());
    };
    segment(4, HEADERS, 0, NOTE);
    segment(1, HEADERS + NOTE, BASE, code.len() as u64);
    file.extend([4u32, 4, 18].map(u32::to_le_bytes).concat());
    file.extend(b"Xen\0");
    file.extend((BASE as u32).to_le_bytes());
    file.extend(code);
    file
}
