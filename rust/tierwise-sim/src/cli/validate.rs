//! Predictions against recorded runs: percent error per metric, and a gate.

use super::output::{Failure, print, usage, write_file};
use super::{FAILED, Format, GATE, OK, SCHEMA_VERSION};
use crate::recorded::{File, Run};
use crate::report::Report;
use crate::units::Shortfall;
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    fits: bool,
    recorded_fits: bool,
    metrics: BTreeMap<&'static str, Metric>,
    /// Seconds of the predicted step by what they go to.
    parts_s: BTreeMap<&'static str, f64>,
    /// What is predicted not to fit.
    #[serde(skip_serializing_if = "Option::is_none")]
    shortfall: Option<Shortfall>,
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

/// Runs every record and applies the gate; writes predicted timelines into `traces`, by the names of runs with `_` for blanks.
pub fn validate(path: &Path, traces: Option<&Path>, format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
    let named = |error: &dyn std::fmt::Display| usage(format!("{}: {error}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| named(&error))?;
    let file = File::from_json(&text).map_err(|error| named(&error))?;
    let folder = path.parent().unwrap_or(Path::new("."));
    if let Some(folder) = traces {
        std::fs::create_dir_all(folder)
            .map_err(|error| Failure { code: FAILED, message: format!("cannot make {}: {error}", folder.display()) })?;
    }
    let mut rows = Vec::new();
    for run in &file.runs {
        let report = file.predict(run, folder).map_err(Failure::from);
        let report = report.map_err(|failure| Failure { message: format!("{}: {}", run.name, failure.message), ..failure })?;
        if let (Some(folder), Ok((_, timeline))) = (traces, &report) {
            write_file(&folder.join(format!("{}.json", run.name.replace([' ', '/'], "_"))), &timeline.to_perfetto())?;
        }
        rows.push(compare(run, report.as_ref().map(|(report, _)| &**report)));
    }
    let summary = summarise(&rows);
    let mut failures: Vec<String> =
        rows.iter().filter(|r| r.fits && !r.recorded_fits).map(|r| format!("{} is predicted to fit and did not", r.name)).collect();
    let wrongly = rows.iter().filter(|row| row.recorded_fits).filter_map(|row| Some((row, row.shortfall.as_ref()?)));
    failures.extend(wrongly.map(|(row, short)| {
        let at = short.op.as_ref().map_or(String::new(), |op| format!(" at {op}"));
        let (needed, missing) = (short.needed_bytes as f64 / 1e9, short.shortfall_bytes as f64 / 1e9);
        format!("{} is predicted not to fit and did: {needed:.3} GB are needed of the {}{at}, {missing:.3} too many", row.name, short.tier)
    }));
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

fn compare(run: &Run, predicted: Result<&Report, &Shortfall>) -> Row {
    let mut row = Row {
        name: run.name.clone(),
        fits: predicted.is_ok(),
        recorded_fits: run.recorded.fits,
        metrics: BTreeMap::new(),
        parts_s: BTreeMap::new(),
        shortfall: predicted.err().cloned(),
    };
    let Ok(report) = predicted else { return row };
    let step = &report.step;
    let parts = [("compute", step.compute_ns), ("slowed by sharing", step.slowdown_ns)].into_iter().chain(step.stalls.by_cause());
    row.parts_s = parts.filter(|(_, ns)| *ns > 0).map(|(name, ns)| (name, ns as f64 / 1e9)).collect();
    for (name, recorded, predicted) in [
        ("step_s", run.recorded.step_s, step.step_ns as f64 / 1e9),
        ("tokens_per_s", run.recorded.tokens_per_s, report.tokens_per_s),
        ("device_peak_bytes", run.recorded.device_peak_bytes, step.device_peak_bytes as f64),
        ("host_peak_bytes", run.recorded.host_peak_bytes, step.host_peak_bytes as f64),
    ] {
        if let Some(recorded) = recorded {
            let error_percent = if predicted.total_cmp(&recorded).is_eq() { 0.0 } else { 100.0 * (predicted / recorded - 1.0) };
            row.metrics.insert(name, Metric { recorded, predicted, error_percent });
        }
    }
    row
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
