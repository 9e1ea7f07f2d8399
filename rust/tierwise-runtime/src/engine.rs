//! The engine: drives a device from the scheduler's decisions.
//!
//! Callers' threads and workers take one lock, hand an event to the scheduler, and carry out its actions (which only enqueue) before they
//! give the lock back. So actions reach the device in the order of decisions. Waiting always happens without the lock.

use crate::device::{ComputeStream, Device, EventRef, Queue};
use crate::error::{Error, Result};
use crate::gradients::Gradients;
use crate::host_memory::HostSlab;
use crate::memory::{DevicePlaces, HostPlaces, Regions, host_sizes};
use crate::record::Recorder;
use crate::workers::{Job, Worker, worker};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;
use tierwise_core::budget::Budget;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{OptimizerClass, ParamHome, Plan, host_region_bytes};
use tierwise_core::scheduler::{Decision, Event, Progress, Scheduler};
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, Tier};
use tierwise_kernels::{AdamHyper, Pool};

/// How long a caller sleeps between looks at its own interrupt flag.
const POLL: Duration = Duration::from_millis(50);

/// Asked while a caller waits; `false` makes the call return [`Error::Interrupted`].
pub type KeepWaiting<'a> = &'a mut dyn FnMut() -> bool;

/// Hyperparameters of every group, and the group of every parameter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Hyper {
    /// Groups.
    pub groups: Vec<AdamHyper>,
    /// Group by global parameter index.
    pub group_of_param: Vec<Option<usize>>,
}

/// Limits and sizes of an engine.
#[derive(Debug, Clone, Copy)]
pub struct EngineConfig {
    /// Hard limit of device bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host bytes.
    pub host_budget: u64,
    /// Limit of the gradient norm.
    pub max_norm: Option<f64>,
    /// Threads of the CPU kernels.
    pub threads: Option<usize>,
    /// Host bytes kept for chunks that move there later.
    pub host_spare_bytes: u64,
}

/// What several threads share.
pub struct Shared {
    pub(crate) device: Arc<dyn Device>,
    pub(crate) pool: Pool,
    /// Address of the host slab.
    pub(crate) host: u64,
    pub(crate) slab: HostSlab,
    pub(crate) adam_jobs: Worker,
    pub(crate) landing_jobs: Worker,
    pub(crate) optimizer_jobs: Worker,
    pub(crate) state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

/// What the lock protects.
pub struct State {
    pub(crate) scheduler: Scheduler,
    pub(crate) places: Vec<(HostPlaces, DevicePlaces)>,
    pub(crate) regions: Regions,
    pub(crate) undo_base: u64,
    /// Address of the undo record of every chunk that has one.
    pub(crate) undo_records: std::collections::BTreeMap<ChunkId, u64>,
    pub(crate) slab_address: u64,
    /// Latest event after which a chunk's device parameters are the current generation.
    pub(crate) written: Vec<Option<EventRef>>,
    /// Ranges of the slab whose last readers are this event.
    pub(crate) guards: Vec<(u64, u64, EventRef)>,
    /// Where the compute stream was at the latest commit: everything that read the old generation is before it.
    pub(crate) commit_event: Option<EventRef>,
    /// Where the compute stream was when the latest unit was left.
    pub(crate) release_event: Option<EventRef>,
    pub(crate) gradients: Gradients,
    pub(crate) hyper: Arc<Hyper>,
    pub(crate) speculation_hyper: Arc<Hyper>,
    pub(crate) commit_hyper: Arc<Hyper>,
    pub(crate) param_steps: Vec<u64>,
    pub(crate) decision: Option<Decision>,
    pub(crate) recorder: Recorder,
    pub(crate) device_budget: Budget,
    pub(crate) host_budget: Budget,
    external: std::collections::BTreeMap<String, u64>,
    failed: Option<Error>,
    started: bool,
    /// Where the compute stream was when each open unit was entered (only while recording).
    open: std::collections::BTreeMap<(u32, bool), EventRef>,
}

/// The engine of one rank.
pub struct Engine {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    owner: u32,
}

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A poisoned lock means that a holder panicked; `fail` has or will have stopped the engine.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Stops the engine with an error; everybody who waits gets it.
    pub(crate) fn fail(&self, error: &Error) {
        self.stop_with(&mut self.lock(), error);
    }

