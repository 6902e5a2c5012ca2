//! Where kernel, initramfs and boot structures go, and the boot parameters that the kernel finds in RSI.
//!
//! Documentation/arch/x86/boot.rst in the Linux sources, "64-bit Boot Protocol". [`Boot::plan`] refuses what
//! can be refused without a machine; [`Boot::load`] fills guest memory.

use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::initramfs::{Initramfs, InitramfsError};
use super::kernel::{HDRS, Kernel, KernelError};
use super::regs::Entry;
use super::{acpi, layout, pvh, regs};
use crate::memory::ram::Ram;
use crate::report::{Failure, STATUS_USAGE};

/// Why a kernel, an initramfs or a command line cannot be used. Numbers are bytes and guest addresses.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum BootError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(
        "the kernel {path} needs the guest addresses up to {end:#x}, and RAM below 4 GiB ends at {ram:#x}"
    )]
    KernelTooLarge { path: PathBuf, end: u64, ram: u64 },
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The kernel would cut the command line off.
    #[error("the kernel command line has {len} bytes, and this kernel takes at most {most}")]
    CmdlineTooLong { len: usize, most: u64 },
    #[error("cannot write the {0} to guest memory")]
    Write(&'static str, #[source] vm_memory::GuestMemoryError),
}

impl Failure for BootError {
    fn status(&self) -> u8 {
        STATUS_USAGE
    }

    fn hint(&self) -> Option<String> {
        let text = match self {
            BootError::Kernel(KernelError::UnknownFormat { start, .. }) => match start.as_slice() {
                [0x1f, 0x8b, ..] => "it looks gzip-compressed: unpack it first",
                [0xfd, b'7', b'z', ..] => "it looks xz-compressed: unpack it first",
                [0x28, 0xb5, 0x2f, 0xfd, ..] => "it looks zstd-compressed: unpack it first",
                _ => "a distribution's kernel is /boot/vmlinuz-*, which is a bzImage",
            },
            BootError::Initramfs(InitramfsError::TooLarge { is_ram_end: false, .. }) => {
                "more memory does not help: a smaller or a compressed initramfs does"
            }
            BootError::KernelTooLarge { .. } | BootError::Initramfs(InitramfsError::TooLarge { .. }) => {
                "give the guest more memory with --memory"
            }
            BootError::CmdlineTooLong { .. } => "--no-default-cmdline leaves the default out",
            _ => return None,
        };
        Some(text.into())
    }
}

/// `type_of_loader`: a boot loader without a number of its own.
const LOADER_OTHER: u8 = 0xff;

/// Kernel, initramfs and command line, checked, with a place in RAM for each.
pub struct Boot {
    kernel: Kernel,
    initramfs: Option<Initramfs>,
    cmdline: String,
}

impl Boot {
    /// Opens kernel and initramfs, and finds out whether both and the command line fit into RAM.
    pub fn plan(kernel: &Path, initramfs: &[PathBuf], cmdline: &str, ram: &Ram) -> Result<Boot, BootError> {
        let kernel = Kernel::open(kernel)?;
        let (len, most) = (cmdline.len(), kernel.cmdline_most);
        if len as u64 > most {
            return Err(BootError::CmdlineTooLong { len, most });
        }
        let low_end = ram.low_end();
        if kernel.end > low_end {
            return Err(BootError::KernelTooLarge { path: kernel.image.path, end: kernel.end, ram: low_end });
        }
        let kernel_limit = kernel.initrd_max.saturating_add(1);
        let limit = low_end.min(kernel_limit);
        let initramfs = Initramfs::plan(initramfs, kernel.end, limit, limit < layout::GAP.min(kernel_limit))?;
        Ok(Boot { kernel, initramfs, cmdline: cmdline.into() })
    }

    /// Whether the kernel is Linux.
    pub fn is_linux(&self) -> bool {
        self.kernel.is_linux
    }

    /// Puts huge pages behind the kernel's memory. Called before [`Boot::load`], since it writes to RAM.
    pub fn collapse_kernel(&self, ram: &Ram) {
        ram.collapse(self.kernel.start, self.kernel.end);
    }

