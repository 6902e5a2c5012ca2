//! Loading a kernel and its initramfs, and the boot parameters that it finds in RSI.
//!
//! Documentation/arch/x86/boot.rst in the Linux sources, "64-bit Boot Protocol". Two formats, told apart by
//! their content: an ELF `vmlinux` is entered at `e_entry`, a `bzImage` 512 bytes after its start. Both are
//! read straight into guest memory: there is never a copy of them in this process.
//!
//! [`Kernel::open`], [`Initramfs::open`] and [`place`] refuse what can be refused without a machine; [`load`]
//! puts all in place.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{self, KernelLoader};
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryMmap};

use super::{acpi, layout, regs};
use crate::memory::PAGE_SIZE;
use crate::memory::ram::Ram;
use crate::report::{Failure, STATUS_USAGE};

/// Why a kernel or an initramfs cannot be booted.
#[derive(Debug, Error)]
pub enum BootError {
    /// A file cannot be opened or read.
    #[error("cannot {what} {path}")]
    File {
        /// What we tried, and with which of the files.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A directory, a pipe or a device.
    #[error("the {0} {1} is not a regular file")]
    NotAFile(&'static str, PathBuf),
    /// A file of 0 bytes.
    #[error("the {0} {1} is empty")]
    Empty(&'static str, PathBuf),
    /// Neither of the two formats.
    #[error("the kernel {path} is neither an ELF vmlinux nor a bzImage: it starts with {start:02x?}")]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its first bytes.
        start: Vec<u8>,
    },
    /// An ELF file for something else.
    #[error(
        "the kernel {path} is an ELF file for {found}, not for a 64-bit x86-64 (ELF machine {EM_X86_64})"
    )]
    OtherMachine {
        /// The file.
        path: PathBuf,
        /// What it is for.
        found: String,
    },
    /// A file of the right format that cannot be a kernel.
    #[error("the kernel {path} cannot be booted: {problem}")]
    BadKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A bzImage from before Linux 3.8, or for 32-bit processors.
    #[error("the bzImage {path} has no 64-bit entry point (boot protocol {}.{}, xloadflags {xloadflags:#x})", .version >> 8, .version & 0xff)]
    No64BitEntry {
        /// The file.
        path: PathBuf,
        /// The boot protocol's version: major << 8 | minor.
        version: u16,
        /// The header's field.
        xloadflags: u16,
    },
    /// The file ends before what its header announces.
    #[error("the kernel {path} is truncated: it has {have} bytes, and its header announces {want}")]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size.
        have: u64,
        /// The size that it should have at least.
        want: u64,
    },
    /// The kernel needs more RAM than there is.
    #[error(
        "the kernel {path} needs the guest addresses up to {end:#x}, and RAM below 4 GiB ends at {ram:#x}"
    )]
    KernelTooLarge {
        /// The file.
        path: PathBuf,
        /// The first address after what it needs.
        end: u64,
        /// The end of RAM.
        ram: u64,
    },
    /// The initramfs does not fit beside the kernel.
    #[error(
        "the initramfs {path} has {size} bytes, and only {room} bytes of RAM are left between the kernel's end at \
         {kernel_end:#x} and {limit:#x}"
    )]
    InitramfsTooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What is left.
        room: u64,
        /// The first address after the kernel.
        kernel_end: u64,
        /// The first address after what may be used.
        limit: u64,
    },
    /// The kernel would cut the command line off.
    #[error("the kernel command line has {len} bytes, and this kernel takes at most {most}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// The kernel's limit.
        most: u64,
    },
    /// The loader found what our checks did not.
    #[error("cannot load the kernel {0}")]
    Load(PathBuf, #[source] loader::Error),
    /// A boot structure is not in RAM.
    #[error("cannot write the {0} to guest memory")]
    Write(&'static str, #[source] vm_memory::GuestMemoryError),
}

impl Failure for BootError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            BootError::UnknownFormat { start, .. } => match start.as_slice() {
                [0x1f, 0x8b, ..] => "it looks gzip-compressed: unpack it first",
                [0xfd, b'7', b'z', ..] => "it looks xz-compressed: unpack it first",
                [0x28, 0xb5, 0x2f, 0xfd, ..] => "it looks zstd-compressed: unpack it first",
                _ => "a distribution's kernel is /boot/vmlinuz-*, which is a bzImage",
            },
            BootError::KernelTooLarge { .. } | BootError::InitramfsTooLarge { .. } => {
                "give the guest more memory with --memory"
            }
            BootError::CmdlineTooLong { .. } => "--no-default-cmdline leaves the default out",
            _ => return None,
        };
        Some(text.into())
    }
}

