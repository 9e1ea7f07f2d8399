//! The planner: budgets hold, its numbers are those of a slow independent model, and more memory never hurts.

mod common;

use common::{GIB, RESIDENT_HOST, h100, llama_7b, llama_70b, models, uniform};
use proptest::prelude::*;
use tierwise_core::layout::{Layout, ParamSpec, Precision};
use tierwise_core::plan::{ActivationPlan, ClipMode, HostBytes, OptimizerClass, ParamHome, Plan};
use tierwise_core::planner::{NvmeRequest, Offload, Placement, PlanError, PlanRequest, Recompute, Speeds, minimum_device_bytes, plan};
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, OpId, Tier};

/// Activations alive at an operation, by looking at every unit anew.
fn activations_at(trace: &Trace, plan: &Plan, at: usize) -> u64 {
    let count = |unit: u32, phase: Phase, until: usize| trace.ops[..until].iter().filter(|op| op.unit == unit && op.phase == phase).count();
    let (mut bytes, mut away) = (0, 0);
    for (index, unit) in trace.units.iter().enumerate() {
        let forwards = count(index as u32, Phase::Forward, at + 1);
        // Its own backward still reads what was saved.
        let backwards = count(index as u32, Phase::Backward, at);
        let kept = match plan.activations[index] {
            ActivationPlan::Keep => unit.saved_bytes,
            ActivationPlan::Recompute => unit.input_bytes,
            ActivationPlan::Offload => unit.saved_bytes - unit.offload_bytes,
        };
        let open = forwards.saturating_sub(backwards) as u64;
        bytes += open * kept;
        if plan.activations[index] == ActivationPlan::Offload {
            away += open * unit.offload_bytes;
        }
    }
    bytes += away.min(plan.offload_window_bytes);
    let op = &trace.ops[at];
    if op.phase == Phase::Backward && plan.activations[op.unit as usize] == ActivationPlan::Recompute {
        bytes += trace.units[op.unit as usize].saved_bytes;
    }
    if !trace.ops[at + 1..].iter().any(|op| op.phase == Phase::Forward) {
        bytes += trace.outer_saved_bytes;
    }
    bytes
}

/// Gradients alive at an operation, by looking at every chunk anew.
fn gradients_at(layout: &Layout, trace: &Trace, plan: &Plan, at: usize) -> u64 {
    let (mut alive, mut sent, mut largest) = (0, 0, 0);
    for chunk in layout.ids() {
        let ops: Vec<usize> = trace
            .ids()
            .filter(|&op| trace.ops[op.index()].phase == Phase::Backward && trace.chunks(op).contains(&chunk))
            .map(OpId::index)
            .collect();
        let (Some(&first), Some(&last)) = (ops.first(), ops.last()) else { continue };
        let bytes = layout.grad_bytes(chunk);
        let class = plan.chunks[chunk.index()].class;
        let until_end = class.steps_on_device() && plan.accumulation == 1;
        if first <= at && (at <= last || until_end) {
            alive += bytes;
        }
        // Those of the step before, until the forward reads what their step made.
        let first_use = trace.ids().find(|&op| trace.chunks(op).contains(&chunk)).unwrap().index();
        if class == OptimizerClass::Streamed && until_end && at <= first_use {
            alive += bytes;
        }
        let stays = plan.accumulation > 1 && plan.chunks[chunk.index()].accumulate == Tier::Device;
        if class.on_cpu() && !stays && last < at {
            sent += bytes;
            largest = bytes.max(largest);
        }
    }
    alive + sent.min(plan.grad_in_flight_bytes.max(largest))
}

/// What lies in the spill file, piece by piece; gives the bytes of the buffers.
fn check_spilled(layout: &Layout, request: &PlanRequest, plan: &Plan) -> u64 {
    let is_spilled = |c: &ChunkId| plan.chunks[c.index()].class == OptimizerClass::Nvme || plan.chunks[c.index()].home.is_spilled();
    let spilled: Vec<ChunkId> = layout.ids().filter(is_spilled).collect();
    let Some(nvme) = plan.nvme else {
        assert_eq!(spilled, []);
        return 0;
    };
    assert!(!spilled.is_empty() && nvme.file_bytes <= request.nvme.unwrap().budget);
    let (mut payload, mut frozen_payload, mut file, mut largest) = (0, 0, 0, 0);
    let (mut grads, mut largest_grad, mut most_landing) = (0, 0, 0);
    for &chunk in &spilled {
        let placed = plan.chunks[chunk.index()];
        let param = if placed.home.is_spilled() { layout.precision.param_bytes() } else { 0 };
        let frozen = placed.class == OptimizerClass::Frozen;
        let states = if frozen { 0 } else { layout.precision.state_bytes() };
        let mut left = if frozen { layout.chunks[chunk.index()].numel } else { layout.chunks[chunk.index()].state_numel };
        let piece_numel = if frozen { nvme.frozen_piece_numel } else { nvme.piece_numel };
        let mut landing = 0;
        while left > 0 {
            let numel = left.min(piece_numel);
            let bytes = numel * (param + states);
            assert!(bytes <= nvme.buffer_bytes);
            assert!(placed.home != ParamHome::Fetched || numel * param <= nvme.fetch_buffer_bytes);
            *(if frozen { &mut frozen_payload } else { &mut payload }) += bytes;
            let extents = match placed.home {
                ParamHome::Fetched if !frozen => vec![numel * param, numel * layout.precision.state_bytes()],
                _ => vec![bytes],
            };
            let extent: u64 = extents.iter().map(|bytes| bytes.div_ceil(nvme.block_bytes) * nvme.block_bytes).sum();
            file += extent;
            largest = largest.max(extent);
            if placed.spills_grads() {
                let bytes = numel * layout.final_grad_element(plan.accumulation);
                let extent = bytes.div_ceil(nvme.block_bytes) * nvme.block_bytes;
                assert!(bytes <= nvme.grad_buffer_bytes);
                grads += bytes;
                landing += extent;
                file += extent;
                largest_grad = largest_grad.max(extent);
            }
            left -= numel;
        }
        most_landing = most_landing.max(landing);
    }
    assert_eq!(nvme.payload_bytes, payload + grads + frozen_payload);
    file += if plan.accumulation > 1 { u64::from(nvme.grad_buffers) * largest_grad } else { 2 * most_landing };
    assert_eq!(nvme.file_bytes, file + u64::from(nvme.buffers) * largest);
    let micro_batches = u64::from(plan.accumulation);
    assert_eq!(nvme.written_bytes, payload + micro_batches * grads);
    assert!(nvme.read_bytes - payload >= micro_batches * grads);
    assert_eq!((nvme.grad_read_bytes, nvme.grad_written_bytes), ((micro_batches - 1) * grads, micro_batches * grads));
    assert!(nvme.buffers >= 2 && nvme.buffer_bytes.is_multiple_of(65536) && nvme.block_bytes.is_multiple_of(65536));
    // The fewest that are needed, the latest-used first: without the earliest of them on the disk host memory would overflow.
    let staging = u64::from(nvme.buffers) * nvme.buffer_bytes
        + u64::from(nvme.fetch_buffers) * nvme.fetch_buffer_bytes
        + u64::from(nvme.grad_buffers) * nvme.grad_buffer_bytes;
    let back = |chunk: &ChunkId| {
        let mut place = plan.chunks[chunk.index()];
        let now = HostBytes::of_chunk(layout, *chunk, place, plan.accumulation).total();
        place = match place.home {
            _ if place.spills_grads() => place.accumulating(Tier::Host),
            ParamHome::Spilled => tierwise_core::plan::ChunkPlan { home: ParamHome::Resident, ..place },
            ParamHome::Fetched => tierwise_core::plan::ChunkPlan { home: ParamHome::Streamed, ..place },
            _ => tierwise_core::plan::ChunkPlan { class: OptimizerClass::Host, ..place },
        };
        HostBytes::of_chunk(layout, *chunk, place, plan.accumulation).total() - now
    };
    let home = |home: ParamHome| spilled.iter().any(|c| plan.chunks[c.index()].home == home);
    let fetches = home(ParamHome::Fetched);
    let streams = |class: OptimizerClass, home: ParamHome| plan.chunks.iter().any(|c| (c.class, c.home) == (class, home));
    // Frozen parameters go before those that are written again and again.
    let frozen_stay = streams(OptimizerClass::Frozen, ParamHome::Streamed);
    assert!(!frozen_stay || !streams(OptimizerClass::Nvme, ParamHome::Fetched), "frozen parameters are spilled before trained ones");
    let params = home(ParamHome::Spilled) || fetches;
    assert!(!fetches || !home(ParamHome::Resident), "streamed parameters are spilled last of all");
    assert_eq!(fetches, nvme.fetch_buffers > 0);
    assert!(!params || layout.ids().all(|c| plan.chunks[c.index()].class != OptimizerClass::Host), "parameters are spilled last");
    let used = plan.host.total() - plan.host.undo;
    let spills_grads: Vec<&ChunkId> = spilled.iter().filter(|c| plan.chunks[c.index()].spills_grads()).collect();
    assert_eq!(nvme.grad_buffers > 0, !spills_grads.is_empty());
    if !spills_grads.is_empty() {
        // Parameters that need too many buffers to be fetched may stay; gradients go last all the same.
        assert!(layout.ids().all(|c| plan.chunks[c.index()].class != OptimizerClass::Host), "gradients are spilled last");
        assert!(!home(ParamHome::Resident), "gradients are spilled last");
        // Without spilled gradients their buffers would not be there, nor, without accumulation, their landing.
        let landing = if plan.accumulation > 1 { 0 } else { plan.host.staging };
        let grad_buffers = u64::from(nvme.grad_buffers) * nvme.grad_buffer_bytes;
        let kept: u64 = spills_grads.iter().map(|c| back(c)).sum();
        assert!(used + kept - landing - grad_buffers > request.host_budget, "gradients were spilled for nothing");
        return staging;
    }
    let fetched = spilled.iter().filter(|c| plan.chunks[c.index()].home == ParamHome::Fetched).count();
    let spared = if spilled.len() == 1 && !params || fetched == 1 { staging } else { 0 };
    assert!(spilled.iter().map(back).max().unwrap() + used - spared > request.host_budget, "something was spilled for nothing");
    staging
}

