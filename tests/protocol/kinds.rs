//! What a device is: its queues, their size, its configuration space and the features that the driver is
//! offered, with back-ends that have little, refuse much, or say nothing.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use hotslot::config::device::DeviceSpec;
use hotslot::vhost_user::connect::{self, ConnectError};
use hotslot::vhost_user::handshake::Handshake;
use hotslot_test_support::names::request::*;
use hotslot_test_support::names::*;
use hotslot_test_support::wire::{
    Message, NEED_REPLY, PATIENCE, REPLY, VERSION_1, Wire, message, quads, shmem_config, words,
};

/// What a back-end does with GET_CONFIG beyond the end of its configuration space.
#[derive(Clone, Copy, Debug, PartialEq)]
enum PastEnd {
    /// An answer of size 0, as the `vhost` crate's.
    Refuse,
    /// An answer without a payload, as libvhost-user's.
    RefuseEmpty,
    /// What there is.
    Short,
    Silence,
    HangUp,
}

/// What a back-end does with SET_VRING_NUM that is too much for it.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Refusal {
    /// Answers, where it may.
    Answer,
    /// Answers where it may, and hangs up, as the `vhost-user-backend` crate does; then it listens again.
    HangUp,
    /// Ends.
    Die,
}

#[derive(Clone)]
struct Peer {
    features: u64,
    protocol: u64,
    config: Vec<u8>,
    past_end: PastEnd,
    /// Answers only GET_CONFIG for all that it has.
    only_whole: bool,
    /// Answers GET_CONFIG with all that it has, whatever was asked for.
    always_whole: bool,
    /// How long it takes for an answer to GET_CONFIG.
    delay: Duration,
    /// Hangs up at GET_CONFIG of more bytes than this.
    buffer: usize,
    /// Answers GET_CONFIG with another message.
    is_out_of_step: bool,
    /// How many queues it has.
    queues: u64,
    /// How many entries of a queue it takes.
    entries: u32,
    /// The same for single queues, from the first on.
    entries_of: Vec<u32>,
    refusal: Refusal,
    /// Its answer to GET_QUEUE_NUM is not the number of its queues.
    counts_pairs: bool,
    /// Answers NEED_REPLY before SET_FEATURES.
    answers_early: bool,
    regions: Vec<(u8, u64)>,
}

impl Default for Peer {
    fn default() -> Self {
        Peer {
            features: VIRTIO_F_VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES,
            protocol: PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG,
            config: Vec::new(),
            past_end: PastEnd::Refuse,
            only_whole: false,
            always_whole: false,
            delay: Duration::ZERO,
            buffer: 4096,
            is_out_of_step: false,
            queues: 1,
            entries: 1024,
            entries_of: Vec::new(),
            refusal: Refusal::Answer,
            counts_pairs: false,
            answers_early: true,
            regions: Vec::new(),
        }
    }
}

/// What a back-end was asked.
#[derive(Default)]
struct Asked {
    /// By how many bytes beyond its end.
    past_end: usize,
    configs: usize,
    sizes: Vec<(u32, u32)>,
    ids: Vec<u32>,
}

/// A back-end that listens.
struct Listening {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    asked: Arc<Mutex<Asked>>,
}

impl Peer {
    fn without(mut self, protocol: u64) -> Peer {
        self.protocol &= !protocol;
        self
    }

    fn listen(self) -> Listening {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let asked = Arc::<Mutex<Asked>>::default();
        let record = Arc::clone(&asked);
        thread::spawn(move || {
            while let Ok((socket, _)) = listener.accept() {
                if self.serve(socket, &record) && self.refusal == Refusal::Die {
                    return;
                }
            }
        });
        Listening { _dir: dir, socket, asked }
    }