    /// Passes on the outcome of work that must not be left half done: its error stops the engine.
    pub(crate) fn or_stop<T>(&self, state: &mut State, outcome: Result<T>) -> Result<T> {
        outcome.inspect_err(|error| self.stop_with(state, error))
    }

    fn stop_with(&self, state: &mut State, error: &Error) {
        if state.failed.is_none() {
            state.failed = Some(Error::Stopped(match error {
                Error::Stopped(message) => message.clone(),
                other => other.to_string(),
            }));
        }
        self.changed.notify_all();
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Hands an event to the scheduler and carries out its actions.
    pub(crate) fn apply(&self, state: &mut State, event: &Event) -> Result<Progress> {
        let mut actions = Vec::new();
        let progress = state.scheduler.step(event, &mut actions);
        // Even a refused event may have freed something before.
        let outcome = self.execute(state, &actions);
        self.or_stop(state, outcome)?;
        if !actions.is_empty() {
            self.changed.notify_all();
        }
        Ok(progress?)
    }

    /// Hands over a completion from a worker.
    pub(crate) fn post(&self, event: &Event) -> Result<()> {
        let mut state = self.lock();
        self.apply(&mut state, event)?;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    fn healthy(state: &State) -> Result<()> {
        state.failed.clone().map_or(Ok(()), Err)
    }

    /// Waits until `ready` gives something.
    fn wait_for<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        mut ready: impl FnMut(&Self, &mut State) -> Result<Option<T>>,
    ) -> Result<(MutexGuard<'a, State>, T)> {
        loop {
            Self::healthy(&state)?;
            if let Some(value) = ready(self, &mut state)? {
                return Ok((state, value));
            }
            let (guard, timeout) = self.changed.wait_timeout(state, POLL).unwrap_or_else(std::sync::PoisonError::into_inner);
            state = guard;
            if timeout.timed_out() {
                drop(state);
                if !keep_waiting() {
                    return Err(Error::Interrupted);
                }
                state = self.lock();
            }
        }
    }

    /// Hands over an event, repeating it until it takes effect.
    pub(crate) fn apply_waiting<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        event: &Event,
    ) -> Result<MutexGuard<'a, State>> {
        let (state, ()) = self.wait_for(state, keep_waiting, |shared, state| {
            Ok(match shared.apply(state, event)? {
                Progress::Done => Some(()),
                Progress::Blocked { .. } => None,
            })
        })?;
        Ok(state)
    }

    pub(crate) fn wait_until<'a>(
        &'a self,
        state: MutexGuard<'a, State>,
        keep_waiting: KeepWaiting<'_>,
        mut ready: impl FnMut(&mut State) -> bool,
    ) -> Result<MutexGuard<'a, State>> {
        Ok(self.wait_for(state, keep_waiting, |_, state| Ok(ready(state).then_some(())))?.0)
    }
}

