//! What goes to the disk: as few chunks as the host budget leaves no room for, the latest-used first: states, then resident parameters, then
//! frozen ones, then streamed ones, then gradients.

use super::NvmeRequest;
use super::memory::Memory;
use crate::layout::ChunkLayout;
use crate::plan::{ChunkPlan, ClipMode, HostBytes, LANDING_BUFFERS, NvmePlan, OptimizerClass, ParamHome, host_region_bytes};
use crate::{ChunkId, Tier};

/// Staging buffers where there are pieces enough: some are read into, some written from, and one is stepped.
const BUFFERS: u64 = 16;
/// Staging buffers where host memory is left over.
const MAX_BUFFERS: u64 = 64;
/// Buffers that fetched parameters come through: enough for the disk to read ahead of the link.
const FETCH_BUFFERS: u32 = 8;
/// Buffers that spilled gradients come through, where there are pieces enough.
const GRAD_BUFFERS: u32 = 8;
/// Staging takes at most this part of what the model's parameters and states are. Of the model, not of the budget: more host memory then never
/// spills more, and what an error says is needed is enough.
const STAGING_SHARE: u64 = 16;
/// Largest staging buffer: beyond it a disk gains nothing.
const MAX_BUFFER_BYTES: u64 = 32 << 20;
/// A piece is a multiple of this many elements, so that every payload in it is aligned. A power of two.
const PIECE_ALIGN: u64 = 4096;
/// Largest block of the spill file.
const MAX_BLOCK_BYTES: u64 = 4 << 20;
/// Buffers and blocks are multiples of this: the largest alignment that a file system asks of direct I/O.
const BLOCK_ALIGN: u64 = 64 << 10;

/// What a stage of spilling moves to the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spills {
    States,
    Params,
    /// Parameters that are read for every use.
    Fetched,
    Gradients,
}

/// How a chunk is placed after a stage of spilling, if that concerns it.
type Stage = fn(&Memory, usize, ChunkPlan) -> Option<ChunkPlan>;

