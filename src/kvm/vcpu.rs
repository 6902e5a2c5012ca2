//! One virtual processor: its thread, its exits, and how to interrupt it.
//!
//! ```text
//!   spawn ──▶ apply the state ──▶ KVM_RUN ──▶ an access ──▶ bus ──┬──▶ again
//!                                    │  ▲                         └──▶ Exit (power-off, reset, ...)
//!                                    │  └── interrupted: stopping? ──no; yes ──▶ the thread ends
//!                                    ├── EFAULT: MissingPages provides the page, or the vCPU waits
//!                                    └── triple fault, internal error, failed entry ──▶ Exit::Crash
//! ```

use std::cell::Cell;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, Msrs, kvm_debug_exit_arch, kvm_fpu, kvm_regs, kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

use super::counters::{VcpuCounters, Wait};
use super::pause::Pause;
use super::stats::KvmStatistics;
use super::vm::{KvmError, Processor, failed_to};
use super::{operands, paging};
use crate::bus::Bus;
use crate::counters;
use crate::exit::Exit;
use crate::memory::missing::{Met, MissingPages};
use crate::memory::{Access, PAGE_SIZE};
use crate::sandbox::vmm::Kind;
use crate::thread;

/// The registers with which the first processor starts. The others wait for the guest's INIT and SIPI.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BootRegisters {
    pub regs: kvm_regs,
    pub sregs: kvm_sregs,
    pub fpu: kvm_fpu,
}

/// A processor's state before it runs: data, which its own thread applies.
#[derive(Clone, Debug)]
pub struct VcpuState {
    /// Its CPUID.
    pub cpuid: CpuId,
    /// Model-specific registers that do not start at their reset value.
    pub msrs: Msrs,
    /// `None` for a processor that another one starts.
    pub boot: Option<BootRegisters>,
}

/// The most EFAULTs in a row for which no page is found unavailable. One such failure proves nothing: the
/// page may be there by now, the mapping may be gone, or the file may have grown again. A back-end that
/// truncates and extends a file all the time causes one with a probability below 1/4 each time.
const MAX_UNEXPLAINED_EFAULTS: u32 = 100;

/// How long a vCPU pauses before it tries again an access to a page that the host cannot provide. Between two
/// tries it serves interrupts, since another vCPU may wait for that; but not in [`Machine::carry_out`].
const RETRY: Duration = Duration::from_millis(10);

/// The exception that `int3` causes, #BP, and that instruction (Intel SDM, volume 3, section 6.15).
pub const BREAKPOINT: u32 = 3;
/// See [`BREAKPOINT`].
pub const INT3: u8 = 0xcc;
/// `out dx, al`: see [`Pause::set_port_breakpoints`].
pub const OUT: u8 = 0xee;

counters! {
    /// Accesses that no device claimed: reads gave all-ones, writes were dropped.
    UnclaimedCounters {
        /// Reads from memory addresses without RAM, mapping or device.
        mmio_reads,
        /// Writes to them, and to read-only mappings.
        mmio_writes,
        /// Accesses to I/O ports without a device. A kernel that looks for hardware makes many.
        ports,
    }
}

/// The state that the processors of one machine share.
#[derive(Default)]
pub struct Machine {
    /// The devices at I/O ports.
    pub ports: Bus,
    /// The devices at memory addresses.
    pub mmio: Bus,
    /// RAM, in which most instructions are.
    pub ram: GuestMemoryMmap,
    /// Asked about every EFAULT, and every access that no device claims.
    pub missing_pages: Arc<MissingPages>,
    /// Accesses without a device.
    pub unclaimed: UnclaimedCounters,
    /// Set before the processors are interrupted for the last time; then none goes back to the guest.
    pub stopping: Arc<AtomicBool>,
    /// Where they pause, and leave their registers.
    pub pause: Pause,
}

