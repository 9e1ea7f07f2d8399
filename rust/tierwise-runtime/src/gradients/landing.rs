//! Gradients that leave for the host: where they land, what is done with them there, and their norm.

use super::Incoming;
use crate::device::{EventRef, Queue, Transfer};
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::memory::{final_dtype, grad_dtype, span};
use crate::spill::sums::{Added, SpilledSum};
use crate::workers::Job;
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;
use tierwise_kernels::{Addition, GradSpan, accumulate, norm};

/// What the landing worker does with a gradient that has landed.
pub(crate) type Then = Box<dyn FnOnce(&Arc<Shared>) -> Result<()> + Send>;

impl Shared {
    /// Sends a chunk's gradient to where it lands, and on to its accumulator, the disk or its norm.
    pub(super) fn to_host(
        &self,
        state: &mut State,
        chunk: ChunkId,
        incoming: &[Incoming],
        ticket: u64,
        produced: &EventRef,
        last: bool,
    ) -> Result<()> {
        let accumulates = state.scheduler.plan().accumulation > 1;
        let spilled = state.scheduler.plan().chunks[chunk.index()].spills_grads();
        let layout = state.scheduler.layout();
        let dtype = grad_dtype(layout.precision);
        let name = layout.chunks[chunk.index()].name.clone();
        let bytes = layout.grad_bytes(chunk);
        let home = state.places[chunk.index()].0.grad.map(|offset| self.host + offset).filter(|_| !spilled);
        if home.is_none() && !spilled {
            return Err(Error::Internal(format!("`{name}` has no host gradient")));
        }
        let buffer = if accumulates || spilled {
            let free = state.gradients.staging_free.iter().position(|f| *f).ok_or_else(|| Error::Usage("no staging buffer".to_owned()))?;
            state.gradients.staging_free[free] = false;
            Some(free)
        } else {
            None
        };
        let landing = buffer.map_or(home.unwrap_or(0), |buffer| state.gradients.staging[buffer]);
        let mut transfers = Vec::with_capacity(incoming.len());
        let mut added = Vec::with_capacity(incoming.len());
        for grad in incoming {
            let param = &layout.chunks[chunk.index()].params[grad.position];
            let overwrite = !std::mem::replace(&mut state.gradients.touched[chunk.index()][grad.position], true);
            let landed = span(landing, param, dtype);
            let size = param.numel as usize * dtype.bytes();
            transfers.push(Transfer { dst: landed.ptr.cast_mut(), src: grad.address as *const u8, bytes: size });
            added.push(Added { offset: param.offset, numel: param.numel, overwrite });
        }
        let moved: u64 = transfers.iter().map(|t| t.bytes as u64).sum();
        self.device.queue_wait(Queue::DeviceToHost, produced)?;
        let start = state.recorder.enabled().then(|| self.device.record(Queue::DeviceToHost)).transpose()?;
        self.device.copy(Queue::DeviceToHost, &transfers)?;
        let landed = self.device.record(Queue::DeviceToHost)?;
        state.recorder.between("d2h", format!("gradients {name}"), moved, start, &landed);
        state.gradients.d2h_bytes += moved;
        state.gradients.in_flight_bytes += bytes;
        let then: Then = match (home, buffer) {
            (None, Some(buffer)) => to_disk(state, chunk, &added, landing, buffer, last)?,
            (Some(home), buffer) => self.in_memory(state, chunk, added, (landing, home), buffer, last)?,
            (None, None) => return Err(Error::Internal(format!("`{name}` has nowhere to land"))),
        };
        // Not by the worker that adds: what has landed leaves room for the next even while earlier ones are being added.
        self.landed_jobs.send(Job::new(Some(landed), move |shared| {
            {
                let mut state = shared.lock();
                state.gradients.in_flight_bytes -= bytes;
                state.gradients.finish([ticket]);
            }
            shared.notify();
            shared.landing_jobs.send(Job::new(None, move |shared| shared.after_moments(chunk, then)))
        }))
    }

    /// Sends a job to the landing worker, behind every gradient that was handed over before.
    fn after_landed(&self, run: impl FnOnce(&Arc<Shared>) -> Result<()> + Send + 'static) -> Result<()> {
        self.landed_jobs.send(Job::new(None, move |shared| shared.landing_jobs.send(Job::new(None, run))))
    }

    /// What follows when a gradient has landed in memory, where it is added to an accumulator if it landed in a `buffer`.
    fn in_memory(
        &self,
        state: &State,
        chunk: ChunkId,
        added: Vec<Added>,
        (landing, home): (u64, u64),
        buffer: Option<usize>,
        last: bool,
    ) -> Result<Then> {
        let layout = state.scheduler.layout();
        let (dtype, sums) = (grad_dtype(layout.precision), final_dtype(layout, true));
        let spans = if last { host_spans(state, self.host, chunk)? } else { Vec::new() };
        Ok(Box::new(move |shared| {
            if let Some(buffer) = buffer {
                let addition = |param: &Added| {
                    let ptr = (landing + param.offset * dtype.bytes() as u64) as *const u8;
                    let dst = (home + param.offset * sums.bytes() as u64) as *mut u8;
                    let src = GradSpan { ptr, dtype, numel: param.numel as usize };
                    Addition { dst, sums, src, overwrite: param.overwrite }
                };
                let additions: Vec<Addition> = added.iter().map(addition).collect();
                shared.host_work(|| additions.iter().map(added_bytes).sum());
                // SAFETY: both ends are in the slab that `shared` keeps alive; the landing buffer is taken until below.
                unsafe { accumulate::add(&shared.pool, &additions) };
                shared.lock().gradients.free_landing(buffer);
                shared.notify();
            }
            if last { reduce_on_host(shared, chunk, &spans) } else { Ok(()) }
        }))
    }

