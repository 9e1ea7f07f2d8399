//! Parameters whose home is the spill file, on their way into the streaming slab: read into a few buffers of their own, and copied from there
//! (see [`tierwise_core::fetching`]). What a request still means is decided under the same lock under which slots are given away.

use super::{PAYLOADS, await_clock, chunk_name, param_key, spill};
use crate::device::{Queue, Transfer as Copy};
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::workers::Job;
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::fetching::{FetchRequest, Fetching};
use tierwise_core::plan::NvmePlan;
use tierwise_core::staging::PieceId;
use tierwise_io::buffer::Buffer;
use tierwise_io::{Direction, Priority};

/// What is on its way.
pub(super) struct Fetches {
    /// Per chunk: whether it is fetched at all.
    of: Vec<bool>,
    pub fetching: Fetching,
    base: u64,
    buffer_bytes: u64,
    bytes: u64,
}

impl Fetches {
    pub fn new(of: Vec<bool>, base: u64, plan: NvmePlan) -> Fetches {
        Fetches { fetching: Fetching::new(of.len(), plan.fetch_buffers), of, base, buffer_bytes: plan.fetch_buffer_bytes, bytes: 0 }
    }

    /// Whether the parameters of a chunk are fetched.
    pub fn of(&self, chunk: ChunkId) -> bool {
        self.of[chunk.index()]
    }

    /// Bytes that were read so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn address(&self, buffer: u32) -> u64 {
        self.base + u64::from(buffer) * self.buffer_bytes
    }
}

impl Shared {
    /// Starts to read a chunk's parameters for its slot. Whoever read that slot before was waited for on the way to the device.
    pub(crate) fn fetch_spilled(&self, state: &mut State, chunk: ChunkId, offset: u64) -> Result<()> {
        state.written[chunk.index()] = None;
        let spill = spill(state)?;
        let pieces: Vec<PieceId> = spill.pieces.of_chunk(chunk).collect();
        spill.fetches.fetching.ask(chunk, offset, pieces);
        self.read_fetched(state)
    }

    /// Gives waiting pieces to the disk while there are buffers.
    fn read_fetched(&self, state: &mut State) -> Result<()> {
        loop {
            let State { scheduler, spill, .. } = &mut *state;
            let next = spill.as_mut().and_then(|spill| spill.fetches.fetching.next(|chunk| scheduler.slot(chunk)));
            let Some((request, id, buffer)) = next else { return Ok(()) };
            let name = chunk_name(state, request.chunk).to_owned();
            let spill = super::spill(state)?;
            let (piece, generation) = (spill.pieces.get(id), spill.staging.generation(id));
            let (address, bytes) = (spill.fetches.address(buffer), piece.numel * spill.elements[piece.chunk.index()][0]);
            spill.fetches.bytes += bytes;
            if generation == 0 {
                // SAFETY: the buffer is in the slab that `self` keeps alive, and was free.
                unsafe { std::ptr::write_bytes(address as *mut u8, 0, bytes as usize) };
                self.copy_fetched(state, request, id, buffer)?;
                continue;
            }
            let Some(store) = &spill.store else { return Err(Error::Stopped("the spill file is closed".to_owned())) };
            let path = store.setup().directory.clone();
            let what = format!("spilled {} of `{name}`, elements {} to {}", PAYLOADS[0], piece.first, piece.first + piece.numel);
            // SAFETY: the store is closed before the slab is freed, and the buffer is free again only after the read and its copy.
            let mut target = unsafe { Buffer::new(address as *mut u8, bytes as usize) };
            // Compute waits for it, or will soon; states are read far ahead.
            let key = param_key(spill.key(id));
            let ticket = store.read(key, generation, &mut target, Priority::Demand);
            let ends = self.disk_work(key, Direction::Read, bytes, Priority::Demand);
            let submitted = self.device.now_ns();
            self.fetch_jobs[0].send(Job::new(None, move |shared| {
                shared.await_disk(&ticket, |source| Error::Storage { what, path, source: Box::new(source) })?;
                await_clock(ends.as_ref())?;
                let mut state = shared.lock();
                let end = shared.device.now_ns();
                let spill = super::spill(&mut state)?;
                let start = spill.last_end_ns[2].max(submitted);
                spill.last_end_ns[2] = end;
                state.recorder.span("nvme fetch", format!("fetch {name}"), bytes, start, end);
                let outcome = shared.copy_fetched(&mut state, request, id, buffer).and_then(|wanted| {
                    // What nobody wants any more leaves its buffer to the next.
                    if wanted { Ok(()) } else { shared.read_fetched(&mut state) }
                });
                shared.or_stop(&mut state, outcome)?;
                drop(state);
                shared.notify();
                Ok(())
            }))?;
        }
    }

    /// A piece is there: it goes to the device, if it is still wanted.
    fn copy_fetched(&self, state: &mut State, request: FetchRequest, id: PieceId, buffer: u32) -> Result<bool> {
        let State { scheduler, spill, .. } = &mut *state;
        let wanted = spill.as_mut().is_some_and(|s| s.fetches.fetching.was_read(request, buffer, |chunk| scheduler.slot(chunk)));
        if !wanted {
            return Ok(false);
        }
        let name = chunk_name(state, request.chunk).to_owned();
        let slab = state.slab_address;
        let spill = super::spill(state)?;
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
        let freed = Job::new(Some(copied), move |shared: &Arc<Shared>| {
            let mut state = shared.lock();
            super::spill(&mut state)?.fetches.fetching.was_copied(buffer);
            let outcome = shared.read_fetched(&mut state);
            shared.or_stop(&mut state, outcome)?;
            drop(state);
            shared.notify();
            Ok(())
        });
        self.fetch_jobs[1].send(freed)?;
        Ok(true)
    }
}
