//! Parameters whose home is the spill file, on their way into the streaming slab: read into a few buffers of their own, and copied from there.
//!
//! The scheduler counts a fetch as done when it asks for it; whoever reads the chunk waits here until its last copy was submitted, and then
//! for that copy's event. Meanwhile the scheduler may give the slot to another chunk, or the chunk another slot: what belongs to an earlier
//! request is dropped when it comes in, under the same lock under which slots are given away.

use super::{PAYLOADS, chunk_name, param_key, spill};
use crate::device::{Queue, Transfer as Copy};
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::workers::Job;
use std::collections::VecDeque;
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::plan::NvmePlan;
use tierwise_core::staging::PieceId;
use tierwise_io::Priority;
use tierwise_io::buffer::Buffer;

/// A request of the scheduler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Request {
    number: u64,
    chunk: ChunkId,
    /// First byte of its slot.
    offset: u64,
    /// Pieces whose copy was not submitted yet.
    left: usize,
}

/// What is on its way.
pub(super) struct Fetches {
    /// Per chunk: whether it is fetched at all.
    of: Vec<bool>,
    /// Per chunk: the latest request, while it is not carried out.
    pending: Vec<Option<Request>>,
    /// Pieces that no buffer was free for, by request.
    waiting: VecDeque<(Request, PieceId)>,
    free: Vec<u32>,
    buffers: u32,
    base: u64,
    buffer_bytes: u64,
    requests: u64,
    bytes: u64,
}

impl Fetches {
    pub fn new(of: Vec<bool>, base: u64, plan: NvmePlan) -> Fetches {
        Fetches {
            pending: vec![None; of.len()],
            of,
            waiting: VecDeque::new(),
            free: (0..plan.fetch_buffers).collect(),
            buffers: plan.fetch_buffers,
            base,
            buffer_bytes: plan.fetch_buffer_bytes,
            requests: 0,
            bytes: 0,
        }
    }

    /// Whether the parameters of a chunk are fetched.
    pub fn of(&self, chunk: ChunkId) -> bool {
        self.of[chunk.index()]
    }

    pub fn is_pending(&self, chunk: ChunkId) -> bool {
        self.pending[chunk.index()].is_some()
    }

    /// Whether a request is not carried out, or the disk or the device has a buffer.
    pub fn is_busy(&self) -> bool {
        self.free.len() < self.buffers as usize || self.pending.iter().any(Option::is_some)
    }

    /// Bytes that were read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The chunk lost the slot that it was asked into; nobody waits for it, or it would be in use and have kept it.
    fn give_up(&mut self, request: Request) {
        let pending = &mut self.pending[request.chunk.index()];
        if pending.is_some_and(|pending| pending.number == request.number) {
            *pending = None;
        }
    }

    fn address(&self, buffer: u32) -> u64 {
        self.base + u64::from(buffer) * self.buffer_bytes
    }
}

/// Whether a request still counts: the chunk was not asked for again, and has the slot that it was asked into.
fn is_current(state: &State, request: Request) -> bool {
    let pending = state.spill.as_ref().and_then(|spill| spill.fetches.pending[request.chunk.index()]);
    pending.is_some_and(|pending| pending.number == request.number) && state.scheduler.slot(request.chunk) == Some(request.offset)
}

impl Shared {
    /// Starts to read a chunk's parameters for its slot. Whoever read that slot before was waited for on the way to the device.
    pub(crate) fn fetch_spilled(&self, state: &mut State, chunk: ChunkId, offset: u64) -> Result<()> {
        state.written[chunk.index()] = None;
        let spill = spill(state)?;
        let pieces: Vec<PieceId> = spill.pieces.of_chunk(chunk).collect();
        let request = Request { number: spill.fetches.requests, chunk, offset, left: pieces.len() };
        spill.fetches.requests += 1;
        spill.fetches.pending[chunk.index()] = (!pieces.is_empty()).then_some(request);
        spill.fetches.waiting.extend(pieces.into_iter().map(|piece| (request, piece)));
        self.read_fetched(state)
    }

