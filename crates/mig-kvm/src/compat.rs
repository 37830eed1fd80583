//! Whether a guest's CPU can go on here: what the guest was given against what this host's KVM can give.
//!
//! A guest looks at CPUID when it boots and believes it for ever, so every feature it was given must be
//! here, and every one that is not is named before a page moves. More than it was given does no harm: the
//! destination gives the guest exactly the source's CPUID.

mod names;

use std::ops::Deref;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use mig::{Refusal, Section};
use serde::{Deserialize, Serialize};

use crate::cap::Caps;
use crate::error::{Call, KvmError};
use crate::time::{self, GuestTime};
use crate::vcpu::saved::{CpuidEntry, Msr};
use crate::vcpu::tsc::Mover;
use crate::vcpu::{SaveContext, cpuid, msr};
use names::{FEATURES, Register};

/// The name of the section that describes a guest's CPU.
pub const NAME: &str = "kvm.cpu";
/// Its schema.
pub const SCHEMA: u16 = 1;

/// What a guest was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Platform {
    cpuid: Vec<CpuidEntry>,
    feature_msrs: Vec<Msr>,
    xsave_bytes: u64,
    tsc_khz: u32,
    boot_id: Option<[u8; 16]>,
}

/// What this host can give.
#[derive(Debug, Clone)]
struct Host {
    cpuid: Vec<CpuidEntry>,
    feature_msrs: Vec<Msr>,
    xsave_bytes: u64,
    tsc_khz: u32,
    tsc_control: bool,
    tsc_shift: bool,
    boot_id: Option<[u8; 16]>,
    tsc_deadline_timer: bool,
}

/// Describes the CPU that a guest was given. Asked of its first vCPU before it runs (a vCPU's calls wait for
/// KVM_RUN); the others are alike but for their places.
///
/// # Errors
/// The first call that fails; [`KvmError::NoSuchVcpu`] when `context` knows no vCPU.
pub fn platform_section(vcpu: &VcpuFd, context: &SaveContext) -> Result<Section, KvmError> {
    let given = context.given.first().ok_or(KvmError::NoSuchVcpu { vcpu: 0 })?;
    let platform = Platform {
        cpuid: given.cpuid().into(),
        feature_msrs: msr::read(vcpu, context.feature_msrs())?,
        xsave_bytes: context.caps.xsave_bytes as u64,
        tsc_khz: given.tsc_khz(),
        boot_id: context.boot_id,
    };
    Ok(Section::critical(NAME, 0, SCHEMA, &platform))
}

/// Gives vCPUs, all of a guest's by index, the CPU that a section describes, before the guest's state arrives:
/// so that what its state is made of is known, and nothing of it needs to be asked or given, while the guest is
/// paused. The section describes the first vCPU's; `place` turns a leaf of that into the leaf of another vCPU,
/// in its place in the topology. One that turns out to have been given another CPUID gets it with its state.
///
/// # Errors
/// The section is none of ours, or KVM refuses: [`check`] would have said why.
pub fn adopt<V: Deref<Target = VcpuFd>>(
    vcpus: &[V],
    section: &Section,
    place: impl Fn(usize, &mut CpuidEntry),
) -> Result<(), KvmError> {
    let platform: Platform = crate::state::decode(section, NAME, SCHEMA)?;
    for (index, vcpu) in vcpus.iter().enumerate() {
        let mut leaves = platform.cpuid.clone();
        if index > 0 {
            leaves.iter_mut().for_each(|leaf| place(index, leaf));
        }
        cpuid::write(vcpu, &leaves)?;
        if vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")? != platform.tsc_khz {
            vcpu.set_tsc_khz(platform.tsc_khz).call("KVM_SET_TSC_KHZ")?;
        }
        msr::write(vcpu, &platform.feature_msrs)?;
    }
    Ok(())
}

/// What a section of [`platform_section`] says, as debug text.
///
/// # Errors
/// The section is none of ours.
pub fn text(section: &Section) -> Result<String, KvmError> {
    let platform: Platform = crate::state::decode(section, NAME, SCHEMA)?;
    Ok(format!("{platform:?}"))
}

