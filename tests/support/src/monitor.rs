//! A guest of a few dozen instructions that does what the test tells it: it reads and writes its own physical
//! memory and I/O ports, and answers over the serial port. So a test is the driver, and sees what a guest
//! sees.
//!
//! It runs on any `/dev/kvm`: no SSE, 2 MiB pages. Nothing handles interrupts.
//!
//! ```text
//!   to the guest, on stdin:    operation (1 byte)  width (1 byte)  address (8 bytes)  value (8 bytes)
//!   from the guest, on stdout: value (8 bytes)
//! ```

use iced_x86::code_asm::*;

use crate::image::{self, Segment};

const LOAD: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
/// Writes that it makes at its start.
const LIST: u64 = 0x30_0000;
/// The monitor sees this much guest physical memory, one to one.
const MAPPED_GIB: u64 = 64;

const COM1: u32 = 0x3f8;
const LINE_STATUS: u32 = COM1 + 5;

/// What the monitor can do; the numbers are its wire format.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Read = 0,
    Write = 1,
    Out = 2,
    In = 3,
    Interrupts = 4,
    /// One request of a virtio queue whose rings are at the address ([`available`], [`used`]). The value is
    /// the new index of the available ring, and above its 16 bits the address of QueueNotify. The width is
    /// the number of the queue. The answer is how long the device took to use it, in ticks of the time-stamp
    /// counter.
    Request = 5,
    /// Goes through a list of 32-bit writes, as often as the value says. The list is at the address: of each
    /// write the address (8 bytes) and the value (8 bytes), then an address of 0.
    Repeat = 6,
    /// Writes a word to each of as many pages as the value says, from the address on.
    Touch = 7,
    /// Reads the first word of as many pages as the value says, from the address on. The answer is their sum.
    Sum = 8,
    /// Reads 8 bytes at the address, and after each `2^width` bytes from there on, as far as the value
    /// says. The answer is how long that took, in ticks of the time-stamp counter.
    Sweep = 9,
}

/// Where the available ring of a queue is, whose descriptor table is at `rings`.
pub const fn available(rings: u64) -> u64 {
    rings + 0x1000
}

/// Where its used ring is.
pub const fn used(rings: u64) -> u64 {
    rings + 0x2000
}

/// Where the index is in either.
const INDEX: u64 = 2;

/// The monitor as an ELF file, for `hotslot -k`.
pub fn elf() -> Vec<u8> {
    elf_after(&[])
}

/// The same. If there are writes (address, value), it makes them before all else, as one
/// [`Operation::Repeat`], and answers that.
pub fn elf_after(writes: &[(u64, u32)]) -> Vec<u8> {
    let code = code(!writes.is_empty()).expect("the monitor assembles");
    let tables = image::page_tables(TABLES, MAPPED_GIB);
    let words = writes.iter().flat_map(|&(address, value)| [address, value.into()]).chain([0]);
    let list: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
    image::elf(LOAD, &[Segment::new(LOAD, &code), Segment::new(TABLES, &tables), Segment::new(LIST, &list)])
}

