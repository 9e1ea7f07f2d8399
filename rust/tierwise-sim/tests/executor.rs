//! The executor: nothing lost, nothing exceeded, nothing slower for being faster.

use tierwise_core::Tier;
use tierwise_core::plan::{ActivationPlan, ClipMode, OptimizerClass, ParamHome, Plan};
use tierwise_core::planner::{NvmeRequest, Offload, Placement, PlanError, PlanRequest, Recompute, plan};
use tierwise_sim::costs::Costs;
use tierwise_sim::executor::{Outcome, Setup, Sharding, SimError, simulate};
use tierwise_sim::hardware::{Hardware, Measured, preset, presets};
use tierwise_sim::models::{self, Built};

struct Case {
    built: Built,
    request: PlanRequest,
    plan: Plan,
}

fn case(model: &str, micro_batch: u64, hardware: &Hardware, change: impl FnOnce(&mut PlanRequest)) -> Option<Case> {
    let built = models::preset(model).unwrap().build(4096, micro_batch);
    let mut request = PlanRequest {
        device_budget: hardware.device_memory_bytes,
        host_budget: 2 << 40,
        reserve_bytes: 2_000_000_000,
        placement: Placement::Auto,
        recompute: Recompute::Auto,
        offload: Offload::None,
        accumulation: 1,
        accumulate: None,
        late_moments: None,
        visiting: true,
        clip_mode: ClipMode::Defer,
        speeds: Costs::new(&built, hardware).speeds(&built, hardware),
        nvme: None,
    };
    change(&mut request);
    match plan(&built.layout, &built.trace, &request) {
        Ok(plan) => Some(Case { built, request, plan }),
        Err(PlanError::Invalid(message)) => panic!("{message}"),
        Err(_) => None,
    }
}

fn run(case: &Case, hardware: &Hardware, clips: bool) -> Result<Outcome, SimError> {
    run_sharded(case, hardware, clips, None)
}

fn run_sharded(case: &Case, hardware: &Hardware, clips: bool, sharding: Option<&Sharding>) -> Result<Outcome, SimError> {
    let costs = Costs::new(&case.built, hardware);
    simulate(&Setup { sharding, clips, ..setup(case, hardware, &costs) })
}

/// Steps that do not clip.
fn setup<'a>(case: &'a Case, hardware: &'a Hardware, costs: &'a Costs) -> Setup<'a> {
    Setup {
        layout: &case.built.layout,
        trace: &case.built.trace,
        plan: &case.plan,
        costs,
        hardware,
        sharding: None,
        transient_bytes: None,
        forward_reserve_bytes: 0,
        device_budget: case.request.device_budget,
        host_budget: case.request.host_budget,
        nvme_budget: u64::MAX,
        clips: false,
    }
}

/// Models, budgets, accumulation, clip modes and placements that lead to every kind of plan.
fn cases(hardware: &Hardware) -> Vec<Case> {
    let mut cases = Vec::new();
    for model in ["llama-1.35b", "llama2-7b", "llama2-13b"] {
        for device_budget in [12_000_000_000, 24_000_000_000, 40_000_000_000, 80_000_000_000] {
            for accumulation in [1, 3] {
                for clip_mode in [ClipMode::Defer, ClipMode::Speculate] {
                    for placement in [
                        Placement::Auto,
                        Placement::Static {
                            shard_param_frac: 1.0,
                            offload_optim_frac: 1.0,
                            offload_param_frac: 0.0,
                            stream_optim_frac: 0.0,
                        },
                        Placement::Static {
                            shard_param_frac: 1.0,
                            offload_optim_frac: 1.0,
                            offload_param_frac: 1.0,
                            stream_optim_frac: 0.0,
                        },
                        Placement::Static {
                            shard_param_frac: 1.0,
                            offload_optim_frac: 0.5,
                            offload_param_frac: 0.2,
                            stream_optim_frac: 0.0,
                        },
                        Placement::Static {
                            shard_param_frac: 1.0,
                            offload_optim_frac: 0.9,
                            offload_param_frac: 0.2,
                            stream_optim_frac: 0.4,
                        },
                    ] {
                        cases.extend(case(model, 2, hardware, |request| {
                            request.device_budget = device_budget;
                            request.accumulation = accumulation;
                            request.clip_mode = clip_mode;
                            request.placement = placement;
                        }));
                    }
                }
            }
        }
    }
    for offload in [Offload::Full, Offload::Auto] {
        for (device_budget, accumulation) in [(24_000_000_000, 1), (60_000_000_000, 3)] {
            cases.extend(case("llama2-7b", 2, hardware, |request| {
                request.device_budget = device_budget;
                request.accumulation = accumulation;
                request.offload = offload;
            }));
        }
    }
    cases
}

