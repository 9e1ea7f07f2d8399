//! The choices of how every unit's activations are kept, and what each means for memory, links and time.

use super::memory::Memory;
use super::{Offload, PlanError, PlanRequest, Recompute, Speeds, placement};
use crate::plan::{ActivationPlan, host_region_bytes};
use crate::trace::{Phase, Trace};
use std::collections::VecDeque;

/// Shares of the layers that are offloaded, where recomputation is searched too, and where it is given.
const OFFLOADED_SHARES: [usize; 2] = [16, 32];
/// Shares of the other layers that are recomputed beside them.
const RECOMPUTED_SHARES: usize = 10;

/// How every unit's activations are kept, and what that means at every operation.
pub(super) struct Activations {
    pub units: Vec<ActivationPlan>,
    /// Number of units that recompute.
    pub recomputed: usize,
    /// Number of units that are offloaded.
    pub offloaded: usize,
    /// Saved bytes alive on the device at every operation.
    pub bytes: Vec<u64>,
    /// Device bytes of offloaded activations that may be alive at once.
    pub window_bytes: u64,
    /// Host bytes of offloaded activations, which is also what each direction of the link moves in a micro-batch.
    pub host_bytes: u64,
    pub forward_flops: f64,
    /// Forward, backward and recomputation of a micro-batch.
    pub total_flops: f64,
    /// What neither direction of the link can hide behind a micro-batch's compute.
    pub stall: Stall,
}

/// Seconds of a micro-batch in which compute waits for activations.
#[derive(Clone, Copy, Default)]
pub(super) struct Stall {
    /// Forward waits until what was saved before has left.
    pub leaving: f64,
    /// Backward waits until what it reads is back.
    pub returning: f64,
}

/// The choices that a request allows, from few recomputed units to many.
pub(super) fn levels(memory: &Memory, request: &PlanRequest) -> Result<Vec<Activations>, PlanError> {
    let units = &memory.trace.units;
    let given = match &request.recompute {
        Recompute::None => Some(vec![false; units.len()]),
        Recompute::Full => Some(units.iter().map(|u| u.recomputable).collect()),
        Recompute::Units(chosen) => {
            if chosen.len() != units.len() {
                return Err(PlanError::Invalid(format!("recompute names {} units, the trace has {}", chosen.len(), units.len())));
            }
            if let Some((unit, _)) = units.iter().zip(chosen).find(|(unit, chosen)| **chosen && !unit.recomputable) {
                return Err(PlanError::Invalid(format!("unit `{}` cannot be recomputed; leave it out of recompute", unit.name)));
            }
            Some(chosen.clone())
        }
        Recompute::Auto => None,
    };
    let candidates: Vec<usize> =
        offloadable(memory.trace).into_iter().filter(|&u| given.as_ref().is_none_or(|recomputed| !recomputed[u])).collect();
    let shares = OFFLOADED_SHARES[usize::from(given.is_some())];
    let counts: Vec<usize> = match request.offload {
        Offload::None => vec![0],
        // With a disk in the plan host memory is short: what offloading took of it would have to be spilled.
        Offload::Auto if request.nvme.is_some() => vec![0],
        Offload::Full => vec![candidates.len()],
        Offload::Auto => thinned(candidates.len(), shares),
    };
    let mut choices = Vec::new();
    for count in counts {
        let mut base = vec![ActivationPlan::Keep; units.len()];
        for at in 0..count {
            // Spread over the step, so that the link works all the time; the last layers are needed again at once.
            base[candidates[at * candidates.len() / count]] = ActivationPlan::Offload;
        }
        if let Some(recomputed) = &given {
            for (unit, _) in recomputed.iter().enumerate().filter(|(_, recomputed)| **recomputed) {
                base[unit] = ActivationPlan::Recompute;
            }
            choices.push(base);
            continue;
        }
        let order = recompute_order(memory.trace, &base);
        let counts =
            if count == 0 { placement::levels(order.len(), request.accumulation) } else { thinned(order.len(), RECOMPUTED_SHARES) };
        for recomputed in counts {
            let mut choice = base.clone();
            for &unit in &order[..recomputed] {
                choice[unit] = ActivationPlan::Recompute;
            }
            choices.push(choice);
        }
    }
    Ok(choices.into_iter().map(|units| activations(memory.trace, units, &request.speeds)).collect())
}

/// `0..=count` in at most `parts` equal steps.
fn thinned(count: usize, parts: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..=parts).map(|part| part * count / parts).collect();
    counts.dedup();
    counts
}

/// Layers with something to offload, in order of their first forward.
fn offloadable(trace: &Trace) -> Vec<usize> {
    let mut order = Vec::new();
    for op in trace.ops.iter().filter(|op| op.phase == Phase::Forward) {
        let (unit, traced) = (op.unit as usize, &trace.units[op.unit as usize]);
        let returns = || trace.ops.iter().any(|other| other.phase == Phase::Backward && other.unit == op.unit);
        if traced.recomputable && traced.offload_bytes > 0 && !order.contains(&unit) && returns() {
            order.push(unit);
        }
    }
    order
}

/// Units in the order in which they become recomputed: most bytes saved per FLOP first. Among equals the earliest: at the turn from forward to
/// backward, where activations peak, a recomputed late unit is materialised again at once and frees nothing.
fn recompute_order(trace: &Trace, taken: &[ActivationPlan]) -> Vec<usize> {
    let units = &trace.units;
    let mut order: Vec<usize> = (0..units.len())
        .filter(|&u| taken[u] == ActivationPlan::Keep && units[u].recomputable && units[u].saved_bytes > units[u].input_bytes)
        .collect();
    let gain = |u: usize| (units[u].saved_bytes - units[u].input_bytes) as f64 / units[u].recompute_flops().max(1.0);
    order.sort_by(|&a, &b| gain(b).total_cmp(&gain(a)).then(a.cmp(&b)));
    order
}

