//! Chunk layout: which parameters move together, and at which element each of them starts.

use crate::plan::{ChunkPlan, OptimizerClass, ParamHome};
use serde::{Deserialize, Serialize};

/// Every parameter starts at a multiple of this many elements, so that 16-bit payloads are 128-byte aligned.
pub const ALIGN_NUMEL: u64 = 64;

/// Storage precision of parameters and gradients. Optimizer state is always fp32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// bf16 parameters; the fp32 master is the parameter plus 16 low bits.
    Bf16,
    /// fp16 parameters with a plain fp32 master and loss scaling.
    Fp16,
    /// fp32 parameters that are their own master.
    Fp32,
}

impl Precision {
    /// Bytes of one parameter element as the model sees it.
    pub fn param_bytes(self) -> u64 {
        match self {
            Precision::Bf16 | Precision::Fp16 => 2,
            Precision::Fp32 => 4,
        }
    }

    /// Bytes of one gradient element as autograd produces it.
    pub fn grad_bytes(self) -> u64 {
        self.param_bytes()
    }

    /// Bytes that complete one parameter element to its fp32 master.
    pub fn master_bytes(self) -> u64 {
        match self {
            Precision::Bf16 => 2,
            Precision::Fp16 => 4,
            Precision::Fp32 => 0,
        }
    }

    /// Bytes of optimizer state of one element: master completion and two fp32 moments.
    pub fn state_bytes(self) -> u64 {
        self.master_bytes() + 8
    }

    /// Bytes of an undo record of one element: everything an optimizer step overwrites.
    pub fn undo_bytes(self) -> u64 {
        self.param_bytes() + self.state_bytes()
    }
}

/// In what sums of the gradients of several micro-batches are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sums {
    /// fp32.
    #[default]
    Fp32,
    /// As gradients come: half the memory for 16-bit ones, and every addition is rounded.
    Gradient,
}

/// One parameter as the caller describes it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSpec {
    /// Qualified name, as in `named_parameters()`.
    pub name: String,
    /// Number of elements.
    pub numel: u64,
    /// Whether an optimizer steps it; only then it has gradients and optimizer state here.
    pub trainable: bool,
}

/// One parameter at its place in a chunk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamLayout {
    /// Qualified name, as in `named_parameters()`.
    pub name: String,
    /// Number of elements.
    pub numel: u64,
    /// Whether an optimizer steps it.
    pub trainable: bool,
    /// First element within the chunk, the same in every payload.
    pub offset: u64,
    /// Position among all parameters of the layout, chunk by chunk in the order given.
    pub index: u32,
}

/// One chunk: parameters that are used together and move as one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkLayout {
    /// Name of the module that the parameters belong to.
    pub name: String,
    /// Parameters in the order given; trainable ones have the lower offsets.
    pub params: Vec<ParamLayout>,
    /// Elements of the `param` payload, alignment included.
    pub numel: u64,
    /// Elements of the state and gradient payloads: the trainable prefix, alignment included.
    pub state_numel: u64,
}

/// All chunks of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// Precision of parameters and gradients.
    pub precision: Precision,
    /// Precision of sums of gradients.
    #[serde(default)]
    pub sums: Sums,
    /// Chunks in the order given.
    pub chunks: Vec<ChunkLayout>,
}

impl Layout {
    /// Lays out chunks given as `(name, parameters)`.
    pub fn new(precision: Precision, chunks: Vec<(String, Vec<ParamSpec>)>) -> Self {
        let mut index = 0;
        let chunks = chunks
            .into_iter()
            .map(|(name, specs)| {
                let mut params: Vec<ParamLayout> = specs
                    .into_iter()
                    .map(|spec| {
                        let placed = ParamLayout { name: spec.name, numel: spec.numel, trainable: spec.trainable, offset: 0, index };
                        index += 1;
                        placed
                    })
                    .collect();
                let mut end = 0;
                let mut state_numel = 0;
                for trainable in [true, false] {
                    for param in params.iter_mut().filter(|p| p.trainable == trainable) {
                        param.offset = end;
                        end = (end + param.numel).next_multiple_of(ALIGN_NUMEL);
                    }
                    if trainable {
                        state_numel = end;
                    }
                }
                ChunkLayout { name, params, numel: end, state_numel }
            })
            .collect();
        Layout { precision, sums: Sums::default(), chunks }
    }

    /// The same with sums of gradients of another precision.
    #[must_use]
    pub fn with_sums(self, sums: Sums) -> Self {
        Layout { sums, ..self }
    }

    /// Bytes of one element of a sum of gradients.
    pub fn sum_bytes(&self) -> u64 {
        match self.sums {
            Sums::Fp32 => 4,
            Sums::Gradient => self.precision.grad_bytes(),
        }
    }

    /// Bytes of the `param` payload of a chunk.
    pub fn param_bytes(&self, chunk: crate::ChunkId) -> u64 {
        self.chunks[chunk.index()].numel * self.precision.param_bytes()
    }

    /// Bytes of one gradient of a chunk in the model's precision.
    pub fn grad_bytes(&self, chunk: crate::ChunkId) -> u64 {
        self.chunks[chunk.index()].state_numel * self.precision.grad_bytes()
    }

    /// Bytes of the gradient accumulator of a chunk.
    pub fn grad_acc_bytes(&self, chunk: crate::ChunkId) -> u64 {
        self.chunks[chunk.index()].state_numel * self.sum_bytes()
    }

    /// Bytes of what a step of a chunk reads: its gradient, or the sum of those of several micro-batches.
    pub fn final_grad_bytes(&self, chunk: crate::ChunkId, accumulation: u32) -> u64 {
        self.chunks[chunk.index()].state_numel * self.final_grad_element(accumulation)
    }

    /// Bytes of one element of that.
    pub fn final_grad_element(&self, accumulation: u32) -> u64 {
        if accumulation > 1 { self.sum_bytes() } else { self.precision.grad_bytes() }
    }

    /// Bytes of the optimizer state of a chunk (master completion and both moments).
    pub fn state_bytes(&self, chunk: crate::ChunkId) -> u64 {
        self.chunks[chunk.index()].state_numel * self.precision.state_bytes()
    }

    /// Bytes of the undo record of a chunk.
    pub fn undo_bytes(&self, chunk: crate::ChunkId) -> u64 {
        self.chunks[chunk.index()].state_numel * self.precision.undo_bytes()
    }

    /// Bytes of one spilled element: its states, unless the chunk is frozen, and the parameter where that is spilled too.
    pub fn spilled_bytes(&self, placement: ChunkPlan) -> u64 {
        let param = if placement.home.is_spilled() { self.precision.param_bytes() } else { 0 };
        param + if placement.class == OptimizerClass::Frozen { 0 } else { self.precision.state_bytes() }
    }

    /// Elements of a chunk that are spilled: those with states, or all parameters of a frozen one.
    pub fn spilled_numel(&self, chunk: crate::ChunkId, placement: ChunkPlan) -> u64 {
        let of = &self.chunks[chunk.index()];
        match (placement.class, placement.home) {
            (OptimizerClass::Nvme, _) => of.state_numel,
            (OptimizerClass::Frozen, ParamHome::Fetched) => of.numel,
            _ => 0,
        }
    }

    /// All chunk ids in order.
    pub fn ids(&self) -> impl Iterator<Item = crate::ChunkId> + use<> {
        (0..self.chunks.len() as u32).map(crate::ChunkId)
    }
}