    /// Gives waiting pieces to the disk while there are buffers.
    fn read_fetched(&self, state: &mut State) -> Result<()> {
        while let Some(&(request, id)) = spill(state)?.fetches.waiting.front() {
            if !is_current(state, request) {
                let fetches = &mut spill(state)?.fetches;
                fetches.waiting.pop_front();
                fetches.give_up(request);
                continue;
            }
            let name = chunk_name(state, request.chunk).to_owned();
            let spill = spill(state)?;
            let Some(buffer) = spill.fetches.free.pop() else { break };
            spill.fetches.waiting.pop_front();
            let (piece, generation) = (spill.pieces.get(id), spill.staging.generation(id));
            let (address, bytes) = (spill.fetches.address(buffer), piece.numel * spill.elements[piece.chunk.index()][0]);
            spill.fetches.bytes += bytes;
            if generation == 0 {
                // SAFETY: the buffer is in the slab that `self` keeps alive, and was free.
                unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
                self.fetch_jobs[0].send(Job::new(None, move |shared| shared.copy_fetched(request, id, buffer)))?;
                continue;
            }
            let Some(store) = &spill.store else { return Err(Error::Stopped("the spill file is closed".to_owned())) };
            let path = store.setup().directory.clone();
            let what = format!("spilled {} of `{name}`, elements {} to {}", PAYLOADS[0], piece.first, piece.first + piece.numel);
            // SAFETY: the store is closed before the slab is freed, and the buffer is free again only after the read and its copy.
            let mut target = unsafe { Buffer::new(address as *mut u8, bytes as usize) };
            // Compute waits for it, or will soon; states are read far ahead.
            let ticket = store.read(param_key(spill.key(id)), generation, &mut target, Priority::Demand);
            let ticket = ticket.map_err(|source| Error::Storage { what: what.clone(), path: path.clone(), source: Box::new(source) })?;
            let submitted = self.device.now_ns();
            self.fetch_jobs[0].send(Job::new(None, move |shared| {
                ticket.wait().map_err(|source| Error::Storage { what, path, source: Box::new(source) })?;
                let mut state = shared.lock();
                let end = shared.device.now_ns();
                let spill = super::spill(&mut state)?;
                let start = spill.last_end_ns[2].max(submitted);
                spill.last_end_ns[2] = end;
                state.recorder.span("nvme fetch", format!("fetch {name}"), bytes, start, end);
                drop(state);
                shared.copy_fetched(request, id, buffer)
            }))?;
        }
        Ok(())
    }

    /// A piece was read: it goes to the device, if it is still wanted.
    fn copy_fetched(self: &Arc<Self>, request: Request, id: PieceId, buffer: u32) -> Result<()> {
        let mut guard = self.lock();
        let state = &mut *guard;
        if !is_current(state, request) {
            let fetches = &mut spill(state)?.fetches;
            fetches.free.push(buffer);
            fetches.give_up(request);
            let outcome = self.read_fetched(state);
            self.or_stop(state, outcome)?;
            drop(guard);
            self.notify();
            return Ok(());
        }
        let name = chunk_name(state, request.chunk).to_owned();
        let slab = state.slab_address;
        let spill = spill(state)?;
        let piece = spill.pieces.get(id);
        let element = spill.elements[piece.chunk.index()][0];
        let (src, bytes) = (spill.fetches.address(buffer), piece.numel * element);
        let dst = slab + request.offset + piece.first * element;
        let start = state.recorder.enabled().then(|| self.device.record(Queue::HostToDevice)).transpose()?;
        self.device.copy(Queue::HostToDevice, &[Copy { dst: dst as *mut u8, src: src as *const u8, bytes: bytes as usize }])?;
        let copied = self.device.record(Queue::HostToDevice)?;
        state.recorder.between("h2d", format!("fetch {name}"), bytes, start, &copied);
        state.gradients.h2d_bytes += bytes;
        // Copies of one queue are in order: the event of the last says that all are done.
        state.written[request.chunk.index()] = Some(copied.clone());
        let pending = &mut super::spill(state)?.fetches.pending[request.chunk.index()];
        if let Some(request) = pending {
            request.left -= 1;
            if request.left == 0 {
                *pending = None;
            }
        }
        drop(guard);
        self.notify();
        self.fetch_jobs[1].send(Job::new(Some(copied), move |shared| {
            let mut state = shared.lock();
            super::spill(&mut state)?.fetches.free.push(buffer);
            let outcome = shared.read_fetched(&mut state);
            shared.or_stop(&mut state, outcome)?;
            drop(state);
            shared.notify();
            Ok(())
        }))
    }
}
