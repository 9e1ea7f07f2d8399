//! Which of the planner's best plans the simulator finds fastest.

use crate::estimate::estimate;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ClipMode, Plan};
use tierwise_core::planner::{PlanError, PlanRequest, candidates};
use tierwise_core::trace::Trace;

/// Plans that are executed, each of which keeps activations otherwise; and as many whose host steps take one pass instead of two, or two.
const EXECUTED: usize = 5;

/// Share of a step by which another plan has to be faster than the planner's first: less is within what either knows.
const LEAST_GAIN: f64 = 0.01;

/// The planner's plan, or another of its best ones whose executed step is faster. The planner's formulas say what fits and what may be
/// fast; the executor knows what waits for what.
///
/// [`ClipMode::Auto`] speculates where that is faster than deferring while nothing clips: undo records take host memory and its bandwidth.
pub fn choose(layout: &Layout, trace: &Trace, request: &PlanRequest) -> Result<Plan, PlanError> {
    choose_by(layout, trace, request, |plan| seconds(layout, trace, plan, request)).map(|(plan, _)| plan)
}

/// The same by the seconds that `execute` gives of a step, infinity for a plan that cannot be executed; gives those of the chosen plan too.
pub fn choose_by(layout: &Layout, trace: &Trace, request: &PlanRequest, execute: impl Fn(&Plan) -> f64) -> Result<(Plan, f64), PlanError> {
    let asked = fastest(layout, trace, request, &execute)?;
    if request.clip_mode != ClipMode::Auto {
        return Ok(asked);
    }
    let deferring = fastest(layout, trace, &PlanRequest { clip_mode: ClipMode::Defer, ..request.clone() }, &execute)?;
    Ok(if faster(asked.1, deferring.1) { asked } else { deferring })
}

/// Whether a step is faster than another by more than either is known.
fn faster(one: f64, other: f64) -> bool {
    one < (1.0 - LEAST_GAIN) * other
}

fn fastest(layout: &Layout, trace: &Trace, request: &PlanRequest, execute: &impl Fn(&Plan) -> f64) -> Result<(Plan, f64), PlanError> {
    let mut plans = candidates(layout, trace, request, EXECUTED)?;
    if request.late_moments.is_none() {
        // Where the host bounds a step, what waits for what decides whether late moments are worth it.
        let late_moments = Some(!plans[0].late_moments);
        let others = candidates(layout, trace, &PlanRequest { late_moments, ..request.clone() }, EXECUTED)?;
        plans.extend(others.into_iter().filter(|plan| Some(plan.late_moments) == late_moments));
    }
    let steps: Vec<f64> = plans.iter().map(execute).collect();
    let fastest = (0..steps.len()).min_by(|a, b| steps[*a].total_cmp(&steps[*b])).unwrap_or(0);
    let chosen = if faster(steps[fastest], steps[0]) { fastest } else { 0 };
    Ok((plans.swap_remove(chosen), steps[chosen]))
}

