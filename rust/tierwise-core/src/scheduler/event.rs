//! The scheduler's vocabulary: what it is told, what it asks for, how it refuses.

use crate::residency::IllegalTransition;
use crate::trace::Phase;
use crate::{ChunkId, Tier};
use serde::{Deserialize, Serialize};

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
    /// A host step whose moments were late is whole now.
    MomentsDone {
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
    pub(super) fn chunk(&self) -> Option<ChunkId> {
        match *self {
            Event::Touch { chunk }
            | Event::GradsHanded { chunk }
            | Event::GradLanded { chunk, .. }
            | Event::StepDone { chunk }
            | Event::MomentsDone { chunk }
            | Event::SpeculateDone { chunk }
            | Event::UndoDone { chunk } => Some(chunk),
            Event::Enter { .. }
            | Event::Leave { .. }
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
    /// Run the optimizer step of a chunk; only of its parameters if it is to owe its moments.
    Step {
        /// The chunk.
        chunk: ChunkId,
        /// Where it runs.
        tier: Tier,
        /// Multiplies every gradient.
        grad_scale: f32,
    },
    /// Run what the chunk's step left: its moments. After every step of this batch, in the order in which gradients come next.
    Moments {
        /// The chunk.
        chunk: ChunkId,
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