/// A processor's thread.
pub struct Vcpu {
    thread: JoinHandle<()>,
    /// Whether it waits for a page of a mapping.
    is_waiting: Arc<AtomicBool>,
    statistics: Option<Arc<KvmStatistics>>,
}

impl Vcpu {
    /// Starts the thread of a processor. It calls `ended` once, last: `None` if it was told to stop.
    pub fn spawn(
        processor: Processor,
        state: VcpuState,
        machine: Arc<Machine>,
        ended: impl FnOnce(Result<Option<Exit>, KvmError>) + Send + 'static,
    ) -> io::Result<Vcpu> {
        register_signal_handler(SIGRTMIN(), on_interrupt)?;
        let id = processor.id;
        let statistics = processor.statistics.clone();
        let is_waiting = Arc::new(AtomicBool::new(false));
        let mut runner = Runner {
            processor,
            machine,
            unexplained_efaults: 0,
            changes_seen: 0,
            awaited: None,
            is_waiting: Arc::clone(&is_waiting),
            page_wait: Wait::default(),
            hole_wait: Wait::default(),
        };
        let kind = if runner.machine.pause.event().is_some() { Kind::DebuggedVcpu } else { Kind::Vcpu };
        let thread = thread::spawn(format!("vcpu{id}"), kind, move || ended(runner.run(&state)))?;
        Ok(Vcpu { thread, is_waiting, statistics })
    }

    /// Makes the processor look soon at [`Machine::stopping`], and whether the pages are there that its
    /// instruction needs: a KVM_RUN that runs or starts returns, a system call in a handler fails with EINTR.
    /// The signal may arrive just before that system call, so a caller that stops the machine repeats this
    /// until the processor [`Vcpu::has_ended`].
    pub fn interrupt(&self) {
        if !self.has_ended() {
            let _ended_meanwhile = self.thread.kill(SIGRTMIN());
        }
    }

    /// How many of the guest's page faults KVM did not resolve so far, where it can tell.
    pub fn unresolved_faults(&self) -> Option<u64> {
        self.statistics.as_ref()?.unresolved_faults()
    }

    /// Whether it waits, as far as is known, for a page of a mapping.
    pub fn is_waiting(&self) -> bool {
        self.is_waiting.load(Ordering::Relaxed)
    }

    /// Whether the thread has ended. Nobody waits for one without a time limit: it may be stuck in KVM.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Machine {
    /// A read that KVM passed on: of a device, of a hole, or of a missing page of a mapping. A missing page
    /// causes this exit on a software KVM always, on any KVM when it must emulate the instruction (SHM-45).
    fn mmio_read(&self, vcpu: u32, counters: &VcpuCounters, address: u64, data: &mut [u8]) -> Option<Exit> {
        if self.mmio.read(address, data) {
            return None;
        }
        let read = || self.missing_pages.read(address, data);
        let met = self.carry_out(counters, address, Access::ReadOnly, read);
        if met == Met::Nothing {
            self.unclaimed.mmio_reads.count();
            log::debug!("vCPU {vcpu}: nothing to read at {address:#x}");
        }
        self.end_at(met)
    }

    /// The same of a write, also of one to a read-only mapping.
    fn mmio_write(&self, vcpu: u32, counters: &VcpuCounters, address: u64, data: &[u8]) -> Option<Exit> {
        if let Ok(exit) = self.mmio.write(address, data) {
            return exit;
        }
        let write = || self.missing_pages.write(address, data);
        let met = self.carry_out(counters, address, Access::ReadWrite, write);
        if met == Met::Nothing {
            self.unclaimed.mmio_writes.count();
            log::debug!("vCPU {vcpu}: nothing to write at {address:#x}");
        }
        self.end_at(met)
    }

