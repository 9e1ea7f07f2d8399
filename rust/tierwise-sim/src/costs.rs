//! How long every unit takes on a machine, and the speeds that the planner weighs.

mod tables;

use crate::collectives::Group;
use crate::hardware::Hardware;
use crate::models::{Built, Kind, Work};
use tables::{Pair, Tables};
use tierwise_core::planner::Speeds;
use tierwise_core::trace::Phase;

/// Host memory bytes that one bf16 parameter's Adam step moves: gradient in, parameter and states in and out.
pub const ADAM_BYTES_PER_PARAM: f64 = 26.0;

/// Nanoseconds per unit of one micro-batch.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Forward.
    pub forward_ns: Vec<u64>,
    /// Backward without recomputation.
    pub backward_ns: Vec<u64>,
    /// A recomputation: a forward that stops at the last tensor that backward needs.
    pub recompute_ns: Vec<u64>,
    /// What the training thread takes to enqueue each.
    pub launch: Vec<Launch>,
    /// What the training thread takes for `optimizer.step()`.
    pub commit_ns: u64,
    /// How many times longer all of it takes on a device that has been busy for a while and is at its power limit.
    pub sustained: f64,
}

/// Nanoseconds in which the training thread enqueues a unit's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Launch {
    /// Forward, and with a checkpoint around it.
    pub forward_ns: [u64; 2],
    /// Backward, and with its recomputation.
    pub backward_ns: [u64; 2],
}

impl Launch {
    /// The same for everything.
    pub fn equal(ns: u64) -> Self {
        Launch { forward_ns: [ns; 2], backward_ns: [ns; 2] }
    }

    /// Of one operation.
    pub fn ns(&self, phase: Phase, recomputed: bool) -> u64 {
        let of = if phase == Phase::Forward { self.forward_ns } else { self.backward_ns };
        of[usize::from(recomputed)]
    }
}

impl Costs {
    /// From what was measured on the machine, by size; where nothing was, from its single rates.
    pub fn new(built: &Built, hardware: &Hardware) -> Self {
        let tables = hardware.measured.as_ref().and_then(Tables::new);
        let pairs: Vec<Pair> = built.work.iter().map(|work| unit(work, hardware, tables.as_ref())).collect();
        let again = built.work.iter().zip(&pairs).map(|(work, pair)| pair.forward_s - tail_s(work, hardware, tables.as_ref()));
        let ns = |seconds: f64| (seconds * 1e9).round() as u64;
        let (launch, commit_ns) = launches(built, hardware);
        Costs {
            forward_ns: pairs.iter().map(|pair| ns(pair.forward_s)).collect(),
            backward_ns: pairs.iter().map(|pair| ns(pair.backward_s)).collect(),
            recompute_ns: again.map(|seconds| ns(seconds.max(0.0))).collect(),
            launch,
            commit_ns,
            sustained: sustained(built, tables.as_ref()),
        }
    }

    /// Adds the exchanges inside units, which compute waits for. A reduction over tensor-parallel ranks is a reduce-scatter and an all-gather;
    /// attention over a split sequence exchanges queries, keys and values before and its output after. Backward does the same.
    pub fn add_exchanges(&mut self, built: &Built, tensor: &Group, sequence: &Group) {
        for (unit, work) in built.work.iter().enumerate() {
            let reductions = work.reductions.max(1);
            let reduced = 2 * reductions * tensor.all_gather_ns(work.reduced_bytes / reductions as f64);
            let exchanged = 2 * sequence.all_to_all_ns(work.exchanged_bytes / 2.0);
            self.forward_ns[unit] += reduced + exchanged;
            self.backward_ns[unit] += reduced + exchanged;
            // The product that a recomputation leaves out is followed by a reduction.
            let left_out = if work.tail.flops > 0.0 { reduced / reductions } else { 0 };
            self.recompute_ns[unit] += reduced + exchanged - left_out;
        }
    }

    /// Recomputations that run a whole forward, as reentrant checkpoints and those of torch before 2.1 do.
    pub fn recompute_whole(&mut self) {
        self.recompute_ns.clone_from(&self.forward_ns);
    }

    /// Speeds at which the planner's formulas agree with these costs.
    pub fn speeds(&self, built: &Built, hardware: &Hardware) -> Speeds {
        let flops: f64 = built.trace.units.iter().map(|u| 3.0 * u.flops).sum();
        let ns: u64 = self.forward_ns.iter().chain(&self.backward_ns).sum();
        // Each stepped parameter is also copied to the device, through the same memory.
        let through_memory = hardware.host_memory_bytes_per_s / (ADAM_BYTES_PER_PARAM + 2.0);
        Speeds {
            flops: flops / (ns.max(1) as f64 * self.sustained) * 1e9,
            h2d_bytes: hardware.h2d_duplex_bytes_per_s,
            d2h_bytes: hardware.d2h_duplex_bytes_per_s,
            host_adam_params: hardware.host_adam_params_per_s.min(through_memory),
            host_params_first: hardware.host_params_first_per_s,
            device_memory_bytes: hardware.device_memory_bytes_per_s,
        }
    }
}

