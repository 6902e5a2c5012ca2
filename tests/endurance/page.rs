//! Files in memory, as words that this process sees too.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use hotslot_test_support::files::memfd;

/// A file, mapped here as long as the value lives.
pub struct Words {
    file: File,
    words: *mut AtomicU64,
    count: usize,
}

// SAFETY: the pointer is to a mapping that the value owns, which is only accessed as atomics.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}

impl Words {
    /// A file of zeroes.
    pub fn new(count: usize) -> Words {
        let file = memfd(count as u64 * 8);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing of ours.
        let words = unsafe {
            libc::mmap(std::ptr::null_mut(), count * 8, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(words, libc::MAP_FAILED);
        Words { file, words: words.cast(), count }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Not for a file that was cut short.
    fn words(&self) -> &[AtomicU64] {
        // SAFETY: so many words are mapped until the value is dropped.
        unsafe { std::slice::from_raw_parts(self.words, self.count) }
    }

    pub fn get(&self, index: usize) -> u64 {
        self.words()[index].load(Ordering::SeqCst)
    }

    pub fn set(&self, index: usize, value: u64) {
        self.words()[index].store(value, Ordering::SeqCst);
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, and nobody uses it any more.
        unsafe { libc::munmap(self.words.cast(), self.count * 8) };
    }
}
