//! Buffers that parameters pass through on their way from the spill file into the streaming slab: which piece is read into which, and for
//! which request. Sans-IO.
//!
//! The scheduler counts a fetch as done when it asks for it; whoever reads the chunk waits until its last copy was submitted
//! ([`Fetching::is_pending`]). Meanwhile the scheduler may give the slot to another chunk, or the chunk another slot: what belongs to an
//! earlier request is dropped when it comes in. Nobody waits for ever: a buffer waits for the disk, then for the link.

use crate::ChunkId;
use crate::staging::PieceId;
use std::collections::VecDeque;

/// A request of the scheduler: a chunk's parameters into a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FetchRequest {
    number: u64,
    /// The chunk.
    pub chunk: ChunkId,
    /// First byte of its slot.
    pub offset: u64,
}

/// What is on its way.
#[derive(Debug, Clone)]
pub struct Fetching {
    /// Per chunk: the latest request and how many of its pieces were not copied on, while it is not carried out.
    pending: Vec<Option<(FetchRequest, usize)>>,
    /// Pieces that no buffer was free for, by request.
    waiting: VecDeque<(FetchRequest, PieceId)>,
    free: Vec<u32>,
    buffers: u32,
    requests: u64,
}

impl Fetching {
    /// `buffers` free ones for a layout of `chunks` chunks.
    pub fn new(chunks: usize, buffers: u32) -> Fetching {
        Fetching { pending: vec![None; chunks], waiting: VecDeque::new(), free: (0..buffers).collect(), buffers, requests: 0 }
    }

    /// Whether copies of a chunk that was asked for were not all submitted.
    pub fn is_pending(&self, chunk: ChunkId) -> bool {
        self.pending[chunk.index()].is_some()
    }

    /// Whether a request is not carried out, or the disk or the link has a buffer.
    pub fn is_busy(&self) -> bool {
        self.free.len() < self.buffers as usize || self.pending.iter().any(Option::is_some)
    }

    /// A chunk's pieces are wanted in its slot; then call [`Fetching::next`] until it gives nothing.
    pub fn ask(&mut self, chunk: ChunkId, offset: u64, pieces: impl IntoIterator<Item = PieceId>) {
        let request = FetchRequest { number: self.requests, chunk, offset };
        self.requests += 1;
        let before = self.waiting.len();
        self.waiting.extend(pieces.into_iter().map(|piece| (request, piece)));
        let count = self.waiting.len() - before;
        self.pending[chunk.index()] = (count > 0).then_some((request, count));
    }

    /// The next piece to read, and its buffer; `slot` says where a chunk's slot begins now.
    pub fn next(&mut self, slot: impl Fn(ChunkId) -> Option<u64>) -> Option<(FetchRequest, PieceId, u32)> {
        while let Some(&(request, piece)) = self.waiting.front() {
            if self.is_current(request, &slot) {
                let buffer = self.free.pop()?;
                self.waiting.pop_front();
                return Some((request, piece, buffer));
            }
            self.waiting.pop_front();
            self.give_up(request);
        }
        None
    }

    /// A piece was read. Whether it is still wanted: then it is copied into the slot, and [`Fetching::was_copied`] follows; else its buffer is
    /// free.
    pub fn was_read(&mut self, request: FetchRequest, buffer: u32, slot: impl Fn(ChunkId) -> Option<u64>) -> bool {
        if !self.is_current(request, &slot) {
            self.free.push(buffer);
            self.give_up(request);
            return false;
        }
        let pending = &mut self.pending[request.chunk.index()];
        if let Some((_, left)) = pending {
            *left -= 1;
            if *left == 0 {
                *pending = None;
            }
        }
        true
    }

    /// The link has taken a piece out of its buffer.
    pub fn was_copied(&mut self, buffer: u32) {
        debug_assert!(!self.free.contains(&buffer), "fetch buffer {buffer} was given back twice");
        self.free.push(buffer);
    }

    /// Whether a request still counts: the chunk was not asked for again, and has the slot that it was asked into.
    fn is_current(&self, request: FetchRequest, slot: &impl Fn(ChunkId) -> Option<u64>) -> bool {
        let pending = self.pending[request.chunk.index()];
        pending.is_some_and(|(pending, _)| pending.number == request.number) && slot(request.chunk) == Some(request.offset)
    }

    /// The chunk lost the slot that it was asked into; nobody waits for it, or it would be in use and have kept it.
    fn give_up(&mut self, request: FetchRequest) {
        let pending = &mut self.pending[request.chunk.index()];
        if pending.is_some_and(|(pending, _)| pending.number == request.number) {
            *pending = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: ChunkId = ChunkId(0);
    const SECOND: ChunkId = ChunkId(1);

    fn pieces(of: std::ops::Range<u32>) -> impl Iterator<Item = PieceId> {
        of.map(PieceId)
    }

    #[test]
    fn pieces_are_read_in_order_into_as_many_buffers_as_there_are() {
        let mut fetching = Fetching::new(2, 2);
        let slot = |_| Some(64);
        fetching.ask(FIRST, 64, pieces(0..3));
        let (request, first, buffer) = fetching.next(slot).unwrap();
        let (_, second, other) = fetching.next(slot).unwrap();
        assert_eq!((first, second), (PieceId(0), PieceId(1)));
        assert_eq!(fetching.next(slot), None, "no buffer is free");
        assert!(fetching.was_read(request, buffer, slot) && fetching.was_read(request, other, slot));
        assert_eq!(fetching.next(slot), None, "the link has both");
        fetching.was_copied(other);
        assert_eq!(fetching.next(slot), Some((request, PieceId(2), other)));
        assert!(fetching.is_pending(FIRST));
        assert!(fetching.was_read(request, other, slot));
        assert!(!fetching.is_pending(FIRST) && fetching.is_busy());
        fetching.was_copied(buffer);
        fetching.was_copied(other);
        assert!(!fetching.is_busy());
    }

    #[test]
    fn what_lost_its_slot_is_dropped() {
        let mut fetching = Fetching::new(2, 1);
        fetching.ask(FIRST, 0, pieces(0..2));
        fetching.ask(SECOND, 64, pieces(2..3));
        let slots = |chunk: ChunkId| Some(u64::from(chunk.0) * 64);
        let (request, _, buffer) = fetching.next(slots).unwrap();
        // The second chunk got the first one's slot meanwhile.
        let slots = |chunk: ChunkId| (chunk == SECOND).then_some(64);
        assert!(!fetching.was_read(request, buffer, slots));
        assert!(!fetching.is_pending(FIRST));
        let (request, piece, buffer) = fetching.next(slots).unwrap();
        assert_eq!((request.chunk, piece), (SECOND, PieceId(2)));
        // Asked for again, into the same slot: what comes in first belongs to nobody.
        fetching.ask(SECOND, 64, pieces(2..3));
        assert!(!fetching.was_read(request, buffer, slots));
        assert!(fetching.is_pending(SECOND));
        let (request, _, buffer) = fetching.next(slots).unwrap();
        assert!(fetching.was_read(request, buffer, slots) && !fetching.is_pending(SECOND));
    }

    #[test]
    fn a_chunk_of_no_pieces_is_there_at_once() {
        let mut fetching = Fetching::new(2, 1);
        fetching.ask(FIRST, 0, pieces(0..0));
        assert!(!fetching.is_pending(FIRST) && !fetching.is_busy());
    }
}
