//! The serial port: a 16550A at COM1, connected to a file, a pipe or a terminal of the host.
//!
//! The vCPU threads write; the main loop brings input. A vCPU thread waits while the reader of the output (a
//! terminal, a pipe) is slow; it holds no lock then, and a signal ends the wait. When the reader is gone,
//! output is dropped and the guest goes on.
//!
//! A guest writes its output byte by byte. It is passed on in pieces, because each piece may wake another
//! process. A piece ends at a newline, at [`PIECE`] bytes, or when the guest seems to be done. It seems so
//! when the guest sets its interrupts (a driver that has nothing more to send switches one off), or reads the
//! line status [`PAUSE`] after its last byte (a program that waits for a key).

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::counter::Counter;
use crate::exit::Exit;

/// The registers that we look at ourselves, by their offsets.
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
/// Read: the reason of an interrupt. Written: the control of the FIFOs.
const INTERRUPT_IDENTIFICATION: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;

/// The most that is kept back. Less than a pipe takes in one piece.
pub const PIECE: usize = 256;
/// Time without another byte after which a read of the line status ends a piece.
pub const PAUSE: Duration = Duration::from_millis(1);

/// INTERRUPT_ENABLE: interrupt me when there is input.
const RECEIVED_DATA: u8 = 1 << 0;
/// INTERRUPT_IDENTIFICATION: the bits with the reason, and two of their values.
const REASON: u8 = 0b1111;
const NO_INTERRUPT: u8 = 0b0001;
const INPUT_IS_THERE: u8 = 0b0100;
/// LINE_STATUS: there is input.
const DATA_READY: u8 = 1 << 0;
/// LINE_CONTROL: offsets 0 and 1 are the divisor of the speed.
const DIVISOR_LATCH: u8 = 1 << 7;
/// MODEM_CONTROL: the port receives its own output.
const LOOPBACK: u8 = 1 << 4;

/// The serial port.
pub struct SerialPort {
    /// Lock order: innermost. Not held while output is written.
    state: Mutex<State>,
    output: Output,
    /// How often it interrupted the guest.
    pub interrupts: Arc<Counter>,
}

struct State {
    uart: Serial<InterruptLine, WantsInput, Vec<u8>>,
    line_control: u8,
    modem_control: u8,
    /// A guest that polls was told of input by the line status.
    was_told: bool,
    /// A guest that polls has read the first byte of the input, which is still in the port.
    has_read: bool,
    /// The input that waited when the port began to receive its own output.
    set_aside: Vec<u8>,
    /// When the guest wrote the last byte that was kept back.
    last_output: Instant,
}

impl State {
    /// Whether the guest has enabled interrupts for input.
    fn is_interrupted(&mut self) -> bool {
        self.line_control & DIVISOR_LATCH == 0 && self.uart.read(INTERRUPT_ENABLE) & RECEIVED_DATA != 0
    }

    /// Whether the guest has enabled interrupts for input, and there is some.
    fn must_signal_input(&mut self) -> bool {
        self.is_interrupted() && self.uart.read(LINE_STATUS) & DATA_READY != 0
    }

    fn read(&mut self, register: u8) -> u8 {
        let took = std::mem::take(&mut self.has_read) && register != INTERRUPT_IDENTIFICATION;
        if took {
            self.uart.read(DATA);
        }
        let takes_input =
            register == DATA && (self.line_control & DIVISOR_LATCH | self.modem_control & LOOPBACK) == 0;
        if takes_input && !self.is_interrupted() {
            self.has_read = std::mem::take(&mut self.was_told);
            let first = self.uart.state().in_buffer.first().copied();
            return first.filter(|_| self.has_read).unwrap_or_default();
        }
        let value = self.uart.read(register);
        self.was_told |= register == LINE_STATUS && value & DATA_READY != 0;
        value
    }

    fn write(&mut self, register: u8, value: u8) {
        if std::mem::take(&mut self.has_read) {
            self.uart.read(DATA);
        }
        // A driver that sets the port up does not take input.
        self.was_told &= register == DATA;
        let begins_or_ends_loopback =
            register == MODEM_CONTROL && (self.modem_control ^ value) & LOOPBACK != 0;
        let aside = if begins_or_ends_loopback { self.exchange_input() } else { Vec::new() };
        match register {
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value,
            _ => {}
        }
        let written = self.uart.write(register, value).and_then(|()| self.uart.enqueue_raw_bytes(&aside));
        if let Err(error) = written {
            log::debug!("serial port: register {register}: {error:?}");
        }
    }

