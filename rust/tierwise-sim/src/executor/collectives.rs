//! Collectives of the data-parallel group, in the places where the plan's sharding needs them.

use super::machine::{Lane, Token};
use super::stalls::Cause;
use super::{Run, Sharding};
use tierwise_core::{ChunkId, OpId};

impl Run<'_> {
    /// Enqueues the all-gathers of an operation's chunks; compute waits for them. Two buffers take turns.
    pub(super) fn gather_for_use(&mut self, op: OpId) -> Vec<(Token, Cause)> {
        let trace = self.setup.trace;
        let Some(Sharding { gathers_before_use: true, gather_ns, .. }) = self.setup.sharding else { return Vec::new() };
        let mut gathered = Vec::new();
        for &chunk in trace.chunks(op).iter().filter(|c| gather_ns[c.index()] > 0) {
            let mut waits: Vec<Token> = self.latest_compute[0].into_iter().collect();
            waits.extend(self.written[chunk.index()].map(|(token, _)| token));
            let ns = gather_ns[chunk.index()];
            let token = self.enqueue(Lane::Gather, "gather", chunk, 0, ns as f64, waits, Vec::new(), Vec::new());
            gathered.push((token, Cause::Communication));
        }
        gathered
    }

    /// Enqueues the all-gather of a chunk that a step has rewritten, if every rank keeps all parameters.
    pub(super) fn gather_after_step(&mut self, chunk: ChunkId, written: Token) -> Option<(Token, Cause)> {
        let sharding = self.setup.sharding?;
        let ns = sharding.gather_ns[chunk.index()];
        if sharding.gathers_before_use || ns == 0 {
            return None;
        }
        let token = self.enqueue(Lane::Gather, "gather", chunk, 0, ns as f64, vec![written], Vec::new(), Vec::new());
        Some((token, Cause::Communication))
    }

    /// Enqueues the reduction of a chunk's gradients; gives what their next reader waits for.
    pub(super) fn reduce(&mut self, chunk: ChunkId, produced: Vec<Token>, last: bool) -> Vec<Token> {
        let Some(sharding) = self.setup.sharding else { return produced };
        let ns = sharding.reduce_ns[chunk.index()];
        if ns == 0 || !(last || sharding.reduces_every_micro_batch) {
            return produced;
        }
        vec![self.enqueue(Lane::Reduce, "reduce", chunk, 0, ns as f64, produced, Vec::new(), Vec::new())]
    }
}
