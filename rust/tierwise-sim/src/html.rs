//! A report as one HTML file without scripts, fonts or links: memory over time, stalls by cause, what holds the peak.

use crate::report::Report;
use crate::units::{gigabytes, seconds};
use std::fmt::Write;
use tierwise_core::timeline::Timeline;

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 200.0;
const STYLE: &str = "body{font:14px sans-serif;max-width:1000px;margin:2em auto;color:#222}table{border-collapse:collapse}\
td,th{padding:2px 12px 2px 0;text-align:left;vertical-align:top}svg{background:#f6f6f6;display:block}\
pre{background:#f6f6f6;padding:1em;overflow:auto}";

/// The page.
pub fn page(report: &Report, timeline: &Timeline) -> String {
    let asked = &report.asked;
    let title = format!("{} on {} x {}, {}", asked.model, asked.parallel.gpus, asked.hardware, asked.policy);
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{0}</title><style>{STYLE}</style></head><body>\n<h1>{0}</h1>\n",
        escape(&title)
    );
    let _ = writeln!(
        html,
        "<p>{} per step, {:.0} tokens/s, MFU {:.1} %, HFU {:.1} %</p>",
        seconds(report.step.step_ns),
        report.tokens_per_s,
        100.0 * report.mfu,
        100.0 * report.hfu
    );
    html.push_str("<h2>Device memory over the step</h2>\n");
    memory(&mut html, report, timeline);
    html.push_str("<h2>Host memory</h2>\n");
    let _ = writeln!(
        html,
        "<p>{} of {} for the whole step: the host's buffers are allocated once.</p>",
        gigabytes(report.step.host_peak_bytes),
        gigabytes(asked.host_budget_bytes)
    );
    html.push_str("<h2>What holds the device's peak</h2>\n");
    peak(&mut html, report);
    html.push_str("<h2>Where the step's time goes</h2>\n");
    time(&mut html, report);
    let _ = writeln!(html, "<h2>All figures</h2>\n<pre>{}</pre>\n</body></html>", escape(&report.to_table()));
    html
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A step line of the device's bytes, with the budget above it.
fn memory(html: &mut String, report: &Report, timeline: &Timeline) {
    let budget = report.asked.device_budget_bytes;
    let (end, top) = (report.step.step_ns.max(1) as f64, budget.max(report.step.device_peak_bytes).max(1) as f64);
    let x = |ns: u64| (ns as f64 / end * WIDTH).min(WIDTH);
    let y = |bytes: u64| HEIGHT - bytes as f64 / top * (HEIGHT - 20.0);
    let mut path = String::new();
    let mut last = None;
    for sample in timeline.samples.iter().filter(|s| s.counter == "device bytes") {
        let (at, level) = (x(sample.at_ns), y(sample.value));
        match last {
            None => {
                let _ = write!(path, "M0 {level:.1}");
            }
            Some(_) => {
                let _ = write!(path, "H{at:.1}V{level:.1}");
            }
        }
        last = Some(level);
    }
    let _ = writeln!(
        html,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" role=\"img\" aria-label=\"device bytes over time\">\
         <path d=\"M0 {0:.1}H{WIDTH}\" stroke=\"#c33\" stroke-dasharray=\"6 4\"/><text x=\"4\" y=\"{1:.1}\" font-size=\"12\">budget {2}</text>\
         <path id=\"device-bytes\" d=\"{path}H{WIDTH}\" fill=\"none\" stroke=\"#257\"/></svg>",
        y(budget),
        y(budget) - 5.0,
        gigabytes(budget)
    );
    let _ = writeln!(html, "<p>Peak {} at {}.</p>", gigabytes(report.step.device_peak_bytes), escape(&report.step.device_peak_op));
}

fn peak(html: &mut String, report: &Report) {
    let step = &report.step;
    let mut rows = Vec::new();
    if let Some(plan) = &report.plan {
        let device = &plan.device;
        rows.extend([
            ("resident parameters", device.resident_params),
            ("optimizer states", device.states),
            ("streaming slab", device.stream_slab),
            ("gradient accumulators", device.accumulators),
            ("gradients", step.device_peak_gradient_bytes),
            ("saved activations", step.device_peak_activation_bytes),
            ("reserve and gather buffers", device.reserve),
        ]);
    } else {
        rows.push(("in all", step.device_peak_bytes));
    }
    bars(html, &rows.iter().map(|&(name, bytes)| (name, bytes, gigabytes(bytes))).collect::<Vec<_>>());
}

fn time(html: &mut String, report: &Report) {
    let step = &report.step;
    let mut rows = vec![("compute", step.compute_ns), ("slowed by sharing", step.slowdown_ns)];
    rows.extend(step.stalls.by_cause());
    bars(html, &rows.into_iter().map(|(name, ns)| (name, ns, seconds(ns))).collect::<Vec<_>>());
}

fn bars(html: &mut String, rows: &[(&str, u64, String)]) {
    let most = rows.iter().map(|(_, value, _)| *value).max().unwrap_or(1).max(1);
    html.push_str("<table>\n");
    for (name, value, text) in rows {
        let width = *value as f64 / most as f64 * 500.0;
        let _ = writeln!(
            html,
            "<tr><td>{name}</td><td>{text}</td><td><svg width=\"500\" height=\"12\"><rect width=\"{width:.1}\" height=\"12\" fill=\"#257\"/></svg></td></tr>"
        );
    }
    html.push_str("</table>\n");
}
