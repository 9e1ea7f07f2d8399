//! One run from question to answer: model, plan, simulated step, and what to change if it does not fit.

use crate::costs::Costs;
use crate::executor::{Outcome, Setup, SimError, simulate};
use crate::hardware::Hardware;
use crate::models::{Built, Model};
use crate::units::{gigabytes, seconds};
use serde::Serialize;
use std::fmt::Write;
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ClipMode, DeviceBytes, HostBytes, OptimizerClass, ParamHome, Plan};
use tierwise_core::planner::{Placement, PlanError, PlanRequest, Recompute, minimum_device_bytes, plan};
use tierwise_core::timeline::Timeline;

/// Version of the JSON reports.
pub const SCHEMA_VERSION: u32 = 1;

/// What to simulate.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The model.
    pub model: Model,
    /// The machine.
    pub hardware: Hardware,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// Tokens of an optimizer step, a multiple of `seq * micro_batch`.
    pub tokens_per_step: u64,
    /// Hard limit of device memory, in bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host memory, in bytes.
    pub host_budget: u64,
    /// Device bytes kept free for what no trace sees.
    pub reserve_bytes: u64,
    /// Which layers recompute.
    pub recompute: Recompute,
    /// Clipping mode.
    pub clip_mode: ClipMode,
    /// Whether the gradient norm is above its limit in every step.
    pub clips: bool,
}

/// A request that contradicts itself.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// The request contradicts itself.
    #[error("{0}")]
    Usage(String),
    /// A plan that the executor could not follow: a defect.
    #[error("the plan could not be executed: {0}")]
    Execution(SimError),
}

/// The answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It fits; this is how fast it is.
    Fits(Box<Report>, Timeline),
    /// It does not fit.
    DoesNotFit(Box<Shortage>),
}

/// What was asked for, as the reports repeat it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Asked {
    /// Name of the model.
    pub model: String,
    /// Exact number of parameters.
    pub num_params: u64,
    /// Name of the machine.
    pub hardware: String,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Sequences of a micro-batch.
    pub micro_batch: u64,
    /// Micro-batches per optimizer step.
    pub accumulation: u32,
    /// Tokens of an optimizer step.
    pub tokens_per_step: u64,
    /// Hard limit of device memory, in bytes.
    pub device_budget_bytes: u64,
    /// Hard limit of pinned host memory, in bytes.
    pub host_budget_bytes: u64,
}

/// What the plan is, in few numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Placed {
    /// Elements whose optimizer step the device runs.
    pub device_stepped_numel: u64,
    /// Elements whose optimizer step the host runs.
    pub host_stepped_numel: u64,
    /// Elements whose parameters are streamed.
    pub streamed_numel: u64,
    /// Layers that are recomputed in backward.
    pub recomputed_units: u64,
    /// Layers that could be.
    pub recomputable_units: u64,
    /// Device memory at the planned peak, by purpose.
    pub device: DeviceBytes,
    /// Host memory, by purpose.
    pub host: HostBytes,
    /// Seconds of a step by the planner's formulas.
    pub predicted_step_s: f64,
    /// What bounds the step by the planner's formulas.
    pub bound_by: String,
}

/// A step that fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Version of this schema.
    pub schema_version: u32,
    /// True.
    pub fits: bool,
    /// What was asked for.
    pub asked: Asked,
    /// The plan.
    pub plan: Placed,
    /// The simulated step.
    pub step: Outcome,
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Useful FLOP/s (`6 N + 6 layers hidden seq` per token) over the device's peak.
    pub mfu: f64,
    /// The same with recomputed FLOPs counted.
    pub hfu: f64,
}

/// A step that does not fit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shortage {
    /// Version of this schema.
    pub schema_version: u32,
    /// False.
    pub fits: bool,
    /// What was asked for.
    pub asked: Asked,
    /// Tier that is too small: `device` or `host`.
    pub tier: String,
    /// Operation with the highest need, if it is the device's.
    pub op: Option<String>,
    /// Bytes needed by the tightest plan.
    pub needed_bytes: u64,
    /// Bytes missing.
    pub shortfall_bytes: u64,
    /// Settings that fit, each found by planning with it.
    pub alternatives: Vec<String>,
}

