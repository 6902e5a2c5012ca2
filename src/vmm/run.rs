//! Running a machine: the vCPU threads, the main loop, and the end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};

use super::Vmm;
use super::error::failed_to;
use super::exit_once::ExitOnce;
use super::signals::Signals;
use super::stuck::StuckWatch;
use crate::exit::Exit;
use crate::kvm::vcpu::{Machine, UnclaimedCounts, Vcpu, VcpuState};
use crate::kvm::vm::{KvmError, Processor};
use crate::report::Failure;

type MainLoop = EventManager<Box<dyn MutEventSubscriber>>;

impl Vmm {
    /// Runs the machine until it ends.
    ///
    /// # Errors
    ///
    /// What KVM or the host's kernel refuses while the machine runs.
    pub fn run(self) -> Result<Exit, Box<dyn Failure>> {
        let exit = self.exit;
        let signals = Signals::new(Arc::clone(&exit), self.memory_map)?;
        let _raw_while_it_runs = self.console.make_raw()?;
        let serial_port = Arc::clone(&self.console.port);
        let mut events =
            MainLoop::new().map_err(|error| failed_to("make the main loop")(io::Error::other(error)))?;
        events.add_subscriber(Box::new(Arc::clone(&exit)));
        events.add_subscriber(Box::new(signals));
        events.add_subscriber(Box::new(self.console));

        let vcpus = RunningVcpus::start(self.vcpus, &self.machine, &exit);
        let result = serve(events, vcpus, StuckWatch::new(Arc::clone(&self.machine.missing_pages)), &exit);

        serial_port.flush();
        let UnclaimedCounts { mmio_reads, mmio_writes, ports } = &self.machine.unclaimed;
        log::info!(
            "no device claimed {mmio_reads:?} memory reads, {mmio_writes:?} memory writes and {ports:?} port accesses"
        );
        self.machine.missing_pages.log_total();
        result
    }
}

/// The main loop. The processors have stopped when it returns.
fn serve(
    mut events: MainLoop,
    vcpus: RunningVcpus,
    mut stuck: StuckWatch,
    exit: &ExitOnce,
) -> Result<Exit, Box<dyn Failure>> {
    loop {
        if let Some(ending) = exit.take() {
            return ending;
        }
        let timeout = stuck.look(&vcpus.threads);
        if let Err(error) = events.run_with_timeout(timeout) {
            exit.set(Err(failed_to("wait for events")(io::Error::other(error)).into()));
        }
    }
}

/// The processors' threads. Dropping it stops them and waits for them.
struct RunningVcpus {
    threads: Vec<Vcpu>,
    machine: Arc<Machine>,
}

impl RunningVcpus {
    /// Starts the threads. If one cannot be started, the machine ends.
    fn start(
        vcpus: Vec<(Processor, VcpuState)>,
        machine: &Arc<Machine>,
        exit: &Arc<ExitOnce>,
    ) -> RunningVcpus {
        let mut running = RunningVcpus { threads: Vec::new(), machine: Arc::clone(machine) };
        for (processor, state) in vcpus {
            let ended = Arc::clone(exit);
            let ended = move |result: Result<Option<Exit>, KvmError>| match result {
                Ok(None) => {}
                Ok(Some(exit)) => ended.set(Ok(exit)),
                Err(error) => ended.set(Err(error.into())),
            };
            match Vcpu::spawn(processor, state, Arc::clone(machine), ended) {
                Ok(vcpu) => running.threads.push(vcpu),
                Err(error) => {
                    exit.set(Err(failed_to("start a vCPU's thread")(error).into()));
                    break;
                }
            }
        }
        running
    }
}

impl Drop for RunningVcpus {
    fn drop(&mut self) {
        self.machine.stopping.store(true, Ordering::SeqCst);
        // Repeated: a signal may arrive just before a thread blocks in a write of the serial port's output.
        while !self.threads.iter().all(Vcpu::has_ended) {
            self.threads.iter().for_each(Vcpu::interrupt);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.threads.drain(..).for_each(Vcpu::join);
    }
}
