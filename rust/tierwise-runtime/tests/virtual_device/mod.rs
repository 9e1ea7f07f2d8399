//! The emulated device driven by a virtual clock: its queues, the compute stream and the engine's workers are lanes of the simulator's
//! machine, so everything takes the time that the simulator counts, and what is copied, stepped and summed is so in memory all the same.
//!
//! The test's own thread drives: time passes only while it waits, and only once every worker waits too. So runs are repeatable although
//! the engine's threads are real.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::thread::ThreadId;
use tierwise_io::{Direction, Key, Priority};
use tierwise_kernels::{AdamSegment, GradSpan, Pool, accumulate, adam, norm};
use tierwise_runtime::device::{Addition, Clock, ComputeStream, Device, Event, EventRef, Queue, Transfer, WorkerId};
use tierwise_runtime::error::{Error, Result};
use tierwise_sim::executor::machine::{LANES, Lane, Machine, Task, Token};
use tierwise_sim::hardware::Hardware;

const WORKERS: usize = 10;

thread_local! {
    /// Which worker this thread is.
    static WORKER: Cell<Option<WorkerId>> = const { Cell::new(None) };
}

type Memory = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct VirtualDevice {
    inner: Mutex<Inner>,
    changed: Condvar,
    driver: ThreadId,
    me: Weak<VirtualDevice>,
}

struct Inner {
    machine: Machine<'static, Memory>,
    pool: Arc<Pool>,
    /// Per lane: what its next task waits for.
    waits: [Vec<Token>; LANES.len()],
    /// What every event ever recorded comes after.
    events: Vec<Vec<Token>>,
    workers: [Worker; WORKERS],
    /// The latest write of every payload, which its reads come after.
    written: BTreeMap<Key, Token>,
    /// Nobody drives any more: what has not happened never will.
    over: bool,
}

#[derive(Default)]
struct Worker {
    jobs: usize,
    waits_for: Option<Vec<Token>>,
    /// Whether it waits for what the others do.
    parks: bool,
}

/// An address that moves into a task's memory work.
struct Address<T>(*mut T);

// SAFETY: an address alone accesses nothing; the engine keeps it alive until the task has ended.
unsafe impl<T> Send for Address<T> {}

impl<T> Address<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

impl Inner {
    fn done(&self, tokens: &[Token]) -> bool {
        tokens.iter().all(|token| self.machine.ended_ns(*token).is_some())
    }

    fn task(&mut self, lane: Lane, work: f64, memory: Option<Memory>) -> Task<Memory> {
        let waits = std::mem::take(&mut self.waits[lane as usize]);
        Task { name: String::new(), bytes: 0, work, waits, on_start: Vec::new(), on_end: memory.into_iter().collect() }
    }

    fn push(&mut self, lane: Lane, work: f64, memory: Option<Memory>) -> Token {
        let task = self.task(lane, work, memory);
        self.machine.push(lane, task)
    }

    fn record(&mut self, lane: Lane) -> usize {
        let mut tokens = self.waits[lane as usize].clone();
        tokens.extend(self.machine.record(lane));
        self.events.push(tokens);
        self.events.len() - 1
    }

    fn begin_all(&mut self) {
        while self.machine.begin_one().is_some() {}
    }

    /// Lets time pass to the next end, if that is not after `until_ns`.
    fn next(&mut self, until_ns: u64) -> bool {
        self.begin_all();
        let Some((at, lane)) = self.machine.next_end().filter(|(at, _)| *at <= until_ns) else { return false };
        self.machine.advance(at);
        for memory in self.machine.end(lane).into_iter().flat_map(|ended| ended.effects) {
            memory();
        }
        true
    }

    fn at_rest(&self) -> bool {
        self.workers.iter().all(|w| w.jobs == 0 || w.parks || w.waits_for.as_ref().is_some_and(|tokens| !self.done(tokens)))
    }
}

fn lane(queue: Queue) -> Lane {
    match queue {
        Queue::HostToDevice => Lane::HostToDevice,
        Queue::DeviceToHost => Lane::DeviceToHost,
        Queue::Optimizer => Lane::Optimizer,
        Queue::StatesIn => Lane::StatesIn,
        Queue::StatesOut => Lane::StatesOut,
    }
}

impl VirtualDevice {
    /// At time 0. The calling thread is the one that drives.
    pub fn new(hardware: &Hardware) -> Arc<Self> {
        // Tests are short: the machine's figures live as long as the process.
        let hardware: &'static Hardware = Box::leak(Box::new(hardware.clone()));
        Arc::new_cyclic(|me| VirtualDevice {
            inner: Mutex::new(Inner {
                machine: Machine::new(hardware),
                pool: Arc::new(Pool::new(Some(1))),
                waits: Default::default(),
                events: Vec::new(),
                workers: Default::default(),
                written: BTreeMap::new(),
                over: false,
            }),
            changed: Condvar::new(),
            driver: std::thread::current().id(),
            me: me.clone(),
        })
    }

