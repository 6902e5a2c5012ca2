//! Pauses vCPUs between two instructions, and hands out their registers meanwhile.
//!
//! A vCPU's thread itself reads and writes its registers: KVM makes any other thread wait until KVM_RUN
//! returns. So the thread leaves them here when it pauses, waits, and takes them back:
//!
//! ```text
//!   holder:      hold ──▶ interrupt ──▶ ... registers are here ──▶ registers, set_registers ──▶ release
//!   vCPU thread: is_wanted ──▶ KVM_RUN completes its last access ──▶ park ──▶ waits ─────────────▶ goes on
//! ```
//!
//! Holders are gdb (`vmm::gdb`) and a dump of the machine (`vmm::dump`). A vCPU goes on when none of
//! them holds it, or when the machine stops.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_SW_BP,
    kvm_debug_exit_arch, kvm_fpu, kvm_guest_debug, kvm_regs, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::errno::Error;
use vmm_sys_util::eventfd::EventFd;

/// How long [`Pause::hold`] waits. A vCPU that waits for a back-end, or for a page, is not paused then.
const PAUSE_WITHIN: Duration = Duration::from_secs(1);
/// Time between two interruptions: a signal may arrive just before the system call that it is to interrupt.
const AGAIN: Duration = Duration::from_millis(2);

/// A vCPU's registers.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Registers {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub fpu: kvm_fpu,
}

impl Registers {
    fn of(vcpu: &VcpuFd) -> Result<Registers, Error> {
        Ok(Registers { regs: vcpu.get_regs()?, sregs: vcpu.get_sregs()?, fpu: vcpu.get_fpu()? })
    }

    /// All but the system registers.
    fn apply(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        vcpu.set_regs(&self.regs)?;
        vcpu.set_fpu(&self.fpu)
    }
}

/// What keeps vCPUs from running.
#[derive(Clone, Copy, Debug)]
pub enum Holder {
    /// gdb.
    Debugger = 1,
    /// A dump that is being written.
    Dump = 2,
}

/// A vCPU met a breakpoint, a watchpoint, or the end of a single step.
#[derive(Clone, Copy, Debug)]
pub struct DebugEvent {
    /// The vCPU's id.
    pub vcpu: usize,
    /// Whether it ran for a single step.
    pub is_stepping: bool,
    /// What KVM says of it.
    pub exit: kvm_debug_exit_arch,
}

/// The vCPUs of a machine, by their ids.
#[derive(Default)]
pub struct Pause {
    /// Lock order: innermost; held for a few moves.
    state: Mutex<State>,
    changed: Condvar,
    /// Whether any vCPU is held: looked at before each entry into the guest.
    is_any_held: AtomicBool,
    /// Whether any of [`State::ports`] is there: looked at each time that a guest writes to a port.
    has_ports: AtomicBool,
    /// Signalled at a [`DebugEvent`]; `None` in a machine without a debugger, which has none.
    debugger: Option<EventFd>,
}

#[derive(Default)]
struct State {
    seats: Vec<Seat>,
    /// Where an instruction that writes to a port stands for a breakpoint.
    ports: BTreeSet<u64>,
    events: VecDeque<DebugEvent>,
}

/// A vCPU's place.
#[derive(Clone, Default)]
struct Seat {
    /// Bits of [`Holder`].
    held: u8,
    /// Its event waits for an answer.
    has_event: bool,
    /// There while it is paused, and once its thread has ended.
    registers: Option<Registers>,
    is_changed: bool,
    debug: kvm_guest_debug,
    applied: kvm_guest_debug,
}

impl Pause {
    /// For so many vCPUs. With a debugger, they are paused before their first instruction.
    pub fn new(vcpus: usize, debugger: Option<EventFd>) -> Pause {
        let held = if debugger.is_some() { Holder::Debugger as u8 } else { 0 };
        let seats = vec![Seat { held, ..Seat::default() }; vcpus];
        Pause {
            is_any_held: AtomicBool::new(held > 0),
            state: Mutex::new(State { seats, ..State::default() }),
            changed: Condvar::new(),
            has_ports: AtomicBool::new(false),
            debugger,
        }
    }

    // ------------------------------------------------------------------- for the vCPU threads

    /// Whether this vCPU is to pause. Its thread then has KVM complete the last access, and calls
    /// [`Pause::park`].
    pub fn is_wanted(&self, vcpu: usize) -> bool {
        self.is_any_held.load(Ordering::SeqCst)
            && self.lock().seats.get(vcpu).is_some_and(|seat| seat.held > 0)
    }

    /// Waits until nobody holds the vCPU, and its event, if it has one, is answered; or until the
    /// machine stops. There is no other limit: a user of gdb thinks. Then what was changed is applied.
    pub fn park(
        &self,
        vcpu: usize,
        fd: &VcpuFd,
        event: Option<kvm_debug_exit_arch>,
        stopping: &AtomicBool,
    ) -> Result<(), Error> {
        self.leave(vcpu, fd)?;
        let mut state = self.lock();
        if let (Some(exit), Some(debugger), Some(seat)) = (event, &self.debugger, state.seats.get_mut(vcpu)) {
            seat.has_event = true;
            let is_stepping = seat.applied.control & KVM_GUESTDBG_SINGLESTEP > 0;
            state.events.push_back(DebugEvent { vcpu, is_stepping, exit });
            // It fails only where the counter is at 2^64 - 2: then the debugger wakes anyway.
            let _full = debugger.write(1);
        }
        let is_held = |state: &mut State| {
            let seat = state.seats.get(vcpu);
            seat.is_some_and(|seat| seat.held > 0 || seat.has_event) && !stopping.load(Ordering::SeqCst)
        };
        let waited = self.changed.wait_while(state, is_held);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        let Some(seat) = state.seats.get_mut(vcpu).filter(|_| !stopping.load(Ordering::SeqCst)) else {
            return Ok(());
        };
        let changed = std::mem::take(&mut seat.is_changed);
        let registers = seat.registers.take().filter(|_| changed);
        let debug = (seat.debug != seat.applied).then_some(seat.debug);
        // KVM forgets these once it has carried them out.
        seat.debug.control &= !(KVM_GUESTDBG_INJECT_BP | KVM_GUESTDBG_INJECT_DB);
        seat.applied = seat.debug;
        drop(state);
        registers.map_or(Ok(()), |registers| registers.apply(fd))?;
        debug.map_or(Ok(()), |debug| fd.set_guest_debug(&debug))
    }

