//! A step of Tierwise: every distinct pipeline stage is planned and executed by the core's planner and scheduler, and of the planner's best
//! plans the one is taken that is executed fastest, as the plugin does.

use crate::choose::choose_by;
use crate::executor::{Outcome, Setup, Sharding, SimError, simulate};
use crate::pipeline::StageCost;
use crate::request::{Error, Memory, Plans, Rank, Request};
use crate::units::Shortfall;
use serde::Serialize;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ActivationPlan, DeviceBytes, HostBytes, NvmePlan, OptimizerClass, Plan, host_region_bytes};
use tierwise_core::planner::{NvmeRequest, Placement, PlanError, PlanRequest, minimum_device_bytes, plan};
use tierwise_core::timeline::Timeline;

/// What the plan is, in few numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Placed {
    /// Elements with optimizer states on the device, which steps them.
    pub device_stepped_numel: u64,
    /// Elements whose optimizer step the host runs, with states in its memory.
    pub host_stepped_numel: u64,
    /// Elements whose states visit the device from host memory, to be stepped there.
    pub visiting_numel: u64,
    /// Elements that the host steps while their states pass by from the disk.
    pub nvme_stepped_numel: u64,
    /// Elements whose parameters are streamed.
    pub streamed_numel: u64,
    /// Layers that are recomputed in backward.
    pub recomputed_units: u64,
    /// Layers that could be.
    pub recomputable_units: u64,
    /// Whether backward makes outputs of normalizations and gated products again, in the layers that keep the rest.
    pub rematerialized: bool,
    /// Device memory at the planned peak, by purpose.
    pub device: DeviceBytes,
    /// Host memory, by purpose.
    pub host: HostBytes,
    /// What is spilled, if anything is.
    pub nvme: Option<NvmePlan>,
    /// Seconds of a step by the planner's formulas.
    pub predicted_step_s: f64,
    /// What bounds the step by the planner's formulas.
    pub bound_by: String,
}

/// A simulated step of any policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulated {
    /// The slowest rank's step.
    pub outcome: Outcome,
    /// What each rank of its stage has, if it is ours.
    pub placed: Option<Placed>,
    /// FLOPs of recomputation in the whole step, all ranks.
    pub recomputed_flops: f64,
    /// The slowest rank's spans and counters.
    pub timeline: Timeline,
}

/// One stage, planned.
struct Stage {
    rank: Rank,
    plan: Plan,
    sharding: Option<Sharding>,
    reserve_bytes: u64,
    rematerialized: bool,
}

