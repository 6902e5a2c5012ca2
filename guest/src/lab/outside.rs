//! The link's end on the developer's machine: starts QEMU, passes on what comes from the link, and ends with
//! the command's exit status. `scripts/lab.sh` replaces itself with it, so that a signal to the script
//! arrives here.
//!
//! Nothing is left behind however it ends: the initramfs is put together in a memfd, the link is a socket
//! pair, and the kernel ends QEMU when this process dies, even by SIGKILL.
//!
//! Threads: the first one starts QEMU, then waits for signals, the time limit and the others' news; one reads
//! the link, one the kernel's log, one our standard input, and one writes to the link.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::link::{self, Kind, Start};
use crate::{Outcome, sys};

/// Exit statuses of our own, as `timeout` and `docker run` have them.
const STATUS_TIME_LIMIT: u8 = 124;
const STATUS_LAB_FAILED: u8 = 125;

/// How much of the kernel's log is kept, and how many lines of it are shown when the lab fails.
const LOG_KEPT: usize = 256 * 1024;
const LOG_SHOWN: usize = 30;

/// `Ctrl-]`: pressed so often in a row, it ends an interactive lab.
const ESCAPE: u8 = 0x1d;
const ESCAPES: usize = 3;

const USAGE: &str = "usage: init lab --qemu PATH --kernel FILE --initramfs FILE... [--memory MIB] [--icount]
    [--append WORDS] [--timeout SECONDS] [--tty] [--env NAME=VALUE]... [--out PATH]... [--log FILE] [--verbose] -- COMMAND [ARG...]
(scripts/lab.sh makes the files and starts it)";

/// What `scripts/lab.sh` asked for.
#[derive(Debug, Default)]
struct Options {
    qemu: PathBuf,
    kernel: PathBuf,
    initramfs: Vec<PathBuf>,
    memory: String,
    icount: bool,
    append: OsString,
    timeout: Option<Duration>,
    log: Option<PathBuf>,
    verbose: bool,
    terminal: bool,
    start: Start,
}

/// What the first thread waits for, besides signals.
#[derive(Debug)]
enum News {
    /// The emulated host is up.
    Up,
    /// The command has ended, and everything it gave out has been passed on.
    Ended(u8),
    /// Nobody reads our standard output any more.
    NobodyReads,
    /// The user pressed the escape key.
    Escape,
    /// The lab itself failed: one sentence.
    Failed(String),
}

/// Runs the lab; the command's exit status.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let outcome = parse(arguments).and_then(run);
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(sentence) => {
            eprintln!("lab: {sentence}");
            ExitCode::from(STATUS_LAB_FAILED)
        }
    }
}

fn parse(arguments: &[OsString]) -> Outcome<Options> {
    let mut options = Options { memory: "2048".to_owned(), ..Options::default() };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        let mut value = || {
            let value = words.next().cloned();
            value.ok_or_else(|| format!("{} needs a value\n{USAGE}", word.to_string_lossy()))
        };
        match word.to_str().unwrap_or_default() {
            "--qemu" => options.qemu = value()?.into(),
            "--kernel" => options.kernel = value()?.into(),
            "--initramfs" => options.initramfs.push(value()?.into()),
            "--memory" => options.memory = value()?.to_string_lossy().into_owned(),
            "--icount" => options.icount = true,
            "--timeout" => {
                let text = value()?.to_string_lossy().into_owned();
                let seconds = text.parse().ok().filter(|seconds| *seconds > 0);
                let seconds =
                    seconds.ok_or_else(|| format!("--timeout {text}: this is no number of seconds"))?;
                options.timeout = Some(Duration::from_secs(seconds));
            }
            "--tty" => options.terminal = true,
            "--env" => options.start.environment.push(value()?.into_vec()),
            "--out" => options.start.outputs.push(value()?.into_vec()),
            "--append" => options.append = value()?,
            "--log" => options.log = Some(value()?.into()),
            "--verbose" => options.verbose = true,
            "--" => break,
            other => return Err(format!("{other}: there is no such option\n{USAGE}")),
        }
    }
    options.start.command = words.map(|word| word.clone().into_vec()).collect();
    if options.start.command.is_empty()
        || options.kernel.as_os_str().is_empty()
        || options.qemu.as_os_str().is_empty()
    {
        return Err(format!("there is nothing to run\n{USAGE}"));
    }
    let directory = std::env::current_dir().map_err(|error| format!("where are we? {error}"))?;
    options.start.directory = directory.into_os_string().into_vec();
    if options.terminal {
        options.start.terminal = Some(sys::window_size(&io::stdout()).unwrap_or((24, 80)));
    }
    Ok(options)
}