    /// Enqueues work on the compute stream.
    pub fn compute(&self, ns: u64) {
        self.lock().push(Lane::Compute, ns as f64, None);
    }

    /// The driving thread is busy for so long.
    pub fn spend(&self, ns: u64) {
        let until = self.lock().machine.now_ns() + ns;
        loop {
            self.rest();
            if !self.lock().next(until) {
                break;
            }
            self.changed.notify_all();
        }
        self.lock().machine.advance(until);
    }

    /// Until nothing happens any more.
    pub fn drain(&self) {
        loop {
            self.rest();
            if !self.lock().next(u64::MAX) {
                break;
            }
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Waits until every worker waits.
    fn rest(&self) {
        drop(self.changed.wait_while(self.lock(), |inner| !inner.at_rest()).unwrap());
    }

    fn wait(&self, tokens: &[Token]) -> Result<()> {
        if std::thread::current().id() == self.driver {
            while !self.lock().done(tokens) {
                self.pass()?;
            }
            return Ok(());
        }
        let worker = WORKER.get().expect("only the driver and the workers wait") as usize;
        let mut inner = self.lock();
        inner.workers[worker].waits_for = Some(tokens.to_vec());
        self.changed.notify_all();
        let mut inner = self.changed.wait_while(inner, |inner| !inner.done(tokens) && !inner.over).unwrap();
        inner.workers[worker].waits_for = None;
        if inner.done(tokens) { Ok(()) } else { Err(Error::Stopped("the test ended before".to_owned())) }
    }

    fn event(&self, id: usize) -> EventRef {
        Arc::new(VirtualEvent { id, device: self.me.upgrade().expect("a device in use lives") })
    }

    fn enqueue(&self, lane: Lane, bytes: u64, memory: Memory) {
        self.lock().push(lane, bytes as f64, Some(memory));
    }
}

struct VirtualEvent {
    id: usize,
    device: Arc<VirtualDevice>,
}

impl Event for VirtualEvent {
    fn is_done(&self) -> Result<bool> {
        let inner = self.device.lock();
        Ok(inner.done(&inner.events[self.id]))
    }

    fn synchronize(&self) -> Result<()> {
        let tokens = self.device.lock().events[self.id].clone();
        self.device.wait(&tokens)
    }

    fn synchronize_for(&self, _limit: std::time::Duration) -> Result<bool> {
        self.synchronize().map(|()| true)
    }

    fn time_ns(&self) -> Option<u64> {
        let inner = self.device.lock();
        inner.events[self.id]
            .iter()
            .map(|token| inner.machine.ended_ns(*token))
            .collect::<Option<Vec<u64>>>()
            .map(|t| t.into_iter().max().unwrap_or(0))
    }

    fn cuda_event(&self) -> Option<u64> {
        Some(self.id as u64)
    }
}

impl Device for VirtualDevice {
    fn name(&self) -> &'static str {
        "virtual"
    }

    fn now_ns(&self) -> u64 {
        self.lock().machine.now_ns()
    }

    fn is_asynchronous(&self) -> bool {
        true
    }

    fn copy(&self, queue: Queue, transfers: &[Transfer]) -> Result<()> {
        let transfers = transfers.to_vec();
        let bytes = transfers.iter().map(|t| t.bytes as u64).sum();
        let memory = move || {
            for t in &transfers {
                // SAFETY: the engine keeps both ends alive and unaliased until an event after this copy is done.
                unsafe { t.src.copy_to_nonoverlapping(t.dst, t.bytes) };
            }
        };
        self.enqueue(lane(queue), bytes, Box::new(memory));
        Ok(())
    }

    fn record(&self, queue: Queue) -> Result<EventRef> {
        let id = self.lock().record(lane(queue));
        Ok(self.event(id))
    }

    fn record_compute(&self, _stream: ComputeStream) -> Result<EventRef> {
        let id = self.lock().record(Lane::Compute);
        Ok(self.event(id))
    }

    fn queue_wait(&self, queue: Queue, event: &EventRef) -> Result<()> {
        let mut inner = self.lock();
        let tokens = inner.events[event.cuda_event().expect("its own event") as usize].clone();
        inner.waits[lane(queue) as usize].extend(tokens);
        Ok(())
    }

    fn compute_wait(&self, _stream: ComputeStream, event: &EventRef) -> Result<()> {
        let mut inner = self.lock();
        let tokens = inner.events[event.cuda_event().expect("its own event") as usize].clone();
        inner.waits[Lane::Compute as usize].extend(tokens);
        Ok(())
    }

    fn adam(&self, segments: &[AdamSegment]) -> Result<()> {
        let (segments, pool) = (segments.to_vec(), self.lock().pool.clone());
        // Gradient in; parameter, low half and both moments in and out.
        let bytes = segments.iter().map(|s| s.numel as u64 * (s.grad_dtype.bytes() as u64 + 24)).sum();
        // SAFETY: as for copies.
        self.enqueue(Lane::Optimizer, bytes, Box::new(move || unsafe { adam::adam_segments(&pool, &segments) }));
        Ok(())
    }

    fn sum_squares(&self, spans: &[GradSpan], out: *mut f64) -> Result<()> {
        let (spans, pool, out) = (spans.to_vec(), self.lock().pool.clone(), Address(out));
        let bytes = spans.iter().map(|s| s.numel as u64 * s.dtype.bytes() as u64).sum();
        let memory = move || {
            // SAFETY: as for copies.
            for (i, sum) in unsafe { norm::sum_squares(&pool, &spans) }.into_iter().enumerate() {
                // SAFETY: `out` has one element per span.
                unsafe { out.get().add(i).write(sum) };
            }
        };
        self.enqueue(Lane::Optimizer, bytes, Box::new(memory));
        Ok(())
    }

    fn accumulate(&self, additions: &[Addition]) -> Result<()> {
        let (pool, additions) = (self.lock().pool.clone(), additions.to_vec());
        let bytes =
            additions.iter().map(|a| (a.src.numel * (a.src.dtype.bytes() + a.sums.bytes() * if a.overwrite { 1 } else { 2 })) as u64).sum();
        let memory = move || {
            // SAFETY: as for copies.
            unsafe { accumulate::add(&pool, &additions) };
        };
        self.enqueue(Lane::Optimizer, bytes, Box::new(memory));
        Ok(())
    }

    fn register_host(&self, _ptr: *mut u8, _bytes: usize) -> Result<()> {
        Ok(())
    }

    fn unregister_host(&self, _ptr: *mut u8) {}

    fn synchronize(&self) -> Result<()> {
        // The engine is being dropped.
        self.drain();
        self.lock().over = true;
        self.changed.notify_all();
        Ok(())
    }

    fn clock(&self) -> Option<Arc<dyn Clock>> {
        self.me.upgrade().map(|device| device as Arc<dyn Clock>)
    }
}

impl Clock for VirtualDevice {
    fn worker_started(&self, worker: WorkerId) {
        WORKER.set(Some(worker));
    }

