//! Bytes that other systems hold for the whole step.

use super::policy::SUB_GROUP;
use super::step::Step;

/// Host memory of a Python process with torch and CUDA, measured with forward and backward alone.
const PROCESS_BYTES: u64 = 2_000_000_000;

impl Step<'_> {
    /// Device bytes that stay for the whole step.
    pub(super) fn base_bytes(&self) -> u64 {
        let traits = &self.traits;
        let chunks = &self.rank.built.layout.chunks;
        let whole: u64 = chunks.iter().map(|c| c.numel).sum();
        let largest = chunks.iter().map(|c| c.numel).max().unwrap_or(0);
        let gathered = if traits.gathers && (self.ways() > 1 || traits.fetch_bytes > 0 || traits.device_param_bytes > 2) {
            2 * 2 * largest
        } else {
            0
        };
        // One whole gradient is made while another is reduced or copied.
        let moving = if traits.splits_grads { 2 * 2 * largest } else { 0 };
        traits.device_param_bytes * self.part(whole, traits.gathers)
            + traits.device_grad_bytes * self.part(whole, traits.splits_grads)
            + traits.device_state_bytes * self.part(whole, traits.splits_states)
            + (traits.kept_state_bytes as f64 * (1.0 - self.cpu_share()) * self.part(whole, traits.splits_states) as f64) as u64
            + traits.buffer_bytes
            + gathered
            + moving
            + self.request.memory.reserve_bytes()
    }

    /// Host bytes.
    pub(super) fn host_bytes(&self) -> u64 {
        let whole: u64 = self.rank.built.layout.chunks.iter().map(|c| c.numel).sum();
        let part = (self.part(whole, self.traits.splits_states) as f64 * self.cpu_share()).round() as u64;
        let accumulated = if self.accumulation > 1 { self.traits.accumulate_bytes } else { 0 };
        let pinned = self.traits.pinned_bytes.iter().chain((accumulated > 0).then_some(&accumulated));
        let rounded = |bytes: u64| if self.request.pageable || bytes == 0 { bytes } else { bytes.next_power_of_two() };
        let buffers: u64 = pinned.map(|&bytes| rounded(bytes * part)).sum();
        // Of every tensor half, shard and gradient, each in its own block.
        let chunks = &self.rank.built.layout.chunks;
        let tensors = chunks.iter().flat_map(|chunk| &chunk.params).map(|tensor| self.part(tensor.numel, self.traits.splits_states));
        let by_tensor: u64 = tensors.map(|numel| 2 * rounded(self.traits.pinned_by_tensor_bytes / 2 * numel)).sum();
        let of_sub_group = self.traits.pinned_by_sub_group_bytes;
        let sub_groups = part / SUB_GROUP * rounded(of_sub_group * SUB_GROUP) + rounded(of_sub_group * (part % SUB_GROUP));
        let staging = rounded(self.traits.staging_bytes * self.part(whole, self.traits.splits_states));
        // What is taken afresh is a sub-group's at a time.
        let fresh = self.traits.fresh_bytes * part.min(SUB_GROUP);
        PROCESS_BYTES + self.traits.host_bytes * part + buffers + by_tensor + sub_groups + staging + fresh
    }
}
