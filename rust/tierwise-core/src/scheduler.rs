//! The scheduler: `step(event) -> actions`, sans-IO and deterministic.
//!
//! Copies are *stream-ordered*: a fetch that was issued counts as present, because whoever reads it waits for its event, and whoever
//! reuses its slot waits for its readers. So decisions depend only on the order of events, never on how fast a link is.

use crate::layout::Layout;
use crate::plan::{ChunkPlan, ClipMode, OptimizerClass, ParamHome, Plan};
use crate::residency::{IllegalTransition, Residency, Transition};
use crate::slab::{SLOT_ALIGN, Slab};
use crate::trace::{Phase, Trace};
use crate::{ChunkId, Tier};
use serde::{Deserialize, Serialize};

/// Steps over which `ClipMode::Auto` looks at the clip rate.
const CLIP_WINDOW: u32 = 16;
/// `ClipMode::Auto` speculates while at most this many of the last [`CLIP_WINDOW`] steps clipped.
const CLIP_TOLERATED: u32 = 2;

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Compute is about to read the chunks of a unit. May block.
    Enter {
        /// Unit of the trace.
        unit: u32,
        /// Direction.
        phase: Phase,
    },
    /// The unit's work is enqueued.
    Leave {
        /// Unit of the trace.
        unit: u32,
        /// Direction.
        phase: Phase,
    },
    /// A recomputation saved raw views: the unit's chunks stay until its backward leaves.
    Hold {
        /// Unit of the trace.
        unit: u32,
    },
    /// The model's outermost forward starts: what an interrupted one left in use is not read any more.
    ForwardBegin,
    /// Compute is about to read one chunk outside the traced operations. May block.
    Touch {
        /// The chunk.
        chunk: ChunkId,
    },
    /// A backward pass starts.
    BackwardBegin {
        /// Multiplies gradients first (inverse loss scale).
        grad_scale: f64,
    },
    /// The gradients of a chunk were handed over. May block while its previous step is unfinished.
    GradsHanded {
        /// The chunk.
        chunk: ChunkId,
    },
    /// The final gradient of a chunk is where its step will read it.
    GradLanded {
        /// The chunk.
        chunk: ChunkId,
        /// Sum of squares by global parameter index.
        sums: Vec<(u32, f64)>,
    },
    /// A backward pass ended (or was given up).
    BackwardEnd,
    /// `optimizer.step()`. May block while the previous step is undecided.
    Commit {
        /// Multiplies gradients first (inverse loss scale).
        grad_scale: f64,
        /// Whether hyperparameters differ from those that speculation used.
        hyper_changed: bool,
    },
    /// `zero_grad()` without a step. May block while gradients are on their way.
    DropGrads,
    /// A host step finished.
    StepDone {
        /// The chunk.
        chunk: ChunkId,
    },
    /// A speculated host step finished.
    SpeculateDone {
        /// The chunk.
        chunk: ChunkId,
    },
    /// An undo record was written back.
    UndoDone {
        /// The chunk.
        chunk: ChunkId,
    },
}

impl Event {
    /// The chunk that it names.
    fn chunk(&self) -> Option<ChunkId> {
        match *self {
            Event::Touch { chunk }
            | Event::GradsHanded { chunk }
            | Event::GradLanded { chunk, .. }
            | Event::StepDone { chunk }
            | Event::SpeculateDone { chunk }
            | Event::UndoDone { chunk } => Some(chunk),
            Event::Enter { .. }
            | Event::Leave { .. }
            | Event::Hold { .. }
            | Event::ForwardBegin
            | Event::BackwardBegin { .. }
            | Event::BackwardEnd
            | Event::Commit { .. }
            | Event::DropGrads => None,
        }
    }
}

/// What the executor has to do, in this order.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Copy a chunk's parameters from the host into the slab.
    Fetch {
        /// The chunk.
        chunk: ChunkId,
        /// First byte of its slot.
        offset: u64,
        /// Chunks that left for it.
        evicted: Vec<ChunkId>,
        /// Whether compute is waiting for it already.
        demand: bool,
    },
    /// Copy a resident chunk's rewritten parameters from the host to its fixed place.
    Refresh {
        /// The chunk.
        chunk: ChunkId,
    },
    /// Nothing uses the chunk any more: remember where the compute stream is.
    Release {
        /// The chunk.
        chunk: ChunkId,
        /// First byte of the slot that it was read from; a later action of the same batch may already give it to another chunk.
        offset: u64,
    },
    /// Run the optimizer step of a chunk.
    Step {
        /// The chunk.
        chunk: ChunkId,
        /// Where it runs.
        tier: Tier,
        /// Multiplies every gradient.
        grad_scale: f32,
    },
    /// Save an undo record and run the step with this scale, ahead of the decision.
    Speculate {
        /// The chunk.
        chunk: ChunkId,
        /// Multiplies every gradient.
        grad_scale: f32,
        /// First byte of its undo record among the plan's `undo_bytes`.
        undo_offset: u64,
    },
    /// Write the undo record back.
    Undo {
        /// The chunk.
        chunk: ChunkId,
    },
    /// The undo record is not needed any more.
    Accept {
        /// The chunk.
        chunk: ChunkId,
    },
    /// The step of this batch was decided.
    Decided(Decision),
    /// The gradients of a chunk were forgotten.
    Forget {
        /// The chunk.
        chunk: ChunkId,
    },
}

