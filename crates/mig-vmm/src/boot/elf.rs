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
        Error::Elf(linux_loader::loader::elf::Error::ReadKernelImage) => image.not_a_kernel(format!(
            "its file is cut short, or it is to be loaded where the guest, with memory up to {memory_end:#x}, has none"
        )),
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