    /// Until one side hangs up; whether that was at a queue that is too large.
    fn serve(&self, socket: UnixStream, record: &Mutex<Asked>) -> bool {
        let main = Wire::new(socket);
        while let Ok(request) = main.receive_within(None) {
            record.lock().unwrap().ids.push(request.request);
            let refused = request.request == SET_VRING_NUM && !self.takes(&request, record);
            let is_asked = request.flags & NEED_REPLY != 0 && self.answers_early;
            let answer = match request.request {
                GET_FEATURES => quads([self.features]),
                GET_PROTOCOL_FEATURES => quads([self.protocol]),
                GET_QUEUE_NUM => quads([self.queues]),
                GET_SHMEM_CONFIG => shmem_config(self.regions.len() as u32, 0, &self.regions),
                GET_CONFIG => match self.configuration(&request, record) {
                    Some(answer) => answer,
                    None if self.past_end == PastEnd::Silence && self.buffer > 256 => continue,
                    None => return false,
                },
                _ if is_asked => quads([u64::from(refused)]),
                _ => Vec::new(),
            };
            if request.request == GET_CONFIG {
                thread::sleep(self.delay);
                if self.is_out_of_step {
                    main.send(&message(GET_QUEUE_NUM, VERSION_1 | REPLY, &quads([2])));
                }
            }
            let has_answer = is_asked || [1, 15, 17, 24, 44].contains(&request.request);
            if has_answer
                && main.send_with(&message(request.request, VERSION_1 | REPLY, &answer), &[]).is_err()
            {
                return false;
            }
            if refused && self.refusal != Refusal::Answer {
                return true;
            }
        }
        false
    }

    fn takes(&self, request: &Message, record: &Mutex<Asked>) -> bool {
        let [index, size] = [0, 4].map(|at| word(&request.payload, at));
        record.lock().unwrap().sizes.push((index, size));
        let most = self.entries_of.get(index as usize).unwrap_or(&self.entries);
        u64::from(index) < self.queues * (1 + u64::from(self.counts_pairs)) && size <= *most
    }

    fn configuration(&self, request: &Message, record: &Mutex<Asked>) -> Option<Vec<u8>> {
        let [offset, size] = [0, 4].map(|at| word(&request.payload, at));
        assert_eq!((offset, request.payload.len()), (0, 12 + size as usize));
        let size = size as usize;
        if size > self.buffer {
            return None;
        }
        let mut record = record.lock().unwrap();
        record.configs += 1;
        record.past_end = record.past_end.max(size.saturating_sub(self.config.len()));
        let answer = |bytes: &[u8]| Some([&words([0, bytes.len() as u32, 0])[..], bytes].concat());
        match self.config.get(..size) {
            _ if self.always_whole => answer(&self.config),
            Some(bytes) if !self.only_whole || size == self.config.len() => answer(bytes),
            Some(_) => answer(&[]),
            None => match self.past_end {
                PastEnd::Refuse => answer(&[]),
                PastEnd::RefuseEmpty => Some(Vec::new()),
                PastEnd::Short => answer(&self.config),
                PastEnd::Silence | PastEnd::HangUp => None,
            },
        }
    }
}

fn word(payload: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(payload[at..at + 4].try_into().unwrap())
}

impl Listening {
    fn spec(&self, keys: &str) -> DeviceSpec {
        format!("{},{keys}", self.socket.display()).parse().unwrap()
    }

    fn connect(&self, keys: &str) -> Result<Handshake, ConnectError> {
        connect::connect(&self.spec(keys), PATIENCE, false, None)
    }

    /// The sentence and the hint.
    fn refused(&self, keys: &str) -> String {
        let spec = self.spec(keys);
        let error = connect::connect(&spec, PATIENCE, false, None).unwrap_err();
        let hint = error.hint(&spec).unwrap_or_default();
        format!("{}; {hint}", hotslot::report::with_causes(&error))
    }

    fn asked(&self) -> std::sync::MutexGuard<'_, Asked> {
        self.asked.lock().unwrap()
    }
}

/// Bytes that are not 0.
fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251) as u8 + 1).collect()
}

fn queues(handshake: &Handshake) -> u64 {
    handshake.queue_sizes.len() as u64
}

