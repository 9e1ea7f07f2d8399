//! One run from question to answer: the simulated step, what it means, and what to change if it does not fit.

use crate::executor::Outcome;
use crate::ours::{self, Placed};
use crate::peers;
use crate::request::{Asked, Error, Request};
use crate::units::{Shortfall, gigabytes, seconds};
use serde::Serialize;
use std::fmt::Write;
use tierwise_core::planner::Recompute;
use tierwise_core::timeline::Timeline;

/// Version of the JSON reports.
pub const SCHEMA_VERSION: u32 = 1;

/// The answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It fits; this is how fast it is.
    Fits(Box<Report>, Timeline),
    /// It does not fit.
    DoesNotFit(Box<Shortage>),
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
    /// The plan of the slowest rank's stage; none for another system's policy.
    pub plan: Option<Placed>,
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

/// Simulates, with what to change if it does not fit.
pub fn answer(request: &Request) -> Result<Answer, Error> {
    match simulate(request)? {
        Ok((report, timeline)) => Ok(Answer::Fits(report, timeline)),
        Err(short) => Ok(Answer::DoesNotFit(Box::new(Shortage {
            schema_version: SCHEMA_VERSION,
            fits: false,
            asked: request.asked()?,
            alternatives: alternatives(request, &short),
            tier: short.tier,
            op: short.op,
            needed_bytes: short.needed_bytes,
            shortfall_bytes: short.shortfall_bytes,
        }))),
    }
}

/// Simulates; the inner error says what does not fit.
pub fn simulate(request: &Request) -> Result<Result<(Box<Report>, Timeline), Shortfall>, Error> {
    request.parallel.check(&request.model, &request.hardware, request.seq).map_err(Error::Usage)?;
    let simulated = match request.policy {
        None => ours::step(request)?,
        Some(policy) => peers::step(policy, request)?,
    };
    let simulated = match simulated {
        Ok(simulated) => simulated,
        Err(short) => return Ok(Err(short)),
    };
    let seconds = simulated.outcome.step_ns as f64 / 1e9;
    let useful = request.model.model_flops_per_token(request.seq) * request.tokens_per_step as f64;
    let peak = request.hardware.peak_flops * request.parallel.gpus as f64;
    let report = Report {
        schema_version: SCHEMA_VERSION,
        fits: true,
        asked: request.asked()?,
        plan: simulated.placed,
        tokens_per_s: request.tokens_per_step as f64 / seconds,
        mfu: useful / seconds / peak,
        hfu: (useful + simulated.recomputed_flops) / seconds / peak,
        step: simulated.outcome,
    };
    Ok(Ok((Box::new(report), simulated.timeline)))
}

/// Single settings that fit, cheapest to change first.
fn alternatives(request: &Request, short: &Shortfall) -> Vec<String> {
    let fits = |changed: &Request| matches!(simulate(changed), Ok(Ok(_)));
    let mut found = Vec::new();
    if request.recompute == Recompute::None {
        for (name, recompute) in [("auto", Recompute::Auto), ("full", Recompute::Full)] {
            if found.is_empty() && fits(&Request { recompute, ..request.clone() }) {
                found.push(format!("--recompute {name}"));
            }
        }
    }
    if request.parallel.zero < 3 && request.policy.is_none() && request.parallel.shards() > 1 {
        let parallel = crate::parallel::Parallel { zero: 3, ..request.parallel };
        if fits(&Request { parallel, ..request.clone() }) {
            found.push("--zero 3".to_owned());
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
    if short.tier == "device" {
        // The planner knows its own least; other systems' programs say what they need.
        let least = if request.policy.is_none() { ours::least_device_bytes(request).unwrap_or(u64::MAX) } else { short.needed_bytes };
        if least < u64::MAX && fits(&Request { device_budget: least, ..request.clone() }) {
            found.push(format!("--device-budget {}MiB", least.div_ceil(1 << 20)));
        }
    } else if short.tier == "nvme" {
        if fits(&Request { nvme_budget: short.needed_bytes, ..request.clone() }) {
            found.push(format!("--nvme-budget {}MiB", short.needed_bytes.div_ceil(1 << 20)));
        }
    } else if fits(&Request { host_budget: short.needed_bytes, ..request.clone() }) {
        found.push(format!("--host-budget {}MiB", short.needed_bytes.div_ceil(1 << 20)));
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
        let (asked, step) = (&self.asked, &self.step);
        let billions = |numel: u64| format!("{:.2}e9", numel as f64 / 1e9);
        let percent = |ns: u64| format!("{} ({:.1} %)", seconds(ns), 100.0 * ns as f64 / step.step_ns as f64);
        let mut rows = vec![
            ("model", format!("{}, {} parameters", asked.model, asked.num_params)),
            ("hardware", format!("{} x {}", asked.parallel.gpus, asked.hardware)),
            ("policy", asked.policy.to_owned()),
            (
                "step",
                format!(
                    "{} tokens = {} micro-batches x {} sequences x {} tokens x {} data-parallel ranks",
                    asked.tokens_per_step, asked.accumulation, asked.micro_batch, asked.seq, asked.data_parallel
                ),
            ),
            ("fits", "yes".to_owned()),
            ("step time", seconds(step.step_ns)),
            ("tokens/s", format!("{:.0}", self.tokens_per_s)),
            ("MFU / HFU", format!("{:.1} % / {:.1} %", 100.0 * self.mfu, 100.0 * self.hfu)),
            ("compute", percent(step.compute_ns)),
            ("slowed by sharing", percent(step.slowdown_ns)),
        ];
        rows.extend(step.stalls.by_cause().map(|(label, ns)| (label, percent(ns))));
        rows.extend([
            (
                "device peak",
                format!("{} of {} at {}", gigabytes(step.device_peak_bytes), gigabytes(asked.device_budget_bytes), step.device_peak_op),
            ),
            ("host peak", format!("{} of {}", gigabytes(step.host_peak_bytes), gigabytes(asked.host_budget_bytes))),
            ("to device / to host", format!("{} / {}", gigabytes(step.h2d_bytes), gigabytes(step.d2h_bytes))),
            ("from / to NVMe", format!("{} / {}", gigabytes(step.nvme_read_bytes), gigabytes(step.nvme_written_bytes))),
            ("collectives", seconds(step.communicated_ns)),
        ]);
        if let Some(plan) = &self.plan {
            rows.extend([
                ("planner's formula", format!("{:.3} s, bound by {}", plan.predicted_step_s, plan.bound_by)),
                ("stepped on device", billions(plan.device_stepped_numel)),
                ("stepped on host", billions(plan.host_stepped_numel)),
                ("states visiting device", billions(plan.visiting_numel)),
                ("stepped from NVMe", billions(plan.nvme_stepped_numel)),
                ("streamed", billions(plan.streamed_numel)),
                ("recomputed layers", format!("{} of {}", plan.recomputed_units, plan.recomputable_units)),
                ("cheap outputs", if plan.rematerialized { "made again in backward" } else { "kept" }.to_owned()),
            ]);
        }
        table(&rows)
    }
}

impl Shortage {
    /// For people.
    pub fn to_table(&self) -> String {
        let asked = &self.asked;
        let at = self.op.as_ref().map(|op| format!(" at {op}")).unwrap_or_default();
        let budget = match self.tier.as_str() {
            "device" => asked.device_budget_bytes,
            "nvme" => asked.nvme_budget_bytes,
            _ => asked.host_budget_bytes,
        };
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
