//! The formulas: seconds of a step with one placement, and what bounds it.

use super::activations::Activations;
use super::memory::Memory;
use super::placement::Row;
use super::{HOST_ADAM_BYTES, PlanRequest, late, spill, visiting};
use crate::plan::{ClipMode, HostBytes};

/// Seconds of backward that hide a second of host steps where these are speculated. An undo record makes them half as long again by its
/// traffic, and nothing is hidden before the first gradient has landed or after the step is committed. With this figure the plans that the
/// executor finds fastest are among the first (docs/performance.md, "Undo records past the caches").
const SPECULATION_COST: f64 = 3.3;

/// Bytes of device memory traffic of one optimizer step per parameter.
const OPTIMIZER_BYTES: f64 = 26.0;

/// Predicted seconds of a step.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub seconds: f64,
    pub bound_by: &'static str,
    /// Landing buffers, if moments are late.
    pub late: Option<u32>,
}

/// A placement with what else the search has fixed.
#[derive(Clone, Copy)]
pub(super) struct Point<'a> {
    pub memory: &'a Memory<'a>,
    pub activations: &'a Activations,
    pub row: &'a Row,
    pub slab: u64,
    /// From this slab size on, the next chunk can be fetched while one is in use.
    pub prefetch_slab: u64,
    /// Whether only one gradient may be on its way.
    pub tight: bool,
    pub request: &'a PlanRequest,
}

