//! The settings of a step, as options.

use super::output::{Failure, usage};
use crate::hardware::Hardware;
use crate::models::Model;
use crate::parallel::Parallel;
use crate::peers::Policy;
use crate::pipeline::Schedule;
use crate::recorded;
use crate::request::{Memory, Plans, Request};
use crate::units::parse_bytes;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use std::path::Path;
use tierwise_core::plan::ClipMode;
use tierwise_core::planner::{Offload, Recompute};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RecomputeArg {
    Auto,
    None,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OffloadArg {
    Auto,
    None,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ClipModeArg {
    Defer,
    Speculate,
    Auto,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScheduleArg {
    Gpipe,
    #[value(name = "1f1b")]
    OneFOneB,
    Interleaved,
    ZeroBubble,
}

/// Another system's policy, or none for ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PolicyArg(pub Option<Policy>);

impl PolicyArg {
    const ALL: [PolicyArg; Policy::ALL.len() + 1] = {
        let mut all = [PolicyArg(None); Policy::ALL.len() + 1];
        let mut at = 0;
        while at < Policy::ALL.len() {
            all[at + 1] = PolicyArg(Some(Policy::ALL[at]));
            at += 1;
        }
        all
    };
}

impl ValueEnum for PolicyArg {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.map_or("tierwise", Policy::name)))
    }
}

#[derive(Debug, Args)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches of the command line")]
pub struct StepArgs {
    /// Name of a model, or the path of a Hugging Face config.json.
    #[arg(long)]
    pub model: String,
    /// Name of a machine, or the path of a JSON file with its figures.
    #[arg(long, default_value = "h100")]
    pub hardware: String,
    /// Name of a network that replaces the machine's own.
    #[arg(long)]
    pub network: Option<String>,
    /// Whose code runs the step.
    #[arg(long, value_enum, default_value = "tierwise")]
    pub policy: PolicyArg,
    /// GPUs in all.
    #[arg(long, default_value_t = 1)]
    pub gpus: u64,
    /// Ranks that split every layer's matrices.
    #[arg(long, default_value_t = 1)]
    pub tensor_parallel: u64,
    /// Ranks that split every sequence (all-to-all around attention).
    #[arg(long, default_value_t = 1)]
    pub sequence_parallel: u64,
    /// Pipeline stages.
    #[arg(long, default_value_t = 1)]
    pub pipeline: u64,
    /// Order of the micro-batches in the pipeline.
    #[arg(long, value_enum, default_value = "1f1b")]
    pub schedule: ScheduleArg,
    /// Parts of the model per stage, for the interleaved schedule.
    #[arg(long, default_value_t = 2)]
    pub chunks_per_stage: u64,
    /// What data-parallel ranks split, for policy tierwise: 0 nothing, 1 optimizer states, 2 gradients too, 3 parameters too.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(0..=3))]
    pub zero: u8,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 4096)]
    pub seq: u64,
    /// Sequences of a micro-batch of a data-parallel rank.
    #[arg(long, default_value_t = 1)]
    pub micro_batch: u64,
    /// Tokens of an optimizer step; one micro-batch per rank if left out.
    #[arg(long)]
    pub tokens_per_step: Option<u64>,
    /// Limit of device memory per GPU, such as 80GB or 75GiB; what the machine has if left out.
    #[arg(long, value_parser = parse_bytes)]
    pub device_budget: Option<u64>,
    /// Limit of host memory per GPU; its share of what the machine has if left out.
    #[arg(long, value_parser = parse_bytes)]
    pub host_budget: Option<u64>,
    /// Limit of the spill file per GPU, on a machine with an NVMe disk; nothing is spilled if left out.
    #[arg(long, value_parser = parse_bytes)]
    pub nvme_budget: Option<u64>,
    /// Device memory kept free for the CUDA context, workspaces and fragmentation.
    #[arg(long, value_parser = parse_bytes, default_value = "2GB")]
    pub reserve: u64,
    /// Which layers are recomputed in backward.
    #[arg(long, value_enum, default_value = "auto")]
    pub recompute: RecomputeArg,
    /// Recomputation runs a layer's whole forward, as reentrant checkpoints and torch before 2.1 do, instead of stopping at the last tensor that
    /// backward needs.
    #[arg(long)]
    pub recompute_whole: bool,
    /// Norms, rotary embeddings, activations and the loss run operation by operation instead of as fused kernels.
    #[arg(long)]
    pub eager_kernels: bool,
    /// Which layers' activations are offloaded to host memory.
    #[arg(long, value_enum, default_value = "none")]
    pub offload_activations: OffloadArg,
    /// Another system's host buffers are not pinned.
    #[arg(long)]
    pub pageable: bool,
    /// Share of the parameters that the CPU steps under policy zero3-offload (the ratio of DeepSpeed's Twin-Flow).
    #[arg(long, default_value_t = 1.0, value_parser = share)]
    pub cpu_share: f64,
    /// How clipping and the host's optimizer step overlap.
    #[arg(long, value_enum, default_value = "defer")]
    pub clip_mode: ClipModeArg,
    /// Assume that no step is clipped; otherwise every one is.
    #[arg(long)]
    pub never_clips: bool,
}

