//! What the scheduler knows of one chunk.

use crate::residency::Residency;
use crate::trace::Phase;
use serde::{Deserialize, Serialize};

/// Pending optimizer work of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Work {
    Idle,
    Speculating { then: Verdict },
    Speculated,
    Undoing { then_step: bool },
    Stepping,
}

/// What follows a running speculation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Verdict {
    Undecided,
    Accept,
    Undo { then_step: bool },
}

/// Where the gradient of a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Grad {
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
pub(super) struct Chunk {
    pub(super) param: Residency,
    pub(super) slot: Option<u64>,
    pub(super) generation: u64,
    pub(super) forward_pins: u32,
    pub(super) backward_pins: u32,
    pub(super) touched: bool,
    pub(super) grad: Grad,
    pub(super) work: Work,
    /// Its parameters were stepped, its moments not yet: its gradient is still read.
    pub(super) owes_moments: bool,
}

impl Chunk {
    pub(super) fn in_use(&self) -> bool {
        self.is_entered() || self.touched
    }

    /// Whether an operation that was entered reads the chunk.
    pub(super) fn is_entered(&self) -> bool {
        self.forward_pins + self.backward_pins > 0
    }

    pub(super) fn pins(&self, phase: Phase) -> u32 {
        match phase {
            Phase::Forward => self.forward_pins,
            Phase::Backward => self.backward_pins,
        }
    }
}
