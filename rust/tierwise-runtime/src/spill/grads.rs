//! Spilled gradients: from where they land to the disk, and back with the states of their piece.
//!
//! A gradient lands whole in one of two buffers, as those do that are added to accumulators, and is written from there, piece by piece; the
//! landing buffer is free again when the disk has all of it. Its step reads it into buffers of a piece's gradient each. The norm is taken
//! where it lands, or where the last micro-batch is added (see `sums`). Who reads a generation that is still on its way to the disk waits for
//! it inside the store, so a gradient counts as landed as soon as its writes were submitted.
//!
//! Nobody waits for ever: landing buffers wait for writes only, writes for nobody; a step gives a gradient buffer back without needing
//! another, and reads in the order in which pieces are stepped.

use super::{Spill, await_clock, chunk_name, spill};
use crate::device::EventRef;
use crate::engine::{Shared, State};
use crate::error::{Error, Result};
use crate::workers::Job;
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::grad_buffers::{GradBuffers, GradRead};
use tierwise_core::layout::Layout;
use tierwise_core::plan::{ChunkPlan, HOST_REGION_ALIGN, NvmePlan, Plan};
use tierwise_core::staging::{Piece, PieceId};
use tierwise_io::buffer::Buffer;
use tierwise_io::error::Result as DiskResult;
use tierwise_io::ticket::Ticket;
use tierwise_io::{Direction, Key, Priority};

/// A transfer of one piece's gradient.
pub(super) struct GradTransfer {
    /// Or why it could not even be submitted.
    ticket: DiskResult<Ticket>,
    /// When it ends by the clock, where there is one.
    ends: Option<EventRef>,
    direction: Direction,
    chunk: ChunkId,
    /// For people: of what.
    what: String,
    bytes: u64,
    submitted: u64,
    path: Option<std::path::PathBuf>,
}

/// What is known of spilled gradients.
pub(super) struct Grads {
    /// Which piece's gradient is in which buffer.
    pub buffers: GradBuffers,
    base: u64,
    buffer_bytes: u64,
    /// Bytes of an element: of a gradient, or of a sum.
    element: u64,
    /// Per chunk: whether what was handed over last is not all on the disk yet.
    landing: Vec<bool>,
    bytes: u64,
}

impl Grads {
    /// Their buffers are the last of what ends at `end`.
    pub fn new(layout: &Layout, plan: &Plan, nvme: NvmePlan, pieces: usize, end: u64, alignment: u64) -> Result<Grads> {
        let element = layout.final_grad_element(plan.accumulation);
        let spilled = plan.chunks.iter().any(ChunkPlan::spills_grads);
        let bytes = nvme.piece_numel * layout.precision.grad_bytes().min(element);
        if spilled && !(bytes.is_multiple_of(alignment) && HOST_REGION_ALIGN.is_multiple_of(alignment)) {
            return Err(Error::Usage(format!(
                "the disk asks for addresses that are multiples of {alignment}, which those of a piece's gradient ({bytes} bytes) need not be; \
                 raise host_budget, so that gradients stay in memory, or name another disk"
            )));
        }
        if spilled && (nvme.grad_buffers == 0 || nvme.grad_buffer_bytes < nvme.piece_numel * element) {
            return Err(Error::Usage(format!(
                "the plan spills gradients, but has {} buffers of {} bytes for pieces of {}",
                nvme.grad_buffers,
                nvme.grad_buffer_bytes,
                nvme.piece_numel * element
            )));
        }
        Ok(Grads {
            buffers: GradBuffers::new(pieces, nvme.grad_buffers),
            base: end - u64::from(nvme.grad_buffers) * nvme.grad_buffer_bytes,
            buffer_bytes: nvme.grad_buffer_bytes,
            element,
            landing: vec![false; layout.chunks.len()],
            bytes: 0,
        })
    }

    /// Address of a buffer.
    pub fn address(&self, buffer: u32) -> u64 {
        self.base + u64::from(buffer) * self.buffer_bytes
    }

    /// Bytes of an element.
    pub fn element(&self) -> u64 {
        self.element
    }

    pub fn lands(&self, chunk: ChunkId) -> bool {
        self.landing[chunk.index()]
    }

    pub fn set_landing(&mut self, chunk: ChunkId, lands: bool) {
        self.landing[chunk.index()] = lands;
    }

    pub fn is_busy(&self) -> bool {
        self.buffers.is_busy() || self.landing.contains(&true)
    }

    /// Bytes that were read and written so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Spill {
    /// The name of a piece's gradient on the disk.
    fn grad_key(&self, id: PieceId) -> Key {
        let key = self.key(id);
        Key { payload: key.payload | 1 << 30, ..key }
    }
}