/// The command line's limit of a kernel that does not tell: Linux' COMMAND_LINE_SIZE without its NUL.
const CMDLINE_MOST: u64 = 2047;
/// The highest last address of an initramfs for a kernel that does not tell.
const INITRD_MAX: u64 = 0x7fff_ffff;

const EM_X86_64: u16 = 62;

/// A kernel file that was looked at.
#[derive(Debug)]
pub struct Kernel {
    path: PathBuf,
    file: File,
    format: Format,
}

#[derive(Debug)]
enum Format {
    /// The first address after its segments.
    Elf { end: u64 },
    /// Its setup header, and how many bytes of it are loaded.
    BzImage(Box<setup_header>, u64),
}

/// The bytes of a bzImage before its setup header (the header's fields are in boot.rst, "The Real-Mode Kernel
/// Header").
const SETUP_HEADER: u64 = 0x1f1;
/// Its magic number, "HdrS".
const HDRS: u32 = u32::from_le_bytes(*b"HdrS");
/// Protocol 2.12 has `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// `xloadflags`: there is a 64-bit entry point, [`ENTRY_64`] bytes after the start.
const XLF_KERNEL_64: u16 = 1 << 0;
const ENTRY_64: u64 = 0x200;
/// `type_of_loader`: one that has no number.
const LOADER_OTHER: u8 = 0xff;

impl Kernel {
    /// Opens and looks at a kernel: is it complete, and is it for this machine?
    pub fn open(path: &Path) -> Result<Kernel, BootError> {
        let (file, len) = open("kernel", path)?;
        let mut start = [0; 8];
        let start = &mut start[..len.min(8) as usize];
        file.read_exact_at(start, 0).map_err(read_error(path))?;
        let format = if start.starts_with(b"\x7fELF") {
            check_elf(path, &file, len)?
        } else {
            let header = read_setup_header(path, &file, len)?
                .ok_or_else(|| BootError::UnknownFormat { path: path.into(), start: start.to_vec() })?;
            let loaded = check_bzimage(path, &header, len)?;
            Format::BzImage(Box::new(header), loaded)
        };
        let path = path.into();
        Ok(Kernel { path, file, format })
    }

    /// The longest command line that the kernel takes.
    pub fn cmdline_most(&self) -> u64 {
        match &self.format {
            Format::Elf { .. } => CMDLINE_MOST,
            Format::BzImage(header, _) => u64::from(header.cmdline_size).min(layout::CMDLINE_SPACE - 1),
        }
    }

    /// The highest last address of its initramfs.
    fn initrd_max(&self) -> u64 {
        match &self.format {
            Format::Elf { .. } => INITRD_MAX,
            Format::BzImage(header, _) => header.initrd_addr_max.into(),
        }
    }

    /// The first address after all that the kernel uses before it knows about memory.
    fn end(&self) -> u64 {
        match &self.format {
            Format::Elf { end } => *end,
            Format::BzImage(header, loaded) => {
                header.pref_address.saturating_add((*loaded).max(header.init_size.into()))
            }
        }
    }