/// Moves chunks of a placement to the disk until its host bytes fit, or nothing is left to move; gives what is there then.
pub(super) fn spill(memory: &Memory, chunks: &mut [ChunkPlan]) -> Option<NvmePlan> {
    memory.nvme?;
    let host = |placed: ChunkPlan, c: usize| HostBytes::of_chunk(memory.layout, ChunkId(c as u32), placed, memory.accumulation).total();
    let mut used: u64 = chunks.iter().enumerate().map(|(c, &placed)| host(placed, c)).sum::<u64>() + landing_bytes(memory, chunks);
    if used <= memory.host_budget {
        return None;
    }
    let mut plan = sizes(memory);
    if chunks.iter().all(|placed| placed.class != OptimizerClass::Host) {
        // No step will use them: they are for whoever reads or sets frozen parameters by name.
        plan.buffers = 2;
    }
    used += plan.staging_bytes();
    // The earliest-used chunks keep the fastest tier: their parameters are needed first.
    let latest_first: Vec<usize> = memory.forward_order.iter().rev().copied().collect();
    let fetch_buffer_bytes = plan.piece_numel.max(plan.frozen_piece_numel) * memory.layout.precision.param_bytes();
    let stages: [(Spills, Stage); 5] = [
        (Spills::States, states),
        (Spills::Params, resident_params),
        (Spills::Fetched, frozen_params),
        (Spills::Fetched, streamed_params),
        (Spills::Gradients, gradients),
    ];
    for (what, spilled) in stages {
        if used <= memory.host_budget {
            break;
        }
        if what == Spills::Fetched && plan.fetch_buffers == 0 {
            let fetched = |c: usize| frozen_params(memory, c, chunks[c]).or_else(|| streamed_params(memory, c, chunks[c]));
            let saved: u64 = latest_first.iter().filter_map(|&c| fetched(c).map(|placed| host(chunks[c], c) - host(placed, c))).sum();
            // The buffers for all of it would take more than they save.
            if saved <= u64::from(FETCH_BUFFERS) * fetch_buffer_bytes {
                continue;
            }
        }
        let landing = if what == Spills::Gradients { grad_landing(memory, chunks, &latest_first, &mut plan) } else { Some(0) };
        let Some(mut landing) = landing else { continue };
        for &c in &latest_first {
            if used <= memory.host_budget {
                break;
            }
            if let Some(placed) = spilled(memory, c, chunks[c]) {
                used = used + host(placed, c) - host(chunks[c], c);
                chunks[c] = placed;
                if placed.home == ParamHome::Fetched && plan.fetch_buffers == 0 {
                    (plan.fetch_buffers, plan.fetch_buffer_bytes) = (FETCH_BUFFERS, fetch_buffer_bytes);
                    used += u64::from(FETCH_BUFFERS) * fetch_buffer_bytes;
                }
                used += std::mem::take(&mut landing);
            }
        }
    }
    if !chunks.iter().any(ChunkPlan::spills_grads) {
        (plan.grad_buffers, plan.grad_buffer_bytes) = (0, 0);
    }
    if !chunks.iter().any(|placed| placed.home.is_spilled()) {
        // Without the place of parameters there is room for more buffers.
        used -= plan.staging_bytes();
        plan.buffer_bytes = (stepped_numel(memory, plan.piece_numel) * memory.layout.precision.state_bytes()).next_multiple_of(BLOCK_ALIGN);
        plan.block_bytes = plan.block_bytes.min(plan.buffer_bytes);
        used += plan.staging_bytes();
    }
    count(memory, chunks, &mut plan);
    if plan.payload_bytes == 0 {
        return None;
    }
    // What is left is too little for another chunk; as buffers it keeps the disk at work while nothing can be stepped.
    let pieces: u64 = {
        let spilled = memory.layout.chunks.iter().zip(&*chunks).filter(|(_, placed)| placed.class == OptimizerClass::Nvme);
        spilled.map(|(layout, _)| layout.state_numel.div_ceil(plan.piece_numel)).sum()
    };
    let room = memory.host_budget.saturating_sub(used) / plan.buffer_bytes;
    let more = room.min(MAX_BUFFERS.min(pieces).saturating_sub(u64::from(plan.buffers)));
    let mut larger = NvmePlan { buffers: plan.buffers + more as u32, ..plan };
    count(memory, chunks, &mut larger);
    // Undo records use what is left too, and the disk may have no room to rewrite more at once.
    let fits = memory.clip_mode == ClipMode::Defer && memory.nvme.is_some_and(|nvme| larger.file_bytes <= nvme.budget);
    Some(if fits { larger } else { plan })
}

fn states(_: &Memory, _: usize, placed: ChunkPlan) -> Option<ChunkPlan> {
    (placed.class == OptimizerClass::Host).then_some(ChunkPlan { class: OptimizerClass::Nvme, ..placed })
}

fn resident_params(_: &Memory, _: usize, placed: ChunkPlan) -> Option<ChunkPlan> {
    let moves = placed.class == OptimizerClass::Nvme && placed.home == ParamHome::Resident;
    moves.then_some(ChunkPlan { home: ParamHome::Spilled, ..placed })
}

/// The disk only reads them, once they are there.
fn frozen_params(_: &Memory, _: usize, placed: ChunkPlan) -> Option<ChunkPlan> {
    let moves = placed.class == OptimizerClass::Frozen && placed.home == ParamHome::Streamed;
    moves.then_some(ChunkPlan { home: ParamHome::Fetched, ..placed })
}

/// After the resident ones, which the disk need not read again for every use. A piece has as many parameters as states: a chunk of which
/// only a part has states, as no model that is boosted gives it, keeps its parameters in memory.
fn streamed_params(memory: &Memory, chunk: usize, placed: ChunkPlan) -> Option<ChunkPlan> {
    let layout = &memory.layout.chunks[chunk];
    let moves = placed.class == OptimizerClass::Nvme && placed.home == ParamHome::Streamed && layout.numel == layout.state_numel;
    moves.then_some(ChunkPlan { home: ParamHome::Fetched, ..placed })
}

/// Last of all: with several micro-batches the disk moves their sums for each. Sums that are taken on the device stay in memory.
fn gradients(memory: &Memory, _: usize, placed: ChunkPlan) -> Option<ChunkPlan> {
    let moves = placed.class == OptimizerClass::Nvme && memory.sends(placed) && !placed.spills_grads();
    moves.then_some(placed.accumulating(Tier::Nvme))
}

