//! A step of any policy, task by task.

use super::policy::{Policy, Traits};
use super::program::{Program, Record};
use crate::executor::Outcome;
use crate::executor::machine::{Lane, Token};
use crate::executor::stalls::Cause;
use crate::ours::Simulated;
use crate::request::{Error, Rank, Request};
use crate::units::Shortfall;
use tierwise_core::ChunkId;
use tierwise_core::planner::Recompute;
use tierwise_core::scheduler::Counters;
use tierwise_core::trace::Phase;

/// Share of what all threads move when they add that peers' optimizer passes reach. Fitted once, on DeepSpeed ZeRO 2 with the optimizer on
/// the CPU and LLaMA 1.35B on an H100 (1.070 s); nothing else is fitted.
const HOST_PASS_SHARE: f64 = 0.697;

/// What one thread of torch reads for a norm, of what it moves when it adds (measured per second of one CPU).
const NORM_OF_ADDITION: f64 = 0.53;

/// Bytes per second of host memory that is taken from the system: touching 21 GB with 16 threads took 0.6 to 3.0 s on the host of the `h100`
/// preset; the middle of that.
const FRESH_BYTES_PER_S: f64 = 21e9 / 1.8;

/// Bytes per second at which one thread gives memory back to the system: 0.8 GB in 0.03 to 0.10 s, median 0.052 (benchmarks/peer_times.py).
const UNMAP_BYTES_PER_S: f64 = 15.5e9;

/// Simulates a policy; recomputation that is left to it is none, or all if only that fits.
pub fn step(policy: Policy, request: &Request) -> Result<Result<Simulated, Shortfall>, Error> {
    if request.parallel.pipeline > 1 {
        return Err(Error::Usage(format!(
            "pipeline is {} with policy {}; other systems are modelled with data, tensor and sequence parallelism",
            request.parallel.pipeline,
            policy.name()
        )));
    }
    let rank = Rank::new(request, 0)?;
    let units = &rank.built.trace.units;
    let all: Vec<bool> = units.iter().map(|u| u.recomputable).collect();
    let levels = match &request.recompute {
        Recompute::None => vec![vec![false; units.len()]],
        Recompute::Full => vec![all],
        Recompute::Auto => vec![vec![false; units.len()], all],
        Recompute::Units(units) => vec![units.clone()],
    };
    let mut result = Err(Shortfall::host(0, 0));
    for recompute in levels {
        result = Step { traits: policy.traits(), request, rank: &rank, accumulation: request.accumulation()?, recompute: &recompute }.run();
        if result.is_ok() {
            break;
        }
    }
    Ok(result)
}

pub(super) struct Step<'a> {
    pub(super) traits: Traits,
    pub(super) request: &'a Request,
    pub(super) rank: &'a Rank,
    pub(super) accumulation: u32,
    recompute: &'a [bool],
}

/// What the next step waits for.
#[derive(Default)]
pub(super) struct Carried {
    updated: Vec<Token>,
    /// Compute tasks, the latest last: gathered parameters take the place of those of the last but one.
    latest: [Option<Token>; 2],
    /// The latest gradient that was reduced.
    pub(super) reduced: Option<Token>,
    /// The latest task of the training thread.
    thread: Option<Token>,
    /// Gradients that wait in a bucket: chunks, and the backward that made the last.
    pub(super) bucket: Vec<ChunkId>,
    pub(super) made: Option<Token>,
    /// The latest task of a stream that has all of the gradients' way.
    pub(super) grads: Option<Token>,
}

