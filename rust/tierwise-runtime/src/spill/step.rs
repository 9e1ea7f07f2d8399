//! The optimizer step of a spilled chunk, piece by piece, while the disk reads ahead and writes back.

use super::{Spill, chunk_name, spill};
use crate::device::{EventRef, Queue, Transfer as Copy};
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::execute::{count_steps, traffic};
use crate::memory::final_dtype;
use crate::workers::Job;
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::layout::Precision;
use tierwise_core::plan::ParamHome;
use tierwise_core::scheduler::Event;
use tierwise_core::staging::{Piece, PieceId};
use tierwise_kernels::{AdamConstants, AdamSegment, GradDtype, adam};

/// A parameter that a step changes.
struct Changed {
    offset: u64,
    numel: u64,
    constants: AdamConstants,
}

/// The step of one chunk.
struct SpilledStep {
    chunk: ChunkId,
    name: String,
    precision: Precision,
    dtype: GradDtype,
    changed: Vec<Changed>,
    /// Address of the chunk's gradient in host memory; nothing if it is spilled.
    grads: Option<u64>,
    /// Address of the parameters in host memory, 0 if they are spilled.
    param: u64,
    /// Address of the parameters on the device, where the step has to send them.
    device: Option<u64>,
    /// Everything that read the old parameters is before it.
    commit: Option<EventRef>,
    pieces: usize,
}

impl Shared {
    /// Queues the step of a spilled chunk; its pieces are the next that the disk reads.
    pub(crate) fn step_spilled(&self, state: &mut State, chunk: ChunkId, grad_scale: f32) -> Result<()> {
        count_steps(state, chunk);
        let mut step = self.prepare(state, chunk, grad_scale)?;
        // A copy that nobody waited for may still read the parameters that are about to be rewritten.
        let reader = state.written[chunk.index()].clone();
        let _ = state.gradients.clear(chunk);
        let spill = spill(state)?;
        // A piece without a gradient stays as it is.
        let touched = |id: &PieceId| {
            let piece = spill.pieces.get(*id);
            step.changed.iter().any(|p| p.offset < piece.first + piece.numel && piece.first < p.offset + p.numel)
        };
        let pieces: Vec<PieceId> = spill.pieces.of_chunk(chunk).filter(touched).collect();
        step.pieces = pieces.len();
        let (mut transfers, mut reads) = (Vec::new(), Vec::new());
        if step.grads.is_none() {
            spill.grads.buffers.want(pieces.clone(), &mut reads);
        }
        spill.staging.want(pieces, &mut transfers);
        self.transfer(state, &transfers)?;
        self.read_grads(state, &reads)?;
        self.spill_jobs.send(Job::new(reader, move |shared| step.run(shared)))
    }

    fn prepare(&self, state: &State, chunk: ChunkId, grad_scale: f32) -> Result<SpilledStep> {
        let layout = state.scheduler.layout();
        let plan = state.scheduler.plan();
        let dtype = final_dtype(layout, plan.accumulation > 1);
        let (host, device) = state.places[chunk.index()];
        let name = chunk_name(state, chunk).to_owned();
        let grads = host.grad.map(|offset| self.host + offset);
        if grads.is_none() != plan.chunks[chunk.index()].spills_grads() && !layout.chunks[chunk.index()].params.is_empty() {
            return Err(Error::Internal(format!("`{name}` has no host gradient")));
        }
        let hyper = &state.commit_hyper;
        let changed = state
            .gradients
            .touched(layout, chunk)
            .map(|(param, _)| {
                let group = hyper.group_of_param.get(param.index as usize).copied().flatten().and_then(|g| hyper.groups.get(g));
                let group = group.ok_or_else(|| Error::Internal(format!("`{}` has no hyperparameters", param.name)))?;
                Ok(Changed {
                    offset: param.offset,
                    numel: param.numel,
                    constants: AdamConstants::new(group, state.param_steps[param.index as usize], grad_scale),
                })
            })
            .collect::<Result<_>>()?;
        let spilled = plan.chunks[chunk.index()].home == ParamHome::Spilled;
        Ok(SpilledStep {
            chunk,
            precision: layout.precision,
            dtype,
            changed,
            grads,
            param: host.param.map_or(0, |offset| self.host + offset),
            device: spilled.then_some(device.param),
            commit: state.commit_event.clone(),
            pieces: 0,
            name,
        })
    }
}