/// The story: QEMU, the threads, the wait, and the end.
fn run(options: Options) -> Outcome<u8> {
    let signals = Signals::block();
    let began = Instant::now();
    let initramfs = put_together(&options.initramfs)?;
    let (link, qemu_link) = socket_pair()?;
    let (log, qemu_log) = socket_pair()?;
    let qemu = start_qemu(&options, &initramfs, &qemu_link, &qemu_log)?;
    let mut qemu = Stopped(qemu);
    drop((initramfs, qemu_link, qemu_log));

    let log = Log::follow(log, options.log.as_deref())?;
    let (news, incoming) = mpsc::channel();
    let news = Teller(news);
    let to_link = start_writer(&link, &options.start)?;
    thread::spawn({
        let news = news.clone();
        move || news.tell(pass_on(link, &news))
    });
    thread::spawn({
        let (to_link, terminal) = (to_link.clone(), options.terminal);
        move || read_input(&to_link, &news, terminal)
    });

    let raw = options.terminal.then(RawTerminal::enter).flatten();
    let ending = wait(&options, &signals, &incoming, &to_link, began);
    drop(raw);
    qemu.stop();
    match ending {
        Ending::Status(status) => Ok(status),
        Ending::Signal(number) => die_of(number),
        Ending::Time { up, limit } => {
            if up {
                eprintln!("lab: the command had not ended after {} s (time limit), stopped", limit.as_secs());
            } else {
                eprintln!("lab: not up after {} s (time limit), stopped", limit.as_secs());
                log.show();
            }
            Ok(STATUS_TIME_LIMIT)
        }
        Ending::Failed(sentence) => {
            eprintln!("lab: {sentence}");
            log.show();
            Ok(STATUS_LAB_FAILED)
        }
    }
}

/// How a run ends.
enum Ending {
    Status(u8),
    Signal(libc::c_int),
    Time { up: bool, limit: Duration },
    Failed(String),
}

/// The first thread's wait for whatever comes first.
fn wait(
    options: &Options,
    signals: &Signals,
    incoming: &Receiver<News>,
    to_link: &SyncSender<(Kind, Vec<u8>)>,
    began: Instant,
) -> Ending {
    let mut up = false;
    loop {
        let left = options.timeout.map(|limit| limit.saturating_sub(began.elapsed()));
        match signals.wait(left) {
            None => {
                let limit = options.timeout.unwrap_or_default();
                return Ending::Time { up, limit };
            }
            Some(libc::SIGUSR1) => {}
            Some(libc::SIGWINCH) => {
                if let Some(size) = sys::window_size(&io::stdout()).filter(|_| options.terminal) {
                    // A full queue means that nobody looks at the window.
                    let _ = to_link.try_send((Kind::WindowSize, link::window_size_to_bytes(size).to_vec()));
                }
            }
            Some(number) => return Ending::Signal(number),
        }
        for news in incoming.try_iter() {
            match news {
                News::Up => {
                    up = true;
                    if options.verbose {
                        eprintln!("lab: up after {:.1} s", began.elapsed().as_secs_f64());
                    }
                }
                News::Ended(status) => return Ending::Status(status),
                News::NobodyReads => return Ending::Signal(libc::SIGPIPE),
                News::Escape => return Ending::Signal(libc::SIGHUP),
                News::Failed(sentence) => return Ending::Failed(sentence),
            }
        }
    }
}

/// The initramfs archives one behind the other, as the kernel accepts them, in a file without a name.
fn put_together(parts: &[PathBuf]) -> Outcome<File> {
    // SAFETY: a string that lives for ever; on success the descriptor is new and nobody else's.
    let mut whole = unsafe {
        let descriptor = libc::memfd_create(c"initramfs".as_ptr(), libc::MFD_CLOEXEC);
        if descriptor < 0 {
            return Err(format!("cannot create a memfd: {}", io::Error::last_os_error()));
        }
        File::from_raw_fd(descriptor)
    };
    for part in parts {
        let failed = |error: io::Error| format!("cannot copy {}: {error}", part.display());
        let mut file = File::open(part).map_err(failed)?;
        let length = io::copy(&mut file, &mut whole).map_err(failed)?;
        // An archive begins at a multiple of four.
        let padding = [0; 4];
        whole.write_all(&padding[..(length.wrapping_neg() % 4) as usize]).map_err(failed)?;
    }
    Ok(whole)
}

fn socket_pair() -> Outcome<(UnixStream, UnixStream)> {
    UnixStream::pair().map_err(|error| format!("cannot create a socket pair: {error}"))
}

