//! The way of gradients: from where autograd put them to where their step reads them, and their norm there.

mod landing;

pub(crate) use landing::{Then, added_bytes};

use crate::device::{Addition, ComputeStream, EventRef, Queue, Transfer};
use crate::engine::{Hyper, KeepWaiting, Shared, State};
use crate::error::{Error, Result};
use crate::memory::{final_dtype, grad_dtype, span};
use crate::workers::Job;
use std::sync::MutexGuard;
use tierwise_core::ChunkId;
use tierwise_core::layout::{Layout, ParamLayout};
use tierwise_core::plan::OptimizerClass;
use tierwise_core::scheduler::{Event, Progress};
use tierwise_kernels::GradSpan;

/// Gradients of the step in progress.
pub struct Gradients {
    /// Address of one f64 per parameter in page-locked memory: sums of squares taken on the device.
    norms: u64,
    /// Landing buffers of gradients that are added to accumulators on the host, or go on to the disk.
    staging: Vec<u64>,
    staging_free: Vec<bool>,
    /// Per chunk and position: got a gradient in this step.
    touched: Vec<Vec<bool>>,
    /// Per chunk and position: address of the gradient that a device step will read (without accumulation).
    addresses: Vec<Vec<u64>>,
    /// Per chunk: tickets whose tensors a device step will read.
    held: Vec<Vec<u64>>,
    next_ticket: u64,
    finished: u64,
    done: Vec<u64>,
    in_flight_bytes: u64,
    /// Bytes copied to the device so far.
    pub h2d_bytes: u64,
    /// Bytes copied from the device so far.
    pub d2h_bytes: u64,
}

impl Gradients {
    /// Nothing handed over.
    pub fn new(layout: &Layout, norms: u64, staging: Vec<u64>) -> Self {
        Gradients {
            norms,
            staging_free: vec![true; staging.len()],
            staging,
            touched: layout.chunks.iter().map(|c| vec![false; c.params.len()]).collect(),
            addresses: layout.chunks.iter().map(|c| vec![0; c.params.len()]).collect(),
            held: vec![Vec::new(); layout.chunks.len()],
            next_ticket: 0,
            finished: 0,
            done: Vec::new(),
            in_flight_bytes: 0,
            h2d_bytes: 0,
            d2h_bytes: 0,
        }
    }

    /// Finished tickets.
    pub fn collect(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.done)
    }

    /// Forgets a chunk's gradients; gives the tickets that were held for its step.
    pub fn clear(&mut self, chunk: ChunkId) -> Vec<u64> {
        self.touched[chunk.index()].fill(false);
        self.addresses[chunk.index()].fill(0);
        std::mem::take(&mut self.held[chunk.index()])
    }

    /// What has landed in a buffer was taken out of it.
    pub fn free_landing(&mut self, buffer: usize) {
        self.staging_free[buffer] = true;
    }

    /// Tickets whose tensors nothing reads any more.
    pub fn finish(&mut self, tickets: impl IntoIterator<Item = u64>) {
        let before = self.done.len();
        self.done.extend(tickets);
        self.finished += (self.done.len() - before) as u64;
    }

    /// Whether something still reads gradients other than those that wait for a step.
    pub fn has_readers(&self) -> bool {
        self.staging_free.contains(&false) || self.next_ticket - self.finished > self.held.iter().map(|held| held.len() as u64).sum()
    }

    /// Refuses a step of parameters that no group holds, before anything of it is done.
    pub fn check_hyper(&self, layout: &Layout, hyper: &Hyper) -> Result<()> {
        let mut touched = layout.ids().flat_map(|chunk| self.touched(layout, chunk));
        let missing = touched.find(|(param, _)| hyper.group_of_param.get(param.index as usize).copied().flatten().is_none());
        missing.map_or(Ok(()), |(param, _)| {
            Err(Error::Usage(format!("no hyperparameters were set for `{}`; call set_hyper before the step", param.name)))
        })
    }

    /// Parameters of a chunk that got a gradient in this step, with the address a device step reads (0: the accumulator).
    pub fn touched<'a>(&'a self, layout: &'a Layout, chunk: ChunkId) -> impl Iterator<Item = (&'a ParamLayout, u64)> + 'a {
        let touched = &self.touched[chunk.index()];
        let addresses = &self.addresses[chunk.index()];
        layout.chunks[chunk.index()].params.iter().enumerate().filter(|&(i, _)| touched[i]).map(|(i, param)| (param, addresses[i]))
    }
}

