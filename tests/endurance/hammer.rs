//! The guest: four processors that read and write the window, as `board` says. It runs on any `/dev/kvm`: no
//! SSE, pages of 2 MiB, nothing handles interrupts. `probe hammer` is the same for Linux.

use hotslot_guest::board::*;
use hotslot_test_support::guest::REGISTERS;
use hotslot_test_support::image::{self, Segment};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const LOAD: u64 = 0x10_0000;
const TABLES: u64 = 0x20_0000;
/// The guest sees this much guest physical memory, one to one.
const MAPPED_GIB: u64 = 64;
/// Where the first processor leaves the addresses of board and window for the others.
const ADDRESSES: u64 = 0x18_0000;
/// Where the others start: a page below 1 MiB, which is the number in the message that starts them.
const TRAMPOLINE: u64 = 0x4_0000;

/// The local APIC's registers (Intel SDM volume 3, section 11.4.1).
const APIC: u64 = 0xfee0_0000;
const APIC_ID: u64 = APIC + 0x20;
const APIC_SPURIOUS: u64 = APIC + 0xf0;
const APIC_COMMAND: u64 = APIC + 0x300;
/// To all others: INIT; STARTUP.
const INIT: u32 = 0xc_4500;
const STARTUP: u32 = 0xc_4600;

const EFER: u32 = 0xc000_0080;
const EFER_LME: u32 = 1 << 8;
const CR4_PAE: u32 = 1 << 5;
const CR0_PG_ET_PE: u32 = 1 << 31 | 1 << 4 | 1;
const DEBUG_EXIT: u32 = 0xf4;

const BOARD_DEVICE: u64 = REGISTERS + 0x1000;

/// The kernel as an ELF file.
pub fn elf() -> Vec<u8> {
    let code = code().expect("the guest assembles");
    let tables = image::page_tables(TABLES, MAPPED_GIB);
    image::elf(LOAD, &[Segment::new(LOAD, &code), Segment::new(TABLES, &tables)])
}

/// The offset of the board's word.
const fn at(word: usize) -> i32 {
    word as i32 * 8
}

fn code() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(64)?;
    let (trampoline, trampoline_target) = trampoline()?;
    let mut trampoline_label = a.create_label();
    let mut others = a.create_label();
    let mut work = a.create_label();

    a.mov(rax, TABLES)?;
    a.mov(cr3, rax)?;
    // The interrupt controllers take nothing: whatever has interrupts on gets none.
    a.mov(eax, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)?;

    start_device(&mut a, BOARD_DEVICE)?;
    region_base(&mut a, BOARD_DEVICE)?;
    a.mov(rbp, rax)?;
    let mut ready = a.create_label();
    a.set_label(&mut ready)?;
    a.cmp(qword_ptr(rbp + at(READY)), 1)?;
    a.jne(ready)?;
    start_device(&mut a, REGISTERS)?;
    region_base(&mut a, REGISTERS)?;
    a.mov(r15, rax)?;
    a.mov(rbx, ADDRESSES)?;
    a.mov(qword_ptr(rbx), rbp)?;
    a.mov(qword_ptr(rbx + 8), r15)?;

    // The others, from real mode.
    a.lea(rsi, ptr(trampoline_label))?;
    a.mov(edi, TRAMPOLINE as u32)?;
    a.mov(ecx, trampoline.len() as u32)?;
    a.cld()?;
    a.rep().movsb()?;
    a.lea(rax, ptr(others))?;
    a.mov(ebx, TRAMPOLINE as u32 + trampoline_target)?;
    a.mov(dword_ptr(rbx), eax)?;
    a.mov(rbx, APIC_SPURIOUS)?;
    a.mov(dword_ptr(rbx), 0x1ff)?;
    a.mov(rbx, APIC_COMMAND)?;
    for message in [INIT, STARTUP | (TRAMPOLINE >> 12) as u32] {
        a.mov(dword_ptr(rbx), message)?;
        a.mov(ecx, 100_000)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.dec(ecx)?;
        a.jne(wait)?;
    }
    a.jmp(work)?;

    a.set_label(&mut others)?;
    a.mov(rbx, ADDRESSES)?;
    a.mov(rbp, qword_ptr(rbx))?;
    a.mov(r15, qword_ptr(rbx + 8))?;

    // r14 number, r13 random, r12 report, rbp board, r15 window
    a.set_label(&mut work)?;
    a.mov(rbx, APIC_ID)?;
    a.mov(r14d, dword_ptr(rbx))?;
    a.shr(r14d, 24)?;
    a.mov(r12, r14)?;
    a.shl(r12, 7)?;
    a.lea(r12, qword_ptr(rbp + r12 * 1 + at(report(0))))?;
    a.lea(r13, qword_ptr(r14 + 1))?;
    let mut next = a.create_label();
    a.cmp(qword_ptr(rbp + at(INTERRUPTS)), 0)?;
    a.je(next)?;
    a.sti()?;

    a.set_label(&mut next)?;
    a.inc(qword_ptr(r12 + at(ACCESSES)))?;
    a.mov(rax, MULTIPLIER)?;
    a.imul_2(r13, rax)?;
    a.mov(rax, INCREMENT)?;
    a.add(r13, rax)?;
    // rsi index, rdi place, r9 address, r8 its state before, r10 what is written
    a.mov(rsi, r13)?;
    a.shr(rsi, INDEX_SHIFT as i32)?;
    a.mov(rax, WRITE_BITS)?;
    let mut read_only = a.create_label();
    a.xor(r10d, r10d)?;
    a.test(r13, rax)?;
    a.jne(read_only)?;
    a.and(rsi, !(CPUS as i32 - 1))?;
    a.or(rsi, r14)?;
    a.mov(r10, qword_ptr(r12 + at(WRITES)))?;
    a.inc(r10)?;
    a.mov(qword_ptr(r12 + at(WRITES)), r10)?;
    a.and(r10d, COUNT_MASK as i32)?;
    a.shl(r10, 32)?;
    a.lea(rax, qword_ptr(r14 + 1))?;
    a.shl(rax, 24)?;
    a.or(r10, rax)?;
    a.mov(rax, TAG << 56)?;
    a.or(r10, rax)?;
    a.or(r10, rsi)?;
    a.set_label(&mut read_only)?;
    a.mov(rdi, rsi)?;
    a.shr(rdi, PLACE_WORDS.ilog2() as i32)?;
    a.lea(rdi, qword_ptr(rbp + rdi * 8 + at(STATES)))?;
    a.lea(r9, qword_ptr(r15 + rsi * 8))?;
    let mut read = a.create_label();
    a.mov(r8, qword_ptr(rdi))?;
    a.test(r10, r10)?;
    a.je(read)?;
    a.mov(qword_ptr(r9), r10)?;
    a.set_label(&mut read)?;
    a.mov(rax, qword_ptr(r9))?;
    judge(&mut a)?;

    // The first processor's other duties.
    a.test(r14, r14)?;
    a.jne(next)?;
    let mut go_on = a.create_label();
    a.cmp(qword_ptr(rbp + at(STOP)), 0)?;
    a.je(go_on)?;
    a.mov(edx, DEBUG_EXIT)?;
    a.mov(eax, u32::from(GOOD_END))?;
    a.out(dx, al)?;
    a.set_label(&mut go_on)?;
    a.mov(r11, qword_ptr(rbp + at(RESET_WANTED)))?;
    a.cmp(r11, qword_ptr(rbp + at(RESET_DONE)))?;
    a.je(next)?;
    reset(&mut a)?;
    a.jmp(next)?;

    a.set_label(&mut trampoline_label)?;
    a.db(&trampoline)?;
    a.assemble(LOAD)
}

