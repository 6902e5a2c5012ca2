//! Requests with buffers outside RAM: in the window, or in what other devices have mapped.
//!
//! A guest hands over such buffers when a program writes out of a mapping of a DAX file, or reads into one.
//! What is mapped there is known by file and offset ([`super::dax`], [`super::guest`]). So the buffers are
//! replaced by copies for the time of the request: read from the files before, written to them afterwards.
//! Nothing of another's file is mapped, so that no one who shortens it can end this process.
//!
//! As with a mapping: behind the end of a file there are zeroes, and what is written there is lost. Called by
//! [`super::requests`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use fuse_vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use rustix::io::Errno;

use super::dax::{PAGE, Window};
use super::directory::Directory;
use super::guest::Guest;
use super::queue::{Chain, Memory};
use super::refused::{MAX_REQUEST, Refused};

/// The most separate ranges of copies for a request: Linux sends at most one for each page.
const MAX_RANGES: usize = MAX_REQUEST / PAGE as usize;

/// The copies of a request's buffers that are outside RAM.
pub struct Copies {
    memory: Memory,
    /// Of the buffers for the answer, and where in the answer each part begins.
    targets: Vec<(usize, Part)>,
}

/// A part of a buffer that is in one file.
struct Part {
    address: u64,
    len: usize,
    file: Arc<File>,
    file_offset: u64,
}

impl Copies {
    /// Copies the buffers that are outside RAM; `None` where there are none, or where some are nowhere.
    ///
    /// # Errors
    ///
    /// A buffer where nothing is mapped, or one for the answer in a mapping that cannot be written; a file
    /// that cannot be read; too much.
    pub fn of(
        chain: &Chain,
        guest: &Guest,
        window: Option<&Window>,
        directory: &Directory,
    ) -> Result<Option<Copies>, Refused> {
        let mut finder = Finder { guest, window, directory, files: Vec::new() };
        let (mut sources, mut targets, mut ranges) = (Vec::new(), Vec::new(), Vec::new());
        let (mut position, mut total) = (0, 0);
        for buffer in chain.clone() {
            let (address, len) = (buffer.addr().0, u64::from(buffer.len()));
            if len > 0 && !is_in_ram(&guest.ram, address, len) {
                let Some(end) = address.checked_add(len).filter(|_| finder.is_outside_ram(address)) else {
                    return Ok(None);
                };
                ranges.push((address, end));
                total += len;
                if total > MAX_REQUEST as u64 {
                    return Err(too_much());
                }
                let mut at = position;
                for part in finder.parts(address, len, buffer.is_write_only()).map_err(unreachable)? {
                    let len = part.len;
                    match buffer.is_write_only() {
                        true => targets.push((at, part)),
                        false => sources.push(part),
                    }
                    at += len;
                }
            }
            if buffer.is_write_only() {
                position += buffer.len() as usize;
            }
        }
        if ranges.is_empty() {
            return Ok(None);
        }
        let memory = add_ranges(&guest.ram, ranges)?;
        for part in &sources {
            part.read(&memory).map_err(|e| failed("read", &e))?;
        }
        Ok(Some(Copies { memory, targets }))
    }

    /// RAM and the copies.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Writes the first `written` bytes of the answer to where they belong, as far as that is outside RAM.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write_back(&self, written: u32) -> Result<(), Refused> {
        for (position, part) in &self.targets {
            let len = (written as usize).saturating_sub(*position).min(part.len);
            part.write(&self.memory, len).map_err(|e| failed("written", &e))?;
        }
        Ok(())
    }
}

impl Part {
    fn read(&self, memory: &Memory) -> io::Result<()> {
        let mut bytes = vec![0; self.len];
        let mut done = 0;
        while done < bytes.len() {
            match self.file.read_at(&mut bytes[done..], self.file_offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        memory.write_slice(&bytes, GuestAddress(self.address)).map_err(io::Error::other)
    }

    /// Writes the first `len` bytes, but not behind the end of the file.
    fn write(&self, memory: &Memory, len: usize) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let in_file = self.file.metadata()?.len().saturating_sub(self.file_offset);
        let mut bytes = vec![0; len.min(usize::try_from(in_file).unwrap_or(usize::MAX))];
        memory.read_slice(&mut bytes, GuestAddress(self.address)).map_err(io::Error::other)?;
        self.file.write_all_at(&bytes, self.file_offset)
    }
}

/// Finds the files of buffers.
struct Finder<'a> {
    guest: &'a Guest,
    window: Option<&'a Window>,
    directory: &'a Directory,
    /// Opened for this request, by node, for reading only or for writing, too.
    files: Vec<(u64, bool, Arc<File>)>,
}