/// Where a gradient comes from and which parameter it belongs to.
struct Incoming {
    position: usize,
    address: u64,
}

impl Shared {
    /// Takes over the gradients of a chunk; see [`crate::engine::Engine::grads`].
    pub(crate) fn hand_over<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        chunk: ChunkId,
        grads: &[(usize, u64)],
        stream: ComputeStream,
        keep_waiting: KeepWaiting<'_>,
    ) -> Result<u64> {
        let layout = state.scheduler.layout();
        let Some(chunk_layout) = layout.chunks.get(chunk.index()) else {
            return Err(Error::Usage(format!("chunk {} does not exist", chunk.0)));
        };
        let mut incoming = Vec::with_capacity(grads.len());
        for &(position, address) in grads {
            match chunk_layout.params.get(position) {
                Some(param) if param.trainable && address != 0 => incoming.push(Incoming { position, address }),
                _ => return Err(Error::Usage(format!("no trainable parameter {position} in `{}`", chunk_layout.name))),
            }
        }
        let class = state.scheduler.plan().chunks[chunk.index()].class;
        let accumulates = state.scheduler.plan().accumulation > 1;
        let sums_on_device = state.scheduler.plan().sums_on_device(chunk);
        let bytes = layout.grad_bytes(chunk);
        let bound = state.places[chunk.index()].1;
        if layout.state_bytes(chunk) > 0 {
            let lacks_states = class == OptimizerClass::Device && bound.states == 0;
            if lacks_states || sums_on_device && bound.accumulator == 0 {
                let missing = if lacks_states { "states" } else { "accumulator" };
                return Err(Error::Usage(format!("no device memory was bound for {missing} of `{}`", chunk_layout.name)));
            }
        }
        let leaves = class.on_cpu() && !sums_on_device;
        let lands = accumulates || state.scheduler.plan().chunks[chunk.index()].spills_grads();
        let limit = state.scheduler.plan().grad_in_flight_bytes;
        let has_room = |state: &mut State| {
            let gradients = &state.gradients;
            let room = gradients.in_flight_bytes == 0 || gradients.in_flight_bytes + bytes <= limit;
            // One write of a piece at a time: what came before, and may have been dropped, is on the disk first.
            let written = !state.spill.as_ref().is_some_and(|spill| spill.lands(chunk));
            !leaves || room && written && (!lands || gradients.staging_free.contains(&true))
        };
        let handed = Event::GradsHanded { chunk };
        let mut waited_from = None;
        if !has_room(&mut state) || self.apply(&mut state, &handed)? != Progress::Done {
            // The compute stream runs dry while this thread cannot give it more.
            waited_from = Some(self.device.record_compute(stream)?);
            state = self.wait_until(state, keep_waiting, has_room)?;
            state = self.apply_waiting(state, keep_waiting, &handed)?;
        }
        let state = &mut *state;
        let last = state.scheduler.is_last_backward();
        let ticket = state.gradients.next_ticket;
        state.gradients.next_ticket += 1;
        // The scheduler counts on what follows.
        let produced = self.device.record_compute(stream);
        let produced = self.or_stop(state, produced)?;
        if let Some(before) = waited_from {
            let name = format!("gradients {}", state.scheduler.layout().chunks[chunk.index()].name);
            state.recorder.wait(&name, before, produced.clone());
        }
        let outcome = match class {
            OptimizerClass::Frozen => Err(Error::Usage(format!("chunk {} is frozen", chunk.0))),
            _ if leaves => self.to_host(state, chunk, &incoming, ticket, &produced, last),
            _ => self.to_device(state, chunk, &incoming, ticket, &produced, last),
        };
        self.or_stop(state, outcome)?;
        Ok(ticket)
    }

    fn to_device(
        &self,
        state: &mut State,
        chunk: ChunkId,
        incoming: &[Incoming],
        ticket: u64,
        produced: &EventRef,
        last: bool,
    ) -> Result<()> {
        let layout = state.scheduler.layout();
        let dtype = grad_dtype(layout.precision);
        let accumulates = state.scheduler.plan().accumulation > 1;
        let sums = final_dtype(layout, accumulates);
        self.device.queue_wait(Queue::Optimizer, produced)?;
        let mut additions = Vec::new();
        for grad in incoming {
            let param = &layout.chunks[chunk.index()].params[grad.position];
            let first = !std::mem::replace(&mut state.gradients.touched[chunk.index()][grad.position], true);
            if accumulates {
                let dst = (state.places[chunk.index()].1.accumulator + param.offset * sums.bytes() as u64) as *mut u8;
                let src = GradSpan { ptr: grad.address as *const u8, dtype, numel: param.numel as usize };
                additions.push(Addition { dst, sums, src, overwrite: first });
            } else {
                state.gradients.addresses[chunk.index()][grad.position] = grad.address;
            }
        }
        if accumulates {
            self.device.accumulate(&additions)?;
            let added = self.device.record(Queue::Optimizer)?;
            self.optimizer_jobs.send(Job::new(Some(added), move |shared| {
                shared.lock().gradients.finish([ticket]);
                shared.notify();
                Ok(())
            }))?;
        } else {
            state.gradients.held[chunk.index()].push(ticket);
        }
        if last { self.reduce_on_device(state, chunk) } else { Ok(()) }
    }

    /// Takes the norm of a final gradient that is on the device; one that the host steps leaves for there.
    fn reduce_on_device(&self, state: &mut State, chunk: ChunkId) -> Result<()> {
        let layout = state.scheduler.layout();
        let accumulator = state.places[chunk.index()].1.accumulator;
        let dtype = grad_dtype(layout.precision);
        let sums = final_dtype(layout, true);
        let norms = state.gradients.norms;
        let mut spans = Vec::new();
        let mut indices = Vec::new();
        for (param, address) in state.gradients.touched(layout, chunk) {
            spans.push(match address {
                0 => span(accumulator, param, sums),
                address => GradSpan { ptr: address as *const u8, dtype, numel: param.numel as usize },
            });
            indices.push(param.index);
        }
        // Parameters of a chunk are numbered in a row, so the results of any subset fit from its first index on.
        let out = norms + u64::from(indices.first().copied().unwrap_or(0)) * 8;
        self.device.sum_squares(&spans, out as *mut f64)?;
        let reduced = self.device.record(Queue::Optimizer)?;
        let (done, jobs) = match state.scheduler.plan().chunks[chunk.index()].class {
            OptimizerClass::Host | OptimizerClass::Nvme => (self.send_sums(state, chunk, &reduced)?, &self.landed_jobs),
            OptimizerClass::Device | OptimizerClass::Streamed | OptimizerClass::Frozen => (reduced, &self.optimizer_jobs),
        };
        jobs.send(Job::new(Some(done), move |shared| {
            let sums = indices
                .iter()
                .enumerate()
                // SAFETY: the slab in `shared` keeps the memory alive; the event says that the device has written it.
                .map(|(i, &index)| (index, unsafe { *(out as *const f64).add(i) }))
                .collect();
            shared.post(&Event::GradLanded { chunk, sums })
        }))
    }

    /// Copies sums of gradients that were taken on the device to where the host's step reads them; gives the event of their arrival.
    fn send_sums(&self, state: &mut State, chunk: ChunkId, ready: &EventRef) -> Result<EventRef> {
        let layout = state.scheduler.layout();
        let name = layout.chunks[chunk.index()].name.clone();
        let (host, device) = state.places[chunk.index()];
        let home = self.host + host.grad.ok_or_else(|| Error::Internal(format!("`{name}` has no host gradient")))?;
        let transfers: Vec<Transfer> = state
            .gradients
            .touched(layout, chunk)
            .map(|(param, _)| {
                let offset = param.offset * layout.sum_bytes();
                Transfer {
                    dst: (home + offset) as *mut u8,
                    src: (device.accumulator + offset) as *const u8,
                    bytes: (param.numel * layout.sum_bytes()) as usize,
                }
            })
            .collect();
        let moved: u64 = transfers.iter().map(|t| t.bytes as u64).sum();
        self.device.queue_wait(Queue::DeviceToHost, ready)?;
        let start = state.recorder.enabled().then(|| self.device.record(Queue::DeviceToHost)).transpose()?;
        self.device.copy(Queue::DeviceToHost, &transfers)?;
        let landed = self.device.record(Queue::DeviceToHost)?;
        state.recorder.between("d2h", format!("gradient sums {name}"), moved, start, &landed);
        state.gradients.d2h_bytes += moved;
        Ok(landed)
    }
}
