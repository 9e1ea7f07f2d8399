//! From blocks to what the planner reads: chunks, units, operations, and the work of every unit.

use super::{Architecture, Block, Kind, Model};
use std::ops::Range;
use tierwise_core::ChunkId;
use tierwise_core::layout::{Layout, Precision};
use tierwise_core::plan::host_region_bytes;
use tierwise_core::trace::{Op, Phase, Trace, Unit};

/// What a unit does in forward; backward does twice of each.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Work {
    /// What the block is.
    pub kind: Kind,
    /// Tokens of the rank.
    pub tokens: u64,
    /// Tokens of a whole sequence.
    pub seq: u64,
    /// Sequences that the rank's tokens make up, rounded up.
    pub sequences: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Heads of the model.
    pub heads: u64,
    /// Matrix products: input and output features, of all tensor-parallel ranks together.
    pub products: Vec<(u64, u64)>,
    /// Widths of all heads, per attention.
    pub attention_widths: Vec<u64>,
    /// Share of the products and of the attention that the rank computes.
    pub share: f64,
    /// FLOPs of matrix products.
    pub matmul_flops: f64,
    /// FLOPs of attention; half of the full square if it is causal.
    pub attention_flops: f64,
    /// Bytes that element-wise kernels read and write.
    pub memory_bytes: f64,
    /// Bytes that copies read and write in forward and in backward because heads are padded.
    pub padding_bytes: [f64; 2],
    /// What a recomputation leaves out: autograd saves nothing of it.
    pub tail: Tail,
    /// Bytes of hidden vectors that tensor parallelism reduces.
    pub reduced_bytes: f64,
    /// Number of those reductions.
    pub reductions: u64,
    /// Bytes of queries, keys, values and outputs that sequence parallelism exchanges, per rank.
    pub exchanged_bytes: f64,
}

/// The last product of a layer and the residual sum after it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tail {
    /// Input and output features of the product, of all tensor-parallel ranks together.
    pub product: (u64, u64),
    /// FLOPs of the product.
    pub flops: f64,
    /// Bytes that the sum reads and writes.
    pub memory_bytes: f64,
}

/// A model at one micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Built {
    /// One chunk per block that has parameters.
    pub layout: Layout,
    /// Units of the same names and their operations.
    pub trace: Trace,
    /// Per unit: work of one micro-batch in forward.
    pub work: Vec<Work>,
    /// Per unit: saved bytes that backward may make again, and the device memory traffic of that.
    pub cheap_bytes: Vec<[u64; 2]>,
    /// Per unit: bytes that its kernels need for themselves in forward and in backward.
    pub transient_bytes: Vec<[u64; 2]>,
}

/// What one rank has of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Blocks of its pipeline stage.
    pub blocks: Range<usize>,
    /// Ranks that split every layer's matrices and, between them, the tokens of norms and residual sums.
    pub tensor: u64,
    /// Ranks that split every sequence.
    pub sequence: u64,
    /// Micro-batches whose activations are alive at once; more than 1 only in a pipeline.
    pub in_flight: u64,
}

impl Share {
    /// All of it.
    pub fn whole(model: &Model) -> Self {
        Share { blocks: 0..model.architecture.blocks.len(), tensor: 1, sequence: 1, in_flight: 1 }
    }
}

