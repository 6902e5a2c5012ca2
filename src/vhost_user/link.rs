//! A device's connection to its back-end: the two sockets of a [`Session`], what happens when they are lost,
//! and what the device's keeper ([`super::keeper`]) is to do.
//!
//! ```text
//!            give_up, with reconnect=                 lose: the time is over, or another back-end came
//!   ┌──────┐ ───────────────────────▶ ┌──────┐ ───────────────────────────────────────────────▶ ┌──────┐
//!   │ here │                          │ away │                                                  │ lost │
//!   └──────┘ ◀─────────────────────── └──────┘                                                  └──────┘
//!      │      returned                                                                             ▲
//!      └─────────────── give_up, without reconnect= ───────────────────────────────────────────────┘
//! ```

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::tracer::Tracer;
use super::wire::channel::ChannelError;
use super::wire::connection::{ConnectionError, discard, discard_descriptors};
use crate::memory::shmem::SharedMemory;
use crate::report::{MisuseLog, with_causes};
use crate::virtio::interrupt::Interrupt;

/// How long an access to a hole waits for a back-end that is back: the longest that its start may take, and
/// the time to serve the requests that it has sent by then.
const RETURN_TIMEOUT: Duration = Duration::from_secs(15);

/// The two sockets to one process.
pub struct Session {
    /// The main socket.
    pub main: Arc<UnixStream>,
    channel: Option<Arc<UnixStream>>,
    is_over: AtomicBool,
}

impl Session {
    /// With a back-end that just connected, by its sockets.
    pub fn new(main: Arc<UnixStream>, channel: Option<Arc<UnixStream>>) -> Arc<Self> {
        Arc::new(Session { main, channel, is_over: AtomicBool::new(false) })
    }

