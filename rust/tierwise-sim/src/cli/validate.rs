//! Predictions against recorded runs: percent error per metric, and a gate.

use super::args::{find_hardware, find_model};
use super::output::{Failure, print, usage};
use super::{Format, GATE, OK, SCHEMA_VERSION};
use crate::parallel::Parallel;
use crate::peers::Policy;
use crate::report::simulate;
use crate::request::Request;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;
use tierwise_core::plan::ClipMode;
use tierwise_core::planner::Recompute;

/// A file of recorded runs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    schema_version: u32,
    /// Where the records come from.
    #[serde(rename = "source")]
    _source: String,
    /// Largest errors allowed, per metric, in percent.
    #[serde(default)]
    gate: BTreeMap<String, Limits>,
    runs: Vec<Run>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    median: Option<f64>,
    p95: Option<f64>,
    max: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Recomputes {
    None,
    Full,
    Auto,
}

/// One recorded run. What is left out is what the command line takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Run {
    name: String,
    /// A preset, a config.json beside nothing else, or the fields of one.
    model: serde_json::Value,
    hardware: String,
    #[serde(default)]
    network: Option<String>,
    #[serde(default = "ours")]
    policy: String,
    #[serde(default = "one")]
    gpus: u64,
    #[serde(default = "one")]
    tensor_parallel: u64,
    seq: u64,
    micro_batch: u64,
    tokens_per_step: u64,
    #[serde(default = "auto")]
    recompute: Recomputes,
    #[serde(default)]
    pageable: bool,
    #[serde(default)]
    device_budget: Option<u64>,
    #[serde(default)]
    host_budget: Option<u64>,
    #[serde(default)]
    nvme_budget: u64,
    #[serde(default = "reserve")]
    reserve_bytes: u64,
    #[serde(default = "yes")]
    clips: bool,
    recorded: Recorded,
}

/// What was measured; what was not is left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Recorded {
    #[serde(default = "yes")]
    fits: bool,
    step_s: Option<f64>,
    tokens_per_s: Option<f64>,
    device_peak_bytes: Option<f64>,
    host_peak_bytes: Option<f64>,
}

fn ours() -> String {
    "tierwise".to_owned()
}

fn one() -> u64 {
    1
}

fn auto() -> Recomputes {
    Recomputes::Auto
}

fn reserve() -> u64 {
    2_000_000_000
}

fn yes() -> bool {
    true
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    fits: bool,
    recorded_fits: bool,
    metrics: BTreeMap<&'static str, Metric>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Metric {
    recorded: f64,
    predicted: f64,
    error_percent: f64,
}

#[derive(Debug, Serialize)]
struct Summary {
    runs: usize,
    median_percent: f64,
    p95_percent: f64,
    max_percent: f64,
}

#[derive(Debug, Serialize)]
struct Validation {
    schema_version: u32,
    passed: bool,
    failures: Vec<String>,
    summary: BTreeMap<&'static str, Summary>,
    runs: Vec<Row>,
}

