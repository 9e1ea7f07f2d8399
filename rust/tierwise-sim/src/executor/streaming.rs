//! States of streamed chunks on their way: the counterpart of the runtime's `streaming.rs`.

use super::machine::{Lane, Token};
use super::stalls::Cause;
use super::{Effect, Run};
use tierwise_core::ChunkId;
use tierwise_core::streaming::{STAGING_BUFFERS, pieces};

/// The staging buffers, and where the host's states are.
pub struct Streaming {
    next: usize,
    /// Per buffer: the task after which what was in it has left.
    left: [Option<Token>; STAGING_BUFFERS as usize],
    /// Per chunk: the task after which its states are back on the host.
    back: Vec<Option<Token>>,
}

impl Streaming {
    /// Everything on the host.
    pub fn new(chunks: usize) -> Self {
        Streaming { next: 0, left: Default::default(), back: vec![None; chunks] }
    }
}

impl Run<'_> {
    /// Enqueues the step of a streamed chunk.
    pub(super) fn step_streamed(&mut self, chunk: ChunkId) {
        let (layout, plan) = (self.setup.layout, self.setup.plan);
        let precision = layout.precision;
        let grad_bytes = if plan.accumulation > 1 { 4 } else { precision.grad_bytes() };
        let pieces = pieces(layout, chunk, plan.device.staging, |_| true);
        let mut commit: Vec<Token> = self.commit.into_iter().collect();
        let mut home: Vec<Token> = self.streaming.back[chunk.index()].into_iter().collect();
        let read = std::mem::take(&mut self.held[chunk.index()]);
        self.leaving_bytes += read;
        let mut freed = vec![Effect::FreeGradients(read)];
        let count = pieces.len();
        for (at, piece) in pieces.into_iter().enumerate() {
            let numel = piece.end - piece.start;
            let bytes = numel * precision.state_bytes();
            let buffer = self.streaming.next;
            self.streaming.next = (buffer + 1) % self.streaming.left.len();
            let mut waits = std::mem::take(&mut home);
            waits.extend(self.streaming.left[buffer]);
            let inside = self.enqueue(Lane::StatesIn, "states", chunk, bytes, bytes as f64, waits, Vec::new(), Vec::new());
            let moved = numel * (grad_bytes + 2 * (precision.param_bytes() + precision.state_bytes()));
            let mut waits = std::mem::take(&mut commit);
            waits.push(inside);
            let effects = if at + 1 == count { std::mem::take(&mut freed) } else { Vec::new() };
            let stepped = self.enqueue(Lane::Optimizer, "step", chunk, moved, moved as f64, waits, Vec::new(), effects);
            let back = self.enqueue(Lane::StatesOut, "states", chunk, bytes, bytes as f64, vec![stepped], Vec::new(), Vec::new());
            self.streaming.left[buffer] = Some(back);
            self.streaming.back[chunk.index()] = Some(back);
            if at + 1 == count {
                self.written[chunk.index()] = Some(self.gather_after_step(chunk, stepped).unwrap_or((stepped, Cause::Optimizer)));
            }
        }
    }
}