/// Everything that the plan says about memory, from the definitions.
fn check_memory(layout: &Layout, trace: &Trace, request: &PlanRequest, plan: &Plan) {
    let up = |bytes: u64, to: u64| bytes.div_ceil(to) * to;
    assert!(plan.device.total() <= request.device_budget, "device {} > {}", plan.device.total(), request.device_budget);
    assert!(plan.host.total() <= request.host_budget, "host {} > {}", plan.host.total(), request.host_budget);
    let (mut resident, mut states, mut accumulators) = (0, 0, 0);
    let mut host = HostBytes::default();
    let (mut largest_grad, mut largest_visit) = (0, 0);
    for (chunk, place) in layout.ids().zip(&plan.chunks) {
        let numel = layout.chunks[chunk.index()].state_numel;
        assert_eq!(place.class == OptimizerClass::Frozen, numel == 0);
        assert!(!place.class.steps_on_device() || place.home == ParamHome::Resident);
        assert!(!place.class.steps_on_device() || place.accumulate == Tier::Device);
        let without_states = place.class == OptimizerClass::Frozen && place.home == ParamHome::Fetched;
        assert!(!place.home.is_spilled() || place.class == OptimizerClass::Nvme || without_states);
        if !place.home.is_streamed() {
            resident += up(layout.param_bytes(chunk), 256);
        }
        if place.class == OptimizerClass::Device {
            states += layout.state_bytes(chunk);
        }
        if place.class == OptimizerClass::Streamed {
            largest_visit = largest_visit.max(layout.state_bytes(chunk));
        }
        let on_cpu = matches!(place.class, OptimizerClass::Host | OptimizerClass::Nvme);
        assert!(numel > 0 || place.accumulate == Tier::Host);
        let sums_on_device = plan.accumulation > 1 && place.accumulate == Tier::Device;
        accumulators += if sums_on_device { numel * 4 } else { 0 };
        if (on_cpu && place.home == ParamHome::Resident) || place.home == ParamHome::Streamed {
            host.params += up(layout.param_bytes(chunk), 4096);
        }
        if matches!(place.class, OptimizerClass::Host | OptimizerClass::Streamed) {
            host.states += up(numel * layout.precision.master_bytes(), 4096) + 2 * up(numel * 4, 4096);
        }
        assert!(!place.spills_grads() || place.class == OptimizerClass::Nvme);
        if on_cpu && !place.spills_grads() {
            host.gradients += up(if plan.accumulation > 1 { numel * 4 } else { layout.grad_bytes(chunk) }, 4096);
        }
        if on_cpu && !sums_on_device && (plan.accumulation > 1 || place.spills_grads()) {
            largest_grad = largest_grad.max(layout.grad_bytes(chunk));
        }
    }
    assert!(plan.landing_buffers == 2 || plan.landing_buffers > 2 && plan.late_moments && largest_grad > 0);
    assert!(!plan.late_moments || request.clip_mode == ClipMode::Defer && plan.nvme.is_none());
    host.staging = u64::from(plan.landing_buffers) * up(largest_grad, 4096);
    host.undo = plan.host.undo;
    let offloads = |unit: u32| plan.activations[unit as usize] == ActivationPlan::Offload;
    let offloaded = trace.ops.iter().filter(|op| op.phase == Phase::Forward && offloads(op.unit));
    host.activations = up(offloaded.map(|op| trace.units[op.unit as usize].offload_host_bytes).sum(), 4096);
    for unit in trace.units.iter().enumerate().filter(|(unit, _)| offloads(*unit as u32)).map(|(_, unit)| unit) {
        assert_ne!(request.offload, Offload::None);
        assert!(2 * unit.offload_host_bytes <= plan.offload_window_bytes, "the window is too small for `{}`", unit.name);
    }
    host.nvme_staging = check_spilled(layout, request, plan);
    assert_eq!(plan.host, host);
    assert!(plan.undo_bytes <= plan.host.undo);
    assert_eq!(plan.device.resident_params, resident);
    assert_eq!(plan.device.states, states);
    assert_eq!(plan.device.accumulators, accumulators);
    // Three buffers for the largest chunk that passes through, or pieces of it; a search may have left room for a larger one.
    assert!(plan.device.staging >= 3 * largest_visit.min(64 << 20));
    assert!(plan.device.staging <= if largest_visit > 0 { 3 * (64 << 20) } else { 0 });
    assert_eq!(plan.device.stream_slab, plan.stream_slab_bytes);
    assert_eq!(plan.device.reserve, request.reserve_bytes);
    let at = plan.device_peak_op.index();
    assert_eq!(plan.device.activations, activations_at(trace, plan, at));
    assert_eq!(plan.device.gradients, gradients_at(layout, trace, plan, at));
    let peak = (0..trace.ops.len()).map(|at| activations_at(trace, plan, at) + gradients_at(layout, trace, plan, at)).max();
    assert_eq!(Some(plan.device.activations + plan.device.gradients), peak);
    for op in trace.ids() {
        let streamed = |c: &&ChunkId| plan.chunks[c.index()].home.is_streamed();
        let needed: u64 = trace.chunks(op).iter().filter(streamed).map(|&c| up(layout.param_bytes(c), 256)).sum();
        assert!(needed <= plan.stream_slab_bytes, "{} does not fit the slab", trace.op_name(op));
    }
}

