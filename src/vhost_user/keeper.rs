//! A device's keeper: the thread that uses the main socket for what no vCPU asked for. It asks for a
//! configuration that has changed, tells the back-end of other devices' mappings (SHM-80), and connects again
//! to a back-end that died (SHM-18, SHM-94).
//!
//! It takes its tasks from the [`super::link::Link`], to which any thread gives them without waiting.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::backend::Backend;
use super::connect::{self, ConnectError};
use super::handshake::{Handshake, HandshakeError};
use super::link::KeeperTask;
use super::sharing::ANSWER_TIMEOUT;
use super::wire::frontend::QueueSize;
use super::wire::message::protocol_features::names;
use super::wire::negotiate::Agreement;
use crate::config::device::DeviceSpec;
use crate::report::with_causes;
use crate::sandbox::vmm::Kind;
use crate::thread;
use crate::virtio::device::DeviceError;

/// The time between two attempts to connect.
const RETRY: Duration = Duration::from_millis(50);

/// How long the end of a device waits for its keeper.
const END_TIMEOUT: Duration = Duration::from_secs(5);

/// The running thread. Dropping it hangs up on the back-end, stops the thread, and waits for it, with a time
/// limit.
pub struct Keeper {
    backend: Arc<Backend>,
    thread: JoinHandle<()>,
}

/// Why a back-end that came back is not taken.
#[derive(Debug, Error)]
enum Refusal {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the back-end that came back does not offer {0}, which the one before it offered")]
    Features(String),
    #[error(
        "the back-end that came back has {new} bytes in shared memory region {shmid}, the one before it had {old}"
    )]
    Layout { shmid: usize, old: u64, new: u64 },
    #[error("{what}: the back-end that came back has {new}, the one before it had {old}")]
    Count { what: &'static str, old: u64, new: u64 },
    #[error(
        "the back-end that came back refuses SET_VRING_NUM of {size} entries for queue {index}, which the one before it took"
    )]
    QueueSize { index: u16, size: u16 },
    #[error("the back-end that came back hung up at SET_VRING_NUM of {size} entries for queue {index}")]
    HungUp { index: u16, size: u16 },
    #[error("the back-end that came back cannot go on")]
    Start(#[source] DeviceError),
    #[error("the back-end that came back is gone again: {0}")]
    GoneAgain(String),
}

impl Refusal {
    /// Whether another attempt may succeed.
    fn may_pass(&self) -> bool {
        match self {
            Refusal::Connect(ConnectError::Handshake(error)) => error.is_fatal(),
            Refusal::Connect(_) | Refusal::HungUp { .. } | Refusal::GoneAgain(_) => true,
            _ => false,
        }
    }

    /// When no time is left for another attempt: what came of them.
    fn at_last(&self, limit: Duration, waited: Duration) -> String {
        let (limit, waited, why) = (limit.as_secs(), waited.as_secs_f32(), with_causes(self));
        match self {
            Refusal::Connect(ConnectError::Connect(_)) => {
                format!("the back-end did not come back within {limit} s: {why}")
            }
            _ => format!("the back-end came back and did not go on, after {waited:.1} s of {limit} s: {why}"),
        }
    }
}

/// What a back-end must be like to take the place of the one before it.
struct Predecessor {
    spec: DeviceSpec,
    region_sizes: Vec<u64>,
    memory_slots: Option<u64>,
    /// What was warned of at the first handshake.
    warnings: Vec<String>,
}

impl Keeper {
    /// Starts the thread. `region_sizes`, `memory_slots` and `warnings` are the first back-end's.
    pub fn start(
        backend: &Arc<Backend>,
        region_sizes: Vec<u64>,
        memory_slots: Option<u64>,
        warnings: Vec<String>,
    ) -> io::Result<Keeper> {
        let first = Predecessor { spec: backend.spec.clone(), region_sizes, memory_slots, warnings };
        let kind = if first.spec.reconnect.is_some() { Kind::Reconnector } else { Kind::Keeper };
        let kept = Arc::clone(backend);
        let name = format!("keep-{}", first.spec.name);
        let thread = thread::spawn(name, kind, move || run(&first, &kept))?;
        Ok(Keeper { backend: Arc::clone(backend), thread })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(recipient) = &self.backend.recipient {
            recipient.see_nothing();
        }
        self.backend.link.stop();
        // The thread may be waiting for an answer.
        self.backend.link.session().hang_up();
        let _left_behind = !thread::join_within(END_TIMEOUT, &self.thread);
    }
}

fn run(first: &Predecessor, backend: &Backend) {
    loop {
        match backend.link.next_task() {
            KeeperTask::Stop => return,
            KeeperTask::Return(until) => first.wait_for_return(backend, until),
            KeeperTask::ReadConfig => backend.read_config(),
            KeeperTask::TellOfOthers => backend.tell_of_others(ANSWER_TIMEOUT),
        }
    }
}