    /// The port begins to receive its own output: its input is set aside. Or it ends that: what is left of
    /// its output goes, and what was set aside is the result.
    fn exchange_input(&mut self) -> Vec<u8> {
        let aside = std::mem::take(&mut self.set_aside);
        // With the divisor in place of the data it stays where it is.
        if self.line_control & DIVISOR_LATCH == 0 {
            let input = self.uart.state().in_buffer;
            for _ in &input {
                self.uart.read(DATA);
            }
            if self.modem_control & LOOPBACK == 0 {
                self.set_aside = input;
            }
        }
        aside
    }

    /// The output that was kept back.
    fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(self.uart.writer_mut())
    }
}

impl SerialPort {
    /// A port that pulses `interrupt`, and signals `wants_input` whenever there may be room for more input.
    pub fn new(interrupt: EventFd, output: Output, wants_input: Arc<EventFd>) -> Self {
        let interrupts = Arc::<Counter>::default();
        let line = InterruptLine(interrupt, Arc::clone(&interrupts));
        SerialPort {
            interrupts,
            state: Mutex::new(State {
                uart: Serial::with_events(line, WantsInput(wants_input), Vec::new()),
                line_control: 0,
                modem_control: 0,
                was_told: false,
                has_read: false,
                set_aside: Vec::new(),
                last_output: Instant::now(),
            }),
            output,
        }
    }

    /// How many bytes of input the guest can take now.
    pub fn room(&self) -> usize {
        let state = self.state();
        if state.modem_control & LOOPBACK == 0 { state.uart.fifo_capacity() } else { 0 }
    }

    /// Gives input to the guest; the number of bytes that it had room for is the result.
    pub fn enqueue(&self, bytes: &[u8]) -> usize {
        self.state().uart.enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    /// Passes on the output that was kept back.
    pub fn flush(&self) {
        let output = self.state().take_output();
        self.output.write(&output);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads one register; the second result is output to pass on.
    fn read_register(&self, register: u8) -> (u8, Vec<u8>) {
        let mut state = self.state();
        let mut value = state.read(register);
        // vm-superio clears the reason when the first byte is read. A driver that reads a limited number of
        // bytes at a time (Linux: 256) and then asks whether there are more would leave the rest in the port,
        // without ever getting another interrupt.
        let silent = register == INTERRUPT_IDENTIFICATION && value & REASON == NO_INTERRUPT;
        if silent && state.must_signal_input() {
            value = value & !REASON | INPUT_IS_THERE;
        }
        let pending = !state.uart.writer().is_empty();
        if pending && register == LINE_STATUS && state.last_output.elapsed() >= PAUSE {
            return (value, state.take_output());
        }
        (value, Vec::new())
    }

    /// Writes one register; the result is output to pass on.
    fn write_register(&self, register: u8, value: u8) -> Vec<u8> {
        let mut state = self.state();
        state.write(register, value);
        if matches!(register, INTERRUPT_ENABLE | MODEM_CONTROL) {
            state.uart.events().in_buffer_empty();
            return state.take_output();
        }
        let pending = state.uart.writer();
        if pending.last() == Some(&b'\n') || pending.len() >= PIECE {
            return state.take_output();
        }
        if !pending.is_empty() {
            state.last_output = Instant::now();
        }
        Vec::new()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // A wide access is one access to each register that it covers.
        for (register, byte) in (offset as u8..).zip(data) {
            let (value, output) = self.read_register(register);
            *byte = value;
            self.output.write(&output);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<Exit> {
        for (register, value) in (offset as u8..).zip(data) {
            self.output.write(&self.write_register(register, *value));
        }
        None
    }
}

struct InterruptLine(EventFd, Arc<Counter>);

impl Trigger for InterruptLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.1.count();
        self.0.write(1)
    }
}

struct WantsInput(Arc<EventFd>);

impl SerialEvents for WantsInput {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        // A write fails only where the counter is at 2^64 - 2; the reader then wakes anyway.
        let _full = self.0.write(1);
    }
}

/// Where the guest's output goes.
pub struct Output {
    file: Option<File>,
    /// Set when the machine stops: waits end then.
    stopping: Arc<AtomicBool>,
    broken: AtomicBool,
}

impl Output {
    /// Output to a file; `None` drops it.
    pub fn new(file: Option<File>, stopping: Arc<AtomicBool>) -> Self {
        Output { file, stopping, broken: AtomicBool::new(false) }
    }

