//! The executor in virtual time: the runtime's engine with lanes instead of streams and threads.
//!
//! It drives the same scheduler with the same events in the same order as the runtime: a training thread that runs ahead of the compute
//! stream and blocks where `enter`, `grads` and `commit` block, and workers that post completions. Only durations are modelled.

mod actions;
mod machine;
mod stalls;

pub use stalls::Stalls;

use crate::costs::Costs;
use crate::hardware::Hardware;
use machine::{Began, Ended, Lane, Machine, Task, Token};
use serde::Serialize;
use stalls::{Blocks, Cause};
use std::collections::BTreeMap;
use tierwise_core::budget::{Budget, BudgetExceeded};
use tierwise_core::layout::Layout;
use tierwise_core::plan::{OptimizerClass, Plan};
use tierwise_core::scheduler::{Counters, Event, Progress, ScheduleError, Scheduler};
use tierwise_core::timeline::{Sample, Span, Timeline};
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, OpId, Tier};

/// Steps before the one that is measured: the first has no pending optimizer work, the second is the first of the cycle.
const WARM_UP_STEPS: u64 = 2;

/// What to execute.
#[derive(Debug, Clone, Copy)]
pub struct Setup<'a> {
    /// Chunks.
    pub layout: &'a Layout,
    /// Operations of a micro-batch.
    pub trace: &'a Trace,
    /// The plan.
    pub plan: &'a Plan,
    /// Durations of the units.
    pub costs: &'a Costs,
    /// The machine.
    pub hardware: &'a Hardware,
    /// Hard limit of device bytes.
    pub device_budget: u64,
    /// Hard limit of pinned host bytes.
    pub host_budget: u64,
    /// Whether the gradient norm is above its limit in every step.
    pub clips: bool,
}

/// What one steady-state step did, from the end of one backward pass to the end of the next.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Nanoseconds of the step.
    pub step_ns: u64,
    /// Nanoseconds of compute at full speed.
    pub compute_ns: u64,
    /// Nanoseconds that compute took longer because copies, the host or the device optimizer shared the machine.
    pub slowdown_ns: u64,
    /// Nanoseconds that compute stood still, by cause.
    pub stalls: Stalls,
    /// Bytes copied to the device.
    pub h2d_bytes: u64,
    /// Bytes copied from the device.
    pub d2h_bytes: u64,
    /// Nanoseconds that each lane was busy, by track.
    pub busy_ns: BTreeMap<String, u64>,
    /// Most device bytes in use, reserve included.
    pub device_peak_bytes: u64,
    /// Operation at which the device peak was.
    pub device_peak_op: String,
    /// Saved activations at the device peak.
    pub device_peak_activation_bytes: u64,
    /// Gradients at the device peak.
    pub device_peak_gradient_bytes: u64,
    /// Most pinned host bytes in use.
    pub host_peak_bytes: u64,
    /// What the scheduler did in the step.
    pub counters: Counters,
    /// Spans of the step and byte counters; its epoch is the start of the step.
    #[serde(skip)]
    pub timeline: Timeline,
}

/// Why a plan could not be executed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SimError {
    /// A tier would have held more than its budget.
    #[error(transparent)]
    Budget(#[from] BudgetExceeded),
    /// The scheduler refused an event.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// The plan, the trace and the costs do not belong together.
    #[error("{0}")]
    Mismatch(String),
    /// Everybody waits for somebody.
    #[error("the training thread waits at {at} for something that never happens ({cause})")]
    Deadlock {
        /// The call.
        at: String,
        /// What it waits for.
        cause: &'static str,
    },
}

/// One call of the training thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Enter(OpId),
    Leave(OpId),
    BackwardBegin,
    Hand(ChunkId),
    BackwardEnd,
    Commit,
}

/// What happens when a task begins or ends.
#[derive(Debug)]
enum Effect {
    Post(Event),
    FreeGradients(u64),
    /// The landing worker took the job: its bytes are no longer on their way.
    Landed {
        bytes: u64,
    },
    FreeStaging,
}

/// Where the training thread is.
struct Thread {
    step: u64,
    at: usize,
    ready_ns: u64,
    blocked: Option<(u64, Cause)>,
}