/// Plans and executes; the inner error says what does not fit.
pub fn step(request: &Request) -> Result<Result<Simulated, Shortfall>, Error> {
    let stages = request.parallel.pipeline;
    let accumulation = request.accumulation()?;
    let mut slowest: Option<(u64, Stage, Outcome)> = None;
    let mut costs = Vec::new();
    let mut recomputed_flops = 0.0;
    let mut exposed_ns = 0;
    let mut seen: Option<(std::ops::Range<usize>, u64)> = None;
    let mut middle: Option<(StageCost, f64)> = None;
    for number in 0..stages {
        let blocks = request.parallel.stage_blocks(&request.model, number);
        let is_middle = number > 0 && number + 1 < stages;
        // Equal stages are simulated once: of the middle ones the first, which holds the most activations.
        if let (true, Some((like, _)), Some((cost, flops))) = (is_middle, &seen, middle)
            && like.len() == blocks.len()
        {
            costs.push(cost);
            recomputed_flops += flops;
            continue;
        }
        let stage = match plan_stage(request, number)? {
            Ok(stage) => stage,
            Err(shortfall) => return Ok(Err(shortfall)),
        };
        debug_assert_eq!(stage.plan.device.reserve, stage.reserve_bytes);
        let outcome = match execute(request, &stage.rank, &stage.plan, stage.sharding.as_ref()) {
            Ok(outcome) => outcome,
            Err(SimError::Budget(error)) => {
                return Ok(Err(Shortfall {
                    tier: error.tier.to_string(),
                    op: Some(error.what),
                    needed_bytes: error.limit + error.shortfall,
                    shortfall_bytes: error.shortfall,
                }));
            }
            Err(error) => return Err(Error::Execution(error)),
        };
        let cost = stage_cost(&stage);
        let flops = again(&stage) * f64::from(accumulation) * request.parallel.tensor as f64 * request.parallel.shards() as f64;
        costs.push(cost);
        recomputed_flops += flops;
        if is_middle {
            (seen, middle) = (Some((blocks, number)), Some((cost, flops)));
        }
        exposed_ns = exposed_ns.max(outcome.step_ns - outcome.compute_ns);
        if slowest.as_ref().is_none_or(|(_, _, slow)| outcome.step_ns > slow.step_ns) {
            slowest = Some((number, stage, outcome));
        }
    }
    let Some((_, stage, mut outcome)) = slowest else { return Err(Error::Usage("pipeline is 0; it must be at least 1".to_owned())) };
    if stages > 1 {
        let group = request.parallel.stage_group(&request.hardware).map_err(Error::Usage)?;
        let tokens = request.seq * request.micro_batch / request.parallel.sequence / request.parallel.tensor;
        let send_ns = group.send_ns((2 * request.model.architecture.hidden_size * tokens) as f64);
        let makespan = request.parallel.schedule.makespan_ns(&costs, u64::from(accumulation), send_ns).map_err(Error::Usage)?;
        // What a stage adds to its own compute (copies, optimizer, collectives) is added to the pipeline's time.
        let step_ns = makespan + exposed_ns;
        outcome.stalls.pipeline_ns = step_ns - outcome.step_ns;
        outcome.step_ns = step_ns;
    }
    let timeline = std::mem::take(&mut outcome.timeline);
    let placed = Some(placed(&stage));
    Ok(Ok(Simulated { outcome, placed, recomputed_flops, timeline }))
}

/// The least device budget with which every stage can be planned, the other limits being as requested.
pub fn least_device_bytes(request: &Request) -> Result<u64, Error> {
    let mut least = 0;
    for number in 0..request.parallel.pipeline {
        let (rank, _, planned) = prepare(request, number)?;
        let of = |rank: &Rank| minimum_device_bytes(&rank.built.layout, &rank.built.trace, &planned);
        least = least.max(variants(request, rank).iter().map(|(rank, _)| of(rank)).min().unwrap_or(u64::MAX));
    }
    Ok(least)
}

/// A rank split over its group, its collectives, and what to ask the planner.
fn prepare(request: &Request, number: u64) -> Result<(Rank, Option<Sharding>, PlanRequest), Error> {
    let parallel = &request.parallel;
    let mut rank = Rank::new(request, number)?;
    let accumulation = request.accumulation()?;
    let buffers = parallel.buffer_bytes(&rank.built.layout, accumulation);
    let sharding = (parallel.shards() > 1).then(|| sharding(request, &rank));
    parallel.split(&mut rank.built.layout);
    let planned = PlanRequest {
        device_budget: request.device_budget,
        host_budget: request.host_budget,
        reserve_bytes: request.memory.reserve_bytes() + buffers,
        placement: match request.memory {
            Memory::Placed(placement) => placement,
            Memory::Reserve(_) | Memory::Given(_) => Placement::Auto,
        },
        recompute: request.recompute.clone(),
        offload: request.offload,
        accumulation,
        accumulate: None,
        late_moments: None,
        visiting: true,
        clip_mode: request.clip_mode,
        speeds: rank.costs.speeds(&rank.built, &rank.hardware),
        nvme: nvme(request, &rank)?,
    };
    Ok((rank, sharding, planned))
}

/// The disk, where something may be spilled.
fn nvme(request: &Request, rank: &Rank) -> Result<Option<NvmeRequest>, Error> {
    match (request.nvme_budget, rank.hardware.nvme) {
        (0, _) => Ok(None),
        (budget, Some(disk)) => Ok(Some(NvmeRequest { budget, read_bytes: disk.read_bytes_per_s, write_bytes: disk.write_bytes_per_s })),
        (_, None) => Err(Error::Usage(format!(
            "nvme-budget is given, but {} has no disk; add \"nvme\": {{\"read_bytes_per_s\": ..., \"write_bytes_per_s\": ...}} to its file",
            rank.hardware.name
        ))),
    }
}

