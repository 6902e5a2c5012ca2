//! What other back-ends are told of a device's mappings (`share-shmem=on`): when, what, and what if they do
//! not listen.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use hotslot::memory::alloc::WindowAllocator;
use hotslot::vhost_user::sharing::Sharing;
use hotslot_test_support::bench::*;
use hotslot_test_support::files::memfd_with;
use hotslot_test_support::names::request::*;
use hotslot_test_support::wire::{MMap, NEED_REPLY, REPLY, SHMEM_MAP, SHMEM_UNMAP, VERSION_1, Wire, message};
use rustix::fs::{MemfdFlags, SealFlags};

/// Where the windows of device `number` may be: each has addresses of its own, as in a machine.
fn windows(number: u64) -> WindowAllocator {
    WindowAllocator::new((1 << 32) + (number << 36), 1 << 40)
}

/// Devices that see each other's mappings, if they are shown.
pub struct Devices {
    sharing: Arc<Sharing>,
    count: u64,
}

impl Devices {
    pub fn new() -> Devices {
        Devices { sharing: Sharing::new(64), count: 0 }
    }

    fn add(&mut self, mut setup: Setup) -> Setup {
        setup.windows = windows(self.count);
        setup.member = Some(self.sharing.join());
        self.count += 1;
        setup
    }

    /// One whose mappings others see.
    pub fn owner(&mut self, setup: Setup) -> Setup {
        let mut setup = self.add(setup);
        setup.shares = true;
        setup
    }

    /// One that sees the mappings of others.
    pub fn recipient(&mut self, setup: Setup) -> Setup {
        let mut setup = self.add(setup);
        setup.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        setup
    }
}

/// An owner, and a recipient that was started.
fn pair(recipient: Setup) -> (Bench, Bench) {
    let mut devices = Devices::new();
    let (owner, other) = (devices.owner(Setup::default()).start(), devices.recipient(recipient).start());
    other.start().unwrap();
    (owner, other)
}

/// The guest address of a page of region 0.
pub fn address(bench: &Bench, page: u64) -> u64 {
    bench.shmem().region(0).unwrap().start() + page * PAGE
}

/// What it was told: ADD_MEM_REG or REM_MEM_REG, and the guest address.
fn told(bench: &Bench) -> Vec<(u32, u64)> {
    let changes = bench.seen();
    let changes = changes.iter().filter(|seen| [ADD_MEM_REG, REM_MEM_REG].contains(&seen.request));
    changes
        .map(|seen| {
            assert_eq!((seen.payload.len(), seen.flags), (40, VERSION_1 | NEED_REPLY));
            assert_eq!(seen.fds, usize::from(seen.request == ADD_MEM_REG));
            (seen.request, quad(&seen.payload, 8))
        })
        .collect()
}

fn quad(payload: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(payload[at..at + 8].try_into().unwrap())
}

fn refuse(request: u32) -> Answer {
    Answer::Bytes(message(request, VERSION_1 | REPLY, &1u64.to_ne_bytes()), None)
}