fn requests() -> impl Strategy<Value = PlanRequest> {
    let recompute = prop_oneof![1 => Just(Recompute::None), 1 => Just(Recompute::Full), 3 => Just(Recompute::Auto)];
    let offload = prop_oneof![Just(Offload::None), Just(Offload::Auto), Just(Offload::Full)];
    let clip = prop_oneof![Just(ClipMode::Defer), Just(ClipMode::Speculate), Just(ClipMode::Auto)];
    let speed = || (0.0..4.0_f64).prop_map(|e| 10_f64.powf(e));
    let fractions = prop::option::weighted(0.3, (0.0..=1.0_f64, 0.0..=1.0_f64, 0.0..=1.0_f64));
    let speeds = (speed(), speed(), speed(), speed(), speed());
    let nvme = prop::option::of((0_u64..8_000_000, speed(), speed()));
    let accumulate = prop_oneof![3 => Just(None), 1 => Just(Some(Tier::Device)), 1 => Just(Some(Tier::Host))];
    let accumulation = (1_u32..4, accumulate);
    let numbers = (0_u64..400_000, 0_u64..1_000_000, 0_u64..10_000, prop_oneof![3 => Just(None), 1 => any::<bool>().prop_map(Some)]);
    (numbers, (recompute, offload), accumulation, clip, speeds, fractions, nvme).prop_map(
        |(
            (device_budget, host_budget, reserve_bytes, late_moments),
            (recompute, offload),
            (accumulation, accumulate),
            clip_mode,
            speeds,
            fractions,
            nvme,
        )| {
            PlanRequest {
                nvme: nvme.map(|(budget, read, write)| NvmeRequest { budget, read_bytes: 1e4 * read, write_bytes: 1e4 * write }),
                device_budget,
                host_budget,
                reserve_bytes,
                placement: fractions.map_or(Placement::Auto, |(optim, param, stream)| Placement::Static {
                    shard_param_frac: 1.0,
                    offload_optim_frac: optim,
                    offload_param_frac: param * optim,
                    stream_optim_frac: stream * (1.0 - param),
                }),
                recompute,
                offload,
                accumulation,
                accumulate,
                late_moments,
                visiting: true,
                clip_mode,
                speeds: Speeds {
                    flops: 1e6 * speeds.0,
                    h2d_bytes: 1e4 * speeds.1,
                    d2h_bytes: 1e4 * speeds.2,
                    host_adam_params: 1e4 * speeds.3,
                    host_params_first: None,
                    device_memory_bytes: 1e6 * speeds.4,
                },
            }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn budgets_hold_and_the_numbers_are_right((layout, trace) in models(), request in requests()) {
        match plan(&layout, &trace, &request) {
            Ok(plan) => check_memory(&layout, &trace, &request, &plan),
            Err(PlanError::Device { needed, budget, shortfall, breakdown, .. }) => {
                prop_assert_eq!(needed, breakdown.total());
                prop_assert_eq!(needed, budget + shortfall);
                prop_assert!(needed > request.device_budget);
            }
            Err(PlanError::Host { needed, budget, shortfall, breakdown }) => {
                prop_assert_eq!(needed, breakdown.total());
                prop_assert_eq!(needed, budget + shortfall);
                prop_assert!(needed > request.host_budget);
            }
            Err(PlanError::Nvme { needed, budget, shortfall, breakdown }) => {
                prop_assert_eq!(needed, breakdown.file_bytes);
                prop_assert_eq!(needed, budget + shortfall);
                prop_assert_eq!(budget, request.nvme.unwrap().budget);
            }
            Err(PlanError::Invalid(reason)) => prop_assert!(matches!(request.placement, Placement::Static { .. }), "{}", reason),
        }
    }

    #[test]
    fn the_minimum_is_tight((layout, trace) in models(), request in requests()) {
        let device_budget = minimum_device_bytes(&layout, &trace, &request);
        if device_budget == u64::MAX {
            let generous = PlanRequest { device_budget: 1 << 50, ..request };
            prop_assert!(plan(&layout, &trace, &generous).is_err());
        } else {
            let at = PlanRequest { device_budget, ..request };
            let tightest = plan(&layout, &trace, &at);
            prop_assert!(tightest.is_ok(), "{:?}", tightest);
            check_memory(&layout, &trace, &at, &tightest.unwrap());
            if device_budget > 0 {
                let below = PlanRequest { device_budget: device_budget - 1, ..at };
                prop_assert!(plan(&layout, &trace, &below).is_err());
            }
        }
    }

    #[test]
    fn more_device_memory_never_predicts_a_slower_step((layout, trace) in models(), request in requests()) {
        let mut slowest = f64::INFINITY;
        for device_budget in (0..=400_000).step_by(20_000) {
            match plan(&layout, &trace, &PlanRequest { device_budget, ..request.clone() }) {
                Ok(plan) => {
                    prop_assert!(plan.predicted_step_s <= slowest);
                    slowest = plan.predicted_step_s;
                }
                Err(_) => prop_assert!(slowest.is_infinite(), "{} bytes are too few, fewer were not", device_budget),
            }
        }
    }

    #[test]
    fn more_host_memory_never_predicts_a_slower_step((layout, trace) in models(), request in requests()) {
        let mut slowest = f64::INFINITY;
        for host_budget in (0..=1_000_000).step_by(50_000) {
            match plan(&layout, &trace, &PlanRequest { host_budget, ..request.clone() }) {
                Ok(plan) => {
                    prop_assert!(plan.predicted_step_s <= slowest);
                    slowest = plan.predicted_step_s;
                }
                Err(_) => prop_assert!(slowest.is_infinite(), "{} bytes are too few, fewer were not", host_budget),
            }
        }
    }

    #[test]
    fn a_choice_more_never_predicts_a_slower_step((layout, trace) in models(), request in requests()) {
        let with = |offload| plan(&layout, &trace, &PlanRequest { offload, recompute: Recompute::None, ..request.clone() });
        if let (Ok(auto), Ok(fixed)) = (with(Offload::Auto), with(Offload::None)) {
            prop_assert!(auto.predicted_step_s <= fixed.predicted_step_s);
        }
        // Beside a disk the planner's own choice is not to offload.
        if let (Ok(fixed), None) = (with(Offload::Full), request.nvme) {
            prop_assert!(with(Offload::Auto).unwrap().predicted_step_s <= fixed.predicted_step_s);
        }
    }

    #[test]
    fn faster_links_never_predict_a_slower_step((layout, trace) in models(), request in requests(), factor in 1.0..10.0_f64) {
        let speeds = Speeds {
            h2d_bytes: request.speeds.h2d_bytes * factor,
            d2h_bytes: request.speeds.d2h_bytes * factor,
            ..request.speeds
        };
        if let Ok(slow) = plan(&layout, &trace, &request) {
            let fast = plan(&layout, &trace, &PlanRequest { speeds, ..request }).unwrap();
            prop_assert!(fast.predicted_step_s <= slow.predicted_step_s * (1.0 + 1e-12));
        }
    }

    #[test]
    fn what_is_planned_survives_json((layout, trace) in models(), request in requests()) {
        let layout_json = serde_json::to_string(&layout).unwrap();
        prop_assert_eq!(serde_json::from_str::<Layout>(&layout_json).unwrap(), layout.clone());
        let trace_json = serde_json::to_string(&trace).unwrap();
        prop_assert_eq!(serde_json::from_str::<Trace>(&trace_json).unwrap(), trace.clone());
        let request_json = serde_json::to_string(&request).unwrap();
        prop_assert_eq!(serde_json::from_str::<PlanRequest>(&request_json).unwrap(), request.clone());
        if let Ok(plan) = plan(&layout, &trace, &request) {
            let json = serde_json::to_string(&plan).unwrap();
            prop_assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
        }
    }
}

/// Of the resident chunks, those used first have their states on the device.
#[test]
fn llama_7b_on_an_h100() {
    let (layout, trace) = llama_7b(16_384);
    let request = h100(80 * GIB, 128 * GIB);
    let plan = plan(&layout, &trace, &request).unwrap();
    check_memory(&layout, &trace, &request, &plan);
    let resident: Vec<_> = plan.chunks.iter().filter(|c| c.home == ParamHome::Resident).map(|c| c.class).collect();
    assert_eq!(resident.first(), Some(&OptimizerClass::Device));
    assert!(resident.windows(2).all(|pair| pair[0] == OptimizerClass::Device || pair[1] == OptimizerClass::Host), "{resident:?}");
    // Its host step hides behind the first forward; with the moments later, more of it does.
    let whole = tierwise_core::planner::plan(&layout, &trace, &PlanRequest { late_moments: Some(false), ..request }).unwrap();
    assert_eq!(whole.bound_by, "compute");
    assert!(plan.late_moments && !whole.late_moments);
    assert!(plan.predicted_step_s < 0.99 * whole.predicted_step_s, "{} {}", plan.predicted_step_s, whole.predicted_step_s);
    // Few threads are no faster for moving less.
    let speeds = Speeds { host_params_first: Some(5.5e9), ..h100(0, 0).speeds };
    let bound = tierwise_core::planner::plan(&layout, &trace, &PlanRequest { speeds, ..h100(80 * GIB, 128 * GIB) }).unwrap();
    assert_eq!((bound.late_moments, bound.predicted_step_s.to_bits()), (false, whole.predicted_step_s.to_bits()));
    let on_host = |plan: &Plan| plan.chunks.iter().filter(|c| c.class == OptimizerClass::Host).count();
    assert!(on_host(&plan) > on_host(&whole));
    assert!(count(&plan, ActivationPlan::Keep) > count(&whole, ActivationPlan::Keep));
    assert!(plan.activations.contains(&ActivationPlan::Recompute));
}

#[test]
fn llama_70b_streams_without_waiting_wherever_the_slab_has_room_for_two() {
    let (layout, trace) = llama_70b(4096);
    let minimum = minimum_device_bytes(&layout, &trace, &h100(0, 1200 * GIB));
    assert!(minimum < 12 * GIB, "{minimum}");
    let mut roomy = 0;
    for device_budget in [minimum, minimum + GIB, 12 * GIB, 16 * GIB, 24 * GIB, 48 * GIB, 80 * GIB] {
        let request = h100(device_budget, 1200 * GIB);
        let plan = plan(&layout, &trace, &request).unwrap();
        check_memory(&layout, &trace, &request, &plan);
        let streamed = |c: &ChunkId| plan.chunks[c.index()].home.is_streamed();
        let largest = layout.ids().filter(streamed).map(|c| layout.param_bytes(c)).max().unwrap();
        let waits = plan.fetches.iter().filter(|fetch| fetch.issued_at == fetch.needed_at).count();
        if plan.stream_slab_bytes >= 2 * largest {
            roomy += 1;
            assert_eq!(waits, 0, "{device_budget} bytes: {} fetches", plan.fetches.len());
        }
        // Every streamed chunk comes at least once in each cycle.
        let fetched: std::collections::BTreeSet<_> = plan.fetches.iter().map(|fetch| fetch.chunk).collect();
        assert_eq!(fetched, layout.ids().filter(streamed).collect());
    }
    assert!(roomy >= 4, "{roomy}");
}

fn count(plan: &Plan, kind: ActivationPlan) -> usize {
    plan.activations.iter().filter(|kept| **kept == kind).count()
}

/// What the idle link carries for nothing is not recomputed, and more is not put on it.
#[test]
fn llama_7b_offloads_what_the_link_hides() {
    let (layout, trace) = llama_7b(16_384);
    let base = h100(80 * GIB, 200 * GIB);
    let recomputing = plan(&layout, &trace, &base).unwrap();
    let request = PlanRequest { offload: Offload::Auto, ..base };
    let both = plan(&layout, &trace, &request).unwrap();
    check_memory(&layout, &trace, &request, &both);
    assert!(count(&both, ActivationPlan::Offload) > 0);
    assert!(count(&both, ActivationPlan::Recompute) < count(&recomputing, ActivationPlan::Recompute));
    assert!(both.predicted_step_s < recomputing.predicted_step_s * 0.99, "{} {}", both.predicted_step_s, recomputing.predicted_step_s);
    let slow = |h2d_bytes, d2h_bytes| {
        let speeds = Speeds { h2d_bytes, d2h_bytes, ..base.speeds };
        plan(&layout, &trace, &PlanRequest { offload: Offload::Full, recompute: Recompute::None, speeds, ..h100(80 * GIB, 200 * GIB) })
            .unwrap()
    };
    let (balanced, forward, backward) = (slow(1e15, 1e15), slow(1e15, 10e9), slow(10e9, 1e15));
    assert_eq!(count(&balanced, ActivationPlan::Offload), 32);
    assert_eq!(forward.bound_by, "d2h");
    assert_eq!(backward.bound_by, "h2d");
    // Less than a step's worth of copies, but more than forward, a third of it, or backward hides.
    let (computed, moved) = (balanced.predicted_step_s, balanced.host.activations as f64);
    let late_out = slow(1e15, moved / (0.6 * computed)).predicted_step_s / computed;
    let late_in = slow(moved / (0.8 * computed), 1e15).predicted_step_s / computed;
    assert!((1.15..1.3).contains(&late_out), "{late_out}");
    assert!((1.05..1.2).contains(&late_in), "{late_in}");
    // All of it goes over the slow link, at best while the device computes.
    for slow in [&forward, &backward] {
        assert!(slow.predicted_step_s > moved / 10e9 && slow.predicted_step_s < moved / 10e9 + balanced.predicted_step_s);
    }
}

/// The inputs of 80 recomputed layers are more than two layers' activations.
#[test]
fn llama_70b_fits_offloaded_where_nothing_else_fits() {
    let (layout, trace) = llama_70b(16_384);
    let minimum = |recompute, offload| minimum_device_bytes(&layout, &trace, &PlanRequest { recompute, offload, ..h100(0, 2000 * GIB) });
    let recomputed = minimum(Recompute::Auto, Offload::None);
    let offloaded = minimum(Recompute::None, Offload::Full);
    assert!(offloaded < recomputed, "{offloaded} {recomputed}");
    assert!(minimum(Recompute::Auto, Offload::Auto) <= offloaded);
    // Without the host memory for it there is nothing to choose.
    let host = |gib| plan(&layout, &trace, &PlanRequest { offload: Offload::Auto, ..h100(offloaded, gib * GIB) });
    let fitting = host(2000).unwrap();
    assert!(count(&fitting, ActivationPlan::Offload) > 40);
    assert!(matches!(host(1100).unwrap_err(), PlanError::Host { .. }));
}

/// Gradients that are added up in host memory bound a micro-batch, however fast the device computes.
#[test]
fn host_accumulation_bounds_the_prediction() {
    let (layout, trace) = llama_7b(4096);
    let host_numel = layout.chunks.iter().map(|c| c.state_numel).sum::<u64>() as f64;
    let predict = |accumulation: u32, flops: f64, optim: f64| {
        let placement =
            Placement::Static { shard_param_frac: 1.0, offload_optim_frac: optim, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
        let base = h100(400 * GIB, 400 * GIB);
        // Links and device memory far faster than host memory, so that nothing else bounds it.
        let speeds = Speeds { flops, h2d_bytes: 1e15, d2h_bytes: 1e15, device_memory_bytes: 1e17, ..base.speeds };
        let request = PlanRequest { accumulation, placement, recompute: Recompute::None, speeds, ..base };
        plan(&layout, &trace, &PlanRequest { accumulate: Some(Tier::Host), ..request }).unwrap()
    };
    assert_eq!(predict(2, 650e15, 1.0).bound_by, "cpu_adam");
    assert_eq!(predict(16, 650e15, 1.0).bound_by, "host_memory");
    let adam = host_numel / 5.5e9;
    for accumulation in [2, 4, 8] {
        // 12 bytes a parameter: the landing copy, then the gradient and the accumulator read and the accumulator written.
        let adding = f64::from(accumulation) * host_numel * 12.0 / (26.0 * 5.5e9);
        let got = predict(accumulation, 650e15, 1.0).predicted_step_s;
        assert!((got / (adding + adam) - 1.0).abs() < 1e-3, "{accumulation}: {got} s, expected {} s", adding + adam);
        // Less on the host adds less, and slow compute hides it all.
        assert!(predict(accumulation, 650e15, 0.5).predicted_step_s < got);
        let (few, all) = (predict(accumulation, 100e12, 0.2), predict(accumulation, 100e12, 1.0));
        assert!(all.predicted_step_s - few.predicted_step_s <= adam);
    }
    assert!((predict(1, 650e15, 1.0).predicted_step_s / adam - 1.0).abs() < 1e-3, "one micro-batch accumulates nothing");
}

/// With room on the device, chunks that the host steps add up their gradients there: the latest-used ones, and as many as fit.
#[test]
fn sums_are_taken_on_the_device_where_that_is_faster() {
    let (layout, trace) = llama_7b(4096);
    let placement = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    // A host memory that cannot keep up with a micro-batch.
    let base = h100(0, 400 * GIB);
    let speeds = Speeds { host_adam_params: 2e9, host_params_first: None, ..base.speeds };
    let request = PlanRequest { accumulation: 16, placement, recompute: Recompute::Full, speeds, ..base };
    let minimum = minimum_device_bytes(&layout, &trace, &request);
    let planned = |more: u64| plan(&layout, &trace, &PlanRequest { device_budget: minimum + more, ..request.clone() }).unwrap();
    let on_device = |plan: &Plan| plan.chunks.iter().filter(|c| c.accumulate == Tier::Device).count();
    let (none, some, many) = (planned(0), planned(6 * GIB), planned(40 * GIB));
    assert_eq!((on_device(&none), none.bound_by.as_str()), (0, "host_memory"));
    assert!(on_device(&some) > 0 && on_device(&some) < layout.chunks.len());
    assert_eq!(some.chunks.first().unwrap().accumulate, Tier::Host);
    assert_eq!(some.chunks.last().unwrap().accumulate, Tier::Device);
    // Enough of them that host memory keeps up with the rest; more would only cost the device.
    assert!(on_device(&many) > on_device(&some));
    assert_ne!(many.bound_by, "host_memory");
    assert!(none.predicted_step_s > some.predicted_step_s && some.predicted_step_s > many.predicted_step_s);
    // As asked for.
    for (tier, expected) in [(Tier::Host, 0), (Tier::Device, layout.chunks.len())] {
        let asked = PlanRequest { accumulate: Some(tier), device_budget: minimum + 40 * GIB, ..request.clone() };
        assert_eq!(on_device(&plan(&layout, &trace, &asked).unwrap()), expected);
    }
    // One micro-batch adds nothing up.
    let single = plan(&layout, &trace, &PlanRequest { accumulation: 1, device_budget: minimum + 40 * GIB, ..request.clone() }).unwrap();
    assert_eq!(on_device(&single), 0);
}

/// What speculation does in backward need not hide in forward; the undo records of its chunks have to fit.
#[test]
fn speculation_hides_host_steps_in_backward_as_far_as_undo_records_fit() {
    let (layout, trace) = llama_7b(4096);
    let placement = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    let seconds = |clip_mode, host_budget| {
        let request = PlanRequest { placement, clip_mode, recompute: Recompute::Full, ..h100(400 * GIB, host_budget) };
        plan(&layout, &trace, &request).unwrap().predicted_step_s
    };
    let least = plan(&layout, &trace, &PlanRequest { placement, recompute: Recompute::Full, ..h100(400 * GIB, 400 * GIB) }).unwrap();
    let least = least.host.total();
    let defer = seconds(ClipMode::Defer, 400 * GIB);
    assert_eq!(seconds(ClipMode::Speculate, least).to_bits(), defer.to_bits(), "no room for an undo record");
    let (some, all) = (seconds(ClipMode::Speculate, least + 2 * GIB), seconds(ClipMode::Speculate, 400 * GIB));
    assert!(all < some && some < defer, "{all} {some} {defer}");
    assert_eq!(seconds(ClipMode::Auto, 400 * GIB).to_bits(), all.to_bits());
}

#[test]
fn a_device_that_is_too_small_is_told_where_and_by_how_much() {
    let (layout, trace) = llama_7b(16_384);
    let request = h100(GIB, 200 * GIB);
    let minimum = minimum_device_bytes(&layout, &trace, &request);
    let error = plan(&layout, &trace, &request).unwrap_err();
    let PlanError::Device { op, needed, shortfall, .. } = &error else { panic!("{error}") };
    assert_eq!(*needed, minimum);
    assert_eq!(*shortfall, minimum - GIB);
    assert!(op.contains("backward") || op.contains("forward"), "{op}");
}

#[test]
fn a_host_that_is_too_small_is_told_by_how_much() {
    let (layout, trace) = llama_7b(4096);
    let error = plan(&layout, &trace, &h100(40 * GIB, GIB)).unwrap_err();
    let PlanError::Host { needed, budget, .. } = error else { panic!("{error}") };
    assert_eq!(budget, GIB);
    assert!(plan(&layout, &trace, &h100(40 * GIB, needed)).is_ok());
    assert!(plan(&layout, &trace, &h100(40 * GIB, needed - 1)).is_err());
}

#[test]
fn contradictions_are_refused_with_numbers() {
    let (layout, trace) = llama_7b(1024);
    let placed = |shard, optim, param| PlanRequest {
        placement: Placement::Static {
            shard_param_frac: shard,
            offload_optim_frac: optim,
            offload_param_frac: param,
            stream_optim_frac: 0.0,
        },
        ..h100(200 * GIB, 200 * GIB)
    };
    for (request, says) in [
        (placed(1.0, 0.2, 0.5), "raise offload_optim_frac (now 0.2)"),
        (placed(0.3, 1.0, 0.5), "shard_param_frac=0.3"),
        (placed(1.0, 1.5, 0.5), "offload_optim_frac is 1.5"),
        (PlanRequest { placement: all_on_host(-0.1), ..h100(GIB, GIB) }, "stream_optim_frac is -0.1"),
        (
            PlanRequest {
                placement: Placement::Static {
                    shard_param_frac: 1.0,
                    offload_optim_frac: 1.0,
                    offload_param_frac: 0.5,
                    stream_optim_frac: 0.75,
                },
                ..h100(GIB, GIB)
            },
            "lower stream_optim_frac or offload_param_frac",
        ),
        (PlanRequest { accumulation: 0, ..h100(GIB, GIB) }, "accumulation is 0"),
        (PlanRequest { recompute: Recompute::Units(vec![true]), ..h100(GIB, GIB) }, "recompute names 1 units, the trace has 35"),
        (PlanRequest { recompute: Recompute::Units(vec![true; 35]), ..h100(GIB, GIB) }, "unit `embed` cannot be recomputed"),
    ] {
        let error = plan(&layout, &trace, &request).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn fractions_place_the_latest_used_chunks() {
    let (layout, trace) = llama_7b(1024);
    let request = PlanRequest {
        placement: Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 0.5, offload_param_frac: 0.25, stream_optim_frac: 0.0 },
        ..h100(200 * GIB, 200 * GIB)
    };
    let plan = plan(&layout, &trace, &request).unwrap();
    let total: u64 = layout.chunks.iter().map(|c| c.numel).sum();
    let share = |chosen: &dyn Fn(usize) -> bool| {
        (0..layout.chunks.len()).filter(|&c| chosen(c)).map(|c| layout.chunks[c].numel).sum::<u64>() as f64 / total as f64
    };
    let host = share(&|c| plan.chunks[c].class == OptimizerClass::Host);
    let streamed = share(&|c| plan.chunks[c].home == ParamHome::Streamed);
    assert!((0.5..0.54).contains(&host), "{host}");
    assert!((0.25..0.29).contains(&streamed), "{streamed}");
    assert_eq!(plan.chunks[0].class, OptimizerClass::Device);
    assert_eq!(plan.chunks.last().unwrap().home, ParamHome::Streamed);
}

#[test]
fn undo_records_take_what_the_host_has_left() {
    let (layout, trace) = llama_7b(16_384);
    let deferred = plan(&layout, &trace, &h100(60 * GIB, 300 * GIB)).unwrap();
    assert_eq!((deferred.undo_bytes, deferred.host.undo), (0, 0));
    for spare in [0, GIB + 5, 200 * GIB] {
        let host_budget = deferred.host.total() + spare;
        let request = PlanRequest { clip_mode: ClipMode::Auto, ..h100(60 * GIB, host_budget) };
        let plan = plan(&layout, &trace, &request).unwrap();
        // Where records find room, the planner may leave more to the host.
        let all: u64 = layout.ids().filter(|c| plan.chunks[c.index()].class == OptimizerClass::Host).map(|c| layout.undo_bytes(c)).sum();
        let left = host_budget - (plan.host.total() - plan.host.undo);
        assert_eq!(plan.undo_bytes, all.min(left / 4096 * 4096));
        check_memory(&layout, &trace, &request, &plan);
    }
}

/// Device memory that nothing else wants lets the training thread run ahead of the gradients that leave.
#[test]
fn more_gradients_are_on_their_way_where_device_memory_is_left() {
    let (layout, trace) = llama_7b(16_384);
    let on_host = PlanRequest { placement: all_on_host(0.0), recompute: Recompute::Full, ..h100(80 * GIB, 128 * GIB) };
    let planned = |request: &PlanRequest| {
        let plan = plan(&layout, &trace, request).unwrap();
        check_memory(&layout, &trace, request, &plan);
        plan
    };
    let largest = layout.ids().map(|c| layout.grad_bytes(c)).max().unwrap();
    let ample = planned(&on_host);
    assert_eq!((ample.grad_in_flight_bytes, ample.grad_ahead_bytes), (4 * largest, 3 * largest));
    assert_eq!(ample.device.gradients, 5 * largest);
    // What is there decides, and fewer of them change nothing else.
    let least = minimum_device_bytes(&layout, &trace, &on_host);
    for (device_budget, times) in [(ample.device.total(), 4), (ample.device.total() - 1, 3), (least, 1)] {
        let plan = planned(&PlanRequest { device_budget, ..on_host.clone() });
        assert_eq!(plan.grad_in_flight_bytes, times * largest, "{device_budget}");
        assert_eq!((plan.chunks, plan.predicted_step_s), (ample.chunks.clone(), ample.predicted_step_s));
    }
    // A thread that is far ahead commits before gradients land that could have been speculated with.
    for clip_mode in [ClipMode::Speculate, ClipMode::Auto] {
        assert_eq!(planned(&PlanRequest { clip_mode, ..on_host.clone() }).grad_in_flight_bytes, largest);
    }
    let nothing = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 0.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    assert_eq!(planned(&PlanRequest { placement: nothing, ..h100(200 * GIB, GIB) }).grad_in_flight_bytes, 0);
    // Where they land in buffers, these are the limit.
    let adding = PlanRequest { accumulation: 2, accumulate: Some(Tier::Host), ..on_host };
    for (late_moments, host_budget, buffers) in [(false, 128 * GIB, 2), (true, 128 * GIB, 35)] {
        let plan = planned(&PlanRequest { late_moments: Some(late_moments), host_budget, ..adding.clone() });
        assert_eq!((plan.landing_buffers, plan.grad_in_flight_bytes), (buffers, u64::from(buffers.min(4)) * largest));
    }
}

/// Chunks that stay between their uses come before gradients: they save copies where copies bound the step.
#[test]
fn the_slab_of_streamed_parameters_grows_before_more_gradients_are_on_their_way() {
    let (layout, trace) = llama_7b(4096);
    let streamed = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 1.0, stream_optim_frac: 0.0 };
    let slow = Speeds { h2d_bytes: 10e9, d2h_bytes: 10e9, ..h100(GIB, GIB).speeds };
    let mut both = 0;
    for device_budget in (8..24).map(|gib| gib * GIB) {
        let request = PlanRequest { placement: streamed, speeds: slow, recompute: Recompute::Full, ..h100(device_budget, 200 * GIB) };
        let ahead = plan(&layout, &trace, &request).unwrap();
        check_memory(&layout, &trace, &request, &ahead);
        assert_eq!(ahead.bound_by, "h2d");
        // Nothing of a plan that may speculate goes to gradients.
        let without = plan(&layout, &trace, &PlanRequest { clip_mode: ClipMode::Speculate, ..request }).unwrap();
        assert_eq!(ahead.stream_slab_bytes, without.stream_slab_bytes);
        both += u32::from(ahead.grad_in_flight_bytes > without.grad_in_flight_bytes);
    }
    assert!(both > 0, "what the slab does not take goes to gradients");
}

/// While the moments of the last step are written, gradients of the first micro-batch wait for them where they landed.
#[test]
fn late_moments_take_buffers_for_gradients_that_land_meanwhile() {
    let (layout, trace) = llama_7b(16_384);
    let ample = PlanRequest { accumulation: 8, recompute: Recompute::Full, ..h100(80 * GIB, 128 * GIB) };
    let planned = |request: &PlanRequest| {
        let plan = plan(&layout, &trace, request).unwrap();
        check_memory(&layout, &trace, request, &plan);
        plan
    };
    // Of these placements each sends its gradients to the host for every micro-batch.
    let placement = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 0.8, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    let on_host = PlanRequest { placement, accumulate: Some(Tier::Host), ..ample };
    let late = planned(&on_host);
    let whole = planned(&PlanRequest { late_moments: Some(false), ..on_host.clone() });
    assert!(late.late_moments && late.landing_buffers > 2, "{}", late.landing_buffers);
    assert!(late.predicted_step_s < whole.predicted_step_s);
    // As many as host memory has room for.
    let one_more = PlanRequest { host_budget: whole.host.total() + whole.host.staging / 2, ..on_host.clone() };
    let tight = planned(&PlanRequest { late_moments: Some(true), ..one_more.clone() });
    assert_eq!((tight.landing_buffers, tight.host.total()), (3, one_more.host_budget));
    assert!(tight.predicted_step_s > late.predicted_step_s);
    assert!(planned(&one_more).predicted_step_s <= whole.predicted_step_s);
}

fn all_on_host(stream_optim_frac: f64) -> Placement {
    Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac }
}

/// Where the CPU's steps do not hide behind the forward, some states visit the device instead, as many as make both finish together.
#[test]
fn states_visit_the_device_where_the_cpu_alone_is_slower() {
    let (layout, trace) = llama_7b(1024);
    let numel = layout.chunks.iter().map(|c| c.state_numel).sum::<u64>() as f64;
    let request = |placement| PlanRequest { placement, recompute: Recompute::None, ..h100(400 * GIB, 400 * GIB) };
    let seconds = |share: f64| plan(&layout, &trace, &request(all_on_host(share))).unwrap();
    let forward: f64 = trace.units.iter().map(|u| u.flops).sum::<f64>() / 650e12;
    let base = seconds(0.0).predicted_step_s - (numel / 5.5e9 - forward);
    // Host memory: 26 bytes per parameter that the CPU steps, 20 per one that passes. The link: 10 each way, and rewritten parameters.
    for share in [0.1, 0.2, 0.3, 0.5, 0.8, 1.0] {
        let plan = seconds(share);
        let visiting: u64 = (0..layout.chunks.len())
            .filter(|&c| plan.chunks[c].class == OptimizerClass::Streamed)
            .map(|c| layout.chunks[c].state_numel)
            .sum();
        let (on_cpu, visiting) = (numel - visiting as f64, visiting as f64);
        assert!((share..share + 0.04).contains(&(visiting / numel)), "{share}: {}", visiting / numel);
        let memory = (26.0 * on_cpu + 20.0 * visiting) / (26.0 * 5.5e9);
        let link = (10.0 * visiting + 2.0 * on_cpu) / 45e9;
        let expected = base + memory.max(link) - forward;
        assert!((plan.predicted_step_s / expected - 1.0).abs() < 1e-3, "{share}: {} s, expected {expected} s", plan.predicted_step_s);
        assert_eq!(plan.bound_by, if link > memory { "streamed" } else { "cpu_adam" });
    }
}

/// With accumulation, chunks that add up their gradients on the device need no more of its memory when their states visit.
#[test]
fn the_planner_divides_off_device_steps_between_link_and_cpu() {
    let (layout, trace) = llama_7b(4096);
    let request = PlanRequest { accumulation: 8, accumulate: Some(Tier::Device), recompute: Recompute::Full, ..h100(56 * GIB, 400 * GIB) };
    let plan = plan(&layout, &trace, &request).unwrap();
    check_memory(&layout, &trace, &request, &plan);
    let resident = plan.chunks.iter().filter(|c| c.home == ParamHome::Resident);
    let off_device: Vec<OptimizerClass> = resident.map(|c| c.class).filter(|c| *c != OptimizerClass::Device).collect();
    let count = |class| off_device.iter().filter(|c| **c == class).count();
    assert!(count(OptimizerClass::Streamed) > 2 && count(OptimizerClass::Host) > 2, "{off_device:?}");
    // Spread: in every stretch of the forward both have something to do.
    for stretch in off_device.windows(6) {
        assert!(stretch.contains(&OptimizerClass::Streamed) && stretch.contains(&OptimizerClass::Host), "{off_device:?}");
    }
}

/// Where the CPU's steps hide, nothing visits: it would cost device memory and the link for nothing.
#[test]
fn nothing_visits_where_the_forward_hides_the_cpu() {
    let (layout, trace) = llama_7b(65_536);
    let request = PlanRequest { recompute: Recompute::Full, ..h100(76 * GIB, 400 * GIB) };
    let plan = plan(&layout, &trace, &request).unwrap();
    assert_eq!(plan.bound_by, "compute");
    assert!(plan.chunks.iter().any(|c| c.class == OptimizerClass::Host));
    assert!(plan.chunks.iter().all(|c| c.class != OptimizerClass::Streamed));
    assert_eq!(plan.device.staging, 0);
}

#[test]
fn gradients_are_spilled_last_and_only_as_far_as_the_host_budget_asks() {
    for accumulation in [1, 2, 4] {
        for placement in [
            all_on_host(0.0),
            Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 1.0, stream_optim_frac: 0.0 },
        ] {
            let (layout, trace, _) = uniform(12, 1 << 20, |_| RESIDENT_HOST, 0, accumulation);
            let disk = NvmeRequest { budget: 1 << 40, read_bytes: 5e9, write_bytes: 2e9 };
            let request = PlanRequest { placement, accumulation, accumulate: Some(Tier::Host), nvme: Some(disk), ..h100(GIB, 1 << 40) };
            let with = |host_budget: u64| plan(&layout, &trace, &PlanRequest { host_budget, ..request.clone() });
            let needed = match with(1) {
                Err(PlanError::Host { needed, .. }) => needed,
                other => panic!("{other:?}"),
            };
            let spilled = |plan: &Plan| plan.chunks.iter().filter(|c| c.spills_grads()).count();
            // What an error says is needed is enough, and a byte less is not.
            let tightest = with(needed).unwrap();
            assert_eq!(spilled(&tightest), 12);
            assert!(with(needed - 1).is_err());
            let element = layout.final_grad_element(accumulation);
            let all = 12 * (element << 20);
            let mut last = 13;
            let mut seconds = f64::INFINITY;
            for extra in 0..=all / (512 << 10) {
                let request = PlanRequest { host_budget: needed + extra * (512 << 10), ..request.clone() };
                let plan = plan(&layout, &trace, &request).unwrap();
                check_memory(&layout, &trace, &request, &plan);
                assert!(spilled(&plan) <= last && plan.predicted_step_s <= seconds);
                (last, seconds) = (spilled(&plan), plan.predicted_step_s);
            }
            assert_eq!(last, 0);
            // With accumulation the disk moves every sum once more each way for every micro-batch.
            let nvme = tightest.nvme.unwrap();
            let states = 24 * (12 << 20) / 2;
            assert_eq!(nvme.payload_bytes, states + all);
            assert_eq!(nvme.written_bytes, states + u64::from(accumulation) * all);
            assert_eq!((tightest.host.gradients, tightest.host.staging), (0, 2 * (2 << 20)));
            assert_eq!(tightest.bound_by, "nvme");
        }
    }
}

/// LLaMA-2-70B, frozen, with 4 million parameters of adapters per layer.
fn adapted_70b() -> (Layout, Trace) {
    let (layout, mut trace) = llama_70b(4096);
    let chunks = layout.chunks.iter().flat_map(|chunk| {
        let spec = |name: &str, numel, trainable| (name.to_owned(), vec![ParamSpec { name: format!("{name}.weight"), numel, trainable }]);
        let adapter = chunk.name.starts_with("layers").then(|| spec(&format!("{}.adapter", chunk.name), 4_000_000, true));
        [Some(spec(&chunk.name, chunk.numel, false)), adapter].into_iter().flatten()
    });
    let layout = Layout::new(Precision::Bf16, chunks.collect());
    for unit in &mut trace.units {
        let of_unit = |chunk: &&ChunkId| layout.chunks[chunk.index()].name.trim_end_matches(".adapter") == unit.name;
        unit.chunks = layout.ids().collect::<Vec<_>>().iter().filter(of_unit).copied().collect();
    }
    (layout, trace)
}

/// The same with nothing to train.
fn all_frozen(layout: &Layout, trace: &Trace) -> (Layout, Trace) {
    let spec = |p: &tierwise_core::layout::ParamLayout| ParamSpec { name: p.name.clone(), numel: p.numel, trainable: false };
    let chunks = layout.chunks.iter().map(|chunk| (chunk.name.clone(), chunk.params.iter().map(spec).collect()));
    (Layout::new(layout.precision, chunks.collect()), trace.clone())
}

#[test]
fn what_a_large_piece_moves_is_whole_blocks() {
    let (layout, trace) = llama_7b(16_384);
    let disk = NvmeRequest { budget: 1 << 40, read_bytes: 6e9, write_bytes: 3e9 };
    // States alone, with parameters that stay on the device, with streamed ones, and with gradients.
    for (host_budget, fraction, home) in [
        (60 * GIB, 0.0, ParamHome::Resident),
        (12 * GIB, 0.0, ParamHome::Spilled),
        (12 * GIB, 1.0, ParamHome::Fetched),
        (2 * GIB, 0.0, ParamHome::Spilled),
    ] {
        let placement =
            Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: fraction, stream_optim_frac: 0.0 };
        let request = PlanRequest { placement, nvme: Some(disk), ..h100(72 * GIB, host_budget) };
        let found = plan(&layout, &trace, &request).unwrap();
        check_memory(&layout, &trace, &request, &found);
        let nvme = found.nvme.unwrap();
        assert!(found.chunks.iter().any(|c| c.class == OptimizerClass::Nvme && c.home == home), "{:?}", found.chunks);
        assert_eq!(nvme.block_bytes, 4 << 20);
        // A buffer has no place of what is not spilled.
        let spills_params = found.chunks.iter().any(|c| c.home.is_spilled());
        assert_eq!(nvme.buffer_bytes, nvme.piece_numel * if spills_params { 12 } else { 10 });
        for payload_bytes in [2, 10, 12].map(|element| nvme.piece_numel * element) {
            assert!(payload_bytes.is_multiple_of(nvme.block_bytes), "{payload_bytes} of {}", nvme.piece_numel);
        }
    }
}

