//! The trace: what one micro-batch touches, in order.

use crate::{ChunkId, OpId};
use serde::{Deserialize, Serialize};

/// Direction of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The unit's forward.
    Forward,
    /// The unit's backward, its recomputation included.
    Backward,
}

/// A module whose parameters are entered and left together: a decoder layer, an embedding, a head.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Unit {
    /// Qualified module name.
    pub name: String,
    /// Chunks that its forward and backward read.
    pub chunks: Vec<ChunkId>,
    /// Bytes that autograd saves for its backward when nothing is recomputed.
    pub saved_bytes: u64,
    /// Bytes of its inputs that stay when it is recomputed.
    pub input_bytes: u64,
    /// Bytes of `saved_bytes` that offloading takes off the device: storages worth a copy that no other unit saves too.
    #[serde(default)]
    pub offload_bytes: u64,
    /// Bytes that its offloaded activations take in host memory, those that other units save too included.
    #[serde(default)]
    pub offload_host_bytes: u64,
    /// Whether it may be recomputed (a decoder layer may, an embedding may not).
    pub recomputable: bool,
    /// Floating-point operations of its forward.
    pub flops: f64,
    /// Of `flops`: those after the last tensor that its backward needs. A recomputation stops there, as torch's non-reentrant checkpoint does.
    #[serde(default)]
    pub tail_flops: f64,
}

impl Unit {
    /// Floating-point operations of a recomputation.
    pub fn recompute_flops(&self) -> f64 {
        self.flops - self.tail_flops
    }
}

/// One traced operation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Op {
    /// Index of the unit in [`Trace::units`].
    pub unit: u32,
    /// Direction.
    pub phase: Phase,
}

/// What one micro-batch touches, in order. The step repeats it for every micro-batch, cyclically.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// Units in order of their first forward.
    pub units: Vec<Unit>,
    /// Operations in execution order, forward first.
    pub ops: Vec<Op>,
    /// Bytes saved outside every unit, alive from the end of forward to the start of backward.
    pub outer_saved_bytes: u64,
}

impl Trace {
    /// Chunks that an operation reads.
    pub fn chunks(&self, op: OpId) -> &[ChunkId] {
        &self.units[self.ops[op.index()].unit as usize].chunks
    }

    /// A readable name of an operation, such as `` `model.layers.3` backward ``.
    pub fn op_name(&self, op: OpId) -> String {
        let op = &self.ops[op.index()];
        let phase = match op.phase {
            Phase::Forward => "forward",
            Phase::Backward => "backward",
        };
        format!("`{}` {phase}", self.units[op.unit as usize].name)
    }

    /// All operation ids in order.
    pub fn ids(&self) -> impl Iterator<Item = OpId> + use<> {
        (0..self.ops.len() as u32).map(OpId)
    }
}
