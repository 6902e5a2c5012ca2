//! A device's keeper: the thread that uses the main socket for what no vCPU asked for. It asks for a
//! configuration that has changed, tells the back-end of other devices' mappings (SHM-80), and connects again
//! to a back-end that died (SHM-18, SHM-94).
//!
//! It takes its orders from the [`super::link::Link`], to which any thread gives them without waiting.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::backend::Backend;
use super::connect::{self, ConnectError};
use super::handshake::Handshake;
use super::link::Order;
use super::sharing::ANSWER_TIMEOUT;
use super::wire::message::protocol_features::{CONFIGURE_MEM_SLOTS, names};
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
    #[error("the back-end that came back does not offer {0}, which the one before it did")]
    Features(String),
    #[error(
        "the back-end that came back has {new} bytes in shared memory region {shmid}, the one before it had {old}"
    )]
    Layout { shmid: usize, old: u64, new: u64 },
    #[error("the back-end that came back has {new} bytes of {what}, the one before it had {old}")]
    Size { what: &'static str, old: u64, new: u64 },
    #[error("the back-end that came back cannot go on")]
    Start(#[source] DeviceError),
    #[error("the back-end that came back died again")]
    Died,
}

impl Refusal {
    /// Whether another attempt may have another result.
    fn may_pass(&self) -> bool {
        match self {
            Refusal::Connect(ConnectError::Handshake(error)) => error.is_fatal(),
            Refusal::Connect(_) | Refusal::Died => true,
            _ => false,
        }
    }
}

/// What a back-end must be like to take the place of the one before it.
struct Predecessor {
    spec: DeviceSpec,
    memory_slots: bool,
    region_sizes: Vec<u64>,
}

impl Keeper {
    /// Starts the thread. `region_sizes` are the first back-end's.
    pub fn start(backend: &Arc<Backend>, region_sizes: Vec<u64>) -> io::Result<Keeper> {
        let spec = backend.spec.clone();
        let first =
            Predecessor { memory_slots: backend.agreement.has(CONFIGURE_MEM_SLOTS), region_sizes, spec };
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
        match backend.link.next_order() {
            Order::Stop => return,
            Order::Return(until) => first.wait_for_return(backend, until),
            Order::ReadConfig => backend.read_config(),
            Order::TellOfOthers => backend.tell_of_others(ANSWER_TIMEOUT),
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
                let limit = self.spec.reconnect.unwrap_or_default().as_secs();
                let why = with_causes(&refusal);
                return link.lose(&format!("the back-end did not come back within {limit} s: {why}"));
            }
            if !link.pause(RETRY) {
                return;
            }
        }
    }

    fn try_return(&self, backend: &Backend) -> Result<(), Refusal> {
        let handshake = connect::reconnect(
            &self.spec,
            self.memory_slots,
            &backend.agreement,
            backend.link.tracer.clone(),
        )?;
        self.compare(&handshake, backend)?;
        if let Some(owner) = &backend.owner {
            owner.withdraw_all();
            backend.watch().close_files();
        }
        match backend.resume(handshake) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Refusal::Died),
            Err(error) => Err(Refusal::Start(error)),
        }
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
        for (what, old, new) in [
            ("configuration space", backend.config_bytes().len() as u64, new.config.len() as u64),
            ("record of requests in flight", backend.inflight_size, new.inflight_size),
        ] {
            if old != new {
                return Err(Refusal::Size { what, old, new });
            }
        }
        Ok(())
    }
}
