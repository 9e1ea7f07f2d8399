//! What is asked, and one rank's view of it.

use crate::collectives::Group;
use crate::costs::Costs;
use crate::executor::SimError;
use crate::given::GivenPlan;
use crate::hardware::Hardware;
use crate::models::{Built, Model, Share};
use crate::parallel::Parallel;
use crate::peers::Policy;
use serde::Serialize;
use tierwise_core::plan::ClipMode;
use tierwise_core::planner::{Offload, Placement, Recompute};

/// What to simulate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The model.
    pub model: Model,
    /// The node.
    pub hardware: Hardware,
    /// How many GPUs, and how they divide the work.
    pub parallel: Parallel,
    /// Whose code runs the step; ours if none is given.
    pub policy: Option<Policy>,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a micro-batch of a data-parallel rank.
    pub micro_batch: u64,
    /// Tokens of an optimizer step, a multiple of `seq * micro_batch` times the data-parallel ranks.
    pub tokens_per_step: u64,
    /// Hard limit of device memory per GPU, in bytes.
    pub device_budget: u64,
    /// Hard limit of host memory per GPU, in bytes.
    pub host_budget: u64,
    /// Hard limit of the spill file per GPU, in bytes; 0: nothing is spilled.
    pub nvme_budget: u64,
    /// How memory is divided, and what is counted for kernels' own.
    pub memory: Memory,
    /// Which layers recompute.
    pub recompute: Recompute,
    /// Whether a recomputation runs a layer's whole forward, instead of stopping at the last tensor that backward needs.
    pub recompute_whole: bool,
    /// Which of the planner's plans is taken.
    pub plans: Plans,
    /// Which layers' activations are offloaded to host memory.
    pub offload: Offload,
    /// Whether a peer's host buffers are not pinned.
    pub pageable: bool,
    /// Share of the parameters that the CPU steps under policy `zero3-offload` (Twin-Flow's ratio).
    pub cpu_share: f64,
    /// Clipping mode.
    pub clip_mode: ClipMode,
    /// Whether the gradient norm is above its limit in every step.
    pub clips: bool,
}

/// Which of the planner's plans is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plans {
    /// The first, by its formulas.
    First,
    /// Of its best ones that whose step is executed fastest, as the plugin does.
    Compared,
}

/// How memory is divided.
#[derive(Debug, Clone, PartialEq)]
pub enum Memory {
    /// By the planner, with so many device bytes kept free for what no trace sees.
    Reserve(u64),
    /// By fractions; what kernels need for themselves is counted where they run.
    Placed(Placement),
    /// As a recorded run did; what kernels need for themselves is counted where they run.
    Given(GivenPlan),
}

impl Memory {
    /// Device bytes kept free for the whole step.
    pub fn reserve_bytes(&self) -> u64 {
        match self {
            Memory::Reserve(bytes) => *bytes,
            Memory::Placed(_) | Memory::Given(_) => 0,
        }
    }
}

/// A request that contradicts itself.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The request contradicts itself.
    #[error("{0}")]
    Usage(String),
    /// A plan that the executor could not follow: a defect.
    #[error("the plan could not be executed: {0}")]
    Execution(SimError),
}

/// What was asked for, as the reports repeat it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asked {
    /// Name of the model.
    pub model: String,
    /// Exact number of parameters.
    pub num_params: u64,
    /// Name of the machine.
    pub hardware: String,
    /// Whose code runs the step.
    pub policy: &'static str,
    /// How many GPUs, and how they divide the work.
    pub parallel: Parallel,
    /// Data-parallel ranks.
    pub data_parallel: u64,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a micro-batch of a data-parallel rank.
    pub micro_batch: u64,
    /// Micro-batches per optimizer step.
    pub accumulation: u32,
    /// Tokens of an optimizer step.
    pub tokens_per_step: u64,
    /// Hard limit of device memory per GPU, in bytes.
    pub device_budget_bytes: u64,
    /// Hard limit of host memory per GPU, in bytes.
    pub host_budget_bytes: u64,
    /// Hard limit of the spill file per GPU, in bytes.
    pub nvme_budget_bytes: u64,
}

impl Request {
    /// Micro-batches per optimizer step.
    pub fn accumulation(&self) -> Result<u32, Error> {
        if self.seq == 0 || self.micro_batch == 0 {
            return Err(Error::Usage("seq and micro-batch must be at least 1".to_owned()));
        }
        let data = self.parallel.data();
        let micro_batch = self.seq.saturating_mul(self.micro_batch).saturating_mul(data);
        if self.tokens_per_step == 0 || !self.tokens_per_step.is_multiple_of(micro_batch) {
            let ranks = if data == 1 { String::new() } else { " * data-parallel ranks".to_owned() };
            return Err(Error::Usage(format!(
                "tokens-per-step is {}; it must be a multiple of seq * micro-batch{ranks} = {micro_batch}",
                self.tokens_per_step
            )));
        }
        // A step is a few events per micro-batch and layer: more than this many would only take longer.
        match u32::try_from(self.tokens_per_step / micro_batch) {
            Ok(count) if count <= 4096 && self.seq.saturating_mul(self.micro_batch) <= 1 << 30 => Ok(count),
            _ => Err(Error::Usage(format!(
                "{} micro-batches of {micro_batch} tokens; at most 4096 of 2^30 per rank are simulated",
                self.tokens_per_step / micro_batch
            ))),
        }
    }

    /// What the reports repeat.
    pub fn asked(&self) -> Result<Asked, Error> {
        Ok(Asked {
            model: self.model.name.clone(),
            num_params: self.model.num_params(),
            hardware: self.hardware.name.clone(),
            policy: self.policy.map_or("tierwise", Policy::name),
            parallel: self.parallel,
            data_parallel: self.parallel.data(),
            seq: self.seq,
            micro_batch: self.micro_batch,
            accumulation: self.accumulation()?,
            tokens_per_step: self.tokens_per_step,
            device_budget_bytes: self.device_budget,
            host_budget_bytes: self.host_budget,
            nvme_budget_bytes: self.nvme_budget,
        })
    }
}

/// One rank of a pipeline stage: its part of the model, not yet split over the ranks that hold equal parameters, and its machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Rank {
    /// Chunks, units and work.
    pub built: Built,
    /// Durations of the units, exchanges inside them included.
    pub costs: Costs,
    /// Its share of the node.
    pub hardware: Hardware,
    /// Ranks that reduce gradients.
    pub data: Group,
}

impl Rank {
    /// The rank of a stage.
    pub fn new(request: &Request, stage: u64) -> Result<Self, Error> {
        let parallel = &request.parallel;
        parallel.check(&request.model, &request.hardware, request.seq).map_err(Error::Usage)?;
        let share: Share = parallel.share(&request.model, stage, u64::from(request.accumulation()?));
        let mut built = request.model.build_share(request.seq, request.micro_batch, &share);
        let hardware = request.hardware.per_gpu(parallel.gpus_on_node(&request.hardware));
        let group = |made: Result<Group, String>| made.map_err(Error::Usage);
        let mut costs = Costs::new(&built, &hardware);
        costs.add_exchanges(&built, &group(parallel.tensor_group(&request.hardware))?, &group(parallel.sequence_group(&request.hardware))?);
        if request.recompute_whole {
            costs.recompute_whole();
            built.trace.units.iter_mut().for_each(|unit| unit.tail_flops = 0.0);
        }
        Ok(Rank { built, costs, hardware, data: group(parallel.data_group(&request.hardware))? })
    }
}