#[test]
fn others_know_of_a_mapping_before_it_is_answered_and_have_let_go_before_its_removal_is() {
    // SHM-80
    let owners_channel: Arc<Mutex<Option<Wire>>> = Arc::default();
    let (channel, (tell, is_told)) = (Arc::clone(&owners_channel), mpsc::channel());
    let (owner, other) = pair(Setup::default().script(move |request, _| {
        if [ADD_MEM_REG, REM_MEM_REG].contains(&request.request) {
            // Time for an answer that comes too early.
            thread::sleep(Duration::from_millis(50));
            let unanswered = channel.lock().unwrap().as_ref().is_some_and(Wire::is_silent);
            let byte = request.fds.first().map(|_| {
                let mut byte = [0];
                request.file().read_exact_at(&mut byte, PAGE).unwrap();
                request.file().write_all_at(&[0x99], PAGE + 1).unwrap();
                byte[0]
            });
            tell.send((request.payload.clone(), byte, unanswered)).unwrap();
        }
        Answer::Usual
    }));
    *owners_channel.lock().unwrap() = Some(owner.channel());
    let file = memfd(4 * PAGE);
    file.write_all_at(&[0x77], PAGE).unwrap();
    // Not a whole number of pages: they see what the guest sees (SHM-34).
    let request = MMap { fd_offset: PAGE, len: PAGE + 5, ..writable(page_at(3)) };
    owner.channel().ask(SHMEM_MAP, request, &[file.as_raw_fd()]);
    let (payload, byte, unanswered) = is_told.recv_timeout(PATIENCE).unwrap();
    assert!(unanswered);
    assert_eq!(owner.channel().answer(SHMEM_MAP), 0);
    assert_eq!(owner.reads(0, 3 * PAGE + 1), Some(0x99), "it is the same memory");
    let fields = [0, 8, 16, 24, 32].map(|at| quad(&payload, at));
    let (padding, user_address) = (fields[0], fields[3]);
    assert_eq!(padding, 0);
    assert_eq!([fields[1], fields[2], fields[4]], [address(&owner, 3), 2 * PAGE, PAGE]);
    assert_eq!(byte, Some(0x77));

    owner.channel().ask(SHMEM_UNMAP, request, &[]);
    let (payload, _, unanswered) = is_told.recv_timeout(PATIENCE).unwrap();
    assert!(unanswered);
    assert_eq!(owner.channel().answer(SHMEM_UNMAP), 0);
    // A region is known by its guest address, size and user address.
    assert_eq!([8, 16, 24].map(|at| quad(&payload, at)), [address(&owner, 3), 2 * PAGE, user_address]);
    assert_eq!(told(&other), [(ADD_MEM_REG, address(&owner, 3)), (REM_MEM_REG, address(&owner, 3))]);
}

#[test]
fn each_device_sees_the_mappings_of_others_and_not_its_own() {
    // SHM-79, SHM-80: two that share, one that does not, one that cannot see.
    let mut devices = Devices::new();
    let mut first = devices.owner(Setup::default());
    first.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    let mut second = devices.owner(Setup::default());
    second.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    let third = devices.recipient(Setup::default());
    let blind = devices.add(Setup::default());
    let [first, second, third, blind] = [first, second, third, blind].map(Setup::start);
    assert_eq!(first.map(writable(page_at(1)), &file_of(1, 1)), 0);
    for bench in [&first, &second, &third, &blind] {
        bench.start().unwrap();
    }
    for bench in [&first, &second, &third] {
        assert_eq!(bench.map(writable(page_at(0)), &file_of(1, 1)), 0);
    }
    let (a, early, b) = (address(&first, 0), address(&first, 1), address(&second, 0));
    assert_eq!(told(&first), [(ADD_MEM_REG, b)]);
    assert_eq!(told(&second), [(ADD_MEM_REG, early), (ADD_MEM_REG, a)]);
    assert_eq!(told(&third), [(ADD_MEM_REG, early), (ADD_MEM_REG, a), (ADD_MEM_REG, b)]);
    assert_eq!(told(&blind), []);
    for bench in [&first, &second, &third, &blind] {
        bench.reset();
    }
    assert_eq!(told(&first)[1..], [(REM_MEM_REG, b)]);
    assert_eq!(told(&second)[2..], [(REM_MEM_REG, a), (REM_MEM_REG, early)]);
    assert_eq!(told(&third)[3..], [(REM_MEM_REG, a), (REM_MEM_REG, early), (REM_MEM_REG, b)]);
    assert_eq!(told(&blind), []);
}

#[test]
fn without_share_shmem_no_back_end_is_asked_for_memory_slots_or_told_of_mappings() {
    // SHM-80
    let mut setup = Setup::default();
    setup.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
    let bench = setup.start();
    bench.start().unwrap();
    bench.assert_works();
    let seen = bench.seen();
    let acked = seen.iter().find(|seen| seen.request == SET_PROTOCOL_FEATURES).unwrap();
    assert_eq!(quad(&acked.payload, 0) & PROTOCOL_F_CONFIGURE_MEM_SLOTS, 0);
    assert!(seen.iter().all(|seen| ![GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG].contains(&seen.request)));
}

