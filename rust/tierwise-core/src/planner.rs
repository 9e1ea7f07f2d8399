//! The planner: turns a trace, a layout and hard budgets into a plan.
//!
//! The search has five levels: how activations are kept, how many chunks are streamed, the size of the slab, which share of the states in
//! host memory visits the device to be stepped there, and how many chunks have their states on the device; with gradient accumulation also
//! how many host-stepped chunks add up their gradients there. Each further chunk with
//! states on the device needs more device memory, less host memory and never more time, so that level is a bisection. A larger budget only
//! adds choices, so it never predicts a slower step.

mod activations;
mod dry_run;
mod late;
mod memory;
mod placement;
mod predict;
mod spill;
mod visiting;

use crate::Tier;
use crate::layout::Layout;
use crate::plan::{ChunkPlan, ClipMode, DeviceBytes, HostBytes, LANDING_BUFFERS, NvmePlan, Plan, host_region_bytes};
use crate::trace::Trace;
use activations::Activations;
use memory::Memory;
use placement::{Group, Row};
use predict::{Point, Step};
use serde::{Deserialize, Serialize};

/// Sustained speeds that the search weighs against each other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speeds {
    /// Floating-point operations per second of the device.
    pub flops: f64,
    /// Host-to-device bytes per second while the other direction is busy too.
    pub h2d_bytes: f64,
    /// Device-to-host bytes per second while the other direction is busy too.
    pub d2h_bytes: f64,
    /// Parameters per second that the host steps.
    pub host_adam_params: f64,
    /// Parameters per second of the first pass where moments are written later; by its share of the memory traffic if it was not measured.
    #[serde(default)]
    pub host_params_first: Option<f64>,
    /// Bytes per second of the device's own memory.
    pub device_memory_bytes: f64,
}

/// Who chooses the placement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Placement {
    /// The planner: the fastest plan within the budgets.
    Auto,
    /// The user, by fractions of the model's elements.
    Static {
        /// Share of parameters that need not be kept whole on the device; only those can be offloaded.
        shard_param_frac: f64,
        /// Share of optimizer states in host memory (latest-used chunks first).
        offload_optim_frac: f64,
        /// Share of parameters streamed from host memory; at most `shard_param_frac`.
        offload_param_frac: f64,
        /// Share of the optimizer states in host memory that visit the device to be stepped there; their parameters are not streamed.
        #[serde(default)]
        stream_optim_frac: f64,
    },
}

/// Which units recompute their forward in backward.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Recompute {
    /// None.
    None,
    /// Every recomputable unit.
    Full,
    /// The planner chooses, unit by unit.
    Auto,
    /// As given, per unit.
    Units(Vec<bool>),
}

/// Which units' activations are offloaded to host memory. What recomputes is not offloaded too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Offload {
    /// None.
    #[default]
    None,
    /// The planner chooses, layer by layer.
    Auto,
    /// Every layer.
    Full,
}

/// The disk that may hold what host memory cannot.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct NvmeRequest {
    /// Hard limit of the spill file, in bytes.
    pub budget: u64,
    /// Bytes per second that it reads while it does not write.
    pub read_bytes: f64,
    /// Bytes per second that it writes while it does not read.
    pub write_bytes: f64,
}

/// What to plan for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlanRequest {
    /// Hard limit of device memory, in bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host memory, in bytes.
    pub host_budget: u64,
    /// Device bytes kept free for temporaries that no trace sees.
    pub reserve_bytes: u64,
    /// Who chooses the placement.
    pub placement: Placement,
    /// Which units recompute.
    pub recompute: Recompute,
    /// Which units' activations are offloaded.
    #[serde(default)]
    pub offload: Offload,
    /// Micro-batches per optimizer step.
    pub accumulation: u32,
    /// Where host-stepped chunks add up the gradients of micro-batches, or the planner's choice.
    #[serde(default)]
    pub accumulate: Option<Tier>,
    /// Whether host steps write moments after parameters, or the planner's choice. Only where steps are deferred and nothing is spilled.
    #[serde(default)]
    pub late_moments: Option<bool>,
    /// Whether the planner may let optimizer states visit the device where that is faster; a static placement says it itself.
    #[serde(default)]
    pub visiting: bool,
    /// Clipping mode. `Speculate` and `Auto` use what the host budget leaves for undo records.
    pub clip_mode: ClipMode,
    /// Speeds.
    pub speeds: Speeds,
    /// The disk, if states may be spilled.
    #[serde(default)]
    pub nvme: Option<NvmeRequest>,
}

