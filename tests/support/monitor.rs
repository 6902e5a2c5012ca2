//! A guest of a few dozen instructions that does what the test tells it: it reads and writes its own physical memory
//! and I/O ports, and answers over the serial port. So a test is the driver, and sees what a guest sees.
//!
//! The guest is an ELF file made here. It runs on any `/dev/kvm`: no SSE, 2 MiB pages. Nothing handles interrupts.
//!
//! ```text
//!   to the guest, on stdin:    operation (1 byte)  width (1 byte)  address (8 bytes)  value (8 bytes)
//!   from the guest, on stdout: value (8 bytes)
//! ```

use iced_x86::code_asm::*;

const LOAD: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
const PAGE: u64 = 0x1000;
/// The monitor sees this much guest physical memory, one to one.
const MAPPED_GIB: u64 = 64;

const COM1: u32 = 0x3f8;
const INTERRUPT_ENABLE: u32 = COM1 + 1;
const LINE_STATUS: u32 = COM1 + 5;

/// What the monitor can do; the numbers are its wire format.
#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Read = 0,
    Write = 1,
    Out = 2,
    In = 3,
    Interrupts = 4,
}

/// The monitor as an ELF file, for `hotslot -k`.
pub fn elf() -> Vec<u8> {
    let code = code().expect("the monitor assembles");
    let tables = page_tables();
    let headers = 64 + 2 * 56u64;
    let code_at = headers.next_multiple_of(PAGE);
    let tables_at = (code_at + code.len() as u64).next_multiple_of(PAGE);

    let mut file = Vec::new();
    file.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes()); // ET_EXEC, EM_X86_64
    }
    file.extend(1u32.to_le_bytes());
    for word in [LOAD, 64, 0] {
        file.extend(word.to_le_bytes()); // entry, program headers, no sections
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 2, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for (offset, address, len) in [(code_at, LOAD, code.len()), (tables_at, TABLES, tables.len())] {
        file.extend(1u32.to_le_bytes()); // PT_LOAD
        file.extend(7u32.to_le_bytes()); // read, write, execute
        for word in [offset, address, address, len as u64, len as u64, PAGE] {
            file.extend(word.to_le_bytes());
        }
    }
    file.resize(code_at as usize, 0);
    file.extend(code);
    file.resize(tables_at as usize, 0);
    file.extend(tables);
    file
}

/// One PML4, one PDPT, then a page directory for each GiB.
fn page_tables() -> Vec<u8> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let mut entries = vec![0u64; 2 * 512];
    entries[0] = (TABLES + PAGE) | PRESENT_WRITABLE;
    for gib in 0..MAPPED_GIB {
        entries[512 + gib as usize] = (TABLES + (2 + gib) * PAGE) | PRESENT_WRITABLE;
    }
    entries.extend((0..MAPPED_GIB * 512).map(|page| page << 21 | PRESENT_WRITABLE | LARGE));
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let mut next = a.create_label();
    let mut answer = a.create_label();
    let mut get_byte = a.create_label();
    let mut get_word = a.create_label();
    let mut put_word = a.create_label();

    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)?;
    a.mov(rsp, LOAD)?; // grows down, into RAM that nobody needs any more

    // "Interrupt me when there is input": only then hotslot gives the port any. Interrupts stay off in the processor.
    a.mov(edx, INTERRUPT_ENABLE)?;
    a.mov(eax, 1)?;
    a.out(dx, al)?;

    // r8 operation, r9 width, r10 address, r11 value
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
                (Operation::Interrupts, _) => {}
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