    fn job_sent(&self, worker: WorkerId) {
        self.lock().workers[worker as usize].jobs += 1;
    }

    fn job_done(&self, worker: WorkerId) {
        self.lock().workers[worker as usize].jobs -= 1;
        self.changed.notify_all();
    }

    fn host_work(&self, bytes: u64) {
        let lane = match WORKER.get() {
            Some(WorkerId::Adam) => Lane::HostAdam,
            Some(WorkerId::Landing) => Lane::Landing,
            Some(WorkerId::Spill) => Lane::SpillAdam,
            other => panic!("no host work is expected of {other:?}"),
        };
        let token = self.lock().push(lane, bytes as f64, None);
        self.wait(&[token]).unwrap();
    }

    fn disk(&self, key: Key, direction: Direction, bytes: u64, priority: Priority) -> EventRef {
        let mut inner = self.lock();
        let lane = if direction == Direction::Read { Lane::DiskRead } else { Lane::DiskWrite };
        if direction == Direction::Read {
            let written = inner.written.get(&key).copied();
            inner.waits[lane as usize].extend(written);
        }
        let task = inner.task(lane, bytes as f64, None);
        let token = if priority == Priority::Demand { inner.machine.push_urgent(lane, task) } else { inner.machine.push(lane, task) };
        if direction == Direction::Write {
            inner.written.insert(key, token);
        }
        inner.events.push(vec![token]);
        let id = inner.events.len() - 1;
        drop(inner);
        self.event(id)
    }

    fn parks(&self) {
        let worker = WORKER.get().expect("only workers park") as usize;
        self.lock().workers[worker].parks = true;
        self.changed.notify_all();
    }

    fn news(&self) {
        for worker in &mut self.lock().workers {
            worker.parks = false;
        }
    }

    fn pass(&self) -> Result<()> {
        self.rest();
        if !self.lock().next(u64::MAX) {
            return Err(Error::Internal("the driver waits for something that never happens".to_owned()));
        }
        self.changed.notify_all();
        self.rest();
        self.lock().begin_all();
        Ok(())
    }
}