/// Every reason why this host cannot run the guest that a section describes, its time going on as chosen; none
/// when it can. Makes a VM of its own for a moment, to ask KVM itself.
pub fn check(kvm: &Kvm, section: &Section, time: GuestTime) -> Vec<Refusal> {
    let platform: Platform = match crate::state::decode(section, NAME, SCHEMA) {
        Ok(platform) => platform,
        Err(e) => return vec![Refusal::new("cpu", with_sources(&e), "use the same release on both sides")],
    };
    let judged = Host::probe(kvm).map(|(host, scratch)| {
        let mut refusals = compare(&platform, &host);
        refusals.extend(standstill(&host, time));
        // What is missing by name would only be repeated by the trial.
        if refusals.is_empty() {
            refusals.extend(try_on(&scratch.vcpu, &platform));
        }
        refusals
    });
    judged.unwrap_or_else(|e| vec![Refusal::new("cpu", with_sources(&e), "see what /dev/kvm offers")])
}

/// A VM that is never run, with one vCPU.
struct Scratch {
    vcpu: VcpuFd,
    _vm: kvm_ioctls::VmFd,
}

impl Host {
    fn probe(kvm: &Kvm) -> Result<(Self, Scratch), KvmError> {
        let vm = kvm.create_vm().call("KVM_CREATE_VM")?;
        let caps = Caps::probe(kvm, &vm)?;
        let vcpu = vm.create_vcpu(0).call("KVM_CREATE_VCPU")?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).call("KVM_GET_SUPPORTED_CPUID")?;
        vcpu.set_cpuid2(&supported).call("KVM_SET_CPUID2")?;
        let mut cpuid: Vec<CpuidEntry> = supported.as_slice().iter().map(CpuidEntry::from).collect();
        // A KVM that cannot hide the host's CPUID shows guests more than it says it supports.
        for shown in cpuid::read(&vcpu)? {
            let same = |e: &&mut CpuidEntry| (e.function, e.index) == (shown.function, shown.index);
            match cpuid.iter_mut().find(same) {
                Some(entry) if is_feature_leaf(&shown) => {
                    entry.eax |= shown.eax;
                    entry.ebx |= shown.ebx;
                    entry.ecx |= shown.ecx;
                    entry.edx |= shown.edx;
                }
                Some(_) => {}
                None => cpuid.push(shown),
            }
        }
        let host = Self {
            cpuid,
            feature_msrs: system_feature_msrs(kvm)?,
            xsave_bytes: caps.xsave_bytes as u64,
            tsc_khz: vcpu.get_tsc_khz().call("KVM_GET_TSC_KHZ")?,
            tsc_control: caps.tsc_control,
            tsc_shift: Mover::probe(&vcpu)?.moves(),
            boot_id: time::boot_id().ok(),
            tsc_deadline_timer: kvm.check_extension(Cap::TscDeadlineTimer),
        };
        Ok((host, Scratch { vcpu, _vm: vm }))
    }
}

fn is_feature_leaf(entry: &CpuidEntry) -> bool {
    FEATURES.iter().any(|f| (f.function, f.index) == (entry.function, entry.index))
}

fn system_feature_msrs(kvm: &Kvm) -> Result<Vec<Msr>, KvmError> {
    let list = kvm.get_msr_feature_index_list().call("KVM_GET_MSR_FEATURE_INDEX_LIST")?;
    Ok(list.as_slice().iter().filter_map(|index| msr::read_system(kvm, *index)).collect())
}

const HARDWARE: &str = "move to a host that has it, or start the guest without it";

fn compare(guest: &Platform, host: &Host) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    vendor(guest, host, &mut refusals);
    feature_bits(guest, host, &mut refusals);
    xsave(guest, host, &mut refusals);
    address_bits(guest, host, &mut refusals);
    performance_counters(guest, host, &mut refusals);
    feature_msrs(guest, host, &mut refusals);
    tsc(guest, host, &mut refusals);
    refusals
}

fn leaf(cpuid: &[CpuidEntry], function: u32, index: u32) -> Option<&CpuidEntry> {
    cpuid.iter().find(|e| (e.function, e.index) == (function, index))
}

fn register(cpuid: &[CpuidEntry], function: u32, index: u32, register: Register) -> u32 {
    leaf(cpuid, function, index).map_or(0, |e| match register {
        Register::Eax => e.eax,
        Register::Ebx => e.ebx,
        Register::Ecx => e.ecx,
        Register::Edx => e.edx,
    })
}

fn vendor(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    let name = |cpuid: &[CpuidEntry]| {
        let registers = [Register::Ebx, Register::Edx, Register::Ecx].map(|r| register(cpuid, 0, 0, r));
        let bytes = registers.iter().flat_map(|r| r.to_le_bytes());
        bytes.map(|b| if b.is_ascii_graphic() { char::from(b) } else { '?' }).collect::<String>()
    };
    let (given, here) = (name(&guest.cpuid), name(&host.cpuid));
    if given != here {
        let cause = format!("the guest has {given}, this host is {here}");
        refusals.push(Refusal::new("cpu vendor", cause, "move to a host of the same vendor"));
    }
}

