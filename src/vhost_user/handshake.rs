//! Learns what a back-end is, and what its device has in the guest: features, queues, configuration space,
//! shared memory regions. `virtio::kind` says what a device of its type may have.
//!
//! [`super::connect`] calls [`handshake`] on each new connection.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use thiserror::Error;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::tracer::Tracer;
use super::wire::frontend::{Frontend, FrontendError};
use super::wire::message::protocol_features::{self as protocol, names};
use super::wire::message::{F_PROTOCOL_FEATURES, FrontendRequest};
use super::wire::negotiate::{Needs, NegotiationError, other_shmem_bit};
use super::wire::observer::Observer;
use crate::config::device::DeviceSpec;
use crate::virtio::kind::{DeviceKind, MAX_QUEUES};
use crate::virtio::mmio::NOT_CARRIED;

/// VHOST_USER_MAX_CONFIG_SIZE: the most that front-ends before this one ask for, in bytes.
const USUAL_MAX_CONFIG: usize = 256;

/// Why a back-end cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum HandshakeError {
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    #[error("the back-end has {available} queues (GET_QUEUE_NUM), and the device is to have {wanted}")]
    Queues { available: u64, wanted: u16 },
    #[error("queues={asked}: a device of type {kind} has at least {least} queues")]
    TooFewAsked { asked: u16, least: u16, kind: DeviceKind },
    #[error("the back-end answers GET_CONFIG of {asked} bytes with {given}")]
    ConfigShort { asked: usize, given: usize },
    #[error("the back-end failed at GET_CONFIG of {asked} bytes, after it had answered {had} bytes")]
    ConfigEnd { asked: usize, had: usize, source: FrontendError },
    #[error("a device of type {kind} needs {least} bytes of configuration space, and has {len}")]
    ConfigNeeded { kind: DeviceKind, least: usize, len: usize },
    #[error("the back-end offers SHMEM and gives no shared memory region, which a device of type {0} needs")]
    NoRegions(DeviceKind),
}

impl HandshakeError {
    /// Whether the connection is of no use any more; another one may be.
    pub fn is_fatal(&self) -> bool {
        match self {
            HandshakeError::Frontend(error) | HandshakeError::ConfigEnd { source: error, .. } => {
                error.is_fatal()
            }
            _ => false,
        }
    }

    /// What the user can do.
    pub fn hint(&self, spec: &DeviceSpec) -> Option<String> {
        let config_size = |size| format!("say how many bytes it has with config-size={size}");
        Some(match self {
            HandshakeError::Frontend(FrontendError::Negotiation(error)) => {
                return negotiation_hint(error, spec);
            }
            HandshakeError::Queues { available, .. } => format!(
                "start the back-end with more queues{}",
                if *available == 0 { "" } else { ", or say how many to use with queues=N" }
            ),
            HandshakeError::ConfigShort { given, .. } => config_size(given.to_string()),
            HandshakeError::ConfigEnd { had, .. } => config_size(had.to_string()),
            HandshakeError::ConfigNeeded { .. } => "give the bytes in hex with config=".to_string(),
            HandshakeError::NoRegions(_) => SHMEM_HINT.to_string(),
            HandshakeError::Frontend(error) => match error.request()? {
                FrontendRequest::GetConfig => config_size("N".to_string()),
                FrontendRequest::GetShmemConfig => SHMEM_HINT.to_string(),
                _ => return None,
            },
            HandshakeError::TooFewAsked { .. } => return None,
        })
    }

    /// Whether the back-end hung up.
    pub fn is_hang_up(&self) -> bool {
        match self {
            HandshakeError::Frontend(FrontendError::Connection { source, .. }) => source.is_hang_up(),
            _ => false,
        }
    }
}

const SHMEM_HINT: &str =
    "where the back-end leaves the size of its window to the front-end, give it with shmem=SHMID:SIZE";

