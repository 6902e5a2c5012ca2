//! A trace of a running hotslot (`--trace-vhost-user`), and what `hotslot trace` makes of it: its reader can
//! say which messages passed, and why one was refused.

#![allow(clippy::unwrap_used, clippy::panic)] // All of it is tests.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use hotslot::trace::read::each_line;
use hotslot::trace::record::{Channel, Direction, Message, Outcome, Record, What};
use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::child::{self, Running};
use hotslot_test_support::files::{MIB, PAGE, numbered_file};
use hotslot_test_support::guest::{Guest, register};
use hotslot_test_support::torture::Torture;
use hotslot_test_support::wire::{MMap, NEED_REPLY, VERSION_1, message, page_at, writable};
use hotslot_test_support::{built, kvm};
use rustix::process::{Resource, Rlimit, setrlimit};
use tempfile::TempDir;

/// A trace to be.
struct Traced {
    dir: TempDir,
}

impl Traced {
    fn new() -> Traced {
        Traced { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("trace")
    }

    fn boot(&self, devices: &[String]) -> Guest {
        let path = self.path().to_str().unwrap().to_owned();
        let devices = devices.iter().flat_map(|device| ["--vhost-user".to_owned(), device.clone()]);
        Guest::boot(["--trace-vhost-user".to_owned(), path].into_iter().chain(devices))
    }

    fn records(&self) -> Vec<Record> {
        read(File::open(self.path()).unwrap())
    }

    /// As `hotslot trace` prints it.
    fn text(&self) -> String {
        let (status, text, said) = trace(&self.path(), &[]);
        assert_eq!((status, said.as_str()), (Some(0), ""));
        text
    }
}

/// The records of a trace without problems, in the order in which they began.
fn read(trace: File) -> Vec<Record> {
    let mut records = Vec::new();
    each_line(BufReader::new(trace), |_, record| records.push(record.unwrap())).unwrap();
    records.sort_by_key(|record| record.time_ns);
    records
}

/// Runs `hotslot trace`: its exit status, what it prints, and what it says of that.
fn trace(path: &Path, options: &[&str]) -> (Option<i32>, String, String) {
    // Not a pipe: it may be more than one holds.
    let printed = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(built::hotslot());
    command.arg("trace").arg(path).args(options).stdout(printed.reopen().unwrap());
    let (status, said) = Running::start(&mut command).wait();
    (status.code(), std::fs::read_to_string(printed.path()).unwrap(), said)
}

fn messages(records: &[Record], channel: Channel) -> Vec<&Message> {
    let messages = records.iter().filter_map(|record| match &record.what {
        What::Message(message) if message.channel == channel => Some(message),
        _ => None,
    });
    messages.collect()
}

/// The lines of a text that have all of these words.
fn lines<'a>(text: &'a str, words: &[&str]) -> Vec<&'a str> {
    text.lines().filter(|line| words.iter().all(|word| line.contains(word))).collect()
}

fn assert_line(text: &str, words: &[&str]) {
    assert!(!lines(text, words).is_empty(), "no line with {words:?} in:\n{text}");
}

