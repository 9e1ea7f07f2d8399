//! Several GPUs, other systems, and the search.

mod common;

use common::report;
use tierwise_core::planner::Recompute;
use tierwise_sim::collectives::Group;
use tierwise_sim::hardware::{self, Hardware};
use tierwise_sim::models;
use tierwise_sim::models::{Block, Kind};
use tierwise_sim::parallel::Parallel;
use tierwise_sim::peers::Policy;
use tierwise_sim::pipeline::Schedule;
use tierwise_sim::report::simulate;
use tierwise_sim::request::{Error, Request};
use tierwise_sim::search::search;

fn request(model: &str, machine: &str, gpus: u64, tokens_per_step: u64) -> Request {
    common::request(models::preset(model).unwrap(), machine, gpus, tokens_per_step)
}

#[test]
fn collectives_follow_ring_and_tree() {
    let node = hardware::preset("dgx-a100-80").unwrap();
    let bytes = 1e9;
    let intra = node.intra_node.unwrap();
    let inside = Group::new(&node, 8, 1).unwrap();
    let ring = bytes * 7.0 / 8.0 / intra.bytes_per_s * 1e9 + 7.0 * intra.latency_ns as f64;
    assert!((inside.all_gather_ns(bytes) as f64 - ring).abs() <= 1.0);
    assert_eq!(Group::new(&node, 1, 1).unwrap().all_reduce_ns(bytes), 0);
    // Across nodes eight adapters are the bottleneck, and one if a group has one rank per node.
    let wide = Group::new(&node, 64, 1).unwrap().all_gather_ns(bytes);
    let thin = Group::new(&node, 8, 8).unwrap().all_gather_ns(bytes);
    assert!(wide > inside.all_gather_ns(bytes) && thin > 6 * wide, "{wide} {thin}");
    // A small all-reduce over many nodes takes the tree, a large one the ring.
    let many = Group::new(&node, 4096, 1).unwrap();
    assert!(many.all_reduce_ns(8.0) < 2 * many.all_gather_ns(8.0));
    assert!(many.all_reduce_ns(1e13) < 2 * many.all_gather_ns(1e13) + 1);
    let single = hardware::preset("h100").unwrap();
    assert!(Group::new(&single, 2, 1).unwrap_err().contains("h100 has no network"));
}

#[test]
fn time_is_conserved_in_every_dimension() {
    let base = request("llama2-13b", "dgx-h100", 16, 16 * 8 * 4096);
    for (tensor, sequence, pipeline, schedule, zero) in [
        (1, 1, 1, Schedule::OneFOneB, 0),
        (1, 1, 1, Schedule::OneFOneB, 1),
        (1, 1, 1, Schedule::OneFOneB, 2),
        (1, 1, 1, Schedule::OneFOneB, 3),
        (2, 1, 1, Schedule::OneFOneB, 3),
        (1, 4, 1, Schedule::OneFOneB, 3),
        (2, 2, 2, Schedule::Gpipe, 1),
        (2, 1, 4, Schedule::OneFOneB, 1),
        (1, 1, 4, Schedule::Interleaved(2), 1),
        (2, 1, 2, Schedule::ZeroBubble, 1),
    ] {
        let parallel = Parallel { tensor, sequence, pipeline, schedule, zero, ..base.parallel };
        let Ok((report, _)) = simulate(&Request { parallel, ..base.clone() }).unwrap() else {
            assert!(zero < 2, "{parallel:?} does not fit");
            continue;
        };
        let step = &report.step;
        assert_eq!(step.compute_ns + step.slowdown_ns + step.stalls.total_ns(), step.step_ns, "{parallel:?}");
        assert!(step.device_peak_bytes <= base.device_budget && step.host_peak_bytes <= base.host_budget);
        assert!(report.mfu > 0.0 && report.mfu <= report.hfu && report.hfu < 0.9, "{parallel:?}: {} {}", report.mfu, report.hfu);
        assert_eq!(pipeline > 1, step.stalls.pipeline_ns > 0, "{parallel:?}");
        assert!(step.communicated_ns > 0, "{parallel:?}");
    }
}

#[test]
fn sizes_that_contradict_each_other_are_named() {
    let base = request("llama2-7b", "dgx-h100", 8, 8 * 4096);
    for (change, says) in [
        (Parallel { tensor: 3, ..base.parallel }, "multiple of tensor-parallel 3"),
        (Parallel { gpus: 9, tensor: 3, ..base.parallel }, "must divide the 32 heads"),
        (Parallel { gpus: 64, tensor: 16, ..base.parallel }, "a node of dgx-h100 has 8 GPUs"),
        (Parallel { gpus: 64, pipeline: 64, ..base.parallel }, "has 32 layers"),
        (Parallel { gpus: 0, ..base.parallel }, "gpus is 0"),
    ] {
        match simulate(&Request { parallel: change, ..base.clone() }) {
            Err(Error::Usage(message)) => assert!(message.contains(says), "{message}"),
            other => panic!("{change:?}: {other:?}"),
        }
    }
}