    /// Reads the kernel into guest memory. Gives its entry point and its setup header.
    fn load(&mut self, memory: &GuestMemoryMmap) -> Result<(u64, setup_header), BootError> {
        let lowest = Some(GuestAddress(layout::HIGH_RAM));
        let failed = |error| BootError::Load(self.path.clone(), error);
        match &self.format {
            Format::Elf { .. } => {
                let loaded = Elf::load(memory, None, &mut self.file, lowest).map_err(failed)?;
                Ok((loaded.kernel_load.0, setup_header::default()))
            }
            Format::BzImage(header, _) => {
                // Where it would move itself to anyway, if it were loaded lower.
                let start = GuestAddress(header.pref_address);
                BzImage::load(memory, Some(start), &mut self.file, lowest).map_err(failed)?;
                Ok((start.0 + ENTRY_64, **header))
            }
        }
    }
}

/// An initramfs file that was looked at. What is in it is the kernel's business.
#[derive(Debug)]
pub struct Initramfs {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Initramfs {
    /// Opens an initramfs.
    pub fn open(path: &Path) -> Result<Initramfs, BootError> {
        let (file, len) = open("initramfs", path)?;
        let path = path.into();
        Ok(Initramfs { path, file, len })
    }

    /// As high as it can be: below `limit`, on a page boundary, and not in the kernel.
    fn place(&self, kernel_end: u64, limit: u64) -> Result<u64, BootError> {
        let room = limit.saturating_sub(kernel_end);
        limit
            .checked_sub(self.len)
            .map(|start| start & !(PAGE_SIZE - 1))
            .filter(|start| *start >= kernel_end)
            .ok_or_else(|| BootError::InitramfsTooLarge {
                path: self.path.clone(),
                size: self.len,
                room,
                kernel_end,
                limit,
            })
    }
}

/// What the first processor needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPoint {
    /// Its first instruction.
    pub entry: u64,
    /// What RSI points to.
    pub boot_params: u64,
}

/// Where things will be: what [`place`] found out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The initramfs: its first address and its length.
    initrd: Option<(u64, u64)>,
}

/// Finds out whether kernel, initramfs and command line fit into RAM, and where.
pub fn place(
    kernel: &Kernel,
    initramfs: Option<&Initramfs>,
    cmdline: &str,
    ram: &Ram,
) -> Result<Placement, BootError> {
    let (len, most) = (cmdline.len(), kernel.cmdline_most());
    if len as u64 > most {
        return Err(BootError::CmdlineTooLong { len, most });
    }
    let (kernel_end, low_end) = (kernel.end(), ram.low_end());
    if kernel_end > low_end {
        return Err(BootError::KernelTooLarge { path: kernel.path.clone(), end: kernel_end, ram: low_end });
    }
    let limit = low_end.min(kernel.initrd_max().saturating_add(1));
    let initrd = match initramfs {
        Some(initramfs) => Some((initramfs.place(kernel_end, limit)?, initramfs.len)),
        None => None,
    };
    Ok(Placement { initrd })
}

/// Puts kernel, initramfs, command line, boot parameters, descriptor table, page tables and reset vector into
/// RAM, as `placement` says. The ACPI root pointer has to be at [`layout::ACPI`] before the kernel runs.
pub fn load(
    kernel: &mut Kernel,
    initramfs: Option<&mut Initramfs>,
    cmdline: &str,
    ram: &Ram,
    placement: Placement,
) -> Result<EntryPoint, BootError> {
    let (memory, initrd) = (ram.memory(), placement.initrd);
    let (entry, header) = kernel.load(memory)?;
    if let (Some(initramfs), Some((start, len))) = (initramfs, initrd) {
        memory.read_exact_volatile_from(GuestAddress(start), &mut initramfs.file, len as usize).map_err(
            |error| BootError::File {
                what: "read the initramfs",
                path: initramfs.path.clone(),
                source: io::Error::other(error),
            },
        )?;
    }
    let write = |what: &'static str, bytes: &[u8], address| {
        memory.write_slice(bytes, GuestAddress(address)).map_err(|error| BootError::Write(what, error))
    };
    let cmdline = [cmdline.as_bytes(), &[0]].concat();
    write("command line", &cmdline, layout::CMDLINE)?;
    let params = boot_parameters(header, ram, initrd);
    write("boot parameters", params.as_slice(), layout::BOOT_PARAMS)?;
    write("page tables", &le_bytes(&regs::page_tables()), layout::PAGE_TABLES)?;
    write("descriptor table", &le_bytes(&regs::gdt()), layout::GDT)?;
    let reset = regs::reset_vector(layout::ACPI_RESET, acpi::RESET_VALUE);
    write("reset vector", &reset, layout::RESET_VECTOR)?;
    Ok(EntryPoint { entry, boot_params: layout::BOOT_PARAMS })
}

