//! Starting a guest: what is put into memory, and how vCPUs are entered.
//!
//! Kernels are entered in 32-bit protected mode on vCPU 0; the others wait for their start-up signal, and are
//! found through the MP table. Built-in guests are entered by all vCPUs at once, in 64-bit mode.

mod bzimage;
mod elf;
mod entry;
mod mptable;

use std::path::{Path, PathBuf};

use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress};

use crate::layout::{CMDLINE, CMDLINE_MAX_BYTES, HIGH_START, HOLE_START};
use crate::memory::Ram;
use crate::workload::{Entry, Guest, WorkloadError};

/// What a machine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workload {
    /// A guest that this crate brings along.
    BuiltIn(Guest),
    /// A kernel from a file: ELF with a PVH entry, or a bzImage.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk, handed to the kernel as it is.
        initrd: Option<PathBuf>,
        /// The command line.
        cmdline: String,
    },
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Workload::BuiltIn(guest) => write!(f, "{guest}"),
            Workload::Kernel { kernel, .. } => {
                write!(f, "{}", kernel.file_name().unwrap_or(kernel.as_os_str()).display())
            }
        }
    }
}

/// Why a guest could not be loaded; [`BootError::remedy`] says what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum BootError {
    #[error("reading the {what} {} failed", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{} is not a kernel: {why}", path.display())]
    NotAKernel { path: PathBuf, why: String },
    #[error("the kernel {} ends at {end:#x} and memory at {memory_end:#x}", path.display())]
    KernelTooLarge { path: PathBuf, end: u64, memory_end: u64 },
    #[error(
        "the initrd {} of {bytes} bytes does not fit between the kernel, which ends at {kernel_end:#x}, \
         and {limit:#x}", path.display()
    )]
    InitrdTooLarge { path: PathBuf, bytes: u64, kernel_end: u64, limit: u64 },
    #[error("the command line has {bytes} bytes, the kernel takes {most}")]
    CmdlineTooLong { bytes: usize, most: usize },
    #[error("the command line has a zero byte in it")]
    CmdlineZero,
    #[error("the built-in guest could not be loaded")]
    BuiltIn(#[from] WorkloadError),
    #[error("guest memory could not be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

impl BootError {
    /// What somebody can do about it.
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Read { .. } => "check the file's path and permissions",
            Self::NotAKernel { .. } => {
                "give an ELF kernel with a PVH entry (vmlinux with CONFIG_PVH) or a bzImage"
            }
            Self::KernelTooLarge { .. } | Self::Memory(_) => "give the guest more memory",
            Self::InitrdTooLarge { .. } => "give the guest more memory, or a smaller initrd",
            Self::CmdlineTooLong { .. } => "shorten the command line",
            Self::CmdlineZero => "take the zero byte out of the command line",
            Self::BuiltIn(_) => "give the guest more memory, or choose another guest",
        }
    }
}

/// How vCPUs are entered.
#[derive(Debug)]
pub(crate) enum Start {
    /// All, as the guest says.
    All(Entry),
    /// The first one; the others wait.
    First(kvm_regs),
}

impl Start {
    /// The registers of vCPU `index`, applied to what it has after its creation; `None`: it waits.
    pub(crate) fn registers(&self, index: usize, mut sregs: kvm_sregs) -> Option<(kvm_regs, kvm_sregs)> {
        match self {
            Start::All(entry) => {
                let vcpu = entry.vcpus.get(index)?;
                vcpu.apply(&mut sregs);
                Some((vcpu.regs, sregs))
            }
            Start::First(regs) if index == 0 => {
                entry::apply(&mut sregs);
                Some((*regs, sregs))
            }
            Start::First(_) => None,
        }
    }
}

/// Loads the workload into memory.
pub(crate) fn load(
    workload: &Workload,
    memory: &Ram,
    memory_bytes: u64,
    vcpus: u8,
    tsc_khz: u32,
) -> Result<Start, BootError> {
    match workload {
        Workload::BuiltIn(guest) => Ok(Start::All(guest.load(memory, vcpus, tsc_khz)?)),
        Workload::Kernel { kernel, initrd, cmdline } => {
            let image = Image {
                path: kernel,
                bytes: &read("kernel", kernel)?,
                initrd: initrd
                    .as_deref()
                    .map(|path| Ok::<_, BootError>((path, read("initrd", path)?)))
                    .transpose()?,
                cmdline,
            };
            entry::write_gdt(memory)?;
            mptable::write(memory, vcpus)?;
            Ok(Start::First(load_kernel(&image, memory, memory_bytes)?))
        }
    }
}

/// A kernel's files, read.
struct Image<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    initrd: Option<(&'a Path, Vec<u8>)>,
    cmdline: &'a str,
}

fn load_kernel(image: &Image<'_>, memory: &Ram, memory_bytes: u64) -> Result<kvm_regs, BootError> {
    if elf::is(image.bytes) {
        elf::load(image, memory, memory_bytes)
    } else if bzimage::is(image.bytes) {
        bzimage::load(image, memory, memory_bytes)
    } else {
        Err(image.not_a_kernel("it has neither an ELF nor a bzImage header"))
    }
}

