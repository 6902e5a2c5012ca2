//! Kernel files: an ELF `vmlinux` or a `bzImage`, told apart by their content; checking and loading them.
//!
//! Documentation/arch/x86/boot.rst in the Linux sources, "64-bit Boot Protocol": an ELF file is entered at
//! `e_entry`, a bzImage 512 bytes after its start. An ELF file with a PVH note and no note of Linux' is
//! another kernel, entered at the address in that note (`pvh.rs`). All are read straight into guest memory:
//! there is never a copy of them in this process. [`super::boot`] calls this, and opens the initramfs by
//! `ImageFile`, too.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use libc::EM_X86_64;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{self, KernelLoader};
use thiserror::Error;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryMmap};

use super::layout;
use super::regs::Entry;

/// Why a file cannot be booted.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum KernelError {
    #[error("cannot {action} the {what} {path}")]
    File { action: &'static str, what: &'static str, path: PathBuf, source: io::Error },
    /// A directory, a pipe or a device.
    #[error("the {0} {1} is not a regular file")]
    NotAFile(&'static str, PathBuf),
    #[error("the {0} {1} is empty")]
    Empty(&'static str, PathBuf),
    #[error("the kernel {path} is neither an ELF vmlinux nor a bzImage: it starts with {start:02x?}")]
    UnknownFormat { path: PathBuf, start: Vec<u8> },
    #[error(
        "the kernel {path} is an ELF file for {found}, not for a 64-bit x86-64 (ELF machine {EM_X86_64})"
    )]
    OtherMachine { path: PathBuf, found: String },
    #[error("the kernel {path} cannot be booted: {problem}")]
    BadKernel { path: PathBuf, problem: String },
    /// A bzImage from before Linux 3.8, or for 32-bit processors. The version is major << 8 | minor.
    #[error("the bzImage {path} has no 64-bit entry point (boot protocol {}.{}, xloadflags {xloadflags:#x})", .version >> 8, .version & 0xff)]
    No64BitEntry { path: PathBuf, version: u16, xloadflags: u16 },
    /// Both numbers are bytes.
    #[error("the kernel {path} is truncated: it has {have} bytes, and its header announces {want}")]
    Truncated { path: PathBuf, have: u64, want: u64 },
    /// The loader found a fault that our checks did not.
    #[error("cannot load the kernel {0}")]
    Load(PathBuf, #[source] loader::Error),
}

/// A file of the user's: the kernel or the initramfs.
#[derive(Debug)]
pub(super) struct ImageFile {
    what: &'static str,
    pub path: PathBuf,
    pub file: File,
    /// In bytes, at least 1.
    pub len: u64,
}

impl ImageFile {
    /// Opens a file that messages call `what`.
    pub fn open(what: &'static str, path: &Path) -> Result<ImageFile, KernelError> {
        let error = |source| KernelError::File { action: "open", what, path: path.into(), source };
        // Before it is opened: opening a pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(error)?.is_file() {
            return Err(KernelError::NotAFile(what, path.into()));
        }
        let file = File::open(path).map_err(error)?;
        match file.metadata().map_err(error)?.len() {
            0 => Err(KernelError::Empty(what, path.into())),
            len => Ok(ImageFile { what, path: path.into(), file, len }),
        }
    }

    /// The error for a read that failed.
    pub fn read_error(&self, source: io::Error) -> KernelError {
        KernelError::File { action: "read", what: self.what, path: self.path.clone(), source }
    }

    fn read(&self, bytes: &mut [u8], at: u64) -> Result<(), KernelError> {
        self.file.read_exact_at(bytes, at).map_err(|error| self.read_error(error))
    }

    fn check_len(&self, want: u64) -> Result<(), KernelError> {
        if self.len < want {
            return Err(KernelError::Truncated { path: self.path.clone(), have: self.len, want });
        }
        Ok(())
    }

    fn bad(&self, problem: String) -> KernelError {
        KernelError::BadKernel { path: self.path.clone(), problem }
    }
}

/// The command line's limit of an ELF file: Linux' COMMAND_LINE_SIZE without its NUL.
const CMDLINE_MOST: u64 = 2047;
/// The highest last address of an ELF file's initramfs.
const INITRD_MAX: u64 = 0x7fff_ffff;