fn feature_bits(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    const TSC_DEADLINE_TIMER: u32 = 1 << 24;
    for features in FEATURES {
        let of = |cpuid| register(cpuid, features.function, features.index, features.register);
        let mut here = of(&host.cpuid) | features.free;
        // Older kernels provide it without saying so in the supported CPUID.
        if (features.function, features.register) == (1, Register::Ecx) && host.tsc_deadline_timer {
            here |= TSC_DEADLINE_TIMER;
        }
        let missing = of(&guest.cpuid) & !here;
        for bit in (0..32).filter(|bit| missing >> bit & 1 == 1) {
            let cause = "the guest was given it, this host does not have it";
            refusals.push(Refusal::new(features.bit_name(bit), cause, HARDWARE));
        }
    }
}

fn xsave(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    if guest.xsave_bytes > host.xsave_bytes {
        let cause =
            format!("the guest's takes {} bytes, this host's {}", guest.xsave_bytes, host.xsave_bytes);
        refusals.push(Refusal::new("xsave area", cause, HARDWARE));
    }
    // A component's size and offset in the standard form are part of what is saved.
    let components = register(&guest.cpuid, 0xd, 0, Register::Eax);
    for component in (2..32).filter(|c| components >> c & 1 == 1) {
        let place = |cpuid| leaf(cpuid, 0xd, component).map(|e| (e.eax, e.ebx));
        if let (Some(given), Some(here)) = (place(&guest.cpuid), place(&host.cpuid))
            && given != here
        {
            let cause = format!("the guest has (size, offset) {given:?}, this host {here:?}");
            let what = format!("xsave component {component}");
            refusals.push(Refusal::new(what, cause, "move to a host of the same kind"));
        }
    }
}

fn address_bits(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    let sizes = |cpuid: &[CpuidEntry]| register(cpuid, 0x8000_0008, 0, Register::Eax);
    for (what, shift) in [("physical address bits", 0), ("linear address bits", 8)] {
        let (given, here) = (sizes(&guest.cpuid) >> shift & 0xff, sizes(&host.cpuid) >> shift & 0xff);
        if given > here {
            let cause = format!("the guest has {given}, this host {here}");
            refusals.push(Refusal::new(what, cause, HARDWARE));
        }
    }
}

fn performance_counters(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    // Leaf 10 (SDM volume 2, CPUID): version, counters and their width in EAX, fixed ones in EDX.
    let fields = [
        ("pmu version", Register::Eax, 0, 0xff),
        ("pmu counters", Register::Eax, 8, 0xff),
        ("pmu counter width", Register::Eax, 16, 0xff),
        ("pmu fixed counters", Register::Edx, 0, 0x1f),
        ("pmu fixed counter width", Register::Edx, 5, 0xff),
    ];
    for (what, field, shift, mask) in fields {
        let of = |cpuid| register(cpuid, 0xa, 0, field) >> shift & mask;
        let (given, here) = (of(&guest.cpuid), of(&host.cpuid));
        if given > here {
            let cause = format!("the guest has {given}, this host {here}");
            refusals.push(Refusal::new(what, cause, HARDWARE));
        }
    }
}

fn standstill(host: &Host, time: GuestTime) -> Option<Refusal> {
    (time == GuestTime::Stop && !host.tsc_shift).then(|| {
        let cause = "it is to stand still, and this kvm cannot shift a guest's tsc, which goes on";
        Refusal::new("guest time", cause, "let it advance, or move to a host with vmx or svm")
    })
}

fn tsc(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    let (guest_khz, host_khz) = (guest.tsc_khz, host.tsc_khz);
    if !host.tsc_control && !time::within_tolerance(guest_khz, host_khz) {
        let cause = format!("the guest counts {guest_khz} kHz, this host {host_khz} kHz and cannot scale");
        refusals.push(Refusal::new("tsc frequency", cause, "move to a host of the same frequency"));
    }
    let same_host = host.boot_id.is_some() && guest.boot_id == host.boot_id;
    if !host.tsc_shift && !same_host {
        let cause = "this kvm cannot shift a guest's tsc, which would jump to this host's";
        refusals.push(Refusal::new("tsc offset", cause, "move within one host, or to one with vmx or svm"));
    }
}

/// Feature MSRs whose bits are features which KVM takes from userspace without a look.
const BITWISE_MSRS: [(u32, &str); 3] =
    [(0x10a, "arch_capabilities"), (0x345, "perf_capabilities"), (0xce, "platform_info")];

