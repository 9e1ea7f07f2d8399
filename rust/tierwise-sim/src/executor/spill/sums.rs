//! Sums of gradients on the disk, piece by piece: the counterpart of the runtime's `spill/sums.rs`.

use super::super::machine::{Lane, Token};
use super::super::{Effect, Run, SimError};
use super::Extent;
use std::collections::VecDeque;
use tierwise_core::ChunkId;
use tierwise_core::scheduler::Event;
use tierwise_core::staging::PieceId;

/// A chunk's sum that is being added to.
pub(super) struct Adding {
    chunk: ChunkId,
    /// Whether there is nothing to add to yet.
    first: bool,
    /// What follows if it was the last.
    landed: Option<Event>,
    /// Pieces that have no buffer yet.
    left: VecDeque<PieceId>,
    /// Pieces with their buffers and reads, in their order.
    ahead: VecDeque<(PieceId, u32, Option<Token>)>,
    /// The piece that is taken out of them.
    now: Option<(PieceId, u32, Option<Token>)>,
    /// Whether it is being added.
    adds: bool,
}

impl Run<'_> {
    /// Adds what has landed to a chunk's sum on the disk.
    pub(in super::super) fn add_on_disk(&mut self, chunk: ChunkId, first: bool, landed: Option<Event>) -> Result<(), SimError> {
        let left = self.spilled.pieces.of_chunk(chunk).collect();
        self.spilled.adding = Some(Adding { chunk, first, landed, left, ahead: VecDeque::new(), now: None, adds: false });
        self.add_pieces()
    }

    /// Goes on as far as buffers and the disk let it.
    pub(in super::super) fn add_pieces(&mut self) -> Result<(), SimError> {
        let Some(adding) = &self.spilled.adding else { return Ok(()) };
        if adding.adds {
            return Ok(());
        }
        if adding.now.is_none() {
            self.read_sums();
        }
        let Some(adding) = &mut self.spilled.adding else { return Ok(()) };
        adding.now = adding.now.or_else(|| adding.ahead.pop_front());
        let Some((id, _, read)) = adding.now else {
            let ended = adding.left.is_empty();
            return if ended { self.sum_ended() } else { Ok(()) };
        };
        if read.is_some_and(|read| self.machine.ended_ns(read).is_none()) {
            return Ok(());
        }
        adding.adds = true;
        let (chunk, sums, last) = (adding.chunk, if adding.first { 1 } else { 2 }, adding.landed.is_some());
        let numel = self.spilled.pieces.get(id).numel;
        let added = numel * (self.setup.layout.precision.grad_bytes() + sums * self.grad_element());
        let normed = if last { numel * self.grad_element() } else { 0 };
        let work = self.setup.hardware.addition_work(added) + normed as f64;
        self.enqueue(Lane::Landing, "accumulate", chunk, added + normed, work, Vec::new(), Vec::new(), vec![Effect::SumAdded]);
        Ok(())
    }

    /// Takes buffers for the next pieces, and starts to read.
    fn read_sums(&mut self) {
        let element = self.grad_element();
        while let Some(adding) = &mut self.spilled.adding
            && let Some(&id) = adding.left.front()
            && let Some(buffer) = self.spilled.grads.borrow()
        {
            adding.left.pop_front();
            let reads = !adding.first;
            let bytes = self.spilled.pieces.get(id).numel * element;
            let read = reads.then(|| self.disk_read("read sum", id, Extent::Gradient, bytes, vec![Effect::SumRead]));
            if let Some(adding) = &mut self.spilled.adding {
                adding.ahead.push_back((id, buffer, read));
            }
        }
    }

    /// A piece was added: it goes back to the disk, and the next one follows.
    pub(in super::super) fn sum_was_added(&mut self) -> Result<(), SimError> {
        let Some(adding) = &mut self.spilled.adding else {
            return Err(SimError::Mismatch("a sum was added to that nobody adds to".to_owned()));
        };
        adding.adds = false;
        if let Some((id, buffer, _)) = adding.now.take() {
            let bytes = self.spilled.pieces.get(id).numel * self.grad_element();
            let write = self.disk_write("write sum", id, Extent::Gradient, bytes);
            self.spilled.writes.push_back((vec![write], vec![Effect::GradGivenBack(buffer)]));
        }
        self.add_pieces()
    }

    /// All of it was added: where it landed is free, and the chunk may be handed over again when the disk has what was written.
    fn sum_ended(&mut self) -> Result<(), SimError> {
        let Some(Adding { chunk, landed, .. }) = self.spilled.adding.take() else { return Ok(()) };
        self.staging_free += 1;
        self.await_writes(Vec::new(), vec![Effect::GradWritten(chunk)])?;
        if let Some(landed) = landed {
            self.apply(&landed)?;
        }
        self.landing_ended()
    }
}
