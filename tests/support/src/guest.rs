//! A running `hotslot` with the monitor as its guest, and a virtio driver made of the monitor's reads and
//! writes.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use crate::backend::Backend;
use crate::child::Running;
use crate::image;
use crate::monitor::{self, Operation};
use crate::wait::{PATIENCE, eventually};

/// The first device's register block.
pub const REGISTERS: u64 = 0xd000_0000;
/// The I/O port of `--debug-exit`.
pub const DEBUG_EXIT: u64 = 0xf4;

pub struct Guest {
    hotslot: Running,
    stdin: ChildStdin,
    stdout: ChildStdout,
    _kernel: Option<tempfile::NamedTempFile>,
    /// The registers of the device that the driver below drives.
    registers: u64,
    /// The queue of that device that it uses.
    queue: u8,
}

/// The monitor as a file.
pub fn kernel() -> tempfile::NamedTempFile {
    image::kernel(&monitor::elf())
}

/// hotslot with the monitor, ready for more options.
pub fn command(kernel: &Path) -> Command {
    let mut command = Command::new(crate::built::hotslot());
    command.args(["-m", "64M", "--debug-exit", "-k"]).arg(kernel);
    command
}

impl Guest {
    /// Boots the monitor with these further options of hotslot.
    pub fn boot<I: AsRef<std::ffi::OsStr>>(options: impl IntoIterator<Item = I>) -> Guest {
        let kernel = kernel();
        let mut command = command(kernel.path());
        command.args(options);
        Guest::spawn(command, Some(kernel))
    }

    /// Boots it with this back-end's device, and starts the device.
    pub fn with(backend: &Backend) -> Guest {
        let mut guest = Guest::boot(["--vhost-user", &backend.device("device")]);
        guest.start_device();
        guest
    }