impl StepArgs {
    /// The request that the options describe.
    pub fn request(&self) -> Result<Request, Failure> {
        let model = find_model(&self.model)?;
        let model = if self.eager_kernels { model.eager() } else { model };
        let hardware = find_hardware(&self.hardware, self.network.as_deref())?;
        let parallel = Parallel {
            gpus: self.gpus,
            tensor: self.tensor_parallel,
            sequence: self.sequence_parallel,
            pipeline: self.pipeline,
            schedule: match self.schedule {
                ScheduleArg::Gpipe => Schedule::Gpipe,
                ScheduleArg::OneFOneB => Schedule::OneFOneB,
                ScheduleArg::Interleaved => Schedule::Interleaved(self.chunks_per_stage.max(1)),
                ScheduleArg::ZeroBubble => Schedule::ZeroBubble,
            },
            zero: self.zero,
        };
        parallel.check(&model, &hardware, self.seq).map_err(usage)?;
        let share = hardware.per_gpu(parallel.gpus_on_node(&hardware));
        let one_each = self.seq.saturating_mul(self.micro_batch).saturating_mul(parallel.data());
        Ok(Request {
            seq: self.seq,
            micro_batch: self.micro_batch,
            tokens_per_step: self.tokens_per_step.unwrap_or(one_each),
            device_budget: self.device_budget.unwrap_or(hardware.device_memory_bytes),
            host_budget: self.host_budget.unwrap_or(share.host_memory_bytes),
            memory: Memory::Reserve(self.reserve),
            nvme_budget: self.nvme_budget.unwrap_or(0),
            recompute: match self.recompute {
                RecomputeArg::Auto => Recompute::Auto,
                RecomputeArg::None => Recompute::None,
                RecomputeArg::Full => Recompute::Full,
            },
            recompute_whole: self.recompute_whole,
            plans: Plans::Compared,
            offload: match self.offload_activations {
                OffloadArg::Auto => Offload::Auto,
                OffloadArg::None => Offload::None,
                OffloadArg::Full => Offload::Full,
            },
            pageable: self.pageable,
            cpu_share: self.cpu_share,
            clip_mode: match self.clip_mode {
                ClipModeArg::Defer => ClipMode::Defer,
                ClipModeArg::Speculate => ClipMode::Speculate,
                ClipModeArg::Auto => ClipMode::Auto,
            },
            clips: !self.never_clips,
            policy: self.policy.0,
            parallel,
            model,
            hardware,
        })
    }
}

fn share(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).ok_or_else(|| format!("`{text}` is not a number between 0 and 1"))
}

pub fn find_model(name: &str) -> Result<Model, Failure> {
    recorded::find_model(name).map_err(usage)
}

pub fn find_hardware(name: &str, network: Option<&str>) -> Result<Hardware, Failure> {
    recorded::find_hardware(name, network, Path::new("")).map_err(usage)
}
