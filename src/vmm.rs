//! The story of a machine: build, run, shut down.
//!
//! [`Vmm::build`] reads from top to bottom what [`crate`] describes module by module. Whatever can be refused is refused
//! there, before the guest's first instruction. [`Vmm::run`] starts a thread for each processor and serves the rest from
//! the main loop, until somebody says how the machine ends.

mod backends;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::arch::x86_64::acpi::{self, AcpiError};
use crate::arch::x86_64::boot::{self, BootError, EntryPoint, Initramfs, Kernel};
use crate::arch::x86_64::cpuid::{self, Topology};
use crate::arch::x86_64::{layout, msr, regs};
use crate::bus::{Bus, BusDevice, BusError, MachineEvent};
use crate::config::{Config, SerialLine};
use crate::devices::debug_exit::DebugExit;
use crate::devices::i8042::I8042;
use crate::devices::power::PowerControl;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::serial::{Output, SerialPort};
use crate::exit::{Exit, STATUS_ERROR, STATUS_USAGE};
use crate::kvm::slots::Slots;
use crate::kvm::vcpu::{BootRegisters, Machine, Outcome, Unclaimed, Vcpu, VcpuState};
use crate::kvm::vm::{Kvm, KvmError, Vm};
use crate::memory::alloc::WindowAllocator;
use crate::memory::ram::{Ram, RamError, RamRegion};
use crate::memory::{Access, GuestMapper};
use crate::terminal::{self, Command, EscapeFilter, RawTerminal};
use backends::{AttachError, Attached, BackendError, MissingPages};

/// Why a machine could not be built, or could not go on.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The kernel, the initramfs or the command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// Guest memory.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A back-end.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A device.
    #[error(transparent)]
    Attach(AttachError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// More processors than local APICs can have ids.
    #[error("{0} vCPUs are more than the {most} that a machine can have", most = layout::MAX_VCPUS)]
    TooManyVcpus(u32),
    /// More devices than there are interrupts for.
    #[error(
        "{0} devices are more than the {most} that a machine can have: each has an interrupt of its own, {first} to {last}",
        most = layout::MAX_DEVICES, first = layout::FIRST_DEVICE_GSI, last = layout::IOAPIC_INPUTS - 1
    )]
    TooManyDevices(usize),
    /// More RAM than the processor can address.
    #[error("guest memory up to {end:#x} is beyond this processor's {bits} bits of physical address")]
    AddressWidth {
        /// The first address after RAM.
        end: u64,
        /// The width.
        bits: u32,
    },
    /// The serial port's file.
    #[error("cannot open {0} for the serial port")]
    SerialFile(PathBuf, #[source] io::Error),
    /// Two devices at one address: our own mistake.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// The host's kernel refused something.
    #[error("cannot {0}")]
    Os(&'static str, #[source] io::Error),
}

impl VmmError {
    /// The exit status for it.
    pub fn status(&self) -> u8 {
        match self {
            VmmError::Boot(_)
            | VmmError::Ram(_)
            | VmmError::Backend(_)
            | VmmError::TooManyVcpus(_)
            | VmmError::TooManyDevices(_)
            | VmmError::AddressWidth { .. }
            | VmmError::SerialFile(..) => STATUS_USAGE,
            VmmError::Kvm(error) if error.is_configuration() => STATUS_USAGE,
            _ => STATUS_ERROR,
        }
    }

    /// What the user could do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            VmmError::Boot(error) => error.hint(),
            VmmError::Ram(error) => error.hint(),
            VmmError::Kvm(error) => error.hint(),
            VmmError::Backend(error) => error.hint(),
            _ => None,
        }
    }
}

impl From<AttachError> for VmmError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Backend(error) => VmmError::Backend(error),
            error => VmmError::Attach(error),
        }
    }
}

fn os(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |error| VmmError::Os(what, error)
}

