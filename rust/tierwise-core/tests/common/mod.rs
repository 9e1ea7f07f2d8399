//! Models for the tests: LLaMA-2 by shape, and random ones.
#![allow(dead_code, reason = "every test file uses a part of it")]

use proptest::prelude::*;
use tierwise_core::ChunkId;
use tierwise_core::layout::{Layout, ParamSpec, Precision};
use tierwise_core::plan::{ActivationPlan, ChunkPlan, ClipMode, DeviceBytes, HostBytes, OptimizerClass, ParamHome, Plan};
use tierwise_core::planner::{Offload, Placement, PlanRequest, Recompute, Speeds};
use tierwise_core::trace::{Op, Phase, Trace, Unit};

pub const GIB: u64 = 1 << 30;

/// Forward through all units, then backward in reverse order.
pub fn palindrome(units: u32) -> Vec<Op> {
    let forward = (0..units).map(|unit| Op { unit, phase: Phase::Forward });
    forward.chain((0..units).rev().map(|unit| Op { unit, phase: Phase::Backward })).collect()
}

/// A decoder of LLaMA-2's shape: one chunk and one unit each for the embedding, every layer, the norm and the head.
pub fn llama(layers: u64, hidden: u64, intermediate: u64, kv_hidden: u64, tokens: u64) -> (Layout, Trace) {
    let vocab = 32_000;
    let layer = 2 * hidden * hidden + 2 * hidden * kv_hidden + 3 * hidden * intermediate + 2 * hidden;
    let mut sizes = vec![("embed".to_owned(), vocab * hidden)];
    sizes.extend((0..layers).map(|i| (format!("layers.{i}"), layer)));
    sizes.push(("norm".to_owned(), hidden));
    sizes.push(("head".to_owned(), vocab * hidden));
    let units = sizes
        .iter()
        .enumerate()
        .map(|(i, (name, numel))| {
            let is_layer = name.starts_with("layers");
            let saved_bytes = if is_layer { tokens * (hidden * 16 + intermediate * 8) } else { tokens * hidden * 2 };
            let flops = if name == "embed" { 0.0 } else { 2.0 * tokens as f64 * *numel as f64 };
            Unit {
                name: name.clone(),
                chunks: vec![ChunkId(i as u32)],
                saved_bytes,
                input_bytes: tokens * hidden * 2,
                offload_bytes: if is_layer { saved_bytes - tokens * 8 } else { 0 },
                offload_host_bytes: if is_layer { saved_bytes } else { 0 },
                recomputable: is_layer,
                flops,
                tail_flops: if is_layer { flops / 5.0 } else { 0.0 },
            }
        })
        .collect();
    let chunks = sizes
        .into_iter()
        .map(|(name, numel)| (name.clone(), vec![ParamSpec { name: format!("{name}.weight"), numel, trainable: true }]))
        .collect();
    let ops = palindrome(layers as u32 + 3);
    (Layout::new(Precision::Bf16, chunks), Trace { units, ops, outer_saved_bytes: tokens * vocab * 2 })
}

pub fn llama_7b(tokens: u64) -> (Layout, Trace) {
    llama(32, 4096, 11_008, 4096, tokens)
}

pub fn llama_70b(tokens: u64) -> (Layout, Trace) {
    llama(80, 8192, 28_672, 1024, tokens)
}

/// One H100 with the measured speeds of the design.
pub fn h100(device_budget: u64, host_budget: u64) -> PlanRequest {
    PlanRequest {
        device_budget,
        host_budget,
        reserve_bytes: 0,
        placement: Placement::Auto,
        recompute: Recompute::Auto,
        offload: Offload::None,
        accumulation: 1,
        accumulate: None,
        late_moments: None,
        visiting: true,
        clip_mode: ClipMode::Defer,
        speeds: Speeds {
            flops: 650e12,
            h2d_bytes: 45e9,
            d2h_bytes: 45e9,
            host_adam_params: 5.5e9,
            host_params_first: None,
            device_memory_bytes: 2.6e12,
        },
        nvme: None,
    }
}

