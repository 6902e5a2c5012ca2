//! The driver's side of a disk, made by hand.

use std::fs;
use std::path::PathBuf;

use hotslot_test_support::driver::*;
use hotslot_test_support::files::MIB;
use hotslot_test_support::names::*;
use hotslot_test_support::program::{Backend, file};
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vm_memory::{Bytes, GuestAddress};

pub const SEG_MAX: u64 = 1 << 2;
pub const RO: u64 = 1 << 5;
pub const BLK_SIZE: u64 = 1 << 6;
pub const FLUSH: u64 = 1 << 9;
pub const TOPOLOGY: u64 = 1 << 10;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const MQ: u64 = 1 << 12;
pub const DISCARD: u64 = 1 << 13;
pub const WRITE_ZEROES: u64 = 1 << 14;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;
pub const NO_STATUS: u8 = 0xee;

pub const HEADER: u64 = 0x5000;
pub const STATUS: u64 = 0x5100;
pub const DATA: u64 = 0x1_0000;
pub const SECTOR: u64 = 512;

/// A buffer of a request: address and length.
pub type Buffer = (u64, u32);

/// A range to discard or zero: sector, number of sectors, flags.
pub type Range = (u64, u32, u32);

pub struct Machine(pub Driver);

impl Machine {
    pub fn connect(backend: &Backend) -> Self {
        let features = VIRTIO_F_VERSION_1 | FLUSH | DISCARD | WRITE_ZEROES | SEG_MAX | BLK_SIZE;
        Self::connect_with(backend, features)
    }

    pub fn connect_with(backend: &Backend, features: u64) -> Self {
        let protocol = PROTOCOL_F_MQ
            | PROTOCOL_F_REPLY_ACK
            | PROTOCOL_F_BACKEND_REQ
            | PROTOCOL_F_CONFIG
            | PROTOCOL_F_RESET_DEVICE
            | PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        let mut machine = Machine(Driver::connect(backend, features, protocol));
        machine.start();
        machine
    }

    pub fn config(&mut self) -> Vec<u8> {
        self.0.front_end.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60]).unwrap().1
    }

    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) {
        self.0.front_end.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes).unwrap();
    }

    pub fn start(&mut self) {
        let driver = &mut self.0;
        driver.front_end.set_features(driver.features).unwrap();
        driver.front_end.set_mem_table(&[driver.ram_region()]).unwrap();
        driver.start_queue();
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.0.ram.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// A request with these data, read by the device or written: how many bytes were written, and the status.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u32, u8) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        let base = self.0.base;
        self.write(base + HEADER, &header);
        self.write(base + STATUS, &[NO_STATUS]);
        let direction = if matches!(kind, T_IN | T_GET_ID) { WRITE } else { 0 };
        let mut chain = vec![(base + HEADER, 16, 0)];
        chain.extend(data.iter().map(|&(address, len)| (address, len, direction)));
        chain.push((base + STATUS, 1, WRITE));
        self.chain(&chain)
    }

    pub fn chain(&mut self, chain: &[(u64, u32, u16)]) -> (u32, u8) {
        for (index, &(address, len, flags)) in chain.iter().enumerate() {
            let next = if index + 1 < chain.len() { NEXT } else { 0 };
            let index = index as u16;
            self.0.descriptor(index, (address, len, flags | next, (index + 1) * next));
        }
        self.0.offer(0);
        (self.0.await_used(0), self.read(self.0.base + STATUS, 1)[0])
    }

    pub fn ranges(&mut self, kind: u32, ranges: &[Range]) -> (u32, u8) {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(count.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.write(DATA, &bytes);
        self.request(kind, 0, &[(DATA, bytes.len() as u32)])
    }
}

/// A field of the configuration space.
pub fn word(space: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(space[at..at + 4].try_into().unwrap())
}

/// Bytes of which no two sectors are alike.
pub fn pattern(len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect()
}

/// The disk: a file of the pattern.
pub fn disk(dir: &TempDir) -> (PathBuf, Vec<u8>) {
    let path = file(dir, MIB);
    let bytes = pattern(MIB);
    fs::write(&path, &bytes).unwrap();
    (path, bytes)
}