impl Point<'_> {
    /// Seconds of a step, with late moments where they make it faster.
    pub fn predict(&self) -> Step {
        let possible = self.request.clip_mode == ClipMode::Defer && self.row.nvme.is_none() && self.row.cost.host_numel > 0;
        if let Some(late) = self.request.late_moments {
            return self.predict_with(late && possible);
        }
        let whole = self.predict_with(false);
        let late = possible.then(|| self.predict_with(true));
        late.filter(|late| late.seconds < whole.seconds).unwrap_or(whole)
    }

    /// Seconds of a step: the slowest of compute (or host memory) with what cannot hide behind it, and either direction of the link.
    fn predict_with(&self, late: bool) -> Step {
        let Point { memory, activations, row, slab, prefetch_slab, tight, request } = *self;
        let speeds = &request.speeds;
        let accumulation = f64::from(request.accumulation);
        let micro_batch = activations.total_flops / speeds.flops;
        // What is stepped or added up on the host costs the device about as much in copies as it would there.
        let optimizer = memory.state_numel as f64 * OPTIMIZER_BYTES / speeds.device_memory_bytes;
        // A gradient is read, its accumulator read and written.
        let add_bytes = memory.layout.precision.grad_bytes() + 2 * memory.layout.sum_bytes();
        let added = if request.accumulation > 1 { memory.state_numel as f64 * add_bytes as f64 / speeds.device_memory_bytes } else { 0.0 };
        let compute = accumulation * (micro_batch + added) + optimizer;
        // Adding to accumulators in host memory runs beside compute and the fetches, and no micro-batch is over before its own is.
        let host_memory = speeds.host_adam_params * HOST_ADAM_BYTES;
        let accumulate = if row.cost.grad_bytes > 0 && request.accumulation > 1 {
            accumulation * (row.cost.accumulate_bytes + row.cost.stream_bytes) as f64 / host_memory
        } else {
            0.0
        };
        // A deferred host step hides behind the first forward only, a speculated one behind the last backward too.
        let forward = activations.forward_flops / speeds.flops;
        // Beside a disk, host memory has no room for undo records to count on.
        let speculated = if request.clip_mode == ClipMode::Defer || row.undo_bytes == 0 || row.nvme.is_some() {
            0.0
        } else {
            let share = (request.host_budget - row.host.total() - activations.host_bytes) as f64 / row.undo_bytes as f64;
            let in_backward = (micro_batch - forward) / SPECULATION_COST;
            (share.min(1.0) * row.cost.host_numel as f64 / speeds.host_adam_params).min(in_backward)
        };
        let whole = row.cost.host_numel as f64 / speeds.host_adam_params;
        let passes = late::Passes::new(memory.layout, request.accumulation, speeds);
        let own = if late { whole * passes.params } else { whole };
        let off_device = visiting::OffDevice::new(&row.cost, speeds, own, speculated, activations.host_bytes);
        let adam = (off_device.seconds() - forward).max(0.0);
        let moments = if late { whole * passes.moments } else { 0.0 };
        let lag = late.then(|| {
            // The first micro-batch writes its sums without reading them.
            let added = if request.accumulation > 1 { row.cost.accumulate_bytes / 2 + row.cost.grad_bytes } else { 0 };
            let times = late::Times {
                forward,
                backward: micro_batch - forward,
                params: off_device.seconds(),
                moments,
                added: added as f64 / host_memory,
            };
            let host = HostBytes { activations: activations.host_bytes, ..row.host };
            let room = request.host_budget.saturating_sub(host.total());
            late::Lag::new(row, &times, request.accumulation, &host, room, row.cost.host_numel as f64 / memory.state_numel as f64)
        });
        let accumulate = if request.accumulation > 1 { accumulate + moments } else { accumulate };
        let lagging = lag.map_or(0.0, |lag| lag.seconds.max(0.0));
        // Sums leave for the host during the last backward.
        let late_sums = (row.cost.sum_bytes as f64 / speeds.d2h_bytes - (micro_batch - forward)).max(0.0);
        let stream = accumulation * row.cost.stream_bytes as f64 / speeds.h2d_bytes;
        // The disk reads and writes what is stepped while the first forward waits for it, chunk by chunk. Gradients land there, or are added up,
        // while each backward waits for room.
        let (disk, late_grads) = match (&row.nvme, &request.nvme) {
            (Some(plan), Some(nvme)) => {
                let landing = spill::landing_seconds(plan, nvme);
                let late = (landing - accumulation * (micro_batch - forward)).max(0.0);
                // What is fetched comes while all micro-batches compute; it bounds the step only as far as the disk is always busy.
                ((spill::seconds(plan, nvme) - landing - spill::fetching_seconds(plan, nvme) - forward).max(0.0), late)
            }
            _ => (0.0, 0.0),
        };
        let moved = accumulation * activations.host_bytes as f64;
        let h2d = stream + ((row.cost.refresh_bytes + row.cost.visiting_bytes) as f64 + moved) / speeds.h2d_bytes;
        let grads = accumulation * row.cost.grad_bytes as f64 / speeds.d2h_bytes;
        let d2h = grads + ((row.cost.sum_bytes + row.cost.visiting_bytes) as f64 + moved) / speeds.d2h_bytes;
        // Without room for the next chunk, or for a gradient on its way, copies wait for compute and compute for copies.
        let stalled_h2d = accumulation * activations.stall.returning + if slab < prefetch_slab { stream } else { 0.0 };
        let stalled_d2h = accumulation * activations.stall.leaving + late_sums + if tight { grads } else { 0.0 };
        // Parameters that are fetched from the disk, and gradients that wait there, share it with the states, all step long.
        let disk_busy = match (&row.nvme, &request.nvme) {
            (Some(plan), Some(nvme)) if plan.fetch_buffers > 0 || plan.grad_buffers > 0 => spill::seconds(plan, nvme),
            _ => 0.0,
        };
        let serial = (compute + lagging).max(accumulate) + adam.max(disk) + late_grads + stalled_h2d + stalled_d2h;
        let seconds = serial.max(h2d).max(d2h).max(disk_busy);
        let bound_by = if seconds > serial {
            if seconds > h2d.max(d2h) {
                "nvme"
            } else if h2d >= d2h {
                "h2d"
            } else {
                "d2h"
            }
        } else {
            [
                ("nvme", disk + late_grads),
                (off_device.bound_by(), adam + lagging),
                ("host_memory", accumulate),
                ("h2d", stalled_h2d),
                ("d2h", stalled_d2h),
            ]
            .into_iter()
            .filter(|(name, seconds)| *seconds > 0.0 && (*name == off_device.bound_by() || *name == "nvme" || *seconds > compute))
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map_or("compute", |(name, _)| name)
        };
        Step { seconds, bound_by, late: lag.map(|lag| lag.buffers) }
    }
}
