//! One virtual processor: its thread, its exits, and how to make it stop.
//!
//! ```text
//!   spawn ──▶ apply the state ──▶ KVM_RUN ──▶ an access ──▶ bus ──┬──▶ again
//!                                    │  ▲                         └──▶ Outcome (power-off, reset, ...)
//!                                    │  └── a kick: stopping? ──no
//!                                    ├── EFAULT: MissingPages mends it? ──no, again and again──▶ Outcome::Crash
//!                                    └── triple fault, internal error, failed entry ──▶ Outcome::Crash
//! ```

use std::cell::Cell;
use std::fmt;
use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_regs, kvm_run, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use thiserror::Error;

use super::stats::FaultCount;
use super::vm::{KvmError, failed_to};
use crate::bus::{Bus, MachineEvent};
use crate::memory::missing::MissingPages;
use crate::thread;

/// The registers with which the first processor starts. The others wait for the guest's INIT and SIPI.
#[derive(Clone, Debug)]
pub struct BootRegisters {
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, page table root.
    pub sregs: kvm_sregs,
    /// Floating point control words.
    pub fpu: kvm_fpu,
}

/// All that a processor is given before it runs: data, applied by its own thread.
#[derive(Clone, Debug)]
pub struct VcpuState {
    /// What CPUID answers.
    pub cpuid: CpuId,
    /// Model specific registers that do not start at their reset value.
    pub msrs: Msrs,
    /// `None` for a processor that waits to be started by another.
    pub boot: Option<BootRegisters>,
}

/// How often in a row a processor may fail with EFAULT although nothing is found missing. It is no sign of
/// despair by itself: another processor may have been faster, the mapping may be gone, the file may have
/// grown again. A file that somebody cuts and grows all the time, hoping for more, gets here with a
/// probability below 1/4 each time.
const BARREN_FAULTS: u32 = 100;

/// Accesses that nobody answered: reads gave all-ones, writes were dropped.
#[derive(Debug, Default)]
pub struct Unclaimed {
    /// Reads from memory addresses without RAM, mapping or device.
    pub mmio_reads: AtomicU64,
    /// Writes to them, and to read-only mappings.
    pub mmio_writes: AtomicU64,
    /// Accesses to I/O ports without a device. A kernel that looks for hardware makes many.
    pub ports: AtomicU64,
}

/// What the processors of one machine share.
pub struct Machine {
    /// Who answers at I/O ports.
    pub ports: Bus,
    /// Who answers at memory addresses without memory.
    pub mmio: Bus,
    /// Asked about every EFAULT.
    pub faults: Arc<MissingPages>,
    /// Counts what nobody answered.
    pub unclaimed: Unclaimed,
    /// Set before the processors are kicked for the last time; then none goes back to the guest.
    pub stopping: Arc<AtomicBool>,
}

/// Why a processor stopped for good without being told to.
#[derive(Debug, Error)]
pub enum Crash {
    /// The guest could not even handle a double fault.
    #[error("triple fault on vCPU {0}")]
    TripleFault(u32),
    /// KVM could not go on, for example with an instruction that it cannot emulate.
    #[error("KVM internal error {suberror} on vCPU {vcpu}")]
    Internal {
        /// The processor.
        vcpu: u32,
        /// KVM_INTERNAL_ERROR_*.
        suberror: u32,
    },
    /// The processor's state is impossible.
    #[error("vCPU {vcpu} cannot be entered, hardware reason {reason:#x}")]
    FailedEntry {
        /// The processor.
        vcpu: u32,
        /// As the hardware says it.
        reason: u64,
    },
    /// The host memory under an access is gone, and nobody could mend it.
    #[error("vCPU {vcpu} touched guest memory that the host cannot provide{}", at(.address))]
    Memory {
        /// The processor.
        vcpu: u32,
        /// The guest physical address, where KVM tells it.
        address: Option<u64>,
    },
}

fn at(address: &Option<u64>) -> String {
    address.map_or(String::new(), |address| format!(", at {address:#x}"))
}

/// How a processor's thread ended.
#[derive(Debug)]
pub enum Outcome {
    /// It was told to stop.
    Stopped,
    /// A device register was written that concerns the whole machine.
    Event(MachineEvent),
    /// The guest cannot go on.
    Crash(Crash),
    /// KVM or the host failed us.
    Failed(KvmError),
}

/// A processor's thread.
pub struct Vcpu {
    thread: JoinHandle<()>,
    /// `None` where KVM has no such statistics.
    faults: Option<FaultCount>,
}

impl Vcpu {
    /// Starts the thread of processor `id`. `ended` is called on it once, last.
    pub fn spawn(
        id: u32,
        fd: VcpuFd,
        state: VcpuState,
        machine: Arc<Machine>,
        ended: impl FnOnce(Outcome) + Send + 'static,
    ) -> io::Result<Vcpu> {
        install_kick_handler()?;
        let faults = FaultCount::of(&fd)
            .inspect_err(|error| log::debug!("vCPU {id}: KVM has no page fault statistics: {error}"))
            .ok();
        let mut runner = Runner { id, fd, machine, barren_faults: 0 };
        let thread = thread::spawn(format!("vcpu{id}"), move || ended(runner.run(&state)))?;
        Ok(Vcpu { thread, faults })
    }

