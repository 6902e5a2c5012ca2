//! The story of a machine: build, run, shut down.
//!
//! [`Vmm::build`] refuses everything that can be refused, before the guest's first instruction. [`Vmm::run`]
//! starts a thread for each vCPU and serves the rest from the main loop, until the machine ends.
//!
//! | file | what it does |
//! |---|---|
//! | `build` | the set-up, in one function that reads from top to bottom |
//! | `backends` | the set-up's part for virtio devices: connect and negotiate, place windows, attach |
//! | `run` | starts and stops the vCPU threads, and the main loop |
//! | `exit_once` | how the machine ends: set by any thread, awaited by the main loop and by `signals` |
//! | `signals` | the thread that takes SIGTERM and the like, SIGUSR1, which prints the `memory_map` and the `stats`, and SIGUSR2 for a `dump` |
//! | `writer` | a thread that writes a file when it is asked to: those of `picture`, `dump` and `stats` |
//! | `picture` | the thread that draws the memory of the running machine |
//! | `layout_picture` | the picture of the memory of a configured machine |
//! | `console` | the host's side of the serial port, and the escape key |
//! | `gdb` | the thread that serves gdb: breakpoints, registers, memory |
//! | `dump` | the thread that writes a core file of the machine |
//! | `stats` | what was counted, for people and as JSON lines |
//! | `stuck` | finds vCPUs that wait in KVM for a page that the host cannot provide (SHM-45, SHM-87) |

mod backends;
mod build;
mod console;
mod dump;
mod error;
mod exit_once;
mod gdb;
pub mod layout_picture;
mod memory_map;
mod picture;
mod run;
mod signals;
mod stats;
mod stuck;
mod writer;

use std::sync::Arc;

use crate::arch::x86_64::reset::Resets;
use crate::kvm::vcpu::{Machine, VcpuState};
use crate::kvm::vm::Processor;

use console::Console;
use dump::DumpFile;
use exit_once::ExitOnce;
use gdb::Gdb;
use memory_map::MemoryMap;
use picture::PictureFile;
use stats::{Stats, StatsFile};

/// A machine that is ready to run.
///
/// RAM and the register pages are not here: each [`Processor`] owns a reference to the machine's memory
/// slots, and these own the machine and, after it, the memory. So the order in which these fields are dropped
/// does not matter.
pub struct Vmm {
    vcpus: Vec<(Processor, VcpuState)>,
    /// With the devices on its buses, and their connections to back-ends.
    machine: Arc<Machine>,
    console: Console,
    memory_map: Arc<MemoryMap>,
    picture: Option<PictureFile>,
    stats: Arc<Stats>,
    stats_file: Option<StatsFile>,
    resets: Resets,
    /// What to say when the guest crashes.
    crash_hint: Option<&'static str>,
    gdb: Option<Gdb>,
    dump: Option<DumpFile>,
    exit: Arc<ExitOnce>,
}
