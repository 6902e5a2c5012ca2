//! Running a machine: the vCPU threads, the main loop, and the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use super::Vmm;
use super::console::Console;
use super::dump;
use super::error::{VmmError, failed_to};
use super::exit_once::{Ending, ExitOnce};
use super::memory_map::MemoryMap;
use super::picture;
use super::signals::{self, Writers};
use super::stats::{self, Stats};
use super::stuck::{self, StuckWatch};
use crate::arch::x86_64::reset::Resets;
use crate::devices::serial::SerialPort;
use crate::exit::Exit;
use crate::kvm::vcpu::{Machine, Vcpu, VcpuState};
use crate::kvm::vm::{KvmError, Processor};
use crate::report::{Failure, lines, say};
use crate::sandbox::vmm::Kind;
use crate::terminal::RawTerminal;

type MainLoop = EventManager<Box<dyn MutEventSubscriber>>;

/// How long the processors' threads have to stop. One that waits for a back-end or for a page is left behind.
const STOP_PROCESSORS: Duration = Duration::from_secs(2);

impl Vmm {
    /// Runs the machine until it ends. That is the end of the process, too: nothing is unmapped, closed or
    /// joined first, since each of these can wait for a back-end's file.
    pub fn run(self) -> ! {
        let Vmm {
            vcpus,
            machine,
            console,
            memory_map,
            picture,
            stats,
            stats_file,
            resets,
            crash_hint,
            gdb,
            dump,
            exit,
        } = self;
        let serial_port = Arc::clone(&console.port);
        let start_writers = || -> Result<Writers, VmmError> {
            Ok(Writers {
                painter: picture.map(|file| file.start(Arc::clone(&memory_map))).transpose()?,
                dumper: dump.is_some().then(Arc::default),
                stats_writer: stats_file.map(|file| file.start(Arc::clone(&stats))).transpose()?,
            })
        };
        let ready = start_writers().and_then(|writers| {
            Ok((set_up(console, memory_map, Arc::clone(&stats), writers.clone(), &exit)?, writers))
        });
        let ((events, raw_while_it_runs), writers) = match ready {
            Ok(ready) => ready,
            Err(error) => end(&Ending::from(&error as &dyn Failure)),
        };
        let processors = start(vcpus, &machine, &Arc::new(resets), &exit);
        let gdb = gdb.map_or(Ok(()), |gdb| gdb.start(&machine, &processors, &exit));
        let dump = dump.zip(writers.dumper.clone());
        let dump = dump.map_or(Ok(()), |(dump, dumper)| dump.start(dumper, &machine, &processors));
        if let Err(error) = gdb.and(dump) {
            exit.set((&error as &dyn Failure).into());
        }
        Kind::MainLoop.confine();
        let ending = serve(events, &exit);
        if let Some(hint) = crash_hint.filter(|_| ending.status == u8::from(&Exit::Crash(String::new()))) {
            say(format_args!("hint: {hint}"));
        }

        stop(&processors, &machine);
        finish(&writers, &serial_port, ending.is_fault);
        log::info!("{}", stats.snapshot());
        machine.missing_pages.log_total();
        drop(raw_while_it_runs);
        end(&ending)
    }
}

/// Has what the user asked for written a last time.
fn finish(writers: &Writers, serial_port: &SerialPort, is_fault: bool) {
    if let Some(dumper) = &writers.dumper {
        dump::finish(dumper, is_fault);
    }
    serial_port.flush();
    if let Some(painter) = &writers.painter {
        picture::finish(painter);
    }
    if let Some(stats_writer) = &writers.stats_writer {
        stats::finish(stats_writer);
    }
}

fn end(ending: &Ending) -> ! {
    lines::end(&ending.last, ending.status)
}

/// Signals, terminal, main loop.
fn set_up(
    console: Console,
    memory_map: Arc<MemoryMap>,
    stats: Arc<Stats>,
    writers: Writers,
    exit: &Arc<ExitOnce>,
) -> Result<(MainLoop, Option<RawTerminal>), VmmError> {
    signals::watch(Arc::clone(exit), memory_map, stats, writers)?;
    let raw_while_it_runs = console.make_raw()?;
    let mut events =
        MainLoop::new().map_err(|error| failed_to("make the main loop")(io::Error::other(error)))?;
    events.add_subscriber(Box::new(Arc::clone(exit)));
    events.add_subscriber(Box::new(console));
    Ok((events, raw_while_it_runs))
}

/// The main loop: serial input, until the end is set. It takes no lock that another thread holds while it
/// waits.
fn serve(mut events: MainLoop, exit: &ExitOnce) -> Ending {
    loop {
        if let Some(ending) = exit.get() {
            return ending;
        }
        if let Err(error) = events.run() {
            exit.set((&failed_to("wait for events")(io::Error::other(error)) as &dyn Failure).into());
        }
    }
}

/// Starts the processors' threads, and the one that looks for stuck processors. If one cannot be started, the
/// machine ends.
fn start(
    vcpus: Vec<(Processor, VcpuState)>,
    machine: &Arc<Machine>,
    resets: &Arc<Resets>,
    exit: &Arc<ExitOnce>,
) -> Arc<Vec<Vcpu>> {
    let mut processors = Vec::new();
    let failed = |what, error| exit.set((&failed_to(what)(error) as &dyn Failure).into());
    for (processor, state) in vcpus {
        let (ended, resets) = (Arc::clone(exit), Arc::clone(resets));
        let ended = move |result: Result<Option<Exit>, KvmError>| match result {
            Ok(None) => {}
            Ok(Some(exit)) => ended.set((&resets.look_at(exit)).into()),
            Err(error) => ended.set((&error as &dyn Failure).into()),
        };
        match Vcpu::spawn(processor, state, Arc::clone(machine), ended) {
            Ok(vcpu) => processors.push(vcpu),
            Err(error) => {
                failed("start a vCPU's thread", error);
                break;
            }
        }
    }
    let processors = Arc::new(processors);
    let watch = StuckWatch::new(Arc::clone(&machine.missing_pages));
    if let Err(error) = stuck::spawn(watch, Arc::clone(&processors)) {
        failed("start the thread that looks for stuck vCPUs", error);
    }
    processors
}

/// Stops the processors' threads, and waits for them until [`STOP_PROCESSORS`].
fn stop(processors: &[Vcpu], machine: &Machine) {
    machine.stopping.store(true, Ordering::SeqCst);
    machine.pause.wake();
    let start = Instant::now();
    // Repeated: a signal may arrive just before a thread blocks in a write of the serial port's output.
    while !processors.iter().all(Vcpu::has_ended) && start.elapsed() < STOP_PROCESSORS {
        processors.iter().for_each(Vcpu::interrupt);
        sleep(Duration::from_millis(1));
    }
}