    /// Makes the processor look at [`Machine::stopping`] soon, whatever it does: a KVM_RUN that runs or
    /// starts ends, a system call in a handler ends with EINTR. A signal can fall between a handler's look
    /// and its system call, so the caller repeats this until the processor [`Vcpu::has_ended`].
    pub fn kick(&self) {
        if !self.thread.is_finished() {
            // SAFETY: the thread was not joined, so its pthread_t is valid; the signal has a handler.
            let _ended_meanwhile = unsafe { libc::pthread_kill(self.thread.as_pthread_t(), kick_signal()) };
        }
    }

    /// How many of the guest's page faults KVM did not resolve so far, where it can tell.
    pub fn unresolved_faults(&self) -> Option<u64> {
        self.faults.as_ref()?.unresolved()
    }

    /// Whether the thread is done.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Waits for the end of the thread.
    pub fn join(self) {
        if self.thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}

struct Runner {
    id: u32,
    fd: VcpuFd,
    machine: Arc<Machine>,
    barren_faults: u32,
}

impl Runner {
    fn run(&mut self, state: &VcpuState) -> Outcome {
        if let Err(error) = self.apply(state) {
            return Outcome::Failed(error);
        }
        let _kickable = match Kickable::new(self.fd.get_kvm_run()) {
            Ok(kickable) => kickable,
            Err(error) => return Outcome::Failed(KvmError::Ioctl("be kicked".into(), error)),
        };
        loop {
            // In this order: a kick that comes after the first line sets the flag anew, one that came before
            // it is seen in the second.
            self.fd.set_kvm_immediate_exit(0);
            if self.machine.stopping.load(Ordering::SeqCst) {
                // For whoever ended a guest that hangs.
                log::debug!("vCPU {} stops here:\n{}", self.id, Registers(&self.fd));
                return Outcome::Stopped;
            }
            if let Some(outcome) = self.enter() {
                return outcome;
            }
        }
    }

    fn apply(&self, state: &VcpuState) -> Result<(), KvmError> {
        let vcpu = self.id;
        let fails = |what| failed_to(format!("set {what} of vCPU {vcpu}"));
        self.fd.set_cpuid2(&state.cpuid).map_err(fails("CPUID"))?;
        let wanted = state.msrs.as_slice();
        let set = self.fd.set_msrs(&state.msrs).map_err(fails("MSRs"))?;
        if let Some(refused) = wanted.get(set) {
            // Not the end: the guest sees the reset value. Software KVMs know few of them.
            log::debug!("vCPU {vcpu}: KVM does not take MSR {:#x} = {:#x}", refused.index, refused.data);
        }
        if let Some(boot) = &state.boot {
            self.fd.set_sregs(&boot.sregs).map_err(fails("system registers"))?;
            self.fd.set_regs(&boot.regs).map_err(fails("registers"))?;
            self.fd.set_fpu(&boot.fpu).map_err(fails("floating point registers"))?;
        }
        Ok(())
    }

    /// Lets the guest run until its next exit, and deals with it. `None` to go on.
    fn enter(&mut self) -> Option<Outcome> {
        let vcpu = self.id;
        let machine = &self.machine;
        let exit = self.fd.run();
        if exit.is_ok() {
            self.barren_faults = 0;
        }
        let crash = match exit {
            Ok(VcpuExit::MmioRead(address, data)) => {
                // A page of a mapping that is missing comes here too: from a software KVM always, from any
                // KVM when it has to emulate the instruction (SHM-45). Another vCPU may have mended it
                // meanwhile.
                if !machine.mmio.read(address, data) && !machine.faults.read(address, data) {
                    machine.unclaimed.mmio_reads.fetch_add(1, Ordering::Relaxed);
                    log::debug!("vCPU {vcpu}: nothing to read at {address:#x}");
                }
                return None;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                return machine.mmio.write(address, data).map_or_else(
                    |_| {
                        machine.faults.write(address);
                        machine.unclaimed.mmio_writes.fetch_add(1, Ordering::Relaxed);
                        log::debug!("vCPU {vcpu}: nothing to write at {address:#x}");
                        None
                    },
                    |event| event.map(Outcome::Event),
                );
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let data: *mut [u8] = data;
                // SAFETY: the bytes are in the vCPU's kvm_run, which nobody else touches outside KVM_RUN.
                return self.port_access(port, Port::In(unsafe { &mut *data }));
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let data: *const [u8] = data;
                // SAFETY: as above.
                return self.port_access(port, Port::Out(unsafe { &*data }));
            }
            Ok(VcpuExit::Intr) => return None,
            Ok(VcpuExit::MemoryFault { gpa, .. }) => return self.mend(Some(gpa)),
            Err(error) => match error.errno() {
                // EAGAIN: a processor that waits for its start was woken up.
                libc::EINTR | libc::EAGAIN => return None,
                libc::EFAULT => return self.mend(None),
                _ => return Some(Outcome::Failed(failed_to(format!("run vCPU {vcpu}"))(error))),
            },
            Ok(VcpuExit::Shutdown) => Crash::TripleFault(vcpu),
            Ok(VcpuExit::FailEntry(reason, _)) => Crash::FailedEntry { vcpu, reason },
            Ok(VcpuExit::InternalError) => Crash::Internal {
                vcpu,
                // SAFETY: KVM_EXIT_INTERNAL_ERROR says that this field of the union is the one; it is a
                // number.
                suberror: unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror },
            },
            Ok(other) => {
                let what = format!("go on with vCPU {vcpu} after the exit {other:?}");
                let error = io::Error::from(io::ErrorKind::Unsupported);
                return Some(Outcome::Failed(KvmError::Ioctl(what, error)));
            }
        };
        Some(self.crashed(crash))
    }