#[test]
fn bytes_and_time_are_conserved_and_budgets_hold() {
    let hardware = preset("h100").unwrap();
    let cases = cases(&hardware);
    assert!(cases.len() > 60, "{} plans", cases.len());
    for case in &cases {
        for clips in [true, false] {
            let out = run(case, &hardware, clips).unwrap();
            let (layout, plan) = (&case.built.layout, &case.plan);
            let sum = |wanted: &dyn Fn(usize) -> bool, bytes: &dyn Fn(tierwise_core::ChunkId) -> u64| -> u64 {
                layout.ids().filter(|c| wanted(c.index())).map(bytes).sum()
            };
            let host = |c: usize| plan.chunks[c].class == OptimizerClass::Host;
            let streamed = |c: usize| plan.chunks[c].home == ParamHome::Streamed;
            let sums_on_device = |c: usize| plan.sums_on_device(tierwise_core::ChunkId(c as u32));
            let gradients = sum(&|c| host(c) && !sums_on_device(c), &|c| layout.grad_bytes(c));
            let sums = sum(&|c| host(c) && sums_on_device(c), &|c| layout.grad_acc_bytes(c));
            let visited = sum(&|c| plan.chunks[c].class == OptimizerClass::Streamed, &|c| layout.state_bytes(c));
            let away: Vec<usize> = (0..plan.activations.len()).filter(|u| plan.activations[*u] == ActivationPlan::Offload).collect();
            let activations: u64 = away.iter().map(|u| case.built.trace.units[*u].offload_host_bytes).sum();
            assert_eq!(out.d2h_bytes, (gradients + activations) * u64::from(plan.accumulation) + sums + visited);
            assert!(away.iter().all(|u| case.built.trace.units[*u].recomputable));
            let refreshed = sum(&|c| host(c) && !streamed(c), &|c| layout.param_bytes(c));
            let fetched = sum(&streamed, &|c| layout.param_bytes(c));
            assert!(out.h2d_bytes >= refreshed + fetched, "{} < {refreshed} + {fetched}", out.h2d_bytes);
            assert!(out.h2d_bytes >= refreshed + fetched + visited);
            if fetched == 0 && activations == 0 {
                assert_eq!(out.h2d_bytes, refreshed + visited);
            }
            let moved = |track: &str| out.timeline.spans.iter().filter(|s| s.track == track).map(|s| s.bytes).sum::<u64>();
            assert_eq!((moved("states in"), moved("states out")), (visited, visited));
            assert_eq!((moved("h2d") + visited, moved("d2h") + visited), (out.h2d_bytes, out.d2h_bytes));
            assert_eq!(out.compute_ns + out.slowdown_ns + out.stalls.total_ns(), out.step_ns);
            assert!(out.device_peak_bytes <= case.request.device_budget);
            assert!(out.host_peak_bytes <= case.request.host_budget);
            assert_eq!(out.host_peak_bytes, plan.host.total());
            assert_eq!((out.counters.steps, out.counters.clipped), (1, u64::from(clips)));
            assert_eq!(out.counters.off_trace, 0);
            for sample in &out.timeline.samples {
                assert!(sample.value <= case.request.device_budget.max(case.request.host_budget), "{sample:?}");
            }
        }
    }
}

#[test]
fn one_stream_does_one_thing_at_a_time() {
    let hardware = preset("h100").unwrap();
    let case = case("llama2-7b", 4, &hardware, |request| {
        request.device_budget = 40_000_000_000;
        request.placement =
            Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 0.9, offload_param_frac: 0.2, stream_optim_frac: 0.4 };
    })
    .unwrap();
    let out = run(&case, &hardware, true).unwrap();
    for track in ["compute", "h2d", "d2h", "device optimizer", "host optimizer", "host norm", "states in", "states out"] {
        assert!(out.timeline.spans.iter().any(|s| s.track == track), "{track}");
        let mut end = 0;
        for span in out.timeline.spans.iter().filter(|s| s.track == track) {
            assert!(span.start_ns >= end, "{span:?}");
            end = span.start_ns + span.duration_ns;
        }
    }
}