/// Sizes the buffers of spilled gradients, and gives what they and the landing of gradients take beside what is there already; nothing if
/// that is more than all gradients on the disk would save.
fn grad_landing(memory: &Memory, chunks: &[ChunkPlan], order: &[usize], plan: &mut NvmePlan) -> Option<u64> {
    let mut placed = chunks.to_vec();
    let (mut saved, mut pieces) = (0, 0);
    for &c in order {
        if let Some(spilled) = gradients(memory, c, placed[c]) {
            saved += HostBytes::of_chunk(memory.layout, ChunkId(c as u32), placed[c], memory.accumulation).gradients;
            pieces += memory.layout.chunks[c].state_numel.div_ceil(plan.piece_numel);
            placed[c] = spilled;
        }
    }
    plan.grad_buffers = GRAD_BUFFERS.min(pieces as u32).max(2);
    plan.grad_buffer_bytes = plan.piece_numel * memory.layout.final_grad_element(memory.accumulation);
    let landing = landing_bytes(memory, &placed) - landing_bytes(memory, chunks);
    let taken = landing + u64::from(plan.grad_buffers) * plan.grad_buffer_bytes;
    (saved > taken).then_some(taken)
}

/// Buffers in which gradients land that are added to accumulators, or go on to the disk.
pub(super) fn landing_bytes(memory: &Memory, chunks: &[ChunkPlan]) -> u64 {
    let lands = |c: &ChunkId| {
        let placed = chunks[c.index()];
        memory.sends(placed) && (memory.accumulation > 1 || placed.spills_grads())
    };
    u64::from(LANDING_BUFFERS)
        * host_region_bytes(memory.layout.ids().filter(lands).map(|c| memory.layout.grad_bytes(c)).max().unwrap_or(0))
}

fn sizes(memory: &Memory) -> NvmePlan {
    let element = memory.layout.precision.undo_bytes();
    let precision = memory.layout.precision;
    let frozen = |c: &ChunkLayout| if c.state_numel == 0 { c.numel } else { 0 };
    let of_states = memory.layout.chunks.iter().map(|c| c.state_numel).sum::<u64>() * element;
    let of_frozen = memory.layout.chunks.iter().map(frozen).sum::<u64>() * precision.param_bytes();
    let staging = (of_states + of_frozen) / STAGING_SHARE;
    let wanted = (staging / BUFFERS).min(MAX_BUFFER_BYTES);
    let stepped = memory.layout.chunks.iter().map(|c| c.state_numel).max().unwrap_or(0).next_multiple_of(PIECE_ALIGN);
    let largest = memory.layout.chunks.iter().map(frozen).max().unwrap_or(0).next_multiple_of(PIECE_ALIGN).max(stepped);
    // A power of two: states, parameters and gradients of a large piece are whole blocks then, each of them.
    let piece_numel = power_of_two_within(wanted / element).min(largest).max(PIECE_ALIGN);
    // Where little of a large model is trained, pieces are as large as the disk likes them, and buffers as the states.
    let states = stepped_numel(memory, piece_numel) * precision.state_bytes();
    let buffer_bytes = (piece_numel * precision.param_bytes() + states).next_multiple_of(BLOCK_ALIGN);
    let pieces: u64 = memory.layout.chunks.iter().map(|c| c.state_numel.div_ceil(piece_numel)).sum();
    let block_bytes = buffer_bytes.min(MAX_BLOCK_BYTES);
    let frozen_blocks = (piece_numel * precision.param_bytes() / block_bytes).max(1);
    NvmePlan {
        piece_numel,
        frozen_piece_numel: if of_frozen > 0 { frozen_blocks * block_bytes / precision.param_bytes() } else { 0 },
        buffer_bytes,
        buffers: (staging / buffer_bytes).min(BUFFERS).min(pieces).max(2) as u32,
        block_bytes,
        ..NvmePlan::default()
    }
}

/// Elements of the largest piece that has states.
fn stepped_numel(memory: &Memory, piece_numel: u64) -> u64 {
    let largest = memory.layout.chunks.iter().map(|c| c.state_numel).max().unwrap_or(0);
    piece_numel.min(largest.next_multiple_of(PIECE_ALIGN).max(PIECE_ALIGN))
}

