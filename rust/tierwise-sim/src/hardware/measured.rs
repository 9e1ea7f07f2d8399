//! What `calibrate` measured of a machine, by size: the tables behind a hardware file's single figures.

use serde::{Deserialize, Serialize};

/// Measurements. Lists are empty and fields null where something could not be measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// The host's kernels by number of threads, fewest first.
    pub host: Vec<HostRow>,
    /// Parameters that those kernels were measured on.
    #[serde(default)]
    pub host_numel: Option<u64>,
    /// Links, host Adam and compute, alone and beside each other.
    #[serde(default)]
    pub sharing: Vec<Sharing>,
    /// bf16 matrix products.
    #[serde(default)]
    pub products: Vec<Product>,
    /// Causal attention.
    #[serde(default)]
    pub attention: Vec<AttentionRow>,
    /// Whole decoder layers of the LLaMA kind.
    #[serde(default)]
    pub layers: Vec<LayerRow>,
    /// Whether `sustained_s` is only there for layers during which the device, which was asked, never waited for Python.
    #[serde(default)]
    pub layers_kept_busy: bool,
    /// Head and loss.
    #[serde(default)]
    pub losses: Vec<LossRow>,
    /// What the training thread takes to enqueue work.
    #[serde(default)]
    pub launch: Option<Launch>,
    /// How many times longer than calibrated the training thread takes: nothing in a file, but a run may have been probed.
    #[serde(skip)]
    pub thread_times: Option<f64>,
    /// Parameters per second of the device's optimizer step.
    #[serde(default)]
    pub device_adam_params_per_s: Option<f64>,
    /// Parameters per second of the host's optimizer step as the engine runs it, with nothing beside it; none where it took two passes.
    #[serde(default)]
    pub host_adam_params_per_s: Option<f64>,
    /// The same of the first of its two passes.
    #[serde(default)]
    pub host_params_first_per_s: Option<f64>,
    /// The same of the second.
    #[serde(default)]
    pub host_moments_per_s: Option<f64>,
    /// Parameters per second of steps that may be undone, whose records are written in the same pass.
    #[serde(default)]
    pub host_undoable_params_per_s: Option<f64>,
    /// Bytes per second at which undo records were copied by runtimes that did so before the step; none of later ones.
    #[serde(default)]
    pub host_undo_bytes_per_s: Option<f64>,
    /// Nanoseconds between a chunk's step on the host and the next one's: the engine learns of one and enqueues the other. In files of
    /// later calibrations also what a step takes beside its bytes, which the rates of steps and first passes above are without.
    #[serde(default)]
    pub host_gap_ns: Option<f64>,
    /// Device bytes of the workspaces of matrix products; what Hopper's are if it was not measured.
    #[serde(default)]
    pub workspace_bytes: Option<u64>,
    /// The NVMe tier.
    #[serde(default)]
    pub disk: Option<Disk>,
}

/// The host's kernels with so many threads; elements per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostRow {
    /// Threads.
    pub threads: u32,
    /// Split-master Adam.
    pub adam_params_per_s: f64,
    /// The first pass of the same in two, whose moments are written later.
    #[serde(default)]
    pub params_first_per_s: Option<f64>,
    /// The second pass of these.
    #[serde(default)]
    pub moments_per_s: Option<f64>,
    /// Steps that may be undone, and their records.
    #[serde(default)]
    pub undoable_params_per_s: Option<f64>,
    /// bf16 gradients into fp32 accumulators.
    pub accumulate_numel_per_s: f64,
    /// Sums of squares of bf16 gradients.
    pub norm_numel_per_s: f64,
    /// Bytes copied.
    pub copy_bytes_per_s: f64,
}