/// A machine that is ready to run.
pub struct Vmm {
    machine: Arc<Machine>,
    vcpus: Vec<(VcpuFd, VcpuState)>,
    console: Console,
    devices: Arc<Vec<Attached>>,
    // What the machine uses without our help: it has to live as long.
    ram: Ram,
    vm: Vm,
    mapper: Arc<dyn GuestMapper>,
}

impl Vmm {
    /// Builds the machine. Nothing of it runs yet.
    ///
    /// # Errors
    ///
    /// Everything that is wrong with the configuration, its files or the host. Nothing is left behind then.
    pub fn build(config: &Config) -> Result<Vmm, VmmError> {
        // What the user gave, before anything is made of it.
        check_numbers(config)?;
        let mut kernel = Kernel::open(&config.kernel)?;
        let mut initramfs = config.initramfs.as_deref().map(Initramfs::open).transpose()?;
        boot::check_cmdline(&kernel, &config.cmdline)?;

        // The machine and its memory.
        let kvm = Kvm::open()?;
        kvm.check_vcpus(config.cpus)?;
        let supported = kvm.supported_cpuid()?;
        let ram = Ram::new(config.memory, layout::HOLE, layout::HOLE_END)?;
        check_address_width(&ram, &supported)?;
        let vm = Vm::new(&kvm, layout::KVM_PAGES)?;
        let mapper: Arc<dyn GuestMapper> = Arc::new(Slots::new(Arc::clone(vm.fd()), kvm.max_slots()));
        map_ram(&*mapper, &ram)?;

        // The back-ends: connect and negotiate with each, then place the windows of their shared memory regions.
        let address_limit = 1 << cpuid::physical_address_bits(&supported).min(63);
        let mut windows = WindowAllocator::new(layout::windows_start(ram.end()), address_limit);
        let backends = backends::connect(
            &config.devices,
            config.connect_timeout,
            &mut windows,
            &mapper,
            kvm.max_slots(),
        )?;
        let stopping = Arc::new(AtomicBool::new(false));
        let machine = Arc::new(Machine {
            ports: Bus::default(),
            mmio: Bus::default(),
            faults: Box::new(MissingPages::of(&backends)),
            unclaimed: Unclaimed::default(),
            stopping: Arc::clone(&stopping),
        });

        // The devices.
        let console = attach_serial_port(&machine, &vm, config, stopping)?;
        attach_power(&machine, config)?;
        let devices = backends::attach(backends, &machine, &vm, &*mapper, &ram)?;
        let virtio_devices: Vec<acpi::VirtioDevice> = devices.iter().map(|device| device.acpi).collect();

        // What the kernel finds in memory.
        let tables = acpi::tables(layout::ACPI, config.cpus, &virtio_devices)?;
        ram.memory()
            .write_slice(&tables, GuestAddress(layout::ACPI))
            .map_err(|error| {
                VmmError::Os("write the ACPI tables to guest memory", io::Error::other(error))
            })?;
        log::info!("kernel command line: {}", config.cmdline);
        let entry = boot::load(&mut kernel, initramfs.as_mut(), &config.cmdline, &ram)?;

        let topology = Topology {
            vcpus: config.cpus,
            tsc_deadline: kvm.has_tsc_deadline(),
        };
        let vcpus = create_vcpus(&vm, &supported, topology, entry)?;
        Ok(Vmm {
            machine,
            vcpus,
            console,
            devices: Arc::new(devices),
            ram,
            vm,
            mapper,
        })
    }

