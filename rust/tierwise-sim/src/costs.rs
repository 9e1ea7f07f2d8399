//! How long every unit takes on a machine, and the speeds that the planner weighs.

use crate::collectives::Group;
use crate::hardware::Hardware;
use crate::models::{Built, Work};
use tierwise_core::planner::Speeds;

/// Host memory bytes that one bf16 parameter's Adam step moves: gradient in, parameter and states in and out.
pub const ADAM_BYTES_PER_PARAM: f64 = 26.0;

/// Nanoseconds per unit of one micro-batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Costs {
    /// Forward, or a recomputation.
    pub forward_ns: Vec<u64>,
    /// Backward without recomputation.
    pub backward_ns: Vec<u64>,
}

impl Costs {
    /// Compute-bound kernels and element-wise kernels one after the other; backward does everything twice.
    pub fn new(built: &Built, hardware: &Hardware) -> Self {
        let ns = |work: &Work, times: f64, matmul: f64, attention: f64| {
            let seconds =
                work.matmul_flops / matmul + work.attention_flops / attention + work.memory_bytes / hardware.device_memory_bytes_per_s;
            (times * seconds * 1e9).round() as u64
        };
        let forward = |w| ns(w, 1.0, hardware.matmul_forward_flops, hardware.attention_forward_flops);
        let backward = |w| ns(w, 2.0, hardware.matmul_backward_flops, hardware.attention_backward_flops);
        Costs { forward_ns: built.work.iter().map(forward).collect(), backward_ns: built.work.iter().map(backward).collect() }
    }

    /// Adds the exchanges inside units, which compute waits for. A reduction over tensor-parallel ranks is a reduce-scatter and an all-gather;
    /// attention over a split sequence exchanges queries, keys and values before and its output after. Backward does the same.
    pub fn add_exchanges(&mut self, built: &Built, tensor: &Group, sequence: &Group) {
        for (unit, work) in built.work.iter().enumerate() {
            let reductions = work.reductions.max(1);
            let reduced = 2 * reductions * tensor.all_gather_ns(work.reduced_bytes / reductions as f64);
            let exchanged = 2 * sequence.all_to_all_ns(work.exchanged_bytes / 2.0);
            self.forward_ns[unit] += reduced + exchanged;
            self.backward_ns[unit] += reduced + exchanged;
        }
    }

    /// Speeds at which the planner's formulas agree with these costs.
    pub fn speeds(&self, built: &Built, hardware: &Hardware) -> Speeds {
        let flops: f64 = built.trace.units.iter().map(|u| 3.0 * u.flops).sum();
        let ns: u64 = self.forward_ns.iter().chain(&self.backward_ns).sum();
        // Each stepped parameter is also copied to the device, through the same memory.
        let through_memory = hardware.host_memory_bytes_per_s / (ADAM_BYTES_PER_PARAM + 2.0);
        Speeds {
            flops: flops / ns.max(1) as f64 * 1e9,
            h2d_bytes: hardware.h2d_duplex_bytes_per_s,
            d2h_bytes: hardware.d2h_duplex_bytes_per_s,
            host_adam_params: hardware.host_adam_params_per_s.min(through_memory),
            device_memory_bytes: hardware.device_memory_bytes_per_s,
        }
    }
}
