//! ELF kernels, entered by PVH (xen/include/public/arch-x86/hvm/start_info.h): `%ebx` points to
//! `hvm_start_info`.

use std::io::Cursor;

use kvm_bindings::kvm_regs;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress};

use super::{BootError, Image, entry};
use crate::layout::{
    CMDLINE, CMDLINE_MAX_BYTES, HOLE_START, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO, memory_map,
};
use crate::memory::Ram;

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const MAP_RAM: u32 = 1;
const MAP_RESERVED: u32 = 2;

pub(super) fn is(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

pub(super) fn load(image: &Image<'_>, memory: &Ram, memory_bytes: u64) -> Result<kvm_regs, BootError> {
    use linux_loader::loader::Error;
    let memory_end = memory_bytes.min(HOLE_START);
    let kernel = Elf::load(memory, None, &mut Cursor::new(image.bytes), None).map_err(|e| match e {
        Error::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => match end_in_memory(image.bytes) {
            Some(end) if end > memory_end => {
                BootError::KernelTooLarge { path: image.path.into(), end, memory_end }
            }
            _ => image.not_a_kernel("its file is cut short"),
        },
        e => image.not_a_kernel(e.to_string()),
    })?;
    if kernel.kernel_end > memory_end {
        return Err(BootError::KernelTooLarge {
            path: image.path.into(),
            end: kernel.kernel_end,
            memory_end,
        });
    }
    let PvhBootCapability::PvhEntryPresent(start) = kernel.pvh_boot_cap else {
        return Err(image.not_a_kernel("it is ELF without a PVH entry"));
    };
    image.write_cmdline(memory, CMDLINE_MAX_BYTES)?;
    let initrd = image.write_initrd(memory, memory_bytes, kernel.kernel_end, u64::MAX)?;
    write_start_info(memory, memory_bytes, initrd)?;
    Ok(kvm_regs { rbx: PVH_START_INFO, ..entry::registers(start.raw_value()) })
}

/// Where the segments of an ELF file end in memory; `None` when the file is cut short.
fn end_in_memory(file: &[u8]) -> Option<u64> {
    // Elf64_Ehdr and Elf64_Phdr (elf(5)): e_phoff, e_phentsize, e_phnum; p_type, p_offset, p_paddr, p_filesz,
    // p_memsz.
    let u16_at = |at: usize| Some(usize::from(u16::from_le_bytes(file.get(at..at + 2)?.try_into().ok()?)));
    let u64_at = |at: usize| Some(u64::from_le_bytes(file.get(at..at.checked_add(8)?)?.try_into().ok()?));
    let headers = usize::try_from(u64_at(0x20)?).ok()?;
    let mut end = 0;
    for index in 0..u16_at(0x38)? {
        let header = headers.checked_add(index * u16_at(0x36)?)?;
        let kind = file.get(header..header.checked_add(4)?)?;
        if u64_at(header + 0x8)?.checked_add(u64_at(header + 0x20)?)? > file.len() as u64 {
            return None;
        }
        if kind == [1, 0, 0, 0] {
            end = end.max(u64_at(header + 0x18)?.checked_add(u64_at(header + 0x28)?)?);
        }
    }
    Some(end)
}

fn write_start_info(
    memory: &Ram,
    memory_bytes: u64,
    initrd: Option<(u32, u32)>,
) -> Result<(), vm_memory::GuestMemoryError> {
    let map = memory_map(memory_bytes);
    let entries: Vec<u8> = map
        .iter()
        .flat_map(|e| {
            let kind = if e.usable { MAP_RAM } else { MAP_RESERVED };
            [e.start.to_le_bytes(), e.bytes.to_le_bytes(), u64::from(kind).to_le_bytes()]
        })
        .flatten()
        .collect();
    memory.write_slice(&entries, GuestAddress(PVH_MEMORY_MAP))?;
    // Module: address, size, command line, reserved.
    if let Some((start, bytes)) = initrd {
        let module = [u64::from(start), u64::from(bytes), 0, 0].map(u64::to_le_bytes).concat();
        memory.write_slice(&module, GuestAddress(PVH_MODULES))?;
    }
    let modules = u32::from(initrd.is_some());
    let mut info = [MAGIC, VERSION, 0, modules].map(u32::to_le_bytes).concat();
    // Modules, command line, RSDP (there is none), memory map.
    info.extend([PVH_MODULES, CMDLINE, 0, PVH_MEMORY_MAP].map(u64::to_le_bytes).concat());
    info.extend([map.len() as u32, 0].map(u32::to_le_bytes).concat());
    memory.write_slice(&info, GuestAddress(PVH_START_INFO))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file with one segment of `file_bytes` that takes `memory_bytes` from 2 MiB on.
    fn file(file_bytes: usize, memory_bytes: u64) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..4].copy_from_slice(b"\x7fELF");
        file[0x20] = 64;
        (file[0x36], file[0x38]) = (56, 1);
        file[64] = 1;
        for (at, value) in [(0x8, 120), (0x18, 2 << 20), (0x20, file_bytes as u64), (0x28, memory_bytes)] {
            file[64 + at..][..8].copy_from_slice(&u64::to_le_bytes(value));
        }
        file.resize(120 + file_bytes, 0x90);
        file
    }

    #[test]
    fn a_file_tells_where_it_ends_in_memory_unless_it_is_cut_short() {
        let whole = file(100, 3 << 20);
        assert_eq!(end_in_memory(&whole), Some(5 << 20));
        (0..whole.len()).for_each(|length| assert_eq!(end_in_memory(&whole[..length]), None, "{length}"));
        assert_eq!(end_in_memory(&file(0, u64::MAX)), None);
    }
}