    /// Carries out an access that KVM passed on; again while the host cannot provide its page, or while a
    /// back-end that died may come back and map one. The guest is not entered meanwhile: KVM needs the result
    /// first.
    fn carry_out(
        &self,
        counters: &VcpuCounters,
        address: u64,
        access: Access,
        mut action: impl FnMut() -> Met,
    ) -> Met {
        let VcpuCounters { page_waits, longest_page_wait_us, hole_waits, longest_hole_wait_us, .. } =
            counters;
        let (mut page_wait, mut hole_wait) = (Wait::default(), Wait::default());
        loop {
            let mut met = action();
            match met {
                // SHM-77: as soon as nothing is expected any more, it meets something else.
                Met::Expected if !self.stopping.load(Ordering::SeqCst) => {
                    hole_wait.goes_on(hole_waits, longest_hole_wait_us);
                    std::thread::sleep(RETRY);
                    continue;
                }
                Met::Unavailable(_) if !self.missing_pages.end_the_machine => {}
                met => return met,
            }
            while let Met::Unavailable(_) = met {
                if self.stopping.load(Ordering::SeqCst) {
                    return met;
                }
                page_wait.goes_on(page_waits, longest_page_wait_us);
                std::thread::sleep(RETRY);
                met = self.missing_pages.provide(address, access);
            }
        }
    }

    /// Reads guest physical memory as it is. False where some of it is missing.
    pub fn peek(&self, address: u64, data: &mut [u8]) -> bool {
        self.ram.read_slice(data, GuestAddress(address)).is_ok() || self.missing_pages.peek(address, data)
    }

    /// The guest physical address of a linear one, on a processor with these registers.
    pub fn physical(&self, sregs: &kvm_sregs, linear: u64) -> Option<u64> {
        paging::physical(sregs, linear, |address, data| self.peek(address, data))
    }

    /// Reads memory at a linear address; how much of it is there.
    pub fn read_linear(&self, sregs: &kvm_sregs, linear: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for (linear, len) in pages(linear, data.len() as u64) {
            let part = &mut data[done..done + len as usize];
            if !self.physical(sregs, linear).is_some_and(|address| self.peek(address, part)) {
                break;
            }
            done += part.len();
        }
        done
    }

    /// Writes RAM at a linear address. False where some of it is no RAM: the part before that is written.
    pub fn write_linear(&self, sregs: &kvm_sregs, linear: u64, mut data: &[u8]) -> bool {
        pages(linear, data.len() as u64).all(|(linear, len)| {
            let (part, rest) = data.split_at(len as usize);
            data = rest;
            let address = self.physical(sregs, linear).map(GuestAddress);
            address.is_some_and(|address| self.ram.write_slice(part, address).is_ok())
        })
    }

    /// How the machine ends because of what an access met.
    fn end_at(&self, met: Met) -> Option<Exit> {
        match met {
            Met::Unavailable(why) if self.missing_pages.end_the_machine => Some(Exit::PageUnavailable(why)),
            _ => None,
        }
    }
}

/// The parts of a range that are each in one page: address and length.
fn pages(start: u64, len: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut rest = len;
    let next = move || {
        let at = start.wrapping_add(len - rest);
        let part = rest.min(PAGE_SIZE - at % PAGE_SIZE);
        rest -= part;
        (part > 0).then_some((at, part))
    };
    std::iter::from_fn(next)
}

struct Runner {
    processor: Processor,
    machine: Arc<Machine>,
    unexplained_efaults: u32,
    /// The sum of [`MissingPages::changes`] over the accesses of the last EFAULT.
    changes_seen: u64,
    /// The access to a page that the host could not provide.
    awaited: Option<(u64, Access)>,
    is_waiting: Arc<AtomicBool>,
    page_wait: Wait,
    hole_wait: Wait,
}

impl Runner {
    fn run(&mut self, state: &VcpuState) -> Result<Option<Exit>, KvmError> {
        self.apply(state)?;
        let result = self.run_guest();
        // For a dump, which must not change how the machine ends.
        if let Err(error) = self.machine.pause.leave(self.index(), &self.processor.fd) {
            log::debug!("vCPU {}: its registers cannot be read: {error}", self.processor.id);
        }
        result
    }