fn guest_features(handshake: &Handshake) -> u64 {
    // RING_RESET is the front-end's own.
    handshake.frontend.agreement.guest_features & !(1 << 40)
}

#[test]
fn a_device_of_an_unknown_type_has_what_its_back_end_has() {
    // SHM-90, SHM-91, SHM-92
    let all = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG;
    let offers = [all, all & !PROTOCOL_F_MQ, all & !PROTOCOL_F_REPLY_ACK, all & !PROTOCOL_F_CONFIG, 0];
    let spaces = [
        (0, PastEnd::Refuse),
        (8, PastEnd::RefuseEmpty),
        (40, PastEnd::Short),
        (300, PastEnd::Refuse),
        (3840, PastEnd::Refuse),
    ];
    let mut peers = Vec::new();
    for (protocol, (config, past_end)) in offers.iter().flat_map(|&offer| spaces.map(|space| (offer, space)))
    {
        for (queues, entries) in [1, 2, 3, 17].iter().flat_map(|&n| [64, 128, 1024].map(|size| (n, size))) {
            // That search is long.
            if config > 300 && (queues, entries) != (17, 128) {
                continue;
            }
            // Without REPLY_ACK a refusal shows only where the back-end hangs up.
            let answers = [Refusal::Answer].into_iter().filter(|_| protocol & PROTOCOL_F_REPLY_ACK != 0);
            peers.extend(answers.chain([Refusal::HangUp]).map(|refusal| {
                let config = bytes(config);
                Peer { protocol, config, past_end, queues, entries, refusal, ..Peer::default() }
            }));
        }
    }
    for peer in peers {
        let listening = peer.clone().listen();
        let handshake = listening.connect("type=200").unwrap();
        let has = |bit| peer.protocol & bit != 0;
        let config = if has(PROTOCOL_F_CONFIG) { peer.config.len() } else { 0 };
        assert_eq!(handshake.config, bytes(config));
        assert_eq!(queues(&handshake), if has(PROTOCOL_F_MQ) { peer.queues } else { 1 });
        assert!(handshake.queue_sizes.iter().all(|&size| u32::from(size) == peer.entries.min(128)));
        assert!(listening.asked().past_end <= 1);
    }
    // Without any protocol feature.
    let peer = Peer { features: VIRTIO_F_VERSION_1, queues: 17, config: bytes(8), ..Peer::default() };
    let handshake = peer.listen().connect("type=200").unwrap();
    assert_eq!((handshake.queue_sizes, handshake.config.len()), (vec![128], 0));
}

#[test]
fn with_config_size_no_byte_past_the_end_is_asked_for() {
    // SHM-91
    for size in [0, 8, 40, 300, 3840] {
        for (past_end, kind) in
            [(PastEnd::Silence, "200"), (PastEnd::HangUp, "net"), (PastEnd::Refuse, "rng")]
        {
            let listening = Peer { config: bytes(size), past_end, queues: 2, ..Peer::default() }.listen();
            let handshake = listening.connect(&format!("type={kind},config-size={size},queues=2")).unwrap();
            assert_eq!(handshake.config, bytes(size));
            let asked = listening.asked();
            assert_eq!((asked.past_end, asked.configs), (0, usize::from(size > 0)));
        }
    }
    let listening = Peer { config: bytes(40), ..Peer::default() }.listen();
    let error = listening.refused("type=200,config-size=41");
    assert!(
        error.contains("refuses GET_CONFIG of 41 bytes, and answers up to 40; say")
            && error.contains("config-size=40"),
        "{error}"
    );
}

#[test]
fn a_back_end_that_answers_only_for_all_of_its_configuration_is_found_out() {
    // SHM-91
    for (kind, features, size) in [("blk", 1 << 6, 60), ("blk", 1 << 14, 96), ("gpu", 0, 20)] {
        let peer = Peer { features: Peer::default().features | features, ..Peer::default() };
        let listening = Peer { config: bytes(size), only_whole: true, queues: 256, ..peer }.listen();
        let handshake = listening.connect(&format!("type={kind}")).unwrap();
        assert_eq!(handshake.config, bytes(size), "{kind}");
        assert_eq!(listening.asked().past_end, 0);
    }
}

