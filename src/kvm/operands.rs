//! Which memory is read and written by the instruction at which a vCPU is.
//!
//! KVM_RUN says EFAULT when the host cannot provide a page that the guest accesses, and gives no address
//! (SHM-87). The vCPU is then still at the instruction that made the access, so its operands are the
//! candidates. Intel SDM, volume 2, decoded by `iced-x86`. Called by [`super::vcpu`].

use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, Register};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use super::paging::EFER_LMA;
use crate::memory::{Access, PAGE_SIZE};

/// The most bytes of an instruction.
pub const LONGEST: usize = 15;

/// Memory that an instruction accesses. It may be in two pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// The first linear address.
    pub linear: u64,
    /// Bytes, at least 1.
    pub len: u64,
    /// What it does there.
    pub access: Access,
}

/// The linear address of the instruction.
pub fn instruction(regs: &kvm_regs, sregs: &kvm_sregs) -> u64 {
    let linear = base(&sregs.cs, sregs).wrapping_add(regs.rip);
    if bits(sregs) == 64 { linear } else { linear & 0xffff_ffff }
}

/// The memory that the instruction in `code` accesses; last the top of the stack, where the processor would
/// save its state for an interrupt. Operands that need a vector register (a gather) are not in it.
pub fn of(regs: &kvm_regs, sregs: &kvm_sregs, code: &[u8]) -> Vec<Operand> {
    let instruction = Decoder::with_ip(bits(sregs), code, regs.rip, DecoderOptions::NONE).decode();
    let mut factory = InstructionInfoFactory::new();
    let used = factory.info(&instruction).used_memory().iter().filter_map(|used| {
        let access = match used.access() {
            OpAccess::Read | OpAccess::CondRead => Access::ReadOnly,
            OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => {
                Access::ReadWrite
            }
            OpAccess::None | OpAccess::NoMemAccess => return None,
        };
        let linear = used.virtual_address(0, |register, _, _| value(register, regs, sregs))?;
        let len = match used.memory_size().size() {
            // Not known: of a repeated string instruction the next element counts, XSAVE has up to a page.
            0 if instruction.is_string_instruction() => 8,
            0 => PAGE_SIZE,
            size => size as u64,
        };
        Some(Operand { linear, len, access })
    });
    let stack = base(&sregs.ss, sregs).wrapping_add(regs.rsp).wrapping_sub(8);
    used.chain([Operand { linear: stack, len: 8, access: Access::ReadWrite }]).collect()
}

/// The size of the code segment: 16, 32 or 64 bits.
fn bits(sregs: &kvm_sregs) -> u32 {
    match (sregs.efer & EFER_LMA != 0 && sregs.cs.l != 0, sregs.cs.db != 0) {
        (true, _) => 64,
        (false, true) => 32,
        (false, false) => 16,
    }
}

/// Where a segment starts. 64-bit code has ES, CS, SS and DS at 0, whatever was loaded before.
fn base(segment: &kvm_segment, sregs: &kvm_sregs) -> u64 {
    if bits(sregs) == 64 { 0 } else { segment.base }
}