    /// Runs hotslot with a kernel of the test's own, which is kept as long where it is a temporary one.
    pub fn spawn(mut hotslot: Command, kernel: Option<tempfile::NamedTempFile>) -> Guest {
        let hotslot = Running::start(hotslot.stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (stdin, stdout) = hotslot.pipes();
        Guest { hotslot, stdin, stdout, _kernel: kernel, registers: REGISTERS, queue: 0 }
    }

    fn ask(&mut self, operation: Operation, width: u8, address: u64, value: u64) -> u64 {
        self.begin(operation, width, address, value);
        self.answer()
    }

    /// The answer to the operation that was begun.
    pub fn answer(&mut self) -> u64 {
        let mut answer = [0; 8];
        for byte in &mut answer {
            self.wait_for_output();
            if let Err(error) = self.stdout.read_exact(std::slice::from_mut(byte)) {
                self.fail(&error.to_string());
            }
        }
        u64::from_le_bytes(answer)
    }

    /// Whether there is an answer now.
    pub fn has_answered(&self) -> bool {
        let mut poll = [PollFd::new(&self.stdout, PollFlags::IN)];
        rustix::event::poll(&mut poll, Some(&rustix::event::Timespec::default())) == Ok(1)
    }

    fn wait_for_output(&self) {
        let mut poll = [PollFd::new(&self.stdout, PollFlags::IN)];
        if rustix::event::poll(&mut poll, Some(&PATIENCE.try_into().unwrap())) != Ok(1) {
            self.fail("the guest does not answer");
        }
    }

    fn fail(&self, what: &str) -> ! {
        panic!("{what}; hotslot said:\n{}", self.log());
    }

    /// What hotslot printed on stderr so far.
    pub fn log(&self) -> String {
        self.hotslot.said()
    }

    /// Waits until hotslot has printed `text` on stderr.
    pub fn wait_for_log(&self, text: &str) {
        self.hotslot.wait_for(text);
    }

    /// Has hotslot print its memory map (SIGUSR1), until there is `text` in it.
    pub fn wait_for_map(&self, text: &str) {
        self.hotslot.wait_until(&format!("the map has {text:?}"), || {
            let has_it = self.log().contains(text);
            if !has_it {
                self.hotslot.signal(libc::SIGUSR1);
                std::thread::sleep(Duration::from_millis(100));
            }
            has_it
        });
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.hotslot.pid()
    }

    pub fn read8(&mut self, address: u64) -> u8 {
        self.ask(Operation::Read, 1, address, 0) as u8
    }

    pub fn read32(&mut self, address: u64) -> u32 {
        self.ask(Operation::Read, 4, address, 0) as u32
    }

    pub fn read64(&mut self, address: u64) -> u64 {
        self.ask(Operation::Read, 8, address, 0)
    }

    pub fn write8(&mut self, address: u64, value: u8) {
        self.ask(Operation::Write, 1, address, value.into());
    }

    pub fn write32(&mut self, address: u64, value: u32) {
        self.ask(Operation::Write, 4, address, value.into());
    }

    pub fn write64(&mut self, address: u64, value: u64) {
        self.ask(Operation::Write, 8, address, value);
    }

    pub fn out8(&mut self, port: u16, value: u8) {
        self.ask(Operation::Out, 1, port.into(), value.into());
    }

    /// Enables or disables interrupts in the processor. None comes either way, unless the test arranges for
    /// it.
    pub fn set_interrupts(&mut self, enabled: bool) {
        // The old interrupt controller takes none: the serial port would interrupt us through it.
        self.out8(0x21, 0xff);
        self.out8(0xa1, 0xff);
        self.ask(Operation::Interrupts, 1, 0, enabled.into());
    }

    /// Sends hotslot a signal.
    pub fn signal(&self, signal: i32) {
        self.hotslot.signal(signal);
    }

    /// Begins an operation whose answer may never come: nothing else can be asked of the guest before.
    pub fn begin(&mut self, operation: Operation, width: u8, address: u64, value: u64) {
        let mut request = vec![operation as u8, width];
        request.extend(address.to_le_bytes());
        request.extend(value.to_le_bytes());
        self.stdin.write_all(&request).unwrap_or_else(|error| self.fail(&error.to_string()));
    }

    /// Leaves a list of 32-bit writes at `list`, in RAM.
    pub fn write_list(&mut self, list: u64, writes: impl IntoIterator<Item = (u64, u32)>) {
        let words = writes.into_iter().flat_map(|(address, value)| [address, value.into()]);
        for (at, word) in (list..).step_by(8).zip(words.chain([0])) {
            self.write64(at, word);
        }
    }

    /// Goes through such a list so often.
    pub fn repeat(&mut self, list: u64, times: u64) {
        self.ask(Operation::Repeat, 0, list, times);
    }

    /// Writes to each of these pages.
    pub fn touch(&mut self, start: u64, pages: u64) {
        self.ask(Operation::Touch, 0, start, pages);
    }

    /// Reads a word of 8 bytes at each `2^stride` bytes of a range: how long that took, in ticks.
    pub fn sweep(&mut self, address: u64, len: u64, stride: u8) -> u64 {
        self.ask(Operation::Sweep, stride, address, len)
    }

    /// Sends an operation whose answer never comes because the machine ends, and waits for that.
    pub fn end_with(
        mut self,
        operation: Operation,
        width: u8,
        address: u64,
        value: u64,
    ) -> (ExitStatus, String) {
        self.begin(operation, width, address, value);
        self.wait()
    }

    /// Ends the machine through the debug-exit port; it must end with this very status. Gives what hotslot
    /// printed.
    pub fn exit(self) -> String {
        let (status, log) = self.end_with(Operation::Out, 1, DEBUG_EXIT, 42);
        assert_eq!(status.code(), Some(42), "{log}");
        log
    }

    /// Waits for the end of hotslot; gives its status and what it printed on stderr.
    pub fn wait(self) -> (ExitStatus, String) {
        self.hotslot.wait()
    }
}

/// Registers of virtio-mmio (VIRTIO section 4.2.2), as offsets.
pub mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const SHM_SEL: u64 = 0x0ac;
    pub const SHM_LEN: u64 = 0x0b0;
    pub const SHM_BASE: u64 = 0x0b8;
}

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;
/// A device that was started.
pub const RUNNING: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const QUEUE_SIZE: u32 = 8;
/// Flags of a descriptor.
const CHAINED: u64 = 1;
const DEVICE_WRITES: u64 = 2;
/// Where [`Guest::request`] has its buffers, in RAM.
const REQUEST: u64 = 0x180_0000;
const ANSWER: u64 = 0x181_0000;

/// The driver, of the first device unless [`Guest::select`] said otherwise.
impl Guest {
    /// From now on the driver drives this device.
    pub fn select(&mut self, device: u64) {
        self.registers = REGISTERS + device * 0x1000;
        self.queue = 0;
    }

    /// From now on the driver starts its device with this queue only, and uses it.
    pub fn select_queue(&mut self, queue: u8) {
        self.queue = queue;
    }

    pub fn register(&mut self, offset: u64) -> u32 {
        self.read32(self.registers + offset)
    }

    pub fn set_register(&mut self, offset: u64, value: u32) {
        self.write32(self.registers + offset, value);
    }

    fn set_wide_register(&mut self, offset: u64, value: u64) {
        self.set_register(offset, value as u32);
        self.set_register(offset + 4, (value >> 32) as u32);
    }

    pub fn reset_device(&mut self) {
        self.set_register(register::STATUS, 0);
        assert_eq!(self.register(register::STATUS), 0);
    }

    /// Takes the device from reset to DRIVER_OK; every step must succeed.
    pub fn start_device(&mut self) {
        self.reset_device();
        assert_eq!(self.try_start_device(), RUNNING, "{}", self.log());
    }

