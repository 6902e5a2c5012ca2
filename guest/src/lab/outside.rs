//! The link's end on the developer's machine: starts QEMU, or the script that starts hotslot, passes on the
//! frames of the link, and ends with the command's exit status. `scripts/lab.sh` replaces itself with it, so
//! that a signal to the script arrives here; so does `scripts/run.sh`.
//!
//! Nothing is left behind however it ends: the initramfs is put together in a memfd, the link is a socket
//! pair, and the kernel ends QEMU when this process dies, even by SIGKILL. (What the script does is in
//! [`super::script`].)
//!
//! Threads: the first one starts the machine, then waits for signals, the time limit and the others'
//! messages; one reads the link, one the kernel's log, one our standard input, one writes to the link, and
//! with `--icount` one looks whether the emulated host stands still.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::link::{self, Kind, Start};
use super::log::Log;
use super::options::{self, Options};
use super::qemu;
use super::script;
use super::signals::{Signals, die_of, wake_first_thread};
use super::standstill;
use crate::outcome::{Outcome, failed};
use crate::sys;

/// Exit statuses of our own, as `timeout` and `docker run` have them.
const STATUS_TIME_LIMIT: u8 = 124;
const STATUS_LAB_FAILED: u8 = 125;

/// `Ctrl-]`: pressed so often in a row, it ends an interactive lab.
const ESCAPE: u8 = 0x1d;
const ESCAPES: usize = 3;

/// What the first thread waits for, besides signals.
#[derive(Debug)]
enum News {
    /// The machine is up.
    Up,
    /// The command has ended, and everything it gave out has been passed on.
    Ended(u8),
    /// The reader of our standard output has closed it.
    OutputClosed,
    /// The user pressed the escape key.
    Escape,
    /// The lab itself failed: one sentence.
    Failed(String),
}

/// Runs the lab; the command's exit status.
pub fn main(arguments: &[OsString]) -> ExitCode {
    let outcome = options::parse(arguments).and_then(run);
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(sentence) => {
            eprintln!("lab: {sentence}");
            ExitCode::from(STATUS_LAB_FAILED)
        }
    }
}

/// The machine. It ends when this value is dropped, or when this process does.
enum Machine {
    EmulatedHost(qemu::Qemu),
    Guest(script::Script),
}

impl Machine {
    /// Ends it, so that its log has an end.
    fn stop(&mut self) {
        match self {
            Machine::EmulatedHost(qemu) => qemu.stop(),
            Machine::Guest(script) => script.stop(),
        }
    }
}

/// The story: the machine, the threads, the wait, and the end.
fn run(options: Options) -> Outcome<u8> {
    let signals = Signals::block();
    let script = options.names().script;
    let began = Instant::now();
    let (link, its_link) = socket_pair()?;
    let (our_log, its_log) = socket_pair()?;
    let (monitor, its_monitor) = options.icount.then(socket_pair).transpose()?.unzip();
    let log = our_log.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    let log = Log::follow(log, options.log.as_deref(), options.names())?;
    let started = match &options.script {
        None => qemu::start(&options, its_link, its_log, its_monitor).map(Machine::EmulatedHost),
        Some(path) => script::start(path, its_link, its_log, &our_log, options.verbose).map(Machine::Guest),
    };
    let mut machine = match started {
        Ok(machine) => machine,
        Err(sentence) => return Ok(lab_failed(script, &sentence, log)),
    };

    let (news, incoming) = mpsc::channel();
    let news = Teller(news);
    let to_link = start_writer(&link, &options.start)?;
    thread::spawn({
        let news = news.clone();
        let machine = options.names().machine;
        move || news.tell(pass_on(link, &news, machine))
    });
    if let Some(monitor) = monitor {
        let news = news.clone();
        thread::spawn(move || standstill::watch(monitor).map(|sentence| news.tell(News::Failed(sentence))));
    }
    thread::spawn({
        let (to_link, terminal) = (to_link.clone(), options.terminal);
        move || read_input(&to_link, &news, terminal)
    });

    let raw = options.terminal.then(RawTerminal::enter).flatten();
    let ending = wait(&options, &signals, &incoming, &to_link, began);
    drop(raw);
    machine.stop();
    match ending {
        Ending::Status(status) => Ok(status),
        Ending::Signal(number) => Ok(die_of(number)),
        Ending::Time { up, limit } => {
            if up {
                eprintln!(
                    "{script}: the command had not ended after {} s (time limit), stopped",
                    limit.as_secs()
                );
            } else {
                eprintln!("{script}: not up after {} s (time limit), stopped", limit.as_secs());
                log.show();
            }
            Ok(STATUS_TIME_LIMIT)
        }
        Ending::Failed(sentence) => Ok(lab_failed(script, &sentence, log)),
    }
}

