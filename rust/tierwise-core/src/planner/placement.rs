//! The placements that the search looks at: which chunks are streamed, and whose states are on the device.

use super::activations::Activations;
use super::memory::Memory;
use super::spill;
use super::visiting;
use super::{Placement, PlanError, PlanRequest};
use crate::plan::{ChunkPlan, DeviceBytes, HostBytes, NvmePlan, OptimizerClass, ParamHome};
use crate::slab::SLOT_ALIGN;
use crate::streaming::staging_bytes;
use crate::{OpId, Tier};
use std::cell::LazyCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// A search level has at most about this many choices, so that models of thousands of chunks plan in a moment too.
const MAX_LEVELS: usize = 96;
/// The same where gradients are accumulated, which adds a level to the search.
const MAX_LEVELS_ACCUMULATING: usize = 40;
/// Shares of the chunks that may add up their gradients on the device while the host steps them.
const ACCUMULATE_LEVELS: usize = 8;

/// A row is computed when it is looked at: most never are.
type LazyRow<'a> = LazyCell<Row, Box<dyn FnOnce() -> Row + 'a>>;

/// Placements with the same streamed parameters, sums on the device and share of streamed states, from the least device memory to the most.
pub(super) struct Group<'a> {
    pub rows: Vec<LazyRow<'a>>,
    /// Whether a later row never takes more time.
    pub monotone: bool,
    /// Slab bytes, and whether only one gradient may be on its way.
    pub variants: Vec<(u64, bool)>,
    /// From this slab size on, the next chunk can be fetched while one is in use.
    pub prefetch_slab: u64,
}

/// One placement.
#[derive(Clone)]
pub(super) struct Row {
    pub chunks: Vec<ChunkPlan>,
    pub host: HostBytes,
    pub nvme: Option<NvmePlan>,
    pub cost: Cost,
    /// Undo records of all host-class chunks.
    pub undo_bytes: u64,
    /// Chunks whose gradients land in buffers, to be added to sums in host memory.
    pub landing_chunks: u64,
    /// Limit of gradients on their way: ample, tight.
    pub in_flight_bytes: [u64; 2],
    /// Slot bytes of all streamed chunks.
    pub streamed_bytes: u64,
    /// Slot bytes of the largest operation.
    pub slab_step: u64,
    base: DeviceBytes,
    /// Gradients alive at every operation: ample, tight.
    gradients: [Vec<u64>; 2],
}

/// What a placement costs in time.
#[derive(Clone, Copy, Default)]
pub(super) struct Cost {
    /// Elements that the host steps.
    pub host_numel: u64,
    /// Elements whose states visit the device for every step.
    pub visiting_numel: u64,
    /// Bytes of those states, which go each way.
    pub visiting_bytes: u64,
    /// Bytes fetched for every micro-batch.
    pub stream_bytes: u64,
    /// Bytes of rewritten resident parameters for every step.
    pub refresh_bytes: u64,
    /// Bytes of gradients sent for every micro-batch.
    pub grad_bytes: u64,
    /// Bytes of sums that were taken on the device, sent for every step.
    pub sum_bytes: u64,
    /// Host memory traffic of a micro-batch that adds its gradients to accumulators.
    pub accumulate_bytes: u64,
}

impl Group<'_> {
    /// The first row for which `reached` holds, as it then does for all later ones; their number if it holds for none. Looks at both ends
    /// first: few groups have the answer in between.
    pub fn first_where(&self, reached: impl Fn(&Row) -> bool) -> usize {
        let last = self.rows.len() - 1;
        if reached(&self.rows[0]) {
            0
        } else if !reached(&self.rows[last]) {
            self.rows.len()
        } else {
            1 + self.rows[1..last].partition_point(|row| !reached(row))
        }
    }
}

impl Row {
    /// Device bytes at the peak.
    pub fn device_bytes(&self, activations: &Activations, slab: u64, tight: bool, reserve: u64) -> u64 {
        let alive = activations.bytes.iter().zip(&self.gradients[usize::from(tight)]).map(|(a, g)| a + g).max().unwrap_or(0);
        self.base.total() + slab + reserve + alive
    }

    /// The same with `times` as many gradients on their way as `ample` allows, at most all of a micro-batch.
    pub fn with_gradients_ahead(&self, memory: &Memory, times: u64) -> Row {
        let ample = (times * self.in_flight_bytes[0]).min(self.cost.grad_bytes);
        let [ahead, _] = memory.gradients(&self.chunks, [ample, 0]);
        Row { in_flight_bytes: [ample, 0], gradients: [ahead, self.gradients[1].clone()], ..self.clone() }
    }

