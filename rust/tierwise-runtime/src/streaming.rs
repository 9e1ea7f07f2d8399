//! Optimizer steps of streamed chunks: their states visit the device piece by piece, in stream order; nothing here waits.
//!
//! A piece goes through three queues: its states come in on [`Queue::StatesIn`], are stepped on [`Queue::Optimizer`] after that, and go back
//! on [`Queue::StatesOut`] after that. A buffer is filled again when what was in it has left; the states of a chunk come in again when they
//! are back.

use crate::device::{EventRef, Queue, Transfer};
use crate::engine::{Shared, State};
use crate::error::Result;
use crate::execute::{count_steps, segments, traffic};
use crate::memory::StepBases;
use crate::workers::Job;
use std::ops::Range;
use tierwise_core::ChunkId;
use tierwise_core::layout::{ALIGN_NUMEL, Layout, Precision};
use tierwise_core::plan::{OptimizerClass, Plan};
use tierwise_core::streaming::{STAGING_BUFFERS, piece_numel, pieces};
use tierwise_kernels::AdamSegment;

/// The staging buffers, and what of the host's states is on the device.
pub struct Streaming {
    /// First buffer, in device memory of the caller; 0 if unbound.
    pub address: u64,
    staging_bytes: u64,
    next: usize,
    /// Per buffer: after this event what was in it has left.
    left: [Option<EventRef>; STAGING_BUFFERS as usize],
    /// Per chunk: after this event its states are back on the host.
    back: Vec<Option<EventRef>>,
    /// Chunks whose states nobody has seen come back yet.
    away: usize,
    /// Bytes of states that were sent to visit the device so far.
    pub visited_bytes: u64,
}

impl Streaming {
    /// Everything on the host.
    pub fn new(chunks: usize, staging_bytes: u64) -> Self {
        Streaming { address: 0, staging_bytes, next: 0, left: Default::default(), back: vec![None; chunks], away: 0, visited_bytes: 0 }
    }

    /// Chunks whose states may be on the device.
    pub fn away(&self) -> usize {
        self.away
    }

    /// Whether the states of a chunk may be on the device.
    pub fn chunk_is_away(&self, chunk: ChunkId) -> Result<bool> {
        self.back[chunk.index()].as_ref().map_or(Ok(false), |event| event.is_done().map(|done| !done))
    }

    /// What keeps the streamed chunks of a plan from being stepped, in words.
    pub fn missing(&self, layout: &Layout, plan: &Plan) -> Option<String> {
        let streamed = |c: &ChunkId| plan.chunks[c.index()].class == OptimizerClass::Streamed && layout.state_bytes(*c) > 0;
        layout.ids().find(streamed).and_then(|chunk| self.missing_for(layout, chunk))
    }

    /// What keeps a chunk from being streamed, in words.
    pub fn missing_for(&self, layout: &Layout, chunk: ChunkId) -> Option<String> {
        let chunk = &layout.chunks[chunk.index()].name;
        if piece_numel(layout, self.staging_bytes) == 0 {
            let least = STAGING_BUFFERS * ALIGN_NUMEL * layout.precision.state_bytes();
            let has = self.staging_bytes;
            return Some(format!("the plan has {has} bytes of staging for the states of `{chunk}`; at least {least} are needed"));
        }
        (self.address == 0).then(|| format!("no device memory was bound for staging the states of `{chunk}`; call bind_staging"))
    }

    /// The next buffer: its number, its address, and what has to be over before it is filled.
    fn take(&mut self) -> (usize, u64, Option<EventRef>) {
        let number = self.next;
        self.next = (number + 1) % self.left.len();
        (number, self.address + number as u64 * (self.staging_bytes / STAGING_BUFFERS), self.left[number].clone())
    }
}

/// One piece of a chunk: where its states are at home, and where they visit.
struct Visit {
    /// (home, buffer, bytes) of master completion and both moments.
    payloads: [(u64, u64, u64); 3],
    segments: Vec<AdamSegment>,
}

impl Visit {
    /// A piece in a buffer; `whole` are the segments of the chunk with its states at `home`.
    fn new(piece: &Range<u64>, home: &StepBases, buffer: u64, precision: Precision, whole: &[(u64, AdamSegment)]) -> Self {
        let numel = piece.end - piece.start;
        let mut at = buffer;
        let payloads = [(home.master, precision.master_bytes()), (home.exp_avg, 4), (home.exp_avg_sq, 4)].map(|(base, size)| {
            let visit = (base + piece.start * size, at, numel * size);
            at += numel * size;
            visit
        });
        let [master, exp_avg, exp_avg_sq] = payloads.map(|(_, buffer, _)| buffer);
        let cut = |&(offset, segment): &(u64, AdamSegment)| {
            let (from, to) = (piece.start.max(offset), piece.end.min(offset + segment.numel as u64));
            (from < to).then(|| {
                let (skipped, inside) = ((from - offset) as usize, from - piece.start);
                AdamSegment {
                    numel: (to - from) as usize,
                    param: segment.param.wrapping_add(skipped * precision.param_bytes() as usize),
                    grad: segment.grad.wrapping_add(skipped * segment.grad_dtype.bytes()),
                    master: if segment.master.is_null() { segment.master } else { (master + inside * precision.master_bytes()) as *mut u8 },
                    exp_avg: (exp_avg + inside * 4) as *mut f32,
                    exp_avg_sq: (exp_avg_sq + inside * 4) as *mut f32,
                    ..segment
                }
            })
        };
        Visit { payloads, segments: whole.iter().filter_map(cut).collect() }
    }