impl Engine {
    /// Maps the host slab of a plan and starts the workers.
    pub fn new(layout: Layout, trace: Trace, plan: Plan, device: Arc<dyn Device>, config: EngineConfig) -> Result<Self> {
        if plan.chunks.len() != layout.chunks.len() || plan.recompute.len() != trace.units.len() {
            return Err(Error::Usage(format!(
                "the plan is for {} chunks and {} units, the model has {} and {}",
                plan.chunks.len(),
                plan.recompute.len(),
                layout.chunks.len(),
                trace.units.len()
            )));
        }
        let pool = Pool::try_new(config.threads).map_err(Error::Usage)?;
        let num_params: usize = layout.chunks.iter().map(|c| c.params.len()).sum();
        let norm_bytes = host_region_bytes(num_params as u64 * 8);
        let staging_bytes = host_region_bytes(plan.host.staging / 2);
        let chunk_bytes: u64 = layout
            .ids()
            .map(|c| host_sizes(&layout, &plan, c, plan.chunks[c.index()]).iter().map(|&b| host_region_bytes(b)).sum::<u64>())
            .sum();
        let total =
            chunk_bytes + 2 * staging_bytes + host_region_bytes(plan.undo_bytes) + host_region_bytes(config.host_spare_bytes) + norm_bytes;
        let mut host_budget = Budget::new(Tier::Host, config.host_budget);
        // The norms of parameters are bookkeeping, not payload: they do not count.
        host_budget.reserve(total - norm_bytes, "the host slab")?;
        let slab = HostSlab::new(total as usize, Some(device.clone()), pool.threads())?;
        let mut regions = Regions::new(total);
        let norms = regions.take(norm_bytes)?;
        let staging = [regions.take(staging_bytes)?, regions.take(staging_bytes)?];
        let undo_base = regions.take(plan.undo_bytes)?;
        let host = slab.as_ptr() as u64;
        let mut places = Vec::with_capacity(layout.chunks.len());
        for chunk in layout.ids() {
            let sizes = host_sizes(&layout, &plan, chunk, plan.chunks[chunk.index()]);
            places.push((take_places(&mut regions, sizes)?, DevicePlaces::default()));
        }
        let gradients = Gradients::new(&layout, host + norms, staging.map(|s| host + s));
        let state = State {
            written: vec![None; layout.chunks.len()],
            param_steps: vec![0; num_params],
            scheduler: Scheduler::new(layout, trace, plan, config.max_norm),
            places,
            regions,
            undo_base: host + undo_base,
            undo_records: std::collections::BTreeMap::new(),
            slab_address: 0,
            guards: Vec::new(),
            commit_event: None,
            release_event: None,
            gradients,
            hyper: Arc::default(),
            speculation_hyper: Arc::default(),
            commit_hyper: Arc::default(),
            decision: None,
            recorder: Recorder::default(),
            device_budget: Budget::new(Tier::Device, config.device_budget),
            host_budget,
            external: std::collections::BTreeMap::new(),
            failed: None,
            started: false,
            open: std::collections::BTreeMap::new(),
        };
        let (adam_jobs, start_adam) = worker("adam");
        let (landing_jobs, start_landing) = worker("landing");
        let (optimizer_jobs, start_optimizer) = worker("optimizer");
        let shared = Arc::new(Shared {
            device,
            pool,
            host,
            slab,
            adam_jobs,
            landing_jobs,
            optimizer_jobs,
            state: Mutex::new(state),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let workers = vec![start_adam.start(shared.clone())?, start_landing.start(shared.clone())?, start_optimizer.start(shared.clone())?];
        Ok(Engine { shared, workers, owner: std::process::id() })
    }

    fn lock(&self) -> Result<MutexGuard<'_, State>> {
        let child = std::process::id();
        if child != self.owner {
            return Err(Error::Forked { owner: self.owner, child });
        }
        let state = self.shared.lock();
        Shared::healthy(&state)?;
        Ok(state)
    }

    /// The lock for calls that move things: all memory has to be there.
    fn lock_started(&self) -> Result<MutexGuard<'_, State>> {
        let state = self.lock()?;
        if state.started { Ok(state) } else { Err(Error::Usage("start() was not called".to_owned())) }
    }

    // ---- memory -------------------------------------------------------------------------------------------------------------

    /// Address and bytes of the host slab.
    pub fn host_slab(&self) -> (u64, u64) {
        (self.shared.host, self.shared.slab.bytes() as u64)
    }

    /// The process that the engine and its memory belong to.
    pub fn process(&self) -> u32 {
        self.owner
    }

