//! The commands that simulate steps.

use super::args::PolicyArg;
use super::output::{Failure, print, usage, write_file};
use super::{CompareArgs, DOES_NOT_FIT, OK, RunArgs, SCHEMA_VERSION, SearchArgs};
use crate::html;
use crate::report::{Answer, answer};
use crate::request::Request;
use crate::search::{Found, search as find};
use crate::units::{gigabytes, seconds};
use clap::ValueEnum;
use std::fmt::Write as _;
use std::io::Write;

/// Simulates one step.
pub fn run(args: &RunArgs, out: &mut dyn Write) -> Result<u8, Failure> {
    match answer(&args.step.request()?)? {
        Answer::Fits(report, timeline) => {
            if let Some(path) = &args.trace {
                write_file(path, &timeline.to_perfetto())?;
            }
            if let Some(path) = &args.html {
                write_file(path, &html::page(&report, &timeline))?;
            }
            print(out, args.format, &report.to_table(), &*report)?;
            Ok(OK)
        }
        Answer::DoesNotFit(shortage) => {
            print(out, args.format, &shortage.to_table(), &*shortage)?;
            Ok(DOES_NOT_FIT)
        }
    }
}

/// Finds the fastest settings.
pub fn search(args: &SearchArgs, out: &mut dyn Write) -> Result<u8, Failure> {
    let request = args.step.request()?;
    match find(&request)? {
        Some(found) => {
            let Found { flags, tried, fitting, report } = &found;
            let table = format!("{:<24}{flags}\n{:<24}{tried} settings, {fitting} fit\n{}", "settings", "searched", report.to_table());
            print(out, args.format, &table, &found.to_json())?;
            Ok(OK)
        }
        None => match answer(&request)? {
            // The request as it is says best what is missing.
            Answer::DoesNotFit(shortage) => {
                print(out, args.format, &shortage.to_table(), &*shortage)?;
                Ok(DOES_NOT_FIT)
            }
            Answer::Fits(..) => Err(usage("the search has no settings to try; give tokens-per-step as a multiple of seq * GPUs")),
        },
    }
}

/// Simulates the same step with several systems.
pub fn compare(args: &CompareArgs, out: &mut dyn Write) -> Result<u8, Failure> {
    let base = args.step.request()?;
    let policies = if args.policies.is_empty() { PolicyArg::value_variants() } else { &args.policies };
    let mut table = format!(
        "{:<16}{:>10}{:>12}{:>8}{:>8}{:>12}{:>12}{:>14}\n",
        "policy", "step", "tokens/s", "MFU %", "HFU %", "device", "host", "recomputes"
    );
    let mut rows = Vec::new();
    let mut any = false;
    for policy in policies {
        let request = Request { policy: policy.0, ..base.clone() };
        match answer(&request)? {
            Answer::Fits(report, _) => {
                any = true;
                let (step, mfu, hfu) = (&report.step, 100.0 * report.mfu, 100.0 * report.hfu);
                let _ = writeln!(
                    table,
                    "{:<16}{:>10}{:>12.0}{mfu:>8.1}{hfu:>8.1}{:>12}{:>12}{:>14}",
                    report.asked.policy,
                    seconds(step.step_ns),
                    report.tokens_per_s,
                    gigabytes(step.device_peak_bytes),
                    gigabytes(step.host_peak_bytes),
                    if hfu > mfu { "yes" } else { "no" },
                );
                rows.push(serde_json::to_value(&report)?);
            }
            Answer::DoesNotFit(short) => {
                let missing = format!("does not fit: {} of {} memory missing", gigabytes(short.shortfall_bytes), short.tier);
                let _ = writeln!(table, "{:<16}{missing}", short.asked.policy);
                rows.push(serde_json::to_value(&short)?);
            }
        }
    }
    print(out, args.format, &table, &serde_json::json!({"schema_version": SCHEMA_VERSION, "rows": rows}))?;
    Ok(if any { OK } else { DOES_NOT_FIT })
}