/// QEMU with the settings that were found to work, its link and its log on our sockets.
fn start_qemu(options: &Options, initramfs: &File, link: &UnixStream, log: &UnixStream) -> Outcome<Child> {
    let initramfs_path = format!("/proc/self/fd/{}", initramfs.as_raw_fd());
    let messages = log.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    let messages_too = log.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    let mut qemu = Command::new(&options.qemu);
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        // Two processors lost a race in the kernel's code patching (threads) or hung in the nested guest (one
        // thread). Without XSAVE: the emulated SVM does not tell KVM of a guest's XSETBV. Without fast string
        // instructions: the kernel then clears and copies pages by eight bytes at a time, which the emulator
        // does six times as fast.
        .args([
            "-accel",
            "tcg,thread=single",
            "-cpu",
            "max,+svm,-xsave,-erms,-fsrm",
            "-smp",
            "1",
            "-M",
            "q35,vmport=off",
        ])
        .args(["-m", &options.memory])
        .arg("-kernel")
        .arg(&options.kernel)
        .args(["-initrd", &initramfs_path])
        .arg("-append")
        .arg(kernel_command_line(&options.append))
        .args(["-chardev", &format!("socket,id=log,fd={}", log.as_raw_fd()), "-serial", "chardev:log"])
        .args(["-chardev", &format!("socket,id=link,fd={}", link.as_raw_fd())])
        .args(["-device", "virtio-serial-pci,max_ports=2"])
        .args(["-device", "virtserialport,chardev=link,name=lab"]);
    if options.icount {
        // The clock counts instructions, and nothing of this machine's time reaches the emulated one.
        qemu.args(["-icount", "shift=0,sleep=off", "-seed", "1"])
            .args(["-rtc", "base=2026-01-01T00:00:00,clock=vm"]);
    }
    qemu.stdin(Stdio::null()).stdout(OwnedFd::from(messages)).stderr(OwnedFd::from(messages_too));
    // Ctrl-C is for us to handle: QEMU is not in the terminal's process group.
    qemu.process_group(0);
    let inherited = [initramfs.as_raw_fd(), link.as_raw_fd(), log.as_raw_fd()];
    let parent = std::process::id();
    // SAFETY: between fork and exec, `prepare` makes only system calls and allocates nothing.
    unsafe { qemu.pre_exec(move || prepare(inherited, parent)) };
    qemu.spawn().map_err(|error| format!("cannot run {}: {error}", options.qemu.display()))
}

/// The emulated host's kernel command line; `append` is the user's.
fn kernel_command_line(append: &OsStr) -> OsString {
    // no_timer_check: the check counts ticks in a time that the emulator cannot promise while others use the
    // processor, and a failed one is a panic.
    let mut line = OsString::from(
        "console=ttyS0 quiet reboot=t panic=-1 mitigations=off no_timer_check hotslot.link=lab hotslot.hold_vm ",
    );
    line.push(append);
    line
}

/// In QEMU's process, before it becomes QEMU: keeps the descriptors that its options name, and dies with us.
fn prepare(inherited: [RawFd; 3], parent: u32) -> io::Result<()> {
    for descriptor in inherited {
        // SAFETY: no memory is involved; the descriptors were open at the fork.
        if unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    // SAFETY: no memory is involved.
    let parent_now = unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        libc::getppid()
    };
    if parent_now.unsigned_abs() != parent {
        return Err(io::Error::other("the parent is gone already"));
    }
    Ok(())
}

/// The thread that writes to the link: what to run first, then what is put in its queue.
fn start_writer(link: &UnixStream, start: &Start) -> Outcome<SyncSender<(Kind, Vec<u8>)>> {
    let mut link = link.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    let (queue, frames) = mpsc::sync_channel::<(Kind, Vec<u8>)>(4);
    let start = start.to_bytes();
    thread::spawn(move || {
        let mut result = link::send(&mut link, Kind::Start, &start);
        while let (Ok(()), Ok((kind, payload))) = (&result, frames.recv()) {
            result = link::send(&mut link, kind, &payload);
        }
        // When the machine is gone, the thread that reads the link says so.
    });
    Ok(queue)
}

/// Our standard input to the link, until its end.
fn read_input(to_link: &SyncSender<(Kind, Vec<u8>)>, news: &Teller, terminal: bool) {
    let mut buffer = vec![0; link::LONGEST];
    let mut escapes = 0;
    loop {
        // An input that cannot be read (a closed descriptor) has ended.
        let length = io::stdin().read(&mut buffer).unwrap_or(0);
        for byte in &buffer[..length] {
            escapes = if *byte == ESCAPE { escapes + 1 } else { 0 };
            if terminal && escapes == ESCAPES {
                news.tell(News::Escape);
            }
        }
        if to_link.send((Kind::Input, buffer[..length].to_vec())).is_err() || length == 0 {
            return;
        }
    }
}

