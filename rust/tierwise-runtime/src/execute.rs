//! Carrying out the scheduler's actions. Everything here only enqueues.

use crate::device::{Queue, Transfer};
use crate::engine::{Hyper, Shared, State};
use crate::error::{Error, Result};
use crate::memory::{StepBases, final_dtype};
use crate::workers::Job;
use std::sync::Arc;
use tierwise_core::layout::Precision;
use tierwise_core::plan::{OptimizerClass, ParamHome};
use tierwise_core::scheduler::{Action, Event};
use tierwise_core::{ChunkId, Tier};
use tierwise_kernels::adam::Pass;
use tierwise_kernels::convert::Copied;
use tierwise_kernels::{AdamConstants, AdamSegment, UndoRecord, adam, convert};

impl Shared {
    /// Carries out actions in order.
    pub(crate) fn execute(&self, state: &mut State, actions: &[Action]) -> Result<()> {
        for action in actions {
            match *action {
                Action::Fetch { chunk, offset, demand, .. } => self.fetch(state, chunk, offset, demand)?,
                Action::Refresh { chunk } => self.refresh(state, chunk)?,
                Action::Release { chunk, offset } => {
                    if let Some(event) = state.release_event.clone() {
                        let end = offset + state.scheduler.layout().param_bytes(chunk);
                        state.guards.protect(offset, end, event);
                    }
                }
                Action::Step { chunk, tier: Tier::Device, grad_scale } => {
                    if state.scheduler.plan().chunks[chunk.index()].class == OptimizerClass::Streamed {
                        self.step_streamed(state, chunk, grad_scale)?;
                    } else {
                        self.step_on_device(state, chunk, grad_scale)?;
                    }
                }
                Action::Step { chunk, tier: Tier::Nvme, grad_scale } => self.step_spilled(state, chunk, grad_scale)?,
                Action::Step { chunk, grad_scale, .. } => self.step_on_host(state, chunk, grad_scale)?,
                Action::Moments { chunk } => self.step_moments(state, chunk)?,
                Action::Speculate { chunk, grad_scale, undo_offset } => self.speculate(state, chunk, grad_scale, undo_offset)?,
                Action::Undo { chunk } => self.undo(state, chunk)?,
                Action::Accept { chunk } => {
                    state.undo_records.remove(&chunk);
                    count_steps(state, chunk);
                    let tickets = state.gradients.clear(chunk);
                    state.gradients.finish(tickets);
                }
                Action::Decided(decision) => state.decision = Some(decision),
                Action::Forget { chunk } => {
                    let tickets = state.gradients.clear(chunk);
                    if state.scheduler.plan().chunks[chunk.index()].class.steps_on_device() {
                        // The norm may still be reading them.
                        let read = self.device.record(Queue::Optimizer)?;
                        self.finish_after(read, tickets)?;
                    } else {
                        state.gradients.finish(tickets);
                    }
                }
            }
        }
        Ok(())
    }

    pub(crate) fn finish_after(&self, event: crate::device::EventRef, tickets: Vec<u64>) -> Result<()> {
        self.optimizer_jobs.send(Job::new(Some(event), move |shared| {
            shared.lock().gradients.finish(tickets);
            shared.notify();
            Ok(())
        }))
    }

    /// Copies a chunk's parameters from its home to the device.
    fn copy_params(&self, state: &mut State, chunk: ChunkId, dst: u64, what: &str) -> Result<()> {
        let bytes = state.scheduler.layout().param_bytes(chunk);
        let name = &state.scheduler.layout().chunks[chunk.index()].name;
        let src =
            self.host + state.places[chunk.index()].0.param.ok_or_else(|| Error::Internal(format!("`{name}` has no host parameters")))?;
        let name = format!("{what} {name}");
        let start = state.recorder.enabled().then(|| self.device.record(Queue::HostToDevice)).transpose()?;
        let transfer = Transfer { dst: dst as *mut u8, src: src as *const u8, bytes: bytes as usize };
        self.device.copy(Queue::HostToDevice, &[transfer])?;
        let written = self.device.record(Queue::HostToDevice)?;
        state.recorder.between("h2d", name, bytes, start, &written);
        state.gradients.h2d_bytes += bytes;
        state.written[chunk.index()] = Some(written);
        Ok(())
    }

    fn fetch(&self, state: &mut State, chunk: ChunkId, offset: u64, demand: bool) -> Result<()> {
        let end = offset + state.scheduler.layout().param_bytes(chunk);
        for reader in state.guards.reuse(offset, end) {
            self.device.queue_wait(Queue::HostToDevice, &reader)?;
        }
        if state.scheduler.plan().chunks[chunk.index()].home == ParamHome::Fetched {
            return self.fetch_spilled(state, chunk, offset);
        }
        let dst = state.slab_address + offset;
        self.copy_params(state, chunk, dst, if demand { "demand fetch" } else { "fetch" })
    }