    /// Runs the machine until it ends.
    pub fn run(self) -> Result<Exit, VmmError> {
        let end = Arc::new(End::new()?);
        let memory_map = MemoryMap {
            ram: self.ram.regions().to_vec(),
            devices: Arc::clone(&self.devices),
        };
        let signals = Signals::new(Arc::clone(&end), memory_map)?;
        let mut events: EventManager<Box<dyn MutEventSubscriber>> =
            EventManager::new().map_err(|error| os("make the main loop")(io::Error::other(error)))?;
        events.add_subscriber(Box::new(EndWatch(Arc::clone(&end))));
        events.add_subscriber(Box::new(signals));
        let raw_terminal = self.console.make_raw()?;
        events.add_subscriber(Box::new(ConsoleInput::new(self.console, Arc::clone(&end))));

        let vcpus = start(self.vcpus, &self.machine, &end);
        while !end.has_come() {
            if let Err(error) = events.run() {
                end.fail(os("wait for events")(io::Error::other(error)));
            }
        }
        stop(vcpus, &self.machine);

        drop(raw_terminal);
        log_unclaimed(&self.machine.unclaimed);
        // In this order, said aloud: the back-ends are let go and their mappings go, nobody can reach guest memory any
        // more, then that and the register pages go.
        drop((events, self.machine));
        drop((self.mapper, self.vm));
        drop((self.devices, self.ram));
        end.result()
    }
}

/// The guest physical memory map: RAM, and what the devices have of it now.
struct MemoryMap {
    ram: Vec<RamRegion>,
    devices: Arc<Vec<Attached>>,
}

impl MemoryMap {
    fn print(&self) {
        eprintln!("guest physical memory:");
        for region in &self.ram {
            eprintln!(
                "  {} RAM, memfd offset {:#x}",
                backends::show(&region.guest),
                region.file_offset
            );
        }
        for line in self.devices.iter().flat_map(Attached::memory_map) {
            eprintln!("  {line}");
        }
    }
}

fn check_numbers(config: &Config) -> Result<(), VmmError> {
    if config.cpus > layout::MAX_VCPUS {
        return Err(VmmError::TooManyVcpus(config.cpus));
    }
    if config.devices.len() > layout::MAX_DEVICES {
        return Err(VmmError::TooManyDevices(config.devices.len()));
    }
    Ok(())
}

fn check_address_width(ram: &Ram, supported: &CpuId) -> Result<(), VmmError> {
    let (end, bits) = (ram.end(), cpuid::physical_address_bits(supported));
    if bits < 64 && end > 1 << bits {
        return Err(VmmError::AddressWidth { end, bits });
    }
    Ok(())
}

fn map_ram(mapper: &dyn GuestMapper, ram: &Ram) -> Result<(), VmmError> {
    for region in ram.regions() {
        // SAFETY: the region is mapped until `ram` is dropped, which `Vmm` does after the machine is gone; guest memory is
        // only ever accessed through vm-memory's volatile methods.
        let mapped = unsafe { mapper.map(region.guest, region.host, Access::ReadWrite) };
        mapped.map_err(os("give the guest its memory"))?;
    }
    Ok(())
}

fn attach_serial_port(
    machine: &Machine,
    vm: &Vm,
    config: &Config,
    stopping: Arc<AtomicBool>,
) -> Result<Console, VmmError> {
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("make an eventfd"));
    let (interrupt, wants_input) = (eventfd()?, Arc::new(eventfd()?));
    vm.register_irqfd(&interrupt, layout::COM1_GSI)?;
    // A descriptor of our own, so that nothing of ours is buffered in between.
    let duplicate = |fd: io::Result<std::os::fd::OwnedFd>, what| fd.map(File::from).map_err(os(what));
    let (input, output) = match &config.serial {
        SerialLine::Off => (None, None),
        SerialLine::File(path) => {
            let file = File::create(path).map_err(|error| VmmError::SerialFile(path.clone(), error))?;
            (None, Some(file))
        }
        SerialLine::Stdio => (
            Some(duplicate(io::stdin().as_fd().try_clone_to_owned(), "use stdin")?),
            Some(duplicate(
                io::stdout().as_fd().try_clone_to_owned(),
                "use stdout",
            )?),
        ),
    };
    let output = Output::new(output, stopping);
    let port = Arc::new(SerialPort::new(interrupt, output, Arc::clone(&wants_input)));
    insert(&machine.ports, layout::COM1, layout::COM1_LEN, port.clone())?;
    Ok(Console {
        port,
        input,
        wants_input,
    })
}