impl Finder<'_> {
    /// The offset in the window of a guest address that is inside.
    fn in_window(&self, address: u64) -> Option<(&Window, u64)> {
        let window = self.window?;
        let offset = address.checked_sub(self.guest.window?)?;
        (offset < window.size()).then_some((window, offset))
    }

    fn is_outside_ram(&self, address: u64) -> bool {
        self.in_window(address).is_some() || self.shared_at(address).is_some()
    }

    /// A file, offset and length: what another device has mapped from there on.
    fn shared_at(&self, address: u64) -> Option<(Arc<File>, u64, u64)> {
        self.guest.shared.iter().find_map(|shared| {
            let skipped = address.checked_sub(shared.address).filter(|&skipped| skipped < shared.len)?;
            Some((Arc::clone(&shared.file), shared.file_offset + skipped, shared.len - skipped))
        })
    }

    /// The parts of a buffer, in order.
    fn parts(&mut self, address: u64, len: u64, is_target: bool) -> io::Result<Vec<Part>> {
        let fault = || io::Error::from(Errno::FAULT);
        let mut parts = Vec::new();
        let mut add = |file, file_offset, len: u64| {
            let before: u64 = parts.iter().map(|part: &Part| part.len as u64).sum();
            parts.push(Part { address: address + before, len: len as usize, file, file_offset });
            before + len
        };
        if let Some((window, offset)) = self.in_window(address) {
            for mapping in window.parts(offset, len).ok_or_else(fault)? {
                if is_target && !mapping.writable {
                    return Err(fault());
                }
                let node = mapping.node;
                let opened = self.files.iter().find(|file| (file.0, file.1) == (node, is_target));
                let file = match opened {
                    Some((.., file)) => Arc::clone(file),
                    None => {
                        let inode = self.directory.inodes.get(node)?;
                        let file = Arc::new(match is_target {
                            true => self.directory.open_for_writing(&inode)?,
                            false => self.directory.open_for_reading(&inode)?,
                        });
                        self.files.push((node, is_target, Arc::clone(&file)));
                        file
                    }
                };
                add(file, mapping.file_offset, mapping.len);
            }
            return Ok(parts);
        }
        let mut done = 0;
        while done < len {
            let (file, file_offset, there) = self.shared_at(address + done).ok_or_else(fault)?;
            done = add(file, file_offset, there.min(len - done));
        }
        Ok(parts)
    }
}

fn is_in_ram(ram: &Memory, address: u64, len: u64) -> bool {
    ram.find_region(GuestAddress(address)).is_some_and(|region| {
        let offset = address - region.start_addr().0;
        len <= region.len() - offset
    })
}

/// RAM, and fresh memory in these ranges.
fn add_ranges(ram: &Memory, mut ranges: Vec<(u64, u64)>) -> Result<Memory, Refused> {
    ranges.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    if merged.len() > MAX_RANGES {
        return Err(too_much());
    }
    let no_memory = |e: &dyn std::fmt::Display| Refused {
        error: Errno::NOMEM,
        why: format!("there is no memory for a copy of a request's buffers: {e}"),
    };
    let mut memory = (**ram).clone();
    for (start, end) in merged {
        let region = GuestRegionMmap::from_range(GuestAddress(start), (end - start) as usize, None);
        let region = region.map_err(|e| no_memory(&e))?;
        memory = memory.insert_region(Arc::new(region)).map_err(|e| no_memory(&e))?;
    }
    Ok(Arc::new(memory))
}

fn too_much() -> Refused {
    let why = format!("a request has more than {MAX_REQUEST} bytes or {MAX_RANGES} ranges outside RAM");
    Refused { error: Errno::INVAL, why }
}

fn unreachable(e: io::Error) -> Refused {
    Refused { error: Errno::FAULT, why: format!("a request's buffer is in no mapping that allows it: {e}") }
}

fn failed(what: &str, e: &io::Error) -> Refused {
    Refused { error: Errno::IO, why: format!("a request's buffer in a mapping cannot be {what}: {e}") }
}