/// The link to our standard output, standard error and files, until the exit status or the link's end.
fn pass_on(mut link: UnixStream, news: &Teller) -> News {
    // Unbuffered: a prompt without a newline has to be seen.
    let (mut output, mut errors) = match (raw_copy(1), raw_copy(2)) {
        (Ok(output), Ok(errors)) => (output, errors),
        (Err(error), _) | (_, Err(error)) => {
            return News::Failed(format!("cannot duplicate our output: {error}"));
        }
    };
    let mut file: Option<(PathBuf, File)> = None;
    loop {
        let (kind, payload) = match link::receive(&mut link) {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                return News::Failed("the emulated host ended before its command did".to_owned());
            }
            Err(error) => {
                return News::Failed(format!("the link to the emulated host failed: {error}"));
            }
        };
        let result = match kind {
            Kind::Hello => {
                news.tell(News::Up);
                Ok(())
            }
            Kind::Output => output.write_all(&payload).map_err(|_| News::NobodyReads),
            Kind::Error => errors.write_all(&payload).map_err(|_| News::NobodyReads),
            Kind::File | Kind::Directory | Kind::Data => {
                take_back(kind, &payload, &mut file).map_err(News::Failed)
            }
            Kind::Exit => {
                return News::Ended(payload.first().copied().unwrap_or(STATUS_LAB_FAILED));
            }
            Kind::Start | Kind::Input | Kind::WindowSize => {
                Err(News::Failed(format!("the link brought {kind:?}")))
            }
        };
        if let Err(news) = result {
            return news;
        }
    }
}

fn raw_copy(descriptor: RawFd) -> io::Result<File> {
    // SAFETY: no memory is involved; on success the descriptor is new and nobody else's.
    unsafe {
        let copy = libc::fcntl(descriptor, libc::F_DUPFD_CLOEXEC, 3);
        if copy < 0 { Err(io::Error::last_os_error()) } else { Ok(File::from_raw_fd(copy)) }
    }
}

/// One frame of a file that comes back.
fn take_back(kind: Kind, payload: &[u8], current: &mut Option<(PathBuf, File)>) -> Outcome<()> {
    let (mode_bytes, rest) = payload.split_first_chunk().ok_or("the link brought half a file")?;
    let mode = u32::from_le_bytes(*mode_bytes);
    match kind {
        Kind::Directory => {
            let path = PathBuf::from(OsStr::from_bytes(rest));
            DirBuilder::new()
                .recursive(true)
                .mode(mode)
                .create(&path)
                .map_err(|error| format!("cannot make {}: {error}", path.display()))
        }
        Kind::File => {
            let (size, name) = rest.split_first_chunk().ok_or("the link brought half a file")?;
            let path = PathBuf::from(OsStr::from_bytes(name));
            let failed = |error: io::Error| format!("cannot write {}: {error}", path.display());
            let file =
                OpenOptions::new().write(true).create(true).truncate(true).open(&path).map_err(failed)?;
            file.set_len(u64::from_le_bytes(*size)).map_err(failed)?;
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
            *current = Some((path, file));
            Ok(())
        }
        _ => {
            let (offset, bytes) = payload.split_first_chunk().ok_or("the link brought half a file")?;
            let (path, file) = current.as_ref().ok_or("the link brought data of no file")?;
            file.write_all_at(bytes, u64::from_le_bytes(*offset))
                .map_err(|error| format!("cannot write {}: {error}", path.display()))
        }
    }
}

/// Tells the first thread: the news in the queue, and a signal that ends its wait.
#[derive(Clone)]
struct Teller(Sender<News>);

impl Teller {
    fn tell(&self, news: News) {
        // The first thread may be gone; then so are we, soon.
        let _ = self.0.send(news);
        // SAFETY: no memory is involved; the signal is blocked in every thread, and waited for by the first.
        unsafe { libc::kill(libc::getpid(), libc::SIGUSR1) };
    }
}

/// The signals that end a run, blocked in every thread so that only [`Signals::wait`] receives them.
struct Signals(libc::sigset_t);

impl Signals {
    const SET: [libc::c_int; 6] =
        [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGWINCH];

