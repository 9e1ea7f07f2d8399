//! The plan: where every payload of every chunk lives, what is recomputed, and what each tier will hold.

use crate::layout::Layout;
use crate::{ChunkId, OpId, Tier};
use serde::{Deserialize, Serialize};

/// Version of the schema.
pub const VERSION: u32 = 2;

/// Where the optimizer step of a chunk runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerClass {
    /// States on the device, stepped there.
    Device,
    /// States in pinned host memory that visit the device piece by piece and are stepped there.
    Streamed,
    /// States in pinned host memory, stepped by the CPU.
    Host,
    /// States in the spill file, stepped by the CPU while they pass through staging buffers.
    Nvme,
    /// Nothing to step: every parameter of the chunk is frozen.
    Frozen,
}

impl OptimizerClass {
    /// Whether the optimizer step runs on the device: its result is there, and so are the gradients that it reads.
    pub fn steps_on_device(self) -> bool {
        matches!(self, OptimizerClass::Device | OptimizerClass::Streamed)
    }

    /// Whether the optimizer states have their place in pinned host memory.
    pub fn states_on_host(self) -> bool {
        matches!(self, OptimizerClass::Streamed | OptimizerClass::Host)
    }

    /// Whether the CPU steps it: its gradients leave for the host.
    pub fn on_cpu(self) -> bool {
        matches!(self, OptimizerClass::Host | OptimizerClass::Nvme)
    }
}

/// How the parameters of a chunk reach the compute stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ParamHome {
    /// A device copy at a fixed place for the whole run.
    Resident,
    /// Home in host memory; copied into the streaming slab before each use.
    Streamed,
    /// A device copy at a fixed place, like `Resident`; the authoritative copy lies in the spill file with the states (`Nvme` class only).
    Spilled,
    /// Home in the spill file, with the states (`Nvme` class), or without any (`Frozen`); before each use read from there and copied into the
    /// streaming slab.
    Fetched,
}

impl ParamHome {
    /// Whether the device has a copy at a fixed place.
    pub fn is_resident(self) -> bool {
        matches!(self, ParamHome::Resident | ParamHome::Spilled)
    }

    /// Whether they pass through the streaming slab.
    pub fn is_streamed(self) -> bool {
        matches!(self, ParamHome::Streamed | ParamHome::Fetched)
    }

    /// Whether the authoritative copy lies in the spill file.
    pub fn is_spilled(self) -> bool {
        matches!(self, ParamHome::Spilled | ParamHome::Fetched)
    }
}

/// Placement of one chunk. A chunk that is stepped on the device is always `Resident`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChunkPlan {
    /// Where its optimizer step runs.
    pub class: OptimizerClass,
    /// How its parameters reach the compute stream.
    pub home: ParamHome,
    /// Where the gradients of several micro-batches are added up: always on the device if they are stepped there, a host-class chunk's there
    /// too where its fp32 accumulator fits; it is then sent to the host once per step instead of once per micro-batch. `Nvme`: the sum, or the
    /// gradient where nothing is added up, waits for its step in the spill file (`Nvme` class only).
    pub accumulate: Tier,
}

impl Plan {
    /// Whether the gradients of a chunk are added up on the device, micro-batch by micro-batch.
    pub fn sums_on_device(&self, chunk: ChunkId) -> bool {
        let placement = self.chunks[chunk.index()];
        self.accumulation > 1 && placement.class != OptimizerClass::Frozen && placement.accumulate == Tier::Device
    }
}

impl ChunkPlan {
    /// A placement that adds up gradients where the optimizer step runs.
    pub const fn new(class: OptimizerClass, home: ParamHome) -> Self {
        let accumulate = match class {
            OptimizerClass::Device | OptimizerClass::Streamed => Tier::Device,
            OptimizerClass::Host | OptimizerClass::Nvme | OptimizerClass::Frozen => Tier::Host,
        };
        ChunkPlan { class, home, accumulate }
    }

    /// The same with another place for the sum of gradients.
    #[must_use]
    pub const fn accumulating(self, accumulate: Tier) -> Self {
        ChunkPlan { accumulate, ..self }
    }
}

impl ChunkPlan {
    /// Whether its gradient waits for the step in the spill file.
    pub fn spills_grads(&self) -> bool {
        self.accumulate == Tier::Nvme
    }

    /// Whether host memory holds the gradient until the step.
    pub fn has_host_grads(&self) -> bool {
        self.class.on_cpu() && !self.spills_grads()
    }