    /// Writes kernel, initramfs, command line, boot parameters, segment descriptors, page tables and reset
    /// vector to RAM, and the ACPI tables of a machine with these processors and devices. Gives the kernel's
    /// entry point.
    pub fn load(mut self, ram: &Ram, vcpus: u32, devices: usize) -> Result<Entry, BootError> {
        let memory = ram.memory();
        let (entry, header) = self.kernel.load(memory)?;
        if let Some(initramfs) = &mut self.initramfs {
            initramfs.load(memory)?;
        }
        let write = |what: &'static str, bytes: &[u8], address| {
            memory.write_slice(bytes, GuestAddress(address)).map_err(|error| BootError::Write(what, error))
        };
        write("command line", &[self.cmdline.as_bytes(), &[0]].concat(), layout::CMDLINE)?;
        write("ACPI tables", &acpi::tables(layout::ACPI, vcpus, devices), layout::ACPI)?;
        let initramfs = self.initramfs.map(|Initramfs { start, len, .. }| (start, len));
        let params = match entry {
            Entry::Linux(_) => boot_parameters(header, ram, initramfs).as_slice().to_vec(),
            Entry::Pvh(_) => pvh::information(&memory_map(ram), initramfs),
        };
        write("boot parameters", &params, layout::BOOT_PARAMS)?;
        write("page tables", &le_bytes(&regs::page_tables()), layout::PAGE_TABLES)?;
        write("global descriptor table", &le_bytes(&regs::gdt()), layout::GDT)?;
        let reset = regs::reset_vector(layout::ACPI_RESET, acpi::RESET_VALUE);
        write("reset vector", &reset, layout::RESET_VECTOR)?;
        Ok(entry)
    }
}

fn le_bytes(entries: &[u64]) -> Vec<u8> {
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// The "zero page": the kernel's own header with the fields that a boot loader fills in, the memory map, the
/// ACPI root pointer.
fn boot_parameters(header: setup_header, ram: &Ram, initramfs: Option<(u64, u64)>) -> boot_params {
    let mut params = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    // An ELF kernel has no header of its own: only these fields.
    params.hdr.header = HDRS;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.type_of_loader = LOADER_OTHER;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some((start, len)) = initramfs {
        // Below 4 GiB, so in 32 bits.
        (params.hdr.ramdisk_image, params.hdr.ramdisk_size) = (start as u32, len as u32);
    }
    let map = memory_map(ram);
    params.e820_table[..map.len()].copy_from_slice(&map);
    params.e820_entries = map.len() as u8;
    params
}

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// The memory map for the kernel. The gap is not in it: ACPI describes the devices there.
fn memory_map(ram: &Ram) -> Vec<boot_e820_entry> {
    let entry = |addr, size, r#type| boot_e820_entry { addr, size, r#type };
    let mut map = vec![
        entry(0, layout::LOW_RAM_END, E820_RAM),
        entry(layout::LOW_RAM_END, layout::HIGH_RAM - layout::LOW_RAM_END, E820_RESERVED),
        entry(layout::HIGH_RAM, ram.low_end() - layout::HIGH_RAM, E820_RAM),
    ];
    let above = ram.regions[1..].iter().map(|region| region.guest);
    map.extend(above.map(|guest| entry(guest.start(), guest.len(), E820_RAM)));
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tempfile::NamedTempFile;

    use super::super::kernel::{SETUP_HEADER, XLF_KERNEL_64};
    use super::*;
    use libc::EM_X86_64;

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
        Ram::new(size, false, layout::GAP, layout::GAP_END).unwrap()
    }

    fn boot(kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str, ram: &Ram) -> Result<u64, BootError> {
        let initramfs: Vec<_> = initramfs.into_iter().collect();
        let Entry::Linux(entry) = boot_with(kernel, &initramfs, cmdline, ram)? else {
            panic!("entered by PVH")
        };
        Ok(entry)
    }

    fn boot_with(kernel: &[u8], initramfs: &[&[u8]], cmdline: &str, ram: &Ram) -> Result<Entry, BootError> {
        let (kernel, files) = (file(kernel), initramfs.iter().map(|bytes| file(bytes)).collect::<Vec<_>>());
        let paths: Vec<_> = files.iter().map(|file| file.path().to_owned()).collect();
        Boot::plan(kernel.path(), &paths, cmdline, ram)?.load(ram, 1, 0)
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
        assert_eq!(entry, 2 * MIB + 4);
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
        assert_eq!(entry, 2 * MIB + 0x200);
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
    fn several_files_are_one_initramfs() {
        let ram = ram(8 * MIB);
        boot_with(&elf(2 * MIB, MIB), &[&[1; 5], &[2; 4096], &[3]], "", &ram).unwrap();
        let header = params(&ram).hdr;
        assert_eq!((header.ramdisk_image as u64, header.ramdisk_size as u64), (8 * MIB - 8192, 8 + 4096 + 1));
        let expected = [&[1; 5][..], &[0; 3], &[2; 4096], &[3, 0, 0, 0]].concat();
        assert_eq!(bytes_at(&ram, 8 * MIB - 8192, 4108), expected);
    }

    #[test]
    fn more_memory_is_advised_only_where_it_helps() {
        let hint = |kernel: &[u8], ram: &Ram| {
            boot(kernel, Some(&vec![0; 6 * MIB as usize]), "", ram).unwrap_err().hint().unwrap()
        };
        assert!(hint(&elf(2 * MIB, MIB), &ram(8 * MIB)).contains("--memory"));
        // This kernel takes none above 6 MiB.
        assert!(hint(&bzimage(0), &ram(16 * MIB)).contains("more memory does not help"));
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