struct Run<'a> {
    setup: Setup<'a>,
    scheduler: Scheduler,
    machine: Machine<'a, Effect>,
    calls: Vec<Call>,
    thread: Thread,
    blocks: Blocks,
    device: Budget,
    host: Budget,
    activations: u64,
    gradients: u64,
    peak: (String, u64, u64),
    /// Latest task after which a chunk's device parameters are current, and what kind of work it is.
    written: Vec<Option<(Token, Cause)>>,
    /// Ranges of the slab whose last reader is this task.
    guards: Vec<(u64, u64, Token)>,
    release: Option<Token>,
    commit: Option<Token>,
    in_flight_bytes: u64,
    staging_free: u32,
    /// Gradient bytes of each device-class chunk that its step will read.
    held: Vec<u64>,
    /// Gradient bytes that an enqueued device task frees.
    leaving_bytes: u64,
    /// Per chunk: first and last backward operation.
    backward: Vec<Option<(OpId, OpId)>>,
    /// Kinds of the compute tasks' waits, in order of their enqueueing.
    wait_causes: BTreeMap<usize, Cause>,
    compute_ended: u64,
    window: Option<Window>,
}

/// What is measured.
#[derive(Default)]
struct Window {
    start_ns: u64,
    compute_ns: u64,
    busy_compute_ns: u64,
    stalls: Stalls,
    h2d_bytes: u64,
    d2h_bytes: u64,
    busy_ns: BTreeMap<String, u64>,
    before: Counters,
    timeline: Timeline,
}

/// Executes a plan until its steps repeat, and measures one.
pub fn simulate(setup: &Setup) -> Result<Outcome, SimError> {
    let mut run = Run::new(*setup)?;
    run.drive()
}

impl<'a> Run<'a> {
    fn new(setup: Setup<'a>) -> Result<Self, SimError> {
        let Setup { layout, trace, plan, costs, hardware, .. } = setup;
        let units = trace.units.len();
        if plan.chunks.len() != layout.chunks.len() || [plan.recompute.len(), costs.forward_ns.len(), costs.backward_ns.len()] != [units; 3]
        {
            return Err(SimError::Mismatch(format!(
                "the plan is for {} chunks and {} units, the costs for {} units; the model has {} and {units}",
                plan.chunks.len(),
                plan.recompute.len(),
                costs.forward_ns.len(),
                layout.chunks.len()
            )));
        }
        let mut device = Budget::new(Tier::Device, setup.device_budget);
        let bytes = &plan.device;
        for (bytes, what) in [
            (bytes.reserve, "the reserve"),
            (bytes.resident_params, "resident parameters"),
            (bytes.states, "optimizer states"),
            (bytes.accumulators, "gradient accumulators"),
            (bytes.stream_slab, "the streaming slab"),
        ] {
            device.reserve(bytes, what)?;
        }
        let mut host = Budget::new(Tier::Host, setup.host_budget);
        host.reserve(plan.host.total(), "the host slab")?;
        let chunks = layout.chunks.len();
        let mut backward: Vec<Option<(OpId, OpId)>> = vec![None; chunks];
        for op in trace.ids().filter(|op| trace.ops[op.index()].phase == Phase::Backward) {
            for chunk in trace.chunks(op).iter().filter(|c| plan.chunks[c.index()].class != OptimizerClass::Frozen) {
                let seen = backward[chunk.index()].get_or_insert((op, op));
                seen.1 = op;
            }
        }
        Ok(Run {
            calls: calls(trace, plan, &backward),
            scheduler: Scheduler::new(layout.clone(), trace.clone(), plan.clone(), Some(1.0)),
            machine: Machine::new(hardware),
            thread: Thread { step: 0, at: 0, ready_ns: 0, blocked: None },
            blocks: Blocks::default(),
            activations: 0,
            gradients: 0,
            peak: ("the start".to_owned(), 0, 0),
            device,
            host,
            written: vec![None; chunks],
            guards: Vec::new(),
            release: None,
            commit: None,
            in_flight_bytes: 0,
            staging_free: 2,
            held: vec![0; chunks],
            leaving_bytes: 0,
            backward,
            wait_causes: BTreeMap::new(),
            compute_ended: 0,
            window: None,
            setup,
        })
    }

    fn drive(&mut self) -> Result<Outcome, SimError> {
        loop {
            loop {
                let mut progress = self.advance_thread()?;
                while let Some(began) = self.machine.begin_one() {
                    self.began(began)?;
                    progress = true;
                }
                if !progress {
                    break;
                }
            }
            let ready = self.thread.ready_ns;
            let waits_for_clock = self.thread.blocked.is_none() && ready > self.machine.now_ns();
            match self.machine.next_end() {
                // What ends and what the thread does at the same moment: the end comes first.
                Some((at, lane)) if !waits_for_clock || at <= ready => {
                    self.machine.advance(at);
                    if let Some(ended) = self.machine.end(lane)
                        && let Some(outcome) = self.ended(ended)?
                    {
                        return Ok(outcome);
                    }
                }
                _ if waits_for_clock => self.machine.advance(ready),
                _ => {
                    let call = self.calls.get(self.thread.at);
                    return Err(SimError::Deadlock {
                        at: format!("{call:?} of step {}", self.thread.step),
                        cause: self.thread.blocked.map_or("the end of the step", |(_, cause)| cause.name()),
                    });
                }
            }
        }
    }

