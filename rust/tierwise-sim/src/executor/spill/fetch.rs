//! Parameters whose home is the disk, on their way into the streaming slab, piece by piece: the counterpart of the runtime's `spill/fetch.rs`.

use super::super::machine::Lane;
use super::super::stalls::Cause;
use super::super::{Effect, Run};
use super::{Extent, Spilled};
use tierwise_core::ChunkId;
use tierwise_core::fetching::FetchRequest;
use tierwise_core::plan::OptimizerClass;
use tierwise_core::staging::PieceId;

impl Spilled {
    /// Whether parameters of a chunk are on their way from the disk, and their last copy is not submitted yet.
    pub fn fetches(&self, chunk: ChunkId) -> bool {
        self.fetching.is_pending(chunk)
    }
}

impl Run<'_> {
    /// Starts to read a chunk's parameters for its slot.
    pub(in super::super) fn fetch_spilled(&mut self, chunk: ChunkId, offset: u64) {
        self.written[chunk.index()] = None;
        let pieces: Vec<PieceId> = self.spilled.pieces.of_chunk(chunk).collect();
        self.spilled.fetching.ask(chunk, offset, pieces);
        self.read_fetched();
    }

    /// Gives waiting pieces to the disk while there are buffers.
    fn read_fetched(&mut self) {
        while let Some((request, id, buffer)) = self.spilled.fetching.next(|chunk| self.scheduler.slot(chunk)) {
            let frozen = self.setup.plan.chunks[request.chunk.index()].class == OptimizerClass::Frozen;
            // What is frozen was written before the first step; the rest by its first step, as far as is known here.
            if self.spilled.staging.generation(id) == 0 && !frozen {
                self.copy_fetched(request, id, buffer);
                continue;
            }
            let bytes = self.fetched_bytes(id);
            // Compute waits for it, or will soon; states are read far ahead.
            let read = self.read_task("fetch", id, Extent::Params, bytes, vec![Effect::FetchRead]);
            let read = self.machine.push_urgent(Lane::DiskRead, read);
            self.spilled.fetches.push_back((read, request, id, buffer));
        }
    }

    fn fetched_bytes(&self, id: PieceId) -> u64 {
        self.spilled.pieces.get(id).numel * self.setup.layout.precision.param_bytes()
    }

    /// A piece was read: passes on those that were, in their order.
    pub(in super::super) fn settle_fetches(&mut self) {
        while let Some(&(read, request, id, buffer)) = self.spilled.fetches.front()
            && self.machine.ended_ns(read).is_some()
        {
            self.spilled.fetches.pop_front();
            if !self.copy_fetched(request, id, buffer) {
                self.read_fetched();
            }
        }
    }

    /// A piece is there: it goes to the device, if it is still wanted.
    fn copy_fetched(&mut self, request: FetchRequest, id: PieceId, buffer: u32) -> bool {
        let chunk = request.chunk;
        if !self.spilled.fetching.was_read(request, buffer, |chunk| self.scheduler.slot(chunk)) {
            return false;
        }
        let bytes = self.fetched_bytes(id);
        let done = vec![Effect::Fetched(buffer)];
        let copied = self.enqueue(Lane::HostToDevice, "fetch", chunk, bytes, bytes as f64, Vec::new(), Vec::new(), done);
        // Copies of one lane are in order: the last one's end says that all are done.
        let gathered = if self.spilled.fetches(chunk) { None } else { self.gather_after_step(chunk, copied) };
        self.written[chunk.index()] = Some(gathered.unwrap_or((copied, Cause::Fetch)));
        true
    }

    /// The link has taken a piece out of its buffer.
    pub(in super::super) fn fetch_was_copied(&mut self, buffer: u32) {
        self.spilled.fetching.was_copied(buffer);
        self.read_fetched();
    }
}
