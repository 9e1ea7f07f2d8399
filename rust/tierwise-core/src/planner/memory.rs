//! The model of device memory: what is alive at every operation of a micro-batch.

use super::activations::Activations;
use super::{PlanError, PlanRequest};
use crate::Tier;
use crate::layout::Layout;
use crate::plan::{ChunkPlan, ClipMode, OptimizerClass};
use crate::trace::{Phase, Trace};

/// A trace and a layout, checked and indexed for the search.
pub(super) struct Memory<'a> {
    pub layout: &'a Layout,
    pub trace: &'a Trace,
    pub accumulation: u32,
    /// Host bytes that chunks may take before something is spilled.
    pub host_budget: u64,
    pub nvme: Option<super::NvmeRequest>,
    pub clip_mode: ClipMode,
    /// Elements with optimizer states.
    pub state_numel: u64,
    /// Per unit: its chunks, each once.
    pub unit_chunks: Vec<Vec<usize>>,
    /// Per chunk: first operation that reads it, `usize::MAX` if none does.
    pub first_use: Vec<usize>,
    /// Chunks by their first use.
    pub forward_order: Vec<usize>,
    /// Per chunk: number of operations that read it.
    pub uses: Vec<u64>,
    /// Per chunk: backward operations, if it has any and is trained.
    backward: Vec<Option<Backward>>,
}

#[derive(Clone, Copy)]
struct Backward {
    first: usize,
    last: usize,
    count: usize,
}

impl<'a> Memory<'a> {
    pub fn new(layout: &'a Layout, trace: &'a Trace, request: &PlanRequest) -> Result<Self, PlanError> {
        let invalid = |message: String| Err(PlanError::Invalid(message));
        if request.accumulation == 0 {
            return invalid("accumulation is 0; a step has at least one micro-batch".to_owned());
        }
        let speeds = &request.speeds;
        for (name, speed) in [
            ("flops", speeds.flops),
            ("h2d_bytes", speeds.h2d_bytes),
            ("d2h_bytes", speeds.d2h_bytes),
            ("host_adam_params", speeds.host_adam_params),
            ("host_params_first", speeds.host_params_first.unwrap_or(1.0)),
            ("device_memory_bytes", speeds.device_memory_bytes),
        ] {
            if speed.is_nan() || speed <= 0.0 {
                return invalid(format!("speed {name} is {speed}; it must be positive"));
            }
        }
        if let Some(nvme) = request.nvme
            && !(nvme.read_bytes > 0.0 && nvme.write_bytes > 0.0)
        {
            return invalid(format!("the disk's speeds are {} and {} bytes/s; they must be positive", nvme.read_bytes, nvme.write_bytes));
        }
        if trace.ops.is_empty() {
            return invalid("the trace has no operations".to_owned());
        }
        if let Some(op) = trace.ops.iter().find(|op| op.unit as usize >= trace.units.len()) {
            return invalid(format!("an operation names unit {}, the trace has {}", op.unit, trace.units.len()));
        }
        let chunks = layout.chunks.len();
        for unit in &trace.units {
            if let Some(chunk) = unit.chunks.iter().find(|c| c.index() >= chunks) {
                return invalid(format!("unit `{}` names chunk {}, the layout has {chunks}", unit.name, chunk.0));
            }
            if !unit.flops.is_finite() || unit.flops < 0.0 {
                return invalid(format!("unit `{}` has {} FLOPs", unit.name, unit.flops));
            }
            if !(0.0..=unit.flops).contains(&unit.tail_flops) {
                return invalid(format!(
                    "unit `{}` leaves out {} of {} FLOPs when it is recomputed",
                    unit.name, unit.tail_flops, unit.flops
                ));
            }
            if unit.offload_bytes > unit.saved_bytes.min(unit.offload_host_bytes) {
                return invalid(format!(
                    "unit `{}` offloads {} of {} saved bytes into {} host bytes; it cannot offload more than either",
                    unit.name, unit.offload_bytes, unit.saved_bytes, unit.offload_host_bytes
                ));
            }
        }
        let unit_chunks: Vec<Vec<usize>> = trace
            .units
            .iter()
            .map(|unit| {
                let mut chunks: Vec<usize> = unit.chunks.iter().map(|c| c.index()).collect();
                chunks.sort_unstable();
                chunks.dedup();
                chunks
            })
            .collect();
        let mut first_use = vec![usize::MAX; chunks];
        let mut uses = vec![0; chunks];
        let mut backward: Vec<Option<Backward>> = vec![None; chunks];
        for (at, op) in trace.ops.iter().enumerate() {
            for &chunk in &unit_chunks[op.unit as usize] {
                first_use[chunk] = first_use[chunk].min(at);
                uses[chunk] += 1;
                if op.phase == Phase::Backward && layout.chunks[chunk].state_numel > 0 {
                    let seen = backward[chunk].get_or_insert(Backward { first: at, last: at, count: 0 });
                    seen.last = at;
                    seen.count += 1;
                }
            }
        }
        // Chunks that are used first get the fastest tier: their gradients come last and their parameters are needed first.
        let mut forward_order: Vec<usize> = (0..chunks).collect();
        forward_order.sort_by_key(|&c| (first_use[c], c));
        let state_numel = layout.chunks.iter().map(|c| c.state_numel).sum();
        let PlanRequest { accumulation, host_budget, nvme, clip_mode, .. } = *request;
        Ok(Memory {
            layout,
            trace,
            accumulation,
            host_budget,
            nvme,
            clip_mode,
            state_numel,
            unit_chunks,
            first_use,
            forward_order,
            uses,
            backward,
        })
    }