#[test]
fn more_configuration_than_was_asked_for_is_an_error() {
    // SHM-91
    let listening = Peer { config: bytes(40), always_whole: true, ..Peer::default() }.listen();
    for (keys, expected) in
        [("type=200", 13), ("type=200,config-size=8", 20), ("type=rng,config-size=39", 51)]
    {
        let error = listening.refused(keys);
        assert!(error.contains(&format!("GET_CONFIG with 52 bytes instead of {expected} bytes")), "{error}");
    }
    assert_eq!(listening.connect("type=200,config-size=40").unwrap().config, bytes(40));
}

#[test]
fn a_back_end_that_fails_at_its_end_is_one_sentence_with_the_remedy() {
    // SHM-91. The silent ones take as long as the set-up waits; so all at the same time.
    thread::scope(|scope| {
        for past_end in [PastEnd::Silence, PastEnd::HangUp] {
            for size in [0, 8, 40] {
                scope.spawn(move || {
                    let listening = Peer { config: bytes(size), past_end, ..Peer::default() }.listen();
                    let error = listening.refused("type=200");
                    let (asked, had) =
                        (format!("GET_CONFIG of {} bytes", size + 1), format!("answered {size} bytes"));
                    assert!(error.contains(&asked) && error.contains(&had), "{error}");
                    assert!(error.contains(&format!("config-size={size}")), "{error}");
                    assert_eq!(listening.asked().past_end, 1);
                    listening.connect(&format!("type=200,config-size={size}")).unwrap();
                });
                scope.spawn(move || {
                    // Its features mean 60 bytes.
                    let features = Peer::default().features | 1 << 14;
                    let listening =
                        Peer { config: bytes(size), past_end, features, ..Peer::default() }.listen();
                    let error = listening.refused("type=blk");
                    assert!(
                        error.contains("GET_CONFIG failed") && error.contains("config-size=N"),
                        "{error}"
                    );
                });
            }
        }
    });
    let peer = Peer { config: bytes(40), features: Peer::default().features | 1 << 14, ..Peer::default() };
    let listening = peer.clone().listen();
    let error = listening.refused("type=blk");
    assert!(error.contains("refuses GET_CONFIG of 60 bytes, and answers up to 40"), "{error}");
    assert!(error.contains("config-size=40"), "{error}");
    assert_eq!(listening.asked().past_end, 20, "what its features mean, and not more");
    listening.connect("type=blk,config-size=40").unwrap();
    // `config-size=0` would leave the driver of a disk without its capacity.
    for (config, parts) in [
        (bytes(0), ["GET_CONFIG of 60 bytes, and of fewer", "needs 8 bytes"]),
        (bytes(7), ["answers up to 7", "needs 8 bytes"]),
    ] {
        let error = Peer { config, ..peer.clone() }.listen().refused("type=blk");
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert!(error.contains("config=") && !error.contains("config-size=0"), "{error}");
    }
}

#[test]
fn a_slow_back_end_has_a_deadline_for_each_request_and_one_for_the_search() {
    // SHM-91: 7 s in all, which is more than one request may take; and too long. At the same time.
    thread::scope(|scope| {
        scope.spawn(|| {
            let delay = Duration::from_millis(200);
            let listening = Peer { config: bytes(34), delay, ..Peer::default() }.listen();
            assert_eq!(listening.connect("type=200").unwrap().config, bytes(34));
        });
        scope.spawn(|| {
            let delay = Duration::from_millis(500);
            let listening = Peer { config: bytes(300), delay, ..Peer::default() }.listen();
            let error = listening.refused("type=200");
            assert!(
                error.contains("not found within 15 s: the back-end answered GET_CONFIG of 1 to "),
                "{error}"
            );
            assert!(error.contains("config-size=N"), "{error}");
        });
    });
}