fn le_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The "zero page": the kernel's own header with what a boot loader fills in, the memory map, the ACPI root
/// pointer.
fn boot_parameters(header: setup_header, ram: &Ram, initrd: Option<(u64, u64)>) -> boot_params {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    // An ELF kernel has no header of its own: only what is filled in here.
    params.hdr.header = HDRS;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some((start, len)) = initrd {
        // Below INITRD_MAX, so in 32 bits.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (start as u32, len as u32);
    }
    let map = memory_map(ram);
    for (entry, (addr, size, type_)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr: *addr, size: *size, r#type: *type_ };
    }
    params.e820_entries = map.len() as u8;
    params
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The memory map for the kernel: start, length, type. The hole is not in it: devices there are ACPI's.
fn memory_map(ram: &Ram) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, layout::LOW_RAM_END, E820_RAM),
        (layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, E820_RESERVED),
        (layout::HIGH_RAM, ram.low_end() - layout::HIGH_RAM, E820_RAM),
    ];
    let above = ram.regions()[1..].iter().map(|region| region.guest);
    map.extend(above.map(|guest| (guest.start(), guest.len(), E820_RAM)));
    map
}

fn open(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let error = |source| BootError::File {
        what: match what {
            "kernel" => "open the kernel",
            _ => "open the initramfs",
        },
        path: path.into(),
        source,
    };
    let metadata = std::fs::metadata(path).map_err(error)?;
    if !metadata.is_file() {
        // Looked at before it is opened: opening a pipe would wait for its other end.
        return Err(BootError::NotAFile(what, path.into()));
    }
    let file = File::open(path).map_err(error)?;
    let len = file.metadata().map_err(error)?.len();
    if len == 0 {
        return Err(BootError::Empty(what, path.into()));
    }
    Ok((file, len))
}

fn read_error(path: &Path) -> impl Fn(io::Error) -> BootError {
    let path = path.to_path_buf();
    move |source| BootError::File { what: "read the kernel", path: path.clone(), source }
}

/// The setup header, if the file has one.
fn read_setup_header(path: &Path, file: &File, len: u64) -> Result<Option<setup_header>, BootError> {
    let mut header = setup_header::default();
    let bytes = header.as_mut_slice();
    if len < SETUP_HEADER + bytes.len() as u64 {
        return Ok(None);
    }
    file.read_exact_at(bytes, SETUP_HEADER).map_err(read_error(path))?;
    Ok((header.header == HDRS).then_some(header))
}

/// Gives the number of bytes after the setup code, all of which are loaded.
fn check_bzimage(path: &Path, header: &setup_header, have: u64) -> Result<u64, BootError> {
    let (version, xloadflags) = (header.version, header.xloadflags);
    if version < VERSION_XLOADFLAGS || xloadflags & XLF_KERNEL_64 == 0 {
        return Err(BootError::No64BitEntry { path: path.into(), version, xloadflags });
    }
    // In sectors of 512 bytes, 4 of them where it says 0, and one more for the boot sector; then units of 16
    // bytes.
    let setup = 512 * (1 + u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }));
    let want = setup + 16 * u64::from(header.syssize);
    if have < want {
        return Err(BootError::Truncated { path: path.into(), have, want });
    }
    let (preferred, least) = (header.pref_address, layout::HIGH_RAM);
    if preferred < least {
        return Err(BootError::BadKernel {
            path: path.into(),
            problem: format!("it prefers the physical address {preferred:#x}, below {least:#x}"),
        });
    }
    Ok(have - setup)
}