/// Looks at what was read (rax), and at the place's state now.
fn judge(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let [mut right, mut wrong, mut hole, mut backend, mut zero] = std::array::from_fn(|_| a.create_label());
    let mut mapped = a.create_label();
    a.mov(r11, qword_ptr(rdi))?;
    a.cmp(rax, -1)?;
    a.je(hole)?;
    a.test(rax, rax)?;
    a.je(zero)?;
    // At any time: tag and index, and a writer who may write here.
    a.mov(rcx, 0xff00_0000_00ff_ffff_u64)?;
    a.and(rcx, rax)?;
    a.mov(rdx, TAG << 56)?;
    a.or(rdx, rsi)?;
    a.cmp(rcx, rdx)?;
    a.jne(wrong)?;
    a.mov(ecx, eax)?;
    a.shr(ecx, 24)?;
    a.je(mapped)?;
    a.mov(edx, esi)?;
    a.and(edx, CPUS as i32 - 1)?;
    a.inc(edx)?;
    a.cmp(ecx, edx)?;
    a.jne(wrong)?;
    // ecx: the writer. While the state stayed the same: it has to be mapped here,
    a.set_label(&mut mapped)?;
    a.cmp(r8, r11)?;
    a.jne(right)?;
    a.movzx(edx, r8b)?;
    a.cmp(edx, CHANGING as i32)?;
    a.je(right)?;
    a.cmp(edx, MAY_BE_CUT as i32)?;
    a.je(right)?;
    a.cmp(edx, UNMAPPED as i32)?;
    a.je(wrong)?;
    page_and_length(a)?;
    a.cmp(ebx, r11d)?;
    a.jae(wrong)?;
    // with the generation's words where nobody wrote, and what was just written where that is possible.
    a.test(ecx, ecx)?;
    a.je(backend)?;
    a.cmp(edx, READ_WRITE as i32)?;
    a.jne(wrong)?;
    a.test(r10, r10)?;
    a.je(right)?;
    a.cmp(rax, r10)?;
    a.je(right)?;
    a.jmp(wrong)?;
    a.set_label(&mut backend)?;
    let mut generation = a.create_label();
    a.test(r10, r10)?;
    a.je(generation)?;
    a.cmp(edx, READ_WRITE as i32)?;
    a.je(wrong)?;
    a.set_label(&mut generation)?;
    a.mov(rbx, rax)?;
    a.xor(rbx, r8)?;
    a.shr(rbx, 32)?;
    a.test(ebx, COUNT_MASK as i32)?;
    a.jne(wrong)?;
    a.jmp(right)?;

    a.set_label(&mut hole)?;
    a.cmp(r8, r11)?;
    a.jne(right)?;
    a.movzx(edx, r8b)?;
    a.cmp(edx, UNMAPPED as i32)?;
    a.jbe(right)?;
    page_and_length(a)?;
    a.cmp(ebx, r11d)?;
    a.jae(right)?;
    a.jmp(wrong)?;

    a.set_label(&mut zero)?;
    a.inc(qword_ptr(r12 + at(ZEROES)))?;
    a.cmp(r8b, MAY_BE_CUT as i32)?;
    a.je(right)?;

    a.set_label(&mut wrong)?;
    for (word, register) in [(0, rsi), (1, rax), (2, r8), (3, r10)] {
        a.mov(qword_ptr(r12 + at(WRONG + word)), register)?;
    }
    a.inc(qword_ptr(r12 + at(ERRORS)))?;
    a.set_label(&mut right)?;
    a.nop()
}

