//! Learns what a back-end is, and what its device has in the guest: features, queues, configuration space,
//! shared memory regions. `virtio::kind` says what a device of its type may have.
//!
//! [`super::connect`] calls [`handshake`] on each new connection.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MAC;

use super::tracer::Tracer;
use super::wire::connection::Deadline;
use super::wire::frontend::{Frontend, FrontendError};
use super::wire::message::protocol_features::{self as protocol, name, names};
use super::wire::message::{F_PROTOCOL_FEATURES, FrontendRequest};
use super::wire::negotiate::{Needs, NegotiationError, other_shmem_bit};
use super::wire::observer::Observer;
use crate::config::device::{DeviceSpec, MAX_CONFIG, SHMEM_BIT};
use crate::virtio::kind::{DeviceKind, MAX_QUEUES};
use crate::virtio::mmio::NOT_CARRIED;

/// VHOST_USER_MAX_CONFIG_SIZE: the most that other front-ends ask for, in bytes.
pub const USUAL_MAX_CONFIG: u16 = 256;

/// How long the search for the end of a configuration space may take in all. Each of its requests has the
/// deadline of a request of the set-up, too.
const CONFIG_SEARCH_TIMEOUT: Duration = Duration::from_secs(15);

/// The most bytes that a record of requests in flight may have. The largest that makes sense is an eighth of
/// it: 256 queues of 32,768 entries, each with the 16 bytes of libvhost-user, are 128 MiB.
const MAX_INFLIGHT: u64 = 1 << 30;

/// Why a back-end cannot be used.
#[derive(Debug, Error)]
#[allow(missing_docs)]
pub enum HandshakeError {
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    #[error("the back-end has {available} of the {wanted} queues that the device is to have (GET_QUEUE_NUM)")]
    Queues { available: u64, wanted: u16 },
    #[error("queues={asked}: a device of type {kind} has at least {least} queues")]
    TooFewAsked { asked: u16, least: u16, kind: DeviceKind },
    #[error("the back-end answers GET_CONFIG of {asked} bytes with {given}")]
    ConfigShort { asked: usize, given: usize },
    /// `has`: how many bytes it answers.
    #[error(
        "the back-end refuses GET_CONFIG of {asked} bytes, and {}",
        if *has == 0 { "of fewer".to_string() } else { format!("answers up to {has}") }
    )]
    ConfigRefused { asked: usize, has: usize },
    #[error("the back-end failed at GET_CONFIG of {asked} bytes, after it had answered {had} bytes")]
    ConfigEnd { asked: usize, had: usize, source: FrontendError },
    #[error(
        "the end of the configuration space was not found within {} s: the back-end answered GET_CONFIG of 1 to {had} bytes",
        CONFIG_SEARCH_TIMEOUT.as_secs()
    )]
    ConfigSlow { had: usize },
    #[error("a device of type {kind} needs {least} bytes of configuration space, and has {len}")]
    ConfigNeeded { kind: DeviceKind, least: usize, len: usize },
    #[error("the back-end offers SHMEM and gives no shared memory region, which a device of type {0} needs")]
    NoRegions(DeviceKind),
    #[error(
        "the back-end asks for {0:#x} bytes for its record of requests in flight (GET_INFLIGHT_FD), more than the \
         {MAX_INFLIGHT:#x} that it may have"
    )]
    Inflight(u64),
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
        let kind = spec.kind;
        let config_size = |has: usize| match (has, kind.least_config()) {
            (0, 0) => "say how many bytes it has with config-size=N, or config-size=0 for none".to_string(),
            (has, least) if has < least => format!(
                "a device of type {kind} needs {least} bytes: say how many the back-end has with config-size=N, or give \
                 them in hex with config="
            ),
            (has, _) => format!("say how many bytes it has with config-size={has}"),
        };
        Some(match self {
            HandshakeError::Frontend(FrontendError::Negotiation(error)) => {
                return negotiation_hint(error, spec);
            }
            &HandshakeError::Queues { available, .. } => match kind.least_queues() {
                least if available < least.into() => {
                    format!("start the back-end with more queues: a device of type {kind} needs {least}")
                }
                _ => format!("start the back-end with more queues, or say queues={available}"),
            },
            HandshakeError::ConfigShort { given: has, .. }
            | HandshakeError::ConfigRefused { has, .. }
            | HandshakeError::ConfigEnd { had: has, .. } => config_size(*has),
            HandshakeError::ConfigSlow { .. } => {
                "say how many bytes it has with config-size=N: it is asked once then".to_string()
            }
            HandshakeError::ConfigNeeded { .. } => "give the bytes in hex with config=".to_string(),
            HandshakeError::NoRegions(_) => SHMEM_HINT.to_string(),
            HandshakeError::Frontend(error) if error.is_unanswered() => match error.request()? {
                FrontendRequest::GetConfig => config_size(0),
                FrontendRequest::GetShmemConfig => SHMEM_HINT.to_string(),
                _ => return None,
            },
            HandshakeError::Inflight(_) => {
                "without reconnect= the back-end is asked for no such record".to_string()
            }
            HandshakeError::Frontend(_) | HandshakeError::TooFewAsked { .. } => return None,
        })
    }

    /// Whether the back-end hung up.
    pub fn is_hang_up(&self) -> bool {
        match self {
            HandshakeError::Frontend(error) | HandshakeError::ConfigEnd { source: error, .. } => {
                error.is_hang_up()
            }
            _ => false,
        }
    }

    /// Whether the back-end hung up at the first GET_CONFIG that is larger than what front-ends usually ask
    /// for: its buffer may end there, as those of libvhost-user and the `vhost` crate do.
    pub fn is_end_of_usual_config(&self) -> bool {
        let usual = usize::from(USUAL_MAX_CONFIG);
        matches!(self, HandshakeError::ConfigEnd { had, .. } if *had == usual) && self.is_hang_up()
    }
}

