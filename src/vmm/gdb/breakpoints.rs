//! gdb's breakpoints and watchpoints, as KVM_SET_GUEST_DEBUG takes them, and the one that stopped a vCPU.
//!
//! They are in the processor's debug registers (Intel SDM, volume 3, section 18.2); the guest's own do
//! nothing meanwhile. A plain breakpoint is in a debug register as long as one is free: there it changes no
//! memory, and works before the guest has mapped the address. Further ones are an instruction in RAM, which
//! [`super::target`] writes: `int3`, or a write to a port on an emulated processor, whose KVM sees neither
//! `int3` nor debug registers.

use std::collections::BTreeMap;

use gdbstub::target::ext::breakpoints::WatchKind;
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug};

/// DR7: bits 9 (GE) and 10 (always 1). From bit 16 on each register has 4 bits: the kind of access (R/W) and
/// the length (LEN).
const DR7: u64 = 0x600;
const DR7_CONDITIONS: usize = 16;

/// What gdb has asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `break`.
    Break,
    /// `hbreak`.
    HardwareBreak,
    /// `watch`, `awatch`.
    Watch(WatchKind),
}

/// The condition of a debug register: an instruction, or an access to `len` bytes at `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Watch {
    pub address: u64,
    len: u64,
    pub kind: Kind,
}

impl Watch {
    /// For the instruction at an address.
    pub fn instruction(address: u64, kind: Kind) -> Watch {
        Watch { address, len: 1, kind }
    }

    /// For a memory access; `None` where no debug register can have this condition.
    pub fn memory(address: u64, len: u64, kind: WatchKind) -> Option<Watch> {
        let watch = Watch { address, len, kind: Kind::Watch(kind) };
        (watch.condition().is_some() && address.is_multiple_of(len)).then_some(watch)
    }

    /// The four bits of DR7.
    fn condition(self) -> Option<u64> {
        let access = match self.kind {
            Kind::Break | Kind::HardwareBreak => 0b00,
            Kind::Watch(WatchKind::Write) => 0b01,
            Kind::Watch(WatchKind::ReadWrite) => 0b11,
            Kind::Watch(WatchKind::Read) => return None,
        };
        let len = match self.len {
            1 => 0b00,
            2 => 0b01,
            8 => 0b10,
            4 => 0b11,
            _ => return None,
        };
        Some(len << 2 | access)
    }
}

/// All breakpoints and watchpoints. They apply to each vCPU.
#[derive(Default)]
pub(super) struct Breakpoints {
    /// The breakpoints in RAM, by linear address: the guest physical address, and the byte that was there.
    pub software: BTreeMap<u64, (u64, u8)>,
    /// The debug registers 0 to 3.
    watches: [Option<Watch>; 4],
    /// On an emulated processor no debug register is used, and the instruction in RAM is `out`.
    pub is_emulated: bool,
}

impl Breakpoints {
    pub fn new(is_emulated: bool) -> Breakpoints {
        Breakpoints { is_emulated, ..Breakpoints::default() }
    }

    /// False where no debug register is free. gdb may repeat a request: a condition is there only once.
    pub fn add(&mut self, watch: Watch) -> bool {
        if self.is_emulated {
            return false;
        }
        if self.watches.contains(&Some(watch)) {
            return true;
        }
        let free = self.watches.iter_mut().find(|register| register.is_none());
        free.map(|register| *register = Some(watch)).is_some()
    }

    /// False where there is none like it.
    pub fn remove(&mut self, watch: Watch) -> bool {
        let found = self.watches.iter_mut().find(|register| **register == Some(watch));
        found.map(|register| *register = None).is_some()
    }

    /// Removes a plain breakpoint, which can be in RAM as well, and gives its address.
    pub fn take_plain(&mut self) -> Option<u64> {
        let is_plain =
            |register: &&mut Option<Watch>| register.is_some_and(|watch| watch.kind == Kind::Break);
        self.watches.iter_mut().find(is_plain)?.take().map(|watch| watch.address)
    }

    /// Removes all in debug registers.
    pub fn remove_watches(&mut self) {
        self.watches = Default::default();
    }

    /// The one that stopped a vCPU with this DR6, whose low bits stand for one register each.
    pub fn triggered(&self, dr6: u64) -> Option<Watch> {
        (0..).zip(self.watches).find_map(|(register, watch)| watch.filter(|_| dr6 >> register & 1 > 0))
    }

    /// The argument of KVM_SET_GUEST_DEBUG. `step` has the flags of a single step, or is 0.
    pub fn for_kvm(&self, step: u32) -> kvm_guest_debug {
        let mut debug = kvm_guest_debug { control: step, ..Default::default() };
        if !self.software.is_empty() && !self.is_emulated {
            debug.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        for (register, watch) in self.watches.iter().enumerate() {
            if let Some((watch, condition)) = watch.and_then(|watch| Some((watch, watch.condition()?))) {
                debug.control |= KVM_GUESTDBG_USE_HW_BP;
                debug.arch.debugreg[register] = watch.address;
                let is_global = 0b10 << (2 * register);
                debug.arch.debugreg[7] |= DR7 | is_global | condition << (DR7_CONDITIONS + 4 * register);
            }
        }
        if debug.control > 0 {
            debug.control |= KVM_GUESTDBG_ENABLE;
        }
        debug
    }
}

#[cfg(test)]
mod tests {
    use kvm_bindings::KVM_GUESTDBG_SINGLESTEP;

    use super::*;

    #[test]
    fn debug_registers_as_the_processor_has_them() {
        let mut breakpoints = Breakpoints::default();
        assert_eq!(breakpoints.for_kvm(0), kvm_guest_debug::default());
        let step = KVM_GUESTDBG_SINGLESTEP;
        assert_eq!(breakpoints.for_kvm(step).control, KVM_GUESTDBG_ENABLE | step);
        let written = Watch::memory(0x2008, 8, WatchKind::Write).unwrap();
        for watch in [
            Watch::instruction(0x1001, Kind::Break),
            written,
            Watch::memory(0x3002, 2, WatchKind::ReadWrite).unwrap(),
            Watch::memory(0x3004, 4, WatchKind::Write).unwrap(),
        ] {
            assert!(breakpoints.add(watch) && breakpoints.add(watch));
        }
        assert!(!breakpoints.add(Watch::instruction(1, Kind::HardwareBreak)), "there are four registers");
        let debug = breakpoints.for_kvm(0);
        assert_eq!(debug.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!(debug.arch.debugreg[..4], [0x1001, 0x2008, 0x3002, 0x3004]);
        assert_eq!(debug.arch.debugreg[7], 0xd790_06aa);
        assert_eq!(breakpoints.triggered(0xffff_0ff2), Some(written));
        assert!(breakpoints.remove(written) && !breakpoints.remove(written));
        assert_eq!(breakpoints.triggered(0xffff_0ff2), None);
        assert_eq!((breakpoints.take_plain(), breakpoints.take_plain()), (Some(0x1001), None));
        breakpoints.software.insert(0x1000, (0x1000, 0x90));
        breakpoints.remove_watches();
        assert_eq!(breakpoints.for_kvm(0).control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP);
    }

    #[test]
    fn what_no_debug_register_can_watch() {
        for (address, len, kind) in [
            (0x1001, 2, WatchKind::Write),
            (0x1000, 3, WatchKind::Write),
            (0x1000, 0, WatchKind::Write),
            (0x1000, 16, WatchKind::ReadWrite),
            (0x1000, 4, WatchKind::Read),
        ] {
            assert_eq!(Watch::memory(address, len, kind), None, "{address:#x} {len}");
        }
    }
}