fn code(has_list: bool) -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut next = a.create_label();
    let mut answer = a.create_label();
    let mut get_byte = a.create_label();
    let mut get_word = a.create_label();
    let mut put_word = a.create_label();

    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)?;
    a.mov(rsp, LOAD)?; // grows down, into RAM that is not used any more

    // r8 operation, r9 width, r10 address, r11 value
    let mut execute = a.create_label();
    if has_list {
        a.mov(r8d, Operation::Repeat as i32)?;
        a.mov(r10, LIST)?;
        a.mov(r11d, 1)?;
        a.jmp(execute)?;
    }
    a.set_label(&mut next)?;
    for register in [r8, r9] {
        a.call(get_byte)?;
        a.movzx(eax, al)?;
        a.mov(register, rax)?;
    }
    for register in [r10, r11] {
        a.call(get_word)?;
        a.mov(register, rbx)?;
    }
    a.set_label(&mut execute)?;
    a.xor(ebx, ebx)?;
    let operations = [Operation::Read, Operation::Write, Operation::Out, Operation::In];
    for operation in operations {
        let mut not_this = a.create_label();
        a.cmp(r8, operation as i32)?;
        a.jne(not_this)?;
        for width in [1, 2, 4, 8] {
            let mut not_so_wide = a.create_label();
            a.cmp(r9, width)?;
            a.jne(not_so_wide)?;
            a.mov(rdx, r10)?;
            a.mov(rax, r11)?;
            match (operation, width) {
                (Operation::Read, 1) => a.movzx(ebx, byte_ptr(rdx))?,
                (Operation::Read, 2) => a.movzx(ebx, word_ptr(rdx))?,
                (Operation::Read, 4) => a.mov(ebx, dword_ptr(rdx))?,
                (Operation::Read, _) => a.mov(rbx, qword_ptr(rdx))?,
                (Operation::Write, 1) => a.mov(byte_ptr(rdx), al)?,
                (Operation::Write, 2) => a.mov(word_ptr(rdx), ax)?,
                (Operation::Write, 4) => a.mov(dword_ptr(rdx), eax)?,
                (Operation::Write, _) => a.mov(qword_ptr(rdx), rax)?,
                (Operation::Out, 1) => a.out(dx, al)?,
                (Operation::Out, 2) => a.out(dx, ax)?,
                (Operation::Out, _) => a.out(dx, eax)?,
                (Operation::In, 1) => a.in_(al, dx)?,
                (Operation::In, 2) => a.in_(ax, dx)?,
                (Operation::In, _) => a.in_(eax, dx)?,
                (
                    Operation::Interrupts
                    | Operation::Request
                    | Operation::Repeat
                    | Operation::Touch
                    | Operation::Sum
                    | Operation::Sweep,
                    _,
                ) => {}
            }
            if matches!(operation, Operation::In) {
                a.mov(rbx, rax)?;
            }
            a.jmp(answer)?;
            a.set_label(&mut not_so_wide)?;
            a.nop()?;
        }
        a.set_label(&mut not_this)?;
        a.nop()?;
    }
    let mut no_request = a.create_label();
    let mut pending = a.create_label();
    a.cmp(r8, Operation::Request as i32)?;
    a.jne(no_request)?;
    a.mov(word_ptr(r10 + available(INDEX)), r11w)?;
    a.mov(rdi, r11)?;
    a.shr(rdi, 16)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.lea(rbx, ptr(rax + rdx))?;
    a.mov(dword_ptr(rdi), r9d)?;
    a.set_label(&mut pending)?;
    a.pause()?;
    a.cmp(word_ptr(r10 + used(INDEX)), r11w)?;
    a.jne(pending)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.add(rax, rdx)?;
    a.sub(rax, rbx)?;
    a.mov(rbx, rax)?;
    a.jmp(answer)?;
    a.set_label(&mut no_request)?;
    let mut no_repeat = a.create_label();
    let mut again = a.create_label();
    let mut each = a.create_label();
    let mut end_of_list = a.create_label();
    a.cmp(r8, Operation::Repeat as i32)?;
    a.jne(no_repeat)?;
    a.set_label(&mut again)?;
    a.mov(rsi, r10)?;
    a.set_label(&mut each)?;
    a.mov(rdx, qword_ptr(rsi))?;
    a.test(rdx, rdx)?;
    a.je(end_of_list)?;
    a.mov(eax, dword_ptr(rsi + 8))?;
    a.mov(dword_ptr(rdx), eax)?;
    a.add(rsi, 16)?;
    a.jmp(each)?;
    a.set_label(&mut end_of_list)?;
    a.dec(r11)?;
    a.jne(again)?;
    a.jmp(answer)?;
    a.set_label(&mut no_repeat)?;
    let mut no_touch = a.create_label();
    let mut touch = a.create_label();
    a.cmp(r8, Operation::Touch as i32)?;
    a.jne(no_touch)?;
    a.set_label(&mut touch)?;
    a.mov(qword_ptr(r10), r11)?;
    a.add(r10, 4096)?;
    a.dec(r11)?;
    a.jne(touch)?;
    a.jmp(answer)?;
    a.set_label(&mut no_touch)?;
    let mut no_sum = a.create_label();
    let mut page = a.create_label();
    a.cmp(r8, Operation::Sum as i32)?;
    a.jne(no_sum)?;
    a.set_label(&mut page)?;
    a.add(rbx, qword_ptr(r10))?;
    a.add(r10, 4096)?;
    a.dec(r11)?;
    a.jne(page)?;
    a.jmp(answer)?;
    a.set_label(&mut no_sum)?;
    let mut no_sweep = a.create_label();
    let mut next_word = a.create_label();
    a.cmp(r8, Operation::Sweep as i32)?;
    a.jne(no_sweep)?;
    a.add(r11, r10)?;
    a.mov(rcx, r9)?;
    a.mov(esi, 1)?;
    a.shl(rsi, cl)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.lea(rbx, ptr(rax + rdx))?;
    a.set_label(&mut next_word)?;
    a.mov(rax, qword_ptr(r10))?;
    a.add(r10, rsi)?;
    a.cmp(r10, r11)?;
    a.jb(next_word)?;
    a.rdtsc()?;
    a.shl(rdx, 32)?;
    a.add(rax, rdx)?;
    a.sub(rax, rbx)?;
    a.mov(rbx, rax)?;
    a.jmp(answer)?;
    a.set_label(&mut no_sweep)?;
    let mut disable = a.create_label();
    a.test(r11, r11)?;
    a.je(disable)?;
    a.sti()?;
    a.jmp(answer)?;
    a.set_label(&mut disable)?;
    a.cli()?;
    a.set_label(&mut answer)?;
    a.call(put_word)?;
    a.jmp(next)?;

    // al: the next byte
    a.set_label(&mut get_byte)?;
    a.mov(edx, LINE_STATUS)?;
    a.in_(al, dx)?;
    a.test(al, 1)?;
    a.je(get_byte)?;
    a.mov(edx, COM1)?;
    a.in_(al, dx)?;
    a.ret()?;

    // rbx: the next 8 bytes
    a.set_label(&mut get_word)?;
    a.mov(esi, 8)?;
    let mut more = a.create_label();
    a.set_label(&mut more)?;
    a.call(get_byte)?;
    a.movzx(eax, al)?;
    a.shl(rax, 56)?;
    a.shr(rbx, 8)?;
    a.or(rbx, rax)?;
    a.dec(esi)?;
    a.jne(more)?;
    a.ret()?;

    // sends rbx
    a.set_label(&mut put_word)?;
    a.mov(esi, 8)?;
    a.mov(edx, COM1)?;
    let mut rest = a.create_label();
    a.set_label(&mut rest)?;
    a.mov(eax, ebx)?;
    a.out(dx, al)?;
    a.shr(rbx, 8)?;
    a.dec(esi)?;
    a.jne(rest)?;
    a.ret()?;

    a.assemble(LOAD)
}