    fn run_guest(&mut self) -> Result<Option<Exit>, KvmError> {
        let _interruptible = Interruptible::new(&mut self.processor.fd).map_err(|error| {
            KvmError::Ioctl(format!("let a signal interrupt vCPU {}", self.processor.id), error)
        })?;
        loop {
            // In this order: an interrupt after the first line sets the flag again, one before it is seen in
            // the second.
            self.processor.fd.set_kvm_immediate_exit(0);
            if self.machine.stopping.load(Ordering::SeqCst) {
                // For a user who ends a guest that hangs.
                log::debug!("vCPU {} stops here:\n{}", self.processor.id, Registers(&self.processor.fd));
                return Ok(None);
            }
            if self.machine.pause.is_wanted(self.index()) {
                // KVM_RUN only completes the access that KVM passed on last: then the registers are right.
                self.processor.fd.set_kvm_immediate_exit(1);
            }
            if let Some(exit) = self.enter()? {
                return Ok(Some(exit));
            }
        }
    }

    /// Its place in [`Machine::pause`].
    fn index(&self) -> usize {
        self.processor.id as usize
    }

    /// Waits as long as a debugger or a dump holds the vCPU.
    fn park(&self, event: Option<kvm_debug_exit_arch>) -> Result<Option<Exit>, KvmError> {
        let Machine { pause, stopping, .. } = &*self.machine;
        pause
            .park(self.index(), &self.processor.fd, event, stopping)
            .map_err(failed_to(format!("pause vCPU {}", self.processor.id)))?;
        Ok(None)
    }

    fn apply(&self, state: &VcpuState) -> Result<(), KvmError> {
        let vcpu = self.processor.id;
        let fails = |what| failed_to(format!("set {what} of vCPU {vcpu}"));
        self.processor.fd.set_cpuid2(&state.cpuid).map_err(fails("CPUID"))?;
        let set = self.processor.fd.set_msrs(&state.msrs).map_err(fails("MSRs"))?;
        if let Some(refused) = state.msrs.as_slice().get(set) {
            // The guest then sees the reset value. Software KVMs know few of these registers.
            log::debug!("vCPU {vcpu}: KVM refuses MSR {:#x} = {:#x}", refused.index, refused.data);
        }
        if let Some(boot) = &state.boot {
            self.processor.fd.set_sregs(&boot.sregs).map_err(fails("system registers"))?;
            self.processor.fd.set_regs(&boot.regs).map_err(fails("registers"))?;
            self.processor.fd.set_fpu(&boot.fpu).map_err(fails("floating point registers"))?;
        }
        Ok(())
    }