#[test]
fn a_start_a_mapping_and_a_reset_are_there_in_order_with_their_reasons() {
    if !kvm::is_here() {
        return;
    }
    let (traced, backend) = (Traced::new(), Backend::start());
    let mut guest = traced.boot(&[backend.device("device")]);
    guest.start_device();
    assert_eq!(backend.map(writable(page_at(1)), &numbered_file(1, 3)), 0);
    assert_eq!(backend.map(page_at(1), &numbered_file(1, 1)), -i64::from(libc::EEXIST));
    assert!(backend.unmap(MMap { len: 2 * PAGE, ..page_at(1) }) < 0);
    backend.channel().send(&message(99, VERSION_1 | NEED_REPLY, &[1, 2, 3]));
    assert_eq!(backend.channel().answer(99), -i64::from(libc::EOPNOTSUPP));
    guest.reset_device();
    guest.exit();

    // The back-end saw the same requests, in the same order.
    let records = traced.records();
    let main = messages(&records, Channel::Main);
    assert_eq!(main.iter().map(|message| message.id).collect::<Vec<_>>(), backend.ids());
    let reply_ack_from = main.iter().position(|message| message.needs_reply).unwrap();
    for message in &main[reply_ack_from..] {
        assert_eq!((message.result, message.answer.is_some()), (Outcome::Done, true), "{message:?}");
        assert_eq!(message.direction, Direction::ToBackend);
    }
    let table = main.iter().find(|message| message.name == "SET_MEM_TABLE").unwrap();
    assert_eq!(table.descriptors[0].kind, "file of memory");
    let size = table.descriptors[0].size.unwrap();
    assert!(size >= 64 * MIB, "{size}");
    let kick = main.iter().find(|message| message.name == "SET_VRING_KICK").unwrap();
    assert_eq!(kick.descriptors[0].kind, "eventfd");

    let channel = messages(&records, Channel::Backend);
    let seen: Vec<_> = channel.iter().map(|one| (one.name.as_str(), one.errno.as_deref())).collect();
    let expected = [
        ("BACKEND_SHMEM_MAP", None),
        ("BACKEND_SHMEM_MAP", Some("EEXIST")),
        ("BACKEND_SHMEM_UNMAP", Some("ENOENT")),
        ("?", Some("EOPNOTSUPP")),
    ];
    assert_eq!(seen, expected);
    let mapped = channel[0];
    let [shm_offset, len, flags] = ["shm_offset", "len", "flags"].map(|name| mapped.fields.number(name));
    assert_eq!((shm_offset, len, flags), (Some(PAGE), Some(PAGE), Some(1)));
    assert_eq!((mapped.descriptors.len(), mapped.descriptors[0].size), (1, Some(3 * PAGE)));

    let text = traced.text();
    assert_line(&text, &["BACKEND_SHMEM_MAP(shmid=0", "shm_offset=0x1000", "-EEXIST", "overlap"]);
    assert_line(&text, &["BACKEND_SHMEM_MAP(shmid=0", "flags=0x1 (read-write)", "= 0 <"]);
    assert_line(&text, &["unknown request 99(payload=010203)", "-EOPNOTSUPP", "its id is unknown"]);
    assert_line(&text, &["guest, vcpu0: Status = 0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK)"]);
    assert_line(&text, &["*** reset (unmapped=1)"]);
    assert_line(&text, &["*** region (shmid=7, guest_address=0x"]);
    // What caused what: messages of the start are indented below the writes of FEATURES_OK and DRIVER_OK.
    let caused = lines(&text, &["device   -> SET_FEATURES("]);
    assert_eq!(caused.len(), 2, "{text}");
    assert_line(&text, &["device   -> GET_STATUS() = status=0xb"]);
}

#[test]
fn a_death_and_a_return_are_told_with_their_reasons() {
    if !kvm::is_here() {
        return;
    }
    let offer = || Offer { regions: vec![(0, 4 * MIB), (7, 2 * MIB)], ..Offer::default() };
    let (traced, backend) = (Traced::new(), Backend::offering(offer()));
    let mut guest = traced.boot(&[format!("{},reconnect=60", backend.device("device"))]);
    guest.start_device();
    assert_eq!(backend.map(page_at(1), &numbered_file(1, 1)), 0);
    backend.hang_up();
    guest.wait_for_log("the guest waits for the back-end to come back");
    backend.come_back(offer());
    guest.wait_for_log("the back-end is back");
    // The answer comes after the old mappings are gone.
    guest.reset_device();
    guest.exit();
    let text = traced.text();
    let place = |words: &[&str]| {
        let found = text.lines().position(|line| words.iter().all(|word| line.contains(word)));
        found.unwrap_or_else(|| panic!("no {words:?} in:\n{text}"))
    };
    let gone = place(&["*** gone (deadline_seconds=60)", "the back-end hung up"]);
    let back = place(&["*** back"]);
    let asked = place(&["-> SET_OWNER()"]);
    assert!(asked < gone && gone < back, "{text}");
    assert_eq!(lines(&text, &["*** connected"]).len(), 2, "{text}");
    assert_eq!(lines(&text, &["-> SET_OWNER()"]).len(), 2, "{text}");
    let ids: Vec<_> = messages(&traced.records(), Channel::Main).iter().map(|message| message.id).collect();
    assert_eq!(ids, backend.ids());
}