#[test]
fn other_systems_hold_and_move_what_their_code_does() {
    let base = Request { recompute: Recompute::Full, micro_batch: 4, ..request("llama-1.35b", "h100", 1, 16_384) };
    let numel = base.model.num_params();
    let of = |policy| report(&Request { policy: Some(policy), ..base.clone() });
    for policy in Policy::ALL {
        let step = of(policy).step;
        assert_eq!(step.compute_ns + step.slowdown_ns + step.stalls.total_ns(), step.step_ns, "{}", policy.name());
    }
    let ddp = of(Policy::Ddp).step;
    assert_eq!((ddp.h2d_bytes, ddp.d2h_bytes), (0, 0));
    let offloaded = of(Policy::Zero2Offload).step;
    assert!((offloaded.d2h_bytes as f64 / (4 * numel) as f64 - 1.0).abs() < 1e-3);
    // The fp32 masters go to the device, where they are whole before they become bf16.
    let near = |bytes: u64, expected: u64| assert!((bytes as f64 / expected as f64 - 1.0).abs() < 1e-3, "{bytes} and not {expected}");
    near(offloaded.h2d_bytes, 4 * numel);
    assert!(offloaded.device_peak_bytes > 6 * numel);
    // Every parameter of a layer is fetched for forward and again for backward, the others once.
    let layers: u64 = base.model.architecture.blocks.iter().filter(|b| b.kind == Kind::Layer).map(Block::numel).sum();
    near(of(Policy::FsdpOffload).step.h2d_bytes, 4 * (numel + layers));
    // Gradients go out, come back for their norm and go out again; what Twin-Flow leaves to the device does not.
    let split = report(&Request { policy: Some(Policy::Zero3Offload), cpu_share: 0.25, ..base.clone() }).step;
    let whole = of(Policy::Zero3Offload).step;
    near(whole.d2h_bytes, 6 * numel);
    near(split.d2h_bytes, 3 * numel);
    near(split.h2d_bytes, 2 * numel + numel / 2);
    assert!(split.step_ns < whole.step_ns && split.host_peak_bytes < whole.host_peak_bytes);
    assert!(split.device_peak_bytes > whole.device_peak_bytes + 10 * numel);
    // On one communicator a layer's gradients and the next layer's parameters are waited for.
    let eight = |policy| report(&Request { policy: Some(policy), ..request("llama2-7b", "dgx-h100", 8, 8 * 4096) }).step;
    let (early, late) = (eight(Policy::Fsdp), eight(Policy::Fsdp1));
    assert!(late.stalls.communication_ns > early.stalls.communication_ns + 20_000_000, "{early:?}");
    assert!(of(Policy::Zero2Offload).step.step_ns > 2 * ddp.step_ns);
    let piped = Request { policy: Some(Policy::Zero3), ..request("llama2-7b", "dgx-h100", 8, 8 * 4096) };
    let parallel = Parallel { pipeline: 2, ..piped.parallel };
    assert!(matches!(simulate(&Request { parallel, ..piped }), Err(Error::Usage(m)) if m.contains("policy zero3")));
}

#[test]
fn more_device_memory_never_slows_what_the_search_finds() {
    let base = request("llama2-7b", "h100", 1, 4 * 4096);
    let eighth = base.hardware.device_memory_bytes / 8;
    let mut before = u64::MAX;
    for parts in 1..=8 {
        let Some(found) = search(&Request { device_budget: parts * eighth, ..base.clone() }).unwrap() else { continue };
        assert!(found.report.step.device_peak_bytes <= parts * eighth);
        assert!(found.report.step.step_ns <= before, "{parts} eighths: {} after {before}", found.report.step.step_ns);
        before = found.report.step.step_ns;
    }
    assert!(before < u64::MAX);
}

#[test]
fn faster_links_between_gpus_never_slow_a_fixed_plan() {
    let base = request("llama2-7b", "dgx-a100-80", 16, 16 * 4096);
    let mut before = u64::MAX;
    for factor in [0.1, 0.3, 1.0, 3.0, 10.0] {
        let mut hardware: Hardware = base.hardware.clone();
        for link in [&mut hardware.intra_node, &mut hardware.network].into_iter().flatten() {
            link.bytes_per_s *= factor;
        }
        let step = report(&Request { hardware, ..base.clone() }).step.step_ns;
        // Rates change at whole nanoseconds, a few times per operation.
        assert!(step <= before.saturating_add(10_000), "x{factor}: {step} after {before}");
        before = step;
    }
}