    fn block() -> Signals {
        // SAFETY: a signal set is plain data, ours, initialised by `sigemptyset` before it is used.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in Self::SET {
                libc::sigaddset(&raw mut set, signal);
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            Signals(set)
        }
    }

    /// The next signal; `None` when the time is over first.
    fn wait(&self, limit: Option<Duration>) -> Option<libc::c_int> {
        let end = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let time = left.map(|left| libc::timespec {
                tv_sec: left.as_secs() as libc::time_t,
                tv_nsec: left.subsec_nanos().into(),
            });
            let time = time.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the set and the time are ours and outlive the call; the null pointer asks for no
            // details.
            let signal = unsafe { libc::sigtimedwait(&raw const self.0, std::ptr::null_mut(), time) };
            if signal > 0 {
                return Some(signal);
            }
            if left.is_some_and(|left| left.is_zero()) {
                return None;
            }
        }
    }
}

/// Ends this process by the signal that asked for it, so that the caller sees the truth: a shell stops its
/// script at a program that died of Ctrl-C, and not at one that returned 130.
fn die_of(signal: libc::c_int) -> Outcome<u8> {
    // SAFETY: a signal set is plain data, ours, initialised by `sigemptyset` before it is used; the default
    // action of each signal that comes here is to end the process.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::raise(signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
    }
    Ok((128 + signal) as u8)
}

/// A QEMU that does not outlive this value.
struct Stopped(Child);

impl Stopped {
    fn stop(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The end of the kernel's log, and of what QEMU itself said.
struct Log {
    lines: Arc<Mutex<Vec<u8>>>,
    reader: Option<thread::JoinHandle<()>>,
}

impl Log {
    /// Follows `stream`; everything goes to the file `copy` too, if there is one.
    fn follow(mut stream: UnixStream, copy: Option<&Path>) -> Outcome<Log> {
        let mut copy = match copy {
            Some(path) => {
                let failed = |error| format!("cannot write {}: {error}", path.display());
                Some(File::create(path).map_err(failed)?)
            }
            None => None,
        };
        let lines = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if copy.as_mut().is_some_and(|file| file.write_all(&buffer[..length]).is_err()) {
                    copy = None;
                }
                // A leaf lock: nothing else is taken under it.
                let mut kept = kept.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
                kept.extend_from_slice(&buffer[..length]);
                let surplus = kept.len().saturating_sub(LOG_KEPT);
                kept.drain(..surplus);
            }
        });
        Ok(Log { lines, reader: Some(reader) })
    }

    /// Shows its last lines. QEMU has been stopped, so the log has an end.
    fn show(mut self) {
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        let kept = self.lines.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let text = String::from_utf8_lossy(&kept);
        let lines: Vec<&str> = text.lines().map(|line| line.trim_end_matches('\r')).collect();
        let first = lines.len().saturating_sub(LOG_SHOWN);
        if lines.is_empty() {
            eprintln!("lab: the emulated host's log is empty");
            return;
        }
        eprintln!("lab: the last lines of the emulated host's log:");
        for line in &lines[first..] {
            eprintln!("  {line}");
        }
    }
}

/// Our terminal, raw until this value is dropped.
struct RawTerminal(libc::termios);

impl RawTerminal {
    /// `None` when standard input is no terminal.
    fn enter() -> Option<RawTerminal> {
        // SAFETY: the settings are plain data, ours, filled by `tcgetattr` before they are used.
        unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            if libc::tcgetattr(0, &raw mut settings) != 0 {
                return None;
            }
            let before = settings;
            libc::cfmakeraw(&raw mut settings);
            libc::tcsetattr(0, libc::TCSADRAIN, &raw const settings);
            Some(RawTerminal(before))
        }
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // SAFETY: the settings are ours and were filled by `tcgetattr`.
        unsafe { libc::tcsetattr(0, libc::TCSADRAIN, &raw const self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn options_end_at_the_dashes() {
        let line =
            "--qemu q --kernel k --initramfs a --initramfs b --timeout 5 --env A=b --out /o -- sh --tty";
        let options = parse(&words(line)).unwrap();
        assert_eq!(options.initramfs, [Path::new("a"), Path::new("b")]);
        assert_eq!(options.timeout, Some(Duration::from_secs(5)));
        assert_eq!(options.start.command, [b"sh".to_vec(), b"--tty".to_vec()]);
        assert_eq!(options.start.environment, [b"A=b".to_vec()]);
        assert_eq!(options.start.outputs, [b"/o".to_vec()]);
        assert!(!options.terminal && options.start.terminal.is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for line in ["--kernel", "--timeout 0", "--timeout x", "--nonsense", "--qemu q --kernel k --"] {
            assert!(parse(&words(line)).is_err(), "{line}");
        }
    }
}