impl Model {
    /// Chunks, units and work of one rank's share of a micro-batch.
    pub fn build_share(&self, seq: u64, sequences: u64, share: &Share) -> Built {
        // Rounded up: what does not divide makes one rank wait for another.
        let tokens = (seq * sequences).div_ceil(share.sequence);
        let mut chunks = Vec::new();
        let mut chunk_of: Vec<Option<ChunkId>> = vec![None; self.architecture.blocks.len()];
        let mut units = Vec::new();
        let mut work = Vec::new();
        let mut transient_bytes = Vec::new();
        let mut cheap_bytes = Vec::new();
        for at in share.blocks.clone() {
            let block = &self.architecture.blocks[at];
            let mut reads = Vec::new();
            if let Some(source) = block.shares {
                // A stage that has the head but not the embedding keeps a copy of the shared table.
                reads.push(*chunk_of[source].get_or_insert_with(|| {
                    chunks.push((self.architecture.blocks[source].name.clone(), self.architecture.blocks[source].specs(share.tensor)));
                    ChunkId(chunks.len() as u32 - 1)
                }));
            }
            if !block.params.is_empty() {
                chunks.push((block.name.clone(), block.specs(share.tensor)));
                let chunk = ChunkId(chunks.len() as u32 - 1);
                chunk_of[at] = Some(chunk);
                reads.push(chunk);
            }
            let of_unit = block_work(block, &self.architecture, seq, tokens, share);
            // Tensor-parallel ranks share the saved tokens of norms and residual sums too.
            let kept = |per_token: u64| (per_token * tokens).div_ceil(share.tensor) * share.in_flight;
            // What a layer saves per token is its own, in storages of whole pages.
            let offloaded = if block.kind == Kind::Layer { kept(block.saved_bytes) } else { 0 };
            units.push(Unit {
                name: block.name.clone(),
                chunks: reads,
                saved_bytes: kept(block.saved_bytes) + block.saved_once_bytes.div_ceil(share.tensor) * share.in_flight,
                input_bytes: kept(block.input_bytes),
                offload_bytes: offloaded,
                offload_host_bytes: host_region_bytes(offloaded),
                recomputable: block.kind == Kind::Layer,
                flops: of_unit.matmul_flops + of_unit.attention_flops,
                tail_flops: of_unit.tail.flops,
            });
            cheap_bytes.push(block.cheap_bytes.map(kept));
            let [forward, backward] = [block.forward_transient, block.backward_transient].map(|b| b.of(tokens).div_ceil(share.tensor));
            // At the peak of its backward a layer has the gradient of its last product's matrix only.
            let late =
                if block.ends_in_product { 2 * (block.split_numel(share.tensor) - last_matrix(block).div_ceil(share.tensor)) } else { 0 };
            transient_bytes.push([forward, backward.saturating_sub(late)]);
            work.push(of_unit);
        }
        let count = units.len() as u32;
        let forward = (0..count).map(|unit| Op { unit, phase: Phase::Forward });
        let ops = forward.chain((0..count).rev().map(|unit| Op { unit, phase: Phase::Backward })).collect();
        Built {
            layout: Layout::new(Precision::Bf16, chunks),
            trace: Trace { units, ops, outer_saved_bytes: 0 },
            work,
            cheap_bytes,
            transient_bytes,
        }
    }
}

/// Elements of the matrix of a block's last product.
fn last_matrix(block: &Block) -> u64 {
    block.products.last().map_or(0, |(inputs, outputs)| inputs * outputs)
}

fn block_work(block: &Block, model: &Architecture, seq: u64, tokens: u64, share: &Share) -> Work {
    let hidden_bytes = 2 * model.hidden_size;
    let per_rank = |per_token: u64| per_token as f64 * tokens as f64 / share.tensor as f64;
    // Queries and outputs have the width of all query heads, keys and values theirs; each is sent once, all but the rank's own part.
    let exchanged: u64 = block.attention.iter().map(|a| 2 * (2 * a.width + 2 * a.kv_width)).sum();
    // Of the residual sum: two hidden vectors in, one out.
    let tail = match block.products.last() {
        Some(&product) if block.ends_in_product => {
            Tail { product, flops: per_rank(2 * product.0 * product.1), memory_bytes: per_rank(3 * hidden_bytes) }
        }
        _ => Tail::default(),
    };
    let away = (share.sequence - 1) as f64 / share.sequence as f64;
    Work {
        kind: block.kind,
        tokens,
        seq,
        sequences: tokens.div_ceil(seq.max(1)).max(1),
        hidden: model.hidden_size,
        heads: model.num_heads,
        products: block.products.clone(),
        attention_widths: block.attention.iter().map(|a| a.width).collect(),
        share: 1.0 / share.tensor as f64,
        matmul_flops: per_rank(block.matmul_flops()),
        attention_flops: per_rank(block.attention_flops(seq)),
        memory_bytes: per_rank(block.memory_bytes),
        padding_bytes: block.padding_bytes(model.num_heads).map(per_rank),
        tail,
        reduced_bytes: if share.tensor > 1 { (block.reductions * hidden_bytes) as f64 * tokens as f64 } else { 0.0 },
        reductions: if share.tensor > 1 { block.reductions } else { 0 },
        exchanged_bytes: per_rank(exchanged) * away,
    }
}