/// Of an executed step. A plan that cannot be executed is not chosen for that; the runtime says why.
fn seconds(layout: &Layout, trace: &Trace, plan: &Plan, request: &PlanRequest) -> f64 {
    estimate(layout, trace, plan, request).map_or(f64::INFINITY, |outcome| outcome.step_ns as f64 / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models::preset as model;
    use tierwise_core::planner::{Offload, Placement, Recompute, Speeds, plan};

    fn request(clip_mode: ClipMode) -> PlanRequest {
        PlanRequest {
            device_budget: 76_000_000_000,
            host_budget: 110_000_000_000,
            reserve_bytes: 4_000_000_000,
            placement: Placement::Auto,
            recompute: Recompute::Auto,
            offload: Offload::None,
            accumulation: 1,
            accumulate: None,
            late_moments: None,
            visiting: false,
            clip_mode,
            speeds: Speeds {
                flops: 4.5e14,
                h2d_bytes: 42e9,
                d2h_bytes: 50e9,
                host_adam_params: 3.8e9,
                host_params_first: None,
                device_memory_bytes: 2.6e12,
            },
            nvme: None,
        }
    }

    #[test]
    fn the_first_plan_stays_unless_another_is_executed_faster() {
        let built = model("llama2-7b").unwrap().build(4096, 4);
        let (layout, trace) = (&built.layout, &built.trace);
        let mut changed = 0;
        for clip_mode in [ClipMode::Defer, ClipMode::Speculate] {
            let request = PlanRequest { speeds: Speeds { host_adam_params: 8e9, ..request(clip_mode).speeds }, ..request(clip_mode) };
            let first = plan(layout, trace, &request).unwrap();
            let all = candidates(layout, trace, &request, EXECUTED).unwrap();
            assert_eq!((all.len(), &all[0]), (EXECUTED, &first));
            assert!(all.windows(2).all(|two| two[0].predicted_step_s <= two[1].predicted_step_s));
            assert!(all.windows(2).all(|two| two[0].activations != two[1].activations));
            let chosen = choose(layout, trace, &request).unwrap();
            let step = |plan: &Plan| estimate(layout, trace, plan, &request).unwrap().step_ns as f64;
            assert!(chosen == first || step(&chosen) < 0.99 * step(&first));
            assert!(all.iter().all(|plan| step(&chosen) <= step(plan) / 0.99));
            changed += u32::from(chosen != first);
        }
        // Undo records share the memory of the host's steps, which the formulas count for the steps alone.
        assert_eq!(changed, 1);
    }

    #[test]
    fn auto_speculates_where_that_is_faster() {
        let built = model("llama2-7b").unwrap().build(4096, 4);
        let (layout, trace) = (&built.layout, &built.trace);
        let asked = |clip_mode, host_budget, offload_optim_frac, host_adam_params| {
            let speeds = Speeds { host_adam_params, ..request(clip_mode).speeds };
            let placement =
                Placement::Static { shard_param_frac: 1.0, offload_optim_frac, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
            PlanRequest { device_budget: 200_000_000_000, host_budget, speeds, placement, ..request(clip_mode) }
        };
        // A backward pass hides what a forward cannot, until half as much traffic again is hidden by neither.
        let cases = [(0.1, 1e9, true), (0.3, 2e9, true), (0.5, 2e9, true), (0.7, 2e9, true), (0.7, 8e9, false), (1.0, 8e9, false)];
        for (offload_optim_frac, host_adam_params, speculates) in cases {
            let asked = |clip_mode| asked(clip_mode, 400_000_000_000, offload_optim_frac, host_adam_params);
            let [speculating, deferred] = [ClipMode::Auto, ClipMode::Defer].map(|mode| {
                let asked = asked(mode);
                fastest(layout, trace, &asked, &|plan: &Plan| seconds(layout, trace, plan, &asked)).unwrap().0
            });
            let step = |plan: &Plan| seconds(layout, trace, plan, &asked(plan.clip_mode));
            assert_eq!(step(&speculating) < 0.99 * step(&deferred), speculates, "{} {}", step(&speculating), step(&deferred));
            let wanted = if speculates { speculating } else { deferred };
            assert_eq!(choose(layout, trace, &asked(ClipMode::Auto)).unwrap(), wanted);
        }
        // Room for the states, and none for undo records.
        let deferred = choose(layout, trace, &asked(ClipMode::Defer, 400_000_000_000, 0.1, 1e9)).unwrap();
        let tight = asked(ClipMode::Auto, deferred.host.total(), 0.1, 1e9);
        assert_eq!(choose(layout, trace, &tight).unwrap().clip_mode, ClipMode::Defer);
    }

    #[test]
    fn one_pass_or_two_as_the_executor_finds_faster() {
        let built = model("llama2-7b").unwrap().build(4096, 4);
        let mut passes = std::collections::BTreeSet::new();
        for (accumulation, host_adam_params) in [(1, 1.5e9), (2, 1.5e9), (2, 3.8e9), (4, 1e9)] {
            let placement =
                Placement::Static { shard_param_frac: 1.0, offload_optim_frac: 1.0, offload_param_frac: 0.0, stream_optim_frac: 0.0 };
            let speeds = Speeds { host_adam_params, ..request(ClipMode::Defer).speeds };
            let asked = PlanRequest {
                placement,
                accumulation,
                accumulate: Some(tierwise_core::Tier::Host),
                recompute: Recompute::Full,
                host_budget: 200_000_000_000,
                speeds,
                ..request(ClipMode::Defer)
            };
            let seconds = |late_moments| {
                let asked = PlanRequest { late_moments, ..asked.clone() };
                let plan = choose(&built.layout, &built.trace, &asked).unwrap();
                (estimate(&built.layout, &built.trace, &plan, &asked).unwrap().step_ns as f64, plan.late_moments)
            };
            let ((one, _), (two, _), (chosen, late)) = (seconds(Some(false)), seconds(Some(true)), seconds(None));
            passes.insert(late);
            assert!(chosen <= one.min(two) * 1.011, "{accumulation} {host_adam_params}: {chosen} of {one} and {two}");
        }
        assert!(passes.contains(&true));
    }
}