/// Why no plan exists.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// The device budget is too small even for the tightest plan.
    #[error("needs {shortfall} more bytes of device memory at {op} ({needed} needed, {budget} allowed)")]
    Device {
        /// The operation with the highest need, readable.
        op: String,
        /// Bytes needed at that operation by the tightest plan.
        needed: u64,
        /// The budget.
        budget: u64,
        /// Bytes missing.
        shortfall: u64,
        /// What the bytes are for.
        breakdown: DeviceBytes,
    },
    /// The host budget is too small for what the device cannot hold.
    #[error("needs {shortfall} more bytes of host memory ({needed} needed, {budget} allowed)")]
    Host {
        /// Bytes needed.
        needed: u64,
        /// The budget.
        budget: u64,
        /// Bytes missing.
        shortfall: u64,
        /// What the bytes are for.
        breakdown: HostBytes,
    },
    /// The disk is too small for what host memory cannot hold.
    #[error("needs {shortfall} more bytes of NVMe ({needed} needed, {budget} allowed)")]
    Nvme {
        /// Bytes needed.
        needed: u64,
        /// The budget.
        budget: u64,
        /// Bytes missing.
        shortfall: u64,
        /// What the spill file is for.
        breakdown: Box<NvmePlan>,
    },
    /// The request contradicts itself or the trace.
    #[error("{0}")]
    Invalid(String),
}

/// Bytes of host memory traffic of one host-stepped parameter; turns the speed of the host step into one of memory.
const HOST_ADAM_BYTES: f64 = 26.0;

/// Of these, what the first of two passes moves: gradient and moments read, parameter and low half read and written.
pub const FIRST_PASS_BYTES: f64 = 18.0;

/// Gradients of so many chunks, each as large as the largest that one operation completes, may be on their way where device memory is left.
const GRADIENTS_AHEAD: u64 = 4;

/// One point of the search.
struct Candidate<'a> {
    activations: &'a Activations,
    row: Row,
    slab: u64,
    tight: bool,
    step: Step,
}

/// Finds the fastest plan within the budgets.
pub fn plan(layout: &Layout, trace: &Trace, request: &PlanRequest) -> Result<Plan, PlanError> {
    let mut plans = candidates(layout, trace, request, 1)?;
    plans.pop().ok_or_else(|| PlanError::Invalid(NOTHING.to_owned()))
}

const NOTHING: &str = "the request leaves nothing to choose from";

/// The fastest plan within the budgets, and after it the fastest of those that keep activations otherwise, at most `most` in all. At least
/// one, or an error.
pub fn candidates(layout: &Layout, trace: &Trace, request: &PlanRequest, most: usize) -> Result<Vec<Plan>, PlanError> {
    let mut memory = Memory::new(layout, trace, request)?;
    let levels = activations::levels(&memory, request)?;
    memory.leave_room(&levels);
    let mut best = Best { found: Vec::new(), most: most.max(1) };
    let mut least_device: Option<(u64, DeviceBytes, crate::OpId)> = None;
    let mut least_host: Option<HostBytes> = None;
    let mut least_nvme: Option<NvmePlan> = None;
    placement::for_each_group(&memory, request, |group| {
        for activations in &levels {
            if best.bound(activations).is_some_and(|bound| least_seconds(activations, request) > bound) {
                continue;
            }
            for &(slab, tight) in &group.variants {
                if best.bound(activations).is_some_and(|bound| is_hopeless(&memory, activations, group, slab, tight, request, bound)) {
                    continue;
                }
                let device = |row: &Row| row.device_bytes(activations, slab, tight, request.reserve_bytes);
                let fitting = group.first_where(|row| device(row) > request.device_budget);
                let Some(last) = fitting.checked_sub(1) else {
                    let needed = device(&group.rows[0]);
                    if least_device.is_none_or(|(least, _, _)| needed < least) {
                        let (breakdown, op) = group.rows[0].device_breakdown(activations, slab, tight, request.reserve_bytes);
                        least_device = Some((needed, breakdown, op));
                    }
                    continue;
                };
                let first = if group.monotone { last } else { 0 };
                for row in &group.rows[first..=last] {
                    let host = HostBytes { activations: activations.host_bytes, ..row.host };
                    if host.total() > request.host_budget {
                        if least_host.is_none_or(|least| host.total() < least.total()) {
                            least_host = Some(host);
                        }
                        continue;
                    }
                    let file_bytes = row.nvme.map_or(0, |nvme| nvme.file_bytes);
                    if file_bytes > request.nvme.map_or(0, |nvme| nvme.budget) {
                        if least_nvme.is_none_or(|least| file_bytes < least.file_bytes) {
                            least_nvme = row.nvme;
                        }
                        continue;
                    }
                    let step =
                        Point { memory: &memory, activations, row, slab, prefetch_slab: group.prefetch_slab, tight, request }.predict();
                    best.offer(activations, row, slab, tight, step);
                }
            }
        }
    })?;
    if !best.found.is_empty() {
        return best.found.into_iter().map(|found| finish(&memory, request, found)).collect();
    }
    if let Some(breakdown) = least_nvme {
        let (needed, budget) = (breakdown.file_bytes, request.nvme.map_or(0, |nvme| nvme.budget));
        return Err(PlanError::Nvme { needed, budget, shortfall: needed - budget, breakdown: Box::new(breakdown) });
    }
    match (least_host, least_device) {
        (Some(breakdown), _) => Err(PlanError::Host {
            needed: breakdown.total(),
            budget: request.host_budget,
            shortfall: breakdown.total() - request.host_budget,
            breakdown,
        }),
        (None, Some((needed, breakdown, op))) => Err(PlanError::Device {
            op: trace.op_name(op),
            needed,
            budget: request.device_budget,
            shortfall: needed - request.device_budget,
            breakdown,
        }),
        (None, None) => Err(PlanError::Invalid(NOTHING.to_owned())),
    }
}