    /// A handle that keeps the host slab mapped.
    pub fn keep_alive(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Offset of a payload in the host slab.
    pub fn host_offset(&self, chunk: ChunkId, payload: &str) -> Result<Option<u64>> {
        let state = self.lock()?;
        let places = &state.places.get(chunk.index()).ok_or_else(|| unknown_chunk(chunk))?.0;
        match payload {
            "param" => Ok(places.param),
            "master" => Ok(places.master),
            "exp_avg" => Ok(places.exp_avg),
            "exp_avg_sq" => Ok(places.exp_avg_sq),
            "grad" => Ok(places.grad),
            other => Err(Error::Usage(format!("unknown payload `{other}`; known are param, master, exp_avg, exp_avg_sq, grad"))),
        }
    }

    /// Gives device memory to a chunk.
    pub fn bind(&self, chunk: ChunkId, param: Option<u64>, states: Option<u64>, accumulator: Option<u64>) -> Result<()> {
        let mut state = self.lock()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let layout = state.scheduler.layout();
        let name = layout.chunks[chunk.index()].name.clone();
        let sizes = [layout.param_bytes(chunk), layout.state_bytes(chunk), layout.grad_acc_bytes(chunk)];
        for ((address, bytes), what) in [param, states, accumulator].into_iter().zip(sizes).zip(["param", "states", "accumulator"]) {
            let Some(address) = address else { continue };
            let state = &mut *state;
            let places = &mut state.places[chunk.index()].1;
            let place = match what {
                "param" => &mut places.param,
                "states" => &mut places.states,
                _ => &mut places.accumulator,
            };
            if *place == 0 {
                state.device_budget.reserve(bytes, &format!("{what} of `{name}`"))?;
            }
            *place = address;
        }
        Ok(())
    }

    /// Gives the slab that streamed chunks pass through.
    pub fn bind_slab(&self, address: u64) -> Result<()> {
        let mut state = self.lock()?;
        let bytes = state.scheduler.plan().stream_slab_bytes;
        if state.slab_address == 0 {
            state.device_budget.reserve(bytes, "the streaming slab")?;
        }
        state.slab_address = address;
        Ok(())
    }

    /// Moves a chunk to another class between steps; a streamed one becomes resident with the device class. The caller flushes before, and
    /// copies and binds what the new class needs.
    pub fn set_class(&self, chunk: ChunkId, class: OptimizerClass) -> Result<()> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let mut placement = state.scheduler.plan().chunks[chunk.index()];
        if class == OptimizerClass::Device && placement.home == ParamHome::Streamed && state.places[chunk.index()].1.param == 0 {
            let name = &state.scheduler.layout().chunks[chunk.index()].name;
            return Err(Error::Usage(format!("bind device memory for the parameters of `{name}` before it becomes resident")));
        }
        let old = host_sizes(state.scheduler.layout(), state.scheduler.plan(), chunk, placement);
        let accumulates = state.scheduler.plan().accumulation > 1;
        placement.class = class;
        if class == OptimizerClass::Device {
            placement.home = ParamHome::Resident;
        }
        let new = host_sizes(state.scheduler.layout(), state.scheduler.plan(), chunk, placement);
        let before = state.scheduler.plan().chunks[chunk.index()].class;
        // First what can be refused, then what is taken.
        state.scheduler.set_class(chunk, class)?;
        if before == class {
            return Ok(());
        }
        if class == OptimizerClass::Host {
            let places = match take_places(&mut state.regions, new) {
                Ok(places) => places,
                Err(error) => {
                    state.scheduler.set_class(chunk, before)?;
                    return Err(error);
                }
            };
            let layout = state.scheduler.layout();
            let freed = layout.state_bytes(chunk) + if accumulates { layout.grad_acc_bytes(chunk) } else { 0 };
            state.places[chunk.index()].0 = places;
            let device = &mut state.places[chunk.index()].1;
            if device.states != 0 {
                state.device_budget.release(freed);
            }
            device.states = 0;
            device.accumulator = 0;
        } else {
            let places = std::mem::take(&mut state.places[chunk.index()].0);
            let offsets = [places.param, places.master, places.exp_avg, places.exp_avg_sq, places.grad];
            for (offset, bytes) in offsets.into_iter().zip(old) {
                if let Some(offset) = offset {
                    state.regions.give(offset, bytes);
                }
            }
        }
        Ok(())
    }

