//! The descriptors that this process may have (RLIMIT_NOFILE), shared out, so that no use of them starves
//! another. Called by [`super`] at the start.

use rustix::process::{Resource, Rlimit};

/// Where there is no limit: fs.nr_open, as Linux has it by default.
const NO_LIMIT: u64 = 1 << 20;
/// The most files whose descriptors are kept for the case that they are needed again. Each keeps about a
/// kilobyte of the host's kernel memory, and saves a few microseconds.
const MAX_CACHED: usize = 1 << 16;

/// The most descriptors of each kind.
#[derive(Clone, Copy)]
pub struct Descriptors {
    /// Files and directories that the guest has open: half of the limit.
    pub open: usize,
    /// Files that the guest knows: an eighth. They can be opened again.
    pub cached: usize,
    /// Files without a name that the guest knows: an eighth. They could not be opened again.
    pub pinned: usize,
    /// Files that the guest has locked, for each owner (`--locks host`): a sixteenth.
    pub locks: usize,
    // The rest is left: for sockets, queues, the guest's memory, and for files that are open during one
    // request.
}

impl Descriptors {
    /// Raises the limit as far as we may, and shares it out.
    pub fn raise_limit() -> Self {
        let limit = rustix::process::getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, ..limit };
        // If it fails, the guest gets ENFILE sooner.
        let _ = rustix::process::setrlimit(Resource::Nofile, raised);
        let all = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(NO_LIMIT);
        let all = usize::try_from(all).unwrap_or(usize::MAX);
        Descriptors { open: all / 2, cached: (all / 8).min(MAX_CACHED), pinned: all / 8, locks: all / 16 }
    }
}
