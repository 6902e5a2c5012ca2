//! A vCPU's registers as gdb has them. gdb sees the segment registers' selectors, and cannot change them.

use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{kvm_fpu, kvm_regs};

use crate::kvm::pause::Registers;

/// gdb's order of the general registers.
fn general(regs: &mut kvm_regs) -> [&mut u64; 16] {
    let kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, .. } = regs;
    [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15]
}

/// Fills in gdb's registers.
pub(super) fn to_gdb(from: &Registers, to: &mut X86_64CoreRegs) {
    let Registers { mut regs, sregs, fpu } = from.clone();
    to.regs = general(&mut regs).map(|register| *register);
    (to.rip, to.eflags) = (regs.rip, regs.rflags as u32);
    let kvm = [&sregs.cs, &sregs.ss, &sregs.ds, &sregs.es, &sregs.fs, &sregs.gs];
    let gdb = &mut to.segments;
    let gdb = [&mut gdb.cs, &mut gdb.ss, &mut gdb.ds, &mut gdb.es, &mut gdb.fs, &mut gdb.gs];
    gdb.into_iter().zip(kvm).for_each(|(gdb, kvm)| *gdb = kvm.selector.into());
    for (gdb, kvm) in to.st.iter_mut().zip(&fpu.fpr) {
        gdb.copy_from_slice(&kvm[..10]);
    }
    to.fpu.fctrl = fpu.fcw.into();
    to.fpu.fstat = fpu.fsw.into();
    // The full tag word has two bits a register (3 is empty, 0 valid), the abridged one of FXSAVE has one.
    to.fpu.ftag =
        (0..8).filter(|register| fpu.ftwx >> register & 1 == 0).map(|register| 3 << (2 * register)).sum();
    to.fpu.fioff = fpu.last_ip as u32;
    to.fpu.fooff = fpu.last_dp as u32;
    to.fpu.fop = fpu.last_opcode.into();
    to.xmm = fpu.xmm.map(u128::from_le_bytes);
    to.mxcsr = fpu.mxcsr;
}

/// Takes over gdb's values.
pub(super) fn from_gdb(from: &X86_64CoreRegs, to: &mut Registers) {
    general(&mut to.regs).into_iter().zip(from.regs).for_each(|(kvm, gdb)| *kvm = gdb);
    (to.regs.rip, to.regs.rflags) = (from.rip, from.eflags.into());
    let fpu: &mut kvm_fpu = &mut to.fpu;
    for (kvm, gdb) in fpu.fpr.iter_mut().zip(&from.st) {
        kvm[..10].copy_from_slice(gdb);
    }
    fpu.fcw = from.fpu.fctrl as u16;
    fpu.fsw = from.fpu.fstat as u16;
    fpu.xmm = from.xmm.map(u128::to_le_bytes);
    fpu.mxcsr = from.mxcsr;
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_sregs;

    use super::*;

    #[test]
    fn gdb_reads_and_changes_registers() {
        let mut registers =
            Registers { regs: kvm_regs::default(), sregs: kvm_sregs::default(), fpu: kvm_fpu::default() };
        (registers.regs.rbp, registers.regs.rsp, registers.regs.rip) = (6, 7, 0xffff_ffff_8100_0000);
        (registers.sregs.cs.selector, registers.sregs.gs.selector) = (0x10, 0x2b);
        (registers.fpu.ftwx, registers.fpu.xmm[15][0]) = (0b1111_1110, 9);
        let mut gdb = X86_64CoreRegs::default();
        to_gdb(&registers, &mut gdb);
        assert_eq!((gdb.regs[6], gdb.regs[7], gdb.rip), (6, 7, 0xffff_ffff_8100_0000));
        assert_eq!((gdb.segments.cs, gdb.segments.gs, gdb.fpu.ftag, gdb.xmm[15]), (0x10, 0x2b, 3, 9));
        (gdb.regs[0], gdb.regs[15], gdb.eflags, gdb.xmm[0], gdb.segments.cs) = (1, 2, 0x202, 3, 0x33);
        from_gdb(&gdb, &mut registers);
        assert_eq!((registers.regs.rax, registers.regs.r15, registers.regs.rflags), (1, 2, 0x202));
        assert_eq!((registers.fpu.xmm[0][0], registers.fpu.xmm[15][0]), (3, 9));
        assert_eq!((registers.regs.rbp, registers.sregs.cs.selector), (6, 0x10));
    }
}