/// Runs every record and applies the gate.
pub fn validate(path: &Path, format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
    let named = |error: &dyn std::fmt::Display| usage(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    let file: File = serde_json::from_str(&text).map_err(|error| named(&error))?;
    if file.schema_version != 1 {
        return Err(named(&format!("schema_version is {}; this program reads 1", file.schema_version)));
    }
    let mut rows = Vec::new();
    for run in &file.runs {
        rows.push(predict(run).map_err(|failure| Failure { message: format!("{}: {}", run.name, failure.message), ..failure })?);
    }
    let summary = summarise(&rows);
    let mut failures: Vec<String> =
        rows.iter().filter(|r| r.fits && !r.recorded_fits).map(|r| format!("{} is predicted to fit and did not", r.name)).collect();
    failures.extend(rows.iter().filter(|r| !r.fits && r.recorded_fits).map(|r| format!("{} is predicted not to fit and did", r.name)));
    for (metric, limits) in &file.gate {
        let Some(found) = summary.get(metric.as_str()) else {
            return Err(named(&format!("the gate names `{metric}`, which no run has recorded")));
        };
        for (what, error, limit) in [
            ("median", found.median_percent, limits.median),
            ("p95", found.p95_percent, limits.p95),
            ("max", found.max_percent, limits.max),
        ] {
            if let Some(limit) = limit.filter(|limit| error > *limit) {
                failures.push(format!("{what} error of {metric} is {error:.1} %, allowed are {limit} %"));
            }
        }
    }
    let validation = Validation { schema_version: SCHEMA_VERSION, passed: failures.is_empty(), failures, summary, runs: rows };
    print(out, format, &validation.to_table(), &validation)?;
    Ok(if validation.passed { OK } else { GATE })
}

fn predict(run: &Run) -> Result<Row, Failure> {
    let model = match &run.model {
        serde_json::Value::String(name) => find_model(name)?,
        config => crate::models::Model::from_value(config.clone()).map_err(usage)?,
    };
    let hardware = find_hardware(&run.hardware, run.network.as_deref())?;
    let policy = match run.policy.as_str() {
        "tierwise" => None,
        name => Some(Policy::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
            let known = Policy::ALL.map(Policy::name).join(", ");
            usage(format!("unknown policy `{name}`; known are tierwise, {known}"))
        })?),
    };
    let parallel = Parallel { tensor: run.tensor_parallel, ..Parallel::data_parallel(run.gpus) };
    parallel.check(&model, &hardware, run.seq).map_err(usage)?;
    let share = hardware.per_gpu(parallel.gpus_on_node(&hardware));
    let request = Request {
        policy,
        parallel,
        seq: run.seq,
        micro_batch: run.micro_batch,
        tokens_per_step: run.tokens_per_step,
        device_budget: run.device_budget.unwrap_or(hardware.device_memory_bytes),
        host_budget: run.host_budget.unwrap_or(share.host_memory_bytes),
        nvme_budget: run.nvme_budget,
        reserve_bytes: run.reserve_bytes,
        recompute: match run.recompute {
            Recomputes::None => Recompute::None,
            Recomputes::Full => Recompute::Full,
            Recomputes::Auto => Recompute::Auto,
        },
        pageable: run.pageable,
        clip_mode: ClipMode::Defer,
        clips: run.clips,
        model,
        hardware,
    };
    let mut row = Row { name: run.name.clone(), fits: false, recorded_fits: run.recorded.fits, metrics: BTreeMap::new() };
    if let Ok((report, _)) = simulate(&request)? {
        row.fits = true;
        let step = &report.step;
        for (name, recorded, predicted) in [
            ("step_s", run.recorded.step_s, step.step_ns as f64 / 1e9),
            ("tokens_per_s", run.recorded.tokens_per_s, report.tokens_per_s),
            ("device_peak_bytes", run.recorded.device_peak_bytes, step.device_peak_bytes as f64),
            ("host_peak_bytes", run.recorded.host_peak_bytes, step.host_peak_bytes as f64),
        ] {
            if let Some(recorded) = recorded {
                row.metrics.insert(name, Metric { recorded, predicted, error_percent: 100.0 * (predicted / recorded - 1.0) });
            }
        }
    }
    Ok(row)
}

fn summarise(rows: &[Row]) -> BTreeMap<&'static str, Summary> {
    let mut errors: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for row in rows {
        for (name, metric) in &row.metrics {
            errors.entry(name).or_default().push(metric.error_percent.abs());
        }
    }
    let summarised = errors.into_iter().map(|(name, mut errors)| {
        errors.sort_by(f64::total_cmp);
        // The nearest rank: no smaller value has so large a share at or below it.
        let rank = |share: f64| errors[((share * errors.len() as f64).ceil() as usize).clamp(1, errors.len()) - 1];
        (name, Summary { runs: errors.len(), median_percent: rank(0.5), p95_percent: rank(0.95), max_percent: rank(1.0) })
    });
    summarised.collect()
}

impl Validation {
    fn to_table(&self) -> String {
        let wide = self.runs.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(3) + 2;
        let mut table = format!("{:<wide$}{:<20}{:>12}{:>12}{:>10}\n", "run", "metric", "recorded", "predicted", "error %");
        for row in &self.runs {
            if !row.fits || !row.recorded_fits {
                let fit = |fits: bool| if fits { "fits" } else { "does not fit" };
                let _ = writeln!(table, "{:<wide$}{:<20}{:>12}  {}", row.name, "fits", fit(row.recorded_fits), fit(row.fits));
            }
            for (name, m) in &row.metrics {
                let scale = if name.ends_with("bytes") { 1e9 } else { 1.0 };
                let (recorded, predicted) = (m.recorded / scale, m.predicted / scale);
                let _ = writeln!(table, "{:<wide$}{name:<20}{recorded:>12.3}{predicted:>12.3}{:>+10.1}", row.name, m.error_percent);
            }
        }
        for (name, s) in &self.summary {
            let errors = format!("median {:.1} %, 95th percentile {:.1} %, most {:.1} %", s.median_percent, s.p95_percent, s.max_percent);
            let _ = writeln!(table, "{name}: {} runs, {errors}", s.runs);
        }
        for failure in &self.failures {
            let _ = writeln!(table, "failed: {failure}");
        }
        table
    }
}