    /// Device bytes at the peak by purpose, and where the peak is.
    pub fn device_breakdown(&self, activations: &Activations, slab: u64, tight: bool, reserve: u64) -> (DeviceBytes, OpId) {
        let gradients = &self.gradients[usize::from(tight)];
        let mut peak = 0;
        for at in 1..gradients.len() {
            if activations.bytes[at] + gradients[at] > activations.bytes[peak] + gradients[peak] {
                peak = at;
            }
        }
        let bytes =
            DeviceBytes { stream_slab: slab, gradients: gradients[peak], activations: activations.bytes[peak], reserve, ..self.base };
        (bytes, OpId(peak as u32))
    }
}

/// Calls `visit` with every group of placements that the request allows.
pub(super) fn for_each_group<'a>(memory: &'a Memory, request: &PlanRequest, mut visit: impl FnMut(&Group<'a>)) -> Result<(), PlanError> {
    let layout = memory.layout;
    let forward_order = &memory.forward_order;
    if let Placement::Static { shard_param_frac, offload_optim_frac, offload_param_frac, stream_optim_frac } = request.placement {
        let mut chunks = fixed(memory, forward_order, shard_param_frac, offload_optim_frac, offload_param_frac)?;
        visiting::fixed(memory, forward_order, stream_optim_frac, &mut chunks)?;
        let sums = accumulate_levels(request, chunks.len());
        visit(&group(memory, &sums, false, move |&sums| with_sums(&chunks, forward_order, sums)));
        return Ok(());
    }
    let order = streaming_order(memory);
    let shares = if request.visiting { visiting::shares(memory, &request.speeds) } else { vec![0.0] };
    for streamed in levels(order.len(), memory.accumulation) {
        let mut base: Vec<ChunkPlan> = layout
            .chunks
            .iter()
            .map(|c| {
                let class = if c.state_numel == 0 { OptimizerClass::Frozen } else { OptimizerClass::Host };
                ChunkPlan::new(class, ParamHome::Resident)
            })
            .collect();
        for &chunk in &order[..streamed] {
            base[chunk].home = ParamHome::Streamed;
        }
        let eligible: Vec<usize> = forward_order
            .iter()
            .copied()
            .filter(|&c| base[c].home == ParamHome::Resident && base[c].class == OptimizerClass::Host)
            .collect();
        for sums in accumulate_levels(request, base.len()) {
            let base = with_sums(&base, forward_order, sums);
            for &share in &shares {
                let mut base = base.clone();
                if !visiting::spread(memory, &eligible, share, &mut base) && share > 0.0 {
                    continue;
                }
                let (on_device, eligible) = (levels(eligible.len(), memory.accumulation), eligible.clone());
                visit(&group(memory, &on_device, true, move |&on_device| {
                    let mut chunks = base.clone();
                    for &chunk in &eligible[..on_device] {
                        chunks[chunk] = ChunkPlan::new(OptimizerClass::Device, ParamHome::Resident);
                    }
                    chunks
                }));
            }
        }
    }
    Ok(())
}

/// How many chunks may add up gradients on the device while the host steps them: a few shares; none where nothing is added up.
fn accumulate_levels(request: &PlanRequest, chunks: usize) -> Vec<usize> {
    match request.accumulate {
        _ if request.accumulation == 1 => return vec![0],
        Some(Tier::Device) => return vec![chunks],
        Some(Tier::Host | Tier::Nvme) => return vec![0],
        None => {}
    }
    let mut levels: Vec<usize> = (0..=ACCUMULATE_LEVELS).map(|share| chunks * share / ACCUMULATE_LEVELS).collect();
    levels.dedup();
    levels
}

/// The same placement with the sums of the `count` latest-used chunks on the device: theirs are complete first, and so have the longest time
/// to reach the host.
fn with_sums(chunks: &[ChunkPlan], forward_order: &[usize], count: usize) -> Vec<ChunkPlan> {
    let mut chunks = chunks.to_vec();
    for &chunk in forward_order.iter().rev().take(count) {
        if chunks[chunk].class == OptimizerClass::Host {
            chunks[chunk].accumulate = Tier::Device;
        }
    }
    chunks
}

