//! The machine's statistics: what its threads and devices have counted, beside what KVM has counted itself.
//!
//! SIGUSR1 prints them as a table, and so does the end with `-v`. With `--stats FILE` the thread `stats` adds
//! a line of JSON to the file at each SIGUSR1 and at the end.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use super::error::{VmmError, failed_to};
use super::memory_map::{DeviceMemory, MemoryMap};
use super::writer::Writer;
use crate::counter::Counts;
use crate::devices::serial::SerialPort;
use crate::kvm::counters::VcpuCounters;
use crate::kvm::slots::Slots;
use crate::kvm::stats::KvmStatistics;
use crate::kvm::vcpu::Machine;
use crate::report::{create, lines};
use crate::sandbox::vmm::Kind;
use crate::thread;

/// The name of the serial port in the statistics.
pub(super) const COM1: &str = "com1";

/// How long the end of the machine waits for the last line of the file.
const LAST_LINE: Duration = Duration::from_secs(1);

/// Where everything is counted.
pub(super) struct Stats {
    pub began: Instant,
    pub machine: Arc<Machine>,
    /// Of each processor, the thread's counters and KVM's.
    pub vcpus: Vec<(Arc<VcpuCounters>, Option<Arc<KvmStatistics>>)>,
    pub memory_map: Arc<MemoryMap>,
    pub serial_port: Arc<SerialPort>,
    pub slots: Arc<Slots>,
    pub kvm: Option<KvmStatistics>,
}

/// The statistics at one moment. As a text it is a table without what is 0.
#[derive(Serialize)]
pub(super) struct Snapshot {
    /// How long the machine has existed.
    run_ms: u64,
    vcpus: Vec<Vcpu>,
    devices: Vec<Device>,
    unclaimed: Named,
    slots: Named,
    kvm: Named,
}

#[derive(Serialize)]
struct Vcpu {
    #[serde(flatten)]
    counts: Named,
    kvm: Named,
}

#[derive(Serialize)]
struct Device {
    name: String,
    #[serde(flatten)]
    counts: Named,
}

/// In JSON an object.
struct Named(Counts);

impl Serialize for Named {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, count)| (name, count)))
    }
}

impl Stats {
    /// Reads all counters. May wait for the locks of all devices.
    pub fn snapshot(&self) -> Snapshot {
        let of_kvm = |statistics: Option<&KvmStatistics>| {
            Named(statistics.map_or_else(Vec::new, KvmStatistics::counts))
        };
        let vcpu = |(counters, statistics): &(Arc<VcpuCounters>, Option<Arc<KvmStatistics>>)| Vcpu {
            counts: Named(counters.counts()),
            kvm: of_kvm(statistics.as_deref()),
        };
        Snapshot {
            run_ms: self.began.elapsed().as_millis() as u64,
            vcpus: self.vcpus.iter().map(vcpu).collect(),
            devices: self.devices(),
            unclaimed: Named(self.machine.unclaimed.counts()),
            slots: Named(self.slots.counters.counts()),
            kvm: of_kvm(self.kvm.as_ref()),
        }
    }

    fn devices(&self) -> Vec<Device> {
        let Machine { ports, mmio, .. } = &*self.machine;
        let at_ports = ports.counts().into_iter().map(|(_, name, mut counts)| {
            if name == COM1 {
                counts.push(("interrupts".to_owned(), self.serial_port.interrupts.get()));
            }
            Device { name, counts: Named(counts) }
        });
        let at_addresses = mmio.counts().into_iter().map(|(address, name, mut counts)| {
            let is_it = |device: &&DeviceMemory| device.registers.start() == address;
            if let Some(device) = self.memory_map.devices.iter().find(is_it) {
                counts.extend(device.transport.counts());
                counts.extend(device.requests.counts());
                counts.extend(device.shmem.counts());
            }
            Device { name, counts: Named(counts) }
        });
        at_ports.chain(at_addresses).collect()
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Snapshot { run_ms, vcpus, devices, unclaimed, slots, kvm } = self;
        let mut groups = Vec::new();
        for (id, vcpu) in vcpus.iter().enumerate() {
            groups.push((format!("vcpu{id}"), &vcpu.counts));
            groups.push((format!("vcpu{id} (KVM)"), &vcpu.kvm));
        }
        groups.extend(devices.iter().map(|device| (device.name.clone(), &device.counts)));
        groups.extend(
            [("unclaimed", unclaimed), ("slots", slots), ("KVM", kvm)]
                .map(|(of, counts)| (of.to_owned(), counts)),
        );
        write!(f, "statistics after {}.{:03} s, without what is 0:", run_ms / 1000, run_ms % 1000)?;
        for (mut of, Named(counts)) in groups {
            for (name, count) in counts.iter().filter(|(_, count)| *count > 0) {
                write!(f, "\n  {of:<16} {name:<20} {count:>14}")?;
                of.clear();
            }
        }
        Ok(())
    }
}

/// The file for `--stats`.
pub(super) struct StatsFile {
    path: PathBuf,
    file: File,
    /// It takes no more.
    has_failed: AtomicBool,
}

impl StatsFile {
    /// Creates or empties it.
    pub fn create(path: &Path) -> Result<StatsFile, VmmError> {
        let file = create(path).map_err(|error| VmmError::StatsFile(path.to_owned(), error))?;
        Ok(StatsFile { path: path.to_owned(), file, has_failed: AtomicBool::new(false) })
    }

    /// Starts the thread.
    pub fn start(self, stats: Arc<Stats>) -> Result<Arc<Writer>, VmmError> {
        let writer = Arc::<Writer>::default();
        let orders = Arc::clone(&writer);
        thread::spawn("stats".into(), Kind::Helper, move || orders.serve(|| self.add_line(&stats)))
            .map_err(failed_to("start the thread for the statistics"))?;
        Ok(writer)
    }

    fn add_line(&self, stats: &Stats) {
        // After a line that is written in part, no other may follow.
        if self.has_failed.load(Ordering::Relaxed) {
            return;
        }
        let line = serde_json::to_vec(&stats.snapshot()).map_err(io::Error::from);
        let written = line.and_then(|mut line| {
            line.push(b'\n');
            lines::write_all(self.file.as_fd(), &line)
        });
        if let Err(error) = written {
            self.has_failed.store(true, Ordering::Relaxed);
            let path = self.path.display();
            log::warn!("the statistics {path} end here, and the machine goes on: {error}");
        }
    }
}

/// Orders the last line, and waits until [`LAST_LINE`].
pub(super) fn finish(writer: &Writer) {
    writer.order();
    if !writer.wait(LAST_LINE) {
        log::warn!("the statistics lack their last line: it was not written in {LAST_LINE:?}");
    }
}