    /// Whether host memory holds the parameters.
    pub fn has_host_params(self) -> bool {
        self.home == ParamHome::Streamed || (self.class.on_cpu() && self.home == ParamHome::Resident)
    }
}

/// How what a unit saves for its backward is kept until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationPlan {
    /// On the device.
    Keep,
    /// Not at all: its forward runs again in backward, from its inputs.
    Recompute,
    /// In pinned host memory: copied out in forward, back in backward ahead of its use.
    Offload,
}

/// How gradient clipping and the host optimizer step overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipMode {
    /// Step after the global norm is known, during the next forward.
    Defer,
    /// Step in backward with coefficient 1 behind an undo record.
    Speculate,
    /// `Speculate` while clipping is rare, `Defer` otherwise.
    Auto,
}

/// Bytes of a tier by purpose, at the moment of its peak.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceBytes {
    /// Parameters with a fixed place.
    pub resident_params: u64,
    /// Optimizer states of device-class chunks.
    pub states: u64,
    /// The slab that streamed chunks pass through.
    pub stream_slab: u64,
    /// Buffers that the states of streamed chunks pass through.
    #[serde(default)]
    pub staging: u64,
    /// fp32 accumulators on the device (only with gradient accumulation).
    pub accumulators: u64,
    /// Gradients alive at the peak.
    pub gradients: u64,
    /// Saved activations alive at the peak.
    pub activations: u64,
    /// Room for temporaries that no trace sees.
    pub reserve: u64,
}

impl DeviceBytes {
    /// Sum over all purposes.
    pub fn total(&self) -> u64 {
        let fixed = self.resident_params + self.states + self.stream_slab + self.staging + self.accumulators;
        fixed + self.gradients + self.activations + self.reserve
    }
}

/// Bytes of pinned host memory by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostBytes {
    /// Parameters whose home is the host.
    pub params: u64,
    /// Optimizer states of host-class and streamed chunks.
    pub states: u64,
    /// Kept gradients or fp32 accumulators of host-class chunks.
    pub gradients: u64,
    /// Landing buffers of gradients that are added to accumulators, or go on to the disk.
    pub staging: u64,
    /// Undo records of speculated steps.
    pub undo: u64,
    /// Offloaded activations of one micro-batch.
    #[serde(default)]
    pub activations: u64,
    /// Buffers that spilled states pass through.
    #[serde(default)]
    pub nvme_staging: u64,
}

impl HostBytes {
    /// Sum over all purposes.
    pub fn total(&self) -> u64 {
        self.params + self.states + self.gradients + self.staging + self.undo + self.activations + self.nvme_staging
    }
}

/// Host regions start at multiples of this many bytes, so that pages are never shared between payloads.
pub const HOST_REGION_ALIGN: u64 = 4096;

/// Bytes that one payload of one chunk takes in the host slab.
pub fn host_region_bytes(bytes: u64) -> u64 {
    bytes.next_multiple_of(HOST_REGION_ALIGN)
}

impl HostBytes {
    /// What one chunk keeps in host memory (landing buffers and undo records are shared, so not here).
    pub fn of_chunk(layout: &Layout, chunk: ChunkId, placement: ChunkPlan, accumulation: u32) -> HostBytes {
        let mut bytes = HostBytes::default();
        if placement.has_host_params() {
            bytes.params = host_region_bytes(layout.param_bytes(chunk));
        }
        if placement.class.states_on_host() {
            let numel = layout.chunks[chunk.index()].state_numel;
            // Master completion and both moments are regions of their own.
            bytes.states = host_region_bytes(numel * layout.precision.master_bytes()) + 2 * host_region_bytes(numel * 4);
        }
        if placement.has_host_grads() {
            bytes.gradients = host_region_bytes(layout.final_grad_bytes(chunk, accumulation));
        }
        bytes
    }
}

