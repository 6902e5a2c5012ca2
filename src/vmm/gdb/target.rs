//! The machine as gdb sees it: each vCPU is a thread, memory is at linear addresses.
//!
//! [`gdbstub`] calls this on the thread `gdb`, while all vCPUs are paused. A vCPU that could not be paused,
//! because it waits for a back-end or a page, has no registers and no memory for gdb: an error.

use std::convert::Infallible;
use std::num::NonZero;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints as SupportsBreakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint,
    HwWatchpointOps, SwBreakpoint, SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use gdbstub_arch::x86::X86_64_SSE;
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use kvm_bindings::{KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB};
use vm_memory::{Bytes, GuestAddress};

use super::breakpoints::{Breakpoints, Kind, Watch};
use super::registers::{from_gdb, to_gdb};
use crate::kvm::pause::{DebugEvent, Holder, Registers};
use crate::kvm::vcpu::{BREAKPOINT, INT3, Machine, OUT, Vcpu};
use crate::kvm::vm::{is_emulated, reports_watchpoints};

/// The most bytes that a packet may read: `gdbstub` says `PacketSize=1000`, and the answer has two digits a
/// byte. `gdbstub` itself has no limit: it reads in parts of almost 0x1000 bytes, so the first one is
/// refused.
const MOST_READ: usize = 0x1000 / 2;

/// DR6 at the end of a single step.
const DR6_STEP: u64 = 1 << 14;

/// What a vCPU does when gdb next lets the guest run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Action {
    Run,
    Step,
}

pub(super) type Reason = MultiThreadStopReason<u64>;

/// The machine, and what gdb has asked of it.
pub(super) struct Debuggee {
    machine: Arc<Machine>,
    vcpus: Arc<Vec<Vcpu>>,
    breakpoints: Breakpoints,
    has_watchpoints: bool,
    /// By vCPU; `None` where gdb gave no action.
    actions: Vec<Option<Action>>,
    /// Whether vCPUs without an action stay paused (gdb's scheduler locking).
    is_locked: bool,
    /// The flags of KVM_SET_GUEST_DEBUG for a single step.
    step: u32,
    /// The vCPU that stopped last.
    current: usize,
}

impl Debuggee {
    pub fn new(machine: Arc<Machine>, vcpus: Arc<Vec<Vcpu>>, step: u32) -> Debuggee {
        // These read files, which the thread `gdb` may not.
        let (breakpoints, has_watchpoints) = (Breakpoints::new(is_emulated()), reports_watchpoints());
        let actions = vec![None; machine.pause.vcpus()];
        Debuggee { machine, vcpus, breakpoints, has_watchpoints, actions, is_locked: false, step, current: 0 }
    }