fn negotiation_hint(error: &NegotiationError, spec: &DeviceSpec) -> Option<String> {
    if let Some(bit) = error.other_shmem_bit() {
        return Some(format!("the back-end may mean SHMEM by bit {bit}, as drafts did: try shmem-bit={bit}"));
    }
    Some(match error.protocol_feature() {
        Some("CONFIG") if spec.kind.to_string() == "fs" => "name the file system with tag=NAME".to_string(),
        Some("CONFIG") => "give the bytes of the configuration space in hex with config=".to_string(),
        Some(feature) => format!("use a back-end that has {feature}, or an option of it that adds it"),
        None => format!("is it a back-end for type={}, and for VIRTIO 1.0 or later?", spec.kind),
    })
}

/// What the handshake learns from a back-end.
#[derive(Debug)]
pub struct Handshake {
    /// The connection.
    pub frontend: Frontend,
    /// The number of queues.
    pub queues: u16,
    /// The largest size of each queue.
    pub queue_size: u16,
    /// The configuration space; zeroes where neither the back-end nor the user says what is in it.
    pub config: Vec<u8>,
    /// Size in bytes of each shared memory region; the index is its id, 0 means none. Empty without SHMEM.
    pub region_sizes: Vec<u64>,
    /// How many ranges of memory the back-end can be told of in all, RAM among them; `None` where it cannot
    /// be told of single ones (CONFIGURE_MEM_SLOTS), or need not be.
    pub memory_slots: Option<u64>,
    /// The size in bytes of the buffer for requests that the back-end has begun; 0 where it keeps none.
    pub inflight_size: u64,
    /// Records what passes, where the machine is traced.
    pub tracer: Option<Arc<Tracer>>,
}

/// Finds out what the back-end behind a connected socket is, and agrees with it. `memory_slots`: it is to be
/// told of more than one range of memory (SHM-80, SHM-89). `acceptable`: the protocol features that may be
/// agreed on. `tracer` records it, and the rest of the session.
pub fn handshake(
    socket: UnixStream,
    spec: &DeviceSpec,
    memory_slots: bool,
    acceptable: u64,
    tracer: Option<Arc<Tracer>>,
) -> Result<Handshake, HandshakeError> {
    tracer.iter().for_each(|tracer| tracer.event("connected", &[], None));
    let kind = spec.kind;
    let gives_config = spec.config.is_some() || spec.tag.is_some();
    let needs = Needs {
        device_type: kind.to_string(),
        features: kind.needed_features(),
        config: kind.least_config() > 0 && !gives_config,
        shmem: kind.needs_shmem() || spec.shmem.is_some(),
        shmem_bit: spec.shmem_bit,
        memory_slots,
        inflight: spec.reconnect.is_some(),
        acceptable,
    };
    let mut frontend =
        Frontend::agree(socket, &needs, tracer.clone().map(|tracer| tracer as Arc<dyn Observer>))?;
    let there = frontend.set_up().queue_count()?;
    let region_sizes = region_sizes(&mut frontend, spec)?;
    let mut config = configuration(&mut frontend, spec)?;
    let has_slots = needs.memory_slots && frontend.agreement.has(protocol::CONFIGURE_MEM_SLOTS);
    let memory_slots = has_slots.then(|| frontend.set_up().memory_slots()).transpose()?;

    // What the driver is offered (SHM-92).
    let agreement = &mut frontend.agreement;
    let size = kind.config_sizes(agreement.guest_features).first().copied().unwrap_or(0);
    let mac = if spec.mac.is_some() { 1 << VIRTIO_NET_F_MAC } else { 0 };
    let features = kind.usable(agreement.guest_features | mac, MAX_QUEUES, config.len());
    let queues = queues(spec, kind.queues(features, &config), there)?;
    agreement.guest_features = kind.usable(features, queues, config.len());
    kind.limit_queues(&mut config, agreement.guest_features, queues);
    config.resize(config.len().max(size), 0);
    Ok(Handshake {
        frontend,
        queues,
        queue_size: spec.wanted_queue_size(),
        config,
        region_sizes,
        memory_slots,
        inflight_size: 0,
        tracer,
    })
}

