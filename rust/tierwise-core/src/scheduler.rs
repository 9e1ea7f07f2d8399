//! The scheduler: `step(event) -> actions`, sans-IO and deterministic.
//!
//! Copies are *stream-ordered*: a fetch that was issued counts as present, because whoever reads it waits for its event, and whoever
//! reuses its slot waits for its readers. So decisions depend only on the order of events, never on how fast a link is.

mod event;
mod reading;
mod record;
mod state;
mod stepping;

pub use event::{Action, Counters, Decision, Event, Progress, ScheduleError};
pub use record::Turn;

use crate::layout::Layout;
use crate::plan::{ChunkPlan, OptimizerClass, ParamHome, Plan};
use crate::residency::Residency;
use crate::slab::{SLOT_ALIGN, Slab};
use crate::trace::Trace;
use crate::{ChunkId, Tier};
use state::{Chunk, Grad, Work};

/// Steps over which `ClipMode::Auto` looks at the clip rate.
const CLIP_WINDOW: u32 = 16;
/// `ClipMode::Auto` speculates while at most this many of the last [`CLIP_WINDOW`] steps clipped.
const CLIP_TOLERATED: u32 = 2;

/// The scheduler of one rank.
#[derive(Debug, Clone)]
pub struct Scheduler {
    layout: Layout,
    trace: Trace,
    plan: Plan,
    max_norm: Option<f64>,
    chunks: Vec<Chunk>,
    slab: Slab,
    /// Per chunk: positions at which the trace uses it, ascending.
    uses: Vec<Vec<i64>>,
    /// Per unit and phase: positions in the trace, ascending.
    positions: Vec<[Vec<i64>; 2]>,
    /// Position of the latest operation; -1 before the first of a micro-batch.
    cursor: i64,
    micro_step: u32,
    in_backward: bool,
    committed: Option<Commit>,
    /// Sum of squares by global parameter index.
    sums: Vec<Option<f64>>,
    partial_sum: f64,
    speculation_scale: f64,
    undo_used: u64,
    /// End of the undo records; they are stacked, and start at 0 again once none is alive.
    undo_top: u64,
    recent_clips: u32,
    counters: Counters,
    record: record::Record,
}

#[derive(Debug, Clone, Copy)]
struct Commit {
    grad_scale: f64,
    hyper_changed: bool,
}

fn slot_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(SLOT_ALIGN)
}

impl Scheduler {
    /// A scheduler at the start of a step: resident chunks are on the device, streamed ones at home.
    pub fn new(layout: Layout, trace: Trace, plan: Plan, max_norm: Option<f64>) -> Self {
        let mut uses = vec![Vec::new(); layout.chunks.len()];
        let mut positions = vec![[Vec::new(), Vec::new()]; trace.units.len()];
        for (at, op) in trace.ops.iter().enumerate() {
            positions[op.unit as usize][op.phase as usize].push(at as i64);
            for chunk in &trace.units[op.unit as usize].chunks {
                uses[chunk.index()].push(at as i64);
            }
        }
        let chunks = plan
            .chunks
            .iter()
            .map(|p| Chunk {
                param: match (p.class, p.home) {
                    (OptimizerClass::Device | OptimizerClass::Streamed, _) | (OptimizerClass::Frozen, ParamHome::Resident) => {
                        Residency::At(Tier::Device)
                    }
                    (_, ParamHome::Spilled) => Residency::Cached { home: Tier::Nvme, cache: Tier::Device },
                    (_, ParamHome::Resident) => Residency::Cached { home: Tier::Host, cache: Tier::Device },
                    (_, ParamHome::Streamed) => Residency::At(Tier::Host),
                    (_, ParamHome::Fetched) => Residency::At(Tier::Nvme),
                },
                slot: None,
                generation: 0,
                forward_pins: 0,
                backward_pins: 0,
                touched: false,
                grad: Grad::None,
                work: Work::Idle,
                owes_moments: false,
            })
            .collect();
        let num_params = layout.chunks.iter().map(|c| c.params.len()).sum();
        Scheduler {
            slab: Slab::new(plan.stream_slab_bytes),
            chunks,
            uses,
            positions,
            cursor: -1,
            micro_step: 0,
            in_backward: false,
            committed: None,
            sums: vec![None; num_params],
            partial_sum: 0.0,
            speculation_scale: 1.0,
            undo_used: 0,
            undo_top: 0,
            recent_clips: 0,
            counters: Counters::default(),
            record: record::Record::default(),
            layout,
            trace,
            plan,
            max_norm,
        }
    }