    /// Counts device bytes that live outside the engine.
    pub fn account(&self, kind: &str, delta: i64) -> Result<()> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        let used = state.external.get(kind).copied().unwrap_or(0);
        if delta >= 0 {
            state.device_budget.reserve(delta as u64, kind)?;
            state.external.insert(kind.to_owned(), used + delta as u64);
        } else {
            let back = delta.unsigned_abs();
            let left = used.checked_sub(back).ok_or_else(|| Error::Usage(format!("{kind}: {back} bytes given back, {used} were taken")))?;
            state.device_budget.release(back);
            state.external.insert(kind.to_owned(), left);
        }
        if state.recorder.enabled() {
            let now = self.shared.device.now_ns();
            let (kind, used) = (format!("device {kind} bytes"), state.external[kind]);
            state.recorder.sample(&kind, now, used);
            let total = state.device_budget.used();
            state.recorder.sample("device bytes", now, total);
        }
        Ok(())
    }

    // ---- the step -----------------------------------------------------------------------------------------------------------

    /// Everything is bound and filled.
    pub fn start(&self) -> Result<()> {
        let mut state = self.lock()?;
        let plan = state.scheduler.plan();
        let layout = state.scheduler.layout();
        for chunk in layout.ids() {
            let (placement, (_, device)) = (plan.chunks[chunk.index()], &state.places[chunk.index()]);
            let needs_states = placement.class == OptimizerClass::Device && layout.state_bytes(chunk) > 0;
            let missing = if placement.home == ParamHome::Resident && device.param == 0 && layout.param_bytes(chunk) > 0 {
                "param"
            } else if needs_states && device.states == 0 {
                "states"
            } else if needs_states && plan.accumulation > 1 && device.accumulator == 0 {
                "accumulator"
            } else {
                continue;
            };
            return Err(Error::Usage(format!("no device memory was bound for {missing} of `{}`", layout.chunks[chunk.index()].name)));
        }
        if plan.stream_slab_bytes > 0 && state.slab_address == 0 {
            return Err(Error::Usage("no device memory was bound for the streaming slab".to_owned()));
        }
        state.started = true;
        Ok(())
    }

    /// Makes a unit's chunks readable on the compute stream; gives the slots of its streamed chunks.
    pub fn enter(&self, unit: u32, phase: Phase, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<Vec<(ChunkId, u64)>> {
        let state = self.lock_started()?;
        let state = self.make_readable(state, &Event::Enter { unit, phase }, stream, keep_waiting)?;
        let chunks = &state.scheduler.trace().units[unit as usize].chunks;
        Ok(chunks.iter().filter_map(|&c| state.scheduler.slot(c).map(|slot| (c, slot))).collect())
    }

    /// Hands over an `Enter` or `Touch` and makes the compute stream wait for what it reads.
    fn make_readable<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        event: &Event,
        stream: ComputeStream,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<MutexGuard<'a, State>> {
        let before = self.shared.device.record_compute(stream)?;
        state.release_event = Some(before.clone());
        let mut waited = false;
        if self.shared.apply(&mut state, event)? != Progress::Done {
            waited = true;
            state = self.shared.apply_waiting(state, keep_waiting, event)?;
        }
        let (chunks, name) = match *event {
            Event::Enter { unit, .. } => {
                let unit = &state.scheduler.trace().units[unit as usize];
                (unit.chunks.clone(), unit.name.clone())
            }
            Event::Touch { chunk } => (vec![chunk], state.scheduler.layout().chunks[chunk.index()].name.clone()),
            _ => return Err(Error::Internal("only Enter and Touch make chunks readable".to_owned())),
        };
        let mut events = Vec::new();
        for chunk in chunks {
            if let Some(event) = state.written[chunk.index()].clone() {
                let done = event.is_done();
                if self.shared.or_stop(&mut state, done)? {
                    state.written[chunk.index()] = None;
                } else {
                    events.push(event);
                }
            }
        }
        if !events.is_empty() {
            // What is read is pinned, so the lock need not be held.
            drop(state);
            waited = true;
            let outcome = events.iter().try_for_each(|event| {
                if !self.shared.device.is_asynchronous() {
                    wait_for_event(event, keep_waiting)?;
                }
                self.shared.device.compute_wait(stream, event)
            });
            state = self.lock()?;
            if matches!(outcome, Err(Error::Interrupted)) {
                if let Event::Enter { unit, phase } = *event {
                    self.shared.apply(&mut state, &Event::Leave { unit, phase })?;
                }
                return Err(Error::Interrupted);
            }
            self.shared.or_stop(&mut state, outcome)?;
        }
        let after = if waited { self.shared.device.record_compute(stream)? } else { before.clone() };
        if waited {
            state.recorder.wait(&name, before, after.clone());
        }
        if let (Event::Enter { unit, phase }, true) = (event, state.recorder.enabled()) {
            state.open.insert((*unit, *phase == Phase::Backward), after);
        }
        Ok(state)
    }

    /// The unit's work is enqueued; gives its streamed chunks that nothing uses any more.
    pub fn leave(&self, unit: u32, phase: Phase, stream: ComputeStream) -> Result<Vec<ChunkId>> {
        let mut state = self.lock_started()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        let entered = state.open.remove(&(unit, phase == Phase::Backward));
        if let (Some(end), true) = (state.release_event.clone(), state.recorder.enabled()) {
            let direction = if phase == Phase::Forward { "forward" } else { "backward" };
            let name = state.scheduler.trace().units.get(unit as usize).map_or("", |u| u.name.as_str());
            let name = format!("{name} {direction}");
            state.recorder.between("compute", name, 0, entered, &end);
        }
        self.shared.apply(&mut state, &Event::Leave { unit, phase })?;
        let plan = state.scheduler.plan();
        Ok(state.scheduler.trace().units[unit as usize]
            .chunks
            .iter()
            .copied()
            .filter(|c| plan.chunks[c.index()].home == ParamHome::Streamed && !state.scheduler.is_entered(*c))
            .collect())
    }

    /// The model's outermost forward starts: forgets what an interrupted one left entered.
    pub fn forward_begin(&self, stream: ComputeStream) -> Result<()> {
        let mut state = self.lock_started()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        self.shared.apply(&mut state, &Event::ForwardBegin)?;
        Ok(())
    }

    /// Keeps a unit's chunks in their slots until its backward leaves.
    pub fn hold(&self, unit: u32) -> Result<()> {
        let mut state = self.lock()?;
        self.shared.apply(&mut state, &Event::Hold { unit })?;
        Ok(())
    }

    /// Makes one chunk readable until the next boundary; gives its slot.
    pub fn touch(&self, chunk: ChunkId, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<u64> {
        let state = self.lock_started()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        let state = self.make_readable(state, &Event::Touch { chunk }, stream, keep_waiting)?;
        // Its reads come after this call; the boundary that releases it records where the stream is then.
        state.scheduler.slot(chunk).ok_or_else(|| Error::Usage(format!("chunk {} is not streamed", chunk.0)))
    }

    /// How often a chunk's parameters were rewritten.
    pub fn generation(&self, chunk: ChunkId) -> Result<u64> {
        let state = self.lock()?;
        if chunk.index() >= state.places.len() {
            return Err(unknown_chunk(chunk));
        }
        Ok(state.scheduler.generation(chunk))
    }

    /// Hyperparameters for coming steps.
    pub fn set_hyper(&self, hyper: Hyper) -> Result<()> {
        let mut state = self.lock()?;
        if hyper.group_of_param.len() != state.param_steps.len() {
            return Err(Error::Usage(format!("{} group indices for {} parameters", hyper.group_of_param.len(), state.param_steps.len())));
        }
        if let Some(group) = hyper.group_of_param.iter().flatten().find(|g| **g >= hyper.groups.len()) {
            return Err(Error::Usage(format!("group {group} of {}", hyper.groups.len())));
        }
        if *state.hyper != hyper {
            state.hyper = Arc::new(hyper);
        }
        Ok(())
    }

    /// A backward pass starts. Waits only if the previous step is still undecided.
    pub fn backward_begin(&self, grad_scale: f64, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock_started()?;
        let mut state = self.shared.apply_waiting(state, keep_waiting, &Event::BackwardBegin { grad_scale })?;
        state.speculation_hyper = state.hyper.clone();
        Ok(())
    }

    /// Hands over gradients as (position in the chunk, address); gives a ticket.
    pub fn grads(&self, chunk: ChunkId, grads: &[(usize, u64)], stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<u64> {
        let state = self.lock_started()?;
        self.shared.hand_over(state, chunk, grads, stream, keep_waiting)
    }

    /// Tickets whose gradients may be freed, each once.
    pub fn collect(&self) -> Result<Vec<u64>> {
        Ok(self.lock()?.gradients.collect())
    }

    /// A backward pass ended.
    pub fn backward_end(&self, stream: ComputeStream) -> Result<()> {
        let mut state = self.lock()?;
        state.release_event = Some(self.shared.device.record_compute(stream)?);
        state.open.clear();
        self.shared.apply(&mut state, &Event::BackwardEnd)?;
        for chunk in state.scheduler.stale_partials() {
            let outcome = self.shared.reduce_stale(&mut state, chunk);
            self.shared.or_stop(&mut state, outcome)?;
        }
        Ok(())
    }

    /// `optimizer.step()`. Waits only if the previous step is still undecided.
    pub fn commit(&self, grad_scale: f64, stream: ComputeStream, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock_started()?;
        let mut state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.is_undecided())?;
        state.gradients.check_hyper(state.scheduler.layout(), &state.hyper)?;
        let event = self.shared.device.record_compute(stream)?;
        state.commit_event = Some(event.clone());
        state.release_event = Some(event);
        state.commit_hyper = state.hyper.clone();
        let hyper_changed = state.speculation_hyper != state.hyper;
        self.shared.apply(&mut state, &Event::Commit { grad_scale, hyper_changed })?;
        Ok(())
    }

    /// Forgets gradients that were not committed.
    pub fn drop_grads(&self, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock()?;
        if !state.started {
            return Ok(());
        }
        drop(self.shared.apply_waiting(state, keep_waiting, &Event::DropGrads)?);
        Ok(())
    }

    /// How the latest committed step was decided.
    pub fn decision(&self, wait: bool, keep_waiting: KeepWaiting<'_>) -> Result<Option<Decision>> {
        let mut state = self.lock()?;
        if wait {
            state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.is_undecided())?;
        } else if state.scheduler.is_undecided() {
            return Ok(None);
        }
        Ok(state.decision)
    }

    /// Waits until the visible state equals that of a synchronous optimizer.
    pub fn flush(&self, keep_waiting: KeepWaiting<'_>) -> Result<()> {
        let state = self.lock()?;
        let mut state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.has_in_flight())?;
        let mut actions = Vec::new();
        state.scheduler.settle(&mut actions)?;
        let outcome = self.shared.execute(&mut state, &actions);
        self.shared.or_stop(&mut state, outcome)?;
        let state = self.shared.wait_until(state, keep_waiting, |state| !state.scheduler.is_busy() && !state.gradients.has_readers())?;
        let queues = [Queue::HostToDevice, Queue::DeviceToHost, Queue::Optimizer];
        let events = queues.map(|queue| self.shared.device.record(queue));
        drop(state);
        for event in events {
            match event.and_then(|event| wait_for_event(&event, keep_waiting)) {
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                outcome => outcome.inspect_err(|error| self.shared.fail(error))?,
            }
        }
        self.shared.device.synchronize().inspect_err(|error| self.shared.fail(error))
    }

    // ---- state --------------------------------------------------------------------------------------------------------------

    /// The limit of the gradient norm.
    pub fn max_norm(&self) -> Result<Option<f64>> {
        Ok(self.lock()?.scheduler.max_norm())
    }

    /// Changes the limit of the gradient norm for steps that are not decided yet.
    pub fn set_max_norm(&self, value: Option<f64>) -> Result<()> {
        self.lock()?.scheduler.set_max_norm(value);
        Ok(())
    }

    /// Steps taken by every parameter.
    pub fn param_steps(&self) -> Result<Vec<u64>> {
        Ok(self.lock()?.param_steps.clone())
    }

    /// Sets the steps taken by every parameter.
    pub fn set_param_steps(&self, steps: Vec<u64>) -> Result<()> {
        let mut state = self.lock()?;
        if steps.len() != state.param_steps.len() {
            return Err(Error::Usage(format!("{} step counts for {} parameters", steps.len(), state.param_steps.len())));
        }
        state.param_steps = steps;
        Ok(())
    }

    /// Counters as JSON.
    pub fn stats(&self) -> Result<serde_json::Value> {
        let mut guard = self.lock()?;
        let state = &mut *guard;
        let mut value = serde_json::to_value(state.scheduler.counters()).unwrap_or_default();
        let external: u64 = state.external.values().sum();
        value["device"] = self.shared.device.name().into();
        value["threads"] = self.shared.pool.threads().into();
        value["wait_ns"] = state.recorder.waited_ns().into();
        value["device_bytes"] = state.device_budget.used().into();
        value["device_peak_bytes"] = state.device_budget.peak().into();
        value["device_budget_bytes"] = state.device_budget.limit().into();
        value["device_static_bytes"] = (state.device_budget.used() - external).into();
        for (kind, bytes) in &state.external {
            value[format!("device_{kind}_bytes")] = (*bytes).into();
        }
        value["host_bytes"] = state.host_budget.used().into();
        value["host_peak_bytes"] = state.host_budget.peak().into();
        value["host_budget_bytes"] = state.host_budget.limit().into();
        value["slab_used_bytes"] = state.scheduler.slab_used().into();
        value["h2d_bytes"] = state.gradients.h2d_bytes.into();
        value["d2h_bytes"] = state.gradients.d2h_bytes.into();
        Ok(value)
    }

    /// Every chunk's residency, for tests and messages.
    pub fn residency(&self) -> Result<serde_json::Value> {
        Ok(self.lock()?.scheduler.snapshot())
    }

    /// Starts recording afresh, or stops it.
    pub fn record_timeline(&self, enabled: bool) -> Result<()> {
        let mut state = self.lock()?;
        state.recorder.enable(enabled);
        let (now, device, host) = (self.shared.device.now_ns(), state.device_budget.used(), state.host_budget.used());
        state.recorder.sample("device bytes", now, device);
        state.recorder.sample("host bytes", now, host);
        Ok(())
    }

    /// What was recorded, as trace-event JSON.
    pub fn timeline(&self) -> Result<String> {
        let mut state = self.lock()?;
        Ok(state.recorder.timeline().to_perfetto())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if std::process::id() != self.owner {
            // The workers live in the parent; their handles mean nothing here.
            std::mem::take(&mut self.workers).into_iter().for_each(std::mem::forget);
            return;
        }
        self.shared.stop.store(true, Ordering::Release);
        // Copies read and write memory that is about to be freed.
        let _ = self.shared.device.synchronize();
        for jobs in [&self.shared.adam_jobs, &self.shared.landing_jobs, &self.shared.optimizer_jobs] {
            let _ = jobs.send(Job::last());
        }
        for worker in std::mem::take(&mut self.workers) {
            let _ = worker.join();
        }
        // What a worker was in the middle of may have started another copy.
        let _ = self.shared.device.synchronize();
    }
}

/// Waits for an event, looking at the caller's interrupt flag in between.
fn wait_for_event(event: &EventRef, keep_waiting: KeepWaiting<'_>) -> Result<()> {
    while !event.synchronize_for(POLL)? {
        if !keep_waiting() {
            return Err(Error::Interrupted);
        }
    }
    Ok(())
}

fn unknown_chunk(chunk: ChunkId) -> Error {
    Error::Usage(format!("chunk {} does not exist", chunk.0))
}

fn take_places(regions: &mut Regions, sizes: [u64; 5]) -> Result<HostPlaces> {
    let mut taken = [None; 5];
    for at in 0..taken.len() {
        if sizes[at] == 0 {
            continue;
        }
        match regions.take(sizes[at]) {
            Ok(offset) => taken[at] = Some(offset),
            Err(error) => {
                for (offset, bytes) in taken.into_iter().zip(sizes) {
                    if let Some(offset) = offset {
                        regions.give(offset, bytes);
                    }
                }
                return Err(error);
            }
        }
    }
    let [param, master, exp_avg, exp_avg_sq, grad] = taken;
    Ok(HostPlaces { param, master, exp_avg, exp_avg_sq, grad })
}