    /// Lets the training thread go on as far as it can now.
    fn advance_thread(&mut self) -> Result<bool, SimError> {
        let mut progress = false;
        while self.thread.step <= WARM_UP_STEPS && self.thread.ready_ns <= self.machine.now_ns() {
            let call = self.calls[self.thread.at];
            if let Some(cause) = self.call(call)? {
                if self.thread.blocked.is_none() {
                    self.thread.blocked = Some((self.machine.now_ns(), cause));
                }
                return Ok(progress);
            }
            progress = true;
            if let Some((since, cause)) = self.thread.blocked.take() {
                self.blocks.add(since, self.machine.now_ns(), cause);
            }
            self.thread.at += 1;
            if self.thread.at == self.calls.len() {
                self.thread.at = 0;
                self.thread.step += 1;
            }
        }
        Ok(progress)
    }

    /// Makes one call; gives what it waits for if it has to be repeated.
    fn call(&mut self, call: Call) -> Result<Option<Cause>, SimError> {
        match call {
            Call::Enter(op) => return self.enter(op),
            Call::Leave(op) => {
                let (unit, phase) = self.op(op);
                self.release = self.machine.record(Lane::Compute);
                self.apply(&Event::Leave { unit, phase })?;
                if phase == Phase::Backward {
                    let trace_unit = &self.setup.trace.units[unit as usize];
                    let recomputed = self.setup.plan.recompute[unit as usize];
                    // What a recomputation saved is freed with the input that it started from.
                    let bytes = trace_unit.saved_bytes + if recomputed { trace_unit.input_bytes } else { 0 };
                    self.activations -= bytes;
                    self.device.release(bytes);
                    self.sample_device();
                }
            }
            Call::BackwardBegin => {
                self.apply(&Event::BackwardBegin { grad_scale: 1.0 })?;
            }
            Call::Hand(chunk) => return self.hand_over(chunk),
            Call::BackwardEnd => {
                self.release = self.machine.record(Lane::Compute);
                self.apply(&Event::BackwardEnd)?;
            }
            Call::Commit => {
                if self.scheduler.is_undecided() {
                    return Ok(Some(Cause::Gradients));
                }
                let token = self.machine.record(Lane::Compute);
                (self.commit, self.release) = (token, token);
                self.apply(&Event::Commit { grad_scale: 1.0, hyper_changed: false })?;
            }
        }
        Ok(None)
    }

    fn is_first_micro_batch(&self) -> bool {
        self.thread.at < (self.calls.len() - 1) / self.setup.plan.accumulation as usize
    }

    fn op(&self, op: OpId) -> (u32, Phase) {
        let op = &self.setup.trace.ops[op.index()];
        (op.unit, op.phase)
    }

    fn enter(&mut self, op: OpId) -> Result<Option<Cause>, SimError> {
        let (unit, phase) = self.op(op);
        let (trace, plan, costs) = (self.setup.trace, self.setup.plan, self.setup.costs);
        let index = unit as usize;
        let recomputed = plan.recompute[index];
        let saved = match (phase, recomputed) {
            (Phase::Forward, true) => trace.units[index].input_bytes,
            (Phase::Forward, false) | (Phase::Backward, true) => trace.units[index].saved_bytes,
            (Phase::Backward, false) => 0,
        };
        let born: u64 = trace.units[index]
            .chunks
            .iter()
            .filter(|c| phase == Phase::Backward && self.backward[c.index()].is_some_and(|(first, _)| first == op))
            .map(|&c| self.setup.layout.grad_bytes(c))
            .sum();
        let room = self.device.limit() - self.device.used();
        if saved + born > room && self.freeable() >= saved + born - room {
            return Ok(Some(Cause::Memory));
        }
        self.release = self.machine.record(Lane::Compute);
        if self.apply(&Event::Enter { unit, phase })? != Progress::Done {
            return Ok(Some(if self.scheduler.is_undecided() { Cause::Gradients } else { Cause::Optimizer }));
        }
        self.reserve(saved, born, op)?;
        let mut waits = Vec::new();
        for chunk in &trace.units[index].chunks {
            if let Some((token, cause)) = self.written[chunk.index()] {
                if self.machine.ended_ns(token).is_none() {
                    waits.push((token, cause));
                } else {
                    self.written[chunk.index()] = None;
                }
            }
        }
        let ns = match phase {
            Phase::Forward => costs.forward_ns[index],
            Phase::Backward => costs.backward_ns[index] + if recomputed { costs.forward_ns[index] } else { 0 },
        };
        self.compute(op, ns, waits);
        self.thread.ready_ns = self.machine.now_ns() + self.setup.hardware.launch_ns;
        Ok(None)
    }