/// The width of a head that kernels of attention compute: FlashAttention-2 has one kernel for each of these, and pads (`HEADDIM_SWITCH` in its
/// csrc/flash_attn/src/static_switch.h).
fn padded(head_dim: u64) -> u64 {
    [32, 64, 96, 128, 192, 256].into_iter().find(|width| *width >= head_dim).unwrap_or(head_dim)
}

/// What a unit takes, the copies of padded heads included.
fn unit(work: &Work, hardware: &Hardware, tables: Option<&Tables>) -> Pair {
    let [forward_s, backward_s] = work.padding_bytes.map(|bytes| bytes / hardware.device_memory_bytes_per_s);
    let kernels = kernels(work, hardware, tables);
    Pair { forward_s: kernels.forward_s + forward_s, backward_s: kernels.backward_s + backward_s }
}

/// Compute-bound kernels and element-wise kernels one after the other; without measurements backward does everything twice.
fn kernels(work: &Work, hardware: &Hardware, tables: Option<&Tables>) -> Pair {
    let widths: u64 = work.attention_widths.iter().sum();
    let padding = work.attention_widths.first().map_or(1.0, |&width| {
        let head_dim = (width / work.heads).max(1);
        padded(head_dim) as f64 / head_dim as f64
    });
    let attention_flops = work.attention_flops * padding;
    let Some(tables) = tables else {
        let seconds = |matmul: f64, attention: f64| {
            work.matmul_flops / matmul + attention_flops / attention + work.memory_bytes / hardware.device_memory_bytes_per_s
        };
        return Pair {
            forward_s: seconds(hardware.matmul_forward_flops, hardware.attention_forward_flops),
            backward_s: 2.0 * seconds(hardware.matmul_backward_flops, hardware.attention_backward_flops),
        };
    };
    let mut sum = Pair::default();
    let mut add = |part: Pair| {
        sum.forward_s += part.forward_s;
        sum.backward_s += part.backward_s;
    };
    let rank = |part: Pair| Pair { forward_s: part.forward_s * work.share, backward_s: part.backward_s * work.share };
    let mut products = work.products.as_slice();
    if let (Kind::Head, [(hidden, vocab), rest @ ..]) = (work.kind, products)
        && let Some(loss) = tables.loss(work.tokens, *hidden, *vocab)
    {
        add(rank(loss));
        products = rest;
    }
    for &(inputs, outputs) in products {
        add(rank(tables.product(work.tokens, inputs, outputs)));
    }
    for &width in &work.attention_widths {
        let flops = attention_flops * width as f64 / widths as f64;
        add(tables.attention(work.seq, padded((width / work.heads).max(1)), work.sequences * work.heads, flops));
    }
    // The loss was measured with its element-wise kernels.
    if work.kind != Kind::Head || products.len() == work.products.len() {
        let plain = work.memory_bytes / hardware.device_memory_bytes_per_s;
        let fallback = Pair { forward_s: plain, backward_s: 2.0 * plain };
        add(tables.element_wise(work.tokens, work.hidden, work.memory_bytes).unwrap_or(fallback));
    }
    sum
}

/// Seconds of what a recomputation leaves out.
fn tail_s(work: &Work, hardware: &Hardware, tables: Option<&Tables>) -> f64 {
    let (inputs, outputs) = work.tail.product;
    let plain = work.tail.memory_bytes / hardware.device_memory_bytes_per_s;
    if work.tail.flops == 0.0 {
        return 0.0;
    }
    let Some(tables) = tables else { return work.tail.flops / hardware.matmul_forward_flops + plain };
    let sum = tables.element_wise(work.tokens, work.hidden, work.tail.memory_bytes).map_or(plain, |pair| pair.forward_s);
    tables.product(work.tokens, inputs, outputs).forward_s * work.share + sum
}

/// The power limit's factor of the layers, which are most of a step.
fn sustained(built: &Built, tables: Option<&Tables>) -> f64 {
    let layer = built.work.iter().find(|work| work.kind == Kind::Layer);
    tables.zip(layer).map_or(1.0, |(tables, work)| tables.sustained(work.tokens, work.hidden))
}

/// What the training thread takes per unit, and for a step.
fn launches(built: &Built, hardware: &Hardware) -> (Vec<Launch>, u64) {
    let measured = hardware.measured.as_ref();
    let times = measured.and_then(|m| m.thread_times).unwrap_or(1.0);
    let Some(measured) = measured.and_then(|m| m.launch) else {
        return (vec![Launch::equal(hardware.launch_ns); built.work.len()], 0);
    };
    let now = |ns: u64| (ns as f64 * times).round() as u64;
    let others = built.work.iter().filter(|work| work.kind != Kind::Layer).count().max(1) as u64;
    let launch = built
        .work
        .iter()
        .map(|work| match work.kind {
            Kind::Layer => Launch {
                forward_ns: [now(measured.forward_ns), now(measured.checkpointed_forward_ns)],
                backward_ns: [now(measured.backward_ns), now(measured.checkpointed_backward_ns)],
            },
            // What is outside the layers, embedding to loss, was measured together.
            Kind::Embedding | Kind::Norm | Kind::Head => Launch {
                forward_ns: [now(measured.outside_forward_ns / others); 2],
                backward_ns: [now(measured.outside_backward_ns / others); 2],
            },
        })
        .collect();
    (launch, now(measured.step_ns))
}
