//! Staging of spilled states: which piece is read into which buffer, when, and when it is written back. Sans-IO.
//!
//! Pieces are used cyclically, in the order in which their chunks are stepped. The machine keeps the pieces that are used next in its
//! buffers and reads them ahead, also before a step is decided; what was stepped is written back, and its buffer is the first to be
//! reused, because its next use is furthest. Every decision follows from the order of calls.

use crate::ChunkId;
use crate::layout::Layout;
use crate::plan::{OptimizerClass, Plan};
use crate::trace::Trace;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// A range of elements of a chunk's states: what is read, stepped and written at once. Of a frozen chunk a range of its parameters, which are
/// written when they are set, and read for every use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// The chunk.
    pub chunk: ChunkId,
    /// First element.
    pub first: u64,
    /// Elements.
    pub numel: u64,
    /// Bytes of all its payloads.
    pub bytes: u64,
}

/// Index of a piece in [`Pieces`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PieceId(pub u32);

impl PieceId {
    /// The id as a vector index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// All spilled pieces in the order in which a step uses them; those that no step uses come last.
#[derive(Debug, Clone, Default)]
pub struct Pieces {
    all: Vec<Piece>,
    /// How many of them steps use.
    stepped: usize,
    /// Per chunk: its pieces.
    of_chunk: Vec<std::ops::Range<u32>>,
}

impl Pieces {
    /// Cuts the spilled chunks of a plan into pieces, the earliest-used chunk first.
    pub fn new(layout: &Layout, trace: &Trace, plan: &Plan) -> Pieces {
        let mut pieces = Pieces { all: Vec::new(), stepped: 0, of_chunk: vec![0..0; layout.chunks.len()] };
        let Some(nvme) = plan.nvme else { return pieces };
        let mut first_use = vec![usize::MAX; layout.chunks.len()];
        for (at, op) in trace.ops.iter().enumerate() {
            for chunk in &trace.units[op.unit as usize].chunks {
                first_use[chunk.index()] = first_use[chunk.index()].min(at);
            }
        }
        let frozen = |c: ChunkId| plan.chunks[c.index()].class == OptimizerClass::Frozen;
        let mut order: Vec<ChunkId> = layout.ids().filter(|&c| layout.spilled_numel(c, plan.chunks[c.index()]) > 0).collect();
        order.sort_by_key(|&c| (frozen(c), first_use[c.index()], c.0));
        for chunk in order {
            let placed = plan.chunks[chunk.index()];
            let (total, element) = (layout.spilled_numel(chunk, placed), layout.spilled_bytes(placed));
            let most = if frozen(chunk) { nvme.frozen_piece_numel } else { nvme.piece_numel };
            let start = pieces.all.len() as u32;
            let mut first = 0;
            while first < total {
                let numel = most.max(1).min(total - first);
                pieces.all.push(Piece { chunk, first, numel, bytes: numel * element });
                first += numel;
            }
            pieces.of_chunk[chunk.index()] = start..pieces.all.len() as u32;
            if !frozen(chunk) {
                pieces.stepped = pieces.all.len();
            }
        }
        pieces
    }

    /// How many of them steps use; they are the first.
    pub fn stepped(&self) -> usize {
        self.stepped
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether nothing is spilled.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// One piece.
    pub fn get(&self, piece: PieceId) -> Piece {
        self.all[piece.index()]
    }

    /// The pieces of a chunk, by ascending elements.
    pub fn of_chunk(&self, chunk: ChunkId) -> impl Iterator<Item = PieceId> + use<> {
        self.of_chunk[chunk.index()].clone().map(PieceId)
    }

    /// The pieces of a chunk that hold some of `numel` elements from `first`.
    pub fn overlapping(&self, chunk: ChunkId, first: u64, numel: u64) -> impl Iterator<Item = PieceId> + '_ {
        self.of_chunk(chunk).filter(move |&piece| {
            let piece = self.get(piece);
            piece.first < first + numel && first < piece.first + piece.numel
        })
    }
}

/// What a buffer holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Buffer {
    /// Nothing that is needed.
    Free,
    /// A piece is being read into it.
    Reading(PieceId),
    /// The newest generation of a piece, which is on the disk too.
    Clean(PieceId),
    /// A piece that a step is changing.
    Lent(PieceId),
    /// The newest generation of a piece, on its way to the disk.
    Writing(PieceId),
}