impl Shared {
    /// Starts a transfer of a piece's gradient from or to an address.
    pub(super) fn move_grad(
        &self,
        state: &mut State,
        direction: Direction,
        id: PieceId,
        address: u64,
        generation: u64,
    ) -> Result<GradTransfer> {
        let submitted = self.device.now_ns();
        let spilled = spill(state)?;
        let Piece { chunk, first, numel, .. } = spilled.pieces.get(id);
        let (key, bytes) = (spilled.grad_key(id), numel * spilled.grads.element);
        spilled.grads.bytes += bytes;
        let Some(store) = &spilled.store else { return Err(Error::Stopped("the spill file is closed".to_owned())) };
        let path = store.setup().directory.clone();
        // SAFETY: the store is closed before the slab is freed; the buffer is a landing buffer or a gradient buffer that is given back only
        // when the transfer has ended.
        let mut buffer = unsafe { Buffer::new(address as *mut u8, bytes as usize) };
        let ticket = match direction {
            Direction::Read => store.read(key, generation, &mut buffer, Priority::Soon),
            Direction::Write => store.write(key, generation, &buffer, Priority::Soon),
        };
        let ends = self.disk_work(key, direction, bytes, Priority::Soon);
        let what = format!("spilled gradient of `{}`, elements {first} to {}", chunk_name(state, chunk), first + numel);
        Ok(GradTransfer { ticket, ends, direction, chunk, what, bytes, submitted, path })
    }

    /// Waits for a transfer.
    pub(super) fn await_grad(&self, transfer: &GradTransfer) -> Result<()> {
        let GradTransfer { ticket, ends, direction, chunk, what, bytes, submitted, path } = transfer;
        let failed = |source| Error::Storage { what: what.clone(), path: path.clone(), source: Box::new(source) };
        self.await_disk(ticket, failed)?;
        await_clock(ends.as_ref())?;
        let mut state = self.lock();
        let verb = if *direction == Direction::Read { "read" } else { "write" };
        let name = format!("{verb} gradient {}", chunk_name(&state, *chunk));
        self.note(&mut state, *direction, name, *bytes, *submitted)
    }

    /// Writes what has landed at an address, those of its pieces that hold a gradient; gives the transfers.
    pub(crate) fn write_landed(&self, chunk: ChunkId, landed: u64) -> Result<Landed> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut writes = Vec::new();
        for (id, piece) in touched_pieces(state, chunk)? {
            let grads = &mut spill(state)?.grads;
            let (generation, element) = (grads.buffers.next_generation(id), grads.element);
            writes.push(self.move_grad(state, Direction::Write, id, landed + piece.first * element, generation)?);
        }
        Ok(Landed(writes))
    }

    /// Once the disk has all of it the landing buffer is free, and the chunk may be handed over again.
    pub(crate) fn free_when_written(&self, chunk: ChunkId, Landed(writes): Landed, buffer: usize) -> Result<()> {
        self.disk_jobs[Direction::Write as usize].send(Job::new(None, move |shared| {
            writes.iter().try_for_each(|write| shared.await_grad(write))?;
            let mut state = shared.lock();
            state.gradients.free_landing(buffer);
            spill(&mut state)?.grads.set_landing(chunk, false);
            drop(state);
            shared.notify();
            Ok(())
        }))
    }

    /// Starts to read gradients for steps.
    pub(super) fn read_grads(&self, state: &mut State, reads: &[GradRead]) -> Result<()> {
        for &GradRead { piece, buffer, generation } in reads {
            let address = spill(state)?.grads.address(buffer);
            let outcome = self.move_grad(state, Direction::Read, piece, address, generation);
            let read = self.or_stop(state, outcome)?;
            self.disk_jobs[Direction::Read as usize].send(Job::new(None, move |shared: &Arc<Shared>| {
                shared.await_grad(&read)?;
                spill(&mut shared.lock())?.grads.buffers.was_read(buffer);
                shared.notify();
                Ok(())
            }))?;
        }
        Ok(())
    }

    /// A buffer is free again; those that wait for one are read.
    pub(super) fn give_grad_back(&self, state: &mut State, buffer: u32) -> Result<()> {
        let mut reads = Vec::new();
        spill(state)?.grads.buffers.give_back(buffer, &mut reads);
        self.read_grads(state, &reads)?;
        self.notify();
        Ok(())
    }
}

/// Writes of a landed gradient.
pub(crate) struct Landed(Vec<GradTransfer>);

/// The pieces of a chunk that hold a gradient of this step.
pub(super) fn touched_pieces(state: &mut State, chunk: ChunkId) -> Result<Vec<(PieceId, Piece)>> {
    let layout = state.scheduler.layout();
    let touched: Vec<(u64, u64)> =
        state.gradients.touched(layout, chunk).map(|(param, _)| (param.offset, param.offset + param.numel)).collect();
    let pieces = &spill(state)?.pieces;
    let all = pieces.of_chunk(chunk).map(|id| (id, pieces.get(id)));
    Ok(all.filter(|(_, piece)| touched.iter().any(|&(from, to)| from < piece.first + piece.numel && piece.first < to)).collect())
}
