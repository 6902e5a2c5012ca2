//! Huge pages of the host, which need a reservation (hugetlbfs).

use std::fs;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// While it lives, this machine has so many more huge pages.
pub struct HugePages {
    count: PathBuf,
    before: u64,
    _alone: MutexGuard<'static, ()>,
}

/// One test at a time has them.
static TAKEN: Mutex<()> = Mutex::new(());

impl HugePages {
    /// `count` pages of `size` bytes; `None` where this process may not have them, or the host has no room.
    pub fn reserve(size: u64, count: u64) -> Option<HugePages> {
        let alone = TAKEN.lock().unwrap_or_else(PoisonError::into_inner);
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages", size >> 10);
        let read = || fs::read_to_string(&path).ok()?.trim().parse::<u64>().ok();
        let reserved = HugePages { count: PathBuf::from(&path), before: read()?, _alone: alone };
        fs::write(&path, (reserved.before + count).to_string()).ok()?;
        (read()? >= reserved.before + count).then_some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(&self.count, self.before.to_string()).unwrap();
    }
}