/// The same machine with links and host memory `factor` times as fast.
fn with_links(base: &Hardware, factor: f64) -> Hardware {
    Hardware {
        h2d_bytes_per_s: base.h2d_bytes_per_s * factor,
        d2h_bytes_per_s: base.d2h_bytes_per_s * factor,
        h2d_duplex_bytes_per_s: base.h2d_duplex_bytes_per_s * factor,
        d2h_duplex_bytes_per_s: base.d2h_duplex_bytes_per_s * factor,
        host_memory_bytes_per_s: base.host_memory_bytes_per_s * factor,
        ..base.clone()
    }
}

#[test]
fn more_bandwidth_never_slows_a_fixed_plan() {
    let base = preset("h100").unwrap();
    for case in &cases(&base) {
        let mut before = u64::MAX;
        for factor in [0.25, 0.5, 1.0, 2.0, 4.0, 16.0] {
            let faster = with_links(&base, factor);
            let step = run(case, &faster, true).unwrap().step_ns;
            // Rates change at whole nanoseconds, a few times per operation.
            assert!(step <= before.saturating_add(10_000), "x{factor}: {step} ns after {before} ns");
            before = step;
        }
    }
}

#[test]
fn offloaded_activations_cross_the_link_twice_within_their_window() {
    let base = preset("h100").unwrap();
    // Links from one that bounds the step to one that hides behind compute.
    for (factor, bound) in [(0.05, true), (1.0, true), (16.0, false), (64.0, false)] {
        let hardware = with_links(&base, factor);
        for (offload, accumulation) in [(Offload::Full, 1), (Offload::Full, 3), (Offload::Auto, 1)] {
            let on_device =
                Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 0.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
            let planned = case("llama-1.35b", 4, &base, |request| {
                request.placement = on_device;
                request.offload = offload;
                request.accumulation = accumulation;
                request.recompute = if offload == Offload::Full { Recompute::None } else { Recompute::Auto };
                request.device_budget = if offload == Offload::Full { 40_000_000_000 } else { 30_000_000_000 };
            });
            let Some(case) = planned else { panic!("{offload:?} {accumulation} does not fit") };
            let units: Vec<usize> =
                (0..case.plan.activations.len()).filter(|u| case.plan.activations[*u] == ActivationPlan::Offload).collect();
            assert!(!units.is_empty());
            let moved: u64 = units.iter().map(|u| case.built.trace.units[*u].offload_host_bytes).sum::<u64>() * u64::from(accumulation);
            let out = run(&case, &hardware, true).unwrap();
            // What was still on its way when its backward came did not go back and forth.
            assert_eq!(out.d2h_bytes, moved);
            assert!(out.h2d_bytes <= moved && out.h2d_bytes > 0);
            assert_eq!(out.compute_ns + out.slowdown_ns + out.stalls.total_ns(), out.step_ns);
            assert_eq!(out.host_peak_bytes, case.plan.host.total());
            assert!(out.device_peak_bytes <= case.request.device_budget);
            // The window is a bound whatever the link does: kept, everything would not fit.
            let kept: u64 = case.built.trace.units.iter().map(|unit| unit.saved_bytes).sum();
            let away: u64 = units.iter().map(|u| case.built.trace.units[*u].offload_bytes).sum();
            assert!(out.device_peak_activation_bytes <= kept - away + case.plan.offload_window_bytes || offload == Offload::Auto);
            if offload == Offload::Full {
                assert_eq!(out.stalls.activations_ns > out.compute_ns / 10, bound, "x{factor}: {:?}", out.stalls);
            }
        }
    }
}