/// The bytes of a bzImage before its setup header (the header's fields are in boot.rst, "The Real-Mode Kernel
/// Header").
pub(super) const SETUP_HEADER: u64 = 0x1f1;
/// Its magic number, "HdrS".
pub(super) const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol 2.12 has `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry point, [`ENTRY_64`] bytes after the start.
pub(super) const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;

/// A kernel file that was checked: it is complete, and for this machine.
#[derive(Debug)]
pub(super) struct Kernel {
    pub image: ImageFile,
    /// The setup header of a bzImage; `None` for an ELF file.
    header: Option<setup_header>,
    pub is_linux: bool,
    /// Whether it is entered by PVH.
    is_pvh: bool,
    /// The first address that the kernel is loaded to; of a bzImage its `pref_address`.
    pub start: u64,
    /// The first address after the memory that the kernel uses before it reads the memory map.
    pub end: u64,
    /// The longest command line that it takes, in bytes.
    pub cmdline_most: u64,
    /// The highest last address of its initramfs.
    pub initrd_max: u64,
}

impl Kernel {
    /// Opens and checks a kernel.
    pub fn open(path: &Path) -> Result<Kernel, KernelError> {
        let image = ImageFile::open("kernel", path)?;
        let mut start = vec![0; image.len.min(8) as usize];
        image.read(&mut start, 0)?;
        if start.starts_with(b"\x7fELF") {
            let Checked { start, end, is_linux, is_pvh } = check_elf(&image)?;
            let (cmdline_most, initrd_max) = (CMDLINE_MOST, INITRD_MAX);
            return Ok(Kernel {
                image,
                header: None,
                is_linux,
                is_pvh,
                start,
                end,
                cmdline_most,
                initrd_max,
            });
        }
        let Some(header) = read_setup_header(&image)? else {
            return Err(KernelError::UnknownFormat { path: image.path, start });
        };
        let loaded = check_bzimage(&image, &header)?;
        Ok(Kernel {
            image,
            header: Some(header),
            is_linux: true,
            is_pvh: false,
            start: header.pref_address,
            end: header.pref_address.saturating_add(loaded.max(header.init_size.into())),
            cmdline_most: u64::from(header.cmdline_size).min(layout::CMDLINE_SPACE - 1),
            initrd_max: header.initrd_addr_max.into(),
        })
    }

    /// Reads the kernel into guest memory. Gives its entry point and its setup header.
    pub fn load(&mut self, memory: &GuestMemoryMmap) -> Result<(Entry, setup_header), KernelError> {
        let lowest = Some(GuestAddress(layout::HIGH_RAM));
        let (file, failed) =
            (&mut self.image.file, |error| KernelError::Load(self.image.path.clone(), error));
        let Some(header) = self.header else {
            let loaded = Elf::load(memory, None, file, lowest).map_err(failed)?;
            let entry = match loaded.pvh_boot_cap {
                PvhBootCapability::PvhEntryPresent(address) if self.is_pvh => Entry::Pvh(address.0),
                _ => Entry::Linux(loaded.kernel_load.0),
            };
            return Ok((entry, setup_header::default()));
        };
        // To where it would move itself if it were loaded lower.
        let start = GuestAddress(header.pref_address);
        BzImage::load(memory, Some(start), file, lowest).map_err(failed)?;
        Ok((Entry::Linux(start.0 + ENTRY_64), header))
    }
}

/// The setup header, if the file has one.
fn read_setup_header(image: &ImageFile) -> Result<Option<setup_header>, KernelError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    if image.len < SETUP_HEADER + bytes.len() as u64 {
        return Ok(None);
    }
    image.read(bytes, SETUP_HEADER)?;
    Ok((header.header == HDRS).then_some(header))
}

/// Gives the number of bytes after the setup code, all of which are loaded.
fn check_bzimage(image: &ImageFile, header: &setup_header) -> Result<u64, KernelError> {
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < VERSION_XLOADFLAGS || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64BitEntry { path: image.path.clone(), version, xloadflags });
    }
    // In sectors of 512 bytes, 4 of them where the field is 0, and one more for the boot sector; then units
    // of 16 bytes.
    let setup = 512 * (1 + u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }));
    image.check_len(setup + 16 * u64::from(header.syssize))?;
    let (preferred, least) = (header.pref_address, layout::HIGH_RAM);
    if preferred < least {
        return Err(image.bad(format!("it prefers the physical address {preferred:#x}, below {least:#x}")));
    }
    Ok(image.len - setup)
}

/// An ELF file that was checked.
struct Checked {
    /// The first address of its segments.
    start: u64,
    /// The first address after its segments.
    end: u64,
    is_linux: bool,
    /// Whether it is entered by PVH.
    is_pvh: bool,
}

/// Checks what the ELF loader does not: machine, completeness, addresses. The names of fields are those of
/// the ELF-64 file header and program header.
fn check_elf(image: &ImageFile) -> Result<Checked, KernelError> {
    const EHDR_LEN: usize = size_of::<libc::Elf64_Ehdr>();
    const PHDR_LEN: usize = size_of::<libc::Elf64_Phdr>();

    image.check_len(EHDR_LEN as u64)?;
    let mut header = [0; EHDR_LEN];
    image.read(&mut header, 0)?;
    let (class, data, e_machine) = (le(&header, 4, 1), le(&header, 5, 1), le(&header, 18, 2));
    let wanted = (libc::ELFCLASS64.into(), libc::ELFDATA2LSB.into(), EM_X86_64.into());
    if (class, data, e_machine) != wanted {
        let found = machine_name(e_machine, class, data);
        return Err(KernelError::OtherMachine { path: image.path.clone(), found });
    }
    let (e_entry, e_phoff) = (le(&header, 24, 8), le(&header, 32, 8));
    let (e_phentsize, e_phnum) = (le(&header, 54, 2), le(&header, 56, 2));
    if e_phentsize != PHDR_LEN as u64 {
        return Err(image.bad("its program headers have an unknown size".into()));
    }
    image.check_len(e_phoff.saturating_add(e_phnum * e_phentsize))?;
    let (mut entry_found, mut entry_is_virtual, mut kernel_end) = (false, false, 0);
    let mut kernel_start = u64::MAX;
    let mut notes = Notes::default();
    for number in 0..e_phnum {
        let mut segment = [0; PHDR_LEN];
        image.read(&mut segment, e_phoff + number * e_phentsize)?;
        let (p_type, p_offset) = (le(&segment, 0, 4), le(&segment, 8, 8));
        let (p_vaddr, p_paddr) = (le(&segment, 16, 8), le(&segment, 24, 8));
        let (p_filesz, p_memsz) = (le(&segment, 32, 8), le(&segment, 40, 8));
        if p_type == u64::from(libc::PT_NOTE) {
            image.check_len(p_offset.saturating_add(p_filesz))?;
            let mut bytes = vec![0; p_filesz.min(NOTES_MOST) as usize];
            image.read(&mut bytes, p_offset)?;
            notes.read(&bytes);
        }
        if p_type != u64::from(libc::PT_LOAD) {
            continue;
        }
        image.check_len(p_offset.saturating_add(p_filesz))?;
        let least = layout::HIGH_RAM;
        if p_paddr < least {
            return Err(
                image.bad(format!("a segment has the physical address {p_paddr:#x}, below {least:#x}"))
            );
        }
        let end = p_paddr.saturating_add(p_memsz.max(p_filesz));
        entry_found |= (p_paddr..end).contains(&e_entry);
        entry_is_virtual |= (p_vaddr..p_vaddr.saturating_add(p_memsz)).contains(&e_entry);
        kernel_start = kernel_start.min(p_paddr);
        kernel_end = kernel_end.max(end);
    }
    let Notes { is_linux, is_pvh } = notes;
    let is_pvh = is_pvh && !is_linux;
    if is_pvh || entry_found {
        return Ok(Checked { start: kernel_start, end: kernel_end, is_linux, is_pvh });
    }
    Err(image.bad(match entry_is_virtual {
        true => format!(
            "its entry point {e_entry:#x} is a virtual address, and it has no PVH note: an ELF kernel is entered in \
             64-bit mode at a physical address, or as its PVH note says"
        ),
        false => format!("its entry point {e_entry:#x} is in none of its segments"),
    }))
}

/// More notes than this are not read.
const NOTES_MOST: u64 = 64 << 10;
/// The type of the note with the PVH entry point (XEN_ELFNOTE_PHYS32_ENTRY).
const PVH_ENTRY: u64 = 18;

/// What the notes of an ELF file say.
#[derive(Default)]
struct Notes {
    /// Each Linux kernel has some of this name.
    is_linux: bool,
    /// There is a PVH entry point.
    is_pvh: bool,
}

impl Notes {
    /// One after the other: sizes of name and description, type, name, description, each padded to 4 bytes.
    fn read(&mut self, mut bytes: &[u8]) {
        const HEADER: usize = 12;
        while bytes.len() >= HEADER {
            let padded = |at| (le(bytes, at, 4) as usize).next_multiple_of(4);
            let (name_len, len) = (padded(0), padded(0) + padded(4));
            let name = bytes.get(HEADER..HEADER + name_len).unwrap_or_default();
            self.is_linux |= name.starts_with(b"Linux\0");
            self.is_pvh |= name == b"Xen\0" && le(bytes, 8, 4) == PVH_ENTRY;
            bytes = bytes.get(HEADER + len..).unwrap_or_default();
        }
    }
}

/// The little-endian number of `len` bytes at `at`; both are constants within the header.
fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn machine_name(machine: u64, class: u64, data: u64) -> String {
    let name = match machine {
        3 => "32-bit x86",
        40 => "32-bit Arm",
        183 => "64-bit Arm",
        243 => "RISC-V",
        62 => "x86-64",
        _ => "another processor",
    };
    format!("{name} (ELF machine {machine}, class {class}, data {data})")
}
