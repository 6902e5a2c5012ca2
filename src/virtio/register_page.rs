//! The register block of a virtio-mmio device as a page of memory (VIRTIO 1.3, section 4.2.2).
//!
//! The guest sees the page at [`RegisterPage::host_ptr`] through a read-only slot: its reads are plain memory
//! reads and never exit. So the page must hold at every instant what a read must return. Only the handlers of
//! the guest's writes (`super::mmio`) and the device's own events (`super::interrupt`) rewrite it.
//!
//! # Why there are two frames
//!
//! ConfigGeneration promises: a driver that reads the same value before and after the configuration space saw
//! one state of it. With reads that do not exit, no order of plain stores keeps that promise. A driver that
//! reads everything between two of our stores sees half of a change and one generation, wherever it is
//! incremented. (With an increment before the bytes and one after them, a guest that only read saw about 200
//! torn states in 17 million changes.)
//!
//! So a changed configuration is written, with its new generation, into a second frame, and one `mmap` then
//! puts that frame in place of the first. KVM follows the address: while the mapping is replaced, no vCPU can
//! access the new frame before all have lost the old one. All reads of one generation are reads of one frame.
//!
//! ```text
//!    guest page ──slot──▶ host_ptr() ──┬──▶ frame 0   ◀── front: every store goes here too
//!                                      └╌╌▶ frame 1   ◀── the next configuration is made here
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use log::warn;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_bindings::virtio_mmio::*;

use crate::memory::pages::OwnedPages;
use crate::memory::{Access, PAGE_SIZE};

/// The size of the register block: control registers, then the configuration space, 4 KiB together.
pub const BLOCK_SIZE: usize = PAGE_SIZE as usize;

/// Where the configuration space starts in the block.
pub const CONFIG_START: usize = VIRTIO_MMIO_CONFIG as usize;

/// The largest configuration space: what is left of the block, 0x1000 - 0x100.
pub const CONFIG_MAX: usize = BLOCK_SIZE - CONFIG_START;

/// QueueReset's offset (VIRTIO 1.3, table 4.1); the kernel's header does not have it.
const VIRTIO_MMIO_QUEUE_RESET: u32 = 0x0c0;

/// Declares [`Register`] and the list of all.
macro_rules! registers {
    ($($name:ident = $offset:ident,)*) => {
        /// The control registers, each 4 bytes, by the names and at the offsets of VIRTIO 1.3, table 4.1.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        #[allow(missing_docs)] // The specification's table is their documentation.
        pub enum Register {
            $($name = $offset,)*
        }

        impl Register {
            /// All of them, in the order of the block.
            pub const ALL: [Register; 29] = [$(Register::$name),*];
        }
    };
}

registers! {
    MagicValue = VIRTIO_MMIO_MAGIC_VALUE,
    Version = VIRTIO_MMIO_VERSION,
    DeviceID = VIRTIO_MMIO_DEVICE_ID,
    VendorID = VIRTIO_MMIO_VENDOR_ID,
    DeviceFeatures = VIRTIO_MMIO_DEVICE_FEATURES,
    DeviceFeaturesSel = VIRTIO_MMIO_DEVICE_FEATURES_SEL,
    DriverFeatures = VIRTIO_MMIO_DRIVER_FEATURES,
    DriverFeaturesSel = VIRTIO_MMIO_DRIVER_FEATURES_SEL,
    QueueSel = VIRTIO_MMIO_QUEUE_SEL,
    QueueSizeMax = VIRTIO_MMIO_QUEUE_NUM_MAX,
    QueueSize = VIRTIO_MMIO_QUEUE_NUM,
    QueueReady = VIRTIO_MMIO_QUEUE_READY,
    QueueNotify = VIRTIO_MMIO_QUEUE_NOTIFY,
    InterruptStatus = VIRTIO_MMIO_INTERRUPT_STATUS,
    InterruptACK = VIRTIO_MMIO_INTERRUPT_ACK,
    Status = VIRTIO_MMIO_STATUS,
    QueueDescLow = VIRTIO_MMIO_QUEUE_DESC_LOW,
    QueueDescHigh = VIRTIO_MMIO_QUEUE_DESC_HIGH,
    QueueDriverLow = VIRTIO_MMIO_QUEUE_AVAIL_LOW,
    QueueDriverHigh = VIRTIO_MMIO_QUEUE_AVAIL_HIGH,
    QueueDeviceLow = VIRTIO_MMIO_QUEUE_USED_LOW,
    QueueDeviceHigh = VIRTIO_MMIO_QUEUE_USED_HIGH,
    SHMSel = VIRTIO_MMIO_SHM_SEL,
    SHMLenLow = VIRTIO_MMIO_SHM_LEN_LOW,
    SHMLenHigh = VIRTIO_MMIO_SHM_LEN_HIGH,
    SHMBaseLow = VIRTIO_MMIO_SHM_BASE_LOW,
    SHMBaseHigh = VIRTIO_MMIO_SHM_BASE_HIGH,
    QueueReset = VIRTIO_MMIO_QUEUE_RESET,
    ConfigGeneration = VIRTIO_MMIO_CONFIG_GENERATION,
}