#[test]
fn everything_on_the_device_takes_what_was_measured() {
    let hardware = preset("h100").unwrap();
    let case = case("llama-1.35b", 4, &hardware, |request| request.recompute = Recompute::Full).unwrap();
    assert!(case.plan.chunks.iter().all(|c| c.class == OptimizerClass::Device));
    let seconds = run(&case, &hardware, true).unwrap().step_ns as f64 / 1e9;
    // Measured on an H100 with a fused AdamW: 0.364 s.
    assert!((seconds / 0.364 - 1.0).abs() < 0.15, "{seconds}");
}

#[test]
fn a_budget_below_the_plan_is_refused() {
    let hardware = preset("h100").unwrap();
    let mut case = case("llama2-7b", 2, &hardware, |request| request.device_budget = 40_000_000_000).unwrap();
    let needed = run(&case, &hardware, true).unwrap().device_peak_bytes;
    case.request.device_budget = needed - 1_000_000_000;
    assert!(matches!(run(&case, &hardware, true), Err(SimError::Budget(_))));
    case.request.device_budget = needed;
    case.request.host_budget = case.plan.host.total() - 1;
    assert!(matches!(run(&case, &hardware, true), Err(SimError::Budget(_))));
}

#[test]
fn presets_are_valid_files() {
    assert!(presets().len() >= 14);
    for hardware in presets() {
        let json = serde_json::to_string(&hardware).unwrap();
        assert_eq!(Hardware::from_json(&json).unwrap(), hardware);
        assert!(Hardware::from_json(&json.replace("\"launch_ns\":", "\"lunch_ns\":")).unwrap_err().contains("lunch_ns"));
        assert!(
            Hardware::from_json(&json.replace("\"h2d_bytes_per_s\":", "\"h2d_bytes_per_s\":-")).unwrap_err().contains("h2d_bytes_per_s")
        );
    }
}

/// States that visit the device beside the CPU's own steps end the step earlier, up to the share at which the link becomes the slower one.
#[test]
fn a_share_of_the_states_visiting_the_device_is_faster_than_the_cpu_alone() {
    let hardware = preset("h100").unwrap();
    let run = |stream_optim_frac| {
        let case = case("llama2-7b", 1, &hardware, |request| {
            request.device_budget = 200_000_000_000;
            request.placement =
                Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac };
        })
        .unwrap();
        run(&case, &hardware, true).unwrap()
    };
    let outcomes = [0.0, 0.2, 0.4, 0.6, 1.0].map(run);
    let seconds: Vec<f64> = outcomes.iter().map(|out| out.step_ns as f64 / 1e9).collect();
    assert!(seconds[1] < 0.95 * seconds[0] && seconds[2] < seconds[1], "{seconds:?}");
    assert!(seconds[4] > seconds[3], "the link alone is slower than both together: {seconds:?}");
    // Both really work at the same time.
    let busy = |out: &Outcome, track: &str| *out.busy_ns.get(track).unwrap_or(&0) as f64 / 1e9;
    let out = &outcomes[2];
    let at_once = busy(out, "host optimizer") + busy(out, "states in") - out.step_ns as f64 / 1e9;
    assert!(at_once > 0.3 * busy(out, "states in"), "{at_once} s of {} s and {} s", busy(out, "host optimizer"), busy(out, "states in"));
}