#[test]
fn each_misbehaviour_in_the_set_up_leaves_its_reason() {
    if !kvm::is_here() {
        return;
    }
    for (step, words) in [
        ("answer=short@GET_FEATURES", &["GET_FEATURES()", "bytes instead of 8 bytes"][..]),
        ("answer=short@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "7 bytes instead of 8 bytes"]),
        ("answer=long@GET_SHMEM_CONFIG", &["GET_SHMEM_CONFIG", "bytes instead of 2056 bytes"]),
        ("answer=id@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "its answers are out of step"]),
        ("answer=fd@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "attached file descriptors to an answer"]),
        ("answer=error@GET_QUEUE_NUM", &["GET_QUEUE_NUM() = an empty answer", "0 bytes instead of 8"]),
        ("answer=request@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "a message that is no reply"]),
        ("answer=version@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "version", "what came began with"]),
        ("answer=error@SET_BACKEND_REQ_FD", &["SET_BACKEND_REQ_FD()", "[socket, ", "refused", "0x1"]),
        ("answer=half@GET_SHMEM_CONFIG", &["GET_SHMEM_CONFIG", "did not answer within 5000 ms"]),
        ("hang-up@GET_QUEUE_NUM", &["GET_QUEUE_NUM", "the back-end hung up"]),
        ("shmem-config=count", &["GET_SHMEM_CONFIG", "2 shared memory regions", "1 have a size"]),
        ("queue-num=0", &["*** not-used", "has 0 of the 1 queues"]),
        ("shmem-config=unaligned", &["*** not-used", "region 0", "0x1001", "page size 0x1000"]),
        ("shmem-config=overflow", &["*** not-used", "region 0", "does not fit"]),
    ] {
        let (traced, torture) = (Traced::new(), Torture::doing(&[step]));
        let (status, log) = traced.boot(&[torture.device("gizmo")]).wait();
        assert_eq!(status.code(), Some(2), "{step}: {log}");
        let text = traced.text();
        assert!(!lines(&text, words).is_empty(), "{step}: no {words:?} in:\n{text}");
    }
}

#[test]
fn each_misbehaviour_of_a_running_device_leaves_its_reason() {
    if !kvm::is_here() {
        return;
    }
    let cases = [
        ("version", "version: the front-end closed", &["<- no message", "version 2"][..]),
        ("reply-flag", "reply-flag: the front-end closed", &["<- no message", "sent a reply"]),
        ("oversized", "oversized: the front-end closed", &["<- no message", "bytes of payload", "limit"]),
        ("close-channel", "close-channel: ", &["*** channel-closed"]),
        ("hang-up", "hang-up: ", &["*** lost", "the back-end hung up"]),
        ("flood-unread=forever", "flood-unread: ", &["BACKEND_SHMEM_", "did not answer within 2000 ms"]),
        ("answer=short@SET_FEATURES", "answer: ", &["SET_FEATURES(", "instead of 8 bytes"]),
        ("answer=error@SET_MEM_TABLE", "answer: ", &["SET_MEM_TABLE(", "refused SET_MEM_TABLE"]),
        ("answer=fd@SET_VRING_BASE", "answer: ", &["SET_VRING_BASE(", "attached file descriptors"]),
        ("mute@SET_VRING_ADDR", "mute: ", &["SET_VRING_ADDR(", "did not answer within 10000 ms"]),
    ];
    let traced = Traced::new();
    let back_ends: Vec<_> = cases
        .iter()
        .map(|(step, ..)| Torture::start(&["--once", "--patience", "30", "--do", step]))
        .collect();
    let devices: Vec<_> =
        (0..).zip(&back_ends).map(|(index, torture)| torture.device(&format!("bad{index}"))).collect();
    let mut guest = traced.boot(&devices);
    for (index, (torture, (_, done, _))) in (0..).zip(back_ends.iter().zip(&cases)) {
        guest.select(index);
        guest.set_register(register::STATUS, 0);
        guest.try_start_device();
        torture.wait_for(done);
    }
    // What a back-end did last has come when its device's thread answers a reset.
    for index in 0..cases.len() as u64 {
        guest.select(index);
        guest.set_register(register::STATUS, 0);
    }
    guest.exit();
    let text = traced.text();
    for (index, (step, _, words)) in cases.iter().enumerate() {
        let device = format!(" bad{index} ");
        let words = [&[device.as_str()], *words].concat();
        assert!(!lines(&text, &words).is_empty(), "{step}: no {words:?} in:\n{text}");
    }
}

#[test]
fn each_request_that_is_refused_has_its_errno_and_its_reason() {
    if !kvm::is_here() {
        return;
    }
    let regions =
        ["--region", "0=4M", "--region", "7=2M", "--once", "--patience", "30", "--do", "everything"];
    let (traced, torture) = (Traced::new(), Torture::start(&regions));
    let mut guest = traced.boot(&[torture.device("tortured")]);
    guest.start_device();
    torture.wait_for("everything: ");
    guest.exit();
    let (_, output) = torture.wait();
    let records = traced.records();
    let refused: Vec<_> = messages(&records, Channel::Backend)
        .into_iter()
        .filter(|message| message.result == Outcome::Refused)
        .collect();
    for message in &refused {
        let has_reason = message.reason.as_ref().is_some_and(|reason| reason.len() > 10);
        let has_name = message.errno.as_ref().is_some_and(|errno| errno.starts_with('E'));
        assert!(has_reason && has_name, "{message:?}");
    }
    // Each case that was refused, and a reason that fits it.
    let text = traced.text();
    for (case, words) in [
        ("unaligned-shm-offset", &["-EINVAL", "page"][..]),
        ("out-of-bounds", &["-ERANGE"]),
        ("overlap", &["-EEXIST", "overlap"]),
        ("pipe", &["[pipe, ", "-EINVAL"]),
        ("socket", &["[socket, ", "-EINVAL"]),
        ("directory", &["[directory, ", "-EINVAL"]),
        ("device", &["[character device, ", "-EINVAL"]),
        ("read-only-fd", &["[file of memory, ", "read-only", "-EACCES", "not open for writing"]),
        ("unmap-part", &["BACKEND_SHMEM_UNMAP(", "-ENOENT", "no mapping of region 0 is exactly"]),
        ("unknown-flags", &["flags=0x2", "-EINVAL", "unknown flags (0x2)"]),
        ("no-fd", &["BACKEND_SHMEM_MAP(", "-EBADF", "no file descriptor came with it"]),
        ("two-fds", &["more that were not taken]", "-EBADF", "more than one file descriptor"]),
        ("unmap-fd", &["BACKEND_SHMEM_UNMAP(", "-EBADF", "a file descriptor came with it"]),
        ("wrong-size", &["-EPROTO", "its payload has 39 bytes, not 40"]),
        ("unknown-id", &["unknown request 255(", "-EOPNOTSUPP"]),
        ("unasked", &["-EEXIST (no answer was asked for)"]),
    ] {
        assert!(output.contains(&format!("{case}: ")), "{output}");
        assert!(!lines(&text, words).is_empty(), "{case}: no {words:?} in:\n{text}");
    }
}

#[test]
fn what_the_driver_must_not_write_is_there_with_its_reason() {
    if !kvm::is_here() {
        return;
    }
    let (traced, backend) = (Traced::new(), Backend::start());
    let mut guest = traced.boot(&[backend.device("device")]);
    // DRIVER_OK without the steps before it.
    guest.set_register(register::STATUS, 4);
    guest.exit();
    let text = traced.text();
    let line = lines(
        &text,
        &[
            "guest, vcpu0: Status = 0x4 (DRIVER_OK), but reads 0x0 (reset) afterwards: DRIVER_OK cannot be set before",
        ],
    );
    assert_eq!(line.len(), 1, "{text}");
}

#[test]
fn a_full_disk_ends_the_trace_and_not_the_machine() {
    if !kvm::is_here() {
        return;
    }
    let backend = Backend::start();
    let mut guest =
        Guest::boot(["--trace-vhost-user", "/dev/full", "--vhost-user", &backend.device("device")]);
    guest.start_device();
    assert_eq!(backend.map(page_at(1), &numbered_file(1, 1)), 0);
    guest.reset_device();
    let log = guest.exit();
    assert_eq!(lines(&log, &["the trace /dev/full ends here", "No space left on device"]).len(), 1, "{log}");
}

#[test]
fn a_late_reader_holds_nothing_up_and_what_it_misses_is_counted() {
    if !kvm::is_here() {
        return;
    }
    let (traced, torture) = (Traced::new(), Torture::start(&["--once", "--do", "flood=3000"]));
    rustix::fs::mkfifoat(rustix::fs::CWD, traced.path(), 0o600.into()).unwrap();
    let pipe = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(traced.path()).unwrap();
    let mut guest = traced.boot(&[torture.device("flooding")]);
    guest.start_device();
    torture.wait_for("3000 pairs of MAP and UNMAP answered");
    assert_eq!(guest.have_filled(0x180_0000, 64), 64);
    // Only now it is read.
    rustix::fs::fcntl_setfl(&pipe, rustix::fs::OFlags::empty()).unwrap();
    let reader = std::thread::spawn(move || read(pipe));
    guest.exit();
    let records = reader.join().unwrap();
    let is_request =
        |record: &&Record| matches!(&record.what, What::Message(one) if one.channel == Channel::Backend);
    let requests = records.iter().filter(is_request).count() as u64;
    let left_out = records.iter().filter_map(|record| match record.what {
        What::LeftOut { count } => Some(count),
        _ => None,
    });
    // Of the requests of the flood, and a few other records.
    let left_out: u64 = left_out.sum();
    assert!(requests < 6000 && (6000..6100).contains(&(requests + left_out)), "{requests} and {left_out}");
}

#[test]
fn a_trace_that_cannot_be_written_is_refused() {
    if !kvm::is_here() {
        return;
    }
    let (status, log) = Guest::boot(["--trace-vhost-user", "/no/where"]).wait();
    assert_eq!(status.code(), Some(2), "{log}");
    assert!(log.contains("error: cannot write the trace /no/where: No such file"), "{log}");
}

/// A trace as a file, with the bytes of this text.
fn file(text: &str) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    file
}

const FIXED: &str = concat!(
    r#"{"time_ns":0,"took_ns":0,"thread":"hotslot","kind":"trace","format":1,"hotslot":"0.1.0","#,
    r#""unix_ms":1700000000123}"#,
    "\n",
    // It ended after the messages that it caused.
    r#"{"time_ns":2100000,"took_ns":21000,"thread":"vcpu0","device":"disk","kind":"message","channel":"main","#,
    r#""direction":"to-backend","name":"SET_STATUS","id":39,"needs_reply":true,"fields":{"status":15},"#,
    r#""result":"done","answer":{"value":0}}"#,
    "\n",
    r#"{"time_ns":2000000,"took_ns":310000,"thread":"vcpu0","device":"disk","kind":"register","#,
    r#""access":"write","register":"Status","offset":112,"width":4,"value":15,"shows":79}"#,
    "\n",
    r#"{"time_ns":3000000,"took_ns":9000,"thread":"vhost-disk","device":"disk","kind":"message","#,
    r#""channel":"backend","direction":"from-backend","name":"BACKEND_SHMEM_MAP","id":9,"needs_reply":true,"#,
    r#""fields":{"shmid":0,"fd_offset":0,"shm_offset":4096,"len":8192,"flags":1},"#,
    r#""descriptors":[{"kind":"file of memory","size":4096,"access":"read-write","seals":"shrink grow"}],"#,
    r#""result":"refused","answer":{"value":18446744073709551599},"errno":"EEXIST","reason":"it overlaps; #2"}"#,
    "\n",
    r#"{"time_ns":4000000,"took_ns":0,"thread":"vhost-disk","device":"disk","kind":"noise","#,
    r#""channel":"backend","direction":"from-backend","bytes":"0a0b","reason":"version 2"}"#,
    "\n",
    r#"{"time_ns":5000000,"took_ns":0,"thread":"vhost-disk","device":"disk","kind":"event","#,
    r#""event":"lost","reason":"version 2"}"#,
    "\n",
    r#"{"time_ns":6000000,"took_ns":0,"thread":"trace","kind":"left-out","count":7}"#,
    "\n",
);

#[test]
fn a_trace_is_printed_as_text_and_drawn() {
    let fixed = file(FIXED);
    let expected = concat!(
        "    0.000000 -    a trace by hotslot 0.1.0, begun at 1700000000.123 (Unix time)\n",
        "    0.002000 disk guest, vcpu0: Status = 0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK), but reads 0x4f \
         (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK DEVICE_NEEDS_RESET) afterwards <0.000310>\n",
        "    0.002100 disk   -> SET_STATUS(status=0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK)) = 0 \
         <0.000021>\n",
        "    0.003000 disk <- BACKEND_SHMEM_MAP(shmid=0, fd_offset=0, shm_offset=0x1000, len=0x2000, flags=0x1) \
         [file of memory, 4096 bytes, read-write, seals: shrink grow] = -EEXIST: it overlaps; #2 <0.000009>\n",
        "    0.004000 disk <- no message: version 2; it began with 0a0b\n",
        "    0.005000 disk *** lost: version 2\n",
        "    0.006000 -    *** 7 records are missing: the disk was late\n",
    );
    assert_eq!(trace(fixed.path(), &[]), (Some(0), expected.to_owned(), String::new()));
    let expected = concat!(
        "sequenceDiagram\n",
        "    participant G as guest\n",
        "    participant H as hotslot\n",
        "    participant B0 as back-end of disk\n",
        "    G->>H: disk: Status = 0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK), but reads 0x4f (ACKNOWLEDGE \
         DRIVER FEATURES_OK DRIVER_OK DEVICE_NEEDS_RESET) afterwards\n",
        "    H->>B0: SET_STATUS(status=0xf (ACKNOWLEDGE DRIVER FEATURES_OK DRIVER_OK))\n",
        "    B0-->>H: 0\n",
        "    B0->>H: BACKEND_SHMEM_MAP(shmid=0, fd_offset=0, shm_offset=0x1000, len=0x2000, flags=0x1) [file of \
         memory, 4096 bytes, read-write, seals: shrink grow]\n",
        "    H--xB0: -EEXIST: it overlaps, no. 2\n",
        "    B0-xH: 0a0b: version 2\n",
        "    Note over B0: lost: version 2\n",
        "    Note over H: 7 records are missing\n",
    );
    let drawn = trace(fixed.path(), &["--sequence", "mermaid"]);
    assert_eq!(drawn, (Some(0), expected.to_owned(), String::new()));
}

#[test]
fn lines_that_are_no_records_are_named_and_the_rest_is_printed() {
    let (head, rest) = FIXED.split_once('\n').unwrap();
    let spoilt = file(&format!("{head}\n{{\"kind\":\"event\"}}\nnonsense\u{1b}[2J\n{rest}"));
    let (status, text, said) = trace(spoilt.path(), &[]);
    assert_eq!((status, text.lines().count()), (Some(1), 7), "{text}\n{said}");
    for part in ["line 2 is no record", "line 3 is no record", "error: 2 lines of"] {
        assert!(said.contains(part), "{said}");
    }
    let cut = file(&FIXED[..FIXED.len() - 20]);
    let (status, text, said) = trace(cut.path(), &[]);
    assert_eq!((status, text.lines().count()), (Some(0), 6), "{text}\n{said}");
    assert!(said.contains("line 7, the last one, is cut off"), "{said}");
    let newer = file(&FIXED.replace(r#""format":1"#, r#""format":2"#));
    let (status, _, said) = trace(newer.path(), &[]);
    assert_eq!(status, Some(0));
    assert!(said.contains("line 1") && said.contains("format 2"), "{said}");
    for text in ["", "This is no trace.\nNor is this.\n"] {
        let (status, text, said) = trace(file(text).path(), &[]);
        assert_eq!((status, text.as_str()), (Some(2), ""));
        assert!(said.contains("has no record of a trace") && said.contains("hint: "), "{said}");
    }
    let (status, _, said) = trace(Path::new("/no/where"), &[]);
    assert_eq!(status, Some(2));
    assert!(said.contains("cannot read the trace /no/where: No such file"), "{said}");
    let escape = file(&FIXED.replace("it overlaps", r"it \u001b[2J overlaps"));
    assert!(!trace(escape.path(), &[]).1.contains('\u{1b}'));
}

#[test]
fn a_trace_is_printed_that_has_no_room_in_memory() {
    const LIMIT: u64 = 4 << 20;
    let (head, rest) = FIXED.split_once('\n').unwrap();
    let long = rest.replace("it overlaps", &"it overlaps; ".repeat(4000));
    let count = 2 * LIMIT as usize / long.len();
    let large = file(&format!("{head}\n{}", long.repeat(count)));
    let printed = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new(built::hotslot());
    command.arg("trace").arg(large.path()).stdout(printed.reopen().unwrap());
    let limit = Rlimit { current: Some(LIMIT), maximum: Some(LIMIT) };
    // SAFETY: between fork and exec it makes one system call, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(move || Ok(setrlimit(Resource::Data, limit)?)) };
    let (status, said) = Running::start(&mut command).wait();
    assert_eq!((status.code(), said.as_str()), (Some(0), ""));
    let lines = BufReader::new(printed.reopen().unwrap()).lines();
    assert_eq!(lines.count(), 1 + 6 * count);
    // A pipe is printed, too, but must have room.
    let mut command = Command::new("/bin/sh");
    let (fixed, hotslot) = (file(FIXED), built::hotslot());
    let script = format!("cat {} | {} trace /dev/stdin", fixed.path().display(), hotslot.display());
    let output = child::run(command.arg("-c").arg(script));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), trace(fixed.path(), &[]).1);
}

#[test]
fn nothing_of_a_bad_line_or_a_path_is_a_command_for_the_terminal() {
    let (head, rest) = FIXED.split_once('\n').unwrap();
    let bad = r#"{"time_ns":1,"took_ns":0,"thread":"x","kind":"\u001b[31m\nerror: no"}"#;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a\u{1b}[2J\nb");
    std::fs::write(&path, format!("{head}\n{bad}\n{rest}")).unwrap();
    let (status, _, said) = trace(&path, &[]);
    assert_eq!((status, said.lines().count()), (Some(1), 2), "{said}");
    assert!(said.contains("unknown variant `?[31m?error: no`") && !said.contains('\u{1b}'), "{said}");
    let (_, _, said) = trace(&dir.path().join("\u{1b}c"), &[]);
    assert!(said.contains("/?c: No such file"), "{said:?}");
}

#[test]
fn a_device_s_name_of_any_length_is_printed_in_part() {
    let long = file(&FIXED.replace(r#""disk""#, &format!("\"{}\"", "x".repeat(70_000))));
    let (status, text, said) = trace(long.path(), &[]);
    assert_eq!((status, said.as_str()), (Some(0), ""));
    assert_line(&text, &["xxx…", "SET_STATUS"]);
    assert!(text.lines().all(|line| line.len() < 500), "{text}");
}