/// The configuration space, of `len` bytes, of a back-end that says that it has changed (SHM-96): as
/// [`handshake`] has made it.
pub fn changed_configuration(
    frontend: &mut Frontend,
    spec: &DeviceSpec,
    queues: u16,
    len: usize,
) -> Result<Vec<u8>, HandshakeError> {
    let mut config = configuration(frontend, spec)?;
    spec.kind.limit_queues(&mut config, frontend.agreement.guest_features, queues);
    config.resize(len, 0);
    Ok(config)
}

fn region_sizes(frontend: &mut Frontend, spec: &DeviceSpec) -> Result<Vec<u64>, HandshakeError> {
    if !frontend.agreement.shmem {
        return Ok(Vec::new());
    }
    // SHM-93
    if let Some((shmid, size)) = spec.shmem {
        let mut sizes = vec![0; 256];
        sizes[usize::from(shmid)] = size;
        return Ok(sizes);
    }
    let sizes = frontend.set_up().region_sizes()?;
    if sizes.iter().all(|&size| size == 0) {
        if spec.kind.needs_shmem() {
            return Err(HandshakeError::NoRegions(spec.kind));
        }
        log::warn!(
            "{}: the back-end offers SHMEM and gives no shared memory region: {SHMEM_HINT}",
            spec.name
        );
    }
    Ok(sizes)
}

/// What is known of the configuration space (SHM-91).
fn configuration(frontend: &mut Frontend, spec: &DeviceSpec) -> Result<Vec<u8>, HandshakeError> {
    let has_config = frontend.agreement.has(protocol::CONFIG) && spec.config_size != Some(0);
    let mut config = match &spec.config {
        Some(bytes) => bytes.clone(),
        None if has_config => ask_configuration(frontend, spec)?,
        None => Vec::new(),
    };
    if let Some(tag) = &spec.tag {
        // VIRTIO section 5.11.4. Of the queues one is for hiprio requests.
        let requests = spec.queues.unwrap_or(2).saturating_sub(1).max(1);
        config.resize(config.len().max(36), 0);
        config[..36].fill(0);
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        if config.len() < 40 {
            config.truncate(36);
            config.extend(u32::from(requests).to_le_bytes());
        }
    }
    if let Some(mac) = spec.mac {
        config.resize(config.len().max(mac.len()), 0);
        config[..mac.len()].copy_from_slice(&mac);
    }
    if let Some(size) = spec.config_size {
        config.resize(config.len().max(size.into()), 0);
    }
    let (kind, least, len) = (spec.kind, spec.kind.least_config(), config.len());
    if len < least {
        return Err(HandshakeError::ConfigNeeded { kind, least, len });
    }
    Ok(config)
}

/// GET_CONFIG always begins at byte 0: libvhost-user ignores the offset. It asks for the bytes that the
/// device has, not for more: some back-ends then answer with memory behind them.
fn ask_configuration(frontend: &mut Frontend, spec: &DeviceSpec) -> Result<Vec<u8>, HandshakeError> {
    let sizes = match spec.config_size {
        Some(size) => vec![usize::from(size)],
        None => spec.kind.config_sizes(frontend.agreement.backend_features),
    };
    let Some(&size) = sizes.first() else {
        return find_configuration(frontend, spec);
    };
    if size == 0 {
        return Ok(Vec::new());
    }
    // The larger sizes are for back-ends that answer only a request for all that they have, such as Cloud
    // Hypervisor's disk.
    let mut short = 0;
    for &asked in &sizes {
        let config = frontend.set_up().config(asked)?;
        if config.len() == asked {
            return Ok(config);
        }
        if !config.is_empty() && spec.config_size.is_none() {
            log::warn!(
                "{}: the back-end answers GET_CONFIG of {asked} bytes with {}",
                spec.name,
                config.len()
            );
            return Ok(config);
        }
        short = config.len();
    }
    Err(HandshakeError::ConfigShort { asked: size, given: short })
}