    fn compute(&mut self, op: OpId, ns: u64, waits: Vec<(Token, Cause)>) {
        let (unit, phase) = self.op(op);
        let direction = if phase == Phase::Forward { "forward" } else { "backward" };
        let task = Task {
            name: format!("{} {direction}", self.setup.trace.units[unit as usize].name),
            bytes: 0,
            work: ns as f64,
            waits: waits.iter().map(|(token, _)| *token).collect(),
            on_start: Vec::new(),
            on_end: Vec::new(),
        };
        for (token, cause) in waits {
            self.wait_causes.insert(token.index(), cause);
        }
        self.machine.push(Lane::Compute, task);
    }

    /// Device bytes that will be given back without the training thread.
    fn freeable(&self) -> u64 {
        self.in_flight_bytes + self.leaving_bytes
    }

    fn reserve(&mut self, saved: u64, born: u64, op: OpId) -> Result<(), SimError> {
        let before = self.device.peak();
        let name = self.setup.trace.op_name(op);
        self.device.reserve(saved + born, &name)?;
        self.activations += saved;
        self.gradients += born;
        if self.device.peak() > before {
            self.peak = (name, self.activations, self.gradients);
        }
        self.sample_device();
        Ok(())
    }

    /// Hands an event to the scheduler and carries out its actions.
    fn apply(&mut self, event: &Event) -> Result<Progress, SimError> {
        let mut actions = Vec::new();
        let progress = self.scheduler.step(event, &mut actions);
        self.execute(&actions);
        Ok(progress?)
    }

    fn effects(&mut self, effects: Vec<Effect>) -> Result<(), SimError> {
        for effect in effects {
            match effect {
                Effect::Post(event) => {
                    self.apply(&event)?;
                }
                Effect::FreeGradients(bytes) => {
                    self.leaving_bytes -= bytes;
                    self.free_gradients(bytes);
                }
                Effect::Landed { bytes } => {
                    self.in_flight_bytes -= bytes;
                    self.free_gradients(bytes);
                }
                Effect::FreeStaging => self.staging_free += 1,
            }
        }
        Ok(())
    }

    fn free_gradients(&mut self, bytes: u64) {
        self.gradients -= bytes;
        self.device.release(bytes);
        self.sample_device();
    }

    fn sample_device(&mut self) {
        let (now, value) = (self.machine.now_ns(), self.device.used());
        if let Some(window) = &mut self.window {
            let at_ns = now - window.start_ns;
            window.timeline.samples.push(Sample { counter: "device bytes".to_owned(), at_ns, value });
        }
    }

    fn began(&mut self, began: Began<Effect>) -> Result<(), SimError> {
        let now = self.machine.now_ns();
        if began.lane == Lane::Compute {
            let cause = began
                .waits
                .iter()
                .max_by_key(|token| self.machine.ended_ns(**token))
                .and_then(|token| self.wait_causes.get(&token.index()).copied())
                .unwrap_or(Cause::Launch);
            let enqueued = began.enqueued_ns.clamp(began.idle_since_ns, now);
            if let Some(window) = &mut self.window {
                let from = began.idle_since_ns;
                self.blocks.attribute(from, enqueued, &mut window.stalls);
                window.stalls.add(cause, now - enqueued);
                if now > from {
                    window.timeline.spans.push(Span {
                        track: "compute wait".to_owned(),
                        name: cause.name().to_owned(),
                        start_ns: from - window.start_ns,
                        duration_ns: now - from,
                        bytes: 0,
                    });
                }
            }
            self.blocks.forget_until(enqueued);
        }
        self.effects(began.effects)
    }