impl Predecessor {
    /// Connects again and again, until a back-end goes on, or none may any more.
    fn wait_for_return(&self, backend: &Backend, until: Instant) {
        let link = &backend.link;
        let start = Instant::now();
        if let Some(recipient) = &backend.recipient {
            recipient.forget();
        }
        loop {
            let Err(refusal) = self.try_return(backend) else {
                let waited = start.elapsed().as_secs_f32();
                return link.log.warn(format_args!("the back-end is back, after {waited:.1} s"));
            };
            log::debug!("{}: {}", link.name, with_causes(&refusal));
            if !refusal.may_pass() {
                return link.lose(&with_causes(&refusal));
            }
            if Instant::now() >= until {
                let limit = self.spec.reconnect.unwrap_or_default();
                return link.lose(&refusal.at_last(limit, start.elapsed()));
            }
            if !link.pause(RETRY) {
                return;
            }
        }
    }

    fn try_return(&self, backend: &Backend) -> Result<(), Refusal> {
        let slots = self.memory_slots.is_some();
        let tracer = &backend.link.tracer;
        let mut handshake = connect::reconnect(&self.spec, slots, &backend.agreement, tracer.clone())?;
        let examined = self.examine(&mut handshake, backend);
        examined.inspect_err(|refusal| tracer.iter().for_each(|tracer| tracer.not_used(refusal)))?;
        let is_new = |warning: &&String| !self.warnings.contains(warning);
        handshake
            .warnings
            .iter()
            .filter(is_new)
            .for_each(|warning| backend.link.log.warn(format_args!("{warning}")));
        if let Some(owner) = &backend.owner {
            owner.withdraw_all();
            backend.watch().close_files();
        }
        match backend.resume(handshake) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refusal::GoneAgain(backend.link.why_given_up())),
            Err(error) => Err(Refusal::Start(error)),
        }
    }

    /// Tries the size of its queues, asks for the rest, and compares.
    fn examine(&self, handshake: &mut Handshake, backend: &Backend) -> Result<(), Refusal> {
        handshake.queue_sizes.clone_from(&backend.queue_sizes);
        for (index, &size) in (0..).zip(&backend.queue_sizes) {
            let tried = handshake.frontend.set_up().try_queue_size(index, size);
            match tried.map_err(HandshakeError::from).map_err(ConnectError::from)? {
                QueueSize::Taken => {}
                QueueSize::Refused => return Err(Refusal::QueueSize { index, size }),
                QueueSize::HungUp => return Err(Refusal::HungUp { index, size }),
            }
        }
        handshake.ask_inflight_size().map_err(ConnectError::from)?;
        self.compare(handshake, backend)
    }

    /// SHM-18, SHM-95
    fn compare(&self, new: &Handshake, backend: &Backend) -> Result<(), Refusal> {
        let (old, agreement) = (&backend.agreement, &new.frontend.agreement);
        let protocol = |agreement: &Agreement| agreement.protocol_features.unwrap_or(0);
        let names = [
            self.spec.kind.feature_names(old.guest_features & !agreement.guest_features),
            names(protocol(old) & !protocol(agreement), self.spec.shmem_bit),
        ];
        let names: Vec<String> = names.into_iter().filter(|names| !names.is_empty()).collect();
        if !names.is_empty() {
            return Err(Refusal::Features(names.join(", ")));
        }
        let sizes = |sizes: &[u64], shmid| sizes.get(shmid).copied().unwrap_or(0);
        for shmid in 0..self.region_sizes.len().max(new.region_sizes.len()) {
            let (old, new) = (sizes(&self.region_sizes, shmid), sizes(&new.region_sizes, shmid));
            if old != new {
                return Err(Refusal::Layout { shmid, old, new });
            }
        }
        let config = backend.config_bytes();
        let announced = |config: &[u8]| self.spec.kind.queues(old.guest_features, config).unwrap_or(0).into();
        for (what, old, new) in [
            ("bytes of configuration space", config.len() as u64, new.config.len() as u64),
            ("bytes of the record of requests in flight", backend.inflight_size, new.inflight_size),
        ] {
            if old != new {
                return Err(Refusal::Count { what, old, new });
            }
        }
        for (what, old, new) in [
            ("queues that the configuration space announces", announced(&config), announced(&new.config)),
            (
                "memory slots (GET_MAX_MEM_SLOTS)",
                self.memory_slots.unwrap_or(0),
                new.memory_slots.unwrap_or(0),
            ),
        ] {
            if old > new {
                return Err(Refusal::Count { what, old, new });
            }
        }
        Ok(())
    }
}
