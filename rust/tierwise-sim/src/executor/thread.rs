//! The training thread: it runs ahead of the compute stream and blocks where `enter`, `grads` and `commit` block.

use super::calls::Call;
use super::machine::{Lane, Task, Token};
use super::offload::{Offload, part_of};
use super::stalls::Cause;
use super::{Run, SimError, WARM_UP_STEPS};
use tierwise_core::OpId;
use tierwise_core::plan::ActivationPlan;
use tierwise_core::scheduler::{Event, Progress};
use tierwise_core::trace::Phase;

/// What a CUDA queue holds before launching blocks, and the kernels of a layer's forward; `calibrate` takes the same figures.
const QUEUED_KERNELS: u64 = 700;
const FORWARD_KERNELS: u64 = 25;

/// How many times longer the training thread takes where the threads of the host's kernels, one per core, compete with it; fitted
/// (docs/simulator.md).
const CROWDED: f64 = 1.7;

/// Where the training thread is.
pub struct Thread {
    pub step: u64,
    pub at: usize,
    pub ready_ns: u64,
    pub blocked: Option<(u64, Cause)>,
    /// Whether the operation that it stands at was entered, and only waits for its parameters to come from the disk.
    pub entered: bool,
}

impl Run<'_> {
    /// Lets the training thread go on as far as it can now.
    pub(super) fn advance_thread(&mut self) -> Result<bool, SimError> {
        let mut progress = false;
        while self.thread.step <= WARM_UP_STEPS && self.thread.ready_ns <= self.machine.now_ns() {
            let call = self.calls[self.thread.at];
            let entered = self.thread.entered;
            if let Some(cause) = self.call(call)? {
                // What was entered and still waits has asked for its parameters.
                progress |= self.thread.entered != entered;
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
    pub(super) fn call(&mut self, call: Call) -> Result<Option<Cause>, SimError> {
        match call {
            Call::Begin => {
                self.settle();
                if let Some(offload) = &mut self.offload {
                    offload.begin();
                }
            }
            Call::Enter(op) => return self.enter(op),
            Call::AskBack(op) => self.ask_back(op)?,
            Call::Work(op, part) => return self.work_offloading(op, part),
            Call::Leave(op) => {
                let (unit, phase) = self.op(op);
                self.leave_offloading(unit, phase);
                self.release = self.machine.record(Lane::Compute);
                self.apply(&Event::Leave { unit, phase })?;
                if phase == Phase::Backward {
                    // What a recomputation saved is freed with the input that it started from.
                    let bytes = self.setup.trace.units[unit as usize].saved_bytes - self.offloaded_bytes(unit);
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
            Call::Step => self.thread.ready_ns = self.machine.now_ns() + self.setup.costs.commit_ns,
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

    pub(super) fn is_first_micro_batch(&self) -> bool {
        self.thread.at < (self.calls.len() - 2) / self.setup.plan.accumulation as usize
    }

    pub(super) fn op(&self, op: OpId) -> (u32, Phase) {
        let op = &self.setup.trace.ops[op.index()];
        (op.unit, op.phase)
    }

    /// Bytes that an operation saves for good, and gradients that are born in it.
    pub(super) fn needs(&self, op: OpId) -> (u64, u64) {
        let (unit, phase) = self.op(op);
        let trace = self.setup.trace;
        let index = unit as usize;
        let recomputed = self.setup.plan.activations[index] == ActivationPlan::Recompute;
        let saved = match (phase, recomputed) {
            (Phase::Forward, true) => trace.units[index].input_bytes,
            (Phase::Forward, false) => trace.units[index].saved_bytes - self.offloaded_bytes(unit),
            // What a recomputation saves again begins with the input that stayed.
            (Phase::Backward, true) => trace.units[index].saved_bytes - trace.units[index].input_bytes,
            (Phase::Backward, false) => 0,
        };
        let born = trace.units[index]
            .chunks
            .iter()
            .filter(|c| phase == Phase::Backward && self.backward[c.index()].is_some_and(|(first, _)| first == op))
            .map(|&c| self.setup.layout.grad_bytes(c))
            .sum();
        (saved, born)
    }

    pub(super) fn enter(&mut self, op: OpId) -> Result<Option<Cause>, SimError> {
        if !self.thread.entered
            && let Some(cause) = self.enter_unit(op)?
        {
            return Ok(Some(cause));
        }
        // Nobody can wait for the end of a copy that was not submitted yet.
        self.thread.entered = self.setup.trace.chunks(op).iter().any(|&chunk| self.spilled.fetches(chunk));
        if self.thread.entered {
            return Ok(Some(Cause::Fetch));
        }
        if self.offload.is_none() {
            self.work(op, Vec::new())?;
        }
        Ok(None)
    }

    /// Tells the scheduler, as soon as there is room; gives what it waits for.
    fn enter_unit(&mut self, op: OpId) -> Result<Option<Cause>, SimError> {
        let (unit, phase) = self.op(op);
        let (saved, born) = self.needs(op);
        // What leaves the device takes its room storage by storage.
        let leaves = self.offload.as_ref().filter(|_| phase == Phase::Forward).map_or(0, |offload| offload.on_device(unit, 0));
        // As the runtime's `make_room` does, which only forwards call.
        let reserve = if phase == Phase::Forward { self.transient_bytes(op).max(self.setup.forward_reserve_bytes) } else { 0 };
        if self.waits_for_memory(saved + born + leaves + reserve) {
            return Ok(Some(Cause::Memory));
        }
        if !self.fits_queue(op) {
            return Ok(Some(Cause::Launch));
        }
        self.release = self.machine.record(Lane::Compute);
        if self.apply(&Event::Enter { unit, phase })? != Progress::Done {
            return Ok(Some(if self.scheduler.is_undecided() { Cause::Gradients } else { Cause::Optimizer }));
        }
        Ok(None)
    }

    /// Whether the device's queue has room for an operation's kernels: the training thread runs only so far ahead.
    fn fits_queue(&mut self, op: OpId) -> bool {
        if self.setup.hardware.measured.is_none() {
            return true;
        }
        while let Some((token, kernels)) = self.queue.front()
            && self.machine.ended_ns(*token).is_some()
        {
            self.queued_kernels -= kernels;
            self.queue.pop_front();
        }
        self.queue.is_empty() || self.queued_kernels + self.kernels(op) <= QUEUED_KERNELS
    }

    /// What the training thread takes while the host's kernels have every core.
    fn launch_ns(&self, ns: u64) -> u64 {
        let busy = self.setup.hardware.measured.is_some()
            && [Lane::HostAdam, Lane::SpillAdam, Lane::Landing].into_iter().any(|lane| self.machine.is_busy(lane));
        if busy { (ns as f64 * CROWDED).round() as u64 } else { ns }
    }

    fn kernels(&self, op: OpId) -> u64 {
        let (unit, phase) = self.op(op);
        let recomputed = self.setup.plan.activations[unit as usize] == ActivationPlan::Recompute;
        FORWARD_KERNELS * if phase == Phase::Forward { 1 } else { 2 + u64::from(recomputed) }
    }

    /// Enqueues an operation's work, which waits for its parameters, and for `waits` too.
    pub(super) fn work(&mut self, op: OpId, waits: Vec<(Token, Cause)>) -> Result<(), SimError> {
        let waits = self.reads(op, waits)?;
        self.launch(op, waits, |whole| whole);
        Ok(())
    }

    /// The same for a part of an operation; the first waits for the parameters.
    pub(super) fn work_part(&mut self, op: OpId, part: u64, waits: Vec<(Token, Cause)>) -> Result<(), SimError> {
        let waits = if part == 0 { self.reads(op, waits)? } else { waits };
        self.launch(op, waits, |whole| part_of(whole, part));
        Ok(())
    }

    /// Takes what an operation keeps, and gives what it waits for beside `waits`.
    fn reads(&mut self, op: OpId, mut waits: Vec<(Token, Cause)>) -> Result<Vec<(Token, Cause)>, SimError> {
        let (unit, _) = self.op(op);
        let (trace, index) = (self.setup.trace, unit as usize);
        let (saved, born) = self.needs(op);
        self.reserve(saved, born, op)?;
        for chunk in &trace.units[index].chunks {
            if let Some((token, cause)) = self.written[chunk.index()] {
                if self.machine.ended_ns(token).is_none() {
                    waits.push((token, cause));
                } else {
                    self.written[chunk.index()] = None;
                }
            }
        }
        waits.extend(self.gather_for_use(op));
        Ok(waits)
    }

    /// Enqueues so much of an operation's work.
    fn launch(&mut self, op: OpId, waits: Vec<(Token, Cause)>, share: impl Fn(u64) -> u64) {
        let (unit, phase) = self.op(op);
        let (plan, costs, index) = (self.setup.plan, self.setup.costs, unit as usize);
        let recomputed = plan.activations[index] == ActivationPlan::Recompute;
        let ns = match phase {
            Phase::Forward => costs.forward_ns[index],
            Phase::Backward => costs.backward_ns[index] + if recomputed { costs.recompute_ns[index] } else { 0 },
        };
        let token = self.compute(op, share(ns), waits);
        let kernels = share(self.kernels(op));
        self.queued_kernels += kernels;
        self.queue.push_back((token, kernels));
        self.thread.ready_ns = self.machine.now_ns() + self.launch_ns(share(costs.launch[index].ns(phase, recomputed)));
    }

    pub(super) fn compute(&mut self, op: OpId, ns: u64, waits: Vec<(Token, Cause)>) -> Token {
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
        let token = self.machine.push(Lane::Compute, task);
        self.latest_compute = [self.latest_compute[1], Some(token)];
        token
    }

    /// Whether so many device bytes are missing now and will not be.
    pub(super) fn waits_for_memory(&mut self, bytes: u64) -> bool {
        if bytes > self.room() {
            self.settle();
        }
        bytes > self.room() && self.freeable() >= bytes - self.room()
    }

    pub(super) fn room(&self) -> u64 {
        self.device.limit() - self.device.used()
    }

    /// Device bytes that will be given back without the training thread.
    pub(super) fn freeable(&self) -> u64 {
        self.in_flight_bytes + self.leaving_bytes + self.offload.as_ref().map_or(0, Offload::leaving_bytes)
    }

    /// Device bytes that an operation's kernels need for themselves.
    fn transient_bytes(&self, op: OpId) -> u64 {
        let (unit, phase) = self.op(op);
        self.setup.transient_bytes.map_or(0, |bytes| bytes[unit as usize][phase as usize])
    }

    pub(super) fn reserve(&mut self, saved: u64, born: u64, op: OpId) -> Result<(), SimError> {
        let before = self.device.peak();
        let name = self.setup.trace.op_name(op);
        let transient = self.transient_bytes(op);
        self.device.reserve(saved + born + transient, &name)?;
        // In the order of the allocator, which is the training thread's, nothing else is taken while they are there.
        self.device.release(transient);
        self.activations += saved;
        self.gradients += born;
        if self.device.peak() > before {
            self.peak = (name, self.activations, self.gradients);
        }
        self.sample_device();
        Ok(())
    }
}