/// ebx: the page of the place that the index (esi) is in; r11d: the mapping's length in pages (of the state,
/// r8).
fn page_and_length(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ebx, esi)?;
    a.shr(ebx, PAGE_WORDS.ilog2() as i32)?;
    a.and(ebx, 7)?;
    a.mov(r11d, r8d)?;
    a.shr(r11d, 8)?;
    a.and(r11d, 0xff)
}

/// Resets the device by the number in r11.
fn reset(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(qword_ptr(rbp + at(RESET_PENDING)), r11)?;
    let mut agreed = a.create_label();
    a.set_label(&mut agreed)?;
    a.pause()?;
    a.cmp(qword_ptr(rbp + at(RESET_AGREED)), r11)?;
    a.jne(agreed)?;
    a.mov(rbx, REGISTERS)?;
    a.mov(dword_ptr(rbx + STATUS), 0)?;
    // Nothing is left when the write has completed.
    a.xor(esi, esi)?;
    let (mut place, mut gone) = (a.create_label(), a.create_label());
    a.set_label(&mut place)?;
    a.mov(rax, qword_ptr(r15 + rsi * 8))?;
    a.cmp(rax, -1)?;
    a.je(gone)?;
    a.mov(qword_ptr(r12 + at(WRONG)), rsi)?;
    a.mov(qword_ptr(r12 + at(WRONG + 1)), rax)?;
    a.inc(qword_ptr(r12 + at(ERRORS)))?;
    a.set_label(&mut gone)?;
    a.add(rsi, PLACE_WORDS as i32)?;
    a.cmp(rsi, WINDOW_WORDS as i32)?;
    a.jne(place)?;
    start_device(a, REGISTERS)?;
    a.mov(qword_ptr(rbp + at(RESET_DONE)), r11)
}

/// Takes a device from reset to DRIVER_OK.
fn start_device(a: &mut CodeAssembler, registers: u64) -> Result<(), IcedError> {
    a.mov(rbx, registers)?;
    START.iter().try_for_each(|&(register, value)| a.mov(dword_ptr(rbx + register), value))
}

/// rax: where the device's region 0 starts.
fn region_base(a: &mut CodeAssembler, registers: u64) -> Result<(), IcedError> {
    a.mov(rbx, registers)?;
    a.mov(dword_ptr(rbx + SHM_SEL), 0)?;
    a.mov(eax, dword_ptr(rbx + SHM_BASE))?;
    a.mov(ecx, dword_ptr(rbx + SHM_BASE + 4))?;
    a.shl(rcx, 32)?;
    a.or(rax, rcx)
}

/// From real mode to long mode at once. Gives the code, and the offset of the address at which it goes on.
fn trampoline() -> Result<(Vec<u8>, u32), IcedError> {
    /// Where in it the segments' table is, and then what LGDT takes: size and address of that.
    const TABLE: u32 = 0x80;
    let table = [0, 0x00af_9b00_0000_ffff_u64];
    let mut a = CodeAssembler::new(16)?;
    a.cli()?;
    a.mov(ax, cs)?;
    a.mov(ds, ax)?;
    a.lgdt(ptr(TABLE + size_of_val(&table) as u32))?;
    a.mov(eax, CR4_PAE)?;
    a.mov(cr4, eax)?;
    a.mov(eax, TABLES as u32)?;
    a.mov(cr3, eax)?;
    a.mov(ecx, EFER)?;
    a.rdmsr()?;
    a.or(eax, EFER_LME as i32)?;
    a.wrmsr()?;
    a.mov(eax, CR0_PG_ET_PE)?;
    a.mov(cr0, eax)?;
    // A far jump to the table's second segment, with an offset of 32 bits that is to be filled in.
    a.db(&[0x66, 0xea, 0, 0, 0, 0, 8, 0])?;
    let mut bytes = a.assemble(0)?;
    let target = bytes.len() as u32 - 6;
    bytes.resize(TABLE as usize, 0);
    bytes.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
    bytes.extend((size_of_val(&table) as u16 - 1).to_le_bytes());
    bytes.extend((TRAMPOLINE as u32 + TABLE).to_le_bytes());
    Ok((bytes, target))
}