    /// Writes all of it, or drops the rest once the reader is gone or the machine stops.
    fn write(&self, mut bytes: &[u8]) {
        let Some(mut file) = self.file.as_ref() else {
            return;
        };
        while !bytes.is_empty() && !self.broken.load(Ordering::Relaxed) {
            // A machine that has stopped its vCPUs signals no thread any more: never block here then.
            if self.stopping.load(Ordering::SeqCst) && !wait_until_writable(file) {
                return;
            }
            match file.write(bytes) {
                Ok(written) if written > 0 => bytes = &bytes[written..],
                // A signal: look at `stopping` again.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Another process that shares the file has made it non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wait_until_writable(file);
                }
                result => {
                    self.broken.store(true, Ordering::Relaxed);
                    let why = result.map_or_else(|error| error.to_string(), |_| "nothing was written".into());
                    log::warn!("the guest's serial output is dropped from now on: {why}");
                }
            }
        }
    }
}

/// Waits until the file takes more or 100 ms are over. True if the file takes more. A signal does not end it:
/// while the machine stops, many come.
fn wait_until_writable(file: &File) -> bool {
    let until = Instant::now() + Duration::from_millis(100);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let limit = Timespec { tv_sec: 0, tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&limit)) {
            Err(Errno::INTR) if !left.is_zero() => {}
            result => return result == Ok(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;

    use rustix::fs::{OFlags, fcntl_setfl};

    use super::*;

    struct Bench {
        port: SerialPort,
        interrupt: EventFd,
        wants_input: Arc<EventFd>,
    }

    fn bench(output: Option<File>) -> Bench {
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let wants_input = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let output = Output::new(output, Arc::default());
        let port = SerialPort::new(interrupt.try_clone().unwrap(), output, Arc::clone(&wants_input));
        Bench { port, interrupt, wants_input }
    }

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    }

    #[test]
    fn output_reaches_the_file() {
        let (mut reader, writer) = pipe();
        let bench = bench(Some(writer));
        for byte in b"hello" {
            bench.port.write(0, &[*byte]);
        }
        bench.port.flush();
        drop(bench);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
    }

    /// What has arrived by now.
    fn arrived(reader: &mut File) -> usize {
        let mut bytes = [0; 4096];
        fcntl_setfl(&*reader, OFlags::NONBLOCK).unwrap();
        reader.read(&mut bytes).unwrap_or(0)
    }

    #[test]
    fn output_comes_in_pieces_that_do_not_wait_for_more() {
        let (mut reader, writer) = pipe();
        let bench = bench(Some(writer));
        let write =
            |bytes: &[u8]| bytes.iter().for_each(|byte| assert_eq!(bench.port.write(0, &[*byte]), None));
        write(b"a line");
        assert_eq!(arrived(&mut reader), 0);
        write(b"\r\n");
        assert_eq!(arrived(&mut reader), 8);
        // A prompt of a driver with interrupts, and of a program that polls.
        write(b"login: ");
        bench.port.write(1, &[RECEIVED_DATA]);
        assert_eq!(arrived(&mut reader), 7);
        write(b"> ");
        std::thread::sleep(PAUSE);
        bench.port.read(LINE_STATUS.into(), &mut [0]);
        assert_eq!(arrived(&mut reader), 2);
        write(&[b'.'; PIECE + 1]);
        assert_eq!(arrived(&mut reader), PIECE);
    }

    #[test]
    fn output_without_a_reader_is_dropped() {
        let (reader, writer) = pipe();
        drop(reader);
        let bench = bench(Some(writer));
        for _ in 0..3 {
            assert_eq!(bench.port.write(0, b"\n"), None);
        }
    }

    #[test]
    fn a_stopping_machine_does_not_wait_for_the_reader() {
        let (_reader, writer) = pipe();
        fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
        let stopping = Arc::new(AtomicBool::new(false));
        let output = Output::new(Some(writer), Arc::clone(&stopping));
        let thread = std::thread::spawn(move || output.write(&vec![0; 1 << 20]));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!thread.is_finished());
        stopping.store(true, Ordering::SeqCst);
        thread.join().unwrap();
    }

    fn read(bench: &Bench, register: u8) -> u8 {
        let mut byte = [0];
        bench.port.read(register.into(), &mut byte);
        byte[0]
    }

    #[test]
    fn a_driver_with_interrupts_gets_input_as_far_as_there_is_room() {
        let bench = bench(None);
        bench.port.write(1, &[RECEIVED_DATA]);
        let _seen = bench.wants_input.read();
        let room = bench.port.room();
        assert_eq!(room, 64);

        assert_eq!(bench.port.enqueue(&[b'x'; 100]), room);
        assert_eq!(bench.port.room(), 0);
        assert!(bench.interrupt.read().is_ok());
        for left in (0..room).rev() {
            assert_eq!(read(&bench, 0), b'x');
            assert_eq!(bench.wants_input.read().is_ok(), left == 0, "{left}");
        }
    }

    #[test]
    fn a_guest_that_polls_gets_every_byte() {
        let bench = bench(None);
        assert_eq!(bench.port.enqueue(b"abc"), 3);
        for expected in *b"abc" {
            assert_eq!(read(&bench, LINE_STATUS) & DATA_READY, DATA_READY);
            // It may write, and look again, before it reads.
            bench.port.write(0, b".");
            assert_eq!(read(&bench, LINE_STATUS) & DATA_READY, DATA_READY);
            assert_eq!(read(&bench, 0), expected);
        }
        assert_eq!(read(&bench, LINE_STATUS) & DATA_READY, 0);
        assert!(bench.wants_input.read().is_ok());
    }

    #[test]
    fn a_driver_that_starts_loses_no_input() {
        // What Linux does: the probe writes to INTERRUPT_ENABLE, empties the port and reads the data; the
        // start reads all registers, twice, and the end empties the port.
        let bench = bench(None);
        assert_eq!(bench.port.enqueue(b"ab"), 2);
        for enabled in [0, 0xf, 0] {
            bench.port.write(1, &[enabled]);
        }
        read(&bench, LINE_STATUS);
        bench.port.write(INTERRUPT_IDENTIFICATION.into(), &[0x7]);
        assert_eq!(read(&bench, 0), 0);
        for _ in 0..2 {
            for register in [LINE_STATUS, DATA, INTERRUPT_IDENTIFICATION, 6] {
                read(&bench, register);
            }
        }
        let _spurious = bench.interrupt.read();
        bench.port.write(1, &[RECEIVED_DATA]);
        assert!(bench.interrupt.read().is_ok());
        assert_eq!(read(&bench, INTERRUPT_IDENTIFICATION) & REASON, INPUT_IS_THERE);
        assert_eq!(read(&bench, 0), b'a');
        bench.port.write(1, &[0]);
        bench.port.write(INTERRUPT_IDENTIFICATION.into(), &[0x7]);
        assert_eq!(read(&bench, 0), 0);
        bench.port.write(1, &[RECEIVED_DATA]);
        assert_eq!(read(&bench, 0), b'b');
    }

    #[test]
    fn a_test_of_the_port_by_its_own_output_sees_no_input() {
        let bench = bench(None);
        assert_eq!(bench.port.enqueue(b"ab"), 2);
        bench.port.write(MODEM_CONTROL.into(), &[LOOPBACK]);
        bench.port.write(0, &[0xae]);
        assert_eq!(read(&bench, 0), 0xae);
        bench.port.write(0, &[0xaf]);
        bench.port.write(MODEM_CONTROL.into(), &[0]);
        for expected in *b"ab" {
            assert_eq!(read(&bench, LINE_STATUS) & DATA_READY, DATA_READY);
            assert_eq!(read(&bench, 0), expected);
        }
        assert_eq!(read(&bench, LINE_STATUS) & DATA_READY, 0);
    }

    #[test]
    fn input_is_told_of_until_all_of_it_is_read() {
        let bench = bench(None);
        let identification = || {
            let mut byte = [0];
            bench.port.read(2, &mut byte);
            byte[0] & REASON
        };
        bench.port.write(1, &[RECEIVED_DATA]);
        assert_eq!(bench.port.enqueue(b"ab"), 2);
        for _ in 0..2 {
            assert_eq!(identification(), INPUT_IS_THERE);
            assert_eq!(identification(), INPUT_IS_THERE, "asking is not reading");
            bench.port.read(0, &mut [0]);
        }
        assert_eq!(identification(), NO_INTERRUPT);
        bench.port.write(1, &[0]);
        assert_eq!(bench.port.enqueue(b"c"), 1);
        assert_eq!(identification(), NO_INTERRUPT, "nobody wants to know");
    }

    #[test]
    fn a_port_that_talks_to_itself_takes_no_input() {
        let bench = bench(None);
        bench.port.write(1, &[RECEIVED_DATA]);
        bench.port.write(4, &[LOOPBACK]);
        assert_eq!(bench.port.room(), 0);
        let _seen = bench.wants_input.read();
        bench.port.write(4, &[0]);
        assert!(bench.wants_input.read().is_ok());
        assert_eq!(bench.port.room(), 64);
    }

    #[test]
    fn any_access_is_answered() {
        let bench = bench(None);
        for offset in 0..8 {
            for len in 0..=8 - offset {
                let mut data = vec![0; len];
                bench.port.read(offset as u64, &mut data);
                assert_eq!(bench.port.write(offset as u64, &data), None);
            }
        }
    }
}