#[test]
fn a_back_end_whose_buffer_ends_at_the_usual_256_bytes_has_these() {
    // SHM-91: as libvhost-user and the `vhost` crate, which hang up at more.
    let peer = Peer { config: bytes(3840), buffer: 256, ..Peer::default() };
    assert_eq!(peer.clone().listen().connect("type=200").unwrap().config, bytes(256));
    // One that does not come back is told of.
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let listener = UnixListener::bind(&socket).unwrap();
    let once = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        drop(listener);
        peer.serve(socket, &Mutex::default());
    });
    let spec: DeviceSpec = format!("{},type=200", socket.display()).parse().unwrap();
    let error = connect::connect(&spec, PATIENCE, false, None).unwrap_err();
    once.join().unwrap();
    let said = error.to_string();
    assert!(said.contains("failed at GET_CONFIG of 257 bytes, after it had answered 256 bytes"), "{said}");
    assert_eq!(error.hint(&spec).unwrap(), "say how many bytes it has with config-size=256");
}

#[test]
fn an_answer_out_of_step_is_called_that() {
    // SHM-12
    let peer = Peer { config: bytes(8), queues: 3, is_out_of_step: true, ..Peer::default() };
    let error = peer.listen().refused("type=vsock");
    assert_eq!(
        error,
        "the back-end answered GET_CONFIG with an answer to GET_QUEUE_NUM: its answers are out of step; "
    );
}

#[test]
fn a_feature_without_its_field_or_its_queue_is_not_offered_to_the_driver() {
    // SHM-92
    let features = Peer::default().features;
    // SEG_MAX ends at 16, WRITE_ZEROES at 60.
    let peer = Peer { features: features | 1 << 2 | 1 << 14, config: bytes(40), ..Peer::default() };
    let handshake = peer.clone().listen().connect("type=blk,config-size=40").unwrap();
    assert_eq!(guest_features(&handshake), VIRTIO_F_VERSION_1 | 1 << 2);
    assert_eq!(handshake.config, [bytes(40), vec![0; 20]].concat());
    let short = Peer { past_end: PastEnd::Short, ..peer };
    assert_eq!(guest_features(&short.listen().connect("type=blk").unwrap()), VIRTIO_F_VERSION_1 | 1 << 2);

    // MULTIPORT needs two more queues, and its field.
    let console =
        Peer { features: features | 1 << 1, config: vec![0, 0, 0, 0, 1, 0, 0, 0], ..Peer::default() };
    let four = Peer { queues: 4, ..console.clone() }.listen().connect("type=console").unwrap();
    assert_eq!((queues(&four), guest_features(&four) & 1 << 1), (4, 1 << 1));
    for (peer, keys) in [
        (Peer { queues: 2, ..console.clone() }, "type=console"),
        (Peer { queues: 4, ..console.clone() }, "type=console,queues=2"),
        (Peer { queues: 4, ..console }.without(PROTOCOL_F_CONFIG), "type=console"),
    ] {
        let two = peer.listen().connect(keys).unwrap();
        assert_eq!((queues(&two), guest_features(&two) & 1 << 1), (2, 0), "{keys}");
    }
}

