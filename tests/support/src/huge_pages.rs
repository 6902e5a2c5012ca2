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

/// A cgroup that gives its processes no huge pages of 2 MiB. It exists until it is dropped.
pub struct NoHugePages(PathBuf);

impl NoHugePages {
    /// `None` where this process may not make one, or the host has no such limit.
    pub fn new() -> Option<NoHugePages> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let root = mounts.lines().find_map(|line| {
            let mut words = line.split(' ').skip(1);
            let place = words.next()?;
            (words.next() == Some("cgroup2")).then(|| PathBuf::from(place))
        })?;
        fs::write(root.join("cgroup.subtree_control"), "+hugetlb").ok()?;
        let group = NoHugePages(root.join(format!("hotslot-test-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join("hugetlb.2MB.max"), "0").ok()?;
        Some(group)
    }

    /// To write 0 to: the process that does is in the cgroup from then on.
    pub fn processes(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for NoHugePages {
    fn drop(&mut self) {
        // It fails where there is none.
        let _ = fs::remove_dir(&self.0);
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(&self.count, self.before.to_string()).unwrap();
    }
}
