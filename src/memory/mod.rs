//! Guest physical memory: RAM, the windows of shared memory regions, and what is mapped inside them.
//!
//! Nothing here knows KVM. The trait [`GuestMapper`] shows host memory to the guest: `kvm::slots` implements
//! it, tests have a fake that records.

pub mod alloc;
mod backing;
mod error;
pub mod ledger;
pub mod missing;
mod origin;
pub(crate) mod pages;
pub mod ram;
pub mod shmem;
pub mod window;

use std::fmt;
use std::io;

/// The page size of everything here: x86-64's smallest page, 4 KiB.
pub const PAGE_SIZE: u64 = 1 << 12;

/// A non-empty range of guest physical addresses that does not wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestRange {
    start: u64,
    len: u64,
}

impl GuestRange {
    /// The `len` bytes from `start` on; `None` if empty or ending beyond 2^64.
    pub fn new(start: u64, len: u64) -> Option<Self> {
        let _last = start.checked_add(len.checked_sub(1)?)?;
        Some(GuestRange { start, len })
    }

    /// The first address.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The length in bytes, at least 1.
    // There is no `is_empty`: a range is never empty.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The last address, inclusive.
    pub fn last(&self) -> u64 {
        self.start + (self.len - 1)
    }

    /// Whether an address is in it.
    pub fn contains(&self, at: u64) -> bool {
        self.start <= at && at <= self.last()
    }

    /// Whether the two share an address.
    pub fn overlaps(&self, other: &GuestRange) -> bool {
        self.start <= other.last() && other.start <= self.last()
    }
}

/// As the memory map shows it: first and last address.
impl fmt::Display for GuestRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#014x}-{:#014x}", self.start, self.last())
    }
}

/// What the guest may do with a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads work; writes become exits, and are dropped.
    ReadOnly,
    /// Reads and writes work.
    ReadWrite,
}

/// The name of one live mapping in guest physical memory: a KVM memory slot number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotId(pub u32);

/// Puts ranges of host memory into guest physical memory, and takes them away again.
///
/// ```text
///          map ─▶ live ──release──▶ idle ──map of the same range, address and access──▶ live
///                  │                 │
///                unmap               └──retire; a map that needs its number or its range; too many──▶ gone
///                  └──▶ gone
/// ```
///
/// Called by the set-up, and by backend-channel and vCPU threads while the guest runs. No method but
/// `prefault` waits for another process, except that KVM waits for a vCPU that waits for a page of a
/// foreign file. The guest sees a mapping when `map` has returned, and no longer sees it when `unmap` has:
/// no vCPU can reach the memory then.
pub trait GuestMapper: Send + Sync {
    /// Lets the guest see the memory at `host` as the addresses `guest`.
    ///
    /// Fails with ENOSPC when no slot is left, EEXIST when a mapping is there already, else with KVM's errno;
    /// no live mapping is changed then.
    ///
    /// # Safety
    ///
    /// `guest.len()` bytes from `host` on must stay an address range of the caller's (mapped or reserved)
    /// until the slot or the machine is gone, and no Rust reference may go into them: the guest reads and,
    /// with [`Access::ReadWrite`], writes them at any time.
    unsafe fn map(&self, guest: GuestRange, host: *mut u8, access: Access) -> io::Result<SlotId>;

    /// Takes a mapping away. Fails with ENOENT for a slot that is not live, else with KVM's errno; the
    /// mapping stays then.
    fn unmap(&self, slot: SlotId) -> io::Result<()>;

    /// Fills the page tables between guest and host for a part of a mapping, as far as this machine can,
    /// so that the guest's first access to a page costs no fault. Called by the thread that called `map`,
    /// with no lock held: a page that is not there is read in, which waits for the disk, and with
    /// `foreign-files=on` for the file's server.
    ///
    /// Fails with the errno of the host; the guest's accesses then do what was not done.
    fn prefault(&self, _guest: GuestRange) -> io::Result<()> {
        Ok(())
    }

    /// Makes a slot idle: the caller is about to put inaccessible pages in place of the memory. Until it has,
    /// the guest sees the memory. The `SlotId` is invalid from now on. Fails with ENOENT for one that is not
    /// live.
    fn release(&self, slot: SlotId) -> io::Result<()>;

    /// Takes up to `most` idle slots away that share an address with `range`, and gives how many: fewer than
    /// `most` where no other is left. Fails with KVM's errno; the slot stays then.
    fn retire(&self, range: GuestRange, most: usize) -> io::Result<usize>;
}