#[test]
fn of_a_refused_request_no_recipient_is_told() {
    // SHM-80
    let (owner, other) = pair(Setup::default());
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 1)), 0);
    assert!(owner.map(writable(page_at(0)), &file_of(1, 1)) < 0);
    assert!(owner.unmap(MMap { len: 2 * PAGE, ..page_at(0) }) < 0);
    assert!(owner.unmap(page_at(1)) < 0);
    assert_eq!(told(&other), [(ADD_MEM_REG, address(&owner, 0))]);
}

#[test]
fn a_reset_is_over_when_others_have_let_go_of_everything() {
    // SHM-69, SHM-80
    let letting_go = Arc::new(AtomicBool::new(false));
    let slow = Arc::clone(&letting_go);
    let (owner, other) = pair(Setup::default().on(REM_MEM_REG, move |_| {
        slow.store(true, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(50));
        slow.store(false, Ordering::SeqCst);
        Answer::Usual
    }));
    owner.start().unwrap();
    for page in 0..5 {
        assert_eq!(owner.map(writable(page_at(page)), &file_of(1, 1)), 0);
    }
    assert_eq!(owner.unmap(page_at(2)), 0);
    owner.reset();
    assert!(!letting_go.load(Ordering::SeqCst));
    let mut gone: Vec<u64> = told(&other)[5..].iter().map(|&(_, address)| address).collect();
    gone.sort_unstable();
    assert_eq!(gone, [0, 1, 2, 3, 4].map(|page| address(&owner, page)));
    assert!(told(&other)[5..].iter().all(|&(request, _)| request == REM_MEM_REG));
    owner.start().unwrap();
    assert_eq!(owner.map(writable(page_at(2)), &file_of(1, 1)), 0);
    assert_eq!(told(&other)[10..], [(ADD_MEM_REG, address(&owner, 2))]);
}

#[test]
fn a_recipient_is_told_of_live_mappings_after_its_memory_table_at_each_start() {
    // SHM-80: a memory table takes the place of all that a back-end was told.
    let mut devices = Devices::new();
    let (owner, other) =
        (devices.owner(Setup::default()).start(), devices.recipient(Setup::default()).start());
    let file = file_of(2, 5);
    assert_eq!(owner.map(writable(page_at(0)), &file), 0);
    assert_eq!(owner.map(writable(page_at(1)), &file), 0);
    drop(file);
    assert_eq!(told(&other), [], "it has no memory yet");
    for pages in [&[0, 1][..], &[1], &[]] {
        let asked = other.asked(|| other.start().unwrap());
        let ids: Vec<u32> = asked.iter().map(|seen| seen.request).collect();
        let table = ids.iter().position(|&id| id == SET_MEM_TABLE).unwrap();
        let added: Vec<u64> = asked[table + 1..]
            .iter()
            .take_while(|seen| seen.request == ADD_MEM_REG)
            .map(|seen| quad(&seen.payload, 8))
            .collect();
        let live: Vec<u64> = pages.iter().map(|&page| address(&owner, page)).collect();
        assert_eq!(added, live, "before its rings run");
        assert_eq!(ids.iter().filter(|&&id| [ADD_MEM_REG, REM_MEM_REG].contains(&id)).count(), live.len());
        // While it is stopped it has its memory all the same.
        other.reset();
        if let Some(&page) = pages.first() {
            let before = told(&other).len();
            assert_eq!(owner.unmap(page_at(page)), 0);
            assert_eq!(told(&other)[before..], [(REM_MEM_REG, address(&owner, page))]);
        }
    }
}

