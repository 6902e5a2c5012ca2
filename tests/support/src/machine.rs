//! The machine that the device is in, and the guest's eyes: memory slots of a real KVM and a processor that
//! runs a dozen instructions, or, where there is no `/dev/kvm`, a machine that only remembers.

use std::sync::Arc;

use hotslot::kvm::slots::Slots;
use hotslot::memory::{Access, GuestMapper, GuestRange};
use iced_x86::code_asm::*;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

use crate::bench::{Guest, PAGE};

/// Between them the guest sees windows. A processor without paging reaches 4 GiB.
pub const WINDOWS: (u64, u64) = (0x1000_0000, 0xe000_0000);

/// The processor's orders, in the page of RAM at address 0 that its program is in too.
const ADDRESS: u64 = 0x800;
const IS_WRITE: u64 = 0x804;
const BYTE: u64 = 0x808;

pub struct Machine(Option<Real>);

struct Real {
    slots: Arc<Slots>,
    processor: VcpuFd,
    /// The page at address 0, until the process ends.
    ram: *mut u32,
}

impl Machine {
    /// One of KVM's where there is one.
    pub fn new(kvm: bool) -> Machine {
        Machine(kvm.then(Real::new))
    }

    /// Its guest.
    pub fn guest(&self) -> Guest {
        match &self.0 {
            Some(real) => Guest::of(real.slots.clone()),
            None => Guest::default(),
        }
    }

    /// What the guest reads; `None` where that is an exit, because nothing is there or nothing can be read.
    pub fn read(&mut self, guest: &Guest, address: u64) -> Option<u8> {
        match &mut self.0 {
            Some(real) => real.access(address, None),
            None => guest.read(address),
        }
    }

    /// The guest writes; false where that is an exit.
    pub fn write(&mut self, guest: &Guest, address: u64, byte: u8) -> bool {
        match &mut self.0 {
            Some(real) => real.access(address, Some(byte)).is_some(),
            None => guest.write(address, byte),
        }
    }

    /// KVM itself has nothing at a region: it takes a slot there, over all of it.
    pub fn assert_empty(&self, region: GuestRange) {
        let Some(real) = &self.0 else { return };
        let len = region.len() as usize;
        let memory = reserve(len, libc::PROT_NONE);
        // SAFETY: the memory is ours until it is unmapped below, after the slot.
        let slot = unsafe { real.slots.map(region, memory.cast(), Access::ReadOnly) };
        real.slots.unmap(slot.expect("KVM still has something there")).unwrap();
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(memory, len) };
    }
}

/// Private memory, at an address of the kernel's choice.
fn reserve(len: usize, protection: libc::c_int) -> *mut libc::c_void {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: without MAP_FIXED nothing else is touched.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
    assert_ne!(memory, libc::MAP_FAILED);
    memory
}

impl Real {
    fn new() -> Real {
        let kvm = Kvm::new().unwrap();
        let vm = Arc::new(kvm.create_vm().unwrap());
        let slots = Arc::new(Slots::new(vm.clone(), kvm.get_nr_memslots() as u32));
        let program = program().expect("the program assembles");
        let ram = reserve(PAGE as usize, libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the page is ours, is never unmapped, and has room for the program.
        unsafe { std::ptr::copy_nonoverlapping(program.as_ptr(), ram.cast(), program.len()) };
        let page = GuestRange::new(0, PAGE).unwrap();
        // SAFETY: it is never unmapped; from now on only the guest and volatile accesses of ours use it.
        unsafe { slots.map(page, ram.cast(), Access::ReadWrite) }.unwrap();
        let ram = ram.cast();
        let processor = vm.create_vcpu(0).unwrap();
        let mut sregs = processor.get_sregs().unwrap();
        // Protected mode, everything flat, no paging.
        sregs.cr0 |= 1;
        for segment in [&mut sregs.cs, &mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
            (segment.base, segment.limit) = (0, u32::MAX);
            (segment.db, segment.g, segment.s, segment.present) = (1, 1, 1, 1);
            (segment.type_, segment.selector) = (3, 16);
        }
        (sregs.cs.type_, sregs.cs.selector) = (11, 8);
        processor.set_sregs(&sregs).unwrap();
        let mut real = Real { slots, processor, ram };
        real.restart();
        // KVM makes a thread for itself when a processor runs for the first time.
        assert_eq!(real.access(BYTE, Some(1)), Some(1));
        real
    }

    /// From the program's first instruction on.
    fn restart(&self) {
        let mut regs = self.processor.get_regs().unwrap();
        (regs.rip, regs.rflags) = (0, 2);
        self.processor.set_regs(&regs).unwrap();
    }

    fn access(&mut self, address: u64, byte: Option<u8>) -> Option<u8> {
        let word = |at: u64| self.ram.wrapping_add(at as usize / 4);
        let result = word(BYTE);
        let order = [
            (word(ADDRESS), address as u32),
            (word(IS_WRITE), byte.is_some().into()),
            (result, byte.unwrap_or(0).into()),
        ];
        for (word, value) in order {
            // SAFETY: a word of the page, which is never unmapped.
            unsafe { word.write_volatile(value) };
        }
        let mut exited = false;
        loop {
            match self.processor.run() {
                Ok(VcpuExit::Hlt) => break,
                Ok(VcpuExit::MmioRead(at, data)) => {
                    assert_eq!(at, address);
                    data.fill(0xff);
                    exited = true;
                }
                Ok(VcpuExit::MmioWrite(at, _)) => {
                    assert_eq!(at, address);
                    exited = true;
                }
                Ok(other) => panic!("the processor stopped: {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                // A real KVM's word for memory that is not there.
                Err(error) if error.errno() == libc::EFAULT => {
                    self.restart();
                    return None;
                }
                Err(error) => panic!("the processor does not run: {error}"),
            }
        }
        // SAFETY: a word of the page.
        (!exited).then(|| unsafe { result.read_volatile() } as u8)
    }
}

/// Carries an order out, halts, and starts over.
fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(32)?;
    let (mut next, mut write, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.set_label(&mut next)?;
    a.mov(ebx, dword_ptr(ADDRESS))?;
    a.cmp(dword_ptr(IS_WRITE), 0)?;
    a.jne(write)?;
    a.mov(al, byte_ptr(ebx))?;
    a.mov(byte_ptr(BYTE), al)?;
    a.jmp(done)?;
    a.set_label(&mut write)?;
    a.mov(al, byte_ptr(BYTE))?;
    a.mov(byte_ptr(ebx), al)?;
    a.set_label(&mut done)?;
    a.hlt()?;
    a.jmp(next)?;
    a.assemble(0)
}