/// `0..=count`, thinned out if that is more than a search can look at; both ends are always in.
pub(super) fn levels(count: usize, accumulation: u32) -> Vec<usize> {
    let most = if accumulation == 1 { MAX_LEVELS } else { MAX_LEVELS_ACCUMULATING };
    let step = count.div_ceil(most).max(1);
    let mut levels: Vec<usize> = (0..=count).step_by(step).collect();
    if levels.last() != Some(&count) {
        levels.push(count);
    }
    levels
}

/// Chunks in the order in which they become streamed: the equal-sized layers first, embeddings, heads and small ones last, shared ones
/// after those; within a kind the latest-used first, because the earliest are better used for device states.
fn streaming_order(memory: &Memory) -> Vec<usize> {
    let layout = memory.layout;
    let mut owners = vec![0_u32; layout.chunks.len()];
    for chunks in &memory.unit_chunks {
        for &chunk in chunks {
            owners[chunk] += 1;
        }
    }
    let bytes = |c: usize| layout.param_bytes(crate::ChunkId(c as u32));
    let mut kinds: BTreeMap<(bool, u64), u64> = BTreeMap::new();
    for (chunk, &owners) in owners.iter().enumerate() {
        *kinds.entry((owners > 1, bytes(chunk))).or_default() += bytes(chunk);
    }
    let mut order: Vec<usize> = (0..layout.chunks.len()).filter(|&c| bytes(c) > 0).collect();
    order.sort_by_key(|&c| {
        let kind = (owners[c] > 1, bytes(c));
        (kind.0, std::cmp::Reverse(kinds[&kind]), kind.1, std::cmp::Reverse((memory.first_use[c], c)))
    });
    order
}

/// One row per level. The first one streams and sends all that any of them does.
fn group<'a, T: Clone + 'a>(memory: &'a Memory, levels: &[T], monotone: bool, place: impl Fn(&T) -> Vec<ChunkPlan> + 'a) -> Group<'a> {
    let first = place(&levels[0]);
    let slot = |c: usize| memory.layout.param_bytes(crate::ChunkId(c as u32)).next_multiple_of(SLOT_ALIGN);
    let streamed = |c: &usize| first[*c].home == ParamHome::Streamed;
    let streamed_bytes: u64 = (0..memory.layout.chunks.len()).filter(streamed).map(slot).sum();
    let largest_op = memory.unit_chunks.iter().map(|chunks| chunks.iter().copied().filter(streamed).map(slot).sum()).max().unwrap_or(0);
    // A chunk that no operation reads can still be asked for by name.
    let largest = (0..memory.layout.chunks.len()).filter(streamed).map(slot).max().unwrap_or(0).max(largest_op);
    // Beyond two operations' worth, a chunk that stays resident saves as many fetches as one more slot.
    let prefetch_slab = (2 * largest).min(streamed_bytes);
    // The same for all, so that a further chunk with states on the device never needs less.
    let staging = staging_bytes(memory.layout, &first);
    let mut variants = vec![(prefetch_slab, false)];
    if largest < prefetch_slab {
        variants.push((largest, false));
    }
    if first.iter().any(|&placed| memory.sends(placed)) {
        variants.extend(variants.clone().iter().map(|&(slab, _)| (slab, true)));
    }
    let place = Rc::new(place);
    let rows = levels
        .iter()
        .map(|level| {
            let (level, place) = (level.clone(), Rc::clone(&place));
            let make: Box<dyn FnOnce() -> Row + 'a> = Box::new(move || row(memory, place(&level), streamed_bytes, largest, staging));
            LazyCell::new(make)
        })
        .collect();
    Group { rows, monotone, variants, prefetch_slab }
}

