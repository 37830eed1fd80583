//! bzImages, entered by the 32-bit entry of the Linux boot protocol (Documentation/arch/x86/boot.rst): the
//! code is at its load address, `%esi` points to the zero page, which holds the image's own header.

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, Image, entry};
use crate::layout::{CMDLINE, HIGH_START, HOLE_START, ZERO_PAGE, memory_map};
use crate::memory::Ram;

/// Offsets into the image and, the same, into the zero page.
const SETUP_SECTORS: usize = 0x1f1;
const CODE_PARAGRAPHS: usize = 0x1f4;
const JUMP_LENGTH: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const CODE_START: usize = 0x214;
const INITRD_START: usize = 0x218;
const INITRD_BYTES: usize = 0x21c;
const CMDLINE_START: usize = 0x228;
const INITRD_HIGHEST: usize = 0x22c;
const CMDLINE_BYTES: usize = 0x238;
const MIN_IMAGE_BYTES: usize = 0x240;
/// Offsets into the zero page only.
const E820_COUNT: usize = 0x1e8;
const E820: usize = 0x2d0;

const LOADED_HIGH: u8 = 1;
const LOADER_UNKNOWN: u8 = 0xff;
/// The first protocol that says how long the command line may be (2.06), and the limit before.
const SAYS_CMDLINE_BYTES: u16 = 0x0206;
const OLD_CMDLINE_BYTES: u32 = 255;
/// The first protocol that says where an initrd may end (2.03), and the limit before.
const SAYS_INITRD_HIGHEST: u16 = 0x0203;
const OLD_INITRD_HIGHEST: u32 = 0x37ff_ffff;

pub(super) fn is(image: &[u8]) -> bool {
    image.get(MAGIC..MAGIC + 4) == Some(b"HdrS")
}

pub(super) fn load(image: &Image<'_>, memory: &Ram, memory_bytes: u64) -> Result<kvm_regs, BootError> {
    let bytes = image.bytes;
    if bytes.len() < MIN_IMAGE_BYTES {
        return Err(image.not_a_kernel("its header is cut short"));
    }
    let version = u16::from_le_bytes([bytes[VERSION], bytes[VERSION + 1]]);
    if version < 0x0200 || bytes[LOAD_FLAGS] & LOADED_HIGH == 0 {
        return Err(image.not_a_kernel("it is a zImage, older than the 32-bit entry"));
    }
    let setup_sectors = match bytes[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let code = bytes.get((setup_sectors + 1) * 512..).filter(|c| !c.is_empty());
    let code = code.ok_or_else(|| image.not_a_kernel("its code is cut off"))?;

    // In units of 16 bytes, the last of which may be begun only; what follows is a signature.
    let paragraphs = u32_at(bytes, CODE_PARAGRAPHS) as usize;
    if code.len().div_ceil(16) < paragraphs {
        return Err(image.not_a_kernel(format!(
            "its file is cut short: {} bytes of code of {}",
            code.len(),
            paragraphs * 16
        )));
    }

    let (memory_end, end) = (memory_bytes.min(HOLE_START), HIGH_START + code.len() as u64);
    if end > memory_end {
        return Err(BootError::KernelTooLarge { path: image.path.into(), end, memory_end });
    }
    memory.write_slice(code, GuestAddress(HIGH_START))?;

    let cmdline_bytes =
        if version >= SAYS_CMDLINE_BYTES { u32_at(bytes, CMDLINE_BYTES) } else { OLD_CMDLINE_BYTES };
    image.write_cmdline(memory, cmdline_bytes as usize)?;
    let highest =
        if version >= SAYS_INITRD_HIGHEST { u32_at(bytes, INITRD_HIGHEST) } else { OLD_INITRD_HIGHEST };
    let initrd = image.write_initrd(memory, memory_bytes, end, u64::from(highest) + 1)?;
    let page = zero_page(bytes, memory_bytes, initrd);
    memory.write_slice(&page, GuestAddress(ZERO_PAGE))?;
    Ok(kvm_regs { rsi: ZERO_PAGE, ..entry::registers(HIGH_START) })
}

fn zero_page(image: &[u8], memory_bytes: u64, initrd: Option<(u32, u32)>) -> [u8; 4096] {
    let mut page = [0; 4096];
    let header_end = (MAGIC + usize::from(image[JUMP_LENGTH])).clamp(MIN_IMAGE_BYTES, E820).min(image.len());
    page[SETUP_SECTORS..header_end].copy_from_slice(&image[SETUP_SECTORS..header_end]);
    page[LOADER] = LOADER_UNKNOWN;
    let mut set = |at: usize, value: u32| page[at..at + 4].copy_from_slice(&value.to_le_bytes());
    set(CODE_START, HIGH_START as u32);
    set(CMDLINE_START, CMDLINE as u32);
    let (start, bytes) = initrd.unwrap_or((0, 0));
    set(INITRD_START, start);
    set(INITRD_BYTES, bytes);
    let map = memory_map(memory_bytes);
    page[E820_COUNT] = map.len() as u8;
    // Address, length, type: 1 is RAM, 2 reserved.
    for (entry, at) in map.iter().zip((E820..).step_by(20)) {
        page[at..at + 8].copy_from_slice(&entry.start.to_le_bytes());
        page[at + 8..at + 16].copy_from_slice(&entry.bytes.to_le_bytes());
        page[at + 16..at + 20].copy_from_slice(&if entry.usable { 1u32 } else { 2 }.to_le_bytes());
    }
    page
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