    /// Readable when there may be an event.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        self.machine.pause.event()
    }

    /// Pauses all vCPUs.
    pub fn stop(&self) {
        let interrupt = |vcpu| self.vcpus.get(vcpu).into_iter().for_each(Vcpu::interrupt);
        self.machine.pause.hold(Holder::Debugger, interrupt);
    }

    /// Removes all breakpoints and actions of a gdb that is gone, and lets the guest go on.
    pub fn reset(&mut self) {
        self.stop();
        for address in self.breakpoints.software.keys().copied().collect::<Vec<_>>() {
            self.remove_instruction(address);
        }
        self.breakpoints.remove_watches();
        self.clear_actions();
        self.run();
    }

    fn clear_actions(&mut self) {
        self.actions.fill(None);
        self.is_locked = false;
    }

    /// The reason after gdb's Ctrl-C.
    pub fn interrupted(&self) -> Reason {
        Reason::SignalWithThread { tid: tid(self.current), signal: Signal::SIGINT }
    }

    /// The next reason to stop, if there is one; then all vCPUs are paused. An event that is no such reason
    /// is answered: an exception of the guest's own goes to the guest.
    pub fn next_stop(&mut self) -> Option<Reason> {
        while let Some(event) = self.machine.pause.next_event() {
            match self.classify(&event) {
                Ok(reason) => {
                    self.stop();
                    self.machine.pause.answer(&event, 0);
                    self.current = event.vcpu;
                    return Some(reason);
                }
                Err(inject) => self.machine.pause.answer(&event, inject),
            }
        }
        None
    }

    /// The reason to stop, or the exception to inject (0 for none). A breakpoint that gdb has removed
    /// meanwhile is neither.
    fn classify(&self, event: &DebugEvent) -> Result<Reason, u32> {
        let tid = tid(event.vcpu);
        if event.exit.exception == BREAKPOINT {
            let Some(registers) = self.machine.pause.registers(event.vcpu) else { return Err(0) };
            let (at, mut byte) = (registers.regs.rip, [0]);
            if self.breakpoints.software.contains_key(&at) {
                return Ok(Reason::SwBreak(tid));
            }
            let is_guests = self.machine.read_linear(&registers.sregs, at, &mut byte) == 1 && byte == [INT3];
            return Err(if is_guests { KVM_GUESTDBG_INJECT_BP } else { 0 });
        }
        let is_step = event.exit.dr6 & DR6_STEP > 0;
        match self.breakpoints.triggered(event.exit.dr6) {
            Some(Watch { kind: Kind::Break, .. }) => Ok(Reason::SwBreak(tid)),
            Some(Watch { kind: Kind::HardwareBreak, .. }) => Ok(Reason::HwBreak(tid)),
            Some(Watch { kind: Kind::Watch(kind), address: addr, .. }) => {
                Ok(Reason::Watch { tid, kind, addr })
            }
            None if is_step && event.is_stepping && self.does_step(event.vcpu) => {
                Ok(Reason::SignalWithThread { tid, signal: Signal::SIGTRAP })
            }
            // The guest's own debug registers do nothing here, but it may step through a program of its own.
            None if is_step && !event.is_stepping => Err(KVM_GUESTDBG_INJECT_DB),
            None => Err(0),
        }
    }

    /// Lets vCPUs run, each by its action.
    fn run(&self) {
        let pause = &self.machine.pause;
        for vcpu in 0..self.actions.len() {
            let step = if self.does_step(vcpu) { self.step } else { 0 };
            pause.set_debug(vcpu, self.breakpoints.for_kvm(step));
        }
        let ports = self.breakpoints.software.keys().filter(|_| self.breakpoints.is_emulated);
        pause.set_port_breakpoints(ports.copied().collect());
        let stays = |vcpu: usize| self.is_locked && self.actions.get(vcpu).copied().flatten().is_none();
        pause.release(Holder::Debugger, |vcpu| !stays(vcpu));
    }

    /// The instruction that is put into RAM as a breakpoint.
    fn instruction(&self) -> u8 {
        if self.breakpoints.is_emulated { OUT } else { INT3 }
    }

    fn does_step(&self, vcpu: usize) -> bool {
        self.actions.get(vcpu) == Some(&Some(Action::Step))
    }

    fn registers(&self, tid: Tid) -> TargetResult<Registers, Self> {
        self.machine.pause.registers(vcpu(tid)).ok_or(TargetError::Errno(libc::EBUSY as u8))
    }

    /// Uses a debug register. Where none is free, a plain breakpoint moves from its register into RAM.
    fn add_watch(&mut self, watch: Watch) -> TargetResult<bool, Self> {
        if self.breakpoints.add(watch) {
            return Ok(true);
        }
        match self.breakpoints.take_plain() {
            Some(address) => {
                self.add_instruction(address)?;
                Ok(self.breakpoints.add(watch))
            }
            None => Ok(false),
        }
    }

    /// Puts a breakpoint into RAM. A mapping can have none: it is a file of another process.
    fn add_instruction(&mut self, address: u64) -> TargetResult<bool, Self> {
        let sregs = self.registers(tid(self.current))?.sregs;
        let Some(physical) = self.machine.physical(&sregs, address) else { return fault() };
        let at = GuestAddress(physical);
        let Ok(found) = self.machine.ram.read_obj(at) else { return fault() };
        // A second breakpoint in the same place must not take the first one's instruction for the guest's.
        let same = self.breakpoints.software.values().find(|(place, _)| *place == physical);
        let byte = same.map_or(found, |(_, byte)| *byte);
        self.breakpoints.software.insert(address, (physical, byte));
        Ok(self.machine.ram.write_obj(self.instruction(), at).is_ok())
    }

    /// Restores the byte that a breakpoint replaced, unless the guest has written there since.
    fn remove_instruction(&mut self, address: u64) -> bool {
        let Some((physical, byte)) = self.breakpoints.software.remove(&address) else { return false };
        let at = GuestAddress(physical);
        if self.breakpoints.software.values().any(|(place, _)| *place == physical) {
            return true;
        }
        if self.machine.ram.read_obj::<u8>(at).is_ok_and(|byte| byte == self.instruction()) {
            return self.machine.ram.write_obj(byte, at).is_ok();
        }
        true
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        if let Some(place) = self.actions.get_mut(vcpu(tid)) {
            *place = Some(action);
        }
    }
}

