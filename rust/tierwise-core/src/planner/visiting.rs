//! Chunks whose states visit the device: how many, which, and what that costs beside the host's own steps.

use super::memory::Memory;
use super::placement::Cost;
use super::{HOST_ADAM_BYTES, PlanError, Speeds};
use crate::plan::{ChunkPlan, OptimizerClass, ParamHome};
use crate::streaming::Spread;

/// Shares of the states in host memory that the search lets visit the device. The best one makes the link, the CPU and host memory finish
/// together; where less has to be streamed because the rest hides behind compute, half of it leaves the link to others.
pub(super) fn shares(memory: &Memory, speeds: &Speeds) -> Vec<f64> {
    // While the link carries the states of one element both ways, host memory has room for so many elements of the CPU's.
    let states = memory.layout.precision.state_bytes() as f64;
    let link = states / speeds.h2d_bytes.min(speeds.d2h_bytes);
    let beside = (speeds.host_adam_params * link - 2.0 * states / HOST_ADAM_BYTES).max(0.0);
    let best = 1.0 / (1.0 + beside);
    // Accumulation adds a level to the search, and its steps are rarer.
    if memory.accumulation == 1 { vec![0.0, best / 2.0, best] } else { vec![0.0, best] }
}

/// Lets a share of the elements of these chunks (host-class, resident, in forward order) visit the device, spread evenly, so that the link
/// and the CPU both keep to their deadlines. Gives whether any does.
pub(super) fn spread(memory: &Memory, chunks: &[usize], share: f64, placements: &mut [ChunkPlan]) -> bool {
    let mut spread = Spread::new(share);
    let mut any = false;
    for &chunk in chunks {
        if spread.next(memory.layout.chunks[chunk].state_numel) {
            placements[chunk] = ChunkPlan::new(OptimizerClass::Streamed, ParamHome::Resident);
            any = true;
        }
    }
    any
}

/// The same for the share of all states in host memory that the user asks for.
pub(super) fn fixed(memory: &Memory, forward_order: &[usize], frac: f64, placements: &mut [ChunkPlan]) -> Result<(), PlanError> {
    if !(0.0..=1.0).contains(&frac) {
        return Err(PlanError::Invalid(format!("stream_optim_frac is {frac}; it must be between 0 and 1")));
    }
    let numel = |c: &usize| memory.layout.chunks[*c].state_numel;
    let on_host: Vec<usize> = forward_order.iter().copied().filter(|&c| placements[c].class == OptimizerClass::Host).collect();
    let resident: Vec<usize> = on_host.iter().copied().filter(|&c| placements[c].home == ParamHome::Resident).collect();
    let total: u64 = on_host.iter().map(numel).sum();
    let possible: u64 = resident.iter().map(numel).sum();
    let asked = (frac * total as f64).round() as u64;
    if asked > possible {
        return Err(PlanError::Invalid(format!(
            "stream_optim_frac={frac} asks for {asked} of the {total} elements with optimizer states in host memory, but only {possible} belong \
             to chunks whose parameters stay on the device; lower stream_optim_frac or offload_param_frac"
        )));
    }
    if asked > 0 {
        spread(memory, &resident, asked as f64 / possible as f64, placements);
    }
    Ok(())
}

/// Seconds that the optimizer steps of states in host memory take, from the decision on.
pub(super) struct OffDevice {
    /// Of host memory: the CPU's own steps and the states that pass through.
    memory: f64,
    /// Of the busier direction of the link.
    link: f64,
}

impl OffDevice {
    /// The CPU's `own` steps take so long, or the pass of them that the forward waits for. What was `speculated` is done before the decision;
    /// activations that the forward sends to the host share the way out.
    pub fn new(cost: &Cost, speeds: &Speeds, own: f64, speculated: f64, activation_bytes: u64) -> Self {
        // The states are read once and written once.
        let visiting = 2.0 * cost.visiting_bytes as f64 / (speeds.host_adam_params * HOST_ADAM_BYTES);
        let memory = own - speculated + visiting;
        if cost.visiting_numel == 0 {
            return OffDevice { memory, link: 0.0 };
        }
        // Parameters that the CPU rewrote, and about half of those that are fetched for this micro-batch, share the way in.
        let beside = cost.refresh_bytes + cost.stream_bytes / 2;
        let h2d = (cost.visiting_bytes + beside) as f64 / speeds.h2d_bytes;
        let d2h = (cost.visiting_bytes + activation_bytes) as f64 / speeds.d2h_bytes;
        OffDevice { memory, link: h2d.max(d2h) }
    }

    /// Until the last one is done.
    pub fn seconds(&self) -> f64 {
        self.memory.max(self.link)
    }

    /// Which of them takes longer.
    pub fn bound_by(&self) -> &'static str {
        if self.link > self.memory { "streamed" } else { "cpu_adam" }
    }
}