/// Who ran together, and how fast each was.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sharing {
    /// Of `h2d`, `d2h`, `adam` and `compute`, in this order.
    pub actors: Vec<String>,
    /// Host-to-device copies.
    pub h2d_bytes_per_s: Option<f64>,
    /// Device-to-host copies.
    pub d2h_bytes_per_s: Option<f64>,
    /// Host Adam with all threads.
    pub adam_params_per_s: Option<f64>,
    /// Compute's speed as a share of its speed alone.
    pub compute_share: Option<f64>,
    /// The first of Adam's two passes in its place.
    #[serde(default)]
    pub params_first_per_s: Option<f64>,
    /// The second.
    #[serde(default)]
    pub moments_per_s: Option<f64>,
    /// Host-to-device copies beside the first pass.
    #[serde(default)]
    pub params_first_h2d_bytes_per_s: Option<f64>,
    /// Device-to-host copies beside the second.
    #[serde(default)]
    pub moments_d2h_bytes_per_s: Option<f64>,
    /// Steps that may be undone in the place of whole ones, with their records.
    #[serde(default)]
    pub undoable_params_per_s: Option<f64>,
    /// Device-to-host copies beside them.
    #[serde(default)]
    pub undoable_d2h_bytes_per_s: Option<f64>,
}

/// Seconds of a product and of its two gradients.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Product {
    /// Rows.
    pub tokens: u64,
    /// Input features.
    pub inputs: u64,
    /// Output features.
    pub outputs: u64,
    /// Forward.
    pub forward_s: f64,
    /// Gradient of the input.
    pub input_grad_s: f64,
    /// Gradient of the weight.
    pub weight_grad_s: f64,
}

/// Seconds of causal attention.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttentionRow {
    /// Sequences of the batch.
    pub sequences: u64,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Query heads.
    pub heads: u64,
    /// Width of a head.
    pub head_dim: u64,
    /// Forward.
    pub forward_s: f64,
    /// Backward.
    pub backward_s: f64,
}

/// Seconds of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRow {
    /// Sequences of the batch.
    pub sequences: u64,
    /// Tokens of a sequence.
    pub seq: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width inside the MLP.
    pub inner: u64,
    /// Query heads.
    pub heads: u64,
    /// Forward.
    pub forward_s: f64,
    /// Backward.
    pub backward_s: f64,
    /// Forward and backward in turn, after some that were not counted: long work meets the power limit.
    #[serde(default)]
    pub sustained_s: Option<f64>,
}

/// Seconds of the head with its loss; the gradients are computed in forward.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossRow {
    /// Tokens.
    pub tokens: u64,
    /// Width of the residual stream.
    pub hidden: u64,
    /// Rows of the head.
    pub vocab: u64,
    /// Forward.
    pub forward_s: f64,
    /// Backward.
    pub backward_s: f64,
}

/// Nanoseconds of the training thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    /// A layer's forward.
    pub forward_ns: u64,
    /// A layer's backward.
    pub backward_ns: u64,
    /// A layer's forward that will be recomputed.
    pub checkpointed_forward_ns: u64,
    /// A layer's backward with its recomputation.
    pub checkpointed_backward_ns: u64,
    /// A micro-batch's forward beside its layers.
    pub outside_forward_ns: u64,
    /// A micro-batch's backward beside its layers.
    pub outside_backward_ns: u64,
    /// The call of `optimizer.step()` and `zero_grad()`.
    pub step_ns: u64,
    /// Forward and backward of 48 small layers, measured beside these: recorded runs measure it again.
    #[serde(default)]
    pub probe_ns: Option<u64>,
}

/// A directory as the NVMe tier.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Sequential writes.
    pub write_bytes_per_s: f64,
    /// Sequential reads.
    pub read_bytes_per_s: f64,
}

impl Measured {
    /// The same with everything that the host's kernels do `factor` times as fast.
    pub(super) fn with_host(&self, factor: f64) -> Measured {
        let mut faster = self.clone();
        for row in &mut faster.host {
            row.adam_params_per_s *= factor;
            row.params_first_per_s = row.params_first_per_s.map(|rate| rate * factor);
            row.moments_per_s = row.moments_per_s.map(|rate| rate * factor);
            row.undoable_params_per_s = row.undoable_params_per_s.map(|rate| rate * factor);
            row.accumulate_numel_per_s *= factor;
            row.norm_numel_per_s *= factor;
            row.copy_bytes_per_s *= factor;
        }
        for row in &mut faster.sharing {
            let host = [&mut row.adam_params_per_s, &mut row.params_first_per_s, &mut row.moments_per_s, &mut row.undoable_params_per_s];
            for rate in host {
                *rate = rate.map(|rate| rate * factor);
            }
        }
        faster.host_adam_params_per_s = self.host_adam_params_per_s.map(|rate| rate * factor);
        faster.host_params_first_per_s = self.host_params_first_per_s.map(|rate| rate * factor);
        faster.host_moments_per_s = self.host_moments_per_s.map(|rate| rate * factor);
        faster.host_undoable_params_per_s = self.host_undoable_params_per_s.map(|rate| rate * factor);
        faster.host_undo_bytes_per_s = self.host_undo_bytes_per_s.map(|rate| rate * factor);
        faster
    }

