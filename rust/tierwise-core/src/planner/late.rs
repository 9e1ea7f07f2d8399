//! Moments that the host writes after the parameters: the first forward waits for less, and the first backward must leave time for the rest.

use super::placement::Row;
use super::{FIRST_PASS_BYTES, HOST_ADAM_BYTES, Speeds};
use crate::layout::Layout;
use crate::plan::{HostBytes, LANDING_BUFFERS};

/// Seconds of either pass over parameters and moments, as parts of a whole step's.
pub(super) struct Passes {
    /// The first: gradient and moments are read, parameters rewritten.
    pub params: f64,
    /// The second: the gradient is read, the moments rewritten.
    pub moments: f64,
}

impl Passes {
    /// By their shares of the memory traffic; the first as fast as it was measured, if it was.
    pub fn new(layout: &Layout, accumulation: u32, speeds: &Speeds) -> Self {
        let (gradient, moments) = (layout.final_grad_element(accumulation), 8);
        let params = layout.precision.undo_bytes() - moments;
        let whole = (gradient + 2 * (params + moments)) as f64;
        // What was measured is bf16, gradients included.
        let slower = speeds.host_params_first.map_or(1.0, |rate| speeds.host_adam_params * HOST_ADAM_BYTES / (rate * FIRST_PASS_BYTES));
        Passes { params: (gradient + 2 * params + moments) as f64 / whole * slower, moments: (gradient + 2 * moments) as f64 / whole }
    }
}

/// Fewest buffers in which gradients land.
const LEAST: u64 = LANDING_BUFFERS as u64;

/// Seconds of one micro-batch, and of what the host does beside it.
pub(super) struct Times {
    pub forward: f64,
    pub backward: f64,
    /// From the decision until the last parameters are written.
    pub params: f64,
    /// Of the moments.
    pub moments: f64,
    /// Of adding the first micro-batch's gradients to their sums.
    pub added: f64,
}

/// What late moments cost.
#[derive(Clone, Copy)]
pub(super) struct Lag {
    /// Seconds in which the first backward waits for them.
    pub seconds: f64,
    /// Buffers in which gradients land meanwhile.
    pub buffers: u32,
}

impl Lag {
    /// `host` is what the plan takes of host memory, `room` what it leaves; `share` of the model's states are stepped by the host: those that
    /// are used last, whose backward comes first.
    pub fn new(row: &Row, times: &Times, accumulation: u32, host: &HostBytes, room: u64, share: f64) -> Self {
        // When the last of their gradients is handed over.
        let handed = times.forward.max(times.params) + share * times.backward;
        let chunks = row.landing_chunks;
        if accumulation == 1 || chunks == 0 {
            // What goes straight to its place is handed over when the moments before it are done; sums on the device go there much later.
            let direct = if accumulation == 1 { times.params + times.moments - handed } else { 0.0 };
            return Lag { seconds: direct, buffers: LANDING_BUFFERS };
        }
        let each = (times.moments + times.added) / chunks as f64;
        // The host may be slower than measured while both links and the GPU's driver use its memory: a buffer for every gradient of a
        // micro-batch, 2 bytes per parameter beside 20 for states and sums, lets backward go on without it.
        let buffers = chunks.max(LEAST).min(LEAST + room / (host.staging / LEAST));
        let in_buffers = times.params + (chunks as f64 - buffers as f64) * each - handed;
        // What landed is added before the next micro-batch's gradients come.
        let all = times.params + times.moments + times.added - (times.forward.max(times.params) + times.backward + times.forward);
        Lag { seconds: in_buffers.max(all), buffers: buffers as u32 }
    }
}
