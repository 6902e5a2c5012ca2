//! The thread `dump`, which writes the machine into a core file for gdb and `crash` (`--dump FILE`).
//!
//! It does so when the guest has crashed or panicked, at an error of hotslot, and at SIGUSR2, after which the
//! guest goes on. The vCPUs are paused meanwhile. Back-ends are not paused, and may write into RAM. Their
//! mappings are not in the dump: a mapping is a file of the back-end's.
//!
//! `Vmm::build` opens the file, before there is a sandbox. Its contents stay until a dump is written.

mod core;

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use super::error::{VmmError, failed_to};
use super::writer::Writer;
use crate::kvm::paging::{self, Mapped};
use crate::kvm::pause::{Holder, Registers};
use crate::kvm::vcpu::{Machine, Vcpu};
use crate::memory::PAGE_SIZE;
use crate::memory::ram::{Ram, RamRegion};
use crate::report::say;
use crate::sandbox::vmm::Kind;
use crate::thread;

use core::{Piece, head};

/// How long the end of the machine waits for a dump.
pub(super) const AT_MOST: Duration = Duration::from_secs(60);

/// The most ranges of linear addresses in a dump: each overlaps at most the two regions of RAM, and the ELF
/// header counts program headers in 16 bits (`e_phnum`).
const MOST_RANGES: usize = 16_000;
/// The most mapped pages that are visited: 64 GiB in the smallest pages.
const MOST_PAGES: usize = 16 << 20;

/// How much of RAM is read at a time.
const BLOCK: usize = 1 << 20;

/// The header of Linux's VMCOREINFO note, which starts a page: the name's length, then, after the length of
/// the contents, the type and the name.
const VMCOREINFO: [u8; 4] = 11_u32.to_le_bytes();
const VMCOREINFO_REST: &[u8] = b"\0\0\0\0VMCOREINFO\0\0";

/// Where a dump goes, and what it is of.
pub(super) struct DumpFile {
    path: PathBuf,
    file: File,
    ram: Arc<File>,
    pieces: Vec<Piece>,
}