/// The same plan bytes in virtual time: read once and written once per step, and the step is no faster than the disk.
#[test]
fn what_is_spilled_moves_once_in_each_direction_and_bounds_the_step() {
    let hardware = preset("h100").unwrap();
    let disk = hardware.nvme.unwrap();
    let spilling = |device_budget: u64, host_budget: u64, placement: Placement| {
        case("llama2-7b", 4, &hardware, |request| {
            request.device_budget = device_budget;
            request.host_budget = host_budget;
            request.placement = placement;
            request.nvme = Some(NvmeRequest { budget: 1 << 40, read_bytes: disk.read_bytes_per_s, write_bytes: disk.write_bytes_per_s });
        })
        .unwrap()
    };
    let all = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    let homes = [
        (spilling(80_000_000_000, 28_000_000_000, all), ParamHome::Resident),
        (spilling(80_000_000_000, 16_000_000_000, all), ParamHome::Spilled),
        (spilling(40_000_000_000, 24 << 30, Placement::Auto), ParamHome::Streamed),
    ];
    for (case, home) in &homes {
        let nvme = case.plan.nvme.unwrap();
        let spilled = |c: &&tierwise_core::plan::ChunkPlan| c.class == OptimizerClass::Nvme;
        assert!(case.plan.chunks.iter().filter(spilled).any(|c| c.home == *home), "{:?}", case.plan.host);
        // Where every rank keeps all parameters, each chunk is gathered once after its step, whatever its home.
        let chunks = case.plan.chunks.len();
        let (gather_ns, reduce_ns) = (vec![1_000_000; chunks], vec![0; chunks]);
        let sharding = Sharding { gathers_before_use: false, reduces_every_micro_batch: false, gather_ns, reduce_ns };
        let gathered = run_sharded(case, &hardware, true, Some(&sharding)).unwrap().communicated_ns;
        assert!(*home == ParamHome::Streamed || gathered == 1_000_000 * chunks as u64, "{gathered} ns for {chunks} chunks");
        let outcome = run(case, &hardware, true).unwrap();
        // The window begins at the end of a backward pass: what is read ahead may lie on either side.
        let ahead = u64::from(nvme.buffers) * nvme.buffer_bytes;
        assert!(outcome.nvme_read_bytes.abs_diff(nvme.payload_bytes) <= ahead, "{} of {}", outcome.nvme_read_bytes, nvme.payload_bytes);
        assert!(outcome.nvme_written_bytes.abs_diff(nvme.payload_bytes) <= ahead);
        let least = outcome.nvme_read_bytes as f64 / disk.read_bytes_per_s + outcome.nvme_written_bytes as f64 / disk.write_bytes_per_s;
        let step = outcome.step_ns as f64 / 1e9;
        // What it cannot hide: a backward pass, and the forward behind the last spilled layer.
        assert!(step >= least * 0.999 && step <= least + outcome.compute_ns as f64 / 1e9 + 0.5, "{step} s, the disk alone {least} s");
        assert!((case.plan.predicted_step_s / step - 1.0).abs() < 0.05, "{} predicted, {step} simulated", case.plan.predicted_step_s);
        assert_eq!(case.plan.bound_by, "nvme");
        assert!(outcome.host_peak_bytes <= case.request.host_budget);
        assert!(outcome.timeline.spans.iter().any(|span| span.track == "nvme write"));
    }
    // With their gradients on the disk too, as nothing but the buffers has room in memory.
    for accumulation in [1, 3] {
        let tight = |host_budget: u64| {
            case("llama2-7b", 4, &hardware, |request| {
                request.host_budget = host_budget;
                request.placement = all;
                request.accumulation = accumulation;
                request.accumulate = Some(Tier::Host);
                request.nvme =
                    Some(NvmeRequest { budget: 1 << 40, read_bytes: disk.read_bytes_per_s, write_bytes: disk.write_bytes_per_s });
            })
        };
        let case = tight(1_450_000_000).unwrap();
        let nvme = case.plan.nvme.unwrap();
        assert!(case.plan.chunks.iter().all(tierwise_core::plan::ChunkPlan::spills_grads), "{:?}", case.plan.host);
        let outcome = run(&case, &hardware, true).unwrap();
        let ahead = u64::from(nvme.buffers) * nvme.buffer_bytes + u64::from(nvme.grad_buffers) * nvme.grad_buffer_bytes;
        assert!(outcome.nvme_read_bytes.abs_diff(nvme.read_bytes) <= ahead, "{} of {}", outcome.nvme_read_bytes, nvme.read_bytes);
        // Both landing buffers may be on their way.
        let landing = 2 * case.built.layout.ids().map(|c| case.built.layout.final_grad_bytes(c, accumulation)).max().unwrap();
        assert!(outcome.nvme_written_bytes.abs_diff(nvme.written_bytes) <= ahead + landing);
        let parameters: u64 = case.built.layout.chunks.iter().map(|c| c.state_numel).sum();
        let per_parameter = if accumulation == 1 { 28 } else { 24 + 3 * 8 };
        assert_eq!(nvme.read_bytes + nvme.written_bytes, per_parameter * parameters);
        let step = outcome.step_ns as f64 / 1e9;
        let least = outcome.nvme_read_bytes as f64 / disk.read_bytes_per_s + outcome.nvme_written_bytes as f64 / disk.write_bytes_per_s;
        assert!(step >= least * 0.999, "{step} s, the disk alone {least} s");
        assert!((case.plan.predicted_step_s / step - 1.0).abs() < 0.1, "{} predicted, {step} simulated", case.plan.predicted_step_s);
        assert_eq!(case.plan.bound_by, "nvme");
    }
    let without = Hardware { nvme: None, ..hardware };
    assert!(matches!(run(&homes[0].0, &without, true), Err(SimError::Mismatch(m)) if m.contains("the machine has no disk")));
}