    fn ended(&mut self, ended: Ended<Effect>) -> Result<Option<Outcome>, SimError> {
        let now = self.machine.now_ns();
        if let Some(window) = &mut self.window {
            window.record(&ended, now);
        }
        let is_compute = ended.lane == Lane::Compute;
        self.effects(ended.effects)?;
        if is_compute {
            self.compute_ended += 1;
            let per_step = self.setup.trace.ops.len() as u64 * u64::from(self.setup.plan.accumulation);
            if self.compute_ended == per_step * WARM_UP_STEPS {
                self.open_window(now);
            } else if self.compute_ended == per_step * (WARM_UP_STEPS + 1) {
                return Ok(self.close_window(now));
            }
        }
        Ok(None)
    }

    fn open_window(&mut self, now: u64) {
        let mut window = Window { start_ns: now, before: self.scheduler.counters(), ..Window::default() };
        for (counter, value) in [("device bytes", self.device.used()), ("host bytes", self.host.used())] {
            window.timeline.samples.push(Sample { counter: counter.to_owned(), at_ns: 0, value });
        }
        self.window = Some(window);
    }

    fn close_window(&mut self, now: u64) -> Option<Outcome> {
        let mut window = self.window.take()?;
        window.timeline.spans.sort_by(|a, b| (a.start_ns, &a.track, &a.name).cmp(&(b.start_ns, &b.track, &b.name)));
        let (device_peak_op, activations, gradients) = std::mem::take(&mut self.peak);
        Some(Outcome {
            step_ns: now - window.start_ns,
            compute_ns: window.compute_ns,
            slowdown_ns: window.busy_compute_ns.saturating_sub(window.compute_ns),
            stalls: window.stalls,
            h2d_bytes: window.h2d_bytes,
            d2h_bytes: window.d2h_bytes,
            busy_ns: window.busy_ns,
            device_peak_bytes: self.device.peak(),
            device_peak_op,
            device_peak_activation_bytes: activations,
            device_peak_gradient_bytes: gradients,
            host_peak_bytes: self.host.peak(),
            counters: difference(self.scheduler.counters(), window.before),
            timeline: window.timeline,
        })
    }
}

impl Window {
    fn record(&mut self, ended: &Ended<Effect>, now: u64) {
        let start = ended.start_ns.max(self.start_ns);
        let busy = now - start;
        match ended.lane {
            Lane::Compute => {
                self.compute_ns += ended.work as u64;
                self.busy_compute_ns += busy;
            }
            Lane::HostToDevice => self.h2d_bytes += ended.bytes,
            Lane::DeviceToHost => self.d2h_bytes += ended.bytes,
            Lane::Optimizer | Lane::HostAdam | Lane::Landing => {}
        }
        *self.busy_ns.entry(ended.lane.track().to_owned()).or_default() += busy;
        self.timeline.spans.push(Span {
            track: ended.lane.track().to_owned(),
            name: ended.name.clone(),
            start_ns: start - self.start_ns,
            duration_ns: busy,
            bytes: ended.bytes,
        });
    }
}

/// The calls of one optimizer step, as the module hooks make them.
fn calls(trace: &Trace, plan: &Plan, backward: &[Option<(OpId, OpId)>]) -> Vec<Call> {
    let mut micro_batch = Vec::new();
    let mut in_backward = false;
    for op in trace.ids() {
        let is_backward = trace.ops[op.index()].phase == Phase::Backward;
        if is_backward && !std::mem::replace(&mut in_backward, true) {
            micro_batch.push(Call::BackwardBegin);
        }
        micro_batch.push(Call::Enter(op));
        if is_backward {
            // Gradients are complete when autograd has accumulated them, which is before the unit is left.
            let complete = trace.chunks(op).iter().filter(|c| backward[c.index()].is_some_and(|(_, last)| last == op));
            micro_batch.extend(complete.map(|&c| Call::Hand(c)));
        }
        micro_batch.push(Call::Leave(op));
    }
    micro_batch.push(Call::BackwardEnd);
    let mut calls = micro_batch.repeat(plan.accumulation as usize);
    calls.push(Call::Commit);
    calls
}

fn difference(after: Counters, before: Counters) -> Counters {
    Counters {
        fetches: after.fetches - before.fetches,
        demand_fetches: after.demand_fetches - before.demand_fetches,
        evictions: after.evictions - before.evictions,
        off_trace: after.off_trace - before.off_trace,
        steps: after.steps - before.steps,
        clipped: after.clipped - before.clipped,
        skipped: after.skipped - before.skipped,
        speculated: after.speculated - before.speculated,
        undone: after.undone - before.undone,
    }
}
