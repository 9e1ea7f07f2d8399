//! The emulated device: host memory that behaves like a GPU behind links of a chosen speed.

use crate::device::{Addition, ComputeStream, Device, Event, EventRef, Link, Queue, Transfer};
use crate::error::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tierwise_kernels::{AdamSegment, GradSpan, Pool, accumulate, adam, norm};

const NAME: &str = "emulated";
/// A link speed near zero must not overflow the clock.
const LONGEST_COPY: Duration = Duration::from_secs(24 * 3600);

/// How fast the emulated device is.
#[derive(Debug, Clone, PartialEq)]
pub struct EmulatedConfig {
    /// Speed of the host-to-device link; `None` is as fast as memory.
    pub h2d_bytes_per_second: Option<f64>,
    /// Speed of the device-to-host link; `None` is as fast as memory.
    pub d2h_bytes_per_second: Option<f64>,
    /// Least time of one copy, whatever its size.
    pub latency_ns: u64,
    /// Largest piece of a copy; 0 is the default.
    pub piece_bytes: usize,
    /// Threads of the optimizer queue's kernels; 0 lets the pool choose.
    pub threads: usize,
}

impl EmulatedConfig {
    /// Default of [`EmulatedConfig::piece_bytes`].
    pub const PIECE_BYTES: usize = 32 << 20;
}

impl Default for EmulatedConfig {
    fn default() -> Self {
        Self { h2d_bytes_per_second: None, d2h_bytes_per_second: None, latency_ns: 0, piece_bytes: Self::PIECE_BYTES, threads: 1 }
    }
}

/// Host memory with in-order queues, each a thread. Those that copy in one direction share the speed of its link.
///
/// The first failure of any queue is the device's: work enqueued afterwards is refused or skipped, every event that comes after it
/// returns it, and nothing waits for ever.
pub struct EmulatedDevice {
    shared: Arc<Shared>,
    /// In the order of [`Queue::ALL`]; empty if the threads could not be started.
    workers: Vec<Worker>,
    owner: u32,
}

struct Worker {
    commands: Sender<Command>,
    thread: JoinHandle<()>,
}

struct Shared {
    config: EmulatedConfig,
    epoch: Instant,
    failure: Mutex<Option<Error>>,
    /// Failures to inject, by queue.
    injected: [Mutex<Option<String>>; Queue::ALL.len()],
    /// By direction: until when the pieces that were let on occupy the link.
    links: [Mutex<Option<Instant>>; 2],
}

enum Command {
    Run { call: &'static str, injected: Option<String>, work: Work },
    Wait(EventRef),
    Record(Arc<EmulatedEvent>),
}

enum Work {
    Copy(Vec<Transfer>),
    Adam(Vec<AdamSegment>),
    SumSquares(Vec<GradSpan>, Address<f64>),
    Accumulate(Vec<Addition>),
}

/// A raw address that moves to a queue's thread.
struct Address<T>(*mut T);

// SAFETY: an address alone accesses nothing; the device's caller keeps it alive and unaliased until the work on it is done.
unsafe impl<T> Send for Address<T> {}

struct EmulatedEvent {
    state: Mutex<EventState>,
    reached: Condvar,
}

enum EventState {
    Pending,
    Reached(u64),
    Failed(Error),
}

impl EmulatedDevice {
    /// Starts the queues. If the system refuses their threads, every call returns that error.
    pub fn new(mut config: EmulatedConfig) -> Arc<Self> {
        if config.piece_bytes == 0 {
            config.piece_bytes = EmulatedConfig::PIECE_BYTES;
        }
        let threads = (config.threads > 0).then_some(config.threads);
        let shared = Arc::new(Shared {
            config,
            epoch: Instant::now(),
            failure: Mutex::new(None),
            injected: Default::default(),
            links: Default::default(),
        });
        let workers = start(&shared, threads).unwrap_or_else(|error| {
            shared.fail(error);
            Vec::new()
        });
        Arc::new(Self { shared, workers, owner: std::process::id() })
    }