/// What the ELF loader does not check, and a wrong file would get wrong: machine, completeness, addresses.
fn check_elf(path: &Path, file: &File, have: u64) -> Result<Format, BootError> {
    /// Field offsets of the ELF64 file header and program header.
    mod field {
        pub const CLASS: usize = 4;
        pub const DATA: usize = 5;
        pub const MACHINE: usize = 18;
        pub const ENTRY: usize = 24;
        pub const PHOFF: usize = 32;
        pub const PHENTSIZE: usize = 54;
        pub const PHNUM: usize = 56;
        pub const P_TYPE: usize = 0;
        pub const P_OFFSET: usize = 8;
        pub const P_PADDR: usize = 24;
        pub const P_FILESZ: usize = 32;
        pub const P_MEMSZ: usize = 40;
    }
    const HEADER_LEN: usize = 64;
    const SEGMENT_LEN: usize = 56;
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const PT_LOAD: u32 = 1;

    let path_buf = || path.to_path_buf();
    let truncated = |want: u64| BootError::Truncated { path: path_buf(), have, want };
    let bad = |problem: String| BootError::BadKernel { path: path_buf(), problem };
    if have < HEADER_LEN as u64 {
        return Err(truncated(HEADER_LEN as u64));
    }
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0).map_err(read_error(path))?;
    let machine = le(&header, field::MACHINE, 2) as u16;
    if machine != EM_X86_64 || header[field::CLASS] != CLASS_64 || header[field::DATA] != LITTLE_ENDIAN {
        let (class, data) = (header[field::CLASS], header[field::DATA]);
        return Err(BootError::OtherMachine { path: path_buf(), found: machine_name(machine, class, data) });
    }
    if le(&header, field::PHENTSIZE, 2) as usize != SEGMENT_LEN {
        return Err(bad("its program headers have an unknown size".into()));
    }
    let (segments_at, count) = (le(&header, field::PHOFF, 8), le(&header, field::PHNUM, 2));
    let want = segments_at.saturating_add(count * SEGMENT_LEN as u64);
    if have < want {
        return Err(truncated(want));
    }
    let (entry, mut entry_found, mut kernel_end) = (le(&header, field::ENTRY, 8), false, 0);
    for number in 0..count {
        let mut segment = [0; SEGMENT_LEN];
        file.read_exact_at(&mut segment, segments_at + number * SEGMENT_LEN as u64)
            .map_err(read_error(path))?;
        if le(&segment, field::P_TYPE, 4) as u32 != PT_LOAD {
            continue;
        }
        let (start, memsz) = (le(&segment, field::P_PADDR, 8), le(&segment, field::P_MEMSZ, 8));
        let (offset, filesz) = (le(&segment, field::P_OFFSET, 8), le(&segment, field::P_FILESZ, 8));
        let want = offset.saturating_add(filesz);
        if have < want {
            return Err(truncated(want));
        }
        if start < layout::HIGH_RAM {
            let least = layout::HIGH_RAM;
            return Err(bad(format!("a segment wants the physical address {start:#x}, below {least:#x}")));
        }
        let end = start.saturating_add(memsz.max(filesz));
        entry_found |= (start..end).contains(&entry);
        kernel_end = kernel_end.max(end);
    }
    if !entry_found {
        return Err(bad(format!("its entry point {entry:#x} is in none of its segments")));
    }
    Ok(Format::Elf { end: kernel_end })
}

