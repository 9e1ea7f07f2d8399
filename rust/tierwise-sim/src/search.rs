//! The fastest settings: every combination that the request leaves open is simulated, fastest bound first.
//!
//! What is tried does not depend on the budgets, except that each setting is planned within every multiple of an eighth of the machine's
//! device memory below the budget too. So on those multiples a larger budget never gives a slower answer, whatever the planner's formula
//! thinks of a plan.
//!
//! Of every setting only the planner's first plan is executed: that is what makes a search of hundreds of settings quick. The best setting
//! for each of those multiples is then simulated as `run` does it, which compares several plans, and the fastest of these is the answer. A
//! larger budget has the candidates of the smaller ones too, so the promise holds for them as well.

use crate::parallel::Parallel;
use crate::report::{Report, SCHEMA_VERSION, simulate};
use crate::request::{Error, Plans, Rank, Request};
use serde::Serialize;
use std::collections::BTreeMap;

/// What a search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The options that give it.
    pub flags: String,
    /// Settings that were looked at.
    pub tried: usize,
    /// Settings that fit.
    pub fitting: usize,
    /// Its simulated step.
    pub report: Box<Report>,
}

#[derive(Serialize)]
struct Json<'a> {
    schema_version: u32,
    flags: &'a str,
    tried: usize,
    fitting: usize,
    best: &'a Report,
}

impl Found {
    /// With the version of the schema.
    pub fn to_json(&self) -> impl Serialize + '_ {
        Json { schema_version: SCHEMA_VERSION, flags: &self.flags, tried: self.tried, fitting: self.fitting, best: &self.report }
    }
}

/// Tries micro-batches, parallel sizes, sharding and budgets; none if nothing fits.
pub fn search(request: &Request) -> Result<Option<Found>, Error> {
    let mut settings = Vec::new();
    for parallel in parallels(request) {
        let per_rank = request.tokens_per_step / request.seq / parallel.data();
        let mut micro_batch = 1;
        while micro_batch <= per_rank {
            let setting = Request { parallel, micro_batch, plans: Plans::First, ..request.clone() };
            if setting.accumulation().is_ok()
                && let Some(bound) = least_ns(&setting)?
            {
                settings.push((bound, setting));
            }
            micro_batch *= 2;
        }
    }
    settings.sort_by(|(a, x), (b, y)| a.cmp(b).then_with(|| flags(x).cmp(&flags(y))));
    let tried = settings.len();
    let mut fitting = 0;
    // The fastest within each budget, by its first plan.
    let mut fastest: BTreeMap<u64, (u64, Request)> = BTreeMap::new();
    let mut least = u64::MAX;
    for (bound, setting) in settings {
        // No plan is faster than its compute.
        if bound >= least {
            continue;
        }
        let mut fits = false;
        for device_budget in budgets(&setting) {
            let within = Request { device_budget, ..setting.clone() };
            let Ok((report, _)) = simulate(&within)? else { break };
            fits = true;
            let step = report.step.step_ns;
            least = least.min(step);
            if fastest.get(&device_budget).is_none_or(|(other, _)| step < *other) {
                fastest.insert(device_budget, (step, within));
            }
        }
        fitting += usize::from(fits);
    }
    let mut best: Option<(String, Box<Report>)> = None;
    let mut least = u64::MAX;
    for (device_budget, (step, setting)) in fastest {
        // More memory in which nothing is faster has the candidates of less.
        if step >= least {
            continue;
        }
        least = step;
        let Ok((report, _)) = simulate(&Request { plans: Plans::Compared, ..setting.clone() })? else { continue };
        if best.as_ref().is_none_or(|(_, other)| report.step.step_ns < other.step.step_ns) {
            let budget = if device_budget == request.device_budget { String::new() } else { format!(" --device-budget {device_budget}") };
            best = Some((flags(&setting) + &budget, report));
        }
    }
    Ok(best.map(|(flags, report)| Found { flags, tried, fitting, report }))
}

/// The budget, and multiples of an eighth of the machine's memory below it, from the largest; other systems have no planner to mislead.
fn budgets(request: &Request) -> Vec<u64> {
    let eighth = request.hardware.device_memory_bytes / 8;
    let below = (1..=request.device_budget / eighth.max(1)).rev().map(|n| n * eighth).filter(|b| *b < request.device_budget);
    let steps = if request.policy.is_none() { usize::MAX } else { 0 };
    std::iter::once(request.device_budget).chain(below.take(steps)).collect()
}

/// Sizes that are open: with one GPU none, else tensor parallelism inside a node, pipelines, and sharding.
fn parallels(request: &Request) -> Vec<Parallel> {
    let base = request.parallel;
    if base.gpus == 1 {
        return vec![base];
    }
    let powers = |most: u64| (0..).map(|n| 1_u64 << n).take_while(move |size| *size <= most);
    let mut all = Vec::new();
    for tensor in powers(u64::from(request.hardware.gpus_per_node).min(8)) {
        for pipeline in powers(if request.policy.is_none() { 16 } else { 1 }) {
            for zero in if request.policy.is_none() { vec![1, 2, 3] } else { vec![base.zero] } {
                let parallel = Parallel { tensor, pipeline, zero, ..base };
                // A pipeline that gathers parameters or reduces gradients for every micro-batch would do so once per micro-batch.
                if (pipeline == 1 || zero == 1) && parallel.check(&request.model, &request.hardware, request.seq).is_ok() {
                    all.push(parallel);
                }
            }
        }
    }
    all
}

/// Compute of a step without recomputation, copies and waits.
fn least_ns(request: &Request) -> Result<Option<u64>, Error> {
    let accumulation = u64::from(request.accumulation()?);
    let mut slowest = 0;
    for stage in [0, request.parallel.pipeline - 1] {
        let Ok(rank) = Rank::new(request, stage) else { return Ok(None) };
        let ns: u64 = rank.costs.forward_ns.iter().chain(&rank.costs.backward_ns).sum();
        slowest = slowest.max(ns * accumulation);
    }
    Ok(Some(slowest))
}

fn flags(request: &Request) -> String {
    let parallel = &request.parallel;
    let micro_batch = format!("--micro-batch {}", request.micro_batch);
    if parallel.gpus == 1 {
        return micro_batch;
    }
    format!("{micro_batch} --tensor-parallel {} --pipeline {} --zero {}", parallel.tensor, parallel.pipeline, parallel.zero)
}
