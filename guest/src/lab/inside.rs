//! The link's end in the emulated host, or in a guest: runs the command and sends back its output, its files
//! and its status.
//!
//! Called by [`crate::boot`] on PID 1's first thread, which waits for the command and reaps; one thread per
//! direction and stream does the copying.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::link::{self, Kind, Start};
use crate::outcome::{Outcome, failed};
use crate::{console, sys};

/// How long the kernel may take to find the port: it asks for it in the background.
const PORT_TIME: Duration = Duration::from_secs(30);

/// How long the outside may take to stop the machine after the exit status, before we switch it off.
const STOP_TIME: Duration = Duration::from_secs(10);

/// How soon what a mapping of a shared directory's file wrote is written to the outside, in hundredths of a
/// second: the age at which it is, and how often the kernel looks.
const WRITE_BACK: [(&str, &str); 2] =
    [("/proc/sys/vm/dirty_expire_centisecs", "10"), ("/proc/sys/vm/dirty_writeback_centisecs", "10")];

/// Our side of the port, for the threads that send. A leaf lock: nothing else is taken under it, and what is
/// done under it is one write.
type Sender = Arc<Mutex<File>>;

/// Serves one command over the port called `name`. Returns only when something went wrong: one sentence.
pub fn serve(name: &str) -> String {
    match run(name) {
        Ok(()) => {
            // Everything is sent; the outside stops the machine as soon as it has read it. Switching it off
            // here could cut off what QEMU has not yet passed on.
            thread::sleep(STOP_TIME);
            "the other end of the link has not stopped this machine".to_owned()
        }
        Err(sentence) => sentence,
    }
}

fn run(name: &str) -> Outcome<()> {
    let mut receiver = open_port(name)?;
    let sender =
        receiver.try_clone().map_err(|error| format!("cannot duplicate the port {name}: {error}"))?;
    let sender = Arc::new(Mutex::new(sender));
    send(&sender, Kind::Hello, b"")?;
    let start = receive_start(&mut receiver)?;
    mount_shares(&start)?;
    make_directories(&start);

    let (status, copies) = match spawn(&start, receiver, &sender)? {
        Ok((process, copies)) => (console::reap_until(process), copies),
        Err((sentence, status)) => {
            send(&sender, Kind::Error, format!("init: {sentence}\n").as_bytes())?;
            (status, Vec::new())
        }
    };
    // What the command left running would hold its output open for ever.
    sys::kill_all_others();
    // The machine is stopped, not shut down: what is written must be on its disks, and on the outside what a
    // mapping of a shared directory's file wrote.
    rustix::fs::sync();
    for copy in copies {
        // A copy that panicked has already reported it on the console.
        let _ = copy.join();
    }
    for path in &start.outputs {
        let path = Path::new(OsStr::from_bytes(path));
        if let Err(sentence) = send_back(&sender, path) {
            send(&sender, Kind::Error, format!("init: {sentence}\n").as_bytes())?;
        }
    }
    send(&sender, Kind::Exit, &[status])
}