#[test]
fn a_mapping_that_a_back_end_refuses_is_one_that_it_does_not_see() {
    // SHM-80
    let refuses = Arc::new(AtomicBool::new(true));
    let refuses_now = Arc::clone(&refuses);
    let (owner, other) =
        pair(Setup::default().on(ADD_MEM_REG, move |_| match refuses_now.load(Ordering::SeqCst) {
            true => refuse(ADD_MEM_REG),
            false => Answer::Usual,
        }));
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 0x42)), 0);
    assert_eq!(owner.reads(0, 0), Some(0x42));
    refuses.store(false, Ordering::SeqCst);
    assert_eq!(owner.map(writable(page_at(1)), &file_of(1, 1)), 0);
    assert_eq!((owner.unmap(page_at(0)), owner.unmap(page_at(1))), (0, 0));
    let (first, second) = (address(&owner, 0), address(&owner, 1));
    assert_eq!(told(&other), [(ADD_MEM_REG, first), (ADD_MEM_REG, second), (REM_MEM_REG, second)]);
    assert!(!other.needs_reset());
}

#[test]
fn a_recipient_is_told_of_what_fits_its_memory_slots_and_of_the_rest_later() {
    // SHM-80: one slot has RAM in it.
    let mut setup = Setup::default();
    setup.offer.slots = 3;
    let (owner, other) = pair(setup);
    for page in 0..4 {
        assert_eq!(owner.map(writable(page_at(page)), &file_of(1, 1)), 0);
    }
    let [a, b, c] = [0, 1, 2].map(|page| address(&owner, page));
    assert_eq!(told(&other), [(ADD_MEM_REG, a), (ADD_MEM_REG, b)]);
    assert_eq!(owner.unmap(page_at(3)), 0);
    assert_eq!(told(&other).len(), 2, "it had not been told of that mapping");
    assert_eq!(owner.unmap(page_at(0)), 0);
    eventually("the next one gets the room", || told(&other).len() == 4);
    assert_eq!(told(&other)[2..], [(REM_MEM_REG, a), (ADD_MEM_REG, c)]);
    owner.reset();
    assert_eq!(told(&other).len(), 6);
    assert!(!other.needs_reset());
}

#[test]
fn only_what_can_be_mapped_for_reading_and_writing_is_shown() {
    // SHM-80
    let (owner, other) = pair(Setup::default());
    let file = file_of(1, 3);
    let reopened = |options: &mut std::fs::OpenOptions| {
        options.open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
    };
    let read_only = reopened(File::options().read(true));
    assert_eq!(owner.map(page_at(0), &read_only), 0);
    let sealed = memfd_with(MemfdFlags::ALLOW_SEALING, PAGE);
    rustix::fs::fcntl_add_seals(&sealed, SealFlags::WRITE).unwrap();
    assert_eq!(owner.map(page_at(1), &sealed), 0);
    assert_eq!(told(&other), []);
    // Read-only for the guest's processors: what others may do is up to the descriptor.
    assert_eq!(owner.map(page_at(2), &file), 0);
    assert_eq!(told(&other), [(ADD_MEM_REG, address(&owner, 2))]);
    for page in 0..3 {
        assert_eq!(owner.unmap(page_at(page)), 0);
    }
    assert_eq!(told(&other).len(), 2);
}

#[test]
fn at_most_the_configured_number_of_files_is_kept() {
    // SHM-46, SHM-80
    let mut devices = Devices { sharing: Sharing::new(1), count: 0 };
    let (owner, other) =
        (devices.owner(Setup::default()).start(), devices.recipient(Setup::default()).start());
    other.start().unwrap();
    let file = file_of(2, 1);
    assert_eq!(owner.map(writable(page_at(0)), &file), 0);
    assert_eq!(owner.map(writable(page_at(1)), &file), 0);
    assert_eq!(owner.map(writable(page_at(2)), &file_of(1, 1)), 0);
    assert_eq!(told(&other).len(), 2, "one file, twice");
    assert_eq!((owner.unmap(page_at(0)), owner.unmap(page_at(1))), (0, 0));
    assert_eq!(owner.map(writable(page_at(3)), &file_of(1, 1)), 0);
    assert_eq!(told(&other)[4..], [(ADD_MEM_REG, address(&owner, 3))]);
}