    fn refresh(&self, state: &mut State, chunk: ChunkId) -> Result<()> {
        if state.scheduler.plan().chunks[chunk.index()].home == ParamHome::Spilled {
            // Its step sent them piece by piece, out of the staging buffers.
            return Ok(());
        }
        if let Some(event) = &state.commit_event {
            self.device.queue_wait(Queue::HostToDevice, event)?;
        }
        let dst = state.places[chunk.index()].1.param;
        self.copy_params(state, chunk, dst, "refresh")
    }

    fn step_on_device(&self, state: &mut State, chunk: ChunkId, grad_scale: f32) -> Result<()> {
        count_steps(state, chunk);
        let places = state.places[chunk.index()].1;
        let layout = state.scheduler.layout();
        let bases = StepBases::contiguous(places.param, places.states, layout, chunk);
        let segments = segments(state, &state.commit_hyper.clone(), chunk, &bases, places.accumulator, grad_scale, 0)?;
        let name = format!("step {}", layout.chunks[chunk.index()].name);
        let bytes = segments.iter().map(|s| s.numel as u64 * traffic(layout.precision)).sum();
        if let Some(event) = &state.commit_event {
            self.device.queue_wait(Queue::Optimizer, event)?;
        }
        let start = state.recorder.enabled().then(|| self.device.record(Queue::Optimizer)).transpose()?;
        self.device.adam(&segments)?;
        let written = self.device.record(Queue::Optimizer)?;
        state.recorder.between("device optimizer", name, bytes, start, &written);
        state.written[chunk.index()] = Some(written.clone());
        let tickets = state.gradients.clear(chunk);
        if tickets.is_empty() { Ok(()) } else { self.finish_after(written, tickets) }
    }

    fn step_on_host(&self, state: &mut State, chunk: ChunkId, grad_scale: f32) -> Result<()> {
        count_steps(state, chunk);
        let (segments, name) = self.host_segments(state, &state.commit_hyper.clone(), chunk, grad_scale, 0)?;
        // A copy that nobody waited for may still read the parameters that are about to be rewritten.
        let reader = state.written[chunk.index()].clone();
        let _ = state.gradients.clear(chunk);
        let pass = if state.scheduler.owes_moments(chunk) {
            state.late.owe(chunk, segments.clone(), name.clone());
            Pass::Params
        } else {
            Pass::Whole
        };
        self.adam_jobs.send(Job::new(reader, move |shared| {
            run_adam(shared, pass, &segments, &format!("step {name}"));
            shared.post(&Event::StepDone { chunk })
        }))
    }

    fn speculate(&self, state: &mut State, chunk: ChunkId, grad_scale: f32, undo_offset: u64) -> Result<()> {
        let (steps, name) = self.host_segments(state, &state.speculation_hyper.clone(), chunk, grad_scale, 1)?;
        let layout = state.scheduler.layout();
        let param = state.undo_base + undo_offset;
        let states = param + layout.chunks[chunk.index()].state_numel * layout.precision.param_bytes();
        let bases = StepBases::contiguous(param, states, layout, chunk);
        let records = state.gradients.touched(layout, chunk).map(|(param, _)| bases.record(layout.precision, param));
        let undoable: Vec<(AdamSegment, UndoRecord)> = steps.into_iter().zip(records).collect();
        state.undo_records.insert(chunk, undoable.iter().flat_map(put_back).collect());
        let reader = state.written[chunk.index()].clone();
        self.adam_jobs.send(Job::new(reader, move |shared| {
            run_undoable(shared, &undoable, &format!("speculate {name}"));
            shared.post(&Event::SpeculateDone { chunk })
        }))
    }

    fn undo(&self, state: &mut State, chunk: ChunkId) -> Result<()> {
        let record = state.undo_records.remove(&chunk).ok_or_else(|| Error::Internal(format!("chunk {} has no undo record", chunk.0)))?;
        let name = format!("undo {}", state.scheduler.layout().chunks[chunk.index()].name);
        self.adam_jobs.send(Job::new(None, move |shared| {
            let bytes = record.iter().map(|range| 2 * range.bytes as u64).sum();
            shared.host_work(|| bytes);
            let start = shared.device.now_ns();
            // SAFETY: both ends are in the slab that `shared` keeps alive; the scheduler lent the record to this chunk, and the worker has
            // stepped it before.
            unsafe { convert::copy_all(&shared.pool, &record) };
            let end = shared.device.now_ns();
            shared.lock().recorder.span("host optimizer", name, bytes, start, end);
            shared.post(&Event::UndoDone { chunk })
        }))
    }

    fn host_segments(
        &self,
        state: &State,
        hyper: &Hyper,
        chunk: ChunkId,
        grad_scale: f32,
        ahead: u64,
    ) -> Result<(Vec<AdamSegment>, String)> {
        let places = &state.places[chunk.index()].0;
        let address = |offset: Option<u64>| offset.map_or(0, |o| self.host + o);
        let bases = StepBases {
            param: address(places.param),
            master: address(places.master),
            exp_avg: address(places.exp_avg),
            exp_avg_sq: address(places.exp_avg_sq),
        };
        let segments = segments(state, hyper, chunk, &bases, address(places.grad), grad_scale, ahead)?;
        Ok((segments, state.scheduler.layout().chunks[chunk.index()].name.clone()))
    }
}