    /// Takes the device, which was reset, to DRIVER_OK, with VIRTIO_F_VERSION_1, feature bit 0 where it is
    /// offered, and the selected queue in RAM from 16 MiB on. Gives the Status that it has then.
    pub fn try_start_device(&mut self) -> u32 {
        self.set_register(register::STATUS, ACKNOWLEDGE);
        self.set_register(register::STATUS, ACKNOWLEDGE | DRIVER);
        self.set_register(register::DEVICE_FEATURES_SEL, 0);
        let low = self.register(register::DEVICE_FEATURES) & 1;
        for (word, features) in [(0, low), (1, 1)] {
            self.set_register(register::DRIVER_FEATURES_SEL, word);
            self.set_register(register::DRIVER_FEATURES, features);
        }
        self.set_register(register::STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let [descriptors, available, used] = self.rings();
        // Indices of an earlier start.
        self.write32(available, 0);
        self.write32(used, 0);
        self.set_register(register::QUEUE_SEL, self.queue.into());
        self.set_register(register::QUEUE_SIZE, QUEUE_SIZE);
        self.set_wide_register(register::QUEUE_DESC, descriptors);
        self.set_wide_register(register::QUEUE_DRIVER, available);
        self.set_wide_register(register::QUEUE_DEVICE, used);
        self.set_register(register::QUEUE_READY, 1);
        self.set_register(register::STATUS, RUNNING);
        self.register(register::STATUS)
    }

    /// Where the queue of the device is: descriptor table, available ring, used ring.
    fn rings(&self) -> [u64; 3] {
        let base = 0x100_0000 + (self.registers - REGISTERS) * 4;
        [base, monitor::available(base), monitor::used(base)]
    }

    /// Hands the device `len` bytes at `buffer` to fill, and waits until it has; gives the number of bytes
    /// that it did.
    pub fn have_filled(&mut self, buffer: u64, len: u32) -> u32 {
        self.fill(buffer, len).0
    }

    /// The same; gives the time from the kick until it is used, in ticks of the guest's time-stamp counter.
    pub fn time_to_fill(&mut self, buffer: u64, len: u32) -> u64 {
        self.fill(buffer, len).1
    }

    fn fill(&mut self, buffer: u64, len: u32) -> (u32, u64) {
        let [descriptors, ..] = self.rings();
        self.write64(descriptors, buffer);
        self.write64(descriptors + 8, u64::from(len) | DEVICE_WRITES << 32);
        self.offer()
    }

    /// Sends the device a request, for an answer of at most so many bytes; gives the answer.
    pub fn request(&mut self, request: &[u8], answer_len: u32) -> Vec<u8> {
        let [descriptors, ..] = self.rings();
        for (at, word) in (REQUEST..).step_by(8).zip(request.chunks(8)) {
            let mut bytes = [0; 8];
            bytes[..word.len()].copy_from_slice(word);
            self.write64(at, u64::from_le_bytes(bytes));
        }
        let next = |index: u64| CHAINED << 32 | index << 48;
        let second = [ANSWER, u64::from(answer_len) | DEVICE_WRITES << 32];
        let table = [[REQUEST, request.len() as u64 | next(1)], second].concat();
        for (at, word) in (descriptors..).step_by(8).zip(table) {
            self.write64(at, word);
        }
        let (filled, _) = self.offer();
        let words = (ANSWER..).step_by(8).take(filled.div_ceil(8) as usize);
        let mut answer: Vec<_> = words.flat_map(|at| self.read64(at).to_le_bytes()).collect();
        answer.truncate(filled as usize);
        answer
    }

    /// The sum of the first words of so many pages.
    pub fn sum(&mut self, address: u64, pages: u64) -> u64 {
        self.ask(Operation::Sum, 8, address, pages)
    }

    /// Hands the device the chain at descriptor 0: how much of it was filled, and the ticks from the kick
    /// until it is used.
    fn offer(&mut self) -> (u32, u64) {
        let [descriptors, available, used] = self.rings();
        let index = self.read32(available) >> 16;
        // The available ring's entries are 16 bits each; all say descriptor 0. A used ring's are 8 bytes.
        let notify = self.registers + register::QUEUE_NOTIFY;
        let next = u64::from(index as u16 + 1);
        let ticks = self.ask(Operation::Request, self.queue, descriptors, notify << 16 | next);
        let filled = self.read32(used + 4 + u64::from(index % QUEUE_SIZE) * 8 + 4);
        (filled, ticks)
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_for_needs_reset(&mut self) {
        eventually("the device says that it needs a reset", || {
            self.register(register::STATUS) & NEEDS_RESET != 0
        });
    }

    /// The base and length of a shared memory region, as the registers tell; all-ones where there is none.
    pub fn region(&mut self, id: u32) -> (u64, u64) {
        self.set_register(register::SHM_SEL, id);
        let mut wide = |offset| {
            let low = self.register(offset);
            u64::from(self.register(offset + 4)) << 32 | u64::from(low)
        };
        (wide(register::SHM_BASE), wide(register::SHM_LEN))
    }
}