impl Step<'_> {
    fn run(&self) -> Result<Simulated, Shortfall> {
        let host = self.host_bytes();
        if host > self.request.host_budget {
            return Err(Shortfall::host(host, host - self.request.host_budget));
        }
        let base = self.base_bytes();
        let mut program = Program::new(&self.rank.hardware, self.rank.costs.sustained);
        let mut carried = Carried::default();
        let first = self.step(&mut program, &mut carried);
        let _ = self.step(&mut program, &mut carried);
        let record = program.run(first, base);
        if record.device_peak_bytes > self.request.device_budget {
            let missing = record.device_peak_bytes - self.request.device_budget;
            return Err(Shortfall::device(record.device_peak_at, record.device_peak_bytes, missing));
        }
        Ok(self.simulated(record, host))
    }

    /// One optimizer step; gives its last task.
    fn step(&self, program: &mut Program, carried: &mut Carried) -> Token {
        let trace = &self.rank.built.trace;
        let (mut arrived, mut blocked) = (Vec::new(), Vec::new());
        for micro_batch in 0..self.accumulation {
            for (at, op) in trace.ops.iter().enumerate() {
                let unit = op.unit as usize;
                let finished = self.finished(at);
                if self.overflows(carried, &finished) {
                    self.send(program, carried, micro_batch, &mut blocked, &mut arrived);
                }
                // What the training thread waited for, nothing was enqueued before.
                let called = self.call(program, carried, unit, op.phase, std::mem::take(&mut blocked));
                let mut waits = vec![called];
                waits.extend(self.gather(program, carried, unit, op.phase));
                waits.extend(carried.updated.iter().copied());
                let compute = self.compute(program, unit, op.phase, waits);
                carried.latest = [carried.latest[1], Some(compute)];
                if !finished.is_empty() {
                    carried.bucket.extend(finished);
                    carried.made = Some(compute);
                    if self.traits.bucket_elements == 0 {
                        self.send(program, carried, micro_batch, &mut blocked, &mut arrived);
                    }
                }
            }
            self.send(program, carried, micro_batch, &mut blocked, &mut arrived);
        }
        arrived.extend(carried.latest[1]);
        let stepped = self.optimizer(program, arrived);
        carried.updated = vec![stepped];
        stepped
    }

    /// What the training thread takes to enqueue an operation; gives when it begins to.
    fn call(&self, program: &mut Program, carried: &mut Carried, unit: usize, phase: Phase, mut waits: Vec<Token>) -> Token {
        let of = &self.rank.built.trace.units[unit];
        waits.extend(carried.thread);
        if self.traits.host_traffic_bytes > 0 {
            // The host's step is the training thread's own.
            waits.extend(carried.updated.iter().copied());
        }
        let name = |what: &str| format!("{what} {}", of.name);
        let called = program.push(Lane::Thread, name("call"), 0, 0.0, waits, Cause::Launch);
        let hooks = match phase {
            _ if !of.recomputable => 0,
            Phase::Forward => self.traits.hook_ns[0],
            // Measured with the recomputation, whose hooks are those of a forward.
            Phase::Backward if self.recompute[unit] => self.traits.hook_ns[1],
            Phase::Backward => self.traits.hook_ns[1].saturating_sub(self.traits.hook_ns[0]),
        };
        let ns = self.rank.costs.launch[unit].ns(phase, self.recompute[unit]) + hooks;
        carried.thread = Some(program.push(Lane::Thread, name("enqueue"), 0, ns as f64, Vec::new(), Cause::Launch));
        called
    }

    pub(super) fn ways(&self) -> u64 {
        self.request.parallel.shards()
    }

    /// Share of the parameters that the CPU steps, where the optimizer is offloaded.
    pub(super) fn cpu_share(&self) -> f64 {
        if self.traits.kept_state_bytes > 0 { self.request.cpu_share } else { 1.0 }
    }

    pub(super) fn part(&self, numel: u64, split: bool) -> u64 {
        if split { numel.div_ceil(self.ways()) } else { numel }
    }

    pub(super) fn numel(&self, chunk: ChunkId) -> u64 {
        self.rank.built.layout.chunks[chunk.index()].numel
    }

    pub(super) fn name(&self, what: &str, chunk: ChunkId) -> String {
        format!("{what} {}", self.rank.built.layout.chunks[chunk.index()].name)
    }

    /// Work of a copy: bytes of the pinned link, or as many as take as long from pageable memory.
    pub(super) fn copy_work(&self, bytes: u64, to_device: bool, pageable: bool) -> f64 {
        let hardware = &self.rank.hardware;
        let pinned = if to_device { hardware.h2d_bytes_per_s } else { hardware.d2h_bytes_per_s };
        let slower = if pageable { (pinned / hardware.pageable_bytes_per_s).max(1.0) } else { 1.0 };
        bytes as f64 * slower
    }

    /// Copies and gathers the parameters of a unit.
    fn gather(&self, program: &mut Program, carried: &Carried, unit: usize, phase: Phase) -> Vec<Token> {
        if !self.traits.gathers {
            return Vec::new();
        }
        let mut done = Vec::new();
        for &chunk in &self.rank.built.trace.units[unit].chunks {
            let mut waits: Vec<Token> = carried.latest[0].into_iter().chain(carried.updated.iter().copied()).collect();
            if self.traits.gathers_late && phase == Phase::Backward {
                waits.extend(carried.reduced);
            }
            if self.traits.fetch_bytes > 0 && self.ways() == 1 {
                // With nobody to gather from, FSDP2 copies and casts on the compute stream. What belongs to no layer stays after its first use.
                if phase == Phase::Backward && !self.rank.built.trace.units[unit].recomputable {
                    continue;
                }
                waits.extend(carried.latest[1]);
            }
            if self.traits.fetch_bytes > 0 {
                let bytes = self.traits.fetch_bytes * self.part(self.numel(chunk), true);
                let work = self.copy_work(bytes, true, false);
                waits = vec![program.push(Lane::HostToDevice, self.name("fetch", chunk), bytes, work, waits, Cause::Fetch)];
            }
            let ns = self.rank.data.all_gather_ns(2.0 * self.numel(chunk) as f64) as f64;
            let cause = if ns == 0.0 && self.traits.fetch_bytes > 0 { Cause::Fetch } else { Cause::Communication };
            done.push(program.push(Lane::Gather, self.name("gather", chunk), 0, ns, waits, cause));
        }
        done
    }

    fn compute(&self, program: &mut Program, unit: usize, phase: Phase, waits: Vec<Token>) -> Token {
        let (trace, costs) = (&self.rank.built.trace, &self.rank.costs);
        let of = &trace.units[unit];
        let recomputed = self.recompute[unit];
        let kept = if recomputed { of.input_bytes } else { of.saved_bytes } as i64;
        let direction = if phase == Phase::Forward { "forward" } else { "backward" };
        let (ns, taken, given) = match phase {
            Phase::Forward => (costs.forward_ns[unit], kept, 0),
            Phase::Backward if recomputed => {
                let again = of.saved_bytes as i64;
                (costs.backward_ns[unit] + costs.recompute_ns[unit], again, again + kept)
            }
            Phase::Backward => (costs.backward_ns[unit], 0, kept),
        };
        let name = format!("{} {direction}", of.name);
        program.push_with(Lane::Compute, name, 0, ns as f64, waits, Cause::Launch, taken, given)
    }

    /// The optimizer, after everything that came before; gives its last task.
    fn optimizer(&self, program: &mut Program, waits: Vec<Token>) -> Token {
        let traits = &self.traits;
        let whole: u64 = self.rank.built.layout.chunks.iter().map(|c| c.numel).sum();
        let part = self.part(whole, traits.splits_states);
        let on_cpu = (part as f64 * self.cpu_share()).round() as u64;
        // What the device steps of an offloaded optimizer is what Twin-Flow leaves there.
        let on_device = if traits.host_traffic_bytes > 0 { part - on_cpu } else { part };
        let mut at =
            program.push(Lane::Optimizer, "step".to_owned(), 0, (traits.device_traffic_bytes * on_device) as f64, waits, Cause::Optimizer);
        // Everything on the host is one pass after the other.
        let hardware = &self.rank.hardware;
        let [one_thread, all_threads] = hardware.added_bytes_per_s();
        for (what, bytes, s_per_byte) in [
            ("norm", traits.one_thread_bytes * on_cpu, 1.0 / (NORM_OF_ADDITION * one_thread)),
            ("clip and step", traits.host_traffic_bytes * on_cpu, 1.0 / (HOST_PASS_SHARE * all_threads)),
            ("fresh memory", traits.fresh_bytes * on_cpu, 1.0 / FRESH_BYTES_PER_S + 1.0 / UNMAP_BYTES_PER_S),
        ] {
            if bytes > 0 {
                // The lane's rate is that of our norms.
                let work = bytes as f64 * hardware.host_stream_bytes_per_s * s_per_byte;
                at = program.push(Lane::Landing, what.to_owned(), bytes, work, vec![at], Cause::Optimizer);
            }
        }
        if traits.refresh_bytes > 0 {
            let bytes = traits.refresh_bytes * on_cpu;
            let work = self.copy_work(bytes, true, traits.refresh_is_pageable || self.request.pageable);
            let whole = if traits.refresh_on_device { bytes as i64 } else { 0 };
            // By then the buckets of the backward are given back.
            let more = whole - if whole > 0 { traits.buffer_bytes as i64 } else { 0 };
            let (lane, cause) = (Lane::HostToDevice, Cause::Optimizer);
            at = program.push_with(lane, "parameters".to_owned(), bytes, work, vec![at], cause, more, more);
        }
        if traits.splits_states && !traits.gathers {
            let ns = self.rank.data.all_gather_ns(2.0 * whole as f64) as f64;
            at = program.push(Lane::Gather, "gather parameters".to_owned(), 0, ns, vec![at], Cause::Communication);
        }
        at
    }

    fn simulated(&self, record: Record, host: u64) -> Simulated {
        let units = self.rank.built.trace.units.iter();
        let again: f64 = units.zip(self.recompute).filter(|(_, r)| **r).map(|(unit, _)| unit.recompute_flops()).sum();
        // After the last compute the step goes on; no later compute shows what it waited for.
        let mut stalls = record.tally.stalls;
        let known = record.tally.busy_compute_ns + stalls.total_ns();
        stalls.optimizer_step_ns += record.end_ns - known;
        let ranks = self.request.parallel.gpus as f64;
        Simulated {
            placed: None,
            recomputed_flops: again * f64::from(self.accumulation) * ranks,
            outcome: Outcome {
                step_ns: record.end_ns,
                compute_ns: record.tally.compute_ns,
                slowdown_ns: record.tally.busy_compute_ns - record.tally.compute_ns.min(record.tally.busy_compute_ns),
                stalls,
                h2d_bytes: record.tally.h2d_bytes,
                d2h_bytes: record.tally.d2h_bytes,
                nvme_read_bytes: 0,
                nvme_written_bytes: 0,
                communicated_ns: record.tally.communicated_ns,
                busy_ns: record.tally.busy_ns,
                device_peak_bytes: record.device_peak_bytes,
                device_peak_op: record.device_peak_at,
                device_peak_activation_bytes: 0,
                device_peak_gradient_bytes: 0,
                host_peak_bytes: host,
                counters: Counters::default(),
                timeline: tierwise_core::timeline::Timeline::default(),
            },
            timeline: record.tally.timeline,
        }
    }
}