    /// Whether the write to a port that an instruction here makes is a breakpoint.
    pub fn is_port_breakpoint(&self, instruction: u64) -> bool {
        self.lock().ports.contains(&instruction)
    }

    /// Whether there are any.
    pub fn has_port_breakpoints(&self) -> bool {
        self.has_ports.load(Ordering::SeqCst)
    }

    /// Whether the vCPU is to stop at `int3`.
    pub fn stops_at_int3(&self, vcpu: usize) -> bool {
        let state = self.lock();
        state.seats.get(vcpu).is_some_and(|seat| seat.applied.control & KVM_GUESTDBG_USE_SW_BP > 0)
    }

    /// Leaves the vCPU's registers here: before it waits, and before its thread ends.
    pub fn leave(&self, vcpu: usize, fd: &VcpuFd) -> Result<(), Error> {
        let registers = Registers::of(fd)?;
        if let Some(seat) = self.lock().seats.get_mut(vcpu) {
            seat.registers = Some(registers);
        }
        self.changed.notify_all();
        Ok(())
    }

    // --------------------------------------------------------------------------------- for holders

    /// Holds all vCPUs; waits until they are paused, or have ended, but at most a second: then
    /// [`Pause::registers`] has none of those that still run. `interrupt` makes one of them look.
    pub fn hold(&self, holder: Holder, interrupt: impl Fn(usize)) {
        let end = Instant::now() + PAUSE_WITHIN;
        let mut state = self.lock();
        state.seats.iter_mut().for_each(|seat| seat.held |= holder as u8);
        self.is_any_held.store(true, Ordering::SeqCst);
        while Instant::now() < end {
            let running = (0..).zip(&state.seats).filter(|(_, seat)| seat.registers.is_none());
            let running: Vec<usize> = running.map(|(vcpu, _)| vcpu).collect();
            if running.is_empty() {
                return;
            }
            drop(state);
            running.into_iter().for_each(&interrupt);
            let waited = self.changed.wait_timeout(self.lock(), AGAIN);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets these vCPUs go on, as far as this holder is concerned.
    pub fn release(&self, holder: Holder, does_run: impl Fn(usize) -> bool) {
        let mut state = self.lock();
        for (vcpu, seat) in (0..).zip(&mut state.seats) {
            if does_run(vcpu) {
                seat.held &= !(holder as u8);
            }
        }
        self.is_any_held.store(state.seats.iter().any(|seat| seat.held > 0), Ordering::SeqCst);
        drop(state);
        self.wake();
    }

    /// Has waiting vCPUs look whether the machine stops.
    pub fn wake(&self) {
        // A thread that has looked, and does not wait yet, holds the lock.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> usize {
        self.lock().seats.len()
    }

    /// The registers of a vCPU that is paused, or has ended.
    pub fn registers(&self, vcpu: usize) -> Option<Registers> {
        self.lock().seats.get(vcpu)?.registers.clone()
    }

    /// Changes them, but for the system registers; false where it is not paused.
    pub fn set_registers(&self, vcpu: usize, registers: Registers) -> bool {
        let mut state = self.lock();
        let Some(seat) = state.seats.get_mut(vcpu).filter(|seat| seat.registers.is_some()) else {
            return false;
        };
        seat.registers = Some(registers);
        seat.is_changed = true;
        true
    }

    /// Sets what stops a vCPU, from the next time on that it goes on.
    pub fn set_debug(&self, vcpu: usize, debug: kvm_guest_debug) {
        if let Some(seat) = self.lock().seats.get_mut(vcpu) {
            seat.debug = debug;
        }
    }

    /// Makes the instructions at these addresses breakpoints: each writes to a port.
    pub fn set_port_breakpoints(&self, instructions: BTreeSet<u64>) {
        self.has_ports.store(!instructions.is_empty(), Ordering::SeqCst);
        self.lock().ports = instructions;
    }

    /// What can be read when there may be an event; `None` in a machine without a debugger.
    pub fn event(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the event owns its descriptor, and is borrowed for as long as the result is used.
        self.debugger.as_ref().map(|event| unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) })
    }

    /// The oldest event. Its vCPU waits until [`Pause::answer`].
    pub fn next_event(&self) -> Option<DebugEvent> {
        if let Some(event) = &self.debugger {
            // It says "look", however often it was signalled.
            let _count = event.read();
        }
        self.lock().events.front().copied()
    }

    /// Removes the oldest event, which was `event`: its vCPU goes on, unless it is held. `inject` is
    /// what it meets first: KVM_GUESTDBG_INJECT_BP or _DB for an exception of the guest's own.
    pub fn answer(&self, event: &DebugEvent, inject: u32) {
        let mut state = self.lock();
        state.events.pop_front();
        if let Some(seat) = state.seats.get_mut(event.vcpu) {
            seat.has_event = false;
            seat.debug.control |= inject;
        }
        drop(state);
        self.wake();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