    /// Takes the norm of a chunk whose last gradient came in an earlier micro-batch.
    pub(crate) fn reduce_stale(&self, state: &mut State, chunk: ChunkId) -> Result<()> {
        let plan = state.scheduler.plan();
        if plan.chunks[chunk.index()].class.steps_on_device() || plan.sums_on_device(chunk) {
            let then: Then = Box::new(move |shared| shared.reduce_on_device(&mut shared.lock(), chunk));
            // The sums go where the gradient is that late moments still read.
            return if state.late.wait(chunk, then).is_some() { self.reduce_on_device(state, chunk) } else { Ok(()) };
        }
        if plan.chunks[chunk.index()].spills_grads() {
            let sum = SpilledSum::new(state, chunk, &[], true)?;
            return self.after_landed(move |shared| match sum.run(shared, 0)? {
                Some(sums) => shared.post(&Event::GradLanded { chunk, sums }),
                None => Ok(()),
            });
        }
        let spans = host_spans(state, self.host, chunk)?;
        let then: Then = Box::new(move |shared| reduce_on_host(shared, chunk, &spans));
        self.after_landed(move |shared| shared.after_moments(chunk, then))
    }
}

/// What follows when a gradient has landed in a buffer from where it goes to the disk, or is added to a sum there.
fn to_disk(state: &mut State, chunk: ChunkId, added: &[Added], landing: u64, buffer: usize, last: bool) -> Result<Then> {
    if let Some(spill) = &mut state.spill {
        spill.set_landing(chunk);
    }
    if state.scheduler.plan().accumulation > 1 {
        let sum = SpilledSum::new(state, chunk, added, last)?;
        return Ok(Box::new(move |shared| {
            let Some(sums) = sum.run(shared, landing)? else { return Ok(()) };
            shared.lock().gradients.free_landing(buffer);
            shared.notify();
            SpilledSum::release_when_written(shared, chunk)?;
            if last { shared.post(&Event::GradLanded { chunk, sums }) } else { Ok(()) }
        }));
    }
    let layout = state.scheduler.layout();
    let dtype = grad_dtype(layout.precision);
    let spans: Vec<_> = state.gradients.touched(layout, chunk).map(|(param, _)| (param.index, span(landing, param, dtype))).collect();
    Ok(Box::new(move |shared| {
        // The disk reads it while its norm is taken.
        let writes = shared.write_landed(chunk, landing)?;
        let sums = norms(shared, chunk, &spans);
        shared.free_when_written(chunk, writes, buffer)?;
        shared.post(&Event::GradLanded { chunk, sums })
    }))
}

/// Final gradients of a host-class chunk, by global parameter index.
fn host_spans(state: &State, host: u64, chunk: ChunkId) -> Result<Vec<(u32, GradSpan)>> {
    let layout = state.scheduler.layout();
    let accumulates = state.scheduler.plan().accumulation > 1;
    let dtype = final_dtype(layout, accumulates);
    let grad = state.places[chunk.index()].0.grad.ok_or_else(|| Error::Usage("no host gradient".to_owned()))?;
    Ok(state.gradients.touched(layout, chunk).map(|(param, _)| (param.index, span(host + grad, param, dtype))).collect())
}

/// Bytes of memory that adding a gradient to its accumulator reads and writes.
pub(crate) fn added_bytes(addition: &Addition) -> u64 {
    let Addition { sums, src, overwrite, .. } = addition;
    (src.numel * (src.dtype.bytes() + sums.bytes() * if *overwrite { 1 } else { 2 })) as u64
}

fn reduce_on_host(shared: &Arc<Shared>, chunk: ChunkId, spans: &[(u32, GradSpan)]) -> Result<()> {
    let sums = norms(shared, chunk, spans);
    shared.post(&Event::GradLanded { chunk, sums })
}

/// Sums of squares of gradients in host memory, by global parameter index.
fn norms(shared: &Arc<Shared>, chunk: ChunkId, spans: &[(u32, GradSpan)]) -> Vec<(u32, f64)> {
    shared.host_work(|| spans.iter().map(|(_, span)| span.numel as u64 * span.dtype.bytes() as u64).sum());
    let start = shared.device.now_ns();
    let only: Vec<GradSpan> = spans.iter().map(|(_, span)| *span).collect();
    // SAFETY: the gradients have landed in the slab that `shared` keeps alive, and nothing writes them before their step, or before their
    // landing buffer is freed.
    let sums = unsafe { norm::sum_squares(&shared.pool, &only) };
    let mut state = shared.lock();
    let name = format!("norm {}", state.scheduler.layout().chunks[chunk.index()].name);
    let end = shared.device.now_ns();
    state.recorder.span("host norm", name, 0, start, end);
    spans.iter().map(|(index, _)| *index).zip(sums).collect()
}
