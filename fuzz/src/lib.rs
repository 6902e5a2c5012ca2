//! What the fuzz targets share: how they read the fuzzer's bytes, and what they look at around each input.
//!
//! The back-end's ends of the sockets are those of `tests/support`: raw bytes.

use std::fmt::Write;

use hotslot_test_support::bench;

/// The fuzzer's bytes, from front to back. Whatever is read beyond their end is 0, so that any bytes mean
/// something.
pub struct Input {
    bytes: Vec<u8>,
    at: usize,
}

impl Input {
    pub fn new(bytes: &[u8]) -> Input {
        Input { bytes: bytes.to_vec(), at: 0 }
    }

    /// Whether there are bytes left.
    pub fn has_more(&self) -> bool {
        self.at < self.bytes.len()
    }

    /// The next bytes; fewer than `len` at the end.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let end = self.at.saturating_add(len).min(self.bytes.len());
        let bytes = self.bytes[self.at..end].to_vec();
        self.at = end;
        bytes
    }

    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    pub fn word(&mut self) -> u32 {
        self.quad_of(4) as u32
    }

    pub fn quad(&mut self) -> u64 {
        self.quad_of(8)
    }

    fn quad_of(&mut self, len: usize) -> u64 {
        let mut bytes = [0; 8];
        let given = self.bytes(len);
        bytes[..given.len()].copy_from_slice(&given);
        u64::from_le_bytes(bytes)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::from(self.byte()) % from.len()]
    }

    /// An offset or a length in bytes: mostly whole pages, few of them; else a little, nearly 2^64, or
    /// anything.
    pub fn offset(&mut self) -> u64 {
        match self.byte() {
            pages @ ..0xc0 => u64::from(pages) * bench::PAGE,
            little @ 0xc0..0xe0 => u64::from(little - 0xc0) * 0x101,
            most @ 0xe0..0xf0 => u64::MAX - u64::from(most - 0xe0) * bench::PAGE,
            _ => self.quad(),
        }
    }
}

/// Makes what is logged be formatted, and throws it away. Called by each target for each input.
pub fn log_to_nobody() {
    struct Nobody;
    impl log::Log for Nobody {
        fn enabled(&self, _: &log::Metadata) -> bool {
            true
        }
        fn log(&self, record: &log::Record) {
            let _ = write!(String::new(), "{}", record.args());
        }
        fn flush(&self) {}
    }
    // It fails from the second input on: a process has one logger.
    if log::set_logger(&Nobody).is_ok() {
        log::set_max_level(log::LevelFilter::Trace);
    }
}

/// How many file descriptors the process has.
pub fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}