/// The best points so far, the best first, at most one for each way of keeping activations.
struct Best<'a> {
    found: Vec<Candidate<'a>>,
    most: usize,
}

impl<'a> Best<'a> {
    fn place(&self, activations: &Activations) -> Option<usize> {
        self.found.iter().position(|found| std::ptr::eq(found.activations, activations))
    }

    /// Seconds from which on a point with these activations cannot be among the best.
    fn bound(&self, activations: &Activations) -> Option<f64> {
        let last = (self.found.len() == self.most).then(|| self.found.last()).flatten();
        self.place(activations).map(|at| &self.found[at]).or(last).map(|found| found.step.seconds)
    }

    fn offer(&mut self, activations: &'a Activations, row: &Row, slab: u64, tight: bool, step: Step) {
        let same = self.place(activations);
        let worse = |found: &Candidate| is_better(activations, row, step, found);
        if same.is_some_and(|at| !worse(&self.found[at])) {
            return;
        }
        let Some(at) = self.found.iter().position(worse).or((self.found.len() < self.most).then_some(self.found.len())) else { return };
        if let Some(same) = same {
            self.found.remove(same);
        }
        self.found.insert(at, Candidate { activations, row: Row::clone(row), slab, tight, step });
        self.found.truncate(self.most);
    }
}

/// The smallest `device_budget` for which [`plan`] finds a plan, the other limits being as requested; `u64::MAX` if none is large enough.
pub fn minimum_device_bytes(layout: &Layout, trace: &Trace, request: &PlanRequest) -> u64 {
    let find = || -> Result<u64, PlanError> {
        let mut memory = Memory::new(layout, trace, request)?;
        let levels = activations::levels(&memory, request)?;
        memory.leave_room(&levels);
        let mut least = u64::MAX;
        placement::for_each_group(&memory, request, |group| {
            let spilled = |row: &Row| row.nvme.map_or(0, |nvme| nvme.file_bytes);
            for activations in &levels {
                let too_large = |row: &Row| {
                    row.host.total() + activations.host_bytes > request.host_budget
                        || spilled(row) > request.nvme.map_or(0, |nvme| nvme.budget)
                };
                let first = group.first_where(|row| !too_large(row));
                let Some(row) = group.rows.get(first) else { continue };
                for &(slab, tight) in &group.variants {
                    least = least.min(row.device_bytes(activations, slab, tight, request.reserve_bytes));
                }
            }
        })?;
        Ok(least)
    };
    find().unwrap_or(u64::MAX)
}

/// Faster, else fewer recomputed units, else fewer offloaded ones, else fewer elements with states on the host, else fewer of them visiting
/// the device, else fewer streamed bytes.
fn is_better(activations: &Activations, row: &Row, step: Step, best: &Candidate) -> bool {
    step.seconds
        .total_cmp(&best.step.seconds)
        .then(activations.recomputed.cmp(&best.activations.recomputed))
        .then(activations.offloaded.cmp(&best.activations.offloaded))
        .then((row.cost.host_numel + row.cost.visiting_numel).cmp(&(best.row.cost.host_numel + best.row.cost.visiting_numel)))
        .then(row.cost.visiting_numel.cmp(&best.row.cost.visiting_numel))
        .then(row.cost.stream_bytes.cmp(&best.row.cost.stream_bytes))
        .is_lt()
}

