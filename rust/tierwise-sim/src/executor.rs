//! The executor in virtual time: the runtime's engine with lanes instead of streams and threads.
//!
//! It drives the same scheduler with the same events in the same order as the runtime: a training thread that runs ahead of the compute
//! stream and blocks where `enter`, `grads` and `commit` block, and workers that post completions. Only durations are modelled.

mod actions;
pub mod calls;
mod collectives;
mod landing;
mod late;
pub mod machine;
pub mod offload;
mod offloading;
mod sharing;
mod spill;
pub(crate) mod stalls;
mod streaming;
pub(crate) mod tally;
mod thread;
mod window;

pub use stalls::Stalls;
pub use window::Outcome;

use crate::costs::Costs;
use crate::hardware::Hardware;
use calls::{Call, calls};
use machine::{Began, Ended, Lane, Machine, Token};
use offload::Offload;
use stalls::{Blocks, Cause};
use std::collections::{BTreeMap, VecDeque};
use streaming::Streaming;
use thread::Thread;
use tierwise_core::budget::{Budget, BudgetExceeded};
use tierwise_core::layout::Layout;
use tierwise_core::plan::{OptimizerClass, Plan};
use tierwise_core::scheduler::{Event, Progress, ScheduleError, Scheduler, Turn};
use tierwise_core::slab::Guards;
use tierwise_core::staging::StagingError;
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, OpId, Tier};
use window::Window;

/// Steps before the one that is measured: the first has no pending optimizer work, the second is the first of the cycle.
pub const WARM_UP_STEPS: u64 = 2;

/// Device bytes of cuBLAS workspaces, which torch takes once per thread that multiplies: the training thread and autograd's. 32 MiB each is
/// what Hopper gets (aten/src/ATen/cuda/CublasHandlePool.cpp), others less.
const WORKSPACE_BYTES: u64 = 2 * (32 << 20);

/// What to execute.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// Chunks.
    pub layout: &'a Layout,
    /// Operations of a micro-batch.
    pub trace: &'a Trace,
    /// The plan.
    pub plan: &'a Plan,
    /// Durations of the units.
    pub costs: &'a Costs,
    /// The machine.
    pub hardware: &'a Hardware,
    /// Collectives of the data-parallel group, if there is one.
    pub sharding: Option<&'a Sharding>,
    /// Per unit: device bytes that its kernels need for themselves in forward and in backward; none if the plan's reserve stands for them.
    pub transient_bytes: Option<&'a [[u64; 2]]>,
    /// Bytes that a forward waits for beside what it keeps, if that is more than its kernels need and is not kept back from all.
    pub forward_reserve_bytes: u64,
    /// Hard limit of device bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host bytes.
    pub host_budget: u64,
    /// Hard limit of the spill file, in bytes.
    pub nvme_budget: u64,
    /// Whether the gradient norm is above its limit in every step.
    pub clips: bool,
}

/// When the ranks of a data-parallel group exchange what, and how long it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sharding {
    /// Whether parameters are gathered before every use (otherwise after every step).
    pub gathers_before_use: bool,
    /// Whether gradients are reduced in every micro-batch (otherwise in the last one).
    pub reduces_every_micro_batch: bool,
    /// Per chunk: nanoseconds in which its parameters are gathered; 0 if they are whole anyway.
    pub gather_ns: Vec<u64>,
    /// Per chunk: nanoseconds in which its gradients are reduced.
    pub reduce_ns: Vec<u64>,
}