    /// Applies an event and appends what has to be done. A blocked event changed nothing that matters to its repetition; the actions
    /// that it appended (an undo that unblocks it) are to be done all the same.
    pub fn step(&mut self, event: &Event, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        let before = actions.len();
        let progress = self.react(event, actions);
        self.record.add(event, &actions[before..], &progress);
        progress
    }

    fn react(&mut self, event: &Event, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(chunk) = event.chunk().filter(|c| c.index() >= self.chunks.len()) {
            return Err(ScheduleError::UnknownChunk(chunk.0, self.chunks.len()));
        }
        match *event {
            Event::Enter { unit, phase } => return self.enter(unit, phase, actions),
            Event::Leave { unit, phase } => self.leave(unit, phase, actions)?,
            Event::ForwardBegin => self.forward_begin(actions)?,
            Event::Touch { chunk } => return self.touch(chunk, actions),
            Event::BackwardBegin { grad_scale } => {
                if let Some(on) = self.undecided() {
                    return Ok(Progress::Blocked { on });
                }
                if self.micro_step >= self.plan.accumulation {
                    return Err(ScheduleError::TooManyBackwards { got: self.micro_step + 1, planned: self.plan.accumulation });
                }
                self.in_backward = true;
                self.speculation_scale = grad_scale;
            }
            Event::GradsHanded { chunk } => return self.grads_handed(chunk),
            Event::GradLanded { chunk, ref sums } => self.grad_landed(chunk, sums, actions)?,
            Event::BackwardEnd => self.backward_end(actions)?,
            Event::Commit { grad_scale, hyper_changed } => return self.commit(grad_scale, hyper_changed, actions),
            Event::DropGrads => return self.drop_grads(actions),
            Event::StepDone { chunk } => self.step_done(chunk, actions)?,
            Event::MomentsDone { chunk } => self.moments_done(chunk)?,
            Event::SpeculateDone { chunk } => self.speculate_done(chunk, actions)?,
            Event::UndoDone { chunk } => self.undo_done(chunk, actions)?,
        }
        Ok(Progress::Done)
    }

    fn unit_chunks(&self, unit: u32) -> Result<Vec<ChunkId>, ScheduleError> {
        match self.trace.units.get(unit as usize) {
            Some(unit) => Ok(unit.chunks.clone()),
            None => Err(ScheduleError::UnknownUnit(unit, self.trace.units.len())),
        }
    }

    fn not_running(&self, chunk: ChunkId, what: &'static str) -> ScheduleError {
        let state = &self.chunks[chunk.index()];
        let state = format!("{:?} with gradient {:?}", state.work, state.grad);
        ScheduleError::NotRunning { chunk: self.name(chunk), what, state }
    }

    fn name(&self, chunk: ChunkId) -> String {
        self.layout.chunks[chunk.index()].name.clone()
    }

    /// The layout.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The trace.
    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    /// The plan.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The limit of the gradient norm.
    pub fn max_norm(&self) -> Option<f64> {
        self.max_norm
    }

    /// Changes the limit of the gradient norm for steps that are not decided yet.
    pub fn set_max_norm(&mut self, max_norm: Option<f64>) {
        self.max_norm = max_norm;
    }

    /// Starts recording turns afresh, or stops.
    pub fn record(&mut self, enabled: bool) {
        self.record.enable(enabled);
    }

    /// Turns recorded since this was asked last.
    pub fn take_record(&mut self) -> Vec<Turn> {
        self.record.take()
    }

    /// Counters so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes of the slab that are occupied.
    pub fn slab_used(&self) -> u64 {
        self.slab.used()
    }

    /// Residency of a chunk's parameters.
    pub fn residency(&self, chunk: ChunkId) -> Residency {
        self.chunks[chunk.index()].param
    }

    /// First byte of a chunk's slot, if it has one.
    pub fn slot(&self, chunk: ChunkId) -> Option<u64> {
        self.chunks[chunk.index()].slot
    }