const SHMEM_HINT: &str =
    "where the back-end leaves the size of its window to the front-end, give it with shmem=SHMID:SIZE";

fn negotiation_hint(error: &NegotiationError, spec: &DeviceSpec) -> Option<String> {
    if let Some(bit) = error.other_shmem_bit() {
        return Some(other_bit_hint(bit));
    }
    Some(match error.protocol_feature() {
        Some("CONFIG") if spec.kind.to_string() == "fs" => "name the file system with tag=NAME".to_string(),
        Some("CONFIG") => "give the bytes of the configuration space in hex with config=".to_string(),
        Some(feature) => format!("use a back-end that has {feature}, or an option of it that adds it"),
        None => format!("is it a back-end for type={}, and for VIRTIO 1.0 or later?", spec.kind),
    })
}

/// Of a back-end that does not offer the bit that means SHMEM, but `bit`.
fn other_bit_hint(bit: u32) -> String {
    match bit {
        SHMEM_BIT => format!("it offers SHMEM as the specification has it: say shmem-bit={bit}"),
        _ => format!(
            "if it means SHMEM by bit {bit}, as drafts did and not as the specification does ({}), say shmem-bit={bit}",
            name(bit, SHMEM_BIT)
        ),
    }
}

/// What the handshake learns from a back-end.
#[derive(Debug)]
pub struct Handshake {
    /// The connection.
    pub frontend: Frontend,
    /// The largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// The configuration space; zeroes where neither the back-end nor the user says what is in it.
    pub config: Vec<u8>,
    /// Size in bytes of each shared memory region; the index is its id, 0 means none. Empty without SHMEM.
    pub region_sizes: Vec<u64>,
    /// How many ranges of memory the back-end can be told of in all, RAM among them; `None` where it cannot
    /// be told of single ones (CONFIGURE_MEM_SLOTS), or need not be.
    pub memory_slots: Option<u64>,
    /// What does not fit, and is no reason to refuse the back-end.
    pub warnings: Vec<String>,
    /// The size in bytes of the record of requests in flight; 0 where the back-end keeps none.
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
    let mut warnings = Vec::new();
    let region_sizes = region_sizes(&mut frontend, spec, &mut warnings)?;
    let mut config = configuration(&mut frontend, spec, &mut warnings)?;
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
    if let Some(there) = there.filter(|&there| !kind.counts_pairs() && there > queues.into()) {
        warnings.push(format!("the back-end has {there} queues, and {queues} are used"));
    }
    if kind.lacks_tag(&config) {
        warnings
            .push("the back-end gives an empty tag, with which a guest cannot mount it: say tag=NAME".into());
    }
    Ok(Handshake {
        frontend,
        queue_sizes: vec![spec.wanted_queue_size(); queues.into()],
        config,
        region_sizes,
        memory_slots,
        warnings,
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
    // The handshake has warned of what does not fit.
    let mut config = configuration(frontend, spec, &mut Vec::new())?;
    spec.kind.limit_queues(&mut config, frontend.agreement.guest_features, queues);
    config.resize(len, 0);
    Ok(config)
}

/// The largest size of a queue.
pub fn largest(queue_sizes: &[u16]) -> u16 {
    queue_sizes.iter().copied().max().unwrap_or(0)
}

fn region_sizes(
    frontend: &mut Frontend,
    spec: &DeviceSpec,
    warnings: &mut Vec<String>,
) -> Result<Vec<u64>, HandshakeError> {
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
        warnings.push(format!("the back-end offers SHMEM and gives no shared memory region: {SHMEM_HINT}"));
    }
    Ok(sizes)
}

/// What is known of the configuration space (SHM-91).
fn configuration(
    frontend: &mut Frontend,
    spec: &DeviceSpec,
    warnings: &mut Vec<String>,
) -> Result<Vec<u8>, HandshakeError> {
    let has_config = frontend.agreement.has(protocol::CONFIG) && spec.config_size != Some(0);
    let mut config = match &spec.config {
        Some(bytes) => bytes.clone(),
        None if has_config => ask_configuration(frontend, spec, warnings)?,
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
fn ask_configuration(
    frontend: &mut Frontend,
    spec: &DeviceSpec,
    warnings: &mut Vec<String>,
) -> Result<Vec<u8>, HandshakeError> {
    let sizes = match spec.config_size {
        Some(size) => vec![usize::from(size)],
        None => spec.kind.config_sizes(frontend.agreement.backend_features),
    };
    let Some(&size) = sizes.first() else {
        return find_configuration(frontend, warnings);
    };
    if size == 0 {
        return Ok(Vec::new());
    }
    let config = frontend.set_up().config(size)?;
    let given = config.len();
    if given == size {
        return Ok(config);
    }
    if given > 0 {
        if spec.config_size.is_some() {
            return Err(HandshakeError::ConfigShort { asked: size, given });
        }
        warnings.push(format!("the back-end answers GET_CONFIG of {size} bytes with {given}"));
        return Ok(config);
    }
    // It refuses. A back-end that answers smaller requests has fewer bytes than `size`: more would be past
    // its end. One that answers only a request for all that it has, such as Cloud Hypervisor's disk, may
    // have more.
    let has = find_end(frontend, size - 1)?.len();
    if has == 0 {
        for &asked in &sizes[1..] {
            let config = frontend.set_up().config(asked)?;
            if config.len() == asked {
                return Ok(config);
            }
        }
    }
    Err(HandshakeError::ConfigRefused { asked: size, has })
}

/// The configuration space of a type whose size is not known.
fn find_configuration(
    frontend: &mut Frontend,
    warnings: &mut Vec<String>,
) -> Result<Vec<u8>, HandshakeError> {
    let found = find_end(frontend, MAX_CONFIG)?;
    if found.is_empty() {
        warnings.push(
            "the back-end gives no configuration space, and it stays empty: if there is one, say its bytes with \
             config-size=N"
                .into(),
        );
    }
    Ok(found)
}

/// Asks for one byte, then for two, and so on up to `most`, or to the first request that is not answered in
/// full. So one request at most reaches past the end, by a byte, and nothing of that answer is used.
fn find_end(frontend: &mut Frontend, most: usize) -> Result<Vec<u8>, HandshakeError> {
    let end = Deadline::after(CONFIG_SEARCH_TIMEOUT);
    let mut found = Vec::new();
    for asked in 1..=most {
        let had = found.len();
        if end.has_passed() {
            return Err(HandshakeError::ConfigSlow { had });
        }
        let config = frontend.set_up().config(asked);
        let config = config.map_err(|source| HandshakeError::ConfigEnd { asked, had, source })?;
        if config.len() < asked {
            break;
        }
        found = config;
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
    Ok(queues)
}

impl Handshake {
    /// Asks for the size of the record of requests in flight, where one was agreed on (SHM-98).
    pub fn ask_inflight_size(&mut self) -> Result<(), HandshakeError> {
        if self.frontend.agreement.has(protocol::INFLIGHT_SHMFD) {
            let (queues, size) = (self.queue_sizes.len() as u16, largest(&self.queue_sizes));
            self.inflight_size = self.frontend.inflight_size(queues, size)?;
        }
        match self.inflight_size {
            0..=MAX_INFLIGHT => Ok(()),
            size => Err(HandshakeError::Inflight(size)),
        }
    }

    /// Says what was agreed, and warns of what does not fit.
    pub fn report(&self, spec: &DeviceSpec) {
        let (name, kind, agreement) = (&spec.name, spec.kind, &self.frontend.agreement);
        self.warnings.iter().for_each(|warning| log::warn!("{name}: {warning}"));
        let (offered, bit) = (agreement.offered, spec.shmem_bit);
        // Bits 20 and 21 have other meanings in the specification: they are a reason to ask only where the
        // device could have a region, or the user expects one.
        let may_mean_shmem = |&other: &u32| bit != SHMEM_BIT || other == SHMEM_BIT || kind.has_regions();
        let other = other_shmem_bit(offered, bit).filter(|_| offered & 1 << bit == 0).filter(may_mean_shmem);
        if let Some(other) = other {
            log::warn!(
                "{name}: the back-end does not offer SHMEM as protocol feature bit {bit}: {}",
                other_bit_hint(other)
            );
        }
        if offered & 1 << bit != 0 && !agreement.shmem {
            log::warn!("{name}: the back-end offers SHMEM, but not BACKEND_REQ: it cannot map anything");
        }
        let has_record = agreement.has(protocol::INFLIGHT_SHMFD) || !kind.needs_inflight_record();
        if spec.reconnect.is_some() && !has_record {
            log::warn!(
                "{name}: the back-end does not offer INFLIGHT_SHMFD: when it dies and comes back (reconnect), requests that \
                 it has begun may be lost or done twice"
            );
        }
        let acked = agreement.protocol_features.unwrap_or(0);
        let features = agreement.guest_features & !NOT_CARRIED;
        // The handshake itself uses it.
        let unused = agreement.backend_features & !features & !F_PROTOCOL_FEATURES;
        let list = |names: String| if names.is_empty() { "none".to_string() } else { names };
        let (id, queues, config) = (kind.id(), self.queue_sizes.len(), self.config.len());
        let size = match self.queue_sizes.iter().all(|&size| size == self.queue_sizes[0]) {
            true => largest(&self.queue_sizes).to_string(),
            false => self.queue_sizes.iter().map(u16::to_string).collect::<Vec<_>>().join(", "),
        };
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
