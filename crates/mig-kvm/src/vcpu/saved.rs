//! A vCPU's state as it is saved: plain data of our own, converted from and to KVM's structs.
//!
//! Changing a field here is a new schema: raise [`super::SCHEMA`] and keep reading the old one.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs2,
    kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use crate::error::KvmError;

/// The whole of a vCPU.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct VcpuState {
    pub cpuid: Vec<CpuidEntry>,
    pub feature_msrs: Vec<Msr>,
    pub sregs: Sregs,
    /// KVM's `struct kvm_nested_state`, where nested virtualisation can be saved.
    pub nested: Option<Vec<u8>>,
    pub tsc: Tsc,
    pub regs: Regs,
    /// The XSAVE area in standard form.
    pub xsave: Vec<u32>,
    pub xcrs: Vec<Xcr>,
    /// The registers of the local APIC, a kilobyte.
    #[serde(with = "as_bytes")]
    pub lapic: Vec<u8>,
    /// All MSRs but those in `feature_msrs`, IA32_TSC and IA32_TSC_DEADLINE.
    pub msrs: Vec<Msr>,
    pub events: Events,
    pub mp_state: u32,
    pub tsc_deadline: u64,
    pub debug: DebugRegs,
}

/// Bytes at once instead of one by one: the same on the wire, length and bytes, and a fifth of what it takes to
/// read a vCPU.
mod as_bytes {
    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        struct Bytes;
        impl de::Visitor<'_> for Bytes {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("bytes")
            }

            fn visit_bytes<E: de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                Ok(bytes.to_vec())
            }

            fn visit_byte_buf<E: de::Error>(self, bytes: Vec<u8>) -> Result<Vec<u8>, E> {
                Ok(bytes)
            }
        }
        deserializer.deserialize_byte_buf(Bytes)
    }
}

/// The guest's time stamp counter: `offset` plus the host's, in units of `khz`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Tsc {
    pub khz: u32,
    pub offset: u64,
}

/// A CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Msr {
    pub index: u32,
    pub data: u64,
}

/// An extended control register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Xcr {
    pub index: u32,
    pub value: u64,
}

/// General registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Regs {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RSP, RBP, R8 to R15.
    pub general: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub kind: u8,
    pub present: u8,
    pub dpl: u8,
    pub db: u8,
    pub s: u8,
    pub l: u8,
    pub g: u8,
    pub avl: u8,
    pub unusable: u8,
}

/// A descriptor table register.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Table {
    pub base: u64,
    pub limit: u16,
}

/// Segments, descriptor tables, control registers, PDPTRs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Sregs {
    /// CS, DS, ES, FS, GS, SS, TR, LDT.
    pub segments: [Segment; 8],
    pub gdt: Table,
    pub idt: Table,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    pub apic_base: u64,
    /// KVM_SREGS2_FLAGS_PDPTRS_VALID when `pdptrs` count.
    pub flags: u64,
    pub pdptrs: [u64; 4],
}

/// Debug registers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct DebugRegs {
    pub db: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

/// Exceptions, interrupts, NMIs, SMIs that are on their way; fields as in `struct kvm_vcpu_events`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Events {
    /// Which of the following are valid: KVM_VCPUEVENT_VALID_*.
    pub flags: u32,
    /// Injected, number, has an error code, pending.
    pub exception: [u8; 4],
    pub exception_error_code: u32,
    pub exception_has_payload: u8,
    pub exception_payload: u64,
    /// Injected, number, soft, shadow.
    pub interrupt: [u8; 4],
    /// Injected, pending, masked.
    pub nmi: [u8; 3],
    pub sipi_vector: u32,
    /// In SMM, pending, inside an NMI, latched INIT.
    pub smi: [u8; 4],
    pub triple_fault: u8,
}

impl From<&kvm_cpuid_entry2> for CpuidEntry {
    fn from(e: &kvm_cpuid_entry2) -> Self {
        let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *e;
        Self { function, index, flags, eax, ebx, ecx, edx }
    }
}

