//! States that visit the device: how a streamed chunk's optimizer states are cut into pieces, and the staging that the pieces pass through.

use crate::ChunkId;
use crate::layout::{ALIGN_NUMEL, Layout, ParamLayout};
use crate::plan::{ChunkPlan, OptimizerClass};
use std::ops::Range;

/// Staging buffers: one is filled, one is stepped, one is emptied.
pub const STAGING_BUFFERS: u64 = 3;

/// Most bytes of states in one piece: two milliseconds of a link, so that few pieces have to be enqueued and little is staged.
pub const PIECE_BYTES: u64 = 64 << 20;

/// Bytes of states of one staging buffer for these placements: a whole piece, or the largest streamed chunk if that is smaller.
fn buffer_bytes(layout: &Layout, chunks: &[ChunkPlan]) -> u64 {
    let streamed = layout.ids().filter(|c| chunks[c.index()].class == OptimizerClass::Streamed);
    streamed.map(|c| layout.state_bytes(c)).max().unwrap_or(0).min(PIECE_BYTES)
}

/// Device bytes of all staging buffers for these placements; 0 if no chunk is streamed.
pub fn staging_bytes(layout: &Layout, chunks: &[ChunkPlan]) -> u64 {
    STAGING_BUFFERS * buffer_bytes(layout, chunks)
}

/// Elements whose states fit one buffer of a staging area.
pub fn piece_numel(layout: &Layout, staging_bytes: u64) -> u64 {
    staging_bytes / STAGING_BUFFERS / layout.precision.state_bytes() / ALIGN_NUMEL * ALIGN_NUMEL
}

/// The element ranges of a chunk's states that visit the device one after the other; `stepped` says which of its parameters are stepped.
///
/// Ranges start at multiples of [`ALIGN_NUMEL`] elements; a piece that holds nothing of a stepped parameter is left out.
pub fn pieces(layout: &Layout, chunk: ChunkId, staging_bytes: u64, stepped: impl Fn(usize) -> bool) -> Vec<Range<u64>> {
    let chunk = &layout.chunks[chunk.index()];
    // Also where nothing was staged for it, a piece makes progress; what is too small is refused where memory is bound.
    let numel = piece_numel(layout, staging_bytes).max(ALIGN_NUMEL);
    (0..chunk.state_numel)
        .step_by(numel as usize)
        .map(|start| start..(start + numel).min(chunk.state_numel))
        .filter(|piece| {
            let inside = |p: &ParamLayout| p.numel > 0 && p.offset < piece.end && piece.start < p.offset + p.numel;
            chunk.params.iter().enumerate().any(|(position, p)| stepped(position) && inside(p))
        })
        .collect()
}

/// Whether a chunk of a row of chunks is one of those that get `share` of the elements, spread evenly over the row and never less than asked
/// for up to any point of it. Give every chunk in order.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    share: f64,
    seen: f64,
    chosen: f64,
}

impl Spread {
    /// At the start of a row.
    pub fn new(share: f64) -> Self {
        Spread { share, seen: 0.0, chosen: 0.0 }
    }

    /// Whether the next chunk, of so many elements, is one of them.
    pub fn next(&mut self, numel: u64) -> bool {
        self.seen += numel as f64;
        // Half an element is no reason for another chunk.
        let chosen = self.chosen + 0.5 < self.share * self.seen;
        if chosen {
            self.chosen += numel as f64;
        }
        chosen
    }
}