/// What the executor has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transfer {
    /// Read a generation of a piece into a buffer, then call [`Staging::was_read`].
    Read {
        /// The piece.
        piece: PieceId,
        /// Its buffer.
        buffer: u32,
        /// The generation that was last written.
        generation: u64,
    },
    /// The piece was never written: fill its part of the buffer with zeros, now.
    Zero {
        /// The piece.
        piece: PieceId,
        /// Its buffer.
        buffer: u32,
    },
    /// Write a buffer as a new generation of a piece, then call [`Staging::was_written`].
    Write {
        /// The piece.
        piece: PieceId,
        /// Its buffer.
        buffer: u32,
        /// The new generation.
        generation: u64,
    },
}

/// A call that does not fit a buffer's state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("staging buffer {buffer} is {state:?}; it cannot be {what}")]
pub struct StagingError {
    /// The buffer.
    pub buffer: u32,
    /// Its state.
    pub state: Option<Buffer>,
    /// What was asked.
    pub what: &'static str,
}

/// The state of all staging buffers.
#[derive(Debug, Clone)]
pub struct Staging {
    buffers: Vec<Buffer>,
    /// Per piece: the buffer that holds it.
    place: Vec<Option<u32>>,
    /// Per piece: the newest generation; 0 was never written.
    generations: Vec<u64>,
    /// Pieces that steps wait for, in their order.
    wanted: VecDeque<PieceId>,
    /// Per piece: its place in `wanted`, counted from the first that was ever wanted.
    wanted_at: Vec<Option<u64>>,
    taken: u64,
    /// How many pieces steps use cyclically; the others are only here while somebody wants them.
    stepped: usize,
    /// The piece that is used after the last wanted one.
    next: usize,
    /// Whether pieces are read that nobody wants yet.
    ahead: bool,
}

impl Staging {
    /// `buffers` empty buffers for `pieces` pieces that were never written, the first `stepped` of which steps use.
    pub fn new(pieces: usize, stepped: usize, buffers: u32) -> Staging {
        Staging {
            buffers: vec![Buffer::Free; buffers as usize],
            place: vec![None; pieces],
            generations: vec![0; pieces],
            wanted: VecDeque::new(),
            wanted_at: vec![None; pieces],
            taken: 0,
            stepped,
            next: 0,
            ahead: true,
        }
    }

    /// Whether pieces are read before somebody wants them. Off while states are read or written by name: what was used last stays then.
    pub fn set_ahead(&mut self, ahead: bool) {
        self.ahead = ahead;
    }

    /// Steps will use these pieces next, in this order, after those that are wanted already.
    pub fn want(&mut self, pieces: impl IntoIterator<Item = PieceId>, transfers: &mut Vec<Transfer>) {
        for piece in pieces {
            if self.wanted_at[piece.index()].is_none() {
                self.wanted_at[piece.index()] = Some(self.taken + self.wanted.len() as u64);
                self.wanted.push_back(piece);
                if piece.index() < self.stepped {
                    self.next = (piece.index() + 1) % self.stepped;
                }
            }
        }
        self.fill(transfers);
    }

    /// The next wanted piece and its buffer, if it is there: it is lent until [`Staging::give_back`].
    pub fn take(&mut self) -> Option<(PieceId, u32)> {
        let piece = *self.wanted.front()?;
        let buffer = self.place[piece.index()]?;
        if self.buffers[buffer as usize] != Buffer::Clean(piece) {
            return None;
        }
        self.wanted.pop_front();
        self.wanted_at[piece.index()] = None;
        self.taken += 1;
        self.buffers[buffer as usize] = Buffer::Lent(piece);
        Some((piece, buffer))
    }

    /// A lent buffer comes back; if it was changed it is written.
    pub fn give_back(&mut self, buffer: u32, changed: bool, transfers: &mut Vec<Transfer>) -> Result<(), StagingError> {
        let Some(&Buffer::Lent(piece)) = self.buffers.get(buffer as usize) else { return Err(self.error(buffer, "given back")) };
        if changed {
            self.generations[piece.index()] += 1;
            self.buffers[buffer as usize] = Buffer::Writing(piece);
            transfers.push(Transfer::Write { piece, buffer, generation: self.generations[piece.index()] });
        } else {
            self.buffers[buffer as usize] = Buffer::Clean(piece);
        }
        self.fill(transfers);
        Ok(())
    }