    /// The same for one of so many who use the host alike: all threads together do so much less for each; one thread is still one thread.
    pub(super) fn part_of_host(&self, users: f64) -> Measured {
        let mut part = self.with_host(1.0 / users);
        let few = self.host.len().saturating_sub(1);
        part.host[..few].clone_from_slice(&self.host[..few]);
        part
    }

    /// Parameters per second of whole steps in the engine. Where it was seen to take two passes only, whole steps are to either of them what
    /// the kernels alone are to each other, which were measured side by side.
    pub(super) fn whole_step_in_engine(&self) -> Option<f64> {
        self.host_adam_params_per_s.or_else(|| {
            let passes = [
                (self.host_params_first_per_s?, (|row| row.params_first_per_s) as fn(&Sharing) -> Option<f64>),
                (self.host_moments_per_s?, |row| row.moments_per_s),
            ];
            let alone = self.sharing.iter().filter(|row| row.actors == ["adam"] || row.actors == ["adam", "compute"]);
            let found: Vec<f64> = alone
                .flat_map(|row| passes.map(|(engine, kernel)| Some(engine * row.adam_params_per_s? / kernel(row)?)))
                .collect::<Option<_>>()?;
            (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64)
        })
    }

    /// The same with a training thread that takes `factor` times as long.
    pub(super) fn with_thread(&self, factor: f64) -> Measured {
        Measured { thread_times: Some(factor), ..self.clone() }
    }

