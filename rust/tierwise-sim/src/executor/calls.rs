//! The calls of one optimizer step, as the module hooks make them.

use super::offload::PARTS;
use tierwise_core::plan::{ActivationPlan, Plan};
use tierwise_core::trace::{Phase, Trace};
use tierwise_core::{ChunkId, OpId};

/// One call of the training thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// A micro-batch begins, with activations that may still be leaving.
    Begin,
    /// An operation begins.
    Enter(OpId),
    /// The backward of an operation asks for activations in host memory, its own and those that come after.
    AskBack(OpId),
    /// A part of an operation has room for what it saves, or has back what it saved, and its work is enqueued. Only the operations of units
    /// that offload have more than one part.
    Work(OpId, u64),
    /// An operation's work is enqueued.
    Leave(OpId),
    /// The micro-batch's backward begins.
    BackwardBegin,
    /// A chunk's gradients are complete.
    Hand(ChunkId),
    /// The micro-batch's backward ended.
    BackwardEnd,
    /// `optimizer.step()` begins.
    Step,
    /// It commits, which is the last that it does.
    Commit,
}

/// The calls of one optimizer step, as the module hooks make them. Where nothing is offloaded, entering an operation enqueues its work.
pub fn calls(trace: &Trace, plan: &Plan, backward: &[Option<(OpId, OpId)>]) -> Vec<Call> {
    let mut micro_batch = Vec::new();
    let mut in_backward = false;
    let offloads = plan.activations.contains(&ActivationPlan::Offload);
    if offloads {
        micro_batch.push(Call::Begin);
    }
    for op in trace.ids() {
        let is_backward = trace.ops[op.index()].phase == Phase::Backward;
        if is_backward && !std::mem::replace(&mut in_backward, true) {
            micro_batch.push(Call::BackwardBegin);
        }
        micro_batch.push(Call::Enter(op));
        if offloads {
            micro_batch.extend(is_backward.then_some(Call::AskBack(op)));
            let offloaded = plan.activations[trace.ops[op.index()].unit as usize] == ActivationPlan::Offload;
            micro_batch.extend((0..if offloaded { PARTS } else { 1 }).map(|part| Call::Work(op, part)));
        }
        if is_backward {
            // Gradients are complete when autograd has accumulated them, which is before the unit is left.
            let complete = trace.chunks(op).iter().filter(|c| backward[c.index()].is_some_and(|(_, last)| last == op));
            micro_batch.extend(complete.map(|&c| Call::Hand(c)));
        }
        micro_batch.push(Call::Leave(op));
    }
    micro_batch.push(Call::BackwardEnd);
    let mut calls = micro_batch.repeat(plan.accumulation as usize);
    calls.extend([Call::Step, Call::Commit]);
    calls
}