    /// Lets the guest run until its next exit, and handles that. `None` to go on.
    fn enter(&mut self) -> Result<Option<Exit>, KvmError> {
        let (vcpu, machine) = (self.processor.id, &self.machine);
        let exit = self.processor.fd.run();
        let counters = &*self.processor.counters;
        counters.exit(&exit);
        if exit.is_ok() {
            self.unexplained_efaults = 0;
        }
        if !matches!(exit, Ok(VcpuExit::InternalError)) {
            self.hole_wait.ends();
        }
        match exit {
            Ok(VcpuExit::MmioRead(address, data)) => Ok(machine.mmio_read(vcpu, counters, address, data)),
            Ok(VcpuExit::MmioWrite(address, data)) => Ok(machine.mmio_write(vcpu, counters, address, data)),
            Ok(VcpuExit::IoIn(port, data)) => {
                let data: *mut [u8] = data;
                let width = self.port_width();
                // SAFETY: the bytes are in the vCPU's shared pages, behind `kvm_run` itself; only this thread
                // uses them until the next KVM_RUN.
                self.port_in(port, width, unsafe { &mut *data });
                Ok(None)
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data: *const [u8] = data;
                if let Some(breakpoint) = self.port_breakpoint() {
                    return self.stop_at_port(&breakpoint);
                }
                let width = self.port_width();
                // SAFETY: as above: pages of the vCPU, which only this thread uses until the next KVM_RUN.
                Ok(self.port_out(port, width, unsafe { &*data }))
            }
            Ok(VcpuExit::Debug(event)) => self.park(Some(event)),
            Ok(VcpuExit::Intr) => self.interrupted(),
            Ok(VcpuExit::MemoryFault { gpa, .. }) => Ok(self.fault(Some(gpa))),
            Ok(VcpuExit::Shutdown) => Ok(Some(self.crash(format!("triple fault on vCPU {vcpu}")))),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                Ok(Some(self.crash(format!("vCPU {vcpu} cannot be entered, hardware reason {reason:#x}"))))
            }
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => {
                let what = format!("go on with vCPU {vcpu} after the exit {other:?}");
                Err(KvmError::Ioctl(what, io::ErrorKind::Unsupported.into()))
            }
            Err(error) => match error.errno() {
                libc::EINTR => self.interrupted(),
                // A processor that waits for its start was woken up.
                libc::EAGAIN => Ok(None),
                libc::EFAULT => Ok(self.fault(None)),
                _ => Err(failed_to(format!("run vCPU {vcpu}"))(error)),
            },
        }
    }

    /// KVM could not emulate an instruction, or had another error of its own.
    fn internal_error(&mut self) -> Result<Option<Exit>, KvmError> {
        let machine = &self.machine;
        // SAFETY: with KVM_EXIT_INTERNAL_ERROR this is the union's field; it consists of numbers.
        let suberror = unsafe { self.processor.fd.get_kvm_run().__bindgen_anon_1.internal }.suberror;
        let is_emulation = suberror == KVM_INTERNAL_ERROR_EMULATION;
        if is_emulation && machine.pause.stops_at_int3(self.index()) && is_int3(&mut self.processor.fd) {
            let event = kvm_debug_exit_arch { exception: BREAKPOINT, ..Default::default() };
            return self.park(Some(event));
        }
        if is_emulation && machine.missing_pages.are_expected() {
            // SHM-77: an access to a hole, by an instruction that KVM's emulator lacks. It needs none once
            // there is a mapping.
            let VcpuCounters { hole_waits, longest_hole_wait_us, .. } = &*self.processor.counters;
            self.hole_wait.goes_on(hole_waits, longest_hole_wait_us);
            std::thread::sleep(RETRY);
            return Ok(None);
        }
        Ok(Some(self.crash(format!("KVM internal error {suberror} on vCPU {}", self.processor.id))))
    }

    /// The registers, where a write to a port is a breakpoint.
    fn port_breakpoint(&self) -> Option<kvm_regs> {
        let pause = &self.machine.pause;
        let regs = pause.has_port_breakpoints().then(|| self.processor.fd.get_regs().ok())??;
        pause.is_port_breakpoint(regs.rip).then_some(regs)
    }

    /// Stops before the instruction, as at an `int3`. KVM completes the write first, and steps over it.
    fn stop_at_port(&mut self, before: &kvm_regs) -> Result<Option<Exit>, KvmError> {
        self.processor.fd.set_kvm_immediate_exit(1);
        let _interrupted = self.processor.fd.run();
        let vcpu = self.processor.id;
        self.processor.fd.set_regs(before).map_err(failed_to(format!("set registers of vCPU {vcpu}")))?;
        self.park(Some(kvm_debug_exit_arch { exception: BREAKPOINT, ..Default::default() }))
    }

    /// The width of the port access that KVM_RUN returned with: 1, 2 or 4 bytes.
    fn port_width(&mut self) -> usize {
        // SAFETY: with KVM_EXIT_IO this is the union's field; it consists of numbers.
        usize::from(unsafe { self.processor.fd.get_kvm_run().__bindgen_anon_1.io }.size.max(1))
    }

    /// One `in`, or as many as a string instruction made in a row.
    fn port_in(&self, port: u16, width: usize, data: &mut [u8]) {
        for item in data.chunks_mut(width) {
            if !self.machine.ports.read(port.into(), item) {
                self.machine.unclaimed.ports.count();
            }
        }
    }

    /// One `out`, or as many as a string instruction made in a row.
    fn port_out(&self, port: u16, width: usize, data: &[u8]) -> Option<Exit> {
        data.chunks(width).find_map(|item| {
            self.machine.ports.write(port.into(), item).unwrap_or_else(|_| {
                self.machine.unclaimed.ports.count();
                None
            })
        })
    }

    /// [`Vcpu::interrupt`] made KVM_RUN return: the machine stops, a debugger or a dump makes it pause, or
    /// the thread `stuck` saw this vCPU wait or take many page faults.
    fn interrupted(&mut self) -> Result<Option<Exit>, KvmError> {
        if self.machine.stopping.load(Ordering::SeqCst) {
            return Ok(None);
        }
        if self.machine.pause.is_wanted(self.index()) {
            return self.park(None);
        }
        if let Some((address, access)) = self.awaited
            && !matches!(self.machine.missing_pages.provide(address, access), Met::Unavailable(_))
        {
            self.await_page(None);
        }
        Ok(self.look(None).1)
    }

    /// KVM_RUN failed with EFAULT: the host cannot provide a page that the guest accessed.
    fn fault(&mut self, address: Option<u64>) -> Option<Exit> {
        let (is_explained, exit) = self.look(address);
        self.unexplained_efaults = if is_explained { 0 } else { self.unexplained_efaults + 1 };
        if !is_explained {
            // Not all operands are known (a gather's are not): one may be in a slot that has no mapping.
            self.machine.missing_pages.retire_all();
        }
        if self.unexplained_efaults < MAX_UNEXPLAINED_EFAULTS {
            return exit;
        }
        let (vcpu, at) = (self.processor.id, address.map(|address| format!(", at {address:#x}")));
        let at = at.unwrap_or_default();
        Some(self.crash(format!("vCPU {vcpu} touched guest memory that the host cannot provide{at}")))
    }

    /// Provides the pages of mappings that the guest's instruction needs, and takes away slots without a
    /// mapping that it accesses. If a page cannot be had, pauses. The first value: whether that explains why
    /// the instruction could not go on.
    fn look(&mut self, address: Option<u64>) -> (bool, Option<Exit>) {
        let known = address.map(|address| (address, Access::ReadOnly));
        let (mut is_explained, mut changes) = (false, 0);
        for (address, access) in known.into_iter().chain(self.accesses()) {
            changes += self.machine.missing_pages.changes(address).unwrap_or(0);
            match self.machine.missing_pages.provide(address, access) {
                Met::Nothing | Met::Page | Met::Expected => {}
                Met::Zeroes | Met::Retired => is_explained = true,
                met @ Met::Unavailable(_) => {
                    self.await_page(Some((address, access)));
                    std::thread::sleep(RETRY);
                    return (true, self.machine.end_at(met));
                }
            }
        }
        // What it met may have been unmapped, and mapped again before we looked.
        is_explained |= std::mem::replace(&mut self.changes_seen, changes) != changes;
        (is_explained, None)
    }

    fn await_page(&mut self, page: Option<(u64, Access)>) {
        self.awaited = page;
        self.is_waiting.store(page.is_some(), Ordering::Relaxed);
        let VcpuCounters { page_waits, longest_page_wait_us, .. } = &*self.processor.counters;
        match page {
            Some(_) => self.page_wait.goes_on(page_waits, longest_page_wait_us),
            None => self.page_wait.ends(),
        }
    }

    /// The guest physical addresses that the vCPU's instruction accesses, its own among them.
    fn accesses(&self) -> Vec<(u64, Access)> {
        let (Ok(regs), Ok(sregs)) = (self.processor.fd.get_regs(), self.processor.fd.get_sregs()) else {
            return Vec::new();
        };
        let translate = |linear| self.machine.physical(&sregs, linear);
        let start = operands::instruction(&regs, &sregs);
        let mut code = [0; operands::LONGEST];
        let fetched = self.machine.read_linear(&sregs, start, &mut code);
        let of_code = pages(start, code.len() as u64).filter_map(|(linear, _)| translate(linear));
        let mut accesses: Vec<_> = of_code.map(|physical| (physical, Access::ReadOnly)).collect();
        for operand in operands::of(&regs, &sregs, &code[..fetched]) {
            let physical = pages(operand.linear, operand.len).filter_map(|(linear, _)| translate(linear));
            accesses.extend(physical.map(|physical| (physical, operand.access)));
        }
        accesses
    }

    fn crash(&self, reason: String) -> Exit {
        log::error!("{reason}\n{}", Registers(&self.processor.fd));
        Exit::Crash(reason)
    }
}