impl DumpFile {
    /// Opens or creates the file.
    pub fn open(path: &Path, ram: &Ram) -> Result<DumpFile, VmmError> {
        let failed = |error| VmmError::Dump(path.to_owned(), error);
        // Opening a pipe must not wait for its reader. The check below refuses it.
        let mut options = File::options();
        options.write(true).create(true).truncate(false).custom_flags(libc::O_NONBLOCK);
        // Guest memory may hold secrets: only this user may read the file.
        let file = options.mode(0o600).open(path);
        let file = file.map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is not a regular file, which a dump needs")));
        }
        let piece = |region: &RamRegion| Piece {
            physical: region.guest.start(),
            len: region.guest.len(),
            file_offset: region.file_offset,
        };
        let pieces = ram.regions.iter().map(piece).collect();
        Ok(DumpFile { path: path.to_owned(), file, ram: Arc::clone(&ram.file), pieces })
    }

    /// Starts the thread.
    pub fn start(
        self,
        dumper: Arc<Writer>,
        machine: &Arc<Machine>,
        vcpus: &Arc<Vec<Vcpu>>,
    ) -> Result<(), VmmError> {
        let (machine, vcpus) = (Arc::clone(machine), Arc::clone(vcpus));
        let serve = move || dumper.serve(|| self.write_and_say(&machine, &vcpus));
        thread::spawn("dump".into(), Kind::Dumper, serve).map_err(failed_to("start the thread for dumps"))?;
        Ok(())
    }

    fn write_and_say(&self, machine: &Machine, vcpus: &[Vcpu]) {
        let interrupt = |vcpu| vcpus.get(vcpu).into_iter().for_each(Vcpu::interrupt);
        machine.pause.hold(Holder::Dump, interrupt);
        let path = self.path.display();
        match self.write(machine) {
            Ok(()) => say(format_args!("hotslot: the dump is written: {path}")),
            Err(error) => {
                // A core file that lacks a part looks like a complete one.
                let _as_it_is = self.file.set_len(0);
                say(format_args!("hotslot: cannot write the dump {path}: {error}"));
            }
        }
        machine.pause.release(Holder::Dump, |_| true);
    }

    fn write(&self, machine: &Machine) -> io::Result<()> {
        let all = machine.pause.vcpus();
        let registers: Vec<_> = (0..all).filter_map(|vcpu| machine.pause.registers(vcpu)).collect();
        if registers.len() < all {
            let missing = all - registers.len();
            log::warn!("the dump lacks {missing} of {all} vCPUs, which wait for a back-end or a page");
        }
        let head = head(&registers, &self.vmcoreinfo()?, &self.pieces, &mapped(machine, &registers));
        let len: u64 = self.pieces.iter().map(|piece| piece.len).sum();
        // Pages of zeroes are not written: they stay holes.
        self.file.set_len(0)?;
        self.file.set_len(head.len() as u64 + len)?;
        self.file.write_all_at(&head, 0)?;
        self.each_page(|offset, page| {
            if page.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(page, head.len() as u64 + offset)?;
            }
            Ok(())
        })
    }

    /// Calls `each` with the offset in the memfd and the contents of each page of RAM that is not in a hole.
    fn each_page(&self, mut each: impl FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut block = vec![0; BLOCK];
        let mut at = 0;
        loop {
            at = match seek(&self.ram, SeekFrom::Data(at)) {
                Ok(start) => start,
                // No data follows.
                Err(Errno::NXIO) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let end = seek(&self.ram, SeekFrom::Hole(at))?;
            while at < end {
                let part = &mut block[..(end - at).min(BLOCK as u64) as usize];
                self.ram.read_exact_at(part, at)?;
                for page in part.chunks(PAGE_SIZE as usize) {
                    each(at, page)?;
                    at += page.len() as u64;
                }
            }
        }
    }

    /// The contents of the VMCOREINFO note, by which `crash` knows a kernel: Linux has it in RAM, at the
    /// start of a page.
    fn vmcoreinfo(&self) -> io::Result<Vec<u8>> {
        let mut found = Vec::new();
        self.each_page(|_, page| {
            let Some((name_len, rest)) = page.split_first_chunk::<4>() else { return Ok(()) };
            let Some((len, rest)) = rest.split_first_chunk::<4>() else { return Ok(()) };
            if *name_len == VMCOREINFO
                && let Some(content) = rest.strip_prefix(VMCOREINFO_REST)
                && let Some(content) = content.get(..u32::from_le_bytes(*len) as usize)
            {
                found = content.to_vec();
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// The linear addresses of RAM by the page tables of the first vCPU that has some.
fn mapped(machine: &Machine, registers: &[Registers]) -> Vec<Mapped> {
    let mut ranges: Vec<Mapped> = Vec::new();
    let mut pages = 0;
    let read = |address, data: &mut [u8]| machine.ram.read_slice(data, GuestAddress(address)).is_ok();
    let Some(vcpu) = registers.iter().find(|vcpu| paging::is_on(&vcpu.sregs)) else {
        return ranges;
    };
    let is_complete = paging::each_page(&vcpu.sregs, &read, &mut |page| {
        pages += 1;
        match ranges.last_mut() {
            // From the highest address down: see `each_page`.
            Some(last) if page.is_right_before(last) => {
                *last = Mapped { len: last.len + page.len, ..page };
            }
            _ => ranges.push(page),
        }
        ranges.len() < MOST_RANGES && pages < MOST_PAGES
    });
    if !is_complete {
        log::warn!(
            "the dump lacks linear addresses: it has {} ranges, those with the highest addresses",
            ranges.len()
        );
    }
    ranges
}

/// Has a dump written at a fault, and waits for one that is being written. The vCPUs have left their
/// registers.
pub(super) fn finish(dumper: &Writer, is_fault: bool) {
    if is_fault {
        dumper.order();
    }
    if !dumper.wait(AT_MOST) {
        say_incomplete();
    }
}

/// The machine ends before a dump is written.
pub(super) fn say_incomplete() {
    say("hotslot: the dump is incomplete");
}