    /// How often a chunk's parameters were rewritten.
    pub fn generation(&self, chunk: ChunkId) -> u64 {
        self.chunks[chunk.index()].generation
    }

    /// Whether an operation that was entered reads the chunk. One that was only touched is read by name, through its own copy of the slot's
    /// address.
    pub fn is_entered(&self, chunk: ChunkId) -> bool {
        self.chunks[chunk.index()].is_entered()
    }

    /// Whether something reads the chunk now.
    pub fn in_use(&self, chunk: ChunkId) -> bool {
        self.chunks[chunk.index()].in_use()
    }

    /// Whether a backward pass that starts or runs now is the last of its step.
    pub fn is_last_backward(&self) -> bool {
        self.is_last_micro_step()
    }

    /// Whether a committed step waits for gradients.
    pub fn is_undecided(&self) -> bool {
        self.committed.is_some()
    }

    /// Whether a committed step is undecided, or any optimizer work is unfinished.
    pub fn is_busy(&self) -> bool {
        self.committed.is_some() || self.chunks.iter().any(|c| c.owes_moments || !matches!(c.work, Work::Idle | Work::Speculated))
    }

    /// Whether a chunk's step left its moments for later, and they are not done yet.
    pub fn owes_moments(&self, chunk: ChunkId) -> bool {
        self.chunks[chunk.index()].owes_moments
    }

    /// Whether gradients are on their way or a speculation is unfinished.
    pub fn has_in_flight(&self) -> bool {
        self.chunks.iter().any(|c| c.grad == Grad::InFlight || matches!(c.work, Work::Speculating { .. }))
    }

    /// Undoes speculations whose step was not committed, so that host parameters are the decided ones. Gradients stay.
    pub fn settle(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        for chunk in self.layout.ids() {
            if self.chunks[chunk.index()].work == Work::Speculated && self.committed.is_none() {
                self.undo(chunk, false, actions)?;
            }
        }
        Ok(())
    }

    /// Changes the class of a chunk between steps; its states were moved by the caller. Streamed parameters become resident
    /// with a class that is stepped on the device.
    ///
    /// # Errors
    /// If the chunk is in use, has pending work or gradients, or its parameters would be streamed with another class.
    pub fn set_class(&mut self, chunk: ChunkId, class: OptimizerClass) -> Result<(), ScheduleError> {
        let state = &self.chunks[chunk.index()];
        let placement = self.plan.chunks[chunk.index()];
        if placement.class == OptimizerClass::Nvme || class == OptimizerClass::Nvme {
            return Err(ScheduleError::Gradient { chunk: self.name(chunk), reason: "the class of spilled chunks is the plan's" });
        }
        if placement.class == OptimizerClass::Frozen {
            return Err(ScheduleError::Gradient { chunk: self.name(chunk), reason: "no optimizer steps it" });
        }
        let streamed = placement.home == ParamHome::Streamed;
        if state.work != Work::Idle
            || state.owes_moments
            || state.grad != Grad::None
            || (streamed && (!class.steps_on_device() || state.in_use()))
        {
            return Err(ScheduleError::Gradient {
                chunk: self.name(chunk),
                reason: "its class changes only while it is idle, and only to one that is stepped on the device where its parameters are streamed",
            });
        }
        if placement.class == class {
            return Ok(());
        }
        if streamed && state.slot.is_some() {
            self.drop_cache(chunk)?;
        }
        self.plan.chunks[chunk.index()] = ChunkPlan::new(class, ParamHome::Resident);
        self.chunks[chunk.index()].param = match class {
            OptimizerClass::Host | OptimizerClass::Nvme => Residency::Cached { home: Tier::Host, cache: Tier::Device },
            OptimizerClass::Device | OptimizerClass::Streamed | OptimizerClass::Frozen => Residency::At(Tier::Device),
        };
        Ok(())
    }

    /// Every chunk's state, for tests and messages.
    pub fn snapshot(&self) -> serde_json::Value {
        self.layout
            .chunks
            .iter()
            .zip(&self.chunks)
            .map(|(layout, state)| {
                let mut value = serde_json::to_value(state).unwrap_or_default();
                value["name"] = layout.name.clone().into();
                value["bytes"] = (layout.numel * self.layout.precision.param_bytes()).into();
                value
            })
            .collect()
    }
}
