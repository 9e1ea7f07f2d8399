//! How ranks divide the work: tensor parallelism inside, then sequence, then data, pipeline stages outside.

use crate::collectives::Group;
use crate::hardware::Hardware;
use crate::models::{Kind, Model, Share};
use crate::pipeline::Schedule;
use serde::Serialize;
use std::ops::Range;
use tierwise_core::layout::{ALIGN_NUMEL, Layout};

/// Sizes of all dimensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Parallel {
    /// GPUs in all.
    pub gpus: u64,
    /// Ranks that split every layer's matrices, and between them the tokens of norms and residual sums.
    pub tensor: u64,
    /// Ranks that split every sequence, with all-to-all exchanges around attention.
    pub sequence: u64,
    /// Pipeline stages.
    pub pipeline: u64,
    /// Order of the micro-batches in a pipeline.
    pub schedule: Schedule,
    /// What data-parallel ranks split: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
    pub zero: u8,
}

impl Parallel {
    /// One GPU.
    pub fn single() -> Self {
        Parallel::data_parallel(1)
    }

    /// Data parallelism alone.
    pub fn data_parallel(gpus: u64) -> Self {
        Parallel { gpus, tensor: 1, sequence: 1, pipeline: 1, schedule: Schedule::OneFOneB, zero: 3 }
    }

    /// Data-parallel ranks: what is left.
    pub fn data(&self) -> u64 {
        self.gpus / (self.tensor * self.sequence * self.pipeline)
    }

    /// Ranks that hold equal parameters: data- and sequence-parallel ones.
    pub fn shards(&self) -> u64 {
        self.data() * self.sequence
    }

    /// GPUs in use on a node.
    pub fn gpus_on_node(&self, hardware: &Hardware) -> u32 {
        self.gpus.min(u64::from(hardware.gpus_per_node)) as u32
    }

    /// Ranks that split a layer.
    pub fn tensor_group(&self, hardware: &Hardware) -> Result<Group, String> {
        Group::new(hardware, self.tensor, 1)
    }

    /// Ranks that split a sequence.
    pub fn sequence_group(&self, hardware: &Hardware) -> Result<Group, String> {
        Group::new(hardware, self.sequence, self.tensor)
    }

    /// Ranks that reduce gradients.
    pub fn data_group(&self, hardware: &Hardware) -> Result<Group, String> {
        Group::new(hardware, self.shards(), self.tensor)
    }

    /// Neighbouring pipeline stages.
    pub fn stage_group(&self, hardware: &Hardware) -> Result<Group, String> {
        Group::new(hardware, self.pipeline, self.gpus / self.pipeline)
    }

    /// Refuses sizes that contradict each other, the model or the machine.
    pub fn check(&self, model: &Model, hardware: &Hardware, seq: u64) -> Result<(), String> {
        let sizes =
            [("gpus", self.gpus), ("tensor-parallel", self.tensor), ("sequence-parallel", self.sequence), ("pipeline", self.pipeline)];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 20 {
                return Err(format!("{name} is {size}; it must be between 1 and {}", 1 << 20));
            }
        }
        let product = self.tensor * self.sequence * self.pipeline;
        if !self.gpus.is_multiple_of(product) {
            return Err(format!(
                "gpus is {}; it must be a multiple of tensor-parallel {} * sequence-parallel {} * pipeline {} = {product}",
                self.gpus, self.tensor, self.sequence, self.pipeline
            ));
        }
        for (name, size) in [("tensor-parallel", self.tensor), ("sequence-parallel", self.sequence)] {
            if !model.architecture.num_heads.is_multiple_of(size) {
                return Err(format!("{name} is {size}; it must divide the {} heads of {}", model.architecture.num_heads, model.name));
            }
        }
        if !seq.is_multiple_of(self.sequence) {
            return Err(format!("sequence-parallel is {}; it must divide seq = {seq}", self.sequence));
        }
        if self.pipeline * self.schedule.chunks() > model.architecture.num_layers {
            return Err(format!(
                "pipeline is {} with {} chunks per stage; {} has {} layers",
                self.pipeline,
                self.schedule.chunks(),
                model.name,
                model.architecture.num_layers
            ));
        }
        if self.tensor > u64::from(hardware.gpus_per_node) {
            return Err(format!(
                "tensor-parallel is {}, but a node of {} has {} GPUs; a layer is not split over a network",
                self.tensor, hardware.name, hardware.gpus_per_node
            ));
        }
        Ok(())
    }

    /// Blocks of a stage: layers as equally many as possible, what comes before them in the first stage, what comes after in the last.
    pub fn stage_blocks(&self, model: &Model, stage: u64) -> Range<usize> {
        let layers: Vec<usize> =
            (0..model.architecture.blocks.len()).filter(|&b| model.architecture.blocks[b].kind == Kind::Layer).collect();
        let bound = |stage: u64| layers[(stage * layers.len() as u64 / self.pipeline) as usize];
        let start = if stage == 0 { 0 } else { bound(stage) };
        let end = if stage + 1 == self.pipeline { model.architecture.blocks.len() } else { bound(stage + 1) };
        start..end
    }

    /// What a rank of a stage has of the model, with `micro_batches` per step.
    pub fn share(&self, model: &Model, stage: u64, micro_batches: u64) -> Share {
        Share {
            blocks: self.stage_blocks(model, stage),
            tensor: self.tensor,
            sequence: self.sequence,
            in_flight: self.schedule.in_flight(stage, self.pipeline, micro_batches),
        }
    }

    /// Splits a layout over the ranks that hold equal parameters.
    pub fn split(&self, layout: &mut Layout) {
        let part = |numel: u64| numel.div_ceil(self.shards()).next_multiple_of(ALIGN_NUMEL);
        for chunk in &mut layout.chunks {
            if self.zero >= 1 {
                chunk.state_numel = part(chunk.state_numel);
            }
            if self.zero >= 3 {
                chunk.numel = part(chunk.numel);
            }
        }
    }

    /// Device bytes that sharding needs beside a rank's parts: two whole chunks gathered at once, and two whole gradients on their way to
    /// their reduction, or all of them if they are reduced after the last micro-batch.
    pub fn buffer_bytes(&self, whole: &Layout, accumulation: u32) -> u64 {
        if self.shards() == 1 || self.zero == 0 {
            return 0;
        }
        let largest = whole.ids().map(|c| whole.param_bytes(c)).max().unwrap_or(0);
        let gathered = if self.zero >= 3 { 2 * largest } else { 0 };
        let gradients = if self.zero >= 2 {
            2 * largest
        } else if accumulation > 1 {
            whole.ids().map(|c| whole.grad_acc_bytes(c)).sum()
        } else {
            whole.ids().map(|c| whole.grad_bytes(c)).sum()
        };
        gathered + gradients
    }
}