    /// Whether every figure can be divided by.
    pub(super) fn check(&self) -> Result<(), String> {
        let mut figures: Vec<(&str, f64)> = Vec::new();
        for row in &self.host {
            figures.extend([
                ("measured.host.adam_params_per_s", row.adam_params_per_s),
                ("measured.host.accumulate_numel_per_s", row.accumulate_numel_per_s),
                ("measured.host.norm_numel_per_s", row.norm_numel_per_s),
                ("measured.host.copy_bytes_per_s", row.copy_bytes_per_s),
            ]);
            figures.extend(row.params_first_per_s.map(|rate| ("measured.host.params_first_per_s", rate)));
            figures.extend(row.moments_per_s.map(|rate| ("measured.host.moments_per_s", rate)));
            figures.extend(row.undoable_params_per_s.map(|rate| ("measured.host.undoable_params_per_s", rate)));
        }
        for row in &self.sharing {
            let known = ["h2d", "d2h", "adam", "compute"];
            if let Some(actor) = row.actors.iter().find(|actor| !known.contains(&actor.as_str())) {
                return Err(format!("measured.sharing names the actor `{actor}`; known are {}", known.join(", ")));
            }
            let rates = [
                ("measured.sharing.h2d_bytes_per_s", row.h2d_bytes_per_s),
                ("measured.sharing.d2h_bytes_per_s", row.d2h_bytes_per_s),
                ("measured.sharing.adam_params_per_s", row.adam_params_per_s),
                ("measured.sharing.compute_share", row.compute_share),
                ("measured.sharing.params_first_per_s", row.params_first_per_s),
                ("measured.sharing.moments_per_s", row.moments_per_s),
                ("measured.sharing.params_first_h2d_bytes_per_s", row.params_first_h2d_bytes_per_s),
                ("measured.sharing.moments_d2h_bytes_per_s", row.moments_d2h_bytes_per_s),
                ("measured.sharing.undoable_params_per_s", row.undoable_params_per_s),
                ("measured.sharing.undoable_d2h_bytes_per_s", row.undoable_d2h_bytes_per_s),
            ];
            figures.extend(rates.into_iter().filter_map(|(name, rate)| rate.map(|rate| (name, rate))));
        }
        let seconds = |name, of: &[f64]| of.iter().map(move |s| (name, *s)).collect::<Vec<_>>();
        for row in &self.products {
            figures.extend(seconds("measured.products seconds", &[row.forward_s, row.input_grad_s, row.weight_grad_s]));
            check_sizes("products", &[row.tokens, row.inputs, row.outputs])?;
        }
        for row in &self.attention {
            figures.extend(seconds("measured.attention seconds", &[row.forward_s, row.backward_s]));
            check_sizes("attention", &[row.sequences, row.seq, row.heads, row.head_dim])?;
        }
        for row in &self.layers {
            figures.extend(seconds("measured.layers seconds", &[row.forward_s, row.backward_s, row.sustained_s.unwrap_or(1.0)]));
            check_sizes("layers", &[row.sequences, row.seq, row.hidden, row.inner, row.heads])?;
        }
        for row in &self.losses {
            figures.extend(seconds("measured.losses seconds", &[row.forward_s, row.backward_s]));
            check_sizes("losses", &[row.tokens, row.hidden, row.vocab])?;
        }
        figures.extend(self.device_adam_params_per_s.map(|rate| ("measured.device_adam_params_per_s", rate)));
        figures.extend(self.launch.and_then(|launch| launch.probe_ns).map(|ns| ("measured.launch.probe_ns", ns as f64)));
        figures.extend(self.host_params_first_per_s.map(|rate| ("measured.host_params_first_per_s", rate)));
        figures.extend(self.host_moments_per_s.map(|rate| ("measured.host_moments_per_s", rate)));
        figures.extend(self.host_undoable_params_per_s.map(|rate| ("measured.host_undoable_params_per_s", rate)));
        figures.extend(self.host_undo_bytes_per_s.map(|rate| ("measured.host_undo_bytes_per_s", rate)));
        figures.extend(self.host_gap_ns.map(|ns| ("measured.host_gap_ns", ns)));
        figures.extend(self.host_adam_params_per_s.map(|rate| ("measured.host_adam_params_per_s", rate)));
        if let Some(disk) = self.disk {
            figures.extend([
                ("measured.disk.write_bytes_per_s", disk.write_bytes_per_s),
                ("measured.disk.read_bytes_per_s", disk.read_bytes_per_s),
            ]);
        }
        match figures.into_iter().find(|(_, figure)| !(figure.is_finite() && *figure > 0.0)) {
            Some((name, figure)) => Err(format!("{name} is {figure}; it must be positive")),
            None => Ok(()),
        }
    }
}

fn check_sizes(table: &str, sizes: &[u64]) -> Result<(), String> {
    if sizes.iter().all(|size| (1..1 << 32).contains(size)) {
        Ok(())
    } else {
        Err(format!("measured.{table} has the sizes {sizes:?}; each must be at least 1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_steps_are_to_the_engines_passes_what_the_kernels_are_to_each_other() {
        let row = |actors: &[&str], adam, params_first| Sharing {
            actors: actors.iter().map(|&actor| actor.to_owned()).collect(),
            adam_params_per_s: Some(adam),
            params_first_per_s: Some(params_first),
            moments_per_s: Some(2.0 * adam),
            ..Sharing::default()
        };
        // Beside copies: not what the engine is compared with.
        let sharing = vec![row(&["adam"], 6e9, 8e9), row(&["h2d", "adam"], 1e9, 9e9), row(&["adam", "compute"], 6e9, 12e9)];
        let passes = Measured { sharing, host_params_first_per_s: Some(4e9), host_moments_per_s: Some(6e9), ..Measured::default() };
        // 3/4 and 1/2 of either pass, then 1/2 and 1/2.
        assert_eq!(passes.whole_step_in_engine(), Some(2.75e9));
        assert_eq!(Measured { host_adam_params_per_s: Some(5e9), ..passes.clone() }.whole_step_in_engine(), Some(5e9));
        for lacks in [
            Measured { host_moments_per_s: None, ..passes.clone() },
            Measured { sharing: Vec::new(), ..passes.clone() },
            Measured { sharing: vec![Sharing { params_first_per_s: None, ..row(&["adam"], 6e9, 8e9) }], ..passes.clone() },
        ] {
            assert_eq!(lacks.whole_step_in_engine(), None);
        }
    }
}