    /// A read has ended.
    pub fn was_read(&mut self, buffer: u32, transfers: &mut Vec<Transfer>) -> Result<(), StagingError> {
        let Some(&Buffer::Reading(piece)) = self.buffers.get(buffer as usize) else { return Err(self.error(buffer, "read")) };
        self.buffers[buffer as usize] = Buffer::Clean(piece);
        self.fill(transfers);
        Ok(())
    }

    /// A write has ended.
    pub fn was_written(&mut self, buffer: u32, transfers: &mut Vec<Transfer>) -> Result<(), StagingError> {
        let Some(&Buffer::Writing(piece)) = self.buffers.get(buffer as usize) else { return Err(self.error(buffer, "written")) };
        self.buffers[buffer as usize] = Buffer::Clean(piece);
        self.fill(transfers);
        Ok(())
    }

    /// Reads what is used next into buffers whose pieces are used later.
    pub fn fill(&mut self, transfers: &mut Vec<Transfer>) {
        // Pieces beyond as many as there are buffers would only push out what is used before them.
        let most = if self.ahead { self.stepped.max(self.wanted.len()) } else { self.wanted.len() };
        for ahead in 0..self.buffers.len().min(most) {
            let piece = match self.wanted.get(ahead) {
                Some(&piece) => piece,
                None if self.stepped == 0 => return,
                None => PieceId(((self.next + ahead - self.wanted.len()) % self.stepped) as u32),
            };
            if self.place[piece.index()].is_some() {
                continue;
            }
            let Some(buffer) = self.room_for(piece) else { return };
            if let Buffer::Clean(old) = self.buffers[buffer] {
                self.place[old.index()] = None;
            }
            self.place[piece.index()] = Some(buffer as u32);
            let generation = self.generations[piece.index()];
            if generation == 0 {
                self.buffers[buffer] = Buffer::Clean(piece);
                transfers.push(Transfer::Zero { piece, buffer: buffer as u32 });
            } else {
                self.buffers[buffer] = Buffer::Reading(piece);
                transfers.push(Transfer::Read { piece, buffer: buffer as u32, generation });
            }
        }
    }

    /// A free buffer, else the clean one whose piece is used last, if that is after `piece` is.
    fn room_for(&self, piece: PieceId) -> Option<usize> {
        if let Some(free) = self.buffers.iter().position(|b| *b == Buffer::Free) {
            return Some(free);
        }
        let clean = self.buffers.iter().enumerate().filter_map(|(i, b)| match b {
            Buffer::Clean(old) => Some((self.next_use(*old), i)),
            _ => None,
        });
        clean.max().filter(|(at, _)| *at > self.next_use(piece)).map(|(_, i)| i)
    }

    /// Nothing is wanted any more, and the step starts anew with the first piece.
    pub fn rewind(&mut self) {
        for piece in std::mem::take(&mut self.wanted) {
            self.wanted_at[piece.index()] = None;
            self.taken += 1;
        }
        self.next = 0;
    }

    /// How many pieces are used before this one is.
    fn next_use(&self, piece: PieceId) -> u64 {
        match self.wanted_at[piece.index()] {
            Some(at) => at - self.taken,
            None if piece.index() >= self.stepped => u64::MAX,
            None => (self.wanted.len() + (piece.index() + self.stepped - self.next) % self.stepped) as u64,
        }
    }

    /// Newest generation of a piece, 0 if it was never written.
    pub fn generation(&self, piece: PieceId) -> u64 {
        self.generations[piece.index()]
    }

    /// What every buffer holds.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// Whether a step waits for a piece, changes one, or what it changed is not on the disk yet.
    pub fn is_busy(&self) -> bool {
        !self.wanted.is_empty() || self.buffers.iter().any(|b| matches!(b, Buffer::Lent(_) | Buffer::Writing(_)))
    }

    fn error(&self, buffer: u32, what: &'static str) -> StagingError {
        StagingError { buffer, state: self.buffers.get(buffer as usize).copied(), what }
    }
}