/// All the ways out that a guest has.
fn attach_power(machine: &Machine, config: &Config) -> Result<(), VmmError> {
    let power = PowerControl {
        sleep_type_off: acpi::SLEEP_TYPE_S5,
        reset_value: acpi::RESET_VALUE,
    };
    let ports = &machine.ports;
    insert(ports, layout::ACPI_POWER, layout::ACPI_POWER_LEN, Arc::new(power))?;
    insert(ports, layout::I8042, layout::I8042_LEN, Arc::new(I8042))?;
    insert(ports, layout::PVPANIC, 1, Arc::new(Pvpanic))?;
    if config.debug_exit {
        insert(ports, layout::DEBUG_EXIT, 1, Arc::new(DebugExit))?;
    }
    Ok(())
}

fn insert(ports: &Bus, first: u16, count: u16, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
    ports.insert(first.into(), count.into(), device)
}

/// The first processor starts at the kernel's entry point, the others wait until it starts them.
fn create_vcpus(
    vm: &Vm,
    supported: &CpuId,
    topology: Topology,
    entry: EntryPoint,
) -> Result<Vec<(VcpuFd, VcpuState)>, VmmError> {
    let create = |id| {
        let fd = vm.create_vcpu(id)?;
        let boot = if id == 0 {
            let reset = fd.get_sregs();
            let reset =
                reset.map_err(|error| KvmError::Ioctl("read system registers".into(), error.into()))?;
            Some(BootRegisters {
                regs: regs::general(entry.entry, entry.boot_params),
                sregs: regs::system(reset),
                fpu: regs::floating_point(),
            })
        } else {
            None
        };
        let state = VcpuState {
            cpuid: cpuid::of_vcpu(supported, topology, id),
            msrs: msr::initial(),
            boot,
        };
        Ok((fd, state))
    };
    (0..topology.vcpus).map(create).collect()
}

/// Starts the processors' threads. One that cannot be started ends the machine, and those before it are still to stop.
fn start(vcpus: Vec<(VcpuFd, VcpuState)>, machine: &Arc<Machine>, end: &Arc<End>) -> Vec<Vcpu> {
    let mut started = Vec::new();
    for (id, (fd, state)) in (0..).zip(vcpus) {
        let told = Arc::clone(end);
        match Vcpu::spawn(id, fd, state, Arc::clone(machine), move |outcome| {
            told.tell(outcome)
        }) {
            Ok(vcpu) => started.push(vcpu),
            Err(error) => {
                end.fail(os("start a vCPU's thread")(error));
                break;
            }
        }
    }
    started
}

/// Stops the processors' threads and waits for them.
fn stop(vcpus: Vec<Vcpu>, machine: &Machine) {
    machine.stopping.store(true, Ordering::SeqCst);
    // Again and again: a kick may fall just before a wait for whoever reads the serial port's output.
    while !vcpus.iter().all(Vcpu::has_ended) {
        vcpus.iter().for_each(Vcpu::kick);
        std::thread::sleep(Duration::from_millis(1));
    }
    vcpus.into_iter().for_each(Vcpu::join);
}

fn log_unclaimed(unclaimed: &Unclaimed) {
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    log::info!(
        "nobody answered {} memory reads, {} memory writes and {} port accesses",
        count(&unclaimed.mmio_reads),
        count(&unclaimed.mmio_writes),
        count(&unclaimed.ports)
    );
}

/// How the machine ends: whoever says it first is right.
struct End {
    result: OnceLock<Result<Exit, VmmError>>,
    event: EventFd,
}