/// Why a plan could not be executed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SimError {
    /// A tier would have held more than its budget.
    #[error(transparent)]
    Budget(#[from] BudgetExceeded),
    /// The scheduler refused an event.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The plan, the trace and the costs do not belong together.
    #[error("{0}")]
    Mismatch(String),
    /// A staging buffer was used against its state: a defect.
    #[error(transparent)]
    Staging(#[from] StagingError),
    /// Everybody waits for somebody.
    #[error("the training thread waits at {at} for something that never happens ({cause})")]
    Deadlock {
        /// The call.
        at: String,
        /// What it waits for.
        cause: &'static str,
    },
}

/// What happens when a task begins or ends.
#[derive(Debug)]
enum Effect {
    Post(Event),
    FreeGradients(u64),
    /// The landing worker took the job: its bytes are no longer on their way.
    Landed {
        bytes: u64,
    },
    /// A gradient has landed.
    Arrived(landing::Arrived),
    /// The landing worker is done with a gradient.
    LandingEnded,
    /// Late moments were written.
    Moments(ChunkId),
    /// What landed while moments were written is added, one after the other.
    AddWaiting(ChunkId),
    FreeStaging,
    /// The disk has read into a staging buffer.
    Read(u32),
    /// The disk has written a staging buffer.
    Written(u32),
    /// The piece in a staging buffer was stepped.
    Stepped(u32),
    /// The disk has read into a gradient buffer.
    GradRead(u32),
    /// The disk has all of a chunk's gradient, or of its sum.
    GradWritten(ChunkId),
    /// The norm of a gradient was taken that the disk writes.
    LandedOnDisk {
        chunk: ChunkId,
        writes: Vec<Token>,
        landed: Option<Event>,
    },
    /// The disk has written a gradient buffer.
    GradGivenBack(u32),
    /// The disk has read a piece of a sum.
    SumRead,
    /// A piece was added to its sum.
    SumAdded,
    /// The disk has read a piece of fetched parameters into a buffer.
    FetchRead,
    /// The link has taken it out.
    Fetched(u32),
}

struct Run<'a> {
    setup: Setup<'a>,
    scheduler: Scheduler,
    machine: Machine<'a, Effect>,
    calls: Vec<Call>,
    thread: Thread,
    blocks: Blocks,
    device: Budget,
    host: Budget,
    /// Device bytes that stay for the whole run.
    fixed: u64,
    activations: u64,
    gradients: u64,
    peak: (String, u64, u64),
    /// Latest task after which a chunk's device parameters are current, and what kind of work it is.
    written: Vec<Option<(Token, Cause)>>,
    /// What the next copy to the device comes after.
    link_waits: Vec<Token>,
    /// Ranges of the slab whose last reader is this task.
    guards: Guards<Token>,
    release: Option<Token>,
    commit: Option<Token>,
    in_flight_bytes: u64,
    staging_free: u32,
    landing: landing::Landing,
    waiting: late::Waiting,
    streaming: Streaming,
    /// Gradient bytes of each chunk that is stepped on the device that its step will read.
    held: Vec<u64>,
    /// Gradient bytes that an enqueued device task frees.
    leaving_bytes: u64,
    /// Per chunk: first and last backward operation.
    backward: Vec<Option<(OpId, OpId)>>,
    /// Kinds of the compute tasks' waits, in order of their enqueueing.
    wait_causes: BTreeMap<usize, Cause>,
    compute_ended: u64,
    /// Compute tasks of a step.
    computes: u64,
    /// Latest compute tasks: a gathered chunk takes the buffer of the last but one.
    latest_compute: [Option<Token>; 2],
    window: Option<Window>,
    spilled: spill::Spilled,
    /// Activations that leave the device, if the plan has any, and the device bytes that they take.
    offload: Option<Offload<Token>>,
    offloaded_live: u64,
    /// By unit and storage: the latest copy of activations back, until the backward waits for it.
    activations_back: BTreeMap<(u32, u64), Token>,
    /// Compute tasks that were enqueued and had not ended when it was last looked, with their kernels; and the kernels of all of them.
    queue: VecDeque<(Token, u64)>,
    queued_kernels: u64,
}

/// Executes a plan until its steps repeat, and measures one.
pub fn simulate(setup: &Setup) -> Result<Outcome, SimError> {
    let mut run = Run::new(*setup)?;
    match run.drive()? {
        Some(outcome) => Ok(outcome),
        None => Err(run.deadlock()),
    }
}

/// What the scheduler decides in the steps that [`simulate`] executes, until everything has come to rest.
pub fn decisions(setup: &Setup) -> Result<Vec<Turn>, SimError> {
    let mut run = Run::new(*setup)?;
    run.scheduler.record(true);
    while run.drive()?.is_some() {}
    // Not all calls made, and nothing that could end: they wait for each other.
    if run.thread.step <= WARM_UP_STEPS { Err(run.deadlock()) } else { Ok(run.scheduler.take_record()) }
}

