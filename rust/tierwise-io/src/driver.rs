//! The driver thread: carries the queue's operations to the backend and its completions back.

use crate::backend::{Backend, Wake};
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::queue::{Queue, RequestId};
use crate::ticket::Slot;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the driver and its callers share.
pub(crate) struct Shared {
    state: Mutex<State>,
    waker: Arc<dyn Wake>,
    opened: Instant,
    owner: u32,
    pub(crate) stall_timeout: Duration,
}

pub(crate) struct State {
    pub(crate) queue: Queue,
    pub(crate) slots: BTreeMap<RequestId, Arc<Slot>>,
    /// Why nothing works any more.
    stopped: Option<Error>,
    closing: bool,
    /// When the disk completed something last, or had nothing to do.
    progress_ns: u64,
    /// Since when there has been a request, if there is one.
    busy_since_ns: Option<u64>,
    /// How long there was one before.
    busy_ns: u64,
}

impl State {
    fn deliver(&mut self, now_ns: u64) {
        if self.queue.pending() == 0
            && let Some(since) = self.busy_since_ns.take()
        {
            self.busy_ns += now_ns.saturating_sub(since);
        }
        for finished in self.queue.take_finished() {
            if let Some(slot) = self.slots.remove(&finished.request) {
                slot.resolve(finished.outcome);
            }
        }
    }
}

impl Shared {
    pub(crate) fn new(queue: Queue, waker: Arc<dyn Wake>, stall_timeout: Duration) -> Shared {
        let state = State { queue, slots: BTreeMap::new(), stopped: None, closing: false, progress_ns: 0, busy_since_ns: None, busy_ns: 0 };
        Shared { state: Mutex::new(state), waker, opened: Instant::now(), owner: std::process::id(), stall_timeout }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ns(&self) -> u64 {
        self.opened.elapsed().as_nanos() as u64
    }

    /// A forked child has neither the driver thread nor a usable lock.
    pub(crate) fn check_process(&self) -> Result<()> {
        let child = std::process::id();
        if child == self.owner { Ok(()) } else { Err(Error::Forked { owner: self.owner, child }) }
    }

    /// Adds a request.
    pub(crate) fn submit(&self, add: impl FnOnce(&mut Queue) -> Result<RequestId>) -> Result<(RequestId, Arc<Slot>)> {
        self.check_process()?;
        let slot = Arc::new(Slot::default());
        let mut state = self.lock();
        if let Some(error) = &state.stopped {
            return Err(error.clone());
        }
        if state.queue.pending() == 0 {
            state.progress_ns = self.now_ns();
        }
        let request = add(&mut state.queue)?;
        let now_ns = self.now_ns();
        state.busy_since_ns.get_or_insert(now_ns);
        state.slots.insert(request, Arc::clone(&slot));
        drop(state);
        self.waker.wake();
        Ok((request, slot))
    }

    /// Changes requests; those that end by it are told at once.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Queue)) {
        let mut state = self.lock();
        change(&mut state.queue);
        state.deliver(self.now_ns());
        drop(state);
        self.waker.wake();
    }

    /// Looks at the queue, or changes what the driver need not know.
    pub(crate) fn with_queue<T>(&self, look: impl FnOnce(&mut Queue) -> T) -> T {
        look(&mut self.lock().queue)
    }

    /// What was counted, a busy time that has not ended included.
    pub(crate) fn metrics(&self) -> Metrics {
        let state = self.lock();
        let since = state.busy_since_ns.map_or(0, |since| self.now_ns().saturating_sub(since));
        Metrics { busy_ns: state.busy_ns + since, ..state.queue.metrics() }
    }

    /// Waits until every request that is pending now has ended.
    pub(crate) fn flush(&self) -> Result<()> {
        let pending: Vec<Arc<Slot>> = self.lock().slots.values().cloned().collect();
        let started = Instant::now();
        for slot in pending {
            while slot.wait(self.stall_timeout).is_none() {
                if self.quiet_for() >= self.stall_timeout {
                    return Err(Error::Stopped(format!("the disk has completed nothing for {:?} (see dmesg)", started.elapsed())));
                }
            }
        }
        Ok(())
    }

    /// How long the disk has completed nothing although it had something to do.
    pub(crate) fn quiet_for(&self) -> Duration {
        let state = self.lock();
        Duration::from_nanos(self.now_ns().saturating_sub(state.progress_ns))
    }

    /// Cancels everything and lets the driver end once the disk has let go of every buffer.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        let requests: Vec<RequestId> = state.slots.keys().copied().collect();
        for request in requests {
            state.queue.cancel(request);
        }
        state.deliver(self.now_ns());
        drop(state);
        self.waker.wake();
    }
}

/// The driver thread.
pub(crate) fn run(shared: &Shared, mut backend: Box<dyn Backend>) {
    let outcome = catch_unwind(AssertUnwindSafe(|| drive(shared, &mut *backend)));
    // The disk has to let go of the buffers before their owners hear of the end.
    drop(backend);
    let error = match outcome {
        Ok(Ok(())) => Error::Stopped("the store was closed".to_owned()),
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
            Error::Stopped(format!("the driver thread panicked: {}", text.unwrap_or_else(|| "no message".to_owned())))
        }
    };
    let mut state = shared.lock();
    state.stopped = Some(error.clone());
    for slot in std::mem::take(&mut state.slots).into_values() {
        slot.resolve(Err(error.clone()));
    }
}

fn drive(shared: &Shared, backend: &mut dyn Backend) -> Result<()> {
    let mut ended = Vec::new();
    loop {
        loop {
            let op = shared.lock().queue.poll(shared.now_ns());
            let Some(op) = op else { break };
            backend.submit(op)?;
        }
        let timeout = {
            let state = shared.lock();
            if state.closing && state.queue.pending() == 0 {
                return Ok(());
            }
            state.queue.next_wakeup_ns().map(|due| Duration::from_nanos(due.saturating_sub(shared.now_ns())))
        };
        backend.reap(timeout, &mut ended)?;
        if ended.is_empty() {
            continue;
        }
        let mut state = shared.lock();
        let now_ns = shared.now_ns();
        state.progress_ns = now_ns;
        for completion in ended.drain(..) {
            state.queue.complete(now_ns, &completion)?;
        }
        state.deliver(now_ns);
    }
}

/// Signals are for the application's threads. SIGXFSZ above all: blocked, a write beyond the file size limit fails with EFBIG; not
/// blocked, it kills the process.
pub(crate) fn block_signals() {
    // SAFETY: the set is initialised by sigfillset before it is used and lives through the calls.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT] {
            libc::sigdelset(&raw mut set, fault);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}