/// Chunks of equal size, one unit each, as a plan places them; nothing but the schedule matters.
pub fn uniform(chunks: u32, numel: u64, placement: impl Fn(u32) -> ChunkPlan, slab_bytes: u64, accumulation: u32) -> (Layout, Trace, Plan) {
    let specs = (0..chunks)
        .map(|i| (format!("layers.{i}"), vec![ParamSpec { name: format!("layers.{i}.weight"), numel, trainable: true }]))
        .collect();
    let units = (0..chunks)
        .map(|i| Unit {
            name: format!("layers.{i}"),
            chunks: vec![ChunkId(i)],
            saved_bytes: 0,
            input_bytes: 0,
            offload_bytes: 0,
            offload_host_bytes: 0,
            recomputable: true,
            flops: 1.0,
            tail_flops: 0.0,
        })
        .collect();
    let trace = Trace { units, ops: palindrome(chunks), outer_saved_bytes: 0 };
    let plan = bare_plan((0..chunks).map(placement).collect(), chunks as usize, slab_bytes, accumulation);
    (Layout::new(Precision::Bf16, specs), trace, plan)
}

/// A plan with nothing in it but what the scheduler reads.
pub fn bare_plan(chunks: Vec<ChunkPlan>, units: usize, slab_bytes: u64, accumulation: u32) -> Plan {
    Plan {
        version: 1,
        chunks,
        activations: vec![ActivationPlan::Keep; units],
        offload_window_bytes: 0,
        stream_slab_bytes: slab_bytes,
        grad_in_flight_bytes: 0,
        grad_ahead_bytes: 0,
        accumulation,
        clip_mode: ClipMode::Defer,
        undo_bytes: 0,
        late_moments: false,
        landing_buffers: 2,
        device: DeviceBytes::default(),
        device_peak_op: tierwise_core::OpId(0),
        host: HostBytes::default(),
        nvme: None,
        fetches: Vec::new(),
        predicted_step_s: 0.0,
        bound_by: "compute".to_owned(),
    }
}

pub const STREAMED: ChunkPlan = ChunkPlan::new(OptimizerClass::Host, ParamHome::Streamed);
pub const RESIDENT_HOST: ChunkPlan = ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident);
pub const ON_DEVICE: ChunkPlan = ChunkPlan::new(OptimizerClass::Device, ParamHome::Resident);

/// Random models: a few chunks of unequal sizes, some frozen, some in two units; a forward and the backward of some of its units.
pub fn models() -> impl Strategy<Value = (Layout, Trace)> {
    let precision = prop_oneof![3 => Just(Precision::Bf16), 1 => Just(Precision::Fp16), 1 => Just(Precision::Fp32)];
    let params = prop::collection::vec((1_u64..5000, prop::bool::weighted(0.8)), 1..4);
    let chunks = prop::collection::vec(params, 1..8);
    let unit = (0_u64..60_000, 0_u64..10_000, any::<bool>(), 0.0..1e9_f64, prop::bool::weighted(0.9), 0_u64..=100, 0_u64..5000);
    let units = prop::collection::vec(unit, 8);
    (precision, chunks, units, prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..3), 0_u64..20_000)
        .prop_map(|(precision, chunks, units, extra, outer_saved_bytes)| {
            let n = chunks.len();
            let layout = Layout::new(
                precision,
                chunks
                    .into_iter()
                    .enumerate()
                    .map(|(i, params)| {
                        let specs = params
                            .into_iter()
                            .enumerate()
                            .map(|(j, (numel, trainable))| ParamSpec { name: format!("m{i}.p{j}"), numel, trainable })
                            .collect();
                        (format!("m{i}"), specs)
                    })
                    .collect(),
            );
            let mut trace_units: Vec<Unit> = (0..n)
                .map(|i| {
                    let (saved_bytes, input_bytes, recomputable, flops, _, share, more) = units[i];
                    let offload_bytes = saved_bytes * share / 100;
                    Unit {
                        name: format!("m{i}"),
                        chunks: vec![ChunkId(i as u32)],
                        saved_bytes,
                        input_bytes,
                        offload_bytes,
                        offload_host_bytes: offload_bytes + more,
                        recomputable,
                        flops,
                        tail_flops: flops * (share % 4) as f64 / 4.0,
                    }
                })
                .collect();
            for (unit, chunk) in extra {
                let chunk = ChunkId(chunk.index(n) as u32);
                let unit = &mut trace_units[unit.index(n)];
                if !unit.chunks.contains(&chunk) {
                    unit.chunks.push(chunk);
                }
            }
            let ops = palindrome(n as u32).into_iter().filter(|op| op.phase == Phase::Forward || units[op.unit as usize].4).collect();
            (layout, Trace { units: trace_units, ops, outer_saved_bytes })
        })
}
