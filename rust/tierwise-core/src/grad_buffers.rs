//! Buffers that spilled gradients pass through: which piece's gradient is in which, and for whom. Sans-IO.
//!
//! A step borrows a buffer per piece, in the order in which pieces are stepped, as far ahead as there are buffers. Whoever adds to a sum
//! borrows one at a time or more. Both give their buffers back without waiting for another: nobody waits for ever.

use crate::staging::PieceId;
use std::collections::VecDeque;

/// A gradient to be read for a step: into this buffer, of this generation; then call [`GradBuffers::was_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradRead {
    /// The piece.
    pub piece: PieceId,
    /// Its buffer.
    pub buffer: u32,
    /// The generation that was last written.
    pub generation: u64,
}

/// The state of all gradient buffers.
#[derive(Debug, Clone)]
pub struct GradBuffers {
    free: Vec<u32>,
    buffers: u32,
    /// Per piece: the newest generation of its gradient; 0 was never written.
    generations: Vec<u64>,
    /// Pieces that steps will want and no buffer was free for, in their order.
    waiting: VecDeque<PieceId>,
    /// What is read for steps, in their order, and whether it is there.
    ahead: VecDeque<(PieceId, u32, bool)>,
}

impl GradBuffers {
    /// `buffers` free ones for the gradients of `pieces` pieces.
    pub fn new(pieces: usize, buffers: u32) -> GradBuffers {
        GradBuffers {
            free: (0..buffers).rev().collect(),
            buffers,
            generations: vec![0; pieces],
            waiting: VecDeque::new(),
            ahead: VecDeque::new(),
        }
    }

    /// Steps will use the gradients of these pieces next, in this order, after those that are wanted already.
    pub fn want(&mut self, pieces: impl IntoIterator<Item = PieceId>, reads: &mut Vec<GradRead>) {
        self.waiting.extend(pieces);
        self.fill(reads);
    }

    /// A read for a step has ended.
    pub fn was_read(&mut self, buffer: u32) {
        if let Some(found) = self.ahead.iter_mut().find(|(_, other, _)| *other == buffer) {
            found.2 = true;
        }
    }

    /// The buffer of a piece's gradient, if that is the next of all wanted ones and there: it belongs to the step until it is given back.
    pub fn take(&mut self, piece: PieceId) -> Option<u32> {
        let &(next, buffer, there) = self.ahead.front()?;
        if next != piece || !there {
            return None;
        }
        self.ahead.pop_front();
        Some(buffer)
    }

    /// A buffer to add up in, if one is free.
    pub fn borrow(&mut self) -> Option<u32> {
        self.free.pop()
    }

    /// A buffer that was taken or borrowed is free again.
    pub fn give_back(&mut self, buffer: u32, reads: &mut Vec<GradRead>) {
        debug_assert!(!self.free.contains(&buffer), "gradient buffer {buffer} was given back twice");
        self.free.push(buffer);
        self.fill(reads);
    }

    fn fill(&mut self, reads: &mut Vec<GradRead>) {
        while let (Some(&piece), false) = (self.waiting.front(), self.free.is_empty()) {
            let Some(buffer) = self.free.pop() else { return };
            self.waiting.pop_front();
            self.ahead.push_back((piece, buffer, false));
            reads.push(GradRead { piece, buffer, generation: self.generation(piece) });
        }
    }

    /// Newest generation of a piece's gradient, 0 if it was never written.
    pub fn generation(&self, piece: PieceId) -> u64 {
        self.generations[piece.index()]
    }

    /// The generation of a write that starts now.
    pub fn next_generation(&mut self, piece: PieceId) -> u64 {
        self.generations[piece.index()] += 1;
        self.generations[piece.index()]
    }

    /// Whether a buffer is in use, or waited for by a step.
    pub fn is_busy(&self) -> bool {
        !self.waiting.is_empty() || self.free.len() < self.buffers as usize
    }
}