    /// One `in` or `out`, or as many of them as a string instruction made in a row.
    fn port_access(&self, port: u16, access: Port<'_>) -> Option<Outcome> {
        let size = usize::from(self.port_width());
        let (ports, unclaimed) = (&self.machine.ports, &self.machine.unclaimed.ports);
        match access {
            Port::In(data) => {
                for item in data.chunks_mut(size) {
                    if !ports.read(port.into(), item) {
                        unclaimed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                None
            }
            Port::Out(data) => data.chunks(size).find_map(|item| match ports.write(port.into(), item) {
                Ok(event) => event.map(Outcome::Event),
                Err(_) => {
                    unclaimed.fetch_add(1, Ordering::Relaxed);
                    None
                }
            }),
        }
    }

    /// The width of the port access that KVM_RUN just returned with: 1, 2 or 4 bytes.
    fn port_width(&self) -> u8 {
        KVM_RUN.with(|run| {
            // SAFETY: `Kickable` keeps the pointer right while `run` is on the stack; KVM_EXIT_IO says that
            // this field of the union is the one; nobody writes to it outside KVM_RUN.
            unsafe { (*run.get()).__bindgen_anon_1.io.size }.max(1)
        })
    }

    fn mend(&mut self, address: Option<u64>) -> Option<Outcome> {
        if self.machine.faults.mend(address) {
            self.barren_faults = 0;
            return None;
        }
        self.barren_faults += 1;
        if self.barren_faults < BARREN_FAULTS {
            return None;
        }
        let vcpu = self.id;
        Some(self.crashed(Crash::Memory { vcpu, address }))
    }

    fn crashed(&self, crash: Crash) -> Outcome {
        log::error!("{crash}\n{}", Registers(&self.fd));
        Outcome::Crash(crash)
    }
}

enum Port<'a> {
    In(&'a mut [u8]),
    Out(&'a [u8]),
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
        for (number, row) in rows.iter().enumerate() {
            if number > 0 {
                writeln!(f)?;
            }
            for (name, value) in row {
                write!(f, "  {name:>6} {value:016x}")?;
            }
        }
        Ok(())
    }
}

thread_local! {
    /// The `kvm_run` of the processor that this thread runs, for the kick's handler; null on other threads.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

/// While it lives, a kick of this thread makes the current or next KVM_RUN return.
struct Kickable;

impl Kickable {
    fn new(run: &mut kvm_run) -> io::Result<Self> {
        KVM_RUN.set(run);
        // SAFETY: a sigset_t is plain bits, for which all-zero is a value.
        let mut kick: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours; only this thread's mask changes, and the signal has a handler.
        let result = unsafe {
            libc::sigemptyset(&mut kick);
            libc::sigaddset(&mut kick, kick_signal());
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &kick, std::ptr::null_mut())
        };
        match result {
            0 => Ok(Kickable),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        KVM_RUN.set(std::ptr::null_mut());
    }
}

/// The first real-time signal: the C library keeps those before it to itself.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn kicked(_signal: libc::c_int) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is set only while the vCPU of this very thread is mapped. The byte is there for
        // signal handlers to write; KVM reads it at the next KVM_RUN.
        unsafe { std::ptr::addr_of_mut!((*run).immediate_exit).write_volatile(1) };
    }
}

fn install_kick_handler() -> io::Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| {
        // SAFETY: a sigaction is plain data, for which all-zero is a value: no flags (so that system calls
        // end with EINTR), an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = kicked as extern "C" fn(libc::c_int) as usize;
        // SAFETY: the handler only reads a thread-local without a destructor and writes one byte.
        if unsafe { libc::sigaction(kick_signal(), &action, std::ptr::null_mut()) } != 0 {
            result = Err(io::Error::last_os_error());
        }
    });
    result
}