/// What a choice means.
fn activations(trace: &Trace, units: Vec<ActivationPlan>, speeds: &Speeds) -> Activations {
    let ops = &trace.ops;
    let end_of_forward = ops.iter().rposition(|op| op.phase == Phase::Forward).unwrap_or(0);
    let offloaded = |unit: usize| units[unit] == ActivationPlan::Offload;
    // One unit is in use while the next comes back, or while the one before leaves.
    let window_bytes =
        2 * trace.units.iter().enumerate().filter(|(unit, _)| offloaded(*unit)).map(|(_, u)| u.offload_host_bytes).max().unwrap_or(0);
    let mut open = vec![0_u32; trace.units.len()];
    let (mut alive, mut away, mut host_bytes) = (0, 0, 0);
    let mut bytes = Vec::with_capacity(ops.len());
    let (mut forward_flops, mut total_flops) = (0.0, 0.0);
    for (at, op) in ops.iter().enumerate() {
        let index = op.unit as usize;
        let unit = &trace.units[index];
        let (kept, moved) = match units[index] {
            ActivationPlan::Keep => (unit.saved_bytes, 0),
            ActivationPlan::Recompute => (unit.input_bytes, 0),
            ActivationPlan::Offload => (unit.saved_bytes - unit.offload_bytes, unit.offload_bytes),
        };
        let recomputed = units[index] == ActivationPlan::Recompute;
        let outer = if at >= end_of_forward { trace.outer_saved_bytes } else { 0 };
        match op.phase {
            Phase::Forward => {
                open[index] += 1;
                alive += kept;
                away += moved;
                host_bytes += if offloaded(index) { unit.offload_host_bytes } else { 0 };
                bytes.push(alive + outer + away.min(window_bytes));
                forward_flops += unit.flops;
                total_flops += unit.flops;
            }
            Phase::Backward => {
                bytes.push(alive + outer + away.min(window_bytes) + if recomputed { unit.saved_bytes } else { 0 });
                // A backward without a traced forward frees nothing.
                if open[index] > 0 {
                    open[index] -= 1;
                    alive -= kept;
                    away -= moved;
                }
                total_flops += 2.0 * unit.flops + if recomputed { unit.recompute_flops() } else { 0.0 };
            }
        }
    }
    let count = |kind: ActivationPlan| units.iter().filter(|u| **u == kind).count();
    Activations {
        recomputed: count(ActivationPlan::Recompute),
        offloaded: count(ActivationPlan::Offload),
        stall: if window_bytes == 0 { Stall::default() } else { stall(trace, &units, window_bytes, speeds) },
        units,
        bytes,
        window_bytes,
        host_bytes: host_region_bytes(host_bytes),
        forward_flops,
        total_flops,
    }
}

/// Runs a micro-batch against the two directions of the link, which have nothing else to do: forward lets no more than the window be on its
/// way, backward asks for what comes next as far ahead as the window allows.
fn stall(trace: &Trace, units: &[ActivationPlan], window_bytes: u64, speeds: &Speeds) -> Stall {
    let moved = |unit: u32| match units[unit as usize] {
        ActivationPlan::Offload => trace.units[unit as usize].offload_host_bytes,
        ActivationPlan::Keep | ActivationPlan::Recompute => 0,
    };
    let mut stall = Stall::default();
    let (mut now, mut link) = (0.0_f64, 0.0_f64);
    let mut leaving: VecDeque<(u64, f64)> = VecDeque::new();
    let mut alive = 0;
    for op in trace.ops.iter().filter(|op| op.phase == Phase::Forward) {
        let bytes = moved(op.unit);
        while bytes > 0 && alive + bytes > window_bytes {
            let Some((left, at)) = leaving.pop_front() else { break };
            alive -= left;
            stall.leaving += (at - now).max(0.0);
            now = now.max(at);
        }
        now += trace.units[op.unit as usize].flops / speeds.flops;
        if bytes > 0 {
            link = link.max(now) + bytes as f64 / speeds.d2h_bytes;
            alive += bytes;
            leaving.push_back((bytes, link));
        }
    }
    let backward: Vec<u32> = trace.ops.iter().filter(|op| op.phase == Phase::Backward).map(|op| op.unit).collect();
    let mut coming: VecDeque<f64> = VecDeque::new();
    let (mut asked, mut held) = (0, 0);
    link = now;
    for (at, &unit) in backward.iter().enumerate() {
        let bytes = moved(unit);
        while asked < backward.len() {
            let next = moved(backward[asked]);
            if asked > at && held + next > window_bytes {
                break;
            }
            if next > 0 {
                link = link.max(now) + next as f64 / speeds.h2d_bytes;
                held += next;
                coming.push_back(link);
            }
            asked += 1;
        }
        if bytes > 0
            && let Some(back) = coming.pop_front()
        {
            stall.returning += (back - now).max(0.0);
            now = now.max(back);
        }
        let traced = &trace.units[unit as usize];
        let again = if units[unit as usize] == ActivationPlan::Recompute { traced.recompute_flops() } else { 0.0 };
        now += (2.0 * traced.flops + again) / speeds.flops;
        held -= bytes;
    }
    stall
}