impl End {
    fn new() -> Result<End, VmmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(os("make an eventfd"))?;
        let result = OnceLock::new();
        Ok(End { result, event })
    }

    fn come(&self, exit: Exit) {
        self.set(Ok(exit));
    }

    fn fail(&self, error: VmmError) {
        self.set(Err(error));
    }

    fn set(&self, result: Result<Exit, VmmError>) {
        if let Err(late) = self.result.set(result) {
            log::debug!("too late to end the machine: {late:?}");
        }
        // It fails only when 2^64 - 2 signals wait already.
        let _full = self.event.write(1);
    }

    /// Called by a vCPU's thread, last.
    fn tell(&self, outcome: Outcome) {
        match outcome {
            Outcome::Stopped => {}
            Outcome::Event(MachineEvent::PowerOff) => self.come(Exit::PowerOff),
            Outcome::Event(MachineEvent::Reset) => self.come(Exit::Reset),
            Outcome::Event(MachineEvent::Panicked) => self.come(Exit::Panicked),
            Outcome::Event(MachineEvent::DebugExit(status)) => self.come(Exit::DebugExit(status)),
            Outcome::Crash(crash) => self.come(Exit::Crash(crash.to_string())),
            Outcome::Failed(error) => self.fail(error.into()),
        }
    }

    fn has_come(&self) -> bool {
        self.result.get().is_some()
    }

    fn result(self: Arc<Self>) -> Result<Exit, VmmError> {
        let result = Arc::into_inner(self).and_then(|end| end.result.into_inner());
        result.unwrap_or_else(|| Err(os("tell how the machine ended")(io::ErrorKind::Other.into())))
    }
}

/// Wakes the main loop when the end has come.
struct EndWatch(Arc<End>);

impl MutEventSubscriber for EndWatch {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        // The loop looks itself.
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&self.0.event, EventSet::IN));
    }
}

/// Adds a descriptor to the main loop; false where it cannot be waited for (a regular file is always ready).
fn watch(ops: &mut EventOps, events: Events) -> bool {
    ops.add(events).is_ok()
}

