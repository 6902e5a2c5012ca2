//! Kernels that are not Linux: entered as their PVH note says, or refused with a sentence.

use std::process::Stdio;

use hotslot_test_support::child::{finish, run};
use hotslot_test_support::image::{self, Segment};
use hotslot_test_support::{guest, kvm};
use iced_x86::code_asm::*;

const LOAD: u64 = 0x10_0000;
/// A virtual address, as the entry point of many a kernel is.
const VIRTUAL: u64 = 0xffff_ffff_8010_0000;
const DEBUG_EXIT: i32 = 0xf4;

/// 32-bit code that writes the kernel command line, then the initramfs, to the serial port, and ends with the
/// number of entries of the memory map.
fn code() -> Vec<u8> {
    let mut a = CodeAssembler::new(32).unwrap();
    let mut next = a.create_label();
    let mut initramfs = a.create_label();
    let mut more = a.create_label();
    let mut wrong = a.create_label();
    // hvm_start_info: magic at 0, modules at 12, module list at 16, command line at 24, entries of the map at
    // 48.
    a.cmp(dword_ptr(ebx), 0x336e_c578).unwrap();
    a.jne(wrong).unwrap();
    a.mov(esi, dword_ptr(ebx + 24)).unwrap();
    a.mov(edx, 0x3f8).unwrap();
    a.set_label(&mut next).unwrap();
    a.mov(al, byte_ptr(esi)).unwrap();
    a.inc(esi).unwrap();
    a.test(al, al).unwrap();
    a.je(initramfs).unwrap();
    a.out(dx, al).unwrap();
    a.jmp(next).unwrap();
    a.set_label(&mut initramfs).unwrap();
    a.cmp(dword_ptr(ebx + 12), 1).unwrap();
    a.jne(wrong).unwrap();
    a.mov(edi, dword_ptr(ebx + 16)).unwrap();
    a.mov(esi, dword_ptr(edi)).unwrap();
    a.mov(ecx, dword_ptr(edi + 8)).unwrap();
    a.set_label(&mut more).unwrap();
    a.mov(al, byte_ptr(esi)).unwrap();
    a.out(dx, al).unwrap();
    a.inc(esi).unwrap();
    a.dec(ecx).unwrap();
    a.jne(more).unwrap();
    a.mov(edx, DEBUG_EXIT).unwrap();
    a.mov(eax, dword_ptr(ebx + 48)).unwrap();
    a.out(dx, al).unwrap();
    a.set_label(&mut wrong).unwrap();
    a.hlt().unwrap();
    a.assemble(LOAD).unwrap()
}

#[test]
fn a_kernel_with_a_pvh_note_is_entered_there() {
    if !kvm::is_here() {
        return;
    }
    let note = image::note(b"Xen\0", 18, &(LOAD as u32).to_le_bytes());
    let kernel = image::kernel(&image::elf_with_notes(VIRTUAL, &[Segment::new(LOAD, &code())], &note));
    let initramfs = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(initramfs.path(), "abcd").unwrap();
    let mut command = guest::command(kernel.path());
    command.arg("--initramfs").arg(initramfs.path()).args(["--no-default-cmdline", "-c", "to the kernel\n"]);
    let hotslot = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let output = finish(hotslot);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "to the kernel\nabcd");
    assert_eq!(output.status.code(), Some(3), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_kernel_with_a_virtual_entry_point_and_no_note_is_refused() {
    let mut elf = image::elf(VIRTUAL, &[Segment::new(LOAD, &code())]);
    // p_vaddr of the first segment.
    elf[64 + 16..64 + 24].copy_from_slice(&VIRTUAL.to_le_bytes());
    let kernel = image::kernel(&elf);
    let output = run(&mut guest::command(kernel.path()));
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("0xffffffff80100000 is a virtual address, and it has no PVH note"), "{said}");
}