#[test]
fn where_requests_cannot_ask_for_an_answer_one_that_has_an_answer_follows() {
    // SHM-80
    let (owner, other) = pair(Setup::default().without(PROTOCOL_F_REPLY_ACK));
    let asked = other.asked(|| {
        assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 1)), 0);
        assert_eq!(owner.unmap(page_at(0)), 0);
    });
    // The end of its start may still be on its way.
    let asked =
        asked.iter().filter(|seen| [GET_MAX_MEM_SLOTS, ADD_MEM_REG, REM_MEM_REG].contains(&seen.request));
    let asked: Vec<_> = asked.map(|seen| (seen.request, seen.flags)).collect();
    let slots = (GET_MAX_MEM_SLOTS, VERSION_1);
    assert_eq!(asked, [(ADD_MEM_REG, VERSION_1), slots, (REM_MEM_REG, VERSION_1), slots]);
}

#[test]
fn a_recipient_that_does_not_answer_is_cut_off_and_the_owner_goes_on() {
    // SHM-66, SHM-80. The cases wait at the same time.
    thread::scope(|scope| {
        for (request, bytes) in [
            (ADD_MEM_REG, None),
            (REM_MEM_REG, None),
            // Not an answer.
            (ADD_MEM_REG, Some(message(ADD_MEM_REG, VERSION_1 | REPLY, &[0; 4]))),
            (REM_MEM_REG, Some(message(ADD_MEM_REG, VERSION_1 | REPLY, &[0; 8]))),
            // It keeps what it must not keep.
            (REM_MEM_REG, Some(message(REM_MEM_REG, VERSION_1 | REPLY, &1u64.to_ne_bytes()))),
        ] {
            scope.spawn(move || {
                let (owner, other) = pair(Setup::default().on(request, move |_| match &bytes {
                    None => Answer::Silence,
                    Some(bytes) => Answer::Bytes(bytes.clone(), None),
                }));
                owner.start().unwrap();
                assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 9)), 0);
                if request == ADD_MEM_REG {
                    other.wait_until_failed();
                }
                assert_eq!(owner.map(writable(page_at(1)), &file_of(1, 9)), 0);
                assert_eq!(owner.unmap(page_at(0)), 0);
                other.wait_until_failed();
                let before = told(&other).len();
                owner.assert_works();
                owner.reset();
                assert_eq!((told(&other).len(), owner.guest().count()), (before, 0));
                owner.start().unwrap();
                owner.assert_works();
                other.start().unwrap_err();
            });
        }
    });
}

#[test]
fn mappings_of_an_owner_that_died_stay_until_its_reset() {
    // SHM-76, SHM-80
    let (owner, other) = pair(Setup::default());
    owner.start().unwrap();
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 9)), 0);
    owner.hang_up();
    owner.wait_until_failed();
    other.reset();
    other.start().unwrap();
    let at = address(&owner, 0);
    assert_eq!(told(&other), [(ADD_MEM_REG, at), (ADD_MEM_REG, at)]);
    owner.reset();
    assert_eq!(told(&other)[2..], [(REM_MEM_REG, at)]);
}

#[test]
fn a_recipient_that_died_is_forgotten() {
    // SHM-80
    let (owner, other) = pair(Setup::default());
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 9)), 0);
    other.hang_up();
    assert_eq!(owner.map(writable(page_at(1)), &file_of(1, 9)), 0);
    assert_eq!(owner.unmap(page_at(0)), 0);
    other.wait_until_failed();
    drop(other);
    owner.assert_works();
    owner.reset();
    assert_eq!(owner.guest().count(), 0);
}

#[test]
fn an_owner_that_is_gone_shows_nothing_any_more() {
    // SHM-78, SHM-80
    let (owner, other) = pair(Setup::default());
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 9)), 0);
    let at = address(&owner, 0);
    drop(owner.end());
    eventually("it is let go", || told(&other) == [(ADD_MEM_REG, at), (REM_MEM_REG, at)]);
    let asked = other.asked(|| other.start().unwrap());
    assert!(asked.iter().all(|seen| seen.request != ADD_MEM_REG));
}

/// A back-end with one thread: while it maps, it does not answer.
fn maps_before_it_answers(request: u32, tell: mpsc::Sender<i64>) -> Setup {
    Setup::default().on(request, move |peer| {
        let mapped = peer.map(writable(page_at(60)), &file_of(1, 6));
        let _ = tell.send(mapped);
        Answer::Usual
    })
}