/// How a committed step was decided.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Decision {
    /// Number of the step, from 1.
    pub step: u64,
    /// Global gradient norm, inverse loss scale included.
    pub norm: f64,
    /// Clip coefficient, 1 if nothing was clipped.
    pub coefficient: f64,
    /// The norm was not finite: no parameter changed.
    pub skipped: bool,
}

/// Whether an event took effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// It did.
    Done,
    /// It did not: repeat it after another event.
    Blocked {
        /// The chunk whose pending work it waits for.
        on: ChunkId,
    },
}

/// An event that cannot be.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// A residency changed in a way that the table does not list.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// No slot can be freed.
    #[error(
        "no slot of {needed} bytes for `{chunk}`: {in_use} of the slab's {slab} bytes are in use by {users}; \
         checkpoint smaller regions or raise device_budget"
    )]
    NoSlot {
        /// Name of the chunk.
        chunk: String,
        /// Bytes needed.
        needed: u64,
        /// Size of the slab.
        slab: u64,
        /// Bytes in use by chunks that may not leave.
        in_use: u64,
        /// Names of those chunks.
        users: String,
    },
    /// A unit that the trace does not know.
    #[error("unit {0} is not in the trace of {1} units")]
    UnknownUnit(u32, usize),
    /// A chunk that the layout does not have.
    #[error("chunk {0} is not in the layout of {1} chunks")]
    UnknownChunk(u32, usize),
    /// Leaving what was not entered.
    #[error("left `{0}` without entering it")]
    NotEntered(String),
    /// A chunk's gradients came twice in one micro-batch, or without trainable parameters.
    #[error("unexpected gradients of `{chunk}`: {reason}")]
    Gradient {
        /// Name of the chunk.
        chunk: String,
        /// Why they are unexpected.
        reason: &'static str,
    },
    /// More backward passes than the plan accumulates.
    #[error("backward ran {got} times before optimizer.step(), the plan accumulates {planned}; set gradient_accumulation_steps={got}")]
    TooManyBackwards {
        /// Backward passes since the last step.
        got: u32,
        /// `accumulation` of the plan.
        planned: u32,
    },
    /// A step in the middle of its micro-batches.
    #[error(
        "optimizer.step() after {got} of the {planned} backward passes that the plan accumulates; run the others, call zero_grad(), or set \
         gradient_accumulation_steps={got}"
    )]
    TooFewBackwards {
        /// Backward passes since the last step.
        got: u32,
        /// `accumulation` of the plan.
        planned: u32,
    },
    /// A completion for work that was not running.
    #[error("`{chunk}` finished `{what}` that was not running: its state is {state}")]
    NotRunning {
        /// Name of the chunk.
        chunk: String,
        /// The work.
        what: &'static str,
        /// What the chunk is doing instead.
        state: String,
    },
}

/// Pending optimizer work of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Work {
    Idle,
    Speculating { then: Verdict },
    Speculated,
    Undoing { then_step: bool },
    Stepping,
}

/// What follows a running speculation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Undecided,
    Accept,
    Undo { then_step: bool },
}

/// Where the gradient of a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Grad {
    None,
    /// Handed over in an earlier micro-batch.
    Partial,
    /// Handed over in this backward, not final.
    PartialNow,
    /// Handed over for the last time, on its way.
    InFlight,
    Landed,
}

#[derive(Debug, Clone, Serialize)]
struct Chunk {
    param: Residency,
    slot: Option<u64>,
    generation: u64,
    forward_pins: u32,
    backward_pins: u32,
    holds: u32,
    touched: bool,
    grad: Grad,
    work: Work,
}

impl Chunk {
    fn in_use(&self) -> bool {
        self.forward_pins + self.backward_pins + self.holds > 0 || self.touched
    }

    fn pins(&self, phase: Phase) -> u32 {
        match phase {
            Phase::Forward => self.forward_pins,
            Phase::Backward => self.backward_pins,
        }
    }
}

/// Counters of what the scheduler did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Copies into the slab.
    pub fetches: u64,
    /// Those that compute was already waiting for.
    pub demand_fetches: u64,
    /// Chunks that left the slab for another.
    pub evictions: u64,
    /// Operations that were not the next of the trace.
    pub off_trace: u64,
    /// Committed steps, skipped ones included.
    pub steps: u64,
    /// Steps whose gradient norm was above the limit.
    pub clipped: u64,
    /// Steps skipped because the norm was not finite.
    pub skipped: u64,
    /// Chunk steps speculated.
    pub speculated: u64,
    /// Chunk steps undone.
    pub undone: u64,
}