/// gdb counts threads from 1.
fn tid(vcpu: usize) -> Tid {
    NonZero::new(vcpu + 1).expect("invariant: it is at least 1")
}

fn vcpu(tid: Tid) -> usize {
    tid.get() - 1
}

/// Guest memory cannot be accessed there.
fn fault<T>() -> TargetResult<T, Debuggee> {
    Err(TargetError::Errno(libc::EFAULT as u8))
}

impl Target for Debuggee {
    type Arch = X86_64_SSE;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, Self::Arch, Self::Error> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Debuggee {
    fn read_registers(&mut self, regs: &mut X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        to_gdb(&self.registers(tid)?, regs);
        Ok(())
    }

    fn write_registers(&mut self, regs: &X86_64CoreRegs, tid: Tid) -> TargetResult<(), Self> {
        let mut registers = self.registers(tid)?;
        from_gdb(regs, &mut registers);
        self.machine.pause.set_registers(vcpu(tid), registers);
        Ok(())
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        if data.len() > MOST_READ {
            return Err(TargetError::Errno(libc::EINVAL as u8));
        }
        match self.machine.read_linear(&self.registers(tid)?.sregs, start, data) {
            0 if !data.is_empty() => fault(),
            len => Ok(len),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        if self.machine.write_linear(&self.registers(tid)?.sregs, start, data) { Ok(()) } else { fault() }
    }

    fn list_active_threads(&mut self, thread_is_active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.actions.len()).map(tid).for_each(thread_is_active);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl ThreadExtraInfo for Debuggee {
    fn thread_extra_info(&self, tid: Tid, buf: &mut [u8]) -> Result<usize, Infallible> {
        let waits = if self.registers(tid).is_ok() { "" } else { ", waits for a back-end or a page" };
        let text = format!("vCPU {}{waits}", vcpu(tid));
        let len = text.len().min(buf.len());
        buf[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for Debuggee {
    fn resume(&mut self) -> Result<(), Infallible> {
        self.run();
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.clear_actions();
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_action(tid, Action::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Debuggee {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl SupportsBreakpoints for Debuggee {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Debuggee {
    fn add_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        let is_there = self.breakpoints.software.contains_key(&addr);
        if is_there || self.breakpoints.add(Watch::instruction(addr, Kind::Break)) {
            Ok(true)
        } else {
            self.add_instruction(addr)
        }
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(Watch::instruction(addr, Kind::Break)) || self.remove_instruction(addr))
    }
}

impl HwBreakpoint for Debuggee {
    fn add_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_watch(Watch::instruction(addr, Kind::HardwareBreak))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.breakpoints.remove(Watch::instruction(addr, Kind::HardwareBreak)))
    }
}

impl HwWatchpoint for Debuggee {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        if !self.has_watchpoints {
            log::warn!(
                "gdb's watchpoint at {addr:#x} is refused: this KVM does not report accesses to memory"
            );
            return Ok(false);
        }
        Watch::memory(addr, len, kind).map_or(Ok(false), |watch| self.add_watch(watch))
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(Watch::memory(addr, len, kind).is_some_and(|watch| self.breakpoints.remove(watch)))
    }
}

impl MultiThreadSchedulerLocking for Debuggee {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.is_locked = true;
        Ok(())
    }
}