/// Those that end the machine.
const ENDING: [libc::c_int; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// The one that prints the memory map.
const REPORT: libc::c_int = libc::SIGUSR1;

/// The signals of the process, read as data.
struct Signals {
    file: File,
    end: Arc<End>,
    memory_map: MemoryMap,
}

impl Signals {
    /// Takes the signals away from their default actions, on this thread and all that it starts later. Threads that it
    /// started before leave them alone too, see [`crate::thread`].
    fn new(end: Arc<End>, memory_map: MemoryMap) -> Result<Signals, VmmError> {
        // SAFETY: a sigset_t is plain bits, for which all-zero is a value.
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours and lives through the calls; signalfd makes a descriptor that is nobody else's.
        let fd: RawFd = unsafe {
            libc::sigemptyset(&mut set);
            for signal in ENDING.into_iter().chain([REPORT]) {
                libc::sigaddset(&mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(os("make a signalfd")(io::Error::last_os_error()));
        }
        Ok(Signals {
            // SAFETY: the descriptor is new and nobody else's.
            file: unsafe { File::from_raw_fd(fd) },
            end,
            memory_map,
        })
    }
}

impl MutEventSubscriber for Signals {
    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(len) = self.file.read(&mut info) {
            if len < info.len() {
                break;
            }
            // The first field, ssi_signo.
            let [a, b, c, d, ..] = info;
            match i32::from_ne_bytes([a, b, c, d]) {
                REPORT => self.memory_map.print(),
                signal => self.end.come(Exit::Signal(signal)),
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&self.file, EventSet::IN));
    }
}

/// The serial port with the host's end of its input line.
struct Console {
    port: Arc<SerialPort>,
    input: Option<File>,
    wants_input: Arc<EventFd>,
}

impl Console {
    fn make_raw(&self) -> Result<Option<RawTerminal>, VmmError> {
        if self.input.is_none() {
            return Ok(None);
        }
        RawTerminal::new().map_err(os("make the terminal raw"))
    }
}

/// How much typed input is kept for a guest that does not read; the rest is dropped, as a terminal drops it. Whoever
/// types can always quit. A pipe or a file is not read further while the guest does not read.
const TYPED_AHEAD: usize = 4096;

/// Brings input to the serial port.
struct ConsoleInput {
    console: Console,
    end: Arc<End>,
    pending: VecDeque<u8>,
    /// `Some` on a terminal.
    escape: Option<EscapeFilter>,
    line: Line,
}

/// The state of the input line.
#[derive(PartialEq, Eq)]
enum Line {
    /// The main loop tells when there is input.
    Watched,
    /// There is input as long as it has not ended (a regular file), or nobody wants it yet (a pipe).
    Unwatched,
    /// It has ended.
    Ended,
}

impl ConsoleInput {
    fn new(console: Console, end: Arc<End>) -> Self {
        let terminal = console.input.as_ref().is_some_and(|input| input.is_terminal());
        ConsoleInput {
            line: if console.input.is_some() {
                Line::Unwatched
            } else {
                Line::Ended
            },
            escape: terminal.then(EscapeFilter::default),
            pending: VecDeque::new(),
            console,
            end,
        }
    }

    /// Gives the guest what it can take of what is pending.
    fn feed(&mut self) {
        let room = self.console.port.room().min(self.pending.len());
        if room > 0 {
            let bytes: Vec<u8> = self.pending.iter().take(room).copied().collect();
            let taken = self.console.port.enqueue(&bytes);
            self.pending.drain(..taken);
        }
    }

    /// Reads once, a terminal's keys or what is next in a pipe or a file.
    fn read(&mut self) {
        let Some(mut input) = self.console.input.as_ref() else {
            return;
        };
        let mut buffer = [0; 256];
        match input.read(&mut buffer) {
            Ok(0) => self.line = Line::Ended,
            Ok(len) => buffer[..len].iter().for_each(|byte| self.take(*byte)),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            Err(error) => {
                log::info!("no more input: {error}");
                self.line = Line::Ended;
            }
        }
    }

    fn take(&mut self, byte: u8) {
        let byte = match self
            .escape
            .as_mut()
            .map_or(Ok(Some(byte)), |escape| escape.key(byte))
        {
            Ok(byte) => byte,
            Err(Command::Quit) => return self.end.come(Exit::Quit),
            Err(Command::Help) => {
                eprintln!("\n{}", terminal::HELP);
                None
            }
        };
        if self.pending.len() < TYPED_AHEAD {
            self.pending.extend(byte);
        }
    }

    /// Whether input shall be read: a terminal always, for the escape key; anything else when the guest wants more.
    fn wants_more(&self) -> bool {
        self.escape.is_some() || self.pending.is_empty() && self.console.port.room() > 0
    }

    /// Brings the watching of the line in accord with what is wanted.
    fn watch_line(&mut self, ops: &mut EventOps) {
        let Some(input) = self.console.input.as_ref() else {
            return;
        };
        let events = Events::new(input, EventSet::IN);
        match self.line {
            Line::Ended => {
                // Not watched any more, if it was; its hang-up would wake us again and again.
                let _was_not_watched = ops.remove(events);
                self.console.input = None;
            }
            Line::Watched if !self.wants_more() => {
                if ops.remove(events).is_ok() {
                    self.line = Line::Unwatched;
                }
            }
            Line::Unwatched if self.wants_more() => {
                if watch(ops, events) {
                    self.line = Line::Watched;
                } else {
                    self.read_file(ops);
                }
            }
            _ => {}
        }
    }

    /// A file cannot be waited for: it is read as far as the guest takes it.
    fn read_file(&mut self, ops: &mut EventOps) {
        while self.line == Line::Unwatched && self.wants_more() {
            self.read();
            self.feed();
        }
        if self.line == Line::Ended {
            self.watch_line(ops);
        }
    }
}

impl MutEventSubscriber for ConsoleInput {
    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.console.wants_input.as_raw_fd() {
            // It says "look again"; how often it said so does not matter.
            let _count = self.console.wants_input.read();
        } else {
            self.read();
        }
        self.feed();
        self.watch_line(ops);
    }

    fn init(&mut self, ops: &mut EventOps) {
        watch(ops, Events::new(&*self.console.wants_input, EventSet::IN));
        self.watch_line(ops);
    }
}