    fn bytes(&self) -> u64 {
        self.payloads.iter().map(|(_, _, bytes)| bytes).sum()
    }

    /// The copies to the buffer, or back home.
    fn transfers(&self, inwards: bool) -> Vec<Transfer> {
        let payloads = self.payloads.iter().filter(|(_, _, bytes)| *bytes > 0);
        payloads
            .map(|&(home, buffer, bytes)| {
                let (dst, src) = if inwards { (buffer, home) } else { (home, buffer) };
                Transfer { dst: dst as *mut u8, src: src as *const u8, bytes: bytes as usize }
            })
            .collect()
    }
}

impl Shared {
    /// Enqueues the step of a streamed chunk.
    pub(crate) fn step_streamed(&self, state: &mut State, chunk: ChunkId, grad_scale: f32) -> Result<()> {
        count_steps(state, chunk);
        let layout = state.scheduler.layout();
        let (name, precision) = (layout.chunks[chunk.index()].name.clone(), layout.precision);
        let (host, device) = state.places[chunk.index()];
        let address = |offset: Option<u64>| offset.map_or(0, |o| self.host + o);
        let home = StepBases {
            param: device.param,
            master: address(host.master),
            exp_avg: address(host.exp_avg),
            exp_avg_sq: address(host.exp_avg_sq),
        };
        let whole = segments(state, &state.commit_hyper.clone(), chunk, &home, device.accumulator, grad_scale, 0)?;
        let touched: Vec<(u64, u32)> = state.gradients.touched(layout, chunk).map(|(param, _)| (param.offset, param.index)).collect();
        let stepped = |position: usize| touched.iter().any(|(_, index)| *index == layout.chunks[chunk.index()].params[position].index);
        let pieces = pieces(layout, chunk, state.streaming.staging_bytes, stepped);
        let whole: Vec<(u64, AdamSegment)> = touched.iter().map(|(offset, _)| *offset).zip(whole).collect();
        if let Some(event) = state.commit_event.as_ref().filter(|_| !pieces.is_empty()) {
            self.device.queue_wait(Queue::Optimizer, event)?;
        }
        if let Some(event) = &state.streaming.back[chunk.index()] {
            self.device.queue_wait(Queue::StatesIn, event)?;
        }
        let mut last = None;
        for piece in &pieces {
            let (number, buffer, left) = state.streaming.take();
            let visit = Visit::new(piece, &home, buffer, precision, &whole);
            let (stepped, back) = self.visit(state, &visit, left, &name, precision)?;
            state.streaming.left[number] = Some(back.clone());
            last = Some((stepped, back));
        }
        let tickets = state.gradients.clear(chunk);
        let Some((stepped, back)) = last else {
            state.gradients.finish(tickets);
            return Ok(());
        };
        state.written[chunk.index()] = Some(stepped.clone());
        if !tickets.is_empty() {
            self.finish_after(stepped, tickets)?;
        }
        state.streaming.back[chunk.index()] = Some(back.clone());
        state.streaming.away += 1;
        self.states_jobs.send(Job::new(Some(back), |shared| {
            shared.lock().streaming.away -= 1;
            shared.notify();
            Ok(())
        }))
    }

    /// Enqueues one piece; gives the events of its step and of its return.
    fn visit(
        &self,
        state: &mut State,
        visit: &Visit,
        left: Option<EventRef>,
        name: &str,
        precision: Precision,
    ) -> Result<(EventRef, EventRef)> {
        let recording = state.recorder.enabled();
        let start = |queue: Queue| recording.then(|| self.device.record(queue)).transpose();
        let bytes = visit.bytes();
        if let Some(left) = left {
            self.device.queue_wait(Queue::StatesIn, &left)?;
        }
        let started = start(Queue::StatesIn)?;
        self.device.copy(Queue::StatesIn, &visit.transfers(true))?;
        let inside = self.device.record(Queue::StatesIn)?;
        state.recorder.between("states in", format!("states {name}"), bytes, started, &inside);
        self.device.queue_wait(Queue::Optimizer, &inside)?;
        let started = start(Queue::Optimizer)?;
        self.device.adam(&visit.segments)?;
        let stepped = self.device.record(Queue::Optimizer)?;
        let moved = visit.segments.iter().map(|s| s.numel as u64 * traffic(precision)).sum();
        state.recorder.between("device optimizer", format!("step {name}"), moved, started, &stepped);
        self.device.queue_wait(Queue::StatesOut, &stepped)?;
        let started = start(Queue::StatesOut)?;
        self.device.copy(Queue::StatesOut, &visit.transfers(false))?;
        let back = self.device.record(Queue::StatesOut)?;
        state.recorder.between("states out", format!("states {name}"), bytes, started, &back);
        state.gradients.h2d_bytes += bytes;
        state.gradients.d2h_bytes += bytes;
        state.streaming.visited_bytes += bytes;
        Ok((stepped, back))
    }
}
