//! Back-ends that cannot be used: a sentence that names device, socket and numbers, status 2, and nothing
//! left behind.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use hotslot_test_support::backend::{Backend, Offer};
use hotslot_test_support::child;
use hotslot_test_support::names::request::SET_BACKEND_REQ_FD;
use hotslot_test_support::names::{
    PROTOCOL_F_BACKEND_REQ, PROTOCOL_F_CONFIGURE_MEM_SLOTS, PROTOCOL_F_SHMEM, VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_VERSION_1,
};
use hotslot_test_support::terminal::{settings, terminal};
use hotslot_test_support::wait::eventually;
use hotslot_test_support::{built, guest, kvm};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with};

/// Longer than anything here takes, on the slowest machine; then it is killed, and its status is wrong.
const PATIENCE: Duration = Duration::from_secs(60);

struct Ended {
    status: ExitStatus,
    stderr: String,
}

/// Undoes what a shell does to the programs that it runs in the background.
fn heed_sigint() -> io::Result<()> {
    // SAFETY: no handler of ours is installed or lost.
    unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) };
    Ok(())
}

/// Runs hotslot on a terminal until it ends; `meanwhile` is given its process id.
fn run(options: &[&str], meanwhile: impl FnOnce(i32)) -> Ended {
    let (ours, theirs) = terminal();
    let before = settings(&ours);
    let kernel = guest::kernel();
    let mut command = guest::command(kernel.path());
    command
        .args(options)
        .stdin(Stdio::from(theirs.try_clone().unwrap()))
        .stdout(Stdio::from(theirs))
        .stderr(Stdio::piped())
        .process_group(0);
    // SAFETY: the function only calls signal(2), which is async-signal-safe.
    unsafe { command.pre_exec(heed_sigint) };
    let mut hotslot = command.spawn().unwrap();
    let group = hotslot.id() as i32;
    meanwhile(group);
    let mut stderr = String::new();
    let (ended, patience) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if patience.recv_timeout(PATIENCE) == Err(RecvTimeoutError::Timeout) {
            // SAFETY: it was not waited for, or `ended` would be gone.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    });
    // It ends when no process has stderr open any more.
    hotslot.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    drop(ended);
    let status = hotslot.wait().unwrap();
    // SAFETY: signal 0 only asks whether there is anybody.
    let anybody = unsafe { libc::kill(-group, 0) };
    assert_eq!(anybody, -1, "a process is left: {stderr}");
    assert_eq!(settings(&ours), before, "{stderr}");
    Ended { status, stderr }
}

/// Runs hotslot, which must refuse with all of these words.
fn refused(options: &[&str], words: &[&str]) -> Ended {
    let ended = run(options, |_| ());
    assert_eq!(ended.status.code(), Some(2), "{}", ended.stderr);
    for word in words {
        assert!(ended.stderr.contains(word), "no '{word}' in:\n{}", ended.stderr);
    }
    assert_eq!(ended.stderr.matches("error: ").count(), 1, "{}", ended.stderr);
    ended
}

fn refused_backend(offer: Offer, kind: &str, words: &[&str]) -> Ended {
    let backend = Backend::offering(offer);
    let socket = backend.socket().to_str().unwrap();
    let device = format!("{socket},type={kind},name=gizmo");
    refused(&["--vhost-user", &device], &[words, &["device gizmo", socket]].concat())
}

#[test]
fn no_back_end_listens() {
    if !kvm::is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nobody");
    let socket = socket.to_str().unwrap();
    let device = format!("{socket},type=rng,name=gizmo");
    let ended = refused(
        &["--vhost-user", &device, "--connect-timeout", "4500ms"],
        &[
            "gizmo: waiting for a back-end on",
            "(1 s)",
            "(2 s)",
            "(4 s)",
            "error: device gizmo",
            socket,
            "within 4.5 s",
            "hint: start the back-end on",
            "--connect-timeout",
        ],
    );
    assert_eq!(ended.stderr.matches("waiting").count(), 3, "{}", ended.stderr);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_listener_that_accepts_nobody_is_waited_for_as_long_as_the_user_says() {
    if !kvm::is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("busy");
    let address = SocketAddrUnix::new(&socket).unwrap();
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    bind(&listener, &address).unwrap();
    listen(&listener, 0).unwrap();
    // As many as it has room for.
    let connect = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::connect(&socket, &address).ok().map(|()| socket)
    };
    let connected: Vec<_> = std::iter::from_fn(connect).collect();
    assert!(!connected.is_empty());
    let device = format!("{},type=rng,name=gizmo", socket.display());
    let words =
        ["gizmo: waiting for a back-end on", "error: device gizmo", "within 1.5 s", "--connect-timeout"];
    refused(&["--vhost-user", &device, "--connect-timeout", "1500ms"], &words);
}

#[test]
fn a_signal_ends_the_wait() {
    if !kvm::is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = format!("{}/nobody,type=rng", dir.path().display());
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let ended = run(&["--vhost-user", &device, "--connect-timeout", "60s"], |pid| {
            std::thread::sleep(Duration::from_millis(500));
            // SAFETY: a signal to a child of ours, which is not reaped yet.
            unsafe { libc::kill(pid, signal) };
        });
        let (code, killed) = (ended.status.code(), ended.status.signal());
        assert!(code == Some(128 + signal) || killed == Some(signal), "{:?}\n{}", ended.status, ended.stderr);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[test]
fn paths_that_are_no_sockets() {
    if !kvm::is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    File::create(&file).unwrap();
    let long = dir.path().join("x".repeat(200));
    let under_a_file = file.join("socket");
    for (path, words) in [
        (file.as_path(), &["not a socket"][..]),
        (dir.path(), &["not a socket"]),
        (&long, &["longer than", "107"]),
        (&under_a_file, &["Not a directory"]),
    ] {
        let path = path.to_str().unwrap();
        let device = format!("{path},type=rng,name=gizmo");
        let words = [words, &["device gizmo", path]].concat();
        let ended = refused(&["--vhost-user", &device, "--connect-timeout", "20s"], &words);
        assert!(!ended.stderr.contains("waiting"), "{}", ended.stderr);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn back_ends_that_lack_what_is_needed() {
    if !kvm::is_here() {
        return;
    }
    let usual = Offer::default();
    let offer = |features, protocol| Offer { features, protocol, ..Offer::default() };
    let (pmem, all) = (usual.features | 1, usual.protocol);
    refused_backend(offer(VHOST_USER_F_PROTOCOL_FEATURES, all), "rng", &["VIRTIO_F_VERSION_1", "0x40000000"]);
    refused_backend(usual.clone(), "pmem", &["VIRTIO_PMEM_F_SHMEM_REGION", "pmem", "0x140000000"]);
    refused_backend(offer(pmem, all & !PROTOCOL_F_SHMEM), "pmem", &["SHMEM", "pmem"]);
    let draft = all & !PROTOCOL_F_SHMEM | 1 << 21;
    refused_backend(offer(pmem, draft), "pmem", &["SHMEM", "pmem", "hint: ", "shmem-bit=21"]);
    refused_backend(offer(pmem, all & !PROTOCOL_F_BACKEND_REQ), "pmem", &["BACKEND_REQ", "pmem"]);
    refused_backend(offer(VIRTIO_F_VERSION_1 | 1, 0), "pmem", &["SHMEM", "pmem"]);
    refused_backend(offer(usual.features, all), "fs", &["CONFIG", "fs"]);
}

#[test]
fn more_devices_than_interrupts() {
    if !kvm::is_here() {
        return;
    }
    let options: Vec<_> = (0..20)
        .flat_map(|index| ["--vhost-user".to_string(), format!("/nowhere/{index},type=rng")])
        .collect();
    let options: Vec<_> = options.iter().map(String::as_str).collect();
    refused(&options, &["20 devices", "19", "5 to 23"]);
}

#[test]
fn a_back_end_with_room_for_one_region_of_memory_gets_no_more() {
    // SHM-89
    if !kvm::is_here() {
        return;
    }
    let offer = |slots| {
        let protocol = Offer::default().protocol | PROTOCOL_F_CONFIGURE_MEM_SLOTS;
        Backend::offering(Offer { slots, protocol, ..Offer::default() })
    };
    let kernel = guest::kernel();
    let hotslot = |memory, backend: &Backend| {
        let mut command = Command::new(built::hotslot());
        command.args(["-m", memory, "--vhost-user", &backend.device("it"), "-k"]).arg(kernel.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    };
    let refused = child::run(&mut hotslot("4G", &offer(1)));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert_eq!(refused.status.code(), Some(2), "{said}");
    assert!(said.contains("device it ") && said.contains("room for 1 of the 2 regions of memory"), "{said}");
    assert!(said.contains("GET_MAX_MEM_SLOTS") && said.contains("hint: up to --memory 3G"), "{said}");
    for (slots, memory) in [(1, "64M"), (8, "4G"), (509, "4G")] {
        let backend = offer(slots);
        let mut running = hotslot(memory, &backend).spawn().unwrap();
        eventually("the set-up is over", || backend.ids().contains(&SET_BACKEND_REQ_FD));
        running.kill().unwrap();
        running.wait().unwrap();
    }
}
