//! Other systems' steps: what their code does to the clock and to memory.

mod common;

use tierwise_core::planner::Recompute;
use tierwise_sim::hardware::{self, Hardware};
use tierwise_sim::models::{Model, preset};
use tierwise_sim::peers::Policy;
use tierwise_sim::report::Report;
use tierwise_sim::request::{Memory, Request};

fn report(model: Model, policy: Policy, micro_batch: u64) -> Report {
    common::report(&Request {
        policy: Some(policy),
        micro_batch,
        memory: Memory::Reserve(1_000_000_000),
        recompute: Recompute::Full,
        ..common::request(model, "h100", 1, 4096 * micro_batch)
    })
}

fn small() -> Model {
    let config = r#"{"model_type": "llama", "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 24, "vocab_size": 32000,
        "num_attention_heads": 8}"#;
    Model::from_json(config).unwrap()
}

#[test]
fn hooks_bind_a_small_model_and_hide_behind_a_large_one() {
    let launch_ns = |model: Model, policy: Policy| report(model, policy, 1).step.stalls.launch_ns;
    // 24 layers of 3.34 + 5.61 ms and two launches of 0.3 ms each.
    let bound = 24 * (3_340_000 + 5_610_000 + 600_000);
    let step = report(small(), Policy::Zero3, 1).step;
    assert!(step.step_ns > bound, "{} {bound}", step.step_ns);
    assert!(step.stalls.launch_ns > bound / 2, "{:?}", step.stalls);
    assert!(launch_ns(small(), Policy::Fsdp) < step.stalls.launch_ns);
    let large = report(preset("llama-1.35b").unwrap(), Policy::Zero2Offload, 4).step;
    assert!(large.stalls.launch_ns < large.step_ns / 1000, "{:?}", large.stalls);
}

#[test]
fn zero_3_pins_gradients_by_sub_group_and_their_buffer() {
    let model = preset("llama-1.35b").unwrap();
    let numel = model.num_params();
    let step = report(model, Policy::Zero3Offload, 4).step;
    let gradients = 4_294_967_296 + (4 * (numel - 1_000_000_000)).next_power_of_two();
    let fresh = 2 * 1_000_000_000;
    assert_eq!(step.host_peak_bytes, 2_000_000_000 + 12 * numel + gradients + (2 * numel).next_power_of_two() + fresh);
}

#[test]
fn what_is_left_in_a_bucket_is_copied_after_backward() {
    // A step ends with the host's work, so the copies of the last bucket can only be waited for before it.
    let step = report(preset("llama-1.35b").unwrap(), Policy::Zero2Offload, 4).step;
    let numel = preset("llama-1.35b").unwrap().num_params();
    assert_eq!(step.d2h_bytes, 4 * numel);
    // Two buckets of 5e8 elements leave during backward.
    let left = 4.0 * (numel - 1_000_000_000) as f64 / hardware::preset("h100").unwrap().d2h_bytes_per_s * 1e9;
    let host_ns = 36.0 * numel as f64 / (0.697 * 120e9) * 1e9 + 4.0 * numel as f64 / 53.9e9 * 1e9;
    let rest = (step.step_ns - step.compute_ns) as f64 - host_ns;
    assert!(rest > left && rest < 3.0 * left, "{rest} {left}");
}