/// The scheduler of one rank.
#[derive(Debug, Clone)]
pub struct Scheduler {
    layout: Layout,
    trace: Trace,
    plan: Plan,
    max_norm: Option<f64>,
    chunks: Vec<Chunk>,
    /// Per unit: how often its chunks are held for it.
    unit_holds: Vec<u32>,
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
                    (OptimizerClass::Device, _) | (OptimizerClass::Frozen, ParamHome::Resident) => Residency::At(Tier::Device),
                    (OptimizerClass::Host, ParamHome::Resident) => Residency::Cached { home: Tier::Host, cache: Tier::Device },
                    (_, ParamHome::Streamed) => Residency::At(Tier::Host),
                },
                slot: None,
                generation: 0,
                forward_pins: 0,
                backward_pins: 0,
                holds: 0,
                touched: false,
                grad: Grad::None,
                work: Work::Idle,
            })
            .collect();
        let num_params = layout.chunks.iter().map(|c| c.params.len()).sum();
        Scheduler {
            slab: Slab::new(plan.stream_slab_bytes),
            chunks,
            unit_holds: vec![0; trace.units.len()],
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
            layout,
            trace,
            plan,
            max_norm,
        }
    }

    /// Applies an event and appends what has to be done. A blocked event changed nothing that matters to its repetition; the actions
    /// that it appended (an undo that unblocks it) are to be done all the same.
    pub fn step(&mut self, event: &Event, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(chunk) = event.chunk().filter(|c| c.index() >= self.chunks.len()) {
            return Err(ScheduleError::UnknownChunk(chunk.0, self.chunks.len()));
        }
        match *event {
            Event::Enter { unit, phase } => return self.enter(unit, phase, actions),
            Event::Leave { unit, phase } => self.leave(unit, phase, actions)?,
            Event::Hold { unit } => {
                for chunk in self.unit_chunks(unit)? {
                    self.chunks[chunk.index()].holds += 1;
                }
                self.unit_holds[unit as usize] += 1;
            }
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
            Event::SpeculateDone { chunk } => self.speculate_done(chunk, actions)?,
            Event::UndoDone { chunk } => self.undo_done(chunk, actions)?,
        }
        Ok(Progress::Done)
    }

    // ---- reading ------------------------------------------------------------------------------------------------------------

    fn enter(&mut self, unit: u32, phase: Phase, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        let mut chunks = self.unit_chunks(unit)?;
        let before = self.cursor;
        self.release_touched(actions);
        // The cursor moves first: what the operation itself needs is then "now" for eviction.
        let expected = self.advance(unit, phase);
        for &chunk in &chunks {
            if let Some(on) = self.unready(chunk, actions)? {
                self.cursor = before;
                return Ok(Progress::Blocked { on });
            }
        }
        // Pinned one after the other, those on the device first, so that fetching one never evicts another of the same operation: the
        // decided copy of a speculated chunk could not be fetched again.
        chunks.sort_by_key(|c| !self.chunks[c.index()].param.readable_at(Tier::Device));
        if let Err(error) = self.fetch_and_pin(&chunks, phase, actions) {
            if chunks.len() < 2 {
                self.cursor = before;
                return Err(error);
            }
            // The first ones may have cut the room in pieces: again, with nothing else in the way.
            let left = self.clear_slab()?;
            // Among those that left may be the last decided copy of a speculated chunk.
            for &chunk in &chunks {
                if let Some(on) = self.unready(chunk, actions)? {
                    self.cursor = before;
                    return Ok(Progress::Blocked { on });
                }
            }
            let first = actions.len();
            if let Err(error) = self.fetch_and_pin(&chunks, phase, actions) {
                self.cursor = before;
                return Err(error);
            }
            if let Some(Action::Fetch { chunk, evicted, .. }) = actions.get_mut(first) {
                evicted.extend(left.into_iter().filter(|other| other != chunk));
            }
        }
        self.counters.off_trace += u64::from(!expected);
        self.prefetch(actions)?;
        Ok(Progress::Done)
    }

    fn leave(&mut self, unit: u32, phase: Phase, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let chunks = self.unit_chunks(unit)?;
        // Checked for all before any of them is let go: an error changes nothing.
        if chunks.iter().any(|c| self.chunks[c.index()].pins(phase) == 0) {
            return Err(ScheduleError::NotEntered(self.trace.units[unit as usize].name.clone()));
        }
        self.release_touched(actions);
        let holds = if phase == Phase::Backward { std::mem::take(&mut self.unit_holds[unit as usize]) } else { 0 };
        for chunk in chunks {
            self.unpin(chunk, phase);
            // Other units that read the same chunk keep theirs.
            self.chunks[chunk.index()].holds -= holds;
            if !self.chunks[chunk.index()].in_use() {
                self.release(chunk, actions);
            }
        }
        self.prefetch(actions)
    }

    fn forward_begin(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        self.release_touched(actions);
        for index in 0..self.chunks.len() {
            if std::mem::take(&mut self.chunks[index].forward_pins) > 0 && !self.chunks[index].in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
        self.prefetch(actions)
    }

    fn touch(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(on) = self.unready(chunk, actions)? {
            return Ok(Progress::Blocked { on });
        }
        self.fetch_now(chunk, actions)?;
        self.chunks[chunk.index()].touched = true;
        Ok(Progress::Done)
    }

    fn release_touched(&mut self, actions: &mut Vec<Action>) {
        for index in 0..self.chunks.len() {
            let chunk = &mut self.chunks[index];
            if std::mem::take(&mut chunk.touched) && !chunk.in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
    }

    /// Says that nothing uses a chunk any more, while it still has the slot that its readers read.
    fn release(&self, chunk: ChunkId, actions: &mut Vec<Action>) {
        if let Some(offset) = self.chunks[chunk.index()].slot {
            actions.push(Action::Release { chunk, offset });
        }
    }

    /// Makes the chunks of an operation present and keeps them; none of them if one has no place.
    fn fetch_and_pin(&mut self, chunks: &[ChunkId], phase: Phase, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        for (i, &chunk) in chunks.iter().enumerate() {
            if let Err(error) = self.fetch_now(chunk, actions) {
                for &pinned in &chunks[..i] {
                    self.unpin(pinned, phase);
                }
                return Err(error);
            }
            self.pin(chunk, phase);
        }
        Ok(())
    }

    fn pin(&mut self, chunk: ChunkId, phase: Phase) {
        match phase {
            Phase::Forward => self.chunks[chunk.index()].forward_pins += 1,
            Phase::Backward => self.chunks[chunk.index()].backward_pins += 1,
        }
    }

    fn unpin(&mut self, chunk: ChunkId, phase: Phase) {
        match phase {
            Phase::Forward => self.chunks[chunk.index()].forward_pins -= 1,
            Phase::Backward => self.chunks[chunk.index()].backward_pins -= 1,
        }
    }

    /// The chunk itself if its parameters cannot be read (or copied for reading) now.
    fn unready(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<Option<ChunkId>, ScheduleError> {
        let state = &self.chunks[chunk.index()];
        if self.committed.is_some() && state.grad != Grad::None {
            return Ok(Some(chunk));
        }
        match state.work {
            Work::Idle => Ok(None),
            Work::Speculating { then: Verdict::Undecided } | Work::Speculated if state.param.readable_at(Tier::Device) => Ok(None),
            // Read again before the decision, and no decided copy is left: the speculation has to go.
            Work::Speculated => {
                self.undo(chunk, false, actions)?;
                Ok(Some(chunk))
            }
            Work::Speculating { .. } | Work::Undoing { .. } | Work::Stepping => Ok(Some(chunk)),
        }
    }

    /// Fetches a chunk that compute waits for, unless it is on the device.
    fn fetch_now(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].param.readable_at(Tier::Device) {
            return Ok(());
        }
        if self.fetch(chunk, self.cursor.max(0) as u64, true, actions)? {
            return Ok(());
        }
        let users: Vec<_> = self.slab.occupants().filter(|(_, c, _)| self.chunks[c.index()].in_use()).collect();
        Err(ScheduleError::NoSlot {
            chunk: self.name(chunk),
            needed: slot_bytes(self.layout.param_bytes(chunk)),
            slab: self.slab.bytes(),
            in_use: users.iter().map(|(_, _, bytes)| bytes).sum(),
            users: users.iter().map(|&(_, c, _)| format!("`{}`", self.name(c))).collect::<Vec<_>>().join(", "),
        })
    }

    /// Starts a copy into the slab if a place is allowed.
    fn fetch(&mut self, chunk: ChunkId, needed_at: u64, demand: bool, actions: &mut Vec<Action>) -> Result<bool, ScheduleError> {
        let bytes = slot_bytes(self.layout.param_bytes(chunk));
        // Compute waits for a demanded chunk: whoever may leave is used later, also before the first operation.
        let needed_at = if demand { 0 } else { needed_at };
        let next_use = |c| self.next_use(c).map(|at| at.saturating_add(u64::from(demand)));
        let Some(place) = self.slab.place(bytes, needed_at, next_use) else { return Ok(false) };
        for &victim in &place.evict {
            self.drop_cache(victim)?;
            self.counters.evictions += 1;
        }
        self.slab.insert(chunk, place.offset, bytes);
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::Cache(Tier::Device))?;
        state.slot = Some(place.offset);
        self.counters.fetches += 1;
        self.counters.demand_fetches += u64::from(demand);
        actions.push(Action::Fetch { chunk, offset: place.offset, evicted: place.evict, demand });
        Ok(true)
    }

    /// Gives up every slot that nobody reads; gives whose they were.
    fn clear_slab(&mut self) -> Result<Vec<ChunkId>, ScheduleError> {
        let occupants: Vec<ChunkId> = self.slab.occupants().map(|(_, chunk, _)| chunk).collect();
        let left: Vec<ChunkId> = occupants.into_iter().filter(|c| !self.chunks[c.index()].in_use()).collect();
        for &chunk in &left {
            self.drop_cache(chunk)?;
            self.counters.evictions += 1;
        }
        Ok(left)
    }

    fn drop_cache(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::DropCache)?;
        if let Some(slot) = state.slot.take() {
            self.slab.remove(slot);
        }
        Ok(())
    }

    /// Starts the copies of coming operations, in their order, while a place is allowed.
    fn prefetch(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.slab.bytes() == 0 {
            return Ok(());
        }
        let ops = self.trace.ops.len() as i64;
        for ahead in 1..=ops {
            let at = self.cursor + ahead;
            let unit = self.trace.ops[(at % ops) as usize].unit as usize;
            for i in 0..self.trace.units[unit].chunks.len() {
                let chunk = self.trace.units[unit].chunks[i];
                let state = &self.chunks[chunk.index()];
                if state.param.readable_at(Tier::Device) {
                    continue;
                }
                let rewritten_before = at >= ops && self.is_rewritten(chunk);
                let fetchable = state.work == Work::Idle && !(self.committed.is_some() && state.grad != Grad::None);
                if rewritten_before || !fetchable || !self.fetch(chunk, at as u64, false, actions)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Whether the host rewrites the chunk's parameters before the trace wraps around.
    fn is_rewritten(&self, chunk: ChunkId) -> bool {
        self.plan.chunks[chunk.index()].class == OptimizerClass::Host && self.is_last_micro_step()
    }

    fn is_last_micro_step(&self) -> bool {
        self.micro_step + 1 >= self.plan.accumulation
    }

    /// Position of the next use of a chunk in the slab, `u64::MAX` if it is rewritten before, `None` if it may not leave.
    fn next_use(&self, chunk: ChunkId) -> Option<u64> {
        if self.chunks[chunk.index()].in_use() {
            return None;
        }
        let uses = &self.uses[chunk.index()];
        let next = uses.partition_point(|&at| at <= self.cursor);
        Some(match uses.get(next) {
            Some(&at) => at as u64,
            None if self.is_rewritten(chunk) => u64::MAX,
            None => uses.first().map_or(u64::MAX, |&at| (at + self.trace.ops.len() as i64) as u64),
        })
    }

    /// Moves the cursor to the next occurrence of an operation; gives whether that is what the trace expects next.
    fn advance(&mut self, unit: u32, phase: Phase) -> bool {
        let before = self.cursor;
        // A forward inside a backward recomputes for the backward that follows: the trace has no operation of its own for it.
        let recompute = self.in_backward && phase == Phase::Forward;
        let phase = if recompute { Phase::Backward } else { phase };
        let positions = &self.positions[unit as usize][phase as usize];
        let next = positions.partition_point(|&at| at <= before);
        if let Some(&at) = positions.get(next).or(positions.first()) {
            self.cursor = at - i64::from(recompute);
        }
        self.cursor == before + i64::from(!recompute)
    }

    // ---- gradients and the decision -----------------------------------------------------------------------------------------

    fn grads_handed(&mut self, chunk: ChunkId) -> Result<Progress, ScheduleError> {
        let last = self.is_last_micro_step();
        let error = |reason| Err(ScheduleError::Gradient { chunk: self.name(chunk), reason });
        if self.plan.chunks[chunk.index()].class == OptimizerClass::Frozen {
            return error("no optimizer steps it");
        }
        let state = &self.chunks[chunk.index()];
        // Gradients of the next batch must not join an undecided step.
        if state.work != Work::Idle || self.committed.is_some() {
            return Ok(Progress::Blocked { on: chunk });
        }
        match state.grad {
            Grad::None | Grad::Partial => {}
            Grad::PartialNow | Grad::InFlight | Grad::Landed => return error("they came twice in one backward pass"),
        }
        self.chunks[chunk.index()].grad = if last { Grad::InFlight } else { Grad::PartialNow };
        Ok(Progress::Done)
    }

    /// After the last backward pass: chunks whose gradients came in earlier micro-batches only. Their final gradient is already there; it
    /// counts as on its way until the caller hands over its `GradLanded`.
    pub fn stale_partials(&mut self) -> Vec<ChunkId> {
        let ended = self.micro_step >= self.plan.accumulation;
        let stale: Vec<ChunkId> = self.layout.ids().filter(|c| ended && self.chunks[c.index()].grad == Grad::Partial).collect();
        for chunk in &stale {
            self.chunks[chunk.index()].grad = Grad::InFlight;
        }
        stale
    }

    fn grad_landed(&mut self, chunk: ChunkId, sums: &[(u32, f64)], actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].grad != Grad::InFlight {
            return Err(self.not_running(chunk, "gradient transfer"));
        }
        let params = &self.layout.chunks[chunk.index()].params;
        // Indices run through a chunk's parameters without a gap.
        let own = params.first().map_or(0..0, |first| first.index..first.index + params.len() as u32);
        if sums.iter().any(|(index, _)| !own.contains(index)) {
            return Err(ScheduleError::Gradient { chunk: self.name(chunk), reason: "its sums of squares name another chunk's parameters" });
        }
        self.chunks[chunk.index()].grad = Grad::Landed;
        for &(index, sum) in sums {
            self.sums[index as usize] = Some(sum);
            self.partial_sum += sum;
        }
        if self.committed.is_none() && self.may_speculate(chunk) {
            self.chunks[chunk.index()].param.advance(chunk, "param", Transition::Speculate)?;
            self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Undecided };
            let undo_offset = self.undo_top;
            self.undo_used += self.layout.undo_bytes(chunk);
            self.undo_top += self.layout.undo_bytes(chunk);
            self.counters.speculated += 1;
            actions.push(Action::Speculate { chunk, grad_scale: self.speculation_scale as f32, undo_offset });
        }
        self.decide(actions)
    }

    fn may_speculate(&self, chunk: ChunkId) -> bool {
        let wanted = match self.plan.clip_mode {
            ClipMode::Defer => false,
            ClipMode::Speculate => true,
            ClipMode::Auto => self.recent_clips.count_ones() <= CLIP_TOLERATED,
        };
        let norm = self.partial_sum.sqrt() * self.speculation_scale;
        // Negated so that a partial norm that is not a number stops it too.
        let within = norm <= self.max_norm.unwrap_or(f64::MAX);
        // Other units may still have to read the old generation in this backward; without a device copy they could not.
        let readable =
            !self.in_backward || self.uses_left_in_backward(chunk) == 0 || self.chunks[chunk.index()].param.readable_at(Tier::Device);
        wanted
            && within
            && readable
            && self.plan.chunks[chunk.index()].class == OptimizerClass::Host
            && self.undo_top + self.layout.undo_bytes(chunk) <= self.plan.undo_bytes
    }

    fn uses_left_in_backward(&self, chunk: ChunkId) -> usize {
        let uses = &self.uses[chunk.index()];
        uses.len() - uses.partition_point(|&at| at <= self.cursor)
    }

    fn backward_end(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        self.unit_holds.fill(0);
        for index in 0..self.chunks.len() {
            let chunk = &mut self.chunks[index];
            let used = chunk.in_use();
            chunk.backward_pins = 0;
            chunk.holds = 0;
            chunk.touched = false;
            if chunk.grad == Grad::PartialNow {
                chunk.grad = Grad::Partial;
            }
            if used && !chunk.in_use() {
                self.release(ChunkId(index as u32), actions);
            }
        }
        if !std::mem::take(&mut self.in_backward) {
            return Ok(());
        }
        self.micro_step += 1;
        // After the last micro-batch everything that the host steps is stale: the trace has ended until the decision.
        self.cursor = if self.micro_step < self.plan.accumulation { -1 } else { self.trace.ops.len() as i64 - 1 };
        if self.micro_step < self.plan.accumulation {
            self.prefetch(actions)?;
        }
        Ok(())
    }

    fn commit(&mut self, grad_scale: f64, hyper_changed: bool, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if let Some(on) = self.undecided() {
            return Ok(Progress::Blocked { on });
        }
        let open = self.chunks.iter().any(|c| matches!(c.grad, Grad::Partial | Grad::PartialNow));
        if open && self.micro_step < self.plan.accumulation {
            let got = self.micro_step + u32::from(self.in_backward);
            return Err(ScheduleError::TooFewBackwards { got, planned: self.plan.accumulation });
        }
        self.release_touched(actions);
        self.committed = Some(Commit { grad_scale, hyper_changed });
        self.decide(actions)?;
        Ok(Progress::Done)
    }

    /// The chunk whose gradient a committed step waits for.
    fn undecided(&self) -> Option<ChunkId> {
        self.committed?;
        let on_its_way = |c: &ChunkId| !matches!(self.chunks[c.index()].grad, Grad::None | Grad::Landed);
        Some(self.layout.ids().find(on_its_way).unwrap_or(ChunkId(0)))
    }

    /// Decides a committed step once every gradient has landed.
    fn decide(&mut self, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Some(commit) = self.committed else { return Ok(()) };
        if self.chunks.iter().any(|c| !matches!(c.grad, Grad::None | Grad::Landed)) {
            return Ok(());
        }
        // In parameter order, whatever the order of arrival.
        let total: f64 = self.sums.iter().flatten().sum();
        let norm = total.sqrt() * commit.grad_scale;
        let skipped = !norm.is_finite();
        let coefficient = match self.max_norm {
            Some(limit) if !skipped => (limit / (norm + 1e-6)).min(1.0),
            _ => 1.0,
        };
        self.counters.steps += 1;
        self.counters.skipped += u64::from(skipped);
        self.counters.clipped += u64::from(coefficient < 1.0);
        self.recent_clips = ((self.recent_clips << 1) | u32::from(coefficient < 1.0 || skipped)) & ((1 << CLIP_WINDOW) - 1);
        actions.push(Action::Decided(Decision { step: self.counters.steps, norm, coefficient, skipped }));
        self.committed = None;
        self.sums.fill(None);
        self.partial_sum = 0.0;
        self.micro_step = 0;
        self.cursor = -1;
        let accepted = coefficient >= 1.0 && !skipped && !commit.hyper_changed && {
            let (now, then) = (commit.grad_scale.to_bits(), self.speculation_scale.to_bits());
            now == then
        };
        let grad_scale = (coefficient * commit.grad_scale) as f32;
        let mut order: Vec<ChunkId> = self.layout.ids().filter(|c| self.chunks[c.index()].grad == Grad::Landed).collect();
        // By next forward deadline, not by arrival.
        order.sort_by_key(|c| (self.uses[c.index()].first().copied().unwrap_or(i64::MAX), c.0));
        for chunk in order {
            self.chunks[chunk.index()].grad = Grad::None;
            match self.chunks[chunk.index()].work {
                Work::Idle if skipped => actions.push(Action::Forget { chunk }),
                Work::Idle => self.begin_step(chunk, grad_scale, actions)?,
                Work::Speculating { .. } if accepted => {
                    self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Accept };
                }
                Work::Speculated if accepted => self.accept(chunk, actions)?,
                Work::Speculating { .. } => {
                    self.chunks[chunk.index()].work = Work::Speculating { then: Verdict::Undo { then_step: !skipped } };
                    self.push_undo(chunk, (!skipped).then_some(grad_scale), actions);
                }
                Work::Speculated => {
                    self.chunks[chunk.index()].work = Work::Undoing { then_step: !skipped };
                    self.push_undo(chunk, (!skipped).then_some(grad_scale), actions);
                }
                Work::Undoing { .. } | Work::Stepping => {
                    return Err(self.not_running(chunk, "decision"));
                }
            }
        }
        self.prefetch(actions)
    }

    fn push_undo(&mut self, chunk: ChunkId, then_step: Option<f32>, actions: &mut Vec<Action>) {
        self.counters.undone += 1;
        actions.push(Action::Undo { chunk });
        match then_step {
            Some(grad_scale) => actions.push(Action::Step { chunk, tier: Tier::Host, grad_scale }),
            None => actions.push(Action::Forget { chunk }),
        }
    }

    /// Undoes a finished speculation whose gradients stay (`drop` forgets them).
    fn undo(&mut self, chunk: ChunkId, drop: bool, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].work != Work::Speculated {
            return Err(self.not_running(chunk, "speculation"));
        }
        self.chunks[chunk.index()].work = Work::Undoing { then_step: false };
        self.counters.undone += 1;
        actions.push(Action::Undo { chunk });
        if drop {
            actions.push(Action::Forget { chunk });
        }
        Ok(())
    }

    fn begin_step(&mut self, chunk: ChunkId, grad_scale: f32, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let on_device = self.plan.chunks[chunk.index()].class == OptimizerClass::Device;
        self.begin_write(chunk)?;
        if on_device {
            // Stream-ordered: whoever reads the parameters waits for the step's event.
            let state = &mut self.chunks[chunk.index()];
            state.param.advance(chunk, "param", Transition::FinishWrite)?;
            state.generation += 1;
        } else {
            self.chunks[chunk.index()].work = Work::Stepping;
        }
        let tier = if on_device { Tier::Device } else { Tier::Host };
        actions.push(Action::Step { chunk, tier, grad_scale });
        Ok(())
    }

    fn begin_write(&mut self, chunk: ChunkId) -> Result<(), ScheduleError> {
        if matches!(self.chunks[chunk.index()].param, Residency::Cached { .. }) {
            self.drop_cache(chunk)?;
        }
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::BeginWrite)?;
        Ok(())
    }

    fn accept(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.param.advance(chunk, "param", Transition::Accept)?;
        if let Some(slot) = state.slot.take() {
            self.slab.remove(slot);
        }
        self.release_undo(chunk);
        actions.push(Action::Accept { chunk });
        self.written(chunk, actions)
    }

    fn release_undo(&mut self, chunk: ChunkId) {
        self.undo_used -= self.layout.undo_bytes(chunk);
        if self.undo_used == 0 {
            self.undo_top = 0;
        }
    }

    /// The host copy is the new generation: resident chunks go to the device at once.
    fn written(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let state = &mut self.chunks[chunk.index()];
        state.work = Work::Idle;
        state.generation += 1;
        if self.plan.chunks[chunk.index()].home == ParamHome::Resident {
            state.param.advance(chunk, "param", Transition::Cache(Tier::Device))?;
            actions.push(Action::Refresh { chunk });
        }
        Ok(())
    }

    fn step_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        if self.chunks[chunk.index()].work != Work::Stepping {
            return Err(self.not_running(chunk, "step"));
        }
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::FinishWrite)?;
        self.written(chunk, actions)?;
        self.prefetch(actions)
    }

    fn speculate_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Work::Speculating { then } = self.chunks[chunk.index()].work else {
            return Err(self.not_running(chunk, "speculation"));
        };
        match then {
            Verdict::Undecided => self.chunks[chunk.index()].work = Work::Speculated,
            Verdict::Accept => self.accept(chunk, actions)?,
            Verdict::Undo { then_step } => self.chunks[chunk.index()].work = Work::Undoing { then_step },
        }
        self.prefetch(actions)
    }

    fn undo_done(&mut self, chunk: ChunkId, actions: &mut Vec<Action>) -> Result<(), ScheduleError> {
        let Work::Undoing { then_step } = self.chunks[chunk.index()].work else {
            return Err(self.not_running(chunk, "undo"));
        };
        self.chunks[chunk.index()].param.advance(chunk, "param", Transition::Undo)?;
        self.release_undo(chunk);
        if then_step {
            self.begin_write(chunk)?;
            self.chunks[chunk.index()].work = Work::Stepping;
        } else {
            self.chunks[chunk.index()].work = Work::Idle;
        }
        self.prefetch(actions)
    }

    fn drop_grads(&mut self, actions: &mut Vec<Action>) -> Result<Progress, ScheduleError> {
        if self.committed.is_some() {
            // Those gradients belong to the committed step.
            return Ok(Progress::Done);
        }
        for chunk in self.layout.ids() {
            let state = &self.chunks[chunk.index()];
            if state.grad == Grad::InFlight || matches!(state.work, Work::Speculating { then: Verdict::Undecided }) {
                return Ok(Progress::Blocked { on: chunk });
            }
        }
        for chunk in self.layout.ids() {
            let had = std::mem::replace(&mut self.chunks[chunk.index()].grad, Grad::None);
            if self.chunks[chunk.index()].work == Work::Speculated {
                self.undo(chunk, true, actions)?;
            } else if had != Grad::None {
                actions.push(Action::Forget { chunk });
            }
        }
        self.sums.fill(None);
        self.partial_sum = 0.0;
        if self.micro_step > 0 {
            self.cursor = -1;
        }
        self.micro_step = 0;
        self.prefetch(actions)?;
        Ok(Progress::Done)
    }

    // ---- looking in ---------------------------------------------------------------------------------------------------------

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
        let state = &self.chunks[chunk.index()];
        state.forward_pins + state.backward_pins + state.holds > 0
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
        self.committed.is_some() || self.chunks.iter().any(|c| !matches!(c.work, Work::Idle | Work::Speculated))
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

    /// Changes the class of a chunk between steps; its states were moved by the caller. A streamed chunk becomes resident with the device
    /// class.
    ///
    /// # Errors
    /// If the chunk is in use, has pending work or gradients, or would be streamed with another class.
    pub fn set_class(&mut self, chunk: ChunkId, class: OptimizerClass) -> Result<(), ScheduleError> {
        let state = &self.chunks[chunk.index()];
        let placement = self.plan.chunks[chunk.index()];
        if placement.class == OptimizerClass::Frozen {
            return Err(ScheduleError::Gradient { chunk: self.name(chunk), reason: "no optimizer steps it" });
        }
        let streamed = placement.home == ParamHome::Streamed;
        if state.work != Work::Idle || state.grad != Grad::None || (streamed && (class != OptimizerClass::Device || state.in_use())) {
            return Err(ScheduleError::Gradient {
                chunk: self.name(chunk),
                reason: "its class changes only while it is idle, and only to the device class where it is streamed",
            });
        }
        if streamed && state.slot.is_some() {
            self.drop_cache(chunk)?;
        }
        self.plan.chunks[chunk.index()] = ChunkPlan { class, home: ParamHome::Resident };
        self.chunks[chunk.index()].param = match class {
            OptimizerClass::Host => Residency::Cached { home: Tier::Host, cache: Tier::Device },
            OptimizerClass::Device | OptimizerClass::Frozen => Residency::At(Tier::Device),
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