#[test]
fn two_back_ends_that_wait_for_each_other_both_get_their_answer() {
    // SHM-67, SHM-80: each maps, or unmaps, and does not listen before it has its answer, which the other one
    // holds up.
    for first_unmaps in [false, true] {
        let mut devices = Devices::new();
        let (tell, second_mapped) = mpsc::channel();
        let (answered, is_answered) = mpsc::channel();
        let listens = Arc::new(AtomicBool::new(true));
        let listens_now = Arc::clone(&listens);
        let mut first = devices.owner(Setup::default().on(ADD_MEM_REG, move |_| {
            if !listens_now.load(Ordering::SeqCst) {
                is_answered.recv_timeout(PATIENCE).unwrap();
            }
            Answer::Usual
        }));
        first.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        let request = if first_unmaps { REM_MEM_REG } else { ADD_MEM_REG };
        let mut second = devices.owner(maps_before_it_answers(request, tell));
        second.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        let (first, second) = (first.start(), second.start());
        first.start().unwrap();
        second.start().unwrap();
        if first_unmaps {
            assert_eq!(first.map(writable(page_at(0)), &file_of(1, 1)), 0);
        }
        listens.store(false, Ordering::SeqCst);
        let result = match first_unmaps {
            true => first.unmap(page_at(0)),
            false => first.map(writable(page_at(0)), &file_of(1, 1)),
        };
        assert_eq!(result, 0);
        answered.send(()).unwrap();
        assert_eq!(second_mapped.recv_timeout(PATIENCE).unwrap(), 0);
        // What was left open is told all the same.
        eventually("the first is told", || told(&first) == [(ADD_MEM_REG, address(&second, 60))]);
        assert!(!first.needs_reset() && !second.needs_reset());
        listens.store(true, Ordering::SeqCst);
        first.reset();
        second.reset();
        assert!(!first.needs_reset() && !second.needs_reset());
        assert_eq!((first.guest().count(), second.guest().count()), (0, 0));
    }
}

#[test]
fn two_back_ends_that_map_while_both_are_started_do_start() {
    // SHM-67, SHM-80: each vCPU has the main socket that the other's mapping is to be told on.
    let mut devices = Devices::new();
    let both = Arc::new(Barrier::new(2));
    let [first, second] = [0, 1].map(|_| {
        let both = Arc::clone(&both);
        let mut setup = devices.owner(Setup::default().on(SET_MEM_TABLE, move |peer| {
            both.wait();
            assert_eq!(peer.map(writable(page_at(60)), &file_of(1, 6)), 0);
            Answer::Usual
        }));
        setup.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        setup.start()
    });
    for _ in 0..3 {
        thread::scope(|scope| {
            for bench in [&first, &second] {
                scope.spawn(|| bench.start().unwrap());
            }
        });
        let knows = |bench: &Bench, other: &Bench| {
            let table = bench.seen().iter().rposition(|seen| seen.request == SET_MEM_TABLE);
            let since = &bench.seen()[table.unwrap()..];
            let at = address(other, 60);
            since.iter().any(|seen| seen.request == ADD_MEM_REG && quad(&seen.payload, 8) == at)
        };
        eventually("each knows the other's", || knows(&first, &second) && knows(&second, &first));
        first.reset();
        second.reset();
        assert!(!first.needs_reset() && !second.needs_reset());
    }
}

