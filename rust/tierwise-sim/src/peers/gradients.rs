//! Gradients on their way: buckets, reductions, norms and copies to the host.

use super::program::Program;
use super::step::{Carried, Step};
use crate::executor::machine::{Lane, Token};
use crate::executor::stalls::Cause;
use tierwise_core::ChunkId;
use tierwise_core::trace::Phase;

impl Step<'_> {
    /// Chunks whose gradients are final after an operation of the trace.
    pub(super) fn finished(&self, at: usize) -> Vec<ChunkId> {
        let ops = &self.rank.built.trace.ops;
        let chunks = |at: usize| &self.rank.built.trace.units[ops[at].unit as usize].chunks;
        let again = |chunk: &ChunkId| (at + 1..ops.len()).any(|later| ops[later].phase == Phase::Backward && chunks(later).contains(chunk));
        if ops[at].phase == Phase::Forward {
            return Vec::new();
        }
        chunks(at).iter().filter(|chunk| !again(chunk)).copied().collect()
    }

    /// Whether the bucket has to be sent before it can hold these.
    pub(super) fn overflows(&self, carried: &Carried, more: &[ChunkId]) -> bool {
        let numel = |chunks: &[ChunkId]| chunks.iter().map(|&chunk| self.numel(chunk)).sum::<u64>();
        !more.is_empty() && numel(&carried.bucket) + numel(more) > self.traits.bucket_elements
    }

    /// Sends what the bucket holds; what is not pinned blocks the training thread.
    pub(super) fn send(
        &self,
        program: &mut Program,
        carried: &mut Carried,
        micro_batch: u32,
        blocked: &mut Vec<Token>,
        arrived: &mut Vec<Token>,
    ) {
        let Some(made) = carried.made else { return };
        for chunk in std::mem::take(&mut carried.bucket) {
            let mut waits = vec![made];
            if self.traits.grads_on_one_stream {
                waits.extend(carried.grads);
            }
            let (reduced, end) = self.gradient(program, chunk, micro_batch, waits);
            carried.reduced = Some(reduced);
            carried.grads = Some(end);
            arrived.push(end);
            if self.request.pageable {
                blocked.push(end);
            }
        }
    }

    /// The way of a gradient, after what it waits for: where it is reduced, and where its way ends.
    fn gradient(&self, program: &mut Program, chunk: ChunkId, micro_batch: u32, after: Vec<Token>) -> (Token, Token) {
        let traits = &self.traits;
        let last = micro_batch + 1 == self.accumulation;
        let numel = self.numel(chunk);
        let wire = (traits.reduce_bytes * numel) as f64;
        let mut at = None;
        // What is not split is reduced once, what is split in every micro-batch.
        if traits.splits_grads || last {
            let ns = if traits.all_reduces { self.rank.data.all_reduce_ns(wire) } else { self.rank.data.all_gather_ns(wire) };
            at = Some(program.push(Lane::Reduce, self.name("reduce", chunk), 0, ns as f64, after.clone(), Cause::Communication));
        }
        // Without a reduction the way begins where the gradient is.
        let mut at = at.unwrap_or_else(|| program.push(Lane::Reduce, self.name("hand over", chunk), 0, 0.0, after, Cause::Communication));
        let reduced = at;
        let part = self.part(numel, true);
        let mut copy = |lane: Lane, what: &str, bytes: u64, after: Token| {
            let work = self.copy_work(bytes, lane == Lane::HostToDevice, self.request.pageable);
            program.push(lane, self.name(what, chunk), bytes, work, vec![after], Cause::Gradients)
        };
        if traits.bounced_grad_bytes > 0 {
            let [out, back] = [(Lane::DeviceToHost, "gradients to their buffer"), (Lane::HostToDevice, "gradients from their buffer")];
            for (lane, what) in if micro_batch == 0 { [out, back] } else { [back, out] } {
                at = copy(lane, what, traits.bounced_grad_bytes * part, at);
            }
        }
        if traits.offload_grad_bytes > 0 {
            if micro_batch > 0 && traits.accumulate_bytes > 0 {
                at = copy(Lane::HostToDevice, "accumulated gradients", traits.accumulate_bytes * part, at);
            }
            if last && traits.grad_traffic_bytes > 0 {
                let bytes = traits.grad_traffic_bytes * part;
                at = program.push(Lane::Optimizer, self.name("norm", chunk), 0, bytes as f64, vec![at], Cause::Gradients);
            }
            let mut copy = |what: &str, bytes: u64, after: Token| {
                let work = self.copy_work(bytes, false, self.request.pageable);
                program.push(Lane::DeviceToHost, self.name(what, chunk), bytes, work, vec![after], Cause::Gradients)
            };
            let bytes = if last { (traits.offload_grad_bytes as f64 * self.cpu_share()).round() as u64 } else { traits.accumulate_bytes };
            if bytes > 0 {
                at = copy("gradients", bytes * part, at);
            }
        }
        (reduced, at)
    }
}
