//! What is measured: one step, from the end of one backward pass to the end of the next.

use super::machine::{Ended, Lane};
use super::stalls::Stalls;
use super::{Effect, Run};
use serde::Serialize;
use std::collections::BTreeMap;
use tierwise_core::scheduler::Counters;
use tierwise_core::timeline::{Sample, Span, Timeline};

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
#[derive(Default)]
pub struct Window {
    pub start_ns: u64,
    pub compute_ns: u64,
    pub busy_compute_ns: u64,
    pub stalls: Stalls,
    pub h2d_bytes: u64,
    pub d2h_bytes: u64,
    pub communicated_ns: u64,
    pub busy_ns: BTreeMap<String, u64>,
    pub before: Counters,
    pub timeline: Timeline,
}

impl Run<'_> {
    pub(super) fn sample_device(&mut self) {
        let (now, value) = (self.machine.now_ns(), self.device.used());
        if let Some(window) = &mut self.window {
            let at_ns = now - window.start_ns;
            window.timeline.samples.push(Sample { counter: "device bytes".to_owned(), at_ns, value });
        }
    }

    pub(super) fn open_window(&mut self, now: u64) {
        let mut window = Window { start_ns: now, before: self.scheduler.counters(), ..Window::default() };
        for (counter, value) in [("device bytes", self.device.used()), ("host bytes", self.host.used())] {
            window.timeline.samples.push(Sample { counter: counter.to_owned(), at_ns: 0, value });
        }
        self.window = Some(window);
    }

    pub(super) fn close_window(&mut self, now: u64) -> Option<Outcome> {
        let mut window = self.window.take()?;
        window.timeline.spans.sort_by(|a, b| (a.start_ns, &a.track, &a.name).cmp(&(b.start_ns, &b.track, &b.name)));
        let (device_peak_op, activations, gradients) = std::mem::take(&mut self.peak);
        Some(Outcome {
            step_ns: now - window.start_ns,
            compute_ns: window.compute_ns,
            slowdown_ns: window.busy_compute_ns.saturating_sub(window.compute_ns),
            stalls: window.stalls,
            h2d_bytes: window.h2d_bytes,
            d2h_bytes: window.d2h_bytes,
            communicated_ns: window.communicated_ns,
            busy_ns: window.busy_ns,
            device_peak_bytes: self.device.peak(),
            device_peak_op,
            device_peak_activation_bytes: activations,
            device_peak_gradient_bytes: gradients,
            host_peak_bytes: self.host.peak(),
            counters: difference(self.scheduler.counters(), window.before),
            timeline: window.timeline,
        })
    }
}

impl Window {
    pub fn record(&mut self, ended: &Ended<Effect>, now: u64) {
        let start = ended.start_ns.max(self.start_ns);
        let busy = now - start;
        match ended.lane {
            Lane::Compute => {
                self.compute_ns += ended.work as u64;
                self.busy_compute_ns += busy;
            }
            Lane::HostToDevice => self.h2d_bytes += ended.bytes,
            Lane::DeviceToHost => self.d2h_bytes += ended.bytes,
            Lane::Gather | Lane::Reduce => self.communicated_ns += ended.work as u64,
            Lane::Optimizer | Lane::HostAdam | Lane::Landing => {}
        }
        *self.busy_ns.entry(ended.lane.track().to_owned()).or_default() += busy;
        self.timeline.spans.push(Span {
            track: ended.lane.track().to_owned(),
            name: ended.name.clone(),
            start_ns: start - self.start_ns,
            duration_ns: busy,
            bytes: ended.bytes,
        });
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