/// The largest power of two that is no more than `most`, at least 1.
fn power_of_two_within(most: u64) -> u64 {
    1 << most.max(1).ilog2()
}

fn count(memory: &Memory, chunks: &[ChunkPlan], plan: &mut NvmePlan) {
    let mut largest = 0;
    let (mut fetched, mut frozen) = (0, 0);
    let (mut grads, mut largest_grad, mut most_landing) = (0, 0, 0);
    (plan.payload_bytes, plan.file_bytes) = (0, 0);
    let precision = memory.layout.precision;
    for (chunk, (layout, placed)) in memory.layout.chunks.iter().zip(chunks).enumerate() {
        let numel = memory.layout.spilled_numel(ChunkId(chunk as u32), *placed);
        if numel == 0 {
            continue;
        }
        let element = memory.layout.spilled_bytes(*placed);
        let round = |bytes: u64| bytes.next_multiple_of(plan.block_bytes);
        // What is fetched alone is stored alone.
        let extent = |numel: u64| match placed.home {
            ParamHome::Fetched if placed.class == OptimizerClass::Nvme => {
                round(numel * precision.param_bytes()) + round(numel * precision.state_bytes())
            }
            _ => round(numel * element),
        };
        let is_frozen = placed.class == OptimizerClass::Frozen;
        let piece_numel = if is_frozen { plan.frozen_piece_numel } else { plan.piece_numel };
        let (whole, rest) = (numel / piece_numel, numel % piece_numel);
        *(if is_frozen { &mut frozen } else { &mut plan.payload_bytes }) += numel * element;
        plan.file_bytes += whole * extent(piece_numel) + extent(rest);
        largest = largest.max(extent(piece_numel.min(numel)));
        if placed.spills_grads() {
            let element = memory.layout.final_grad_element(memory.accumulation);
            let extents = whole * round(plan.piece_numel * element) + round(rest * element);
            grads += layout.state_numel * element;
            plan.file_bytes += extents;
            largest_grad = largest_grad.max(round(plan.piece_numel.min(layout.state_numel) * element));
            most_landing = most_landing.max(extents);
        }
        if placed.home == ParamHome::Fetched {
            fetched += u64::from(memory.accumulation) * memory.uses[chunk] * layout.numel * precision.param_bytes();
        }
    }
    // The last copy of a piece stays until the new one is complete.
    plan.file_bytes += u64::from(plan.buffers) * largest;
    // The same for gradients: both landing buffers are written at once, or as many pieces of sums as there are buffers.
    plan.file_bytes += if memory.accumulation > 1 { u64::from(plan.grad_buffers) * largest_grad } else { 2 * most_landing };
    (plan.read_bytes, plan.written_bytes) = (plan.payload_bytes + fetched, plan.payload_bytes);
    plan.fetched_bytes = fetched;
    // Frozen parameters are not written again.
    plan.payload_bytes += grads + frozen;
    // The first micro-batch writes its sums, later ones read and write them; the step reads what is there then.
    let micro_batches = u64::from(memory.accumulation);
    (plan.grad_read_bytes, plan.grad_written_bytes) = ((micro_batches - 1) * grads, micro_batches * grads);
    plan.read_bytes += plan.grad_read_bytes + grads;
    plan.written_bytes += plan.grad_written_bytes;
}

/// The part of [`seconds`] in which gradients land on the disk or are added to sums there, while backward passes run.
pub(super) fn landing_seconds(plan: &NvmePlan, request: &NvmeRequest) -> f64 {
    plan.grad_read_bytes as f64 / request.read_bytes + plan.grad_written_bytes as f64 / request.write_bytes
}

/// The part of [`seconds`] in which parameters are read for their uses, all step long.
pub(super) fn fetching_seconds(plan: &NvmePlan, request: &NvmeRequest) -> f64 {
    plan.fetched_bytes as f64 / request.read_bytes
}

/// Seconds in which the disk reads and writes all that a step moves; it does one or the other at any moment.
pub(super) fn seconds(plan: &NvmePlan, request: &NvmeRequest) -> f64 {
    plan.read_bytes as f64 / request.read_bytes + plan.written_bytes as f64 / request.write_bytes
}