impl Register {
    /// The register's offset in the block.
    pub const fn offset(self) -> u64 {
        self as u64
    }

    /// The register that starts at this offset.
    pub fn at(offset: u64) -> Option<Register> {
        Register::ALL.into_iter().find(|register| register.offset() == offset)
    }

    const fn word(self) -> usize {
        self as usize / WORD
    }
}

const WORD: usize = size_of::<AtomicU32>();
const CONFIG_WORD: usize = CONFIG_START / WORD;

type Frame = [AtomicU32; BLOCK_SIZE / WORD];

/// The page, its two frames, and which of them the guest sees.
///
/// The caller that puts [`Self::host_ptr`] into a slot keeps the page alive as long as the slot.
pub struct RegisterPage {
    /// Both frames, mapped for us, readable and writable.
    frames: OwnedPages,
    /// One frame, mapped for the guest, readable. The VMM itself never reads or writes there.
    view: OwnedPages,
    /// The memory of the frames.
    file: OwnedFd,
    /// The index of the frame that `view` shows.
    ///
    /// Lock order: innermost. Every access to the frames is made under it, for the length of a few loads and
    /// stores (and one `mmap`); no code of other modules is called meanwhile.
    front: Mutex<usize>,
}

impl RegisterPage {
    /// A page of zeroes: no device is behind it yet (a driver that reads MagicValue 0 ignores it).
    pub fn new() -> io::Result<Arc<RegisterPage>> {
        let file = memfd_create("hotslot-registers", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, size_of::<[Frame; 2]>() as u64)?;
        let frames = OwnedPages::of_file(file.as_fd(), 0, size_of::<[Frame; 2]>(), Access::ReadWrite)?;
        let view = OwnedPages::of_file(file.as_fd(), 0, BLOCK_SIZE, Access::ReadOnly)?;
        Ok(Arc::new(RegisterPage { frames, view, file, front: Mutex::new(0) }))
    }

    /// The page's address in the VMM: [`BLOCK_SIZE`] bytes, mapped read-only, for a read-only slot.
    pub fn host_ptr(&self) -> *mut u8 {
        self.view.address()
    }

    /// What a guest's read of `data.len()` bytes at `offset` returns; zeroes beyond the block.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        for (index, byte) in (0u64..).zip(data) {
            let position = usize::try_from(offset.saturating_add(index)).unwrap_or(usize::MAX);
            let word = registers.frame().get(position / WORD);
            let bytes = word.map_or([0; WORD], |word| word.load(Ordering::SeqCst).to_le_bytes());
            *byte = bytes[position % WORD];
        }
    }

    /// One register as the guest sees it now.
    pub fn get(&self, register: Register) -> u32 {
        self.lock().get(register)
    }

    /// Access to all registers; other threads wait.
    pub(super) fn lock(&self) -> Registers<'_> {
        let front = self.front.lock().unwrap_or_else(PoisonError::into_inner);
        Registers { page: self, front }
    }

    fn frames(&self) -> &[Frame; 2] {
        // SAFETY: the mapping is as large and as aligned as the type; any bytes are valid atomics. The page
        // owns it until it is dropped and never replaces it. The guest, which reads the same memory, does not
        // write it.
        unsafe { &*self.frames.address().cast() }
    }
}

/// The registers, with the page's lock held.
pub(super) struct Registers<'a> {
    page: &'a RegisterPage,
    front: MutexGuard<'a, usize>,
}