/// What lies in the spill file, and how it passes through host memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NvmePlan {
    /// Elements of a piece: what is read, stepped and written at once. The last piece of a chunk has fewer.
    pub piece_numel: u64,
    /// The same of a frozen chunk's parameters, which are whole blocks.
    #[serde(default)]
    pub frozen_piece_numel: u64,
    /// Bytes of one staging buffer.
    pub buffer_bytes: u64,
    /// Staging buffers; their bytes are `host.nvme_staging`, together with those of fetches and gradients.
    pub buffers: u32,
    /// Buffers of one piece's parameters each, through which fetched parameters come; 0 where none are.
    #[serde(default)]
    pub fetch_buffers: u32,
    /// Bytes of one of them.
    #[serde(default)]
    pub fetch_buffer_bytes: u64,
    /// Buffers of one piece's gradient (or sum) each, through which spilled gradients come; 0 where none are.
    #[serde(default)]
    pub grad_buffers: u32,
    /// Bytes of one of them.
    #[serde(default)]
    pub grad_buffer_bytes: u64,
    /// Bytes of a block of the spill file.
    pub block_bytes: u64,
    /// Bytes of parameters that a step fetches, all micro-batches and uses together; part of `read_bytes`.
    #[serde(default)]
    pub fetched_bytes: u64,
    /// Bytes of everything that is spilled.
    pub payload_bytes: u64,
    /// Size of the spill file: every piece, and as many again as are rewritten at once.
    pub file_bytes: u64,
    /// Bytes read in every step, at most: a fetched parameter that still lies in the slab is not read again.
    pub read_bytes: u64,
    /// Bytes written in every step.
    pub written_bytes: u64,
    /// Of these, gradients and their sums, written while backward passes run.
    #[serde(default)]
    pub grad_written_bytes: u64,
    /// Of the bytes read, sums of gradients that are read to be added to, while backward passes run.
    #[serde(default)]
    pub grad_read_bytes: u64,
}

impl NvmePlan {
    /// Bytes of host memory that what is spilled passes through.
    pub fn staging_bytes(&self) -> u64 {
        u64::from(self.buffers) * self.buffer_bytes
            + u64::from(self.fetch_buffers) * self.fetch_buffer_bytes
            + u64::from(self.grad_buffers) * self.grad_buffer_bytes
    }
}

/// A fetch that the plan expects: which chunk enters which slot, when it is started and when it is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedFetch {
    /// The chunk.
    pub chunk: crate::ChunkId,
    /// First byte of its slot in the streaming slab.
    pub slot_offset: u64,
    /// Operation at whose start or end the copy is started (position in the cycle).
    pub issued_at: OpId,
    /// Operation that reads it.
    pub needed_at: OpId,
}

/// Fewest buffers in which gradients land: one is filled while another is emptied.
pub const LANDING_BUFFERS: u32 = 2;

/// The same, as the default of plans that do not say it.
pub fn landing_buffers() -> u32 {
    LANDING_BUFFERS
}

/// The plan of a step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Version of this schema.
    pub version: u32,
    /// Placement per chunk.
    pub chunks: Vec<ChunkPlan>,
    /// Per unit: how its activations are kept.
    pub activations: Vec<ActivationPlan>,
    /// Device bytes of offloaded activations that may be alive at once: on their way to the host, or back for the next backwards.
    pub offload_window_bytes: u64,
    /// Bytes of the slab that streamed chunks pass through.
    pub stream_slab_bytes: u64,
    /// Gradients of host-class chunks that may be on their way to the host at once, in bytes.
    pub grad_in_flight_bytes: u64,
    /// What of these nothing else wanted of the device: it lets the training thread run ahead, and is not needed.
    #[serde(default)]
    pub grad_ahead_bytes: u64,
    /// Micro-batches per optimizer step.
    pub accumulation: u32,
    /// How clipping and the host step overlap.
    pub clip_mode: ClipMode,
    /// Bytes of undo records that may be alive at once.
    pub undo_bytes: u64,
    /// Whether host steps write parameters first and moments later, while backward runs: the next forward waits for about a third less
    /// memory traffic, and the moments cost about as much again.
    #[serde(default)]
    pub late_moments: bool,
    /// Buffers in which gradients land that are added to accumulators, or go on to the disk; `host.staging` is theirs.
    #[serde(default = "landing_buffers")]
    pub landing_buffers: u32,
    /// Device memory at the peak, by purpose.
    pub device: DeviceBytes,
    /// Operation at which the device peak is.
    pub device_peak_op: OpId,
    /// Host memory, by purpose.
    pub host: HostBytes,
    /// What is spilled, if anything is.
    #[serde(default)]
    pub nvme: Option<NvmePlan>,
    /// Expected fetches of one steady-state micro-batch.
    pub fetches: Vec<PlannedFetch>,
    /// Predicted seconds of one optimizer step, from the speeds given.
    pub predicted_step_s: f64,
    /// What bounds the predicted step: `compute`, `host_memory` (gradient accumulation), `h2d`, `d2h`, `cpu_adam`, `streamed` or `nvme`.
    pub bound_by: String,
}