impl SpilledStep {
    fn run(&self, shared: &Arc<Shared>) -> Result<()> {
        for _ in 0..self.pieces {
            let Some((id, buffer, grad)) = self.next_piece(shared)? else { return Ok(()) };
            let (piece, segments) = {
                let mut state = shared.lock();
                let spill = spill(&mut state)?;
                let piece = spill.pieces.get(id);
                if piece.chunk != self.chunk {
                    return Err(Error::Internal(format!("the step of `{}` got a piece of chunk {}", self.name, piece.chunk.0)));
                }
                let grads = match (self.grads, grad) {
                    (Some(grads), _) => grads,
                    (None, Some(buffer)) => spill.grads.address(buffer).wrapping_sub(piece.first * spill.grads.element()),
                    (None, None) => return Err(Error::Internal(format!("a piece of `{}` has no gradient", self.name))),
                };
                (piece, self.segments(spill, piece, buffer, grads))
            };
            shared.host_work(|| segments.iter().map(|s| s.numel as u64 * self.element_bytes()).sum());
            let start = shared.device.now_ns();
            // SAFETY: the buffer is lent to this step; gradients and parameters are in the slab that `shared` keeps alive, and the
            // scheduler lets nobody else touch a chunk that is being stepped.
            unsafe { adam::adam_segments(&shared.pool, &segments) };
            self.give_back(shared, piece, buffer, grad, start)?;
        }
        shared.post(&Event::StepDone { chunk: self.chunk })
    }

    /// Waits for the next piece, its buffer and that of its gradient, if that is spilled; `None` if the engine is being dropped.
    fn next_piece(&self, shared: &Arc<Shared>) -> Result<Option<(PieceId, u32, Option<u32>)>> {
        let start = shared.device.now_ns();
        let mut waited = false;
        let mut taken = None;
        let mut state = shared.lock();
        loop {
            Shared::healthy(&state)?;
            if shared.stopping() {
                return Ok(None);
            }
            let spill = spill(&mut state)?;
            if taken.is_none() && !spill.accessing {
                taken = spill.staging.take();
            }
            let grad = taken.and_then(|(id, _)| spill.grads.buffers.take(id));
            if let Some((id, buffer)) = taken.filter(|_| self.grads.is_some() || grad.is_some()) {
                if waited {
                    let end = shared.device.now_ns();
                    spill.waited_ns += end.saturating_sub(start);
                    state.recorder.span("nvme wait", format!("wait for {}", self.name), 0, start, end);
                }
                return Ok(Some((id, buffer, grad)));
            }
            waited = true;
            state = shared.wait_for_news(state);
        }
    }

    /// Bytes that the step of an element reads and writes.
    fn element_bytes(&self) -> u64 {
        self.dtype.bytes() as u64 + 2 * (self.precision.param_bytes() + self.precision.state_bytes())
    }

    /// The parts of the changed parameters that lie in a piece; `grads` is the address of the chunk's gradient, as if all of it were there.
    fn segments(&self, spill: &Spill, piece: Piece, buffer: u32, grads: u64) -> Vec<AdamSegment> {
        let bases = spill.bases(piece, buffer, self.param);
        let parts = self.changed.iter().filter_map(|param| {
            let first = param.offset.max(piece.first);
            let end = (param.offset + param.numel).min(piece.first + piece.numel);
            let grad = grads.wrapping_add(first * self.dtype.bytes() as u64);
            (first < end).then(|| bases.part(self.precision, first, end - first, grad, self.dtype, param.constants))
        });
        parts.collect()
    }

    fn give_back(&self, shared: &Arc<Shared>, piece: Piece, buffer: u32, grad: Option<u32>, start: u64) -> Result<()> {
        let mut guard = shared.lock();
        let state = &mut *guard;
        let end = shared.device.now_ns();
        state.recorder.span("host optimizer, spilled", format!("step {}", self.name), piece.numel * traffic(self.precision), start, end);
        if let Some(device) = self.device {
            let (src, element) = spill(state)?.payload(piece, buffer, 0);
            let bytes = piece.numel * element;
            if let Some(event) = &self.commit {
                shared.device.queue_wait(Queue::HostToDevice, event)?;
            }
            let from = state.recorder.enabled().then(|| shared.device.record(Queue::HostToDevice)).transpose()?;
            let copy = Copy { dst: (device + piece.first * element) as *mut u8, src: src as *const u8, bytes: bytes as usize };
            shared.device.copy(Queue::HostToDevice, &[copy])?;
            let copied = shared.device.record(Queue::HostToDevice)?;
            state.recorder.between("h2d", format!("refresh {}", self.name), bytes, from, &copied);
            state.gradients.h2d_bytes += bytes;
            state.written[self.chunk.index()] = Some(copied.clone());
            spill(state)?.copied[buffer as usize] = Some(copied);
        }
        if let Some(grad) = grad {
            shared.give_grad_back(state, grad)?;
        }
        let mut transfers = Vec::new();
        spill(state)?.staging.give_back(buffer, true, &mut transfers)?;
        shared.transfer(state, &transfers)
    }
}
