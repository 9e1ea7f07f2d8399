//! What is measured: one step, from the end of one backward pass to the end of the next.

use super::Run;
use super::stalls::Stalls;
use super::tally::Tally;
use serde::Serialize;
use std::collections::BTreeMap;
use tierwise_core::scheduler::Counters;
use tierwise_core::timeline::Timeline;

/// What one steady-state step did, from the end of one backward pass to the end of the next.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// Nanoseconds of the step.
    pub step_ns: u64,
    /// Nanoseconds of compute at full speed.
    pub compute_ns: u64,
    /// Nanoseconds that compute took longer because copies, the host or the device optimizer shared the machine.
    pub slowdown_ns: u64,
    /// Nanoseconds that compute stood still, by cause.
    pub stalls: Stalls,
    /// Bytes copied to the device.
    pub h2d_bytes: u64,
    /// Bytes copied from the device.
    pub d2h_bytes: u64,
    /// Bytes read from the spill file.
    pub nvme_read_bytes: u64,
    /// Bytes written to the spill file.
    pub nvme_written_bytes: u64,
    /// Nanoseconds of collectives of the data-parallel group at full speed of the links, hidden or not.
    pub communicated_ns: u64,
    /// Nanoseconds that each lane was busy, by track.
    pub busy_ns: BTreeMap<String, u64>,
    /// Most device bytes in use, reserve included.
    pub device_peak_bytes: u64,
    /// Operation at which the device peak was.
    pub device_peak_op: String,
    /// Saved activations at the device peak.
    pub device_peak_activation_bytes: u64,
    /// Gradients at the device peak.
    pub device_peak_gradient_bytes: u64,
    /// Most pinned host bytes in use.
    pub host_peak_bytes: u64,
    /// What the scheduler did in the step.
    pub counters: Counters,
    /// Spans of the step and byte counters; its epoch is the start of the step.
    #[serde(skip)]
    pub timeline: Timeline,
}

/// What is measured.
pub struct Window {
    pub tally: Tally,
    before: Counters,
}

impl Run<'_> {
    pub(super) fn sample_device(&mut self) {
        let (now, value) = (self.machine.now_ns(), self.device.used());
        if let Some(window) = &mut self.window {
            window.tally.sample("device bytes", now, value);
        }
    }

    pub(super) fn open_window(&mut self, now: u64) {
        let mut window = Window { tally: Tally::from(now), before: self.scheduler.counters() };
        for (counter, value) in [("device bytes", self.device.used()), ("host bytes", self.host.used())] {
            window.tally.sample(counter, now, value);
        }
        self.window = Some(window);
    }

    pub(super) fn close_window(&mut self, now: u64) -> Option<Outcome> {
        let Window { mut tally, before } = self.window.take()?;
        tally.close();
        let (device_peak_op, activations, gradients) = std::mem::take(&mut self.peak);
        Some(Outcome {
            step_ns: now - tally.start_ns,
            compute_ns: tally.compute_ns,
            slowdown_ns: tally.busy_compute_ns.saturating_sub(tally.compute_ns),
            stalls: tally.stalls,
            h2d_bytes: tally.h2d_bytes,
            d2h_bytes: tally.d2h_bytes,
            nvme_read_bytes: tally.nvme_read_bytes,
            nvme_written_bytes: tally.nvme_written_bytes,
            communicated_ns: tally.communicated_ns,
            busy_ns: tally.busy_ns,
            device_peak_bytes: self.device.peak(),
            device_peak_op,
            device_peak_activation_bytes: activations,
            device_peak_gradient_bytes: gradients,
            host_peak_bytes: self.host.peak(),
            counters: difference(self.scheduler.counters(), before),
            timeline: tally.timeline,
        })
    }
}

fn difference(after: Counters, before: Counters) -> Counters {
    Counters {
        fetches: after.fetches - before.fetches,
        demand_fetches: after.demand_fetches - before.demand_fetches,
        evictions: after.evictions - before.evictions,
        off_trace: after.off_trace - before.off_trace,
        steps: after.steps - before.steps,
        clipped: after.clipped - before.clipped,
        skipped: after.skipped - before.skipped,
        speculated: after.speculated - before.speculated,
        undone: after.undone - before.undone,
    }
}