impl Image<'_> {
    fn not_a_kernel(&self, why: impl Into<String>) -> BootError {
        BootError::NotAKernel { path: self.path.into(), why: why.into() }
    }

    fn write_cmdline(&self, memory: &Ram, most: usize) -> Result<(), BootError> {
        let (bytes, most) = (self.cmdline.len(), most.min(CMDLINE_MAX_BYTES));
        if bytes > most {
            return Err(BootError::CmdlineTooLong { bytes, most });
        }
        if self.cmdline.contains('\0') {
            return Err(BootError::CmdlineZero);
        }
        memory.write_slice(self.cmdline.as_bytes(), GuestAddress(CMDLINE))?;
        Ok(memory.write_obj(0u8, GuestAddress(CMDLINE + bytes as u64))?)
    }

    /// Puts the initrd as high as it may be, behind the kernel's end; answers its place and size.
    fn write_initrd(
        &self,
        memory: &Ram,
        memory_bytes: u64,
        kernel_end: u64,
        highest: u64,
    ) -> Result<Option<(u32, u32)>, BootError> {
        let Some((path, content)) = &self.initrd else { return Ok(None) };
        let bytes = content.len() as u64;
        let limit = memory_bytes.min(HOLE_START).min(highest);
        let start = limit.checked_sub(bytes).map(|s| s & !0xfff).filter(|s| *s >= kernel_end.max(HIGH_START));
        let Some(start) = start else {
            return Err(BootError::InitrdTooLarge { path: (*path).into(), bytes, kernel_end, limit });
        };
        memory.write_slice(content, GuestAddress(start))?;
        Ok(Some((u32::try_from(start).expect("below 3 GiB"), u32::try_from(bytes).expect("below 3 GiB"))))
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    let read = || {
        // Devices and pipes may never end, and pipes hold up who opens them.
        if !std::fs::metadata(path)?.is_file() {
            return Err(std::io::Error::other("it is not a regular file"));
        }
        std::fs::read(path)
    };
    read().map_err(|source| BootError::Read { what, path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::layout;
    use crate::memory;
    use crate::tests::bzimage;

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn boot(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Start, BootError> {
        let memory_bytes = 4 << 20;
        let memory = memory::map(&layout::regions(memory_bytes)).unwrap();
        let workload = Workload::Kernel {
            kernel: kernel.into(),
            initrd: initrd.map(Into::into),
            cmdline: cmdline.into(),
        };
        load(&workload, &memory, memory_bytes, 1, 1_000_000)
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_cause_and_remedy() {
        for bytes in
            [&b"#!/bin/sh\n"[..], &[], &[0; 4096], b"\x7fELF", &[b"\x7fELF".as_slice(), &[0; 200]].concat()]
        {
            let error = boot(file(bytes).path(), None, "").unwrap_err();
            assert!(matches!(error, BootError::NotAKernel { .. }), "{error}");
            assert!(error.remedy().contains("PVH") && error.remedy().contains("bzImage"));
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = boot(Path::new("/nowhere/vmlinux"), None, "").unwrap_err();
        assert!(error.to_string().contains("kernel /nowhere/vmlinux"), "{error}");
        let kernel = file(&bzimage(&[0xf4]));
        let error = boot(kernel.path(), Some(Path::new("/nowhere/initrd")), "").unwrap_err();
        assert!(error.to_string().contains("initrd /nowhere/initrd"), "{error}");
    }

    #[test]
    fn what_is_no_regular_file_is_refused_rather_than_read_for_ever() {
        for path in ["/dev/zero", "/"] {
            let error = boot(Path::new(path), None, "").unwrap_err();
            assert!(matches!(error, BootError::Read { .. }), "{error}");
        }
    }

    #[test]
    fn a_bzimage_that_was_cut_short_is_refused() {
        let mut image = bzimage(&[0xf4; 33]);
        image[0x1f4..0x1f8].copy_from_slice(&3u32.to_le_bytes());
        assert!(boot(file(&image).path(), None, "").is_ok());
        let error = boot(file(&image[..image.len() - 1]).path(), None, "").unwrap_err();
        assert!(error.to_string().contains("cut short"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_sizes() {
        let kernel = file(&bzimage(&[0xf4]));
        let initrd = file(&vec![7; 4 << 20]);
        assert!(matches!(
            boot(kernel.path(), Some(initrd.path()), ""),
            Err(BootError::InitrdTooLarge { bytes: 0x40_0000, .. })
        ));
        let large = file(&bzimage(&vec![0; 3 << 20 | 1]));
        assert!(matches!(
            boot(large.path(), None, ""),
            Err(BootError::KernelTooLarge { memory_end: 0x40_0000, .. })
        ));
        let long = "x".repeat(256);
        assert!(matches!(
            boot(kernel.path(), None, &long),
            Err(BootError::CmdlineTooLong { bytes: 256, most: 255 })
        ));
        assert!(matches!(boot(kernel.path(), None, "a\0b"), Err(BootError::CmdlineZero)));
        assert!(boot(kernel.path(), Some(kernel.path()), &long[1..]).is_ok());
    }
}