/// One segment per parameter that got a gradient. `ahead` is added to the parameter's step count.
pub(crate) fn segments(
    state: &State,
    hyper: &Hyper,
    chunk: ChunkId,
    bases: &StepBases,
    grad_base: u64,
    grad_scale: f32,
    ahead: u64,
) -> Result<Vec<AdamSegment>> {
    let layout = state.scheduler.layout();
    let accumulates = state.scheduler.plan().accumulation > 1;
    let dtype = final_dtype(layout, accumulates);
    state
        .gradients
        .touched(layout, chunk)
        .map(|(param, address)| {
            let group = hyper.group_of_param.get(param.index as usize).copied().flatten();
            let group = group
                .and_then(|g| hyper.groups.get(g))
                .ok_or_else(|| Error::Usage(format!("no hyperparameters were set for `{}`; call set_hyper before the step", param.name)))?;
            let step = state.param_steps[param.index as usize] + ahead;
            let constants = AdamConstants::new(group, step, grad_scale);
            let grad = if address == 0 { grad_base + param.offset * dtype.bytes() as u64 } else { address };
            Ok(bases.segment(layout.precision, param, grad, dtype, constants))
        })
        .collect()
}

pub(crate) fn count_steps(state: &mut State, chunk: ChunkId) {
    let layout = state.scheduler.layout();
    for (param, _) in state.gradients.touched(layout, chunk) {
        state.param_steps[param.index as usize] += 1;
    }
}

/// Bytes that a step of one element moves.
pub(crate) fn traffic(precision: Precision) -> u64 {
    precision.grad_bytes() + 2 * (precision.param_bytes() + precision.state_bytes())
}

/// Bytes of host memory that a pass over segments reads and writes.
fn step_bytes(shared: &Shared, pass: Pass, segments: &[AdamSegment]) -> u64 {
    let precision = shared.lock().scheduler.layout().precision;
    let bytes = |s: &AdamSegment| Some(s.grad_dtype.bytes() as u64 + pass_bytes(pass.of(&s.constants)?, precision));
    segments.iter().map(|s| s.numel as u64 * bytes(s).unwrap_or(0)).sum()
}

/// Bytes of parameter and states that a pass reads and writes per element.
fn pass_bytes(pass: Pass, precision: Precision) -> u64 {
    let (params, moments) = (precision.param_bytes() + precision.master_bytes(), 8);
    match pass {
        Pass::Whole => 2 * (params + moments),
        Pass::Params => 2 * params + moments,
        Pass::Moments => 2 * moments,
    }
}

/// What a step that may have to be undone overwrites, on the way back from its record; of a master that there is not, 0 bytes.
fn put_back((step, record): &(AdamSegment, UndoRecord)) -> [Copied; 4] {
    let from = |src: *const u8, dst: *mut u8, element: usize| Copied { src, dst, bytes: element * step.numel };
    [
        from(record.param, step.param, step.format.param_bytes()),
        from(record.master, step.master, step.format.master_bytes()),
        from(record.exp_avg.cast(), step.exp_avg.cast(), size_of::<f32>()),
        from(record.exp_avg_sq.cast(), step.exp_avg_sq.cast(), size_of::<f32>()),
    ]
}

/// Steps what may have to be undone: beside what a step moves, its record is written.
fn run_undoable(shared: &Arc<Shared>, undoable: &[(AdamSegment, UndoRecord)], name: &str) {
    let steps: Vec<AdamSegment> = undoable.iter().map(|(step, _)| *step).collect();
    let kept: usize = undoable.iter().flat_map(put_back).map(|range| range.bytes).sum();
    let bytes = step_bytes(shared, Pass::Whole, &steps) + kept as u64;
    shared.host_work(|| bytes);
    let start = shared.device.now_ns();
    // SAFETY: steps and records are in the slab that `shared` keeps alive; the scheduler lends both to this chunk alone.
    unsafe { adam::adam_undoable(&shared.pool, undoable) };
    let end = shared.device.now_ns();
    shared.lock().recorder.span("host optimizer", name.to_owned(), bytes, start, end);
}

/// A pass over a chunk.
pub(crate) fn run_adam(shared: &Arc<Shared>, pass: Pass, segments: &[AdamSegment], name: &str) {
    shared.host_work(|| step_bytes(shared, pass, segments));
    let start = shared.device.now_ns();
    // SAFETY: the segments are in the slab that `shared` keeps alive; the scheduler lets nobody else touch what is being written of a chunk.
    unsafe { adam::adam_pass(&shared.pool, pass, segments) };
    let end = shared.device.now_ns();
    let bytes = step_bytes(shared, pass, segments);
    shared.lock().recorder.span("host optimizer", name.to_owned(), bytes, start, end);
}