/// Plans and simulates.
pub fn answer(request: &Request) -> Result<Answer, Error> {
    let (built, planned) = attempt(request)?;
    let asked = Asked {
        model: request.model.name.clone(),
        num_params: request.model.num_params(),
        hardware: request.hardware.name.clone(),
        seq: request.seq,
        micro_batch: request.micro_batch,
        accumulation: accumulation(request)?,
        tokens_per_step: request.tokens_per_step,
        device_budget_bytes: request.device_budget,
        host_budget_bytes: request.host_budget,
    };
    let shortage = |tier: &str, op: Option<String>, needed_bytes: u64, shortfall_bytes: u64| {
        Ok(Answer::DoesNotFit(Box::new(Shortage {
            schema_version: SCHEMA_VERSION,
            fits: false,
            asked: asked.clone(),
            tier: tier.to_owned(),
            op,
            needed_bytes,
            shortfall_bytes,
            alternatives: alternatives(request, tier),
        })))
    };
    let plan = match planned {
        Ok(plan) => plan,
        Err(PlanError::Device { op, needed, shortfall, .. }) => return shortage("device", Some(op), needed, shortfall),
        Err(PlanError::Host { needed, shortfall, .. }) => return shortage("host", None, needed, shortfall),
        Err(PlanError::Invalid(message)) => return Err(Error::Usage(message)),
    };
    let costs = Costs::new(&built, &request.hardware);
    let step = simulate(&Setup {
        layout: &built.layout,
        trace: &built.trace,
        plan: &plan,
        costs: &costs,
        hardware: &request.hardware,
        sharding: None,
        device_budget: request.device_budget,
        host_budget: request.host_budget,
        clips: request.clips,
    });
    let mut step = match step {
        Ok(step) => step,
        Err(SimError::Budget(error)) => {
            return shortage(&error.tier.to_string(), Some(error.what), error.limit + error.shortfall, error.shortfall);
        }
        Err(error) => return Err(Error::Execution(error)),
    };
    let timeline = std::mem::take(&mut step.timeline);
    let seconds = step.step_ns as f64 / 1e9;
    let useful = request.model.model_flops_per_token(request.seq) * request.tokens_per_step as f64;
    let units = || built.trace.units.iter().zip(&plan.recompute);
    let again: f64 = units().filter(|(_, recomputed)| **recomputed).map(|(unit, _)| unit.flops).sum::<f64>() * f64::from(plan.accumulation);
    let report = Report {
        schema_version: SCHEMA_VERSION,
        fits: true,
        asked,
        plan: placed(&built.layout, &plan, units().filter(|(unit, _)| unit.recomputable).count() as u64),
        tokens_per_s: request.tokens_per_step as f64 / seconds,
        mfu: useful / seconds / request.hardware.peak_flops,
        hfu: (useful + again) / seconds / request.hardware.peak_flops,
        step,
    };
    Ok(Answer::Fits(Box::new(report), timeline))
}

fn accumulation(request: &Request) -> Result<u32, Error> {
    if request.seq == 0 || request.micro_batch == 0 {
        return Err(Error::Usage("seq and micro-batch must be at least 1".to_owned()));
    }
    let micro_batch = request.seq.saturating_mul(request.micro_batch);
    if request.tokens_per_step == 0 || !request.tokens_per_step.is_multiple_of(micro_batch) {
        return Err(Error::Usage(format!(
            "tokens-per-step is {}; it must be a multiple of seq * micro-batch = {micro_batch}",
            request.tokens_per_step
        )));
    }
    // A step is a few events per micro-batch and layer: more than this many would only take longer.
    match u32::try_from(request.tokens_per_step / micro_batch) {
        Ok(count) if count <= 4096 && micro_batch <= 1 << 30 => Ok(count),
        _ => Err(Error::Usage(format!(
            "{} micro-batches of {micro_batch} tokens; at most 4096 of 2^30 are simulated",
            request.tokens_per_step / micro_batch
        ))),
    }
}

fn attempt(request: &Request) -> Result<(Built, Result<Plan, PlanError>), Error> {
    let accumulation = accumulation(request)?;
    let built = request.model.build(request.seq, request.micro_batch);
    let planned = plan(&built.layout, &built.trace, &plan_request(request, &built, accumulation));
    Ok((built, planned))
}

fn plan_request(request: &Request, built: &Built, accumulation: u32) -> PlanRequest {
    PlanRequest {
        device_budget: request.device_budget,
        host_budget: request.host_budget,
        reserve_bytes: request.reserve_bytes,
        placement: Placement::Auto,
        recompute: request.recompute.clone(),
        accumulation,
        clip_mode: request.clip_mode,
        speeds: Costs::new(built, &request.hardware).speeds(built, &request.hardware),
    }
}

fn placed(layout: &Layout, plan: &Plan, recomputable_units: u64) -> Placed {
    let numel = |wanted: &dyn Fn(usize) -> bool| layout.ids().filter(|c| wanted(c.index())).map(|c| layout.chunks[c.index()].numel).sum();
    Placed {
        device_stepped_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Device),
        host_stepped_numel: numel(&|c| plan.chunks[c].class == OptimizerClass::Host),
        streamed_numel: numel(&|c| plan.chunks[c].home == ParamHome::Streamed),
        recomputed_units: plan.recompute.iter().filter(|r| **r).count() as u64,
        recomputable_units,
        device: plan.device,
        host: plan.host,
        predicted_step_s: plan.predicted_step_s,
        bound_by: plan.bound_by.clone(),
    }
}