fn sharding(request: &Request, rank: &Rank) -> Sharding {
    let (layout, zero) = (&rank.built.layout, request.parallel.zero);
    let gather = |c| if zero >= 1 { rank.data.all_gather_ns(layout.param_bytes(c) as f64) } else { 0 };
    let reduce = |c| {
        let bytes = layout.grad_bytes(c) as f64;
        if zero >= 1 { rank.data.all_gather_ns(bytes) } else { rank.data.all_reduce_ns(bytes) }
    };
    Sharding {
        gathers_before_use: zero >= 3,
        reduces_every_micro_batch: zero >= 2,
        gather_ns: layout.ids().map(gather).collect(),
        reduce_ns: layout.ids().map(reduce).collect(),
    }
}

fn plan_stage(request: &Request, number: u64) -> Result<Result<Stage, Shortfall>, Error> {
    let (mut rank, sharding, planned) = prepare(request, number)?;
    let reserve_bytes = planned.reserve_bytes;
    if let Memory::Given(given) = &request.memory {
        if given.rematerialized {
            rematerialize(&mut rank);
        }
        let plan = given.plan(&rank.built, planned.accumulation, planned.clip_mode).map_err(Error::Usage)?;
        let rematerialized = given.rematerialized;
        return Ok(Ok(Stage { rank, plan, sharding, reserve_bytes: 0, rematerialized }));
    }
    // Whole parameters on the device are what the lower levels of sharding mean: they have to fit.
    let whole = sharding.is_some() && request.parallel.zero < 3;
    let refused = |plan: &Plan| whole && plan.chunks.iter().any(|c| c.home.is_streamed());
    let mut best: Option<(f64, Rank, Plan, bool)> = None;
    let mut shortfall = None;
    for (rank, rematerialized) in variants(request, rank) {
        let (layout, trace) = (&rank.built.layout, &rank.built.trace);
        let chosen = match request.plans {
            Plans::Compared => choose_by(layout, trace, &planned, |plan| {
                let outcome = if refused(plan) { None } else { execute(request, &rank, plan, sharding.as_ref()).ok() };
                outcome.map_or(f64::INFINITY, |outcome| outcome.step_ns as f64 / 1e9)
            }),
            Plans::First => plan(layout, trace, &planned).map(|plan| {
                let seconds = plan.predicted_step_s;
                (plan, seconds)
            }),
        };
        match chosen {
            Ok((plan, _)) if refused(&plan) => {
                let needed = plan.device.total() - plan.device.stream_slab + whole_params(layout) - plan.device.resident_params;
                let missing = needed.saturating_sub(request.device_budget);
                shortfall = Some(Shortfall::device(format!("resident parameters with zero {}", request.parallel.zero), needed, missing));
            }
            Ok((plan, seconds)) if best.as_ref().is_none_or(|(other, ..)| seconds < *other) => {
                best = Some((seconds, rank, plan, rematerialized));
            }
            Ok(_) => {}
            Err(error) => shortfall = Some(short_of(error)?),
        }
    }
    Ok(match (best, shortfall) {
        (Some((_, rank, plan, rematerialized)), _) => Ok(Stage { rank, plan, sharding, reserve_bytes, rematerialized }),
        (None, Some(shortfall)) => Err(shortfall),
        (None, None) => return Err(Error::Usage("there is nothing to plan".to_owned())),
    })
}

/// What a plan lacks.
fn short_of(error: PlanError) -> Result<Shortfall, Error> {
    match error {
        PlanError::Device { op, needed, shortfall, .. } => Ok(Shortfall::device(op, needed, shortfall)),
        PlanError::Host { needed, shortfall, .. } => Ok(Shortfall::host(needed, shortfall)),
        PlanError::Nvme { needed, shortfall, .. } => {
            Ok(Shortfall { tier: "nvme".to_owned(), op: None, needed_bytes: needed, shortfall_bytes: shortfall })
        }
        PlanError::Invalid(message) => Err(Error::Usage(message)),
    }
}