#[test]
fn the_number_of_queues_is_what_the_type_means_and_the_back_end_has() {
    // SHM-92
    let features = Peer::default().features;
    let blk = |count: u8, queues| {
        let mut config = vec![0; 36];
        config[34] = count;
        Peer { features: features | 1 << 12, config, queues, ..Peer::default() }
    };
    for (peer, keys, count, announced) in [
        (blk(4, 4), "type=blk", 4, 4),
        (blk(4, 2), "type=blk", 2, 2),
        (blk(2, 4), "type=blk", 2, 2),
        (blk(4, 4), "type=blk,queues=3", 3, 3),
        (blk(4, 4).without(PROTOCOL_F_MQ), "type=blk", 4, 4),
    ] {
        let handshake = peer.listen().connect(keys).unwrap();
        assert_eq!((queues(&handshake), handshake.config[34]), (count, announced), "{keys}");
    }
    // passt and DPDK count pairs.
    let net = Peer { queues: 1, refusal: Refusal::HangUp, ..Peer::default() };
    let pair = Peer { counts_pairs: true, ..net.clone() };
    assert_eq!(queues(&pair.listen().connect("type=net").unwrap()), 2);
    let error = net.clone().listen().refused("type=net,queues=4");
    assert!(error.contains("has 3 of the 4 queues that the device is to have (GET_QUEUE_NUM)"), "{error}");
    assert!(error.contains("queues=3"), "{error}");
    let error = net.listen().refused("type=net,queues=1");
    assert!(error.contains("queues=1: a device of type net has at least 2 queues"), "{error}");

    for (count, keys, parts) in [
        (
            2,
            "type=scsi,config-size=36",
            ["has 2 of the 3 queues", "more queues: a device of type scsi needs 3"],
        ),
        (2, "type=can,config-size=2", ["has 2 of the 3 queues", "more queues: a device of type can needs 3"]),
        (0, "type=200", ["has 0 of the 1 queues", "more queues"]),
        (17, "type=200,queues=18", ["has 17 of the 18 queues", "say queues=17"]),
    ] {
        let error = Peer { queues: count, config: bytes(36), ..Peer::default() }.listen().refused(keys);
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
        assert_eq!(error.contains("say queues="), count == 17, "{error}");
    }
    // A network back-end that counts queues, and not pairs: the first that it lacks is named.
    let mut config = vec![0; 12];
    config[8] = 17;
    let features = features | 1 << 17 | 1 << 22;
    let listening = Peer { features, config, queues: 17, ..Peer::default() }.listen();
    let error = listening.refused("type=net");
    assert!(error.contains("SET_VRING_NUM of 256 entries for queue 17, and any smaller number"), "{error}");
    assert!(error.contains("takes 256 for queue 16; ") && error.contains("say queues=17"), "{error}");
    assert_eq!(queues(&listening.connect("type=net,queues=17").unwrap()), 17);
    // It does not say how many it has.
    for refusal in [Refusal::Answer, Refusal::HangUp] {
        let peer = Peer { queues: 1, refusal, ..Peer::default() }.without(PROTOCOL_F_MQ);
        let error = peer.clone().listen().refused("type=console");
        assert!(
            error.contains(
                "SET_VRING_NUM of 128 entries for queue 1, and any smaller number, and takes 128 for queue 0"
            ),
            "{error}"
        );
        assert!(error.contains("more queues: a device of type console needs 2"), "{error}");
        let error = peer.listen().refused("type=200,queues=3");
        assert!(error.contains("say queues=1"), "{error}");
    }
}