/// Finds the virtio-serial port of that name, and waits until its other end is open.
fn open_port(name: &str) -> Outcome<File> {
    let end = Instant::now() + PORT_TIME;
    let mut port: Option<File> = None;
    loop {
        port = match port {
            None => find_port(name)?,
            Some(open) if other_end_is_open(&open) => return Ok(open),
            waiting => waiting,
        };
        if Instant::now() > end {
            let state = if port.is_some() { "is not open at its other end" } else { "does not exist" };
            return Err(format!("the virtio-serial port {name} {state}, {PORT_TIME:?} after the start"));
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn find_port(name: &str) -> Outcome<Option<File>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(None);
    };
    for port in ports.flatten() {
        if fs::read_to_string(port.path().join("name")).is_ok_and(|found| found.trim_end() == name) {
            let path = Path::new("/dev").join(port.file_name());
            let open = OpenOptions::new().read(true).write(true).open(&path);
            return open.map(Some).map_err(|error| format!("cannot open {}: {error}", path.display()));
        }
    }
    Ok(None)
}

fn other_end_is_open(port: &File) -> bool {
    let mut entries = [PollFd::new(port, PollFlags::OUT)];
    // An error leaves no flags: the next look decides.
    let _ = poll(&mut entries, Some(&Timespec::default()));
    !entries[0].revents().contains(PollFlags::HUP)
}

fn receive_start(receiver: &mut File) -> Outcome<Start> {
    match link::receive(receiver) {
        Ok(Some((Kind::Start, payload))) => Ok(Start::from_bytes(&payload)),
        Ok(Some((kind, _))) => Err(format!("the link begins with {kind:?} instead of Start")),
        Ok(None) => Err("the link was closed before it said what to run".to_owned()),
        Err(error) => Err(format!("the link failed: {error}")),
    }
}

/// Where the outside's root directory is mounted: at its own path it would hide this machine's files.
const OUTSIDE_ROOT: &str = "/host";

/// The outside's directories, at their own paths.
fn mount_shares(start: &Start) -> Outcome<()> {
    for (number, path) in start.shares.iter().enumerate() {
        let path = Path::new(OsStr::from_bytes(path));
        let place = if path == Path::new("/") { Path::new(OUTSIDE_ROOT) } else { path };
        sys::mount("virtiofs", &link::share_tag(number), place, "")?;
    }
    if !start.shares.is_empty() {
        for (name, value) in WRITE_BACK {
            fs::write(name, value).map_err(failed("write", Path::new(name)))?;
        }
    }
    Ok(())
}

/// The caller's directory, and those of the files to send back, exist for the command as they do outside.
fn make_directories(start: &Start) {
    let parents = start.outputs.iter().filter_map(|path| Path::new(OsStr::from_bytes(path)).parent());
    for directory in parents.chain([Path::new(OsStr::from_bytes(&start.directory))]) {
        if let Err(error) = fs::create_dir_all(directory) {
            eprintln!("init: cannot make {}: {error}", directory.display());
        }
    }
}

/// A running command: its process id, and the threads that copy its output.
type Running = (u32, Vec<thread::JoinHandle<()>>);

/// Starts the command and the threads around it. The inner error is the command's: the sentence to print, and
/// its status.
fn spawn(start: &Start, receiver: File, sender: &Sender) -> Outcome<Result<Running, (String, u8)>> {
    let mut words = start.command.iter().map(|word| OsStr::from_bytes(word));
    let program = words.next().unwrap_or_default();
    let mut process = Command::new(program);
    process.args(words).current_dir(OsStr::from_bytes(&start.directory));
    for pair in &start.environment {
        let middle = pair.iter().position(|byte| *byte == b'=').unwrap_or(pair.len());
        let (name, value) = (&pair[..middle], pair.get(middle + 1..).unwrap_or_default());
        process.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
    }
    let terminal = match start.terminal {
        Some((rows, columns)) => {
            let pair = sys::open_terminal_pair();
            let (ours, theirs) = pair.map_err(|error| format!("cannot open a pseudo-terminal: {error}"))?;
            sys::set_window_size(&ours, rows, columns);
            console::give(&mut process, &theirs, crate::sys::take_terminal)?;
            Some(ours)
        }
        None => {
            process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            None
        }
    };
    let spawned = process.spawn();
    // Its copies of the command's files go with it.
    drop(process);
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) => {
            return Ok(Err(console::cannot_start(&program.to_string_lossy(), &error)));
        }
    };

    let mut copies = Vec::new();
    if let Some(terminal) = terminal {
        let copy = terminal.try_clone().map_err(|error| format!("cannot duplicate the terminal: {error}"))?;
        copies.push(copy_out(terminal, Kind::Output, sender));
        thread::spawn(move || copy_in_terminal(receiver, copy));
    } else {
        copies.extend(child.stdout.take().map(|stream| copy_out(stream, Kind::Output, sender)));
        copies.extend(child.stderr.take().map(|stream| copy_out(stream, Kind::Error, sender)));
        let input = child.stdin.take();
        thread::spawn(move || copy_in_pipe(receiver, input));
    }
    Ok(Ok((child.id(), copies)))
}