/// The configuration space of a type whose size is not known: asks for one byte, then for two, and so on, up
/// to the first request that is not answered in full. So one request at most reaches past its end, by a byte,
/// and nothing of that answer is used.
fn find_configuration(frontend: &mut Frontend, spec: &DeviceSpec) -> Result<Vec<u8>, HandshakeError> {
    let mut to = frontend.set_up();
    let mut found = Vec::new();
    for asked in 1..=USUAL_MAX_CONFIG {
        let had = found.len();
        let config = to.config(asked).map_err(|source| HandshakeError::ConfigEnd { asked, had, source })?;
        if config.len() < asked {
            break;
        }
        found = config;
    }
    if found.len() == USUAL_MAX_CONFIG {
        log::warn!(
            "{}: the back-end may have more than {USUAL_MAX_CONFIG} bytes of configuration space: say how many with \
             config-size=N",
            spec.name
        );
    }
    if found.is_empty() {
        log::warn!(
            "{}: the back-end gives no configuration space, and it stays empty: if there is one, say its bytes with \
             config-size=N",
            spec.name
        );
    }
    Ok(found)
}

/// The number of queues: the user's, or what the type means, or what the back-end says.
fn queues(spec: &DeviceSpec, usual: Option<u16>, there: Option<u64>) -> Result<u16, HandshakeError> {
    let least = spec.kind.least_queues();
    if let Some(asked) = spec.queues.filter(|&asked| asked < least) {
        return Err(HandshakeError::TooFewAsked { asked, least, kind: spec.kind });
    }
    let available = match there {
        Some(pairs) if spec.kind.counts_pairs() => pairs.saturating_mul(2).saturating_add(1),
        Some(queues) => queues,
        None => u64::MAX,
    };
    let most = available.min(MAX_QUEUES.into()) as u16;
    let usual = usual.unwrap_or(if there.is_some() { most } else { 1 });
    let queues = spec.queues.unwrap_or(usual.min(most).max(least));
    if u64::from(queues) > available {
        return Err(HandshakeError::Queues { available, wanted: queues });
    }
    if there.is_some() && !spec.kind.counts_pairs() && available > queues.into() {
        log::warn!("{}: the back-end has {available} queues, and {queues} are used", spec.name);
    }
    Ok(queues)
}

impl Handshake {
    /// Asks for the size of the record of requests in flight, where one was agreed on (SHM-98).
    pub fn ask_inflight_size(&mut self) -> Result<(), FrontendError> {
        if self.frontend.agreement.has(protocol::INFLIGHT_SHMFD) {
            self.inflight_size = self.frontend.inflight_size(self.queues, self.queue_size)?;
        }
        Ok(())
    }

    /// Says what was agreed, and warns of what does not fit.
    pub fn report(&self, spec: &DeviceSpec) {
        let (name, kind, agreement) = (&spec.name, spec.kind, &self.frontend.agreement);
        let (offered, bit) = (agreement.offered, spec.shmem_bit);
        if let Some(other) = other_shmem_bit(offered, bit).filter(|_| offered & 1 << bit == 0) {
            log::warn!(
                "{name}: the back-end does not offer SHMEM as protocol feature bit {bit}, but bit {other}: if it means \
                 SHMEM by that, say shmem-bit={other}"
            );
        }
        if offered & 1 << bit != 0 && !agreement.shmem {
            log::warn!("{name}: the back-end offers SHMEM, but not BACKEND_REQ: it cannot map anything");
        }
        let acked = agreement.protocol_features.unwrap_or(0);
        let features = agreement.guest_features & !NOT_CARRIED;
        // The handshake itself uses it.
        let unused = agreement.backend_features & !features & !F_PROTOCOL_FEATURES;
        let list = |names: String| if names.is_empty() { "none".to_string() } else { names };
        let (id, queues, size, config) = (kind.id(), self.queues, self.queue_size, self.config.len());
        log::info!(
            "{name}: {kind} (device type {id}); queues: {queues} of up to {size}; configuration: {config} bytes; features: \
             {}; offered and not used: {}; protocol features: {}; offered and not used: {}",
            list(kind.feature_names(features)),
            list(kind.feature_names(unused)),
            list(names(acked, bit)),
            list(names(offered & !acked, bit)),
        );
    }
}