/// A rank that keeps what its layers save, and where there is any one whose backward makes outputs of cheap kernels again. A recorded run
/// with fractions and without a plan did not fit as it was asked for: with everything kept.
fn variants(request: &Request, rank: Rank) -> Vec<(Rank, bool)> {
    if matches!(request.memory, Memory::Placed(_)) || rank.built.cheap_bytes.iter().all(|[saved, _]| *saved == 0) {
        return vec![(rank, false)];
    }
    let mut again = rank.clone();
    rematerialize(&mut again);
    vec![(rank, false), (again, true)]
}

/// Backward makes outputs of cheap kernels again instead of keeping them.
fn rematerialize(rank: &mut Rank) {
    for (unit, [saved, traffic]) in rank.built.cheap_bytes.iter().enumerate() {
        let traced = &mut rank.built.trace.units[unit];
        traced.saved_bytes -= saved;
        traced.offload_bytes = traced.offload_bytes.min(traced.saved_bytes);
        traced.offload_host_bytes = host_region_bytes(traced.offload_bytes);
        rank.costs.backward_ns[unit] += (*traffic as f64 / rank.hardware.device_memory_bytes_per_s * 1e9).round() as u64;
    }
}

fn whole_params(layout: &Layout) -> u64 {
    layout.ids().map(|c| layout.param_bytes(c)).sum()
}

fn execute(request: &Request, rank: &Rank, plan: &Plan, sharding: Option<&Sharding>) -> Result<Outcome, SimError> {
    simulate(&Setup {
        layout: &rank.built.layout,
        trace: &rank.built.trace,
        plan,
        costs: &rank.costs,
        hardware: &rank.hardware,
        sharding,
        transient_bytes: match request.memory {
            Memory::Reserve(_) => None,
            Memory::Placed(_) | Memory::Given(_) => Some(&rank.built.transient_bytes),
        },
        forward_reserve_bytes: match &request.memory {
            Memory::Given(given) => given.device.reserve,
            Memory::Reserve(_) | Memory::Placed(_) => 0,
        },
        device_budget: request.device_budget,
        host_budget: request.host_budget,
        nvme_budget: request.nvme_budget,
        clips: request.clips,
    })
}

fn recomputed(stage: &Stage) -> impl Iterator<Item = usize> + '_ {
    stage.plan.activations.iter().enumerate().filter(|(_, kept)| **kept == ActivationPlan::Recompute).map(|(unit, _)| unit)
}

/// FLOPs of a micro-batch's recomputation.
fn again(stage: &Stage) -> f64 {
    recomputed(stage).map(|unit| stage.rank.built.trace.units[unit].recompute_flops()).sum()
}

fn stage_cost(stage: &Stage) -> StageCost {
    let costs = &stage.rank.costs;
    let sustained = |ns: u64| (ns as f64 * costs.sustained).round() as u64;
    let backward: u64 = costs.backward_ns.iter().sum();
    StageCost {
        forward_ns: sustained(costs.forward_ns.iter().sum()),
        backward_ns: sustained(backward + recomputed(stage).map(|unit| costs.recompute_ns[unit]).sum::<u64>()),
        // Gradients of weights are half of a backward's matrix products.
        weights_ns: sustained(backward / 2),
    }
}

fn placed(stage: &Stage) -> Placed {
    let (layout, plan) = (&stage.rank.built.layout, &stage.plan);
    let numel = |wanted: &dyn Fn(usize) -> bool, state: bool| {
        let of = |c: usize| if state { layout.chunks[c].state_numel } else { layout.chunks[c].numel };
        (0..layout.chunks.len()).filter(|c| wanted(*c)).map(of).sum()
    };
    Placed {
        device_stepped_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Device, true),
        host_stepped_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Host, true),
        visiting_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Streamed, true),
        nvme_stepped_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Nvme, true),
        streamed_numel: numel(&|c| plan.chunks[c].home.is_streamed(), false),
        recomputed_units: recomputed(stage).count() as u64,
        rematerialized: stage.rematerialized,
        recomputable_units: stage.rank.built.trace.units.iter().filter(|u| u.recomputable).count() as u64,
        device: plan.device,
        host: plan.host,
        nvme: plan.nvme,
        predicted_step_s: plan.predicted_step_s,
        bound_by: plan.bound_by.clone(),
    }
}