/// One of the command's streams to the link, until its end. (A terminal's end is EIO.)
fn copy_out(mut stream: impl Read + Send + 'static, kind: Kind, sender: &Sender) -> thread::JoinHandle<()> {
    let sender = Arc::clone(sender);
    thread::spawn(move || {
        let mut buffer = vec![0; link::LONGEST];
        while let Ok(length @ 1..) = stream.read(&mut buffer) {
            if let Err(sentence) = send(&sender, kind, &buffer[..length]) {
                eprintln!("init: {sentence}");
                return;
            }
        }
    })
}

/// The link's input to the command's pipe. A command that closed its input loses nothing: the rest is read
/// and dropped.
fn copy_in_pipe(mut receiver: File, mut pipe: Option<impl Write>) {
    while let Ok(Some((kind, payload))) = link::receive(&mut receiver) {
        if kind != Kind::Input {
            continue;
        }
        if payload.is_empty() || pipe.as_mut().is_some_and(|pipe| pipe.write_all(&payload).is_err()) {
            pipe = None;
        }
    }
}

/// The link's input to the command's terminal, and the window's changes of size.
fn copy_in_terminal(mut receiver: File, mut terminal: File) {
    /// Ctrl-D: the end of input on a terminal.
    const END_OF_INPUT: &[u8] = b"\x04";
    while let Ok(Some((kind, payload))) = link::receive(&mut receiver) {
        match kind {
            Kind::Input => {
                let bytes = if payload.is_empty() { END_OF_INPUT } else { &payload };
                // A terminal whose command is gone refuses it; the exit status is on its way.
                let _ = terminal.write_all(bytes);
            }
            Kind::WindowSize => {
                if let Some((rows, columns)) = link::window_size_from_bytes(&payload) {
                    sys::set_window_size(&terminal, rows, columns);
                }
            }
            _ => {}
        }
    }
}

/// Sends a file, or a directory with what is in it, to the outside.
fn send_back(sender: &Sender, path: &Path) -> Outcome<()> {
    let failed = |error: io::Error| format!("cannot send back {}: {error}", path.display());
    let about = fs::metadata(path).map_err(failed)?;
    let mode = (about.permissions().mode() & 0o7777).to_le_bytes();
    let name = path.as_os_str().as_bytes();
    if about.is_dir() {
        send(sender, Kind::Directory, &[&mode, name].concat())?;
        for entry in fs::read_dir(path).map_err(failed)? {
            send_back(sender, &entry.map_err(failed)?.path())?;
        }
        return Ok(());
    }
    if !about.is_file() {
        return Err(format!("cannot send back {}: neither a file nor a directory", path.display()));
    }
    send(sender, Kind::File, &[&mode, about.len().to_le_bytes().as_slice(), name].concat())?;
    let file = File::open(path).map_err(failed)?;
    let mut buffer = vec![0; link::LONGEST];
    let mut offset: u64 = 0;
    loop {
        // Room for the offset in front; whole pages, so that holes are seen.
        let (front, bytes) = buffer.split_at_mut(4096);
        let bytes = &mut bytes[..24 * 1024];
        let length = file.read_at(bytes, offset).map_err(failed)?;
        if length == 0 {
            return Ok(());
        }
        if bytes[..length].iter().any(|byte| *byte != 0) {
            front[4096 - 8..].copy_from_slice(&offset.to_le_bytes());
            send(sender, Kind::Data, &buffer[4096 - 8..4096 + length])?;
        }
        offset += length as u64;
    }
}

fn send(sender: &Sender, kind: Kind, payload: &[u8]) -> Outcome<()> {
    // A thread that panicked inside one write left at worst half a frame, which the outside reports.
    let mut port = sender.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    link::send(&mut *port, kind, payload).map_err(|error| format!("the link failed: {error}"))
}