/// A register's value; a segment register's base.
fn value(register: Register, regs: &kvm_regs, sregs: &kvm_sregs) -> Option<u64> {
    match register {
        Register::ES => return Some(base(&sregs.es, sregs)),
        Register::CS => return Some(base(&sregs.cs, sregs)),
        Register::SS => return Some(base(&sregs.ss, sregs)),
        Register::DS => return Some(base(&sregs.ds, sregs)),
        Register::FS => return Some(sregs.fs.base),
        Register::GS => return Some(sregs.gs.base),
        _ => {}
    }
    let full = match register.full_register() {
        Register::RAX => regs.rax,
        Register::RCX => regs.rcx,
        Register::RDX => regs.rdx,
        Register::RBX => regs.rbx,
        Register::RSP => regs.rsp,
        Register::RBP => regs.rbp,
        Register::RSI => regs.rsi,
        Register::RDI => regs.rdi,
        Register::R8 => regs.r8,
        Register::R9 => regs.r9,
        Register::R10 => regs.r10,
        Register::R11 => regs.r11,
        Register::R12 => regs.r12,
        Register::R13 => regs.r13,
        Register::R14 => regs.r14,
        Register::R15 => regs.r15,
        _ => return None,
    };
    Some(match register.size() {
        1 if matches!(register, Register::AH | Register::CH | Register::DH | Register::BH) => {
            full >> 8 & 0xff
        }
        size @ 1..8 => full & ((1 << (8 * size)) - 1),
        _ => full,
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::code_asm::*;

    use super::*;

    fn long_mode() -> (kvm_regs, kvm_sregs) {
        let regs = kvm_regs {
            rax: 0x1_2345_6789_abcd,
            rcx: 0x10,
            rsi: 0x5000,
            rdi: 0x6ffe,
            rsp: 0x8000,
            rip: 0x1000,
            ..Default::default()
        };
        let mut sregs = kvm_sregs { efer: 1 << 10, ..Default::default() };
        (sregs.cs.l, sregs.gs.base) = (1, 0x10_0000);
        // Left over from real mode.
        (sregs.ds.base, sregs.ss.base) = (0x4_0000, 0x4_0000);
        (regs, sregs)
    }

    /// The operands without the stack: address, length, whether written.
    fn operands(
        bits: u32,
        registers: &(kvm_regs, kvm_sregs),
        make: fn(&mut CodeAssembler),
    ) -> Vec<(u64, u64, bool)> {
        let mut code = CodeAssembler::new(bits).unwrap();
        make(&mut code);
        let bytes = code.assemble(registers.0.rip).unwrap();
        let mut operands = of(&registers.0, &registers.1, &bytes);
        let stack = operands.pop().unwrap();
        assert_eq!((stack.len, stack.access), (8, Access::ReadWrite));
        assert_eq!(stack.linear, base(&registers.1.ss, &registers.1) + 0x7ff8);
        let flat = |operand: Operand| (operand.linear, operand.len, operand.access == Access::ReadWrite);
        operands.into_iter().map(flat).collect()
    }

    #[test]
    fn operands_of_a_64_bit_program() {
        let registers = long_mode();
        let operands = |make| operands(64, &registers, make);
        assert_eq!(operands(|code| code.nop().unwrap()), []);
        assert_eq!(
            operands(|code| code.mov(rax, qword_ptr(rsi + rcx * 8 + 4)).unwrap()),
            [(0x5084, 8, false)]
        );
        assert_eq!(operands(|code| code.mov(dword_ptr(rdi), eax).unwrap()), [(0x6ffe, 4, true)]);
        assert_eq!(operands(|code| code.lock().cmpxchg(qword_ptr(rsi), rcx).unwrap()), [(0x5000, 8, true)]);
        assert_eq!(operands(|code| code.mov(al, byte_ptr(rcx).gs()).unwrap()), [(0x10_0010, 1, false)]);
        assert_eq!(operands(|code| code.vmovdqu(ymm1, ymmword_ptr(rsi)).unwrap()), [(0x5000, 32, false)]);
        assert_eq!(operands(|code| code.push(rax).unwrap()), [(0x7ff8, 8, true)]);
        let copied = operands(|code| code.rep().movsq().unwrap());
        assert!(copied.contains(&(0x5000, 8, false)) && copied.contains(&(0x6ffe, 8, true)), "{copied:x?}");
        assert_eq!(operands(|code| code.lea(rax, qword_ptr(rsi)).unwrap()), []);
        assert_eq!(instruction(&registers.0, &registers.1), 0x1000);
    }

    #[test]
    fn operands_of_real_mode() {
        let (regs, mut sregs) = long_mode();
        sregs = kvm_sregs { gs: sregs.gs, ..Default::default() };
        (sregs.ds.base, sregs.cs.base) = (0x2_0000, 0xf_0000);
        let registers = (regs, sregs);
        // The upper halves of the registers do not count.
        assert_eq!(
            operands(16, &registers, |code| code.mov(al, byte_ptr(si + 2)).unwrap()),
            [(0x2_5002, 1, false)]
        );
        assert_eq!(instruction(&registers.0, &registers.1), 0xf_1000);
    }

    #[test]
    fn what_cannot_be_decoded_has_no_operands() {
        let (regs, sregs) = long_mode();
        for code in [&[][..], &[0x0f], &[0xff; 15]] {
            assert_eq!(of(&regs, &sregs, code).len(), 1, "{code:x?}");
        }
    }
}