/// Says why, with the last lines of the log: whatever wrote to it has ended.
fn lab_failed(script: &str, sentence: &str, log: Log) -> u8 {
    eprintln!("{script}: {sentence}");
    log.show();
    STATUS_LAB_FAILED
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
                if let Some(size) = sys::window_size(io::stdout()).filter(|_| options.terminal) {
                    // With a full queue the command is busy: it learns of the next change.
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
                        eprintln!(
                            "{}: up after {:.1} s",
                            options.names().script,
                            began.elapsed().as_secs_f64()
                        );
                    }
                }
                News::Ended(status) => return Ending::Status(status),
                News::OutputClosed => return Ending::Signal(libc::SIGPIPE),
                News::Escape => return Ending::Signal(libc::SIGHUP),
                News::Failed(sentence) => return Ending::Failed(sentence),
            }
        }
    }
}

fn socket_pair() -> Outcome<(UnixStream, UnixStream)> {
    UnixStream::pair().map_err(|error| format!("cannot create a socket pair: {error}"))
}

/// The thread that writes to the link: first the start frame, then each frame of its queue.
fn start_writer(link: &UnixStream, start: &Start) -> Outcome<SyncSender<(Kind, Vec<u8>)>> {
    let mut link = link.try_clone().map_err(|error| format!("cannot duplicate a socket: {error}"))?;
    let (queue, frames) = mpsc::sync_channel::<(Kind, Vec<u8>)>(4);
    let start = start.to_bytes();
    thread::spawn(move || {
        let mut result = link::send(&mut link, Kind::Start, &start);
        while let (Ok(()), Ok((kind, payload))) = (&result, frames.recv()) {
            result = link::send(&mut link, kind, &payload);
        }
        // When the machine is gone, the thread that reads the link reports it.
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
fn pass_on(mut link: UnixStream, news: &Teller, machine: &str) -> News {
    // Unbuffered: a prompt has no newline at its end.
    let (mut output, mut errors) = match (unbuffered(io::stdout()), unbuffered(io::stderr())) {
        (Ok(output), Ok(errors)) => (output, errors),
        (Err(error), _) | (_, Err(error)) => {
            return News::Failed(format!("cannot duplicate our output: {error}"));
        }
    };
    let mut file: Option<(PathBuf, File)> = None;
    let too_early = format!("the {machine} ended before its command did");
    loop {
        let (kind, payload) = match link::receive(&mut link) {
            Ok(Some(frame)) => frame,
            Ok(None) => return News::Failed(too_early),
            // The same, with bytes of ours that were not read any more.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return News::Failed(too_early),
            Err(error) => {
                return News::Failed(format!("the link to the {machine} failed: {error}"));
            }
        };
        let result = match kind {
            Kind::Hello => {
                news.tell(News::Up);
                Ok(())
            }
            Kind::Output => output.write_all(&payload).map_err(|_| News::OutputClosed),
            Kind::Error => errors.write_all(&payload).map_err(|_| News::OutputClosed),
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

/// A standard file without the library's buffer.
fn unbuffered(standard: impl AsFd) -> io::Result<File> {
    Ok(standard.as_fd().try_clone_to_owned()?.into())
}

/// One frame of a file that comes back.
fn take_back(kind: Kind, payload: &[u8], current: &mut Option<(PathBuf, File)>) -> Outcome<()> {
    let (mode_bytes, rest) = payload.split_first_chunk().ok_or("the link brought half a file")?;
    let mode = u32::from_le_bytes(*mode_bytes);
    match kind {
        Kind::Directory => {
            let path = PathBuf::from(OsStr::from_bytes(rest));
            DirBuilder::new().recursive(true).mode(mode).create(&path).map_err(failed("make", &path))
        }
        Kind::File => {
            let (size, name) = rest.split_first_chunk().ok_or("the link brought half a file")?;
            let path = PathBuf::from(OsStr::from_bytes(name));
            let open = OpenOptions::new().write(true).create(true).truncate(true).open(&path);
            let file = open.map_err(failed("write", &path))?;
            file.set_len(u64::from_le_bytes(*size)).map_err(failed("write", &path))?;
            file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed("write", &path))?;
            *current = Some((path, file));
            Ok(())
        }
        _ => {
            let (offset, bytes) = payload.split_first_chunk().ok_or("the link brought half a file")?;
            let (path, file) = current.as_ref().ok_or("the link brought data of no file")?;
            file.write_all_at(bytes, u64::from_le_bytes(*offset)).map_err(failed("write", path))
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
        wake_first_thread();
    }
}

/// The terminal on standard input, raw until this value is dropped.
struct RawTerminal(Termios);

impl RawTerminal {
    /// `None` when standard input is not a terminal.
    fn enter() -> Option<RawTerminal> {
        let before = tcgetattr(io::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(RawTerminal(before))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no settings.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
