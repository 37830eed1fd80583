//! The table of the Intel MultiProcessor Specification 1.4: CPUs, the IOAPIC, and ISA interrupt n at its pin n.
//! It lies in the last KiB of base memory, one of the places where kernels look.

use vm_memory::{Bytes, GuestAddress};

use crate::layout::{BASE_END, IOAPIC, LOCAL_APIC};
use crate::memory::Ram;

const POINTER_BYTES: u64 = 16;
const SPECIFICATION: u8 = 4;
/// Versions that a kernel expects of an APIC in a chipset.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;
const PROCESSOR_ENABLED: u8 = 1;
const PROCESSOR_BOOT: u8 = 2;
const INTERRUPT: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTERNAL: u8 = 3;
const ISA_BUS: u8 = 0;
const ISA_IRQS: u8 = 16;
const ALL_APICS: u8 = 0xff;

pub(super) fn write(memory: &Ram, vcpus: u8) -> Result<(), vm_memory::GuestMemoryError> {
    memory.write_slice(&table(vcpus), GuestAddress(BASE_END))
}

fn table(vcpus: u8) -> Vec<u8> {
    let table_address = (BASE_END + POINTER_BYTES) as u32;
    let mut pointer = b"_MP_".to_vec();
    pointer.extend(table_address.to_le_bytes());
    // Length in paragraphs, specification, checksum, features: a configuration table follows.
    pointer.extend([1, SPECIFICATION, 0, 0, 0, 0, 0, 0]);
    seal(&mut pointer, 10);

    let ioapic_id = vcpus;
    let mut entries: Vec<Vec<u8>> = (0..vcpus).map(processor).collect();
    entries.push([&[ENTRY_BUS, ISA_BUS][..], b"ISA   "].concat());
    entries.push([&[ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1][..], &IOAPIC.to_le_bytes()].concat());
    entries.extend(
        (0..ISA_IRQS).map(|irq| vec![ENTRY_IO_INTERRUPT, INTERRUPT, 0, 0, ISA_BUS, irq, ioapic_id, irq]),
    );
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTERNAL, 0, 0, ISA_BUS, 0, ALL_APICS, 0]);
    entries.push(vec![ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL_APICS, 1]);

    let mut header = b"PCMP".to_vec();
    // Length and checksum are filled in below.
    header.extend([0, 0, SPECIFICATION, 0]);
    header.extend(b"MIG     ");
    header.extend(b"MIG VMM     ");
    header.extend([0; 6]);
    header.extend((entries.len() as u16).to_le_bytes());
    header.extend(LOCAL_APIC.to_le_bytes());
    header.extend([0; 4]);
    let mut table = [header, entries.concat()].concat();
    let length = table.len() as u16;
    table[4..6].copy_from_slice(&length.to_le_bytes());
    seal(&mut table, 7);
    [pointer, table].concat()
}

fn processor(id: u8) -> Vec<u8> {
    let flags = PROCESSOR_ENABLED | if id == 0 { PROCESSOR_BOOT } else { 0 };
    let mut entry = vec![ENTRY_PROCESSOR, id, LOCAL_APIC_VERSION, flags];
    // Signature: family 6. Features: FPU and APIC. CPUID knows better, and kernels ask it.
    entry.extend(0x600u32.to_le_bytes());
    entry.extend(0x201u32.to_le_bytes());
    entry.extend([0; 8]);
    entry
}

/// Makes the bytes add up to zero.
fn seal(bytes: &mut [u8], checksum_at: usize) {
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    bytes[checksum_at] = sum.wrapping_neg();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{HIGH_START, MAX_VCPUS};

    #[test]
    fn pointer_and_table_add_up_to_zero_and_fit_for_every_number_of_vcpus() {
        for vcpus in 1..=MAX_VCPUS {
            let bytes = table(vcpus);
            let (pointer, table) = bytes.split_at(16);
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
            assert_eq!((sum(pointer), sum(table)), (0, 0));
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), 44 + usize::from(vcpus) * 20 + (2 + 16 + 2) * 8);
            assert!(bytes.len() <= 1024 && BASE_END + 1024 < HIGH_START);
        }
    }
}