/// Where moments are late, there is a landing buffer for every gradient of a micro-batch if memory has room: backward does not wait for a host
/// that is slower than it was measured.
#[test]
fn gradients_land_while_moments_are_written() {
    let h100 = preset("h100").unwrap();
    let plan_with = |host_budget: u64| {
        case("llama2-7b", 4, &h100, |request| {
            request.host_budget = host_budget;
            request.accumulation = 4;
            request.accumulate = Some(Tier::Host);
            request.late_moments = Some(true);
            request.placement =
                Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 1.0, stream_optim_frac: 0.0 };
        })
    };
    let mut roomy = plan_with(2 << 40).unwrap();
    let chunks = roomy.plan.chunks.len() as u32;
    assert_eq!(roomy.plan.landing_buffers, chunks);
    let each = roomy.plan.host.staging / u64::from(chunks);
    let tight = plan_with(roomy.plan.host.total() - 20 * each).unwrap();
    assert_eq!(tight.plan.landing_buffers, chunks - 20);

    let slow = Hardware {
        host_memory_bytes_per_s: h100.host_memory_bytes_per_s * 0.6,
        host_stream_bytes_per_s: h100.host_stream_bytes_per_s * 0.6,
        ..h100.clone()
    };
    let mut waited = |buffers: u32| {
        roomy.plan.landing_buffers = buffers;
        roomy.plan.host.staging = u64::from(buffers) * each;
        run(&roomy, &slow, true).unwrap().stalls.gradient_hand_over_ns
    };
    let (few, all) = (waited(2), waited(chunks));
    assert!(all < few / 2, "{all} ns with a buffer for each of {chunks} gradients, {few} ns with two");
}

/// What `optimizer.step()` does in Python comes before its commit: meanwhile the host goes on with steps that may be undone.
#[test]
fn steps_are_speculated_until_the_commit() {
    let h100 = preset("h100").unwrap();
    let on_host = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    let case = case("llama-1.35b", 4, &h100, |request| (request.placement, request.clip_mode) = (on_host, ClipMode::Speculate)).unwrap();
    let speculated = |commit_ns: u64| {
        let costs = Costs { commit_ns, ..Costs::new(&case.built, &h100) };
        simulate(&setup(&case, &h100, &costs)).unwrap().counters.speculated
    };
    let (soon, late) = (speculated(0), speculated(50_000_000));
    assert!(soon > 0 && late >= soon + 2, "{soon} and {late} chunks of {}", case.plan.chunks.len());
}

#[test]
fn what_passes_between_steps_counts_for_every_piece_that_is_spilled() {
    let gap_ns = 2e6;
    let with = |host_gap_ns| Hardware { measured: Some(Measured { host_gap_ns, ..Measured::default() }), ..preset("h100").unwrap() };
    let (without, hardware) = (with(None), with(Some(gap_ns)));
    let disk = hardware.nvme.unwrap();
    let on_host = Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
    let case = case("llama2-7b", 4, &without, |request| {
        (request.host_budget, request.placement) = (28_000_000_000, on_host);
        request.nvme = Some(NvmeRequest { budget: 1 << 40, read_bytes: disk.read_bytes_per_s, write_bytes: disk.write_bytes_per_s });
    })
    .unwrap();
    let spilled = case.plan.chunks.iter().filter(|chunk| chunk.class == OptimizerClass::Nvme).count();
    assert!(spilled > 0);
    let busy = |hardware: &Hardware| run(&case, hardware, true).unwrap().busy_ns["host optimizer, spilled"];
    let longer = (busy(&hardware) - busy(&without)) as f64;
    assert!(longer > 0.9 * gap_ns * spilled as f64, "{longer} ns longer with {spilled} chunks on the disk");
}
