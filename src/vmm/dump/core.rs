//! The head of an ELF core file of a machine: all of it but the RAM.
//!
//! The form is that of a Linux core dump (elf(5)) with the notes that QEMU's `dump-guest-memory` adds, which
//! `crash` knows. The RAM follows the head as it is in its memfd, so that an offset there gives one in the
//! file.
//!
//! ```text
//!   ELF header, program headers: the notes; kernel and other linear addresses; physical addresses
//!   notes: CORE/NT_PRSTATUS of each vCPU, QEMU/0 of each vCPU, VMCOREINFO/0
//!   RAM, from the next page on
//! ```

use kvm_bindings::{kvm_dtable, kvm_segment};

use crate::kvm::paging::Mapped;
use crate::kvm::pause::Registers;
use crate::memory::PAGE_SIZE;

/// Of elf(5).
const ELF_HEADER: [u8; 20] =
    [0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, ET_CORE, 0, EM_X86_64, 0];
const ET_CORE: u8 = 4;
const EM_X86_64: u8 = 62;
const ELF_HEADER_LEN: u64 = 64;
const PROGRAM_HEADER_LEN: u64 = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;
/// Of QEMU's and VMCOREINFO's notes.
const NT_ONLY: u32 = 0;
/// Readable, writable, executable.
const ALL_RIGHTS: u32 = 7;

/// Of `struct elf_prstatus` of x86-64: its length, where the process id is and where the registers are.
const PRSTATUS_LEN: usize = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGISTERS: usize = 112;

/// A piece of RAM: its guest physical address, its length, and where it is in the memfd.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub physical: u64,
    pub len: u64,
    pub file_offset: u64,
}

/// The head. It ends where the RAM begins, at a multiple of a page.
pub(super) fn head(vcpus: &[Registers], vmcoreinfo: &[u8], ram: &[Piece], mapped: &[Mapped]) -> Vec<u8> {
    let notes = notes(vcpus, vmcoreinfo);
    let loads = loads(ram, mapped);
    let headers = loads.len() as u64 + 1;
    let notes_at = ELF_HEADER_LEN + headers * PROGRAM_HEADER_LEN;
    let ram_at = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE);

    let mut head = ELF_HEADER.to_vec();
    put32(&mut head, [1]);
    // No entry; the program headers; no sections.
    put64(&mut head, [0, ELF_HEADER_LEN, 0]);
    put32(&mut head, [0]);
    for half in [ELF_HEADER_LEN, PROGRAM_HEADER_LEN, headers, 0, 0, 0] {
        head.extend((half as u16).to_le_bytes());
    }
    put32(&mut head, [PT_NOTE, 0]);
    put64(&mut head, [notes_at, 0, 0, notes.len() as u64, notes.len() as u64, 4]);
    for (Mapped { linear, physical, len }, file_offset) in loads {
        put32(&mut head, [PT_LOAD, ALL_RIGHTS]);
        put64(&mut head, [ram_at + file_offset, linear, physical, len, len, PAGE_SIZE]);
    }
    head.extend(notes);
    head.resize(ram_at as usize, 0);
    head
}

/// What is at which address, and where in the memfd: first at linear addresses, since readers take the first
/// one that fits, then all of RAM at its physical addresses.
fn loads(ram: &[Piece], mapped: &[Mapped]) -> Vec<(Mapped, u64)> {
    let mut loads = Vec::new();
    for page in mapped {
        for piece in ram {
            let start = page.physical.max(piece.physical);
            let end = (page.physical + page.len).min(piece.physical + piece.len);
            if start < end {
                let linear = page.linear + (start - page.physical);
                let load = Mapped { linear, physical: start, len: end - start };
                loads.push((load, piece.file_offset + (start - piece.physical)));
            }
        }
    }
    for Piece { physical, len, file_offset } in ram.iter().copied() {
        loads.push((Mapped { linear: physical, physical, len }, file_offset));
    }
    loads
}

fn notes(vcpus: &[Registers], vmcoreinfo: &[u8]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (vcpu, pid) in vcpus.iter().zip(1..) {
        note(&mut notes, b"CORE\0", NT_PRSTATUS, &prstatus(vcpu, pid));
    }
    for vcpu in vcpus {
        note(&mut notes, b"QEMU\0", NT_ONLY, &qemu_state(vcpu));
    }
    if !vmcoreinfo.is_empty() {
        note(&mut notes, b"VMCOREINFO\0", NT_ONLY, vmcoreinfo);
    }
    notes
}

fn note(notes: &mut Vec<u8>, name: &[u8], kind: u32, content: &[u8]) {
    put32(notes, [name.len() as u32, content.len() as u32, kind]);
    for part in [name, content] {
        notes.extend(part);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
}

/// `struct elf_prstatus`: a vCPU as a thread with this id.
fn prstatus(vcpu: &Registers, pid: u32) -> Vec<u8> {
    let Registers { regs, sregs, .. } = vcpu;
    let mut status = vec![0; PRSTATUS_LEN];
    status[PRSTATUS_PID..][..4].copy_from_slice(&pid.to_le_bytes());
    // In the order of `struct user_regs_struct`; after rdi the number of a system call: there is none.
    let registers = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        u64::MAX,
        regs.rip,
        sregs.cs.selector.into(),
        regs.rflags,
        regs.rsp,
        sregs.ss.selector.into(),
        sregs.fs.base,
        sregs.gs.base,
        sregs.ds.selector.into(),
        sregs.es.selector.into(),
        sregs.fs.selector.into(),
        sregs.gs.selector.into(),
    ];
    let bytes = registers.iter().flat_map(|register: &u64| register.to_le_bytes());
    status[PRSTATUS_REGISTERS..].iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
    status
}

/// QEMU's `QEMUCPUState`, version 1, without its later last field (KERNEL_GS_BASE).
fn qemu_state(vcpu: &Registers) -> Vec<u8> {
    const LEN: u32 = 432;
    let Registers { regs, sregs, .. } = vcpu;
    let mut state = Vec::new();
    put32(&mut state, [1, LEN]);
    put64(&mut state, [regs.rax, regs.rbx, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.rsp, regs.rbp]);
    put64(&mut state, [regs.r8, regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15]);
    put64(&mut state, [regs.rip, regs.rflags]);
    let segments = [sregs.cs, sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss, sregs.ldt, sregs.tr];
    for segment in &segments {
        put32(&mut state, [segment.selector.into(), segment.limit, segment_flags(segment), 0]);
        put64(&mut state, [segment.base]);
    }
    for kvm_dtable { base, limit, .. } in [sregs.gdt, sregs.idt] {
        put32(&mut state, [0, limit.into(), 0, 0]);
        put64(&mut state, [base]);
    }
    put64(&mut state, [sregs.cr0, 0, sregs.cr2, sregs.cr3, sregs.cr4]);
    state
}

/// The second word of a segment descriptor, without the address (Intel SDM, volume 3, figure 3-8).
fn segment_flags(segment: &kvm_segment) -> u32 {
    let bits = [
        (segment.type_, 8),
        (segment.s, 12),
        (segment.dpl, 13),
        (segment.present, 15),
        (segment.avl, 20),
        (segment.l, 21),
        (segment.db, 22),
        (segment.g, 23),
    ];
    bits.iter().map(|&(value, shift)| u32::from(value) << shift).sum()
}

fn put32<const N: usize>(bytes: &mut Vec<u8>, words: [u32; N]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

fn put64<const N: usize>(bytes: &mut Vec<u8>, words: [u64; N]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}