    /// Makes the next copy or kernel that is enqueued on `queue` fail with `message`, for tests of what follows a failure.
    pub fn fail_next(&self, queue: Queue, message: &str) {
        *lock(&self.shared.injected[queue as usize]) = Some(message.to_owned());
    }

    /// A forked child has none of the threads, and its copy of a lock may be held for ever.
    fn check_process(&self) -> Result<()> {
        let child = std::process::id();
        if child == self.owner { Ok(()) } else { Err(Error::Forked { owner: self.owner, child }) }
    }

    fn submit(&self, queue: Queue, command: Command) -> Result<()> {
        self.check_process()?;
        let sent = self.workers.get(queue as usize).is_some_and(|worker| worker.commands.send(command).is_ok());
        if sent { Ok(()) } else { Err(self.shared.failure().unwrap_or_else(|| device_error("submit", "its queues have ended".into()))) }
    }

    fn run(&self, queue: Queue, call: &'static str, work: Work) -> Result<()> {
        self.check_process()?;
        if let Some(failure) = self.shared.failure() {
            return Err(failure);
        }
        let injected = lock(&self.shared.injected[queue as usize]).take();
        self.submit(queue, Command::Run { call, injected, work })
    }
}

impl Device for EmulatedDevice {
    fn name(&self) -> &str {
        NAME
    }

    fn now_ns(&self) -> u64 {
        self.shared.now_ns()
    }

    fn is_asynchronous(&self) -> bool {
        false
    }

    fn copy(&self, queue: Queue, transfers: &[Transfer]) -> Result<()> {
        if queue.link().is_none() {
            return Err(Error::Internal("copies go to a queue that has a direction".into()));
        }
        self.run(queue, "copy", Work::Copy(transfers.to_vec()))
    }

    fn record(&self, queue: Queue) -> Result<EventRef> {
        let event = Arc::new(EmulatedEvent::new(EventState::Pending));
        match self.submit(queue, Command::Record(Arc::clone(&event))) {
            Ok(()) => Ok(event),
            Err(error @ Error::Forked { .. }) => Err(error),
            Err(error) => Ok(Arc::new(EmulatedEvent::new(EventState::Failed(error)))),
        }
    }

    fn record_compute(&self, _stream: ComputeStream) -> Result<EventRef> {
        self.check_process()?;
        Ok(Arc::new(EmulatedEvent::new(self.shared.reached())))
    }

    fn queue_wait(&self, queue: Queue, event: &EventRef) -> Result<()> {
        self.submit(queue, Command::Wait(Arc::clone(event)))
    }

    fn compute_wait(&self, _stream: ComputeStream, event: &EventRef) -> Result<()> {
        event.synchronize()
    }

    fn adam(&self, segments: &[AdamSegment]) -> Result<()> {
        self.run(Queue::Optimizer, "adam", Work::Adam(segments.to_vec()))
    }

    fn sum_squares(&self, spans: &[GradSpan], out: *mut f64) -> Result<()> {
        self.run(Queue::Optimizer, "sum_squares", Work::SumSquares(spans.to_vec(), Address(out)))
    }

    fn accumulate(&self, additions: &[Addition]) -> Result<()> {
        self.run(Queue::Optimizer, "accumulate", Work::Accumulate(additions.to_vec()))
    }