#[test]
fn a_frozen_model_that_no_memory_holds_streams_from_the_disk() {
    let (layout, trace) = adapted_70b();
    let disk = NvmeRequest { budget: 1 << 40, read_bytes: 6e9, write_bytes: 3e9 };
    let request = PlanRequest { nvme: Some(disk), ..h100(72 * GIB, 16 * GIB) };
    let frozen: u64 = layout.ids().filter(|c| layout.chunks[c.index()].state_numel == 0).map(|c| layout.param_bytes(c)).sum();
    assert!(frozen > 128 * GIB);
    assert!(matches!(plan(&layout, &trace, &PlanRequest { nvme: None, ..request.clone() }), Err(PlanError::Host { .. })));
    let found = plan(&layout, &trace, &request).unwrap();
    check_memory(&layout, &trace, &request, &found);
    let count = |class: OptimizerClass, home: ParamHome| found.chunks.iter().filter(|c| (c.class, c.home) == (class, home)).count();
    assert!(count(OptimizerClass::Frozen, ParamHome::Fetched) > 20, "{:?}", found.chunks);
    // Nothing frozen is written, and each fetched chunk is read for its forward and its backward.
    let nvme = found.nvme.unwrap();
    let states: u64 = layout
        .ids()
        .filter(|c| found.chunks[c.index()].class == OptimizerClass::Nvme)
        .map(|c| layout.chunks[c.index()].state_numel * layout.spilled_bytes(found.chunks[c.index()]))
        .sum();
    let fetched: u64 = layout.ids().filter(|c| found.chunks[c.index()].home == ParamHome::Fetched).map(|c| layout.param_bytes(c)).sum();
    assert_eq!((nvme.written_bytes, nvme.read_bytes), (states, states + 2 * fetched));
    // Buffers are for steps: where nothing is stepped from the disk they are two.
    let (only_frozen, same_trace) = all_frozen(&layout, &trace);
    assert_eq!(plan(&only_frozen, &same_trace, &request).unwrap().nvme.unwrap().buffers, 2);
    // What the disk moves for the uses bounds the step, also with several micro-batches, and nothing is added to it.
    for accumulation in [1, 4] {
        let found = plan(&layout, &trace, &PlanRequest { accumulation, ..request.clone() }).unwrap();
        let nvme = found.nvme.unwrap();
        let disk = nvme.read_bytes as f64 / 6e9 + nvme.written_bytes as f64 / 3e9;
        assert!((found.predicted_step_s / disk - 1.0).abs() < 0.02, "{} s, the disk {disk} s", found.predicted_step_s);
    }
    // Whole blocks, so that the file is little larger than what is in it.
    assert!((nvme.file_bytes as f64) < 1.05 * nvme.payload_bytes as f64 + f64::from(nvme.buffers) * nvme.buffer_bytes as f64);
    // More host memory never spills more and never slows the step.
    let (mut last, mut seconds) = (usize::MAX, f64::INFINITY);
    for host_budget in [8, 12, 16, 32, 64, 96, 128, 192].map(|gib| gib * GIB) {
        let request = PlanRequest { host_budget, ..request.clone() };
        let found = plan(&layout, &trace, &request).unwrap();
        check_memory(&layout, &trace, &request, &found);
        let fetched = found.chunks.iter().filter(|c| c.home == ParamHome::Fetched).count();
        assert!(fetched <= last && found.predicted_step_s <= seconds, "{fetched} of {last}, {} s of {seconds}", found.predicted_step_s);
        (last, seconds) = (fetched, found.predicted_step_s);
    }
    assert_eq!(last, 0);
    // What an error says is needed is enough, and a byte less is not.
    let with = |host_budget| plan(&layout, &trace, &PlanRequest { host_budget, ..request.clone() });
    let Err(PlanError::Host { needed, .. }) = with(1) else { panic!("a byte of host memory is enough") };
    assert!(needed < 4 * GIB, "{needed}");
    assert!(with(needed).is_ok() && with(needed - 1).is_err());
}