fn feature_msrs(guest: &Platform, host: &Host, refusals: &mut Vec<Refusal>) {
    for Msr { index, data: given } in guest.feature_msrs.iter().copied() {
        let here = host.feature_msrs.iter().find(|m| m.index == index).map_or(0, |m| m.data);
        let Some((_, name)) = BITWISE_MSRS.iter().find(|(bitwise, _)| *bitwise == index) else { continue };
        for bit in (0..64).filter(|bit| (given & !here) >> bit & 1 == 1) {
            let cause = format!("the guest was given {given:#x}, this host has {here:#x}");
            refusals.push(Refusal::new(format!("msr {index:#x} {name} bit {bit}"), cause, HARDWARE));
        }
    }
}

/// Gives the guest's CPUID and feature MSRs to a vCPU that nobody needs: KVM knows best what it takes.
fn try_on(vcpu: &VcpuFd, guest: &Platform) -> Vec<Refusal> {
    let entries: Vec<_> = guest.cpuid.iter().map(Into::into).collect();
    let given = CpuId::from_entries(&entries).map_err(|_| "too many leaves".to_owned());
    if let Err(cause) = given.and_then(|cpuid| vcpu.set_cpuid2(&cpuid).map_err(|e| e.to_string())) {
        return vec![Refusal::new("cpuid", format!("kvm refuses the guest's: {cause}"), HARDWARE)];
    }
    let refused = |msr: &&Msr| msr::write(vcpu, std::slice::from_ref(*msr)).is_err();
    let refusal = |msr: &Msr| {
        let cause = format!("kvm refuses the guest's value {:#x}", msr.data);
        Refusal::new(format!("msr {:#x}", msr.index), cause, HARDWARE)
    };
    guest.feature_msrs.iter().filter(refused).map(refusal).collect()
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text.push_str(&format!(": {source}"));
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Machine;

    fn decoded(section: &Section) -> Platform {
        crate::state::decode(section, NAME, SCHEMA).unwrap()
    }

    fn what(refusals: &[Refusal]) -> Vec<&str> {
        refusals.iter().map(|r| r.what.as_str()).collect()
    }

    fn entry(cpuid: &mut [CpuidEntry], function: u32) -> &mut CpuidEntry {
        cpuid.iter_mut().find(|e| (e.function, e.index) == (function, 0)).unwrap()
    }

    #[test]
    fn the_host_a_guest_runs_on_accepts_it() {
        let Some(machine) = Machine::new(1) else { return };
        let section = platform_section(&machine.vcpus[0], &machine.context).unwrap();
        assert_eq!(check(&machine.kvm, &section, GuestTime::Advance), []);
    }

    #[test]
    fn a_section_of_another_schema_or_name_is_refused_not_guessed_at() {
        let Some(machine) = Machine::new(1) else { return };
        let section = platform_section(&machine.vcpus[0], &machine.context).unwrap();
        for broken in [
            Section { version: SCHEMA + 1, ..section.clone() },
            Section { name: "kvm.other".into(), ..section.clone() },
            Section { body: section.body[..40].to_vec(), ..section.clone() },
        ] {
            assert_eq!(what(&check(&machine.kvm, &broken, GuestTime::Advance)), ["cpu"]);
        }
    }

    #[test]
    fn every_single_feature_bit_this_host_lacks_is_named() {
        let Some(machine) = Machine::new(1) else { return };
        let given = decoded(&platform_section(&machine.vcpus[0], &machine.context).unwrap());
        let (host, _scratch) = Host::probe(&machine.kvm).unwrap();
        let mut named = 0;
        for features in FEATURES {
            for bit in 0..32 {
                let mut guest = given.clone();
                let place =
                    |e: &&mut CpuidEntry| (e.function, e.index) == (features.function, features.index);
                if guest.cpuid.iter_mut().find(place).is_none() {
                    let (function, index) = (features.function, features.index);
                    guest.cpuid.push(CpuidEntry {
                        function,
                        index,
                        flags: 1,
                        eax: 0,
                        ebx: 0,
                        ecx: 0,
                        edx: 0,
                    });
                }
                let entry = guest.cpuid.iter_mut().find(place).unwrap();
                let register = match features.register {
                    Register::Eax => &mut entry.eax,
                    Register::Ebx => &mut entry.ebx,
                    Register::Ecx => &mut entry.ecx,
                    Register::Edx => &mut entry.edx,
                };
                if *register >> bit & 1 == 1 || features.free >> bit & 1 == 1 {
                    continue;
                }
                *register |= 1 << bit;
                let there = leaf(&host.cpuid, features.function, features.index).is_some()
                    && compare(&guest, &host).is_empty();
                if !there {
                    assert!(what(&compare(&guest, &host)).contains(&features.bit_name(bit).as_str()));
                    named += 1;
                }
            }
        }
        assert!(named > 300, "only {named} bits are missing on this host?");
    }

    #[test]
    fn a_bit_the_host_has_and_the_guest_was_not_given_is_no_reason() {
        let Some(machine) = Machine::new(1) else { return };
        let mut guest = decoded(&platform_section(&machine.vcpus[0], &machine.context).unwrap());
        guest.cpuid.iter_mut().filter(|e| is_feature_leaf(e)).for_each(|e| {
            (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0);
        });
        let (host, _scratch) = Host::probe(&machine.kvm).unwrap();
        assert_eq!(compare(&guest, &host), []);
    }

    #[test]
    fn vendor_widths_sizes_frequency_counters_and_msr_bits_are_named() {
        let Some(machine) = Machine::new(1) else { return };
        let given = decoded(&platform_section(&machine.vcpus[0], &machine.context).unwrap());
        let (mut host, _scratch) = Host::probe(&machine.kvm).unwrap();
        (host.tsc_control, host.tsc_shift) = (false, false);
        let with = |change: &dyn Fn(&mut Platform)| {
            let mut guest = given.clone();
            change(&mut guest);
            compare(&guest, &host).iter().map(|r| r.what.clone()).collect::<Vec<_>>()
        };
        assert_eq!(with(&|g| entry(&mut g.cpuid, 0).ecx ^= 0x20), ["cpu vendor"]);
        assert_eq!(with(&|g| entry(&mut g.cpuid, 0x8000_0008).eax += 1), ["physical address bits"]);
        assert_eq!(with(&|g| entry(&mut g.cpuid, 0x8000_0008).eax += 0x100), ["linear address bits"]);
        assert_eq!(with(&|g| g.xsave_bytes += 64), ["xsave area"]);
        assert_eq!(with(&|g| g.tsc_khz += g.tsc_khz / 100), ["tsc frequency"]);
        assert_eq!(with(&|g| g.boot_id = Some([1; 16])), ["tsc offset"]);
        assert_eq!(with(&|g| g.boot_id = None), ["tsc offset"]);
        assert_eq!(with(&|g| entry(&mut g.cpuid, 0xa).eax |= 0xff), ["pmu version"]);
        let component = |g: &mut Platform| {
            g.cpuid.iter_mut().find(|e| (e.function, e.index) == (0xd, 2)).unwrap().ebx += 64;
        };
        assert_eq!(with(&component), ["xsave component 2"]);
        let msr_bit = |g: &mut Platform| {
            g.feature_msrs.retain(|m| m.index != 0x10a);
            g.feature_msrs.push(Msr { index: 0x10a, data: 1 << 62 });
        };
        assert_eq!(with(&msr_bit), ["msr 0x10a arch_capabilities bit 62"]);
    }

    #[test]
    fn time_that_cannot_stand_still_here_is_refused_before_a_page_moves() {
        let Some(machine) = Machine::new(1) else { return };
        let section = platform_section(&machine.vcpus[0], &machine.context).unwrap();
        let (host, _scratch) = Host::probe(&machine.kvm).unwrap();
        let expected: &[&str] = if host.tsc_shift { &[] } else { &["guest time"] };
        assert_eq!(what(&check(&machine.kvm, &section, GuestTime::Stop)), expected);
        let able = Host { tsc_shift: true, ..host.clone() };
        assert_eq!(standstill(&able, GuestTime::Stop), None);
        let unable = Host { tsc_shift: false, ..host };
        assert!(standstill(&unable, GuestTime::Stop).is_some());
        assert_eq!(standstill(&unable, GuestTime::Advance), None);
    }

    #[test]
    fn a_feature_msr_that_kvm_does_not_take_is_named() {
        let Some(machine) = Machine::new(1) else { return };
        let section = platform_section(&machine.vcpus[0], &machine.context).unwrap();
        let mut guest = decoded(&section);
        guest.feature_msrs.push(Msr { index: 0xdead_beef, data: 1 });
        let section = Section::critical(NAME, 0, SCHEMA, &guest);
        assert_eq!(what(&check(&machine.kvm, &section, GuestTime::Advance)), ["msr 0xdeadbeef"]);
    }
}
