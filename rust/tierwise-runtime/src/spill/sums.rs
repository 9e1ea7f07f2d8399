//! Sums of gradients on the disk: read, added to and written back piece by piece, while the next ones are read.
//!
//! What there is to do is settled when a gradient is handed over. The landing worker does it in the order of hand-overs, so a sum's micro-batches
//! are added in their order. It takes as many buffers as are free, and waits only while it has none.

use super::grads::{GradTransfer, touched_pieces};
use super::spill;
use crate::engine::{Shared, State};
use crate::error::Result;
use crate::gradients::added_bytes;
use crate::memory::{final_dtype, grad_dtype};
use crate::workers::Job;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tierwise_core::ChunkId;
use tierwise_core::staging::{Piece, PieceId};
use tierwise_io::Direction;
use tierwise_kernels::norm::PartialSum;
use tierwise_kernels::{Addition, GradDtype, GradSpan, accumulate};

/// A parameter's gradient of this micro-batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Added {
    /// First element in the chunk.
    pub offset: u64,
    /// Elements.
    pub numel: u64,
    /// Whether it is the first of this step.
    pub overwrite: bool,
}

/// What is to be done with one piece.
struct Part {
    id: PieceId,
    piece: Piece,
    /// Whether it holds sums that are needed: what is overwritten need not be read.
    read: bool,
    /// (first element in the chunk, elements, whether it is overwritten) of what is added.
    added: Vec<(u64, u64, bool)>,
    /// (index of the parameter, first element in the chunk, elements) of what the norm is taken of.
    norm: Vec<(u32, u64, u64)>,
}

/// What a hand-over, or the end of a step's last backward, does to a chunk's sum.
pub(crate) struct SpilledSum {
    parts: Vec<Part>,
    dtypes: (GradDtype, GradDtype),
}

/// A piece whose buffer was taken.
struct Ready {
    part: Part,
    buffer: u32,
    address: u64,
    read: Option<GradTransfer>,
}

/// The elements of a range that lie in a piece.
fn inside(piece: &Piece, first: u64, numel: u64) -> Option<(u64, u64)> {
    let (from, to) = (first.max(piece.first), (first + numel).min(piece.first + piece.numel));
    (from < to).then(|| (from, to - from))
}

impl SpilledSum {
    /// Adds `incoming` to a chunk's sums, which are marked as touched; with `last`, the norm of all that was touched in this step is taken too.
    pub fn new(state: &mut State, chunk: ChunkId, incoming: &[Added], last: bool) -> Result<SpilledSum> {
        let pieces = touched_pieces(state, chunk)?;
        let layout = state.scheduler.layout();
        let dtypes = (grad_dtype(layout.precision), final_dtype(layout, true));
        let touched: Vec<(u32, u64, u64)> =
            state.gradients.touched(layout, chunk).map(|(param, _)| (param.index, param.offset, param.numel)).collect();
        let part = |(id, piece): (PieceId, Piece)| {
            let within = |&Added { offset, numel, overwrite }: &Added| inside(&piece, offset, numel).map(|(from, n)| (from, n, overwrite));
            let added: Vec<_> = incoming.iter().filter_map(within).collect();
            let held = touched.iter().filter_map(|&(index, offset, numel)| inside(&piece, offset, numel).map(|(from, n)| (index, from, n)));
            // Whatever of it is not overwritten was written in an earlier micro-batch.
            let read = held.clone().any(|(_, from, _)| !added.iter().any(|&(other, _, overwrite)| other == from && overwrite));
            let norm = if last { held.collect() } else { Vec::new() };
            Part { id, piece, read, added, norm }
        };
        let parts = pieces.into_iter().map(part).filter(|part| last || !part.added.is_empty()).collect();
        Ok(SpilledSum { parts, dtypes })
    }