    fn register_host(&self, _ptr: *mut u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn unregister_host(&self, _ptr: *mut u8) {}

    fn synchronize(&self) -> Result<()> {
        let events = Queue::ALL.map(|queue| self.record(queue));
        // Every queue is waited for, also when the first one has failed: memory may be freed after this call.
        let results = events.map(|event| event.and_then(|event| event.synchronize()));
        results.into_iter().collect()
    }
}

impl Drop for EmulatedDevice {
    fn drop(&mut self) {
        let workers = std::mem::take(&mut self.workers);
        if std::process::id() != self.owner {
            // A forked child has no such threads, and the channels may have been locked at the moment of the fork.
            std::mem::forget(workers);
            return;
        }
        // Closed first, so that the queues finish what they have side by side.
        let threads: Vec<_> = workers.into_iter().map(|worker| worker.thread).collect();
        for thread in threads {
            // A worker catches the panics of its commands; the last reference may even be dropped by a worker itself.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Shared {
    fn now_ns(&self) -> u64 {
        self.epoch.elapsed().as_nanos() as u64
    }

    fn failure(&self) -> Option<Error> {
        lock(&self.failure).clone()
    }

    /// Keeps the first failure: what follows is its consequence.
    fn fail(&self, error: Error) {
        lock(&self.failure).get_or_insert(error);
    }

    fn reached(&self) -> EventState {
        self.failure().map_or_else(|| EventState::Reached(self.now_ns()), EventState::Failed)
    }

    fn copy(&self, link: Link, transfers: &[Transfer]) {
        let config = &self.config;
        let speed = match link {
            Link::HostToDevice => config.h2d_bytes_per_second,
            Link::DeviceToHost => config.d2h_bytes_per_second,
        }
        .filter(|speed| *speed > 0.0);
        let start = Instant::now();
        let latency = Duration::from_nanos(config.latency_ns).min(LONGEST_COPY);
        // When the previous piece of this copy was through, whenever this thread woke up for it.
        let mut through = start;
        for transfer in transfers {
            for offset in (0..transfer.bytes).step_by(config.piece_bytes) {
                let bytes = config.piece_bytes.min(transfer.bytes - offset);
                if let Some(speed) = speed {
                    through = self.occupy(link, through, bytes, speed);
                }
                // SAFETY: the device's caller keeps both ends alive and unaliased until an event after this copy is done, and they
                // are `transfer.bytes` long; `copy` also allows ends that overlap.
                unsafe { transfer.src.add(offset).copy_to(transfer.dst.add(offset), bytes) };
                sleep_until(through + latency);
            }
        }
        sleep_until(start + latency);
    }

    /// Lets a piece on the link after those that are on it; gives when it is through.
    fn occupy(&self, link: Link, from: Instant, bytes: usize, speed: f64) -> Instant {
        let transport = Duration::try_from_secs_f64(bytes as f64 / speed).unwrap_or(LONGEST_COPY).min(LONGEST_COPY);
        let mut busy = lock(&self.links[link as usize]);
        let through = busy.map_or(from, |until| until.max(from)) + transport;
        *busy = Some(through);
        through
    }
}

impl EmulatedEvent {
    fn new(state: EventState) -> Self {
        Self { state: Mutex::new(state), reached: Condvar::new() }
    }

    fn finish(&self, state: EventState) {
        *lock(&self.state) = state;
        self.reached.notify_all();
    }
}

impl Event for EmulatedEvent {
    fn is_done(&self) -> Result<bool> {
        match &*lock(&self.state) {
            EventState::Pending => Ok(false),
            EventState::Reached(_) => Ok(true),
            EventState::Failed(error) => Err(error.clone()),
        }
    }

    fn synchronize(&self) -> Result<()> {
        let pending = |state: &mut EventState| matches!(state, EventState::Pending);
        match &*self.reached.wait_while(lock(&self.state), pending).unwrap_or_else(PoisonError::into_inner) {
            EventState::Failed(error) => Err(error.clone()),
            EventState::Pending | EventState::Reached(_) => Ok(()),
        }
    }

    fn synchronize_for(&self, limit: Duration) -> Result<bool> {
        let pending = |state: &mut EventState| matches!(state, EventState::Pending);
        match &*self.reached.wait_timeout_while(lock(&self.state), limit, pending).unwrap_or_else(PoisonError::into_inner).0 {
            EventState::Failed(error) => Err(error.clone()),
            EventState::Pending => Ok(false),
            EventState::Reached(_) => Ok(true),
        }
    }

    fn time_ns(&self) -> Option<u64> {
        match &*lock(&self.state) {
            EventState::Reached(time) => Some(*time),
            EventState::Pending | EventState::Failed(_) => None,
        }
    }
}

fn start(shared: &Arc<Shared>, threads: Option<usize>) -> Result<Vec<Worker>> {
    let refused = |message: String| device_error("start", message);
    let mut pool = Some(Pool::try_new(threads).map_err(|error| refused(format!("no thread pool: {error}")))?);
    Queue::ALL
        .into_iter()
        .map(|queue| {
            let (commands, receiver) = channel();
            let shared = Arc::clone(shared);
            // The pool belongs to the one queue that runs kernels and ends with its thread.
            let pool = if queue == Queue::Optimizer { pool.take() } else { None };
            let name = match queue {
                Queue::HostToDevice => "tierwise-h2d",
                Queue::DeviceToHost => "tierwise-d2h",
                Queue::Optimizer => "tierwise-optim",
                Queue::StatesIn => "tierwise-in",
                Queue::StatesOut => "tierwise-out",
            };
            let body = move || serve(&shared, queue, pool.as_ref(), &receiver);
            let thread = std::thread::Builder::new().name(name.into()).spawn(body).map_err(|error| refused(format!("{name}: {error}")))?;
            Ok(Worker { commands, thread })
        })
        .collect()
}

/// The thread of one queue: commands in order until the device is dropped.
fn serve(shared: &Shared, queue: Queue, pool: Option<&Pool>, commands: &Receiver<Command>) {
    sharpen_sleep();
    for command in commands {
        match command {
            Command::Record(event) => event.finish(shared.reached()),
            Command::Wait(event) => shielded(shared, "queue_wait", || event.synchronize()),
            Command::Run { .. } if shared.failure().is_some() => {}
            Command::Run { call, injected, work } => shielded(shared, call, || {
                if let Some(message) = injected {
                    // Takes the way of a panic, without its report on stderr.
                    resume_unwind(Box::new(message));
                }
                execute(shared, queue, pool, work)
            }),
        }
    }
}

fn execute(shared: &Shared, queue: Queue, pool: Option<&Pool>, work: Work) -> Result<()> {
    let pool = || pool.ok_or_else(|| Error::Internal("kernels run on the optimizer queue".into()));
    match work {
        Work::Copy(transfers) => {
            let link = queue.link().ok_or_else(|| Error::Internal("a copy on a queue without a direction".into()))?;
            shared.copy(link, &transfers);
        }
        // SAFETY: the device's caller keeps every address alive and unaliased until an event recorded after the call is done.
        Work::Adam(segments) => unsafe { adam::adam_segments(pool()?, &segments) },
        Work::SumSquares(spans, out) => {
            // SAFETY: as above; the sums are only read.
            let sums = unsafe { norm::sum_squares(pool()?, &spans) };
            for (i, sum) in sums.into_iter().enumerate() {
                // SAFETY: `out` has one element per span and is kept alive by the device's caller as above.
                unsafe { out.0.add(i).write(sum) };
            }
        }
        Work::Accumulate(additions) => {
            // SAFETY: as above.
            unsafe { accumulate::add(pool()?, &additions) };
        }
    }
    Ok(())
}

/// Turns a failure or a panic into the device's failure, so that the queue goes on and releases whoever waits.
fn shielded(shared: &Shared, call: &'static str, work: impl FnOnce() -> Result<()>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => shared.fail(error),
        Err(panic) => shared.fail(device_error(call, panic_message(panic.as_ref()))),
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("a panic without a message").to_owned()
}

fn device_error(call: &'static str, message: String) -> Error {
    Error::Device { device: NAME.into(), call, message }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No lock is held across code that can panic, so a poisoned one still guards a whole value.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn sleep_until(deadline: Instant) {
    while let Some(left) = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::sleep(left);
    }
}

/// Linux may prolong a sleep by 50 us to save wake-ups: as long as copying a megabyte.
#[cfg(target_os = "linux")]
fn sharpen_sleep() {
    const SLACK_NS: libc::c_ulong = 1_000;
    // SAFETY: this changes the timer slack of the calling thread and touches no memory.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, SLACK_NS) };
}

#[cfg(not(target_os = "linux"))]
fn sharpen_sleep() {}