/// The little-endian number of `len` bytes at `at`; both are constants within the header.
fn le(bytes: &[u8], at: usize, len: usize) -> u64 {
    bytes[at..at + len].iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn machine_name(machine: u16, class: u8, data: u8) -> String {
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn file(bytes: &[u8]) -> NamedTempFile {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// An ELF file with one segment of 16 bytes, "segment contents", that takes `memsz` bytes at `paddr`.
    fn elf(paddr: u64, memsz: u64) -> Vec<u8> {
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend([2, 0, EM_X86_64 as u8, 0, 1, 0, 0, 0]);
        bytes.extend([paddr + 4, 64, 0].iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend([0, 0, 64, 56, 1, 0, 0, 0_u16].iter().flat_map(|field| field.to_le_bytes()));
        assert_eq!(bytes.len(), 64);
        bytes.extend([1, 0, 0, 0, 7, 0, 0, 0]);
        let fields = [120, paddr, paddr, 16, memsz, 4096];
        bytes.extend(fields.iter().flat_map(|field| field.to_le_bytes()));
        bytes.extend(b"segment contents");
        bytes
    }

    /// A bzImage whose protected-mode part is 4 KiB of `contents`.
    fn bzimage(contents: u8) -> Vec<u8> {
        let header = setup_header {
            setup_sects: 1,
            syssize: 256,
            header: HDRS,
            version: 0x020f,
            loadflags: 1,
            code32_start: MIB as u32,
            xloadflags: XLF_KERNEL_64,
            cmdline_size: 100,
            initrd_addr_max: 6 * MIB as u32 - 1,
            pref_address: 2 * MIB,
            init_size: MIB as u32,
            ..Default::default()
        };
        let mut bytes = vec![0; SETUP_HEADER as usize];
        bytes.extend(header.as_slice());
        bytes.resize(1024, 0);
        bytes.resize(1024 + 4096, contents);
        bytes
    }

    fn ram(size: u64) -> Ram {
        Ram::new(size, layout::HOLE, layout::HOLE_END).unwrap()
    }

    fn boot(
        kernel: &[u8],
        initramfs: Option<&[u8]>,
        cmdline: &str,
        ram: &Ram,
    ) -> Result<EntryPoint, BootError> {
        let (kernel_file, initramfs_file) = (file(kernel), initramfs.map(file));
        let mut kernel = Kernel::open(kernel_file.path())?;
        let mut initramfs = initramfs_file.as_ref().map(|file| Initramfs::open(file.path())).transpose()?;
        let placement = place(&kernel, initramfs.as_ref(), cmdline, ram)?;
        load(&mut kernel, initramfs.as_mut(), cmdline, ram, placement)
    }

    fn bytes_at(ram: &Ram, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn params(ram: &Ram) -> boot_params {
        ram.memory().read_obj(GuestAddress(layout::BOOT_PARAMS)).unwrap()
    }

    #[test]
    fn an_elf_kernel_is_where_it_wants_to_be() {
        let ram = ram(8 * MIB);
        let entry = boot(&elf(2 * MIB, MIB), None, "quiet", &ram).unwrap();
        assert_eq!(entry.entry, 2 * MIB + 4);
        assert_eq!(bytes_at(&ram, 2 * MIB, 16), b"segment contents");
        assert_eq!(bytes_at(&ram, layout::CMDLINE, 6), b"quiet\0");
        let params = params(&ram);
        assert_eq!((params.acpi_rsdp_addr, params.hdr.cmd_line_ptr as u64), (layout::ACPI, layout::CMDLINE));
        assert_eq!((params.hdr.ramdisk_image as u64, params.hdr.ramdisk_size as u64), (0, 0));
        assert_eq!(bytes_at(&ram, layout::RESET_VECTOR, 6), [0xba, 0x02, 0x06, 0xb0, 1, 0xee]);
    }

    #[test]
    fn a_bzimage_is_where_it_prefers_to_be_with_its_own_header() {
        let ram = ram(8 * MIB);
        let entry = boot(&bzimage(0x5a), None, "quiet", &ram).unwrap();
        assert_eq!(entry.entry, 2 * MIB + 0x200);
        assert_eq!(bytes_at(&ram, 2 * MIB, 4096), [0x5a; 4096]);
        let header = params(&ram).hdr;
        assert_eq!(
            (header.version as u64, header.init_size as u64, header.type_of_loader),
            (0x020f, MIB, 0xff)
        );
    }

    #[test]
    fn the_initramfs_is_as_high_as_the_kernel_allows() {
        let contents = vec![0x77; 5000];
        for (kernel, start) in [(elf(2 * MIB, MIB), 8 * MIB - 8192), (bzimage(0), 6 * MIB - 8192)] {
            let ram = ram(8 * MIB);
            boot(&kernel, Some(&contents), "", &ram).unwrap();
            let header = params(&ram).hdr;
            assert_eq!((header.ramdisk_image as u64, header.ramdisk_size as u64), (start, 5000));
            assert_eq!(bytes_at(&ram, start, 5000), contents);
        }
    }

    #[test]
    fn the_memory_map_has_all_ram_and_nothing_else() {
        const GIB: u64 = 1 << 30;
        for (size, expected) in [
            (8 * MIB, vec![(MIB, 7 * MIB)]),
            (3 * GIB, vec![(MIB, 3 * GIB - MIB)]),
            (6 * GIB, vec![(MIB, 3 * GIB - MIB), (4 * GIB, 3 * GIB)]),
        ] {
            let ram = ram(size);
            boot(&elf(2 * MIB, 16), None, "", &ram).unwrap();
            let params = params(&ram);
            let entries = params.e820_table;
            let entries: Vec<_> = entries[..params.e820_entries.into()]
                .iter()
                .map(|entry| (entry.addr, entry.size, entry.r#type))
                .collect();
            assert_eq!(entries[0], (0, 639 << 10, E820_RAM));
            assert_eq!(entries[1], (639 << 10, 385 << 10, E820_RESERVED));
            let high: Vec<_> = entries[2..]
                .iter()
                .map(|(addr, size, type_)| {
                    assert_eq!(*type_, E820_RAM);
                    (*addr, *size)
                })
                .collect();
            assert_eq!(high, expected);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_with_its_numbers() {
        let ram = ram(8 * MIB);
        let error = |kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str| {
            boot(kernel, initramfs, cmdline, &ram).unwrap_err().to_string()
        };
        assert!(
            error(&elf(2 * MIB, 7 * MIB), None, "")
                .contains("up to 0x900000, and RAM below 4 GiB ends at 0x800000")
        );
        let initramfs = vec![0; 3 * MIB as usize + 1];
        let message = error(&bzimage(0), Some(&initramfs), "");
        assert!(message.contains("has 3145729 bytes, and only 3145728 bytes of RAM are left"), "{message}");
        // What is loaded counts, whatever the header says of it.
        let mut large = bzimage(0);
        large.resize(1024 + 5 * MIB as usize, 0);
        assert!(error(&large, Some(&[0]), "").contains("only 0 bytes of RAM are left"));
        // One byte less is just right.
        boot(&bzimage(0), Some(&initramfs[1..]), "", &ram).unwrap();
        let message = error(&bzimage(0), None, &"x".repeat(101));
        assert_eq!(message, "the kernel command line has 101 bytes, and this kernel takes at most 100");
        assert!(error(&elf(2 * MIB, 16), None, &"x".repeat(2048)).contains("at most 2047"));
    }

    #[test]
    fn no_file_makes_it_panic() {
        // Each prefix, and each byte of the headers changed: an error or a kernel, but always an answer.
        let ram = ram(8 * MIB);
        for image in [elf(2 * MIB, 16), bzimage(1)] {
            for len in 0..image.len().min(1100) {
                let error = boot(&image[..len], None, "", &ram).unwrap_err();
                assert!(!error.to_string().is_empty());
            }
            for at in (0..136).chain(SETUP_HEADER as usize..(SETUP_HEADER as usize + 123)) {
                let mut image = image.clone();
                if let Some(byte) = image.get_mut(at) {
                    *byte ^= 0xff;
                }
                let _an_answer = boot(&image, None, "", &ram);
            }
        }
    }
}