/// Whether the instruction that KVM cannot emulate is `int3`. A software KVM does not stop there by itself.
fn is_int3(vcpu: &mut VcpuFd) -> bool {
    // SAFETY: with KVM_EXIT_INTERNAL_ERROR, for an emulation, this is the union's field; all numbers.
    let failure = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.emulation_failure };
    // SAFETY: the union has only this field.
    let code = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    code.insn_size > 0 && code.insn_bytes[0] == INT3
}

/// A dump of a processor's registers.
struct Registers<'a>(&'a VcpuFd);

impl fmt::Display for Registers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Ok(regs), Ok(sregs)) = (self.0.get_regs(), self.0.get_sregs()) else {
            return write!(f, "(its registers cannot be read)");
        };
        let rows = [
            [("rip", regs.rip), ("rsp", regs.rsp), ("rflags", regs.rflags), ("rbp", regs.rbp)],
            [("rax", regs.rax), ("rbx", regs.rbx), ("rcx", regs.rcx), ("rdx", regs.rdx)],
            [("rsi", regs.rsi), ("rdi", regs.rdi), ("r8", regs.r8), ("r9", regs.r9)],
            [("r10", regs.r10), ("r11", regs.r11), ("r12", regs.r12), ("r13", regs.r13)],
            [("r14", regs.r14), ("r15", regs.r15), ("cr0", sregs.cr0), ("cr2", sregs.cr2)],
            [("cr3", sregs.cr3), ("cr4", sregs.cr4), ("efer", sregs.efer), ("cs", sregs.cs.selector.into())],
        ];
        let rows = rows.map(|row| row.map(|(name, value)| format!("  {name:>6} {value:016x}")).concat());
        f.write_str(&rows.join("\n"))
    }
}

thread_local! {
    /// `kvm_run.immediate_exit` of the processor that this thread runs; null on other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(std::ptr::null_mut()) };
}

/// While it lives, the signal SIGRTMIN makes this thread's current or next KVM_RUN return.
struct Interruptible;

impl Interruptible {
    fn new(fd: &mut VcpuFd) -> io::Result<Self> {
        IMMEDIATE_EXIT.set(&raw mut fd.get_kvm_run().immediate_exit);
        unblock_signal(SIGRTMIN()).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(Interruptible)
    }
}

impl Drop for Interruptible {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(std::ptr::null_mut());
    }
}

/// The handler of SIGRTMIN. It only reads a thread-local without a destructor and writes one byte.
extern "C" fn on_interrupt(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: `Interruptible` sets the pointer only while this thread's vCPU is mapped. Signal handlers
        // may write this byte; KVM reads it at the next KVM_RUN.
        unsafe { flag.write_volatile(1) };
    }
}
