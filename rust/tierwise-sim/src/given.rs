//! A plan that was executed, as a recording names it, and the same plan for the simulator's chunks.

use crate::models::Built;
use serde::{Deserialize, Serialize};
use tierwise_core::plan::{
    ActivationPlan, ChunkPlan, ClipMode, DeviceBytes, HostBytes, OptimizerClass, ParamHome, Plan, host_region_bytes,
};
use tierwise_core::{OpId, Tier};

/// The plan of a recorded run, by names of chunks and units.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct GivenPlan {
    /// Chunks that the host steps.
    pub host_chunks: Vec<String>,
    /// Chunks whose states visit the device from host memory, to be stepped there.
    #[serde(default)]
    pub visiting_chunks: Vec<String>,
    /// Chunks whose gradients of several micro-batches are added up on the device.
    pub device_summed_chunks: Vec<String>,
    /// Chunks whose parameters are streamed.
    pub streamed_chunks: Vec<String>,
    /// Units that are recomputed.
    pub recomputed_units: Vec<String>,
    /// Units whose activations were offloaded to host memory.
    #[serde(default)]
    pub offloaded_units: Vec<String>,
    /// Device bytes of them that were allowed at once.
    #[serde(default)]
    pub offload_window_bytes: u64,
    /// What device memory was planned for.
    #[serde(default)]
    pub device: GivenDevice,
    /// What host memory held.
    #[serde(default)]
    pub host: GivenHost,
    /// Whether outputs of cheap kernels were made again in backward.
    #[serde(default)]
    pub rematerialized: bool,
    /// Bytes of the slab that streamed chunks pass through.
    pub stream_slab_bytes: u64,
    /// Gradients that may be on their way to the host at once, in bytes.
    pub grad_in_flight_bytes: u64,
    /// Bytes of undo records that may be alive at once.
    pub undo_bytes: u64,
    /// Whether host steps wrote moments after parameters.
    #[serde(default)]
    pub late_moments: bool,
    /// Buffers in which gradients landed that were added to sums in host memory.
    #[serde(default = "tierwise_core::plan::landing_buffers")]
    pub landing_buffers: u32,
}

/// Of the device memory that a recorded run had planned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GivenDevice {
    /// What was left for kernels, in bytes: a forward began only when there was so much beside what it keeps.
    #[serde(default)]
    pub reserve: u64,
}

/// The host memory that a recorded run had allocated: a chunk that moved to the device after the first step leaves its regions behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct GivenHost {
    /// Parameters, in bytes.
    #[serde(default)]
    pub params: u64,
    /// Optimizer states, in bytes.
    #[serde(default)]
    pub states: u64,
    /// Gradients, in bytes.
    #[serde(default)]
    pub gradients: u64,
    /// The region of offloaded activations, in bytes.
    #[serde(default)]
    pub activations: u64,
}

impl GivenPlan {
    /// The plan for a model; an error names what the model does not have.
    pub fn plan(&self, built: &Built, accumulation: u32, clip_mode: ClipMode) -> Result<Plan, String> {
        let layout = &built.layout;
        for (what, names) in [
            ("host", &self.host_chunks),
            ("visiting", &self.visiting_chunks),
            ("device-summed", &self.device_summed_chunks),
            ("streamed", &self.streamed_chunks),
        ] {
            if let Some(name) = names.iter().find(|name| layout.chunks.iter().all(|c| c.name != **name)) {
                return Err(format!("the {what} chunk `{name}` is not in the model"));
            }
        }
        for (what, names) in [("recomputed", &self.recomputed_units), ("offloaded", &self.offloaded_units)] {
            if let Some(name) = names.iter().find(|name| built.trace.units.iter().all(|u| u.name != **name)) {
                return Err(format!("the {what} unit `{name}` is not in the model"));
            }
        }
        let has = |names: &[String], name: &str| names.iter().any(|n| n == name);
        let chunks: Vec<ChunkPlan> = layout
            .chunks
            .iter()
            .map(|chunk| ChunkPlan {
                class: match chunk.state_numel {
                    0 => OptimizerClass::Frozen,
                    _ if has(&self.host_chunks, &chunk.name) => OptimizerClass::Host,
                    _ if has(&self.visiting_chunks, &chunk.name) => OptimizerClass::Streamed,
                    _ => OptimizerClass::Device,
                },
                home: if has(&self.streamed_chunks, &chunk.name) { ParamHome::Streamed } else { ParamHome::Resident },
                accumulate: if has(&self.device_summed_chunks, &chunk.name) { Tier::Device } else { Tier::Host },
            })
            .collect();
        let kept = |name: &str| match () {
            () if has(&self.recomputed_units, name) => ActivationPlan::Recompute,
            () if has(&self.offloaded_units, name) => ActivationPlan::Offload,
            () => ActivationPlan::Keep,
        };
        let activations = built.trace.units.iter().map(|unit| kept(&unit.name)).collect();
        let mut plan = Plan {
            version: tierwise_core::plan::VERSION,
            chunks,
            activations,
            offload_window_bytes: self.offload_window_bytes,
            stream_slab_bytes: self.stream_slab_bytes,
            grad_in_flight_bytes: self.grad_in_flight_bytes,
            grad_ahead_bytes: 0,
            accumulation,
            clip_mode,
            undo_bytes: self.undo_bytes,
            late_moments: self.late_moments,
            landing_buffers: self.landing_buffers,
            device: DeviceBytes { stream_slab: self.stream_slab_bytes, ..DeviceBytes::default() },
            device_peak_op: OpId(0),
            host: HostBytes { undo: host_region_bytes(self.undo_bytes), activations: self.host.activations, ..HostBytes::default() },
            nvme: None,
            fetches: Vec::new(),
            predicted_step_s: 0.0,
            bound_by: String::new(),
        };
        plan.device.staging = tierwise_core::streaming::staging_bytes(layout, &plan.chunks);
        let mut largest = 0;
        for chunk in layout.ids() {
            let placed = plan.chunks[chunk.index()];
            let on_host = HostBytes::of_chunk(layout, chunk, placed, accumulation);
            plan.host.params += on_host.params;
            plan.host.states += on_host.states;
            plan.host.gradients += on_host.gradients;
            if placed.home == ParamHome::Resident {
                plan.device.resident_params += layout.param_bytes(chunk);
            }
            if placed.class == OptimizerClass::Device {
                plan.device.states += layout.state_bytes(chunk);
            }
            if plan.sums_on_device(chunk) {
                plan.device.accumulators += layout.grad_acc_bytes(chunk);
            } else if placed.class == OptimizerClass::Host {
                largest = layout.grad_bytes(chunk).max(largest);
            }
        }
        if accumulation > 1 {
            plan.host.staging = u64::from(self.landing_buffers) * host_region_bytes(largest);
        }
        plan.host.params = plan.host.params.max(self.host.params);
        plan.host.states = plan.host.states.max(self.host.states);
        plan.host.gradients = plan.host.gradients.max(self.host.gradients);
        Ok(plan)
    }
}