/// Not as fast as it takes norms, which are a different share of what the memory carries on every machine.
#[test]
fn a_calibrated_host_steps_others_as_fast_as_it_adds() {
    let near = |found: [f64; 2], wanted: [f64; 2]| {
        assert!(found.iter().zip(wanted).all(|(found, wanted)| (found / wanted - 1.0).abs() < 1e-12), "{found:?} {wanted:?}");
    };
    near(hardware::preset("h100").unwrap().added_bytes_per_s(), [24e9, 120e9]);
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/validation/h200-2026-11-28-m.json");
    let fast = Hardware::from_json(&std::fs::read_to_string(file).unwrap()).unwrap();
    let mut slow = fast.clone();
    let rows = &mut slow.measured.as_mut().unwrap().host;
    let added: Vec<f64> = rows.iter().map(|row| 10.0 * row.accumulate_numel_per_s).collect();
    near(fast.added_bytes_per_s(), [added[0], added[rows.len() - 1]]);
    // GPUs share what all threads do; one thread is one thread while there are more.
    let eight = Hardware { gpus_per_node: 8, ..fast.clone() }.per_gpu(8);
    near(eight.added_bytes_per_s(), [added[0], added[rows.len() - 1] / 8.0]);
    let sixteen = Hardware { gpus_per_node: 16, ..fast.clone() }.per_gpu(16);
    near(sixteen.added_bytes_per_s(), [added[rows.len() - 1] / 16.0; 2]);
    near(hardware::preset("dgx-h100").unwrap().per_gpu(8).added_bytes_per_s(), [24e9, 297.9e9 / 8.0]);
    rows.last_mut().unwrap().accumulate_numel_per_s /= 2.0;
    let model = preset("llama-1.35b").unwrap();
    let numel = model.num_params() as f64;
    let step_ns = |hardware: Hardware| {
        let memory = Memory::Reserve(1_000_000_000);
        let request = common::request(model.clone(), "h100", 1, 16384);
        let request =
            Request { policy: Some(Policy::Zero2Offload), hardware, memory, recompute: Recompute::Full, micro_batch: 4, ..request };
        common::report(&request).step.step_ns as f64
    };
    // Clipping and stepping move 36 bytes per parameter.
    let longer = 36.0 * numel / (0.697 * fast.added_bytes_per_s()[1]) * 1e9;
    let found = step_ns(slow) - step_ns(fast);
    assert!((found / longer - 1.0).abs() < 1e-6, "{found} {longer}");
}

#[test]
fn fsdp_pins_shards_and_gradients_tensor_by_tensor() {
    let model = preset("llama-1.35b").unwrap();
    let tensors: Vec<u64> = model.architecture.blocks.iter().flat_map(|b| &b.params).map(|p| p.numel).collect();
    let pinned: u64 = tensors.iter().map(|numel| 2 * (4 * numel).next_power_of_two()).sum();
    let step = report(model.clone(), Policy::FsdpOffload, 4).step;
    assert_eq!(step.host_peak_bytes, 2_000_000_000 + 8 * model.num_params() + pinned);
}

/// What is left to each of those who share a host takes as much longer, whatever the host does.
#[test]
fn a_gpu_has_its_part_of_a_calibrated_host() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/validation/h200-2026-11-28-m.json");
    let alone = Hardware { gpus_per_node: 8, ..Hardware::from_json(&std::fs::read_to_string(file).unwrap()).unwrap() };
    let without_passes = |mut of: Hardware| {
        let measured = of.measured.as_mut().unwrap();
        (measured.host_moments_per_s, measured.host_params_first_per_s) = (None, None);
        of
    };
    let seconds = |of: &Hardware| {
        let (adam, landing) = (of.host_adam_bytes_per_s(), of.host_stream_bytes_per_s);
        [
            1e9 / adam,
            of.params_first_work(1_000_000_000) / adam,
            of.moments_work(1_000_000_000) / adam,
            of.undoable_work(2_600_000_000, 1_200_000_000) / adam,
            of.copy_work(1_000_000_000) / adam,
            of.addition_work_of_adam(1_000_000_000) / adam,
            of.addition_work(1_000_000_000) / landing,
        ]
    };
    for of in [alone.clone(), without_passes(alone.clone())] {
        for (one, shared) in seconds(&of).into_iter().zip(seconds(&of.per_gpu(8))) {
            assert!((shared / one / 8.0 - 1.0).abs() < 1e-12, "{one} {shared}");
        }
    }
    assert_eq!(alone.per_gpu(1).measured, alone.measured);
}