    /// Adds what has landed at an address; gives sums of squares by global parameter index, or nothing if the engine is being dropped.
    pub fn run(self, shared: &Arc<Shared>, landed: u64) -> Result<Option<Vec<(u32, f64)>>> {
        let (dtype, sums) = self.dtypes;
        let mut norms: BTreeMap<u32, PartialSum> = BTreeMap::new();
        let mut left: VecDeque<Part> = self.parts.into();
        let mut ahead: VecDeque<Ready> = VecDeque::new();
        loop {
            if !read_ahead(shared, &mut left, &mut ahead)? {
                return Ok(None);
            }
            let Some(Ready { part, buffer, address, read }) = ahead.pop_front() else { break };
            if let Some(read) = read {
                shared.await_grad(&read)?;
            }
            let at = |first: u64| (address + (first - part.piece.first) * sums.bytes() as u64) as *mut u8;
            let addition = |&(first, numel, overwrite): &(u64, u64, bool)| {
                let ptr = (landed + first * dtype.bytes() as u64) as *const u8;
                Addition { dst: at(first), sums, src: GradSpan { ptr, dtype, numel: numel as usize }, overwrite }
            };
            let additions: Vec<Addition> = part.added.iter().map(addition).collect();
            let normed: u64 = part.norm.iter().map(|&(_, _, numel)| numel * sums.bytes() as u64).sum();
            shared.host_work(|| normed + additions.iter().map(added_bytes).sum::<u64>());
            // SAFETY: the buffer was borrowed from the slab that `shared` keeps alive; the landing buffer is taken until the caller frees it.
            unsafe { accumulate::add(&shared.pool, &additions) };
            for &(index, first, numel) in &part.norm {
                let span = GradSpan { ptr: at(first), dtype: sums, numel: numel as usize };
                // SAFETY: as above; pieces come in the order of their elements.
                unsafe { norms.entry(index).or_default().add(&shared.pool, span) };
            }
            let mut state = shared.lock();
            if part.added.is_empty() {
                shared.give_grad_back(&mut state, buffer)?;
                continue;
            }
            let generation = spill(&mut state)?.grads.buffers.next_generation(part.id);
            let write = shared.move_grad(&mut state, Direction::Write, part.id, address, generation)?;
            shared.disk_jobs[Direction::Write as usize].send(Job::new(None, move |shared: &Arc<Shared>| {
                shared.await_grad(&write)?;
                shared.give_grad_back(&mut shared.lock(), buffer)
            }))?;
        }
        Ok(Some(norms.into_iter().map(|(index, norm)| (index, norm.finish())).collect()))
    }

    /// The chunk may be handed over again when the disk has all that [`SpilledSum::run`] wrote.
    pub fn release_when_written(shared: &Arc<Shared>, chunk: ChunkId) -> Result<()> {
        // After the writes, whose worker takes its jobs in order.
        shared.disk_jobs[Direction::Write as usize].send(Job::new(None, move |shared: &Arc<Shared>| {
            spill(&mut shared.lock())?.grads.set_landing(chunk, false);
            shared.notify();
            Ok(())
        }))
    }
}

/// Takes buffers for the next pieces, at least one if none is taken yet, and starts to read; false if the engine is being dropped.
fn read_ahead(shared: &Arc<Shared>, left: &mut VecDeque<Part>, ahead: &mut VecDeque<Ready>) -> Result<bool> {
    let mut guard = shared.lock();
    while let Some(part) = left.pop_front() {
        Shared::healthy(&guard)?;
        if shared.stopping() {
            return Ok(false);
        }
        let state = &mut *guard;
        let grads = &mut spill(state)?.grads;
        let Some(buffer) = grads.buffers.borrow() else {
            left.push_front(part);
            if !ahead.is_empty() {
                break;
            }
            guard = shared.wait_for_news(guard);
            continue;
        };
        let (address, generation) = (grads.address(buffer), grads.buffers.generation(part.id));
        let read = part.read.then(|| shared.move_grad(state, Direction::Read, part.id, address, generation)).transpose()?;
        ahead.push_back(Ready { part, buffer, address, read });
    }
    Ok(true)
}
