//! What goes to the disk: as few chunks as the host budget leaves no room for, the latest-used first, parameters last of all.

use super::NvmeRequest;
use super::memory::Memory;
use crate::ChunkId;
use crate::layout::ChunkLayout;
use crate::plan::{ChunkPlan, ClipMode, HostBytes, NvmePlan, OptimizerClass, ParamHome, host_region_bytes};

/// Staging buffers where there are pieces enough: some are read into, some written from, and one is stepped.
const BUFFERS: u64 = 16;
/// Staging buffers where host memory is left over.
const MAX_BUFFERS: u64 = 64;
/// Staging takes at most this part of what the model's parameters and states are. Of the model, not of the budget: more host memory then never
/// spills more, and what an error says is needed is enough.
const STAGING_SHARE: u64 = 16;
/// Largest staging buffer: beyond it a disk gains nothing.
const MAX_BUFFER_BYTES: u64 = 32 << 20;
/// A piece is a multiple of this many elements, so that every payload in it is aligned.
const PIECE_ALIGN: u64 = 4096;
/// Largest block of the spill file.
const MAX_BLOCK_BYTES: u64 = 4 << 20;
/// Buffers and blocks are multiples of this: the largest alignment that a file system asks of direct I/O.
const BLOCK_ALIGN: u64 = 64 << 10;

/// Moves chunks of a placement to the disk until its host bytes fit, or nothing is left to move; gives what is there then.
pub(super) fn spill(memory: &Memory, chunks: &mut [ChunkPlan]) -> Option<NvmePlan> {
    memory.nvme?;
    let host = |placed: ChunkPlan, c: usize| HostBytes::of_chunk(memory.layout, ChunkId(c as u32), placed, memory.accumulation).total();
    let mut used: u64 = chunks.iter().enumerate().map(|(c, &placed)| host(placed, c)).sum::<u64>() + landing_bytes(memory, chunks);
    if used <= memory.host_budget {
        return None;
    }
    let mut plan = sizes(memory);
    used += u64::from(plan.buffers) * plan.buffer_bytes;
    // The earliest-used chunks keep the fastest tier: their parameters are needed first.
    let latest_first: Vec<usize> = memory.forward_order.iter().rev().copied().collect();
    for spilled in [
        |placed: ChunkPlan| (placed.class == OptimizerClass::Host).then_some(ChunkPlan { class: OptimizerClass::Nvme, ..placed }),
        |placed: ChunkPlan| {
            let moves = placed.class == OptimizerClass::Nvme && placed.home == ParamHome::Resident;
            moves.then_some(ChunkPlan { home: ParamHome::Spilled, ..placed })
        },
    ] {
        for &c in &latest_first {
            if used <= memory.host_budget {
                break;
            }
            if let Some(placed) = spilled(chunks[c]) {
                used = used + host(placed, c) - host(chunks[c], c);
                chunks[c] = placed;
            }
        }
    }
    count(memory, chunks, &mut plan);
    if plan.payload_bytes == 0 {
        return None;
    }
    // What is left is too little for another chunk; as buffers it keeps the disk at work while nothing can be stepped.
    let pieces: u64 = spilled_chunks(memory, chunks).map(|(layout, _)| layout.state_numel.div_ceil(plan.piece_numel)).sum();
    let room = memory.host_budget.saturating_sub(used) / plan.buffer_bytes;
    let more = room.min(MAX_BUFFERS.min(pieces).saturating_sub(u64::from(plan.buffers)));
    let mut larger = NvmePlan { buffers: plan.buffers + more as u32, ..plan };
    count(memory, chunks, &mut larger);
    // Undo records use what is left too, and the disk may have no room to rewrite more at once.
    let fits = memory.clip_mode == ClipMode::Defer && memory.nvme.is_some_and(|nvme| larger.file_bytes <= nvme.budget);
    Some(if fits { larger } else { plan })
}

/// Buffers in which gradients land that are added to accumulators.
pub(super) fn landing_bytes(memory: &Memory, chunks: &[ChunkPlan]) -> u64 {
    if memory.accumulation < 2 {
        return 0;
    }
    let sent = memory.layout.ids().filter(|c| memory.sends(chunks[c.index()]));
    2 * host_region_bytes(sent.map(|c| memory.layout.grad_bytes(c)).max().unwrap_or(0))
}

fn sizes(memory: &Memory) -> NvmePlan {
    let element = memory.layout.precision.undo_bytes();
    let staging = memory.layout.chunks.iter().map(|c| c.state_numel).sum::<u64>() * element / STAGING_SHARE;
    let wanted = (staging / BUFFERS).min(MAX_BUFFER_BYTES);
    let largest = memory.layout.chunks.iter().map(|c| c.state_numel).max().unwrap_or(0);
    let piece_numel = (wanted / element).min(largest.next_multiple_of(PIECE_ALIGN)) / PIECE_ALIGN * PIECE_ALIGN;
    let piece_numel = piece_numel.max(PIECE_ALIGN);
    let buffer_bytes = (piece_numel * element).next_multiple_of(BLOCK_ALIGN);
    let pieces: u64 = memory.layout.chunks.iter().map(|c| c.state_numel.div_ceil(piece_numel)).sum();
    NvmePlan {
        piece_numel,
        buffer_bytes,
        buffers: (staging / buffer_bytes).min(BUFFERS).min(pieces).max(2) as u32,
        block_bytes: buffer_bytes.min(MAX_BLOCK_BYTES),
        ..NvmePlan::default()
    }
}

fn spilled_chunks<'a>(memory: &'a Memory, chunks: &'a [ChunkPlan]) -> impl Iterator<Item = (&'a ChunkLayout, &'a ChunkPlan)> {
    memory.layout.chunks.iter().zip(chunks).filter(|(_, placed)| placed.class == OptimizerClass::Nvme)
}

fn count(memory: &Memory, chunks: &[ChunkPlan], plan: &mut NvmePlan) {
    let mut largest = 0;
    (plan.payload_bytes, plan.file_bytes) = (0, 0);
    for (layout, placed) in spilled_chunks(memory, chunks) {
        let element = memory.layout.spilled_bytes(*placed);
        let extent = |numel: u64| (numel * element).next_multiple_of(plan.block_bytes);
        let (whole, rest) = (layout.state_numel / plan.piece_numel, layout.state_numel % plan.piece_numel);
        plan.payload_bytes += layout.state_numel * element;
        plan.file_bytes += whole * extent(plan.piece_numel) + extent(rest);
        largest = largest.max(extent(plan.piece_numel.min(layout.state_numel)));
    }
    // The last copy of a piece stays until the new one is complete.
    plan.file_bytes += u64::from(plan.buffers) * largest;
    (plan.read_bytes, plan.written_bytes) = (plan.payload_bytes, plan.payload_bytes);
}

/// Seconds in which the disk reads and writes what a step rewrites; it does one or the other at any moment.
pub(super) fn seconds(plan: &NvmePlan, request: &NvmeRequest) -> f64 {
    plan.read_bytes as f64 / request.read_bytes + plan.written_bytes as f64 / request.write_bytes
}