#[test]
fn a_queue_size_that_is_refused_is_found_out_before_the_guest_runs() {
    // SHM-90
    for refusal in [Refusal::Answer, Refusal::HangUp] {
        let peer = Peer { entries: 100, refusal, queues: 3, ..Peer::default() };
        let listening = peer.clone().listen();
        assert_eq!(listening.connect("type=200").unwrap().queue_sizes, [64; 3]);
        // One that hangs up is not made to do so again for each queue.
        let answers = refusal == Refusal::Answer;
        let asked = match answers {
            true => vec![(0, 128), (0, 64), (1, 128), (1, 64), (2, 128), (2, 64)],
            false => vec![(0, 128), (0, 64), (1, 64), (2, 64)],
        };
        assert_eq!(listening.asked().sizes, asked);
        let error = peer.clone().listen().refused("type=200,queue-size=256");
        let sentence = "refuses SET_VRING_NUM of 256 entries for queue 0 and takes 64; say queue-size=64";
        assert!(error.contains(sentence), "{error}");
        let error = Peer { entries: 0, ..peer.clone() }.listen().refused("type=200");
        assert!(
            error.contains("SET_VRING_NUM of 128 entries for queue 0, and any smaller number"),
            "{error}"
        );
        // Each of its queues has a limit of its own, as far as it answers.
        for entries_of in [vec![64, 1024, 16], vec![1024, 128, 32], vec![16, 64, 1024]] {
            let peer = Peer { entries_of: entries_of.clone(), ..peer.clone() };
            let mut sizes = entries_of.clone();
            if !answers {
                (1..3).for_each(|at| sizes[at] = sizes[at].min(sizes[at - 1]));
            }
            let expected: Vec<u16> = sizes.iter().map(|&size| size.min(128) as u16).collect();
            assert_eq!(peer.clone().listen().connect("type=200").unwrap().queue_sizes, expected);
            let error = peer.listen().refused("type=200,queue-size=128");
            let (at, least) = (0..).zip(&expected).min_by_key(|(_, size)| **size).unwrap();
            assert!(
                error.contains(&format!("for queue {at} and takes {least}; say queue-size={least}")),
                "{error}"
            );
        }
    }
    let dies = Peer { entries: 128, refusal: Refusal::Die, ..Peer::default() };
    let error = dies.clone().listen().refused("type=200,queue-size=256");
    assert!(error.contains("hung up at SET_VRING_NUM of 256 entries for queue 0"), "{error}");
    assert!(error.contains("queue-size=128"), "{error}");
    // The usual size is no more than what the back-ends of `vhost-device` take.
    let console = Peer { queues: 2, ..dies }.listen().connect("type=console").unwrap();
    assert_eq!(console.queue_sizes, [128; 2]);
}

#[test]
fn a_healthy_back_end_is_asked_once_for_its_queue_size() {
    // SHM-90
    for answers_early in [true, false] {
        let listening = Peer { answers_early, ..Peer::default() }.listen();
        listening.connect("type=rng").unwrap();
        let asked = listening.asked();
        assert_eq!(asked.sizes, [(0, 128)]);
        assert!(asked.ids.ends_with(&[SET_VRING_NUM, GET_FEATURES]), "{:?}", asked.ids);
    }
}