#[test]
fn a_busy_recipient_learns_of_a_mapping_later_but_must_let_go_in_time() {
    // SHM-66, SHM-80: a vCPU waits for the recipient on its main socket.
    let (resume, is_over) = mpsc::channel::<()>();
    let busy = Arc::new(AtomicBool::new(false));
    let is_busy = Arc::clone(&busy);
    let (owner, other) = pair(Setup::default().on(SET_MEM_TABLE, move |_| {
        if is_busy.load(Ordering::SeqCst) {
            let _ = is_over.recv_timeout(PATIENCE);
        }
        Answer::Usual
    }));
    assert_eq!(owner.map(writable(page_at(0)), &file_of(1, 1)), 0);
    busy.store(true, Ordering::SeqCst);
    let (page_1, before) = (address(&owner, 1), told(&other).len());
    thread::scope(|scope| {
        let started = scope.spawn(|| other.start());
        eventually("it is being started", || other.seen().last().unwrap().request == SET_MEM_TABLE);
        assert_eq!(owner.map(writable(page_at(1)), &file_of(1, 1)), 0);
        assert_eq!(told(&other).len(), before);
        resume.send(()).unwrap();
        started.join().unwrap().unwrap();
    });
    assert!(told(&other)[before..].contains(&(ADD_MEM_REG, page_1)));
    assert!(!other.needs_reset());
    other.reset();
    thread::scope(|scope| {
        let started = scope.spawn(|| other.start());
        eventually("it is being started", || other.seen().last().unwrap().request == SET_MEM_TABLE);
        assert_eq!(owner.unmap(page_at(0)), 0);
        assert!(other.needs_reset(), "it is cut off");
        started.join().unwrap().unwrap_err();
    });
    drop(resume);
    owner.assert_works();
}

/// What a back-end knows after all that it was told, which must make sense: it is told of nothing twice, nor
/// to let go of what it does not know.
fn known(bench: &Bench) -> BTreeMap<u64, u64> {
    let mut known = BTreeMap::new();
    for seen in bench.seen() {
        match seen.request {
            SET_MEM_TABLE => known.clear(),
            ADD_MEM_REG => {
                let (start, len) = (quad(&seen.payload, 8), quad(&seen.payload, 16));
                let below = known.range(..start + len).next_back();
                let is_free = below.is_none_or(|(&other, &len): (&u64, &u64)| other + len <= start);
                assert!(is_free, "told of {start:#x}, and knows {known:x?}");
                known.insert(start, len);
            }
            REM_MEM_REG => {
                let len = known.remove(&quad(&seen.payload, 8));
                assert_eq!(len, Some(quad(&seen.payload, 16)), "told to let go");
            }
            _ => {}
        }
    }
    known
}

#[test]
fn after_concurrent_maps_resets_and_starts_each_recipient_knows_the_live_mappings() {
    // SHM-71, SHM-80: both share, map and unmap all the time, and are reset and started meanwhile.
    let mut devices = Devices::new();
    let both = [0, 1].map(|_| {
        let mut setup = devices.owner(Setup::default());
        setup.offer.protocol |= PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        setup.offer.slots = 12;
        setup.start()
    });
    let file = file_of(4, 1);
    thread::scope(|scope| {
        for (bench, seed) in both.iter().zip([1u64, 2]) {
            let file = &file;
            scope.spawn(move || {
                let mut random = seed;
                for _ in 0..1500 {
                    random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    let (page, pages) = ((random >> 33) % 20, (random >> 50) % 3 + 1);
                    let request = MMap { len: pages * PAGE, ..writable(page_at(page)) };
                    // Whether that can be done does not matter.
                    let _ = match (random >> 60) % 2 {
                        0 => bench.map(request, file),
                        _ => bench.unmap(request),
                    };
                }
            });
            scope.spawn(move || {
                for _ in 0..40 {
                    bench.start().unwrap();
                    thread::sleep(Duration::from_millis(3));
                    bench.reset();
                }
                bench.start().unwrap();
            });
        }
    });
    for (bench, other) in [(&both[0], &both[1]), (&both[1], &both[0])] {
        assert!(!bench.needs_reset());
        let start = address(other, 0);
        let there: BTreeMap<u64, u64> =
            other.sees(0).iter().map(|&(offset, len, _)| (start + offset, len)).collect();
        eventually("it knows what there is", || {
            let known = known(bench);
            known.iter().all(|(at, len)| there.get(at) == Some(len)) && known.len() == there.len().min(11)
        });
    }
    for bench in &both {
        bench.reset();
    }
    for bench in &both {
        assert_eq!((known(bench).len(), bench.guest().count()), (0, 0));
    }
}
