//! Why compute stood still.

use serde::Serialize;

/// A reason to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// Parameters were on their way to the device.
    Fetch,
    /// The previous optimizer step of a chunk, or the copy of its result, was not finished.
    Optimizer,
    /// Gradients were on their way, or the norm was not decided.
    Gradients,
    /// A collective of the data-parallel group was not finished.
    Communication,
    /// Device memory was not given back yet.
    Memory,
    /// Offloaded activations were on their way.
    Activations,
    /// The training thread had not enqueued the next operation.
    Launch,
}

impl Cause {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Fetch => "parameter fetch",
            Cause::Optimizer => "optimizer step pending",
            Cause::Gradients => "gradient hand-over",
            Cause::Communication => "communication",
            Cause::Memory => "device memory",
            Cause::Activations => "activations",
            Cause::Launch => "launch",
        }
    }
}

/// Nanoseconds that compute stood still, by cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Stalls {
    /// Parameters were on their way to the device.
    pub parameter_fetch_ns: u64,
    /// The previous optimizer step of a chunk, or the copy of its result, was not finished.
    pub optimizer_step_ns: u64,
    /// Gradients were on their way, or the norm was not decided.
    pub gradient_hand_over_ns: u64,
    /// A collective of the data-parallel group was not finished.
    pub communication_ns: u64,
    /// Other pipeline stages had not produced what this one needs.
    pub pipeline_ns: u64,
    /// Gradients that a device step still read left no room.
    pub device_memory_ns: u64,
    /// Offloaded activations were on their way to the host or back.
    pub activations_ns: u64,
    /// The training thread had not enqueued the next operation.
    pub launch_ns: u64,
}

impl Stalls {
    /// Adds a stall.
    pub fn add(&mut self, cause: Cause, ns: u64) {
        *match cause {
            Cause::Fetch => &mut self.parameter_fetch_ns,
            Cause::Optimizer => &mut self.optimizer_step_ns,
            Cause::Gradients => &mut self.gradient_hand_over_ns,
            Cause::Communication => &mut self.communication_ns,
            Cause::Memory => &mut self.device_memory_ns,
            Cause::Activations => &mut self.activations_ns,
            Cause::Launch => &mut self.launch_ns,
        } += ns;
    }

    /// Every cause for people, with its nanoseconds.
    pub fn by_cause(&self) -> [(&'static str, u64); 8] {
        [
            ("stall: parameter fetch", self.parameter_fetch_ns),
            ("stall: optimizer step", self.optimizer_step_ns),
            ("stall: gradients", self.gradient_hand_over_ns),
            ("stall: communication", self.communication_ns),
            ("stall: pipeline", self.pipeline_ns),
            ("stall: device memory", self.device_memory_ns),
            ("stall: activations", self.activations_ns),
            ("stall: launch", self.launch_ns),
        ]
    }

    /// Sum over all causes.
    pub fn total_ns(&self) -> u64 {
        self.by_cause().iter().map(|(_, ns)| ns).sum()
    }
}

/// Intervals in which the training thread was blocked.
#[derive(Debug, Default)]
pub struct Blocks(Vec<(u64, u64, Cause)>);

impl Blocks {
    /// Remembers an interval; they come in order and do not overlap.
    pub fn add(&mut self, from_ns: u64, to_ns: u64, cause: Cause) {
        if to_ns > from_ns {
            self.0.push((from_ns, to_ns, cause));
        }
    }

    /// Splits an interval in which nothing was enqueued by what the thread did meanwhile.
    pub fn attribute(&self, from_ns: u64, to_ns: u64, stalls: &mut Stalls) {
        let mut left = to_ns.saturating_sub(from_ns);
        for &(from, to, cause) in &self.0 {
            let overlap = to.min(to_ns).saturating_sub(from.max(from_ns));
            stalls.add(cause, overlap);
            left -= overlap;
        }
        stalls.add(Cause::Launch, left);
    }

    /// Forgets intervals that ended.
    pub fn forget_until(&mut self, ns: u64) {
        self.0.retain(|&(_, to, _)| to > ns);
    }
}