/// Seconds that a step takes at least with these activations, wherever chunks are.
fn least_seconds(activations: &Activations, request: &PlanRequest) -> f64 {
    let stall = activations.stall.leaving + activations.stall.returning;
    f64::from(request.accumulation) * (activations.total_flops / request.speeds.flops + stall)
}

/// Whether no placement of a group can be better than what was found: not even the fastest, whether it fits the device or not.
fn is_hopeless(
    memory: &Memory,
    activations: &Activations,
    group: &Group,
    slab: u64,
    tight: bool,
    request: &PlanRequest,
    bound: f64,
) -> bool {
    let Some(fastest) = group.rows.last().filter(|_| group.monotone && request.nvme.is_none()) else { return false };
    // It needs the least host memory too. What is equal up to rounding is looked at.
    fastest.host.total() + activations.host_bytes > request.host_budget
        || Point { memory, activations, row: fastest, slab, prefetch_slab: group.prefetch_slab, tight, request }.predict().seconds
            > bound * (1.0 + 1e-9)
}

/// The same placement with as many more gradients on their way as fit. The training thread waits where no more may be: what nothing else
/// wants of the device lets it run ahead. Not where steps may be speculated: what lands after a step was committed is not, and a thread that
/// is far ahead commits early.
fn run_ahead(memory: &Memory, request: &PlanRequest, activations: &Activations, row: Row, slab: u64, landing_buffers: u32) -> Row {
    // Gradients that land in buffers wait for these too.
    let lands = request.accumulation > 1 || row.chunks.iter().any(ChunkPlan::spills_grads);
    let most = match request.clip_mode {
        ClipMode::Speculate | ClipMode::Auto => 1,
        ClipMode::Defer if lands => GRADIENTS_AHEAD.min(u64::from(landing_buffers)),
        ClipMode::Defer => GRADIENTS_AHEAD,
    };
    let fits = |row: &Row| row.device_bytes(activations, slab, false, request.reserve_bytes) <= request.device_budget;
    (2..=most).rev().map(|times| row.with_gradients_ahead(memory, times)).find(fits).unwrap_or(row)
}

fn finish(memory: &Memory, request: &PlanRequest, best: Candidate) -> Result<Plan, PlanError> {
    let Candidate { activations, mut row, mut slab, tight, step } = best;
    if step.bound_by == "h2d" && slab > 0 {
        // What is left keeps chunks between their uses at the turns of the step, and lets copies run further ahead.
        let left = request.device_budget - row.device_bytes(activations, slab, tight, request.reserve_bytes);
        slab = (slab + left / row.slab_step * row.slab_step).min(row.streamed_bytes).max(slab);
    }
    let landing_buffers = step.late.unwrap_or(LANDING_BUFFERS);
    let needed = row.in_flight_bytes[usize::from(tight)];
    if !tight {
        row = run_ahead(memory, request, activations, row, slab, landing_buffers);
    }
    let (device, device_peak_op) = row.device_breakdown(activations, slab, tight, request.reserve_bytes);
    let mut host = HostBytes { activations: activations.host_bytes, ..row.host };
    let undo_bytes = if request.clip_mode == ClipMode::Defer {
        0
    } else {
        let left = request.host_budget - host.total();
        let wanted = row.undo_bytes;
        if host_region_bytes(wanted) <= left { wanted } else { left / host_region_bytes(1) * host_region_bytes(1) }
    };
    host.undo = host_region_bytes(undo_bytes);
    host.staging = host.staging / u64::from(LANDING_BUFFERS) * u64::from(landing_buffers);
    let mut plan = Plan {
        version: crate::plan::VERSION,
        chunks: row.chunks,
        activations: activations.units.clone(),
        offload_window_bytes: activations.window_bytes,
        stream_slab_bytes: slab,
        grad_in_flight_bytes: row.in_flight_bytes[usize::from(tight)],
        grad_ahead_bytes: row.in_flight_bytes[usize::from(tight)] - needed,
        accumulation: request.accumulation,
        clip_mode: request.clip_mode,
        undo_bytes,
        late_moments: step.late.is_some(),
        landing_buffers,
        device,
        device_peak_op,
        host,
        nvme: row.nvme,
        fetches: Vec::new(),
        predicted_step_s: step.seconds,
        bound_by: step.bound_by.to_owned(),
    };
    plan.fetches = dry_run::fetches(memory.layout, memory.trace, &plan).map_err(|error| PlanError::Invalid(error.to_string()))?;
    Ok(plan)
}