/// Single settings that fit, cheapest to change first.
fn alternatives(request: &Request, tier: &str) -> Vec<String> {
    let fits = |changed: &Request| matches!(attempt(changed), Ok((_, Ok(_))));
    let mut found = Vec::new();
    if request.recompute == Recompute::None {
        for (name, recompute) in [("auto", Recompute::Auto), ("full", Recompute::Full)] {
            if found.is_empty() && fits(&Request { recompute, ..request.clone() }) {
                found.push(format!("--recompute {name}"));
            }
        }
    }
    let mut micro_batch = request.micro_batch;
    while micro_batch > 1 {
        micro_batch /= 2;
        if fits(&Request { micro_batch, ..request.clone() }) {
            found.push(format!("--micro-batch {micro_batch}"));
            break;
        }
    }
    // The planner's search for the least device memory assumes the host budget, and the least host memory is in its error.
    if tier == "device" {
        if let (Ok(accumulation), built) = (accumulation(request), request.model.build(request.seq, request.micro_batch)) {
            let least = minimum_device_bytes(&built.layout, &built.trace, &plan_request(request, &built, accumulation));
            if least < u64::MAX && fits(&Request { device_budget: least, ..request.clone() }) {
                found.push(format!("--device-budget {}MiB", least.div_ceil(1 << 20)));
            }
        }
    } else if let Ok((_, Err(PlanError::Host { needed, .. }))) = attempt(request)
        && fits(&Request { host_budget: needed, ..request.clone() })
    {
        found.push(format!("--host-budget {}MiB", needed.div_ceil(1 << 20)));
    }
    found
}

/// Rows of `label  value`, the values in one column.
fn table(rows: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (label, value) in rows {
        let _ = writeln!(text, "{label:<24}{value}");
    }
    text
}

impl Report {
    /// For people.
    pub fn to_table(&self) -> String {
        let (asked, plan, step) = (&self.asked, &self.plan, &self.step);
        let billions = |numel: u64| format!("{:.2}e9", numel as f64 / 1e9);
        let percent = |ns: u64| format!("{} ({:.1} %)", seconds(ns), 100.0 * ns as f64 / step.step_ns as f64);
        let mut rows = vec![
            ("model", format!("{}, {} parameters", asked.model, asked.num_params)),
            ("hardware", asked.hardware.clone()),
            ("step", format!("{} tokens = {} x {} x {}", asked.tokens_per_step, asked.accumulation, asked.micro_batch, asked.seq)),
            ("fits", "yes".to_owned()),
            (
                "step time",
                format!("{} (planner's formula {:.3} s, bound by {})", seconds(step.step_ns), plan.predicted_step_s, plan.bound_by),
            ),
            ("tokens/s", format!("{:.0}", self.tokens_per_s)),
            ("MFU / HFU", format!("{:.1} % / {:.1} %", 100.0 * self.mfu, 100.0 * self.hfu)),
            ("compute", percent(step.compute_ns)),
            ("slowed by sharing", percent(step.slowdown_ns)),
        ];
        let stalls = &step.stalls;
        for (label, ns) in [
            ("stall: parameter fetch", stalls.parameter_fetch_ns),
            ("stall: optimizer step", stalls.optimizer_step_ns),
            ("stall: gradients", stalls.gradient_hand_over_ns),
            ("stall: device memory", stalls.device_memory_ns),
            ("stall: launch", stalls.launch_ns),
        ] {
            rows.push((label, percent(ns)));
        }
        rows.extend([
            (
                "device peak",
                format!("{} of {} at {}", gigabytes(step.device_peak_bytes), gigabytes(asked.device_budget_bytes), step.device_peak_op),
            ),
            ("host peak", format!("{} of {}", gigabytes(step.host_peak_bytes), gigabytes(asked.host_budget_bytes))),
            ("to device / to host", format!("{} / {}", gigabytes(step.h2d_bytes), gigabytes(step.d2h_bytes))),
            ("stepped on device", billions(plan.device_stepped_numel)),
            ("stepped on host", billions(plan.host_stepped_numel)),
            ("streamed", billions(plan.streamed_numel)),
            ("recomputed layers", format!("{} of {}", plan.recomputed_units, plan.recomputable_units)),
        ]);
        table(&rows)
    }
}

impl Shortage {
    /// For people.
    pub fn to_table(&self) -> String {
        let asked = &self.asked;
        let at = self.op.as_ref().map(|op| format!(" at {op}")).unwrap_or_default();
        let budget = if self.tier == "device" { asked.device_budget_bytes } else { asked.host_budget_bytes };
        let remedy = if self.alternatives.is_empty() {
            "no single setting makes it fit; raise both budgets".to_owned()
        } else {
            self.alternatives.join(" or ")
        };
        table(&[
            ("model", format!("{}, {} parameters", asked.model, asked.num_params)),
            ("hardware", asked.hardware.clone()),
            ("fits", "no".to_owned()),
            (
                "missing",
                format!(
                    "{} of {} memory{at}: {} needed, {} allowed",
                    gigabytes(self.shortfall_bytes),
                    self.tier,
                    gigabytes(self.needed_bytes),
                    gigabytes(budget)
                ),
            ),
            ("these fit", remedy),
        ])
    }
}