impl<'a> Run<'a> {
    fn new(setup: Setup<'a>) -> Result<Self, SimError> {
        let Setup { layout, trace, plan, costs, hardware, .. } = setup;
        let units = trace.units.len();
        if plan.chunks.len() != layout.chunks.len()
            || [plan.activations.len(), costs.forward_ns.len(), costs.backward_ns.len()] != [units; 3]
        {
            return Err(SimError::Mismatch(format!(
                "the plan is for {} chunks and {} units, the costs for {} units; the model has {} and {units}",
                plan.chunks.len(),
                plan.activations.len(),
                costs.forward_ns.len(),
                layout.chunks.len()
            )));
        }
        let mut device = Budget::new(Tier::Device, setup.device_budget);
        let bytes = &plan.device;
        for (bytes, what) in [
            (bytes.reserve, "the reserve"),
            (bytes.resident_params, "resident parameters"),
            (bytes.states, "optimizer states"),
            (bytes.accumulators, "gradient accumulators"),
            (bytes.stream_slab, "the streaming slab"),
            (bytes.staging, "staging of optimizer states"),
        ] {
            device.reserve(bytes, what)?;
        }
        if setup.transient_bytes.is_some() {
            let measured = hardware.measured.as_ref().and_then(|measured| measured.workspace_bytes);
            device.reserve(measured.unwrap_or(WORKSPACE_BYTES), "workspaces of matrix products")?;
        }
        let mut host = Budget::new(Tier::Host, setup.host_budget);
        host.reserve(plan.host.total(), "the host slab")?;
        let spilled = spill::Spilled::new(&setup)?;
        let chunks = layout.chunks.len();
        let mut backward: Vec<Option<(OpId, OpId)>> = vec![None; chunks];
        for op in trace.ids().filter(|op| trace.ops[op.index()].phase == Phase::Backward) {
            for chunk in trace.chunks(op).iter().filter(|c| plan.chunks[c.index()].class != OptimizerClass::Frozen) {
                let seen = backward[chunk.index()].get_or_insert((op, op));
                seen.1 = op;
            }
        }
        let calls = calls(trace, plan, &backward);
        let offload = Offload::new(trace, plan);
        let enqueues = |call: &&Call| if offload.is_some() { matches!(call, Call::Work(..)) } else { matches!(call, Call::Enter(_)) };
        let computes = calls.iter().filter(enqueues).count() as u64;
        Ok(Run {
            calls,
            scheduler: Scheduler::new(layout.clone(), trace.clone(), plan.clone(), Some(1.0)),
            machine: Machine::new(hardware).sustaining(costs.sustained),
            thread: Thread { step: 0, at: 0, ready_ns: 0, blocked: None, entered: false },
            blocks: Blocks::default(),
            fixed: device.used(),
            activations: 0,
            gradients: 0,
            peak: ("the start".to_owned(), 0, 0),
            device,
            host,
            written: vec![None; chunks],
            link_waits: Vec::new(),
            guards: Guards::default(),
            release: None,
            commit: None,
            in_flight_bytes: 0,
            staging_free: plan.landing_buffers,
            landing: landing::Landing::default(),
            waiting: late::Waiting::new(),
            streaming: Streaming::new(chunks),
            held: vec![0; chunks],
            leaving_bytes: 0,
            backward,
            wait_causes: BTreeMap::new(),
            compute_ended: 0,
            computes,
            latest_compute: [None; 2],
            window: None,
            spilled,
            offload,
            offloaded_live: 0,
            activations_back: BTreeMap::new(),
            queue: VecDeque::new(),
            queued_kernels: 0,
            setup,
        })
    }

    /// Goes on until a step was measured, or nothing happens any more.
    fn drive(&mut self) -> Result<Option<Outcome>, SimError> {
        loop {
            loop {
                let mut progress = false;
                while let Some(began) = self.machine.begin_one() {
                    self.began(began)?;
                    progress = true;
                }
                progress |= self.advance_thread()?;
                if !progress {
                    break;
                }
            }
            let ready = self.thread.ready_ns;
            let waits_for_clock = self.thread.blocked.is_none() && ready > self.machine.now_ns();
            match self.machine.next_end() {
                // What ends and what the thread does at the same moment: the end comes first.
                Some((at, lane)) if !waits_for_clock || at <= ready => {
                    self.machine.advance(at);
                    if let Some(ended) = self.machine.end(lane)
                        && let Some(outcome) = self.ended(ended)?
                    {
                        return Ok(Some(outcome));
                    }
                }
                _ if waits_for_clock => self.machine.advance(ready),
                _ => return Ok(None),
            }
        }
    }