fn row(memory: &Memory, mut chunks: Vec<ChunkPlan>, streamed_bytes: u64, slab_step: u64, staging: u64) -> Row {
    let layout = memory.layout;
    let mut base = DeviceBytes { staging, ..DeviceBytes::default() };
    let mut host = HostBytes::default();
    let mut cost = Cost::default();
    let (mut undo_bytes, mut landing_chunks) = (0, 0);
    let nvme = spill::spill(memory, &mut chunks);
    for chunk in layout.ids() {
        let placement = chunks[chunk.index()];
        let of_chunk = HostBytes::of_chunk(layout, chunk, placement, memory.accumulation);
        host.params += of_chunk.params;
        host.states += of_chunk.states;
        host.gradients += of_chunk.gradients;
        match placement.home {
            ParamHome::Resident | ParamHome::Spilled => base.resident_params += layout.param_bytes(chunk).next_multiple_of(SLOT_ALIGN),
            ParamHome::Streamed | ParamHome::Fetched => cost.stream_bytes += layout.param_bytes(chunk) * memory.uses[chunk.index()],
        }
        if memory.accumulation > 1 && placement.accumulate == Tier::Device {
            base.accumulators += layout.grad_acc_bytes(chunk);
        }
        match placement.class {
            OptimizerClass::Device => base.states += layout.state_bytes(chunk),
            OptimizerClass::Streamed => {
                cost.visiting_numel += layout.chunks[chunk.index()].state_numel;
                cost.visiting_bytes += layout.state_bytes(chunk);
            }
            OptimizerClass::Host | OptimizerClass::Nvme => {
                cost.host_numel += layout.chunks[chunk.index()].state_numel;
                if placement.class == OptimizerClass::Host {
                    undo_bytes += layout.undo_bytes(chunk);
                }
                if memory.accumulation > 1 && placement.accumulate == Tier::Device {
                    cost.sum_bytes += layout.grad_acc_bytes(chunk);
                } else {
                    cost.grad_bytes += layout.grad_bytes(chunk);
                    // The accumulator is read and written, the landed gradient too.
                    landing_chunks += u64::from(memory.accumulation > 1 && placement.class == OptimizerClass::Host);
                    cost.accumulate_bytes += 2 * (layout.grad_acc_bytes(chunk) + layout.grad_bytes(chunk));
                }
                if placement.home.is_resident() {
                    cost.refresh_bytes += layout.param_bytes(chunk);
                }
            }
            OptimizerClass::Frozen => {}
        }
    }
    host.staging = spill::landing_bytes(memory, &chunks);
    host.nvme_staging = nvme.map_or(0, |n| n.staging_bytes());
    let ample = memory.in_flight_bytes(&chunks);
    let gradients = memory.gradients(&chunks, [ample, 0]);
    Row { chunks, host, nvme, cost, undo_bytes, landing_chunks, in_flight_bytes: [ample, 0], streamed_bytes, slab_step, base, gradients }
}

/// The placement that fractions ask for: whole chunks, at least as many elements as asked for, the latest-used first.
fn fixed(memory: &Memory, forward_order: &[usize], shard: f64, optim: f64, param: f64) -> Result<Vec<ChunkPlan>, PlanError> {
    for (name, frac) in [("shard_param_frac", shard), ("offload_optim_frac", optim), ("offload_param_frac", param)] {
        if !(0.0..=1.0).contains(&frac) {
            return Err(PlanError::Invalid(format!("{name} is {frac}; it must be between 0 and 1")));
        }
    }
    if param > shard {
        return Err(PlanError::Invalid(format!(
            "offload_param_frac is {param}, but only shard_param_frac={shard} of the parameters can be offloaded"
        )));
    }
    let chunks = &memory.layout.chunks;
    let mut plan: Vec<ChunkPlan> = chunks
        .iter()
        .map(|c| {
            let class = if c.state_numel == 0 { OptimizerClass::Frozen } else { OptimizerClass::Device };
            ChunkPlan::new(class, ParamHome::Resident)
        })
        .collect();
    let wanted = |frac: f64, total: u64| (frac * total as f64).round() as u64;
    let mut missing = wanted(optim, chunks.iter().map(|c| c.state_numel).sum());
    for &chunk in forward_order.iter().rev() {
        if missing > 0 && plan[chunk].class == OptimizerClass::Device {
            plan[chunk] = ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident);
            missing = missing.saturating_sub(chunks[chunk].state_numel);
        }
    }
    let total = chunks.iter().map(|c| c.numel).sum();
    let mut missing = wanted(param, total);
    let asked = missing;
    for &chunk in forward_order.iter().rev() {
        if missing > 0 && plan[chunk].class != OptimizerClass::Device && chunks[chunk].numel > 0 {
            plan[chunk].home = ParamHome::Streamed;
            missing = missing.saturating_sub(chunks[chunk].numel);
        }
    }
    if missing > 0 {
        return Err(PlanError::Invalid(format!(
            "offload_param_frac={param} asks for {asked} of {total} elements, but only {} belong to chunks whose optimizer states are in host \
             memory or that are frozen; raise offload_optim_frac (now {optim}) or lower offload_param_frac",
            asked - missing
        )));
    }
    Ok(plan)
}