    /// What is spilled leaves room for offloaded activations.
    pub fn leave_room(&mut self, levels: &[Activations]) {
        if self.nvme.is_some() {
            let most = levels.iter().map(|activations| activations.host_bytes).max().unwrap_or(0);
            self.host_budget = self.host_budget.saturating_sub(most);
        }
    }

    /// Largest gradient of a host-class chunk that one operation completes: so much may be on its way while the next is produced.
    pub fn in_flight_bytes(&self, chunks: &[ChunkPlan]) -> u64 {
        self.layout
            .ids()
            .filter(|c| self.sends(chunks[c.index()]) && self.backward[c.index()].is_some_and(|b| b.count == 1))
            .map(|c| self.layout.grad_bytes(c))
            .max()
            .unwrap_or(0)
    }

    /// Whether the gradients of a micro-batch leave for the host.
    pub fn sends(&self, placement: ChunkPlan) -> bool {
        placement.class.on_cpu() && !(self.accumulation > 1 && placement.accumulate == Tier::Device)
    }

    /// Gradients alive at every operation, those on their way to the host included, for two limits of the latter.
    pub fn gradients(&self, chunks: &[ChunkPlan], in_flight_bytes: [u64; 2]) -> [Vec<u64>; 2] {
        let ops = self.trace.ops.len();
        let mut born = vec![0; ops + 1];
        let mut gone = vec![0; ops + 1];
        let mut sent = vec![0; ops + 1];
        let mut sent_largest = vec![0; ops + 1];
        for chunk in self.layout.ids() {
            let Some(backward) = self.backward[chunk.index()] else { continue };
            let bytes = self.layout.grad_bytes(chunk);
            born[backward.first] += bytes;
            let placement = chunks[chunk.index()];
            match placement.class {
                OptimizerClass::Device if self.accumulation == 1 => {}
                // Those of the step before wait for their turn on the link, at the latest until the next forward reads the result.
                OptimizerClass::Streamed if self.accumulation == 1 => {
                    born[0] += bytes;
                    gone[self.first_use[chunk.index()] + 1] += bytes;
                }
                OptimizerClass::Frozen => gone[backward.first] += bytes,
                OptimizerClass::Device | OptimizerClass::Streamed | OptimizerClass::Host | OptimizerClass::Nvme => {
                    gone[backward.last + 1] += bytes;
                }
            }
            if self.sends(placement) {
                sent[backward.last + 1] += bytes;
                sent_largest[backward.last + 1] = bytes.max(sent_largest[backward.last + 1]);
            }
        }
        let (mut alive, mut total_sent, mut largest_sent) = (0, 0, 0);
        let mut bytes = [Vec::with_capacity(ops), Vec::with_capacity(ops)];
        for at in 0..ops {
            alive = alive + born[at] - gone[at];
            total_sent += sent[at];
            largest_sent = sent_largest[at].max(largest_sent);
            for (bytes, limit) in bytes.iter_mut().zip(in_flight_bytes) {
                // One gradient may always be on its way, however large.
                bytes.push(alive + limit.max(largest_sent).min(total_sent));
            }
        }
        bytes
    }
}