    fn deadlock(&self) -> SimError {
        let call = self.calls.get(self.thread.at);
        SimError::Deadlock {
            at: format!("{call:?} of step {}", self.thread.step),
            cause: self.thread.blocked.map_or("the end of the step", |(_, cause)| cause.name()),
        }
    }

    /// Hands an event to the scheduler and carries out its actions.
    fn apply(&mut self, event: &Event) -> Result<Progress, SimError> {
        let mut actions = Vec::new();
        let progress = self.scheduler.step(event, &mut actions);
        self.execute(&actions);
        self.check_conservation();
        Ok(progress?)
    }

    /// Every byte in use has an owner, and what is on its way or waits for a step is part of the gradients.
    fn check_conservation(&self) {
        debug_assert_eq!(self.device.used(), self.fixed + self.activations + self.gradients, "device bytes");
        debug_assert!(self.in_flight_bytes + self.leaving_bytes + self.held.iter().sum::<u64>() <= self.gradients, "gradient bytes");
    }

    fn effects(&mut self, effects: Vec<Effect>) -> Result<(), SimError> {
        for effect in effects {
            match effect {
                Effect::Post(event) => {
                    self.apply(&event)?;
                }
                Effect::FreeGradients(bytes) => {
                    self.leaving_bytes -= bytes;
                    self.free_gradients(bytes);
                }
                Effect::Landed { bytes } => {
                    self.in_flight_bytes -= bytes;
                    self.free_gradients(bytes);
                }
                Effect::Arrived(arrived) => self.arrived(arrived)?,
                Effect::LandingEnded => self.landing_ended()?,
                Effect::Moments(chunk) => self.moments_ended(chunk)?,
                Effect::AddWaiting(chunk) => self.add_waiting(chunk),
                Effect::FreeStaging => self.staging_free += 1,
                Effect::Read(buffer) => self.was_read(buffer)?,
                Effect::Written(buffer) => self.was_written(buffer)?,
                Effect::Stepped(buffer) => self.was_stepped(buffer)?,
                Effect::GradRead(buffer) => self.grad_was_read(buffer),
                Effect::GradWritten(chunk) => self.spilled.grad_was_written(chunk),
                Effect::LandedOnDisk { chunk, writes, landed } => self.landed_on_disk(chunk, writes, landed)?,
                Effect::GradGivenBack(buffer) => self.give_grad_back(buffer)?,
                Effect::SumRead => self.add_pieces()?,
                Effect::SumAdded => self.sum_was_added()?,
                Effect::FetchRead => self.settle_fetches(),
                Effect::Fetched(buffer) => self.fetch_was_copied(buffer),
            }
        }
        Ok(())
    }

    fn free_gradients(&mut self, bytes: u64) {
        self.gradients -= bytes;
        self.device.release(bytes);
        self.sample_device();
    }

    fn began(&mut self, began: Began<Effect>) -> Result<(), SimError> {
        let now = self.machine.now_ns();
        if began.lane == Lane::Compute {
            let cause = began
                .waits
                .iter()
                .max_by_key(|token| self.machine.ended_ns(**token))
                .and_then(|token| self.wait_causes.get(&token.index()).copied())
                .unwrap_or(Cause::Launch);
            let enqueued = began.enqueued_ns.clamp(began.idle_since_ns, now);
            if let Some(window) = &mut self.window {
                let from = began.idle_since_ns;
                self.blocks.attribute(from, enqueued, &mut window.tally.stalls);
                window.tally.stalls.add(cause, now - enqueued);
                if now > from {
                    window.tally.waited(cause, from, now);
                }
            }
            self.blocks.forget_until(enqueued);
        }
        self.effects(began.effects)
    }

    fn ended(&mut self, ended: Ended<Effect>) -> Result<Option<Outcome>, SimError> {
        let now = self.machine.now_ns();
        if let Some(window) = &mut self.window {
            window.tally.ended(&ended, now);
        }
        let is_compute = ended.lane == Lane::Compute;
        let may_free = matches!(ended.lane, Lane::DiskWrite | Lane::HostToDevice);
        self.effects(ended.effects)?;
        if may_free {
            self.settle_writes()?;
        }
        if is_compute {
            self.compute_ended += 1;
            let per_step = self.computes;
            if self.compute_ended == per_step * WARM_UP_STEPS {
                self.open_window(now);
            } else if self.compute_ended == per_step * (WARM_UP_STEPS + 1) {
                return Ok(self.close_window(now));
            }
        }
        Ok(None)
    }
}