#[test]
fn what_a_back_end_without_config_leaves_out_the_user_can_give() {
    // SHM-91
    let bare = || Peer { queues: 2, ..Peer::default() }.without(PROTOCOL_F_CONFIG);
    let fs = bare().listen().connect("type=fs,tag=share").unwrap();
    assert_eq!(fs.config, [b"share".as_slice(), &[0; 31], &[1, 0, 0, 0]].concat());
    assert_eq!(queues(&fs), 2);
    let error = bare().listen().refused("type=fs");
    assert!(error.contains("CONFIG") && error.contains("tag=NAME"), "{error}");
    let error = bare().listen().refused("type=vsock");
    assert!(error.contains("CONFIG") && error.contains("config="), "{error}");
    let vsock = Peer { queues: 3, ..bare() }.listen().connect("type=vsock,config=0300000000000000").unwrap();
    assert_eq!(vsock.config, [3, 0, 0, 0, 0, 0, 0, 0]);
    let error = Peer { queues: 3, ..bare() }.listen().refused("type=vsock,config=03");
    assert!(error.contains("needs 8 bytes of configuration space, and has 1"), "{error}");
    // MAC, STATUS and CTRL_VQ: their fields say nothing, but for the address.
    let features = Peer::default().features | 1 << 5 | 1 << 15 | 1 << 16 | 1 << 17;
    let net = Peer { features, ..bare() }.listen().connect("type=net").unwrap();
    assert_eq!((queues(&net), guest_features(&net)), (2, VIRTIO_F_VERSION_1 | 1 << 15));
    let net = Peer { features: features & !(1 << 5), ..bare() };
    let net = net.listen().connect("type=net,mac=52:54:00:12:34:56").unwrap();
    assert_eq!(guest_features(&net), VIRTIO_F_VERSION_1 | 1 << 5 | 1 << 15);
    assert_eq!(net.config[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    // The user's tag goes before the back-end's; the rest is the back-end's.
    let own = Peer { config: [&bytes(36)[..], &[2, 0, 0, 0]].concat(), queues: 3, ..Peer::default() };
    let fs = own.listen().connect("type=fs,tag=x").unwrap();
    assert_eq!(fs.config, [b"x".as_slice(), &[0; 35], &[2, 0, 0, 0]].concat());
    assert_eq!(queues(&fs), 3);
}

#[test]
fn a_file_system_without_a_tag_is_warned_of() {
    // SHM-91
    let untagged =
        Peer { config: [&[0; 36][..], &[1, 0, 0, 0]].concat(), queues: 2, ..Peer::default() }.listen();
    let warnings = |keys| untagged.connect(keys).unwrap().warnings.join("\n");
    assert!(warnings("type=fs").contains("an empty tag"));
    assert_eq!(warnings("type=fs,tag=x"), "");
}

#[test]
fn a_window_whose_size_is_left_to_the_front_end() {
    // SHM-93
    let (offers, page) = (PROTOCOL_F_BACKEND_REQ | PROTOCOL_F_SHMEM | PROTOCOL_F_REPLY_ACK, 4096);
    let pmem = Peer { features: Peer::default().features | 1, protocol: offers, ..Peer::default() };
    let error = pmem.clone().listen().refused("type=pmem");
    assert!(error.contains("no shared memory region") && error.contains("shmem=SHMID:SIZE"), "{error}");
    let listening = pmem.clone().listen();
    let handshake = listening.connect("type=pmem,shmem=3:1M").unwrap();
    assert_eq!(handshake.region_sizes.iter().position(|&size| size > 0), Some(3));
    assert_eq!(handshake.region_sizes[3], 256 * page);
    assert!(!listening.asked().ids.contains(&GET_SHMEM_CONFIG));
    // It works without, too, where the device does not need one.
    assert!(pmem.clone().listen().connect("type=rng").unwrap().region_sizes.iter().all(|&size| size == 0));
    let error = pmem.without(PROTOCOL_F_SHMEM).listen().refused("type=rng,shmem=0:1M");
    assert!(error.contains("does not offer protocol feature SHMEM"), "{error}");
}

#[test]
fn negotiation_that_cannot_work_says_who_lacks_what_and_what_to_do() {
    let features = Peer::default().features;
    let with = |features, protocol| Peer { features, protocol, ..Peer::default() };
    for (peer, keys, sentence, hint) in [
        (with(1 << 30, 0), "type=rng", "does not offer feature VIRTIO_F_VERSION_1", "VIRTIO 1.0"),
        (with(features, 0), "type=iommu", "does not offer feature VIRTIO_IOMMU_F_MAP_UNMAP", "type=iommu"),
        (
            with(VIRTIO_F_VERSION_1, 0),
            "type=blk",
            "VHOST_USER_F_PROTOCOL_FEATURES, and so not protocol feature CONFIG",
            "config=",
        ),
        (
            with(features, 1 << 3),
            "type=blk",
            "protocol feature CONFIG, which a device of type blk needs (it offers REPLY_ACK)",
            "config=",
        ),
        (
            with(features | 1, 1 << 22),
            "type=pmem",
            "BACKEND_REQ, which a device of type pmem needs (it offers SHMEM)",
            "BACKEND_REQ",
        ),
        (
            with(features | 1, 1 << 5),
            "type=pmem",
            "SHMEM, which a device of type pmem needs (it offers BACKEND_REQ)",
            "SHMEM",
        ),
        (with(features | 1, 1 << 5 | 1 << 20), "type=pmem", "SHMEM", "shmem-bit=20"),
        (with(features | 1, 1 << 5 | 1 << 22), "type=pmem,shmem-bit=21", "SHMEM", "shmem-bit=22"),
    ] {
        let error = peer.listen().refused(keys);
        let (said, hinted) = error.split_once("; ").unwrap();
        assert!(said.contains(sentence) && hinted.contains(hint), "{error}");
    }
}