    /// Whether the back-end is gone, or was cut off.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Acquire)
    }

    /// Throws away what is left on both sockets after [`Self::hang_up`], but for an answer on the main socket
    /// that another thread waits for. May wait: called by the device's own thread.
    pub fn discard(&self) {
        discard_descriptors(&self.main);
        self.channel.iter().for_each(|socket| discard(socket));
    }

    /// Hangs up on both sockets: a thread that waits on one goes on.
    pub fn hang_up(&self) {
        for socket in [Some(&self.main), self.channel.as_ref()].into_iter().flatten() {
            // It fails only where the peer has hung up first.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// What to do when a back-end is lost permanently; it is told why. `None` to go on with a device that needs a
/// reset.
pub type OnLoss = Option<Box<dyn Fn(&str) + Send + Sync>>;

/// What the keeper does next.
pub enum KeeperTask {
    /// End.
    Stop,
    /// Try to connect to the back-end again, until this time.
    Return(Instant),
    /// Ask for the configuration, which has changed.
    ReadConfig,
    /// Tell the back-end what has changed in other devices' mappings.
    TellOfOthers,
}

/// Shared by the device, its two threads ([`super::watch`], [`super::keeper`]), and the owners of mappings
/// that its back-end sees.
pub struct Link {
    /// The device's name.
    pub name: String,
    /// For what its back-end can provoke.
    pub log: MisuseLog,
    /// The device's interrupt.
    pub interrupt: Arc<Interrupt>,
    /// Where the machine is traced.
    pub tracer: Option<Arc<Tracer>>,
    shmem: Arc<SharedMemory>,
    /// How long a back-end that died may be away; `None` where it is lost at once.
    reconnect: Option<Duration>,
    on_loss: OnLoss,
    /// Lock order: after all others of `vhost_user`, before those of the registers and of `SharedMemory`'s
    /// expectation. Held for a moment.
    state: Mutex<State>,
    task_given: Condvar,
}

struct State {
    session: Arc<Session>,
    /// While the back-end is away: until when it may come back.
    away_until: Option<Instant>,
    /// Permanently: no session follows.
    is_lost: bool,
    /// Why the last session was given up.
    why: String,
    stop: bool,
    config_changed: bool,
    others_changed: bool,
}

impl Link {
    /// The link of the device `name` over its first session.
    pub fn new(
        name: &str,
        interrupt: Arc<Interrupt>,
        shmem: Arc<SharedMemory>,
        session: Arc<Session>,
        reconnect: Option<Duration>,
        on_loss: OnLoss,
        tracer: Option<Arc<Tracer>>,
    ) -> Arc<Self> {
        let state = State {
            session,
            away_until: None,
            is_lost: false,
            why: String::new(),
            stop: false,
            config_changed: false,
            others_changed: false,
        };
        let (name, log, task_given) = (name.to_string(), MisuseLog::new(name), Condvar::new());
        let state = Mutex::new(state);
        Arc::new(Link { name, log, interrupt, tracer, shmem, reconnect, on_loss, state, task_given })
    }

    /// The session, which may be over. The next one takes its place under the lock of the main socket.
    pub fn session(&self) -> Arc<Session> {
        Arc::clone(&self.lock().session)
    }

    /// Whether the back-end is gone, and may come back.
    pub fn is_away(&self) -> bool {
        self.lock().away_until.is_some()
    }

    /// Whether the back-end is gone permanently.
    pub fn is_lost(&self) -> bool {
        self.lock().is_lost
    }

    /// Gives a session up: says why, once, and hangs up on both sockets. No request will stop this back-end,
    /// so it must see the hang-up. Its mappings stay (SHM-76). Without `reconnect=` the back-end is lost.
    pub fn give_up(&self, session: &Session, why: &dyn std::error::Error) {
        let mut state = self.lock();
        if session.is_over.swap(true, Ordering::AcqRel) {
            return;
        }
        session.hang_up();
        let why = with_causes(why);
        state.why.clone_from(&why);
        match self.reconnect {
            None => self.lose_it(&mut state, &why),
            Some(limit) => {
                // A back-end that dies before it has gone on gets no more time.
                let until = *state.away_until.get_or_insert(Instant::now() + limit);
                self.event("gone", &[("deadline_seconds", limit.as_secs())], Some(&why));
                self.shmem.expect_mappings(until + RETURN_TIMEOUT);
                self.log.warn(format_args!(
                    "{why}; the guest waits for the back-end to come back, {} s at most",
                    limit.as_secs()
                ));
                self.task_given.notify_all();
            }
        }
    }

    /// Why the last session was given up.
    pub fn why_given_up(&self) -> String {
        self.lock().why.clone()
    }

    /// Gives the back-end up permanently: says why, once, and tells the driver.
    pub fn lose(&self, why: &str) {
        self.lose_it(&mut self.lock(), why);
    }

    fn lose_it(&self, state: &mut State, why: &str) {
        if std::mem::replace(&mut state.is_lost, true) {
            return;
        }
        state.away_until = None;
        state.session.is_over.store(true, Ordering::Release);
        state.session.hang_up();
        self.shmem.expect_nothing();
        self.event("lost", &[], Some(why));
        log::error!("{}: {why}; the device needs a reset", self.name);
        self.interrupt.needs_reset();
        if let Some(on_loss) = &self.on_loss {
            on_loss(why);
        }
        self.task_given.notify_all();
    }

    /// The back-end came back: its session takes the place of the old one. It is away until
    /// [`Self::returned`]. A session that comes too late is over at once.
    pub fn adopt(&self, session: &Arc<Session>) {
        let mut state = self.lock();
        if state.is_lost {
            session.is_over.store(true, Ordering::Release);
            session.hang_up();
        }
        state.session = Arc::clone(session);
    }

    /// The back-end goes on.
    pub fn returned(&self) {
        let mut state = self.lock();
        if !state.session.is_over() {
            self.event("back", &[], None);
            state.away_until = None;
        }
    }

    /// What it was to map anew is mapped: accesses to holes wait no longer.
    pub fn settled(&self) {
        let state = self.lock();
        if state.away_until.is_none() {
            self.shmem.expect_nothing();
        }
    }

    /// The driver resets the device, or starts it. Accesses to holes wait for the back-end only while the
    /// device is started: only then may it map.
    pub fn expect(&self, is_started: bool) {
        match self.lock().away_until {
            Some(until) if is_started => self.shmem.expect_mappings(until + RETURN_TIMEOUT),
            _ => self.shmem.expect_nothing(),
        }
    }

    /// The backend channel ended. A back-end may close it alone and go on; if it is gone as a whole, the main
    /// socket tells.
    pub fn channel_ended(&self, session: &Session, why: &ChannelError) {
        match why {
            ChannelError::Connection(ConnectionError::HungUp) => {
                self.event(
                    "channel-closed",
                    &[],
                    Some("the back-end closed the backend channel, and may go on"),
                );
                log::debug!("{}: the back-end closed the backend channel", self.name);
            }
            // SHM-64
            why => self.give_up(session, why),
        }
    }

    /// Something happened, for the trace ([`crate::trace::record::Event`]).
    pub fn event(&self, event: &str, fields: &[(&str, u64)], reason: Option<&str>) {
        self.tracer.iter().for_each(|tracer| tracer.event(event, fields, reason));
    }

    // The keeper's tasks. Giving one does not wait.

    /// The configuration has changed.
    pub fn read_config(&self) {
        self.lock().config_changed = true;
        self.task_given.notify_all();
    }

    /// Something is due to the back-end about other devices' mappings.
    pub fn tell_of_others(&self) {
        self.lock().others_changed = true;
        self.task_given.notify_all();
    }

    /// The device ends.
    pub fn stop(&self) {
        self.lock().stop = true;
        self.task_given.notify_all();
    }

    /// The keeper's next task; waits for one.
    pub fn next_task(&self) -> KeeperTask {
        let mut state = self.lock();
        loop {
            if state.stop {
                return KeeperTask::Stop;
            }
            if let Some(until) = state.away_until {
                return KeeperTask::Return(until);
            }
            if std::mem::take(&mut state.config_changed) {
                return KeeperTask::ReadConfig;
            }
            if std::mem::take(&mut state.others_changed) {
                return KeeperTask::TellOfOthers;
            }
            state = self.task_given.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits before the next attempt to connect. False where no attempt may follow.
    pub fn pause(&self, time: Duration) -> bool {
        let goes_on = |state: &mut State| !state.stop && !state.is_lost;
        let waited = self.task_given.wait_timeout_while(self.lock(), time, goes_on);
        goes_on(&mut waited.unwrap_or_else(PoisonError::into_inner).0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
