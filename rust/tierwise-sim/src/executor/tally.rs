//! What lanes did from one moment on: time, bytes, spans. Both programs of the simulator count with it, ours and the peers'.

use super::machine::{Ended, Lane};
use super::stalls::{Cause, Stalls};
use std::collections::BTreeMap;
use tierwise_core::timeline::{Sample, Span, Timeline};

/// Sums and the timeline since `start_ns`.
#[derive(Debug, Default)]
pub struct Tally {
    pub start_ns: u64,
    /// Compute at full speed.
    pub compute_ns: u64,
    /// Compute as it was.
    pub busy_compute_ns: u64,
    pub stalls: Stalls,
    pub h2d_bytes: u64,
    pub d2h_bytes: u64,
    pub nvme_read_bytes: u64,
    pub nvme_written_bytes: u64,
    pub communicated_ns: u64,
    /// By track.
    pub busy_ns: BTreeMap<String, u64>,
    pub timeline: Timeline,
}

impl Tally {
    /// Counts nothing that was before `start_ns`.
    pub fn from(start_ns: u64) -> Self {
        Tally { start_ns, ..Tally::default() }
    }

    /// A task ended.
    pub fn ended<E>(&mut self, ended: &Ended<E>, now: u64) {
        let start = ended.start_ns.max(self.start_ns);
        let busy = now - start;
        match ended.lane {
            Lane::Compute => {
                self.compute_ns += ended.work as u64;
                self.busy_compute_ns += busy;
            }
            Lane::HostToDevice | Lane::StatesIn => self.h2d_bytes += ended.bytes,
            Lane::DeviceToHost | Lane::StatesOut => self.d2h_bytes += ended.bytes,
            Lane::DiskRead => self.nvme_read_bytes += ended.bytes,
            Lane::DiskWrite => self.nvme_written_bytes += ended.bytes,
            Lane::Gather | Lane::Reduce => self.communicated_ns += ended.work as u64,
            Lane::Optimizer | Lane::HostAdam | Lane::SpillAdam | Lane::Landing | Lane::Thread => {}
        }
        *self.busy_ns.entry(ended.lane.track().to_owned()).or_default() += busy;
        self.span(ended.lane.track(), &ended.name, start, now, ended.bytes);
    }

    /// Compute stood still; the span only, because a stall may have several causes.
    pub fn waited(&mut self, cause: Cause, since: u64, now: u64) {
        self.span("compute wait", cause.name(), since, now, 0);
    }

    /// A counter's value.
    pub fn sample(&mut self, counter: &str, now: u64, value: u64) {
        self.timeline.samples.push(Sample { counter: counter.to_owned(), at_ns: now - self.start_ns, value });
    }

    fn span(&mut self, track: &str, name: &str, start: u64, end: u64, bytes: u64) {
        self.timeline.spans.push(Span {
            track: track.to_owned(),
            name: name.to_owned(),
            start_ns: start - self.start_ns,
            duration_ns: end - start,
            bytes,
        });
    }

    /// The end: spans in their order.
    pub fn close(&mut self) {
        self.timeline.spans.sort_by(|a, b| (a.start_ns, &a.track, &a.name).cmp(&(b.start_ns, &b.track, &b.name)));
    }
}