impl Registers<'_> {
    pub(super) fn get(&self, register: Register) -> u32 {
        self.frame()[register.word()].load(Ordering::SeqCst)
    }

    pub(super) fn set(&mut self, register: Register, value: u32) {
        self.frame()[register.word()].store(value, Ordering::SeqCst);
    }

    pub(super) fn set_bits(&mut self, register: Register, bits: u32) {
        self.set(register, self.get(register) | bits);
    }

    /// A 64-bit value in a pair of registers.
    pub(super) fn set_pair(&mut self, low: Register, high: Register, value: u64) {
        self.set(low, value as u32);
        self.set(high, (value >> 32) as u32);
    }

    /// Makes `config`, then zeroes, the configuration space, with a new ConfigGeneration if that changes
    /// anything. What is beyond [`CONFIG_MAX`] bytes has no place in the block and is left out.
    pub(super) fn set_config(&mut self, config: &[u8]) {
        let mut new = [0; CONFIG_MAX / WORD];
        for (word, bytes) in new.iter_mut().zip(config.chunks(WORD)) {
            let mut padded = [0; WORD];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u32::from_le_bytes(padded);
        }
        let unchanged = |(old, new): (&AtomicU32, &u32)| old.load(Ordering::SeqCst) == *new;
        if self.frame()[CONFIG_WORD..].iter().zip(&new).all(unchanged) {
            return;
        }

        let back = 1 - *self.front;
        let frame = &self.page.frames()[back];
        for (to, from) in frame.iter().zip(&self.frame()[..CONFIG_WORD]) {
            to.store(from.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        store_config(frame, &new);
        bump_generation(frame);
        // The guest sees the other frame, all at once: the view stays a mapping of the same size, as the slot
        // needs. An error (ENOMEM: the process has no mapping left) comes before the old one is touched.
        let RegisterPage { view, file, .. } = self.page;
        match view.replace_with_file(file.as_fd(), (back * BLOCK_SIZE) as u64, Access::ReadOnly) {
            Ok(()) => *self.front = back,
            Err(error) => {
                // Second best: only a driver that reads everything during the change misses the new
                // generation.
                warn!("a changed configuration is shown word by word: {error}");
                bump_generation(self.frame());
                store_config(self.frame(), &new);
                bump_generation(self.frame());
            }
        }
    }

    fn frame(&self) -> &Frame {
        &self.page.frames()[*self.front]
    }
}

fn store_config(frame: &Frame, config: &[u32]) {
    for (to, word) in frame[CONFIG_WORD..].iter().zip(config) {
        to.store(*word, Ordering::SeqCst);
    }
}

fn bump_generation(frame: &Frame) {
    frame[Register::ConfigGeneration.word()].fetch_add(1, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;

    /// Reads a word as the guest does: from the memory behind the slot.
    fn peek(page: &RegisterPage, offset: usize) -> u32 {
        assert!(offset + WORD <= BLOCK_SIZE);
        // SAFETY: inside the view, which `page` owns; nobody holds a reference into it.
        unsafe { page.host_ptr().wrapping_add(offset).cast::<u32>().read_volatile() }
    }

    /// A configuration whose change takes as long as it can: every word of it is `value`.
    fn everywhere(value: u32) -> Vec<u8> {
        value.to_le_bytes().repeat(CONFIG_MAX / WORD)
    }

    #[test]
    fn the_registers_are_where_the_specification_puts_them() {
        let offsets = Register::ALL.map(Register::offset);
        assert!(offsets.is_sorted());
        assert!(offsets.iter().all(|offset| offset % 4 == 0 && *offset < CONFIG_START as u64));
        for register in Register::ALL {
            assert_eq!(Register::at(register.offset()), Some(register));
            assert_eq!(Register::at(register.offset() + 1), None);
        }
        assert_eq!(Register::at(VIRTIO_MMIO_GUEST_PAGE_SIZE.into()), None);
        assert_eq!(Register::at(CONFIG_START as u64), None);
    }

    #[test]
    fn what_is_stored_is_what_the_guest_reads_before_and_after_a_configuration_change() {
        let page = RegisterPage::new().unwrap();
        page.lock().set(Register::Status, 0x11);
        assert_eq!(peek(&page, 0x70), 0x11);
        for round in 1..5u8 {
            page.lock().set_config(&[round; 5]);
            page.lock().set(Register::QueueSizeMax, u32::from(round));
            assert_eq!(peek(&page, 0x70), 0x11, "carried over");
            assert_eq!(peek(&page, 0x34), u32::from(round));
            assert_eq!(peek(&page, 0xfc), u32::from(round));
            assert_eq!(peek(&page, 0x100), u32::from_le_bytes([round; 4]));
            assert_eq!(peek(&page, 0x104), u32::from(round), "padded with zeroes");
        }
    }

    #[test]
    fn an_equal_configuration_keeps_its_generation_and_a_shorter_one_leaves_zeroes() {
        let page = RegisterPage::new().unwrap();
        page.lock().set_config(&[]);
        assert_eq!(page.get(Register::ConfigGeneration), 0);
        page.lock().set_config(&[9; CONFIG_MAX + 7]);
        page.lock().set_config(&[9; CONFIG_MAX]);
        assert_eq!(page.get(Register::ConfigGeneration), 1);
        assert_eq!(peek(&page, BLOCK_SIZE - 4), 0x0909_0909);
        page.lock().set_config(&[1]);
        let mut data = [0xff; 8];
        page.read(0x100, &mut data);
        assert_eq!(data, [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(peek(&page, BLOCK_SIZE - 4), 0);
    }

    #[test]
    fn reads_of_any_width_and_place_are_answered() {
        let page = RegisterPage::new().unwrap();
        page.lock().set(Register::MagicValue, 0x74726976);
        page.lock().set(Register::Version, 2);
        let mut data = [0; 8];
        page.read(2, &mut data[..3]);
        assert_eq!(data[..3], *b"rt\x02");
        for offset in [BLOCK_SIZE as u64 - 1, BLOCK_SIZE as u64, u64::MAX - 7] {
            page.read(offset, &mut data);
            assert_eq!(data, [0; 8]);
        }
    }

    #[test]
    fn one_generation_is_one_configuration_while_it_changes_under_the_reader() {
        const CHANGES: u32 = 1000;
        let page = &RegisterPage::new().unwrap();
        thread::scope(|scope| {
            let writer = scope.spawn(move || {
                for value in 1..=CHANGES {
                    page.lock().set_config(&everywhere(value));
                }
            });
            while !writer.is_finished() {
                let before = peek(page, 0xfc);
                let (first, second) = (peek(page, 0x100), peek(page, 0xffc));
                if peek(page, 0xfc) == before {
                    assert_eq!(first, second, "generation {before}");
                }
            }
        });
        assert_eq!(page.get(Register::ConfigGeneration), CHANGES);
    }

    /// The same with a guest that reads through a read-only slot: 38 bytes of real-mode code on any
    /// `/dev/kvm`.
    #[test]
    fn a_guest_sees_one_configuration_in_one_generation() {
        use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
        use kvm_ioctls::{Kvm, VcpuExit};

        const CODE: [u8; 38] = [
            0xa1, 0xfc, 0x30, //             again: mov ax, [0x30fc]   ConfigGeneration
            0x8b, 0x1e, 0x00, 0x31, //              mov bx, [0x3100]
            0x8b, 0x0e, 0xfc, 0x3f, //              mov cx, [0x3ffc]
            0x8b, 0x16, 0xfc, 0x30, //              mov dx, [0x30fc]
            0x39, 0xd0, 0x75, 0xed, //              cmp ax, dx; jne again
            0x39, 0xcb, 0x75, 0x08, //              cmp bx, cx; jne torn
            0x81, 0xfb, 0xff, 0xff, //              cmp bx, 0xffff
            0x74, 0x06, 0xeb, 0xe1, //              je done; jmp again
            0xe6, 0x10, 0xeb, 0xdd, //        torn: out 0x10, al; jmp again
            0xe6, 0x11, 0xf4, //              done: out 0x11, al; hlt
        ];
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) if std::env::var_os("REQUIRE_KVM").is_none() => {
                eprintln!("skipped: /dev/kvm cannot be opened: {error}");
                return;
            }
            Err(error) => panic!("/dev/kvm: {error}"),
        };
        let (ram, page) = (RegisterPage::new().unwrap(), RegisterPage::new().unwrap());
        for (at, bytes) in CODE.chunks(WORD).enumerate() {
            let mut word = [0; WORD];
            word[..bytes.len()].copy_from_slice(bytes);
            ram.frames()[0][at].store(u32::from_le_bytes(word), Ordering::SeqCst);
        }
        let vm = kvm.create_vm().unwrap();
        for (slot, guest_phys_addr, page) in [(0, 0x1000, &ram), (1, 0x3000, &page)] {
            let region = kvm_userspace_memory_region {
                slot,
                flags: KVM_MEM_READONLY,
                guest_phys_addr,
                memory_size: BLOCK_SIZE as u64,
                userspace_addr: page.host_ptr() as u64,
            };
            // SAFETY: both pages outlive the VM, which is declared after them.
            unsafe { vm.set_user_memory_region(region) }.unwrap();
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        // Bit 1 of RFLAGS is always 1.
        (regs.rip, regs.rflags) = (0x1000, 2);
        vcpu.set_regs(&regs).unwrap();

        thread::scope(|scope| {
            scope.spawn(|| {
                let end = Instant::now() + Duration::from_millis(500);
                for value in (0u32..).take_while(|_| Instant::now() < end) {
                    page.lock().set_config(&everywhere(value % 0xffff));
                }
                page.lock().set_config(&everywhere(0xffff));
            });
            match vcpu.run().unwrap() {
                VcpuExit::IoOut(0x11, _) => {}
                VcpuExit::IoOut(0x10, _) => panic!("the guest saw half of a change"),
                exit => panic!("unexpected: {exit:?}"),
            }
        });
        assert!(page.get(Register::ConfigGeneration) > 10);
    }
}
