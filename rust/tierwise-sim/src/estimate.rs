//! A step of a plan that the runtime made, executed in virtual time with the speeds that its planner weighed.

use crate::costs::{ADAM_BYTES_PER_PARAM, Costs, Launch};
use crate::executor::{Outcome, Setup, SimError, simulate};
use crate::hardware::{Disk, Hardware, preset};
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ClipMode, Plan};
use tierwise_core::planner::{PlanRequest, Speeds};
use tierwise_core::trace::Trace;

/// Executes the plan: the same executor as every simulation, with the trace's FLOPs at the planner's rate. Speculation is taken to be
/// accepted, as its plan hopes.
pub fn estimate(layout: &Layout, trace: &Trace, plan: &Plan, request: &PlanRequest) -> Result<Outcome, SimError> {
    let speeds = &request.speeds;
    let hardware = Hardware {
        nvme: request.nvme.map(|n| Disk { read_bytes_per_s: n.read_bytes, write_bytes_per_s: n.write_bytes }),
        ..machine(speeds)
    };
    let ns = |flops: f64| (flops / speeds.flops * 1e9).round() as u64;
    let costs = Costs {
        forward_ns: trace.units.iter().map(|unit| ns(unit.flops)).collect(),
        backward_ns: trace.units.iter().map(|unit| ns(2.0 * unit.flops)).collect(),
        recompute_ns: trace.units.iter().map(|unit| ns(unit.recompute_flops())).collect(),
        launch: vec![Launch::equal(hardware.launch_ns); trace.units.len()],
        commit_ns: 0,
        sustained: 1.0,
    };
    simulate(&Setup {
        layout,
        trace,
        plan,
        costs: &costs,
        hardware: &hardware,
        sharding: None,
        transient_bytes: None,
        forward_reserve_bytes: 0,
        // What the plan takes was checked when it was made; what autograd saves differs from it where a model does.
        device_budget: u64::MAX,
        host_budget: u64::MAX,
        nvme_budget: u64::MAX,
        clips: plan.clip_mode == ClipMode::Defer,
    })
}

/// A machine of these speeds, all of which hold while both directions of the link are busy: nothing slows anything down further.
fn machine(speeds: &Speeds) -> Hardware {
    let adam_bytes = speeds.host_adam_params * ADAM_BYTES_PER_PARAM;
    let like = preset("h100").unwrap_or_else(|| unreachable!("it is a preset"));
    Hardware {
        h2d_bytes_per_s: speeds.h2d_bytes,
        h2d_duplex_bytes_per_s: speeds.h2d_bytes,
        d2h_bytes_per_s: speeds.d2h_bytes,
        d2h_duplex_bytes_per_s: speeds.d2h_bytes,
        device_memory_bytes_per_s: speeds.device_memory_bytes,
        host_memory_bytes_per_s: speeds.h2d_bytes + speeds.d2h_bytes + adam_bytes,
        host_stream_bytes_per_s: adam_bytes,
        host_adam_params_per_s: speeds.host_adam_params,
        host_params_first_per_s: speeds.host_params_first,
        d2h_compute_tax: 0.0,
        host_adam_compute_tax: 0.0,
        measured: None,
        ..like
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::preset as model;
    use tierwise_core::planner::{Offload, Placement, Recompute, plan};

    #[test]
    fn more_host_work_than_the_step_hides_shows_as_waiting() {
        let built = model("llama-1.35b").unwrap().build(4096, 4);
        let request = |fraction| PlanRequest {
            device_budget: 80_000_000_000,
            host_budget: 100_000_000_000,
            reserve_bytes: 0,
            placement: Placement::Static {
                shard_param_frac: 1.0,
                offload_optim_frac: fraction,
                offload_param_frac: 0.0,
                stream_optim_frac: 0.0,
            },
            recompute: Recompute::Full,
            offload: Offload::None,
            accumulation: 1,
            accumulate: None,
            late_moments: None,
            visiting: true,
            clip_mode: ClipMode::Defer,
            speeds: Speeds {
                flops: 6e14,
                h2d_bytes: 42e9,
                d2h_bytes: 50e9,
                host_adam_params: 3.8e9,
                host_params_first: None,
                device_memory_bytes: 2.6e12,
            },
            nvme: None,
        };
        let step = |fraction| {
            let request = request(fraction);
            let plan = plan(&built.layout, &built.trace, &request).unwrap();
            estimate(&built.layout, &built.trace, &plan, &request).unwrap()
        };
        let (device, host) = (step(0.0), step(1.0));
        assert!(device.stalls.optimizer_step_ns < 2_000_000, "what the first layer waits for its own step: {device:?}");
        assert!(host.stalls.optimizer_step_ns > 50_000_000, "{host:?}");
        assert!(host.step_ns > device.step_ns, "{} {}", host.step_ns, device.step_ns);
        let parts = host.compute_ns + host.slowdown_ns + host.stalls.total_ns();
        assert_eq!(parts, host.step_ns);
    }
}
