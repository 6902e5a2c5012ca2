//! A running `hotslot` with the monitor as its guest, and a virtio driver made of the monitor's reads and writes.

#![allow(dead_code)] // Not every test program uses all of it.

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::monitor::{self, Operation};

/// Longer than anything here takes, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The first device's register block.
pub const REGISTERS: u64 = 0xd000_0000;
/// The I/O port of `--debug-exit`.
const DEBUG_EXIT: u64 = 0xf4;

pub struct Guest {
    hotslot: Child,
    stdin: ChildStdin,
    stdout: ChildStdout,
    _kernel: tempfile::NamedTempFile,
    log: tempfile::NamedTempFile,
    /// The registers of the device that the driver below drives.
    registers: u64,
}

/// The monitor as a file.
pub fn kernel() -> tempfile::NamedTempFile {
    let kernel = tempfile::NamedTempFile::new().unwrap();
    kernel.as_file().write_all(&monitor::elf()).unwrap();
    kernel
}

/// hotslot with the monitor, ready for more options.
pub fn command(kernel: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hotslot"));
    command.args(["-m", "64M", "--debug-exit", "-k"]).arg(kernel);
    command
}

impl Guest {
    /// Boots the monitor with these further options of hotslot.
    pub fn boot<I: AsRef<std::ffi::OsStr>>(options: impl IntoIterator<Item = I>) -> Guest {
        let kernel = kernel();
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut hotslot = command(kernel.path())
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (hotslot.stdin.take().unwrap(), hotslot.stdout.take().unwrap());
        Guest {
            hotslot,
            stdin,
            stdout,
            _kernel: kernel,
            log,
            registers: REGISTERS,
        }
    }

    /// Boots it with one device whose back-end listens on `socket`; `extra` are further keys of the device string.
    pub fn with_device(socket: &Path, extra: &str) -> Guest {
        Guest::boot([
            "--vhost-user".to_string(),
            format!("{},{extra}", socket.display()),
        ])
    }

    fn ask(&mut self, operation: Operation, width: u8, address: u64, value: u64) -> u64 {
        let mut request = vec![operation as u8, width];
        request.extend(address.to_le_bytes());
        request.extend(value.to_le_bytes());
        self.stdin
            .write_all(&request)
            .unwrap_or_else(|error| self.fail(&error.to_string()));
        let mut answer = [0; 8];
        for byte in &mut answer {
            self.wait_for_output();
            if let Err(error) = self.stdout.read_exact(std::slice::from_mut(byte)) {
                self.fail(&error.to_string());
            }
        }
        u64::from_le_bytes(answer)
    }

    fn wait_for_output(&self) {
        let mut poll = libc::pollfd {
            fd: self.stdout.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, on our stack.
        if unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as i32) } != 1 {
            self.fail("the guest does not answer");
        }
    }

    fn fail(&self, what: &str) -> ! {
        panic!("{what}; hotslot said:\n{}", self.log());
    }

    /// What hotslot printed on stderr so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// Waits until hotslot has printed `text` on stderr.
    pub fn wait_for_log(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            if start.elapsed() > PATIENCE {
                self.fail(&format!("no '{text}'"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.hotslot.id() as i32
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

    pub fn in8(&mut self, port: u16) -> u8 {
        self.ask(Operation::In, 1, port.into(), 0) as u8
    }

    /// Enables or disables interrupts in the processor. None comes either way, unless the test arranges for it.
    pub fn set_interrupts(&mut self, enabled: bool) {
        // The old interrupt controller takes none: the serial port would interrupt us through it.
        self.out8(0x21, 0xff);
        self.out8(0xa1, 0xff);
        self.ask(Operation::Interrupts, 1, 0, enabled.into());
    }

    /// Sends an operation whose answer never comes because the machine ends, and waits for that.
    pub fn end_with(
        mut self,
        operation: Operation,
        width: u8,
        address: u64,
        value: u64,
    ) -> (ExitStatus, String) {
        let mut request = vec![operation as u8, width];
        request.extend(address.to_le_bytes());
        request.extend(value.to_le_bytes());
        self.stdin.write_all(&request).unwrap();
        self.wait()
    }

    /// Ends the machine through the debug-exit port; it must end with this very status.
    pub fn exit(self) {
        let (status, log) = self.end_with(Operation::Out, 1, DEBUG_EXIT, 42);
        assert_eq!(status.code(), Some(42), "{log}");
    }

    /// Waits for the end of hotslot; gives its status and what it printed on stderr.
    pub fn wait(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.hotslot.try_wait().unwrap() {
                return (status, self.log());
            }
            if start.elapsed() > PATIENCE {
                self.fail("hotslot does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ = self.hotslot.kill();
        let _ = self.hotslot.wait();
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

/// The driver, of the first device unless [`Guest::select`] said otherwise.
impl Guest {
    /// From now on the driver drives this device.
    pub fn select(&mut self, device: u64) {
        self.registers = REGISTERS + device * 0x1000;
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

    /// Takes the device from reset to DRIVER_OK, with VIRTIO_F_VERSION_1, feature bit 0 where it is offered, and its first
    /// queue in RAM at 16 MiB.
    pub fn start_device(&mut self) {
        self.reset_device();
        self.set_register(register::STATUS, ACKNOWLEDGE);
        self.set_register(register::STATUS, ACKNOWLEDGE | DRIVER);
        self.set_register(register::DEVICE_FEATURES_SEL, 0);
        let low = self.register(register::DEVICE_FEATURES) & 1;
        for (word, features) in [(0, low), (1, 1)] {
            self.set_register(register::DRIVER_FEATURES_SEL, word);
            self.set_register(register::DRIVER_FEATURES, features);
        }
        let status = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set_register(register::STATUS, status);
        assert_eq!(self.register(register::STATUS), status);
        self.set_register(register::QUEUE_SEL, 0);
        self.set_register(register::QUEUE_SIZE, 8);
        self.set_wide_register(register::QUEUE_DESC, 0x100_0000);
        self.set_wide_register(register::QUEUE_DRIVER, 0x100_1000);
        self.set_wide_register(register::QUEUE_DEVICE, 0x100_2000);
        self.set_register(register::QUEUE_READY, 1);
        self.set_register(register::STATUS, status | DRIVER_OK);
        assert_eq!(
            self.register(register::STATUS),
            status | DRIVER_OK,
            "{}",
            self.log()
        );
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