impl From<&CpuidEntry> for kvm_cpuid_entry2 {
    fn from(e: &CpuidEntry) -> Self {
        let CpuidEntry { function, index, flags, eax, ebx, ecx, edx } = *e;
        Self { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
    }
}

impl From<&kvm_msr_entry> for Msr {
    fn from(e: &kvm_msr_entry) -> Self {
        Self { index: e.index, data: e.data }
    }
}

impl From<&Msr> for kvm_msr_entry {
    fn from(e: &Msr) -> Self {
        Self { index: e.index, data: e.data, reserved: 0 }
    }
}

impl From<kvm_regs> for Regs {
    fn from(r: kvm_regs) -> Self {
        Self {
            general: [
                r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
                r.r13, r.r14, r.r15,
            ],
            rip: r.rip,
            rflags: r.rflags,
        }
    }
}

impl From<&Regs> for kvm_regs {
    fn from(r: &Regs) -> Self {
        let [rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15] = r.general;
        let (rip, rflags) = (r.rip, r.rflags);
        Self { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
    }
}

impl From<&kvm_segment> for Segment {
    fn from(segment: &kvm_segment) -> Self {
        let kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable, .. } =
            *segment;
        Self { base, limit, selector, kind: type_, present, dpl, db, s, l, g, avl, unusable }
    }
}

impl From<&Segment> for kvm_segment {
    fn from(segment: &Segment) -> Self {
        let Segment { base, limit, selector, kind, present, dpl, db, s, l, g, avl, unusable } = *segment;
        Self { base, limit, selector, type_: kind, present, dpl, db, s, l, g, avl, unusable, padding: 0 }
    }
}

impl From<&kvm_dtable> for Table {
    fn from(table: &kvm_dtable) -> Self {
        Self { base: table.base, limit: table.limit }
    }
}

impl From<&Table> for kvm_dtable {
    fn from(table: &Table) -> Self {
        Self { base: table.base, limit: table.limit, padding: [0; 3] }
    }
}

impl From<kvm_sregs2> for Sregs {
    fn from(s: kvm_sregs2) -> Self {
        Self {
            segments: [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.tr, &s.ldt].map(Segment::from),
            gdt: (&s.gdt).into(),
            idt: (&s.idt).into(),
            cr0: s.cr0,
            cr2: s.cr2,
            cr3: s.cr3,
            cr4: s.cr4,
            cr8: s.cr8,
            efer: s.efer,
            apic_base: s.apic_base,
            flags: s.flags,
            pdptrs: s.pdptrs,
        }
    }
}

impl From<&Sregs> for kvm_sregs2 {
    fn from(s: &Sregs) -> Self {
        let [cs, ds, es, fs, gs, ss, tr, ldt] = s.segments.each_ref().map(kvm_segment::from);
        let (gdt, idt) = ((&s.gdt).into(), (&s.idt).into());
        let Sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs, .. } = *s;
        Self {
            cs,
            ds,
            es,
            fs,
            gs,
            ss,
            tr,
            ldt,
            gdt,
            idt,
            cr0,
            cr2,
            cr3,
            cr4,
            cr8,
            efer,
            apic_base,
            flags,
            pdptrs,
        }
    }
}

impl From<kvm_debugregs> for DebugRegs {
    fn from(d: kvm_debugregs) -> Self {
        Self { db: d.db, dr6: d.dr6, dr7: d.dr7 }
    }
}

impl From<&DebugRegs> for kvm_debugregs {
    fn from(d: &DebugRegs) -> Self {
        Self { db: d.db, dr6: d.dr6, dr7: d.dr7, ..Default::default() }
    }
}

impl From<kvm_vcpu_events> for Events {
    fn from(e: kvm_vcpu_events) -> Self {
        let (x, i, n, s) = (e.exception, e.interrupt, e.nmi, e.smi);
        Self {
            flags: e.flags,
            exception: [x.injected, x.nr, x.has_error_code, x.pending],
            exception_error_code: x.error_code,
            exception_has_payload: e.exception_has_payload,
            exception_payload: e.exception_payload,
            interrupt: [i.injected, i.nr, i.soft, i.shadow],
            nmi: [n.injected, n.pending, n.masked],
            sipi_vector: e.sipi_vector,
            smi: [s.smm, s.pending, s.smm_inside_nmi, s.latched_init],
            triple_fault: e.triple_fault.pending,
        }
    }
}

impl From<&Events> for kvm_vcpu_events {
    fn from(events: &Events) -> Self {
        let mut e = Self { flags: events.flags, sipi_vector: events.sipi_vector, ..Default::default() };
        let x = &mut e.exception;
        [x.injected, x.nr, x.has_error_code, x.pending] = events.exception;
        x.error_code = events.exception_error_code;
        e.exception_has_payload = events.exception_has_payload;
        e.exception_payload = events.exception_payload;
        let i = &mut e.interrupt;
        [i.injected, i.nr, i.soft, i.shadow] = events.interrupt;
        [e.nmi.injected, e.nmi.pending, e.nmi.masked] = events.nmi;
        let s = &mut e.smi;
        [s.smm, s.pending, s.smm_inside_nmi, s.latched_init] = events.smi;
        e.triple_fault.pending = events.triple_fault;
        e
    }
}

pub(super) fn xcrs_from(xcrs: &kvm_xcrs) -> Vec<Xcr> {
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(usize::MAX).min(xcrs.xcrs.len());
    xcrs.xcrs[..count].iter().map(|x| Xcr { index: x.xcr, value: x.value }).collect()
}

pub(super) fn xcrs_into(saved: &[Xcr]) -> Result<kvm_xcrs, KvmError> {
    let mut xcrs = kvm_xcrs::default();
    if saved.len() > xcrs.xcrs.len() {
        return Err(KvmError::DoesNotFit { why: format!("{} extended control registers", saved.len()) });
    }
    for (to, from) in xcrs.xcrs.iter_mut().zip(saved) {
        *to = kvm_xcr { xcr: from.index, reserved: 0, value: from.value };
        xcrs.nr_xcrs += 1;
    }
    Ok(xcrs)
}

#[cfg(test)]
mod tests {
    use mig::body;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Lapic(#[serde(with = "as_bytes")] Vec<u8>);

    #[test]
    fn bytes_at_once_are_the_same_on_the_wire_as_one_by_one() {
        let bytes: Vec<u8> = (0..=255).collect();
        let encoded = body::encode(&Lapic(bytes.clone()));
        assert_eq!(encoded, body::encode(&bytes));
        assert_eq!(body::decode::<Lapic>("lapic", &encoded).unwrap(), Lapic(bytes));
    }

    #[test]
    fn a_claimed_length_of_bytes_that_do_not_come_is_an_error_and_allocates_nothing() {
        for claimed in [1u64 << 60, u64::MAX, 9] {
            let bytes = [&claimed.to_le_bytes()[..], &[0; 8]].concat();
            assert!(body::decode::<Lapic>("lapic", &bytes).is_err(), "{claimed}");
        }
    }
}
