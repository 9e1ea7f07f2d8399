//! Times from what `calibrate` measured: every kernel by its own size, interpolated between the sizes that were measured.
//!
//! A size that was measured takes what was measured. Between sizes the rate is interpolated: along the tokens of one product linearly over
//! their logarithm, elsewhere by inverse distance between logarithms of sizes, to the fourth power, so that the nearest decide.

use crate::hardware::Measured;

/// Seconds of forward and backward.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pair {
    pub forward_s: f64,
    pub backward_s: f64,
}

impl Pair {
    pub fn scaled(self, times: f64) -> Pair {
        Pair { forward_s: self.forward_s * times, backward_s: self.backward_s * times }
    }
}

/// A point: logarithms of sizes, and seconds per unit of work there.
struct Point {
    at: Vec<f64>,
    value: Pair,
}

/// One matrix: logarithms of its inputs and outputs, and seconds per forward FLOP by the logarithm of tokens, ascending.
struct Matrix {
    inputs: f64,
    outputs: f64,
    points: Vec<(f64, Pair)>,
}

/// The measurements, as seconds per unit of work.
pub struct Tables {
    products: Vec<Matrix>,
    /// Seconds per forward FLOP over (tokens of a sequence, width of a head, sequences times heads).
    attention: Vec<Point>,
    /// Seconds per byte of element-wise traffic over (tokens, hidden).
    element_wise: Vec<Point>,
    /// How much longer sustained work takes than short work, over (tokens, hidden).
    sustained: Vec<Point>,
    /// Seconds per forward FLOP of the head over (tokens, hidden, vocab).
    losses: Vec<Point>,
}

fn ln(size: u64) -> f64 {
    (size as f64).ln()
}

/// Bytes per token that a LLaMA layer's element-wise kernels read and write, as `GatedLayer` counts them.
fn layer_bytes(hidden: u64, inner: u64) -> f64 {
    (20 * hidden + 8 * hidden + 6 * inner) as f64
}

impl Tables {
    /// None if matrix products or attention were not measured.
    pub fn new(measured: &Measured) -> Option<Self> {
        if measured.products.is_empty() || measured.attention.is_empty() {
            return None;
        }
        let mut products: Vec<Matrix> = Vec::new();
        for row in &measured.products {
            let flops = 2.0 * (row.tokens * row.inputs * row.outputs) as f64;
            let value = Pair { forward_s: row.forward_s / flops, backward_s: (row.input_grad_s + row.weight_grad_s) / flops };
            let (inputs, outputs) = (ln(row.inputs), ln(row.outputs));
            let point = (ln(row.tokens), value);
            match products.iter_mut().find(|m| (m.inputs, m.outputs) == (inputs, outputs)) {
                Some(matrix) => matrix.points.push(point),
                None => products.push(Matrix { inputs, outputs, points: vec![point] }),
            }
        }
        for matrix in &mut products {
            matrix.points.sort_by(|a, b| a.0.total_cmp(&b.0));
            // More rows keep the device as busy at least; what a short measurement of many shows besides is the power limit, which counts by
            // itself.
            for index in 1..matrix.points.len() {
                let fewer = matrix.points[index - 1].1;
                let value = &mut matrix.points[index].1;
                value.forward_s = value.forward_s.min(fewer.forward_s);
                value.backward_s = value.backward_s.min(fewer.backward_s);
            }
        }
        let attention = measured
            .attention
            .iter()
            .map(|row| {
                let flops = 2.0 * (row.sequences * row.heads * row.head_dim) as f64 * (row.seq as f64).powi(2);
                let value = Pair { forward_s: row.forward_s / flops, backward_s: row.backward_s / flops };
                Point { at: vec![ln(row.seq), ln(row.head_dim), ln(row.sequences * row.heads)], value }
            })
            .collect();
        let losses = measured
            .losses
            .iter()
            .map(|row| {
                let flops = 2.0 * (row.tokens * row.hidden * row.vocab) as f64;
                let value = Pair { forward_s: row.forward_s / flops, backward_s: row.backward_s / flops };
                Point { at: vec![ln(row.tokens), ln(row.hidden), ln(row.vocab)], value }
            })
            .collect();
        // A device that waits for Python is not at its power limit. In calibrations that did not ask it, a layer that was sustained but
        // takes less than half as long again as Python does to enqueue it was held up by Python if anything. Layers that were not
        // sustained say nothing of it.
        let launch_s = measured.launch.filter(|_| !measured.layers_kept_busy);
        let launch_s = launch_s.map_or(0.0, |launch| (launch.forward_ns + launch.backward_ns) as f64 / 1e9);
        let sustained = measured
            .layers
            .iter()
            .filter_map(|row| {
                let (short_s, sustained_s) = (row.forward_s + row.backward_s, row.sustained_s?);
                let factor = if short_s < 1.5 * launch_s { 1.0 } else { sustained_s / short_s };
                let value = Pair { forward_s: factor.max(1.0), backward_s: factor.max(1.0) };
                Some(Point { at: vec![ln(row.sequences * row.seq), ln(row.hidden)], value })
            })
            .collect();
        let mut tables = Tables { products, attention, element_wise: Vec::new(), sustained, losses };
        tables.element_wise = measured
            .layers
            .iter()
            .map(|row| {
                // What a whole layer takes beside its products and its attention is its element-wise kernels'.
                let tokens = row.sequences * row.seq;
                let (h, i) = (row.hidden, row.inner);
                let matrices = [(4.0, h, h), (2.0, h, i), (1.0, i, h)];
                let mut rest = Pair { forward_s: row.forward_s, backward_s: row.backward_s };
                let mut take = |part: Pair| {
                    rest.forward_s -= part.forward_s;
                    rest.backward_s -= part.backward_s;
                };
                for (times, inputs, outputs) in matrices {
                    take(tables.product(tokens, inputs, outputs).scaled(times));
                }
                let head_dim = (h / row.heads).max(1);
                take(tables.attention(row.seq, head_dim, row.sequences * row.heads, 2.0 * (tokens * row.seq * h) as f64));
                let bytes = layer_bytes(h, i) * tokens as f64;
                let value = Pair { forward_s: rest.forward_s.max(0.0) / bytes, backward_s: rest.backward_s.max(0.0) / bytes };
                Point { at: vec![ln(tokens), ln(h)], value }
            })
            .collect();
        Some(tables)
    }

    /// A product of `tokens` rows; backward is both of its gradients.
    pub fn product(&self, tokens: u64, inputs: u64, outputs: u64) -> Pair {
        let flops = 2.0 * (tokens * inputs * outputs) as f64;
        let near: Vec<Point> =
            self.products.iter().map(|m| Point { at: vec![m.inputs, m.outputs], value: along(&m.points, ln(tokens)) }).collect();
        weighted(&near, &[ln(inputs), ln(outputs)]).unwrap_or_default().scaled(flops)
    }

    /// Attention of `flops` in forward.
    pub fn attention(&self, seq: u64, head_dim: u64, sequences_times_heads: u64, flops: f64) -> Pair {
        weighted(&self.attention, &[ln(seq), ln(head_dim), ln(sequences_times_heads)]).unwrap_or_default().scaled(flops)
    }

    /// Element-wise traffic of a block of this width; none if no whole layer was measured.
    pub fn element_wise(&self, tokens: u64, hidden: u64, bytes: f64) -> Option<Pair> {
        Some(weighted(&self.element_wise, &[ln(tokens), ln(hidden)])?.scaled(bytes))
    }

    /// How much longer sustained work takes than what was measured of short work: by the power limit.
    pub fn sustained(&self, tokens: u64, hidden: u64) -> f64 {
        weighted(&self.sustained, &[ln(tokens), ln(hidden)]).map_or(1.0, |pair| pair.forward_s)
    }

    /// Head and loss; none if they were not measured.
    pub fn loss(&self, tokens: u64, hidden: u64, vocab: u64) -> Option<Pair> {
        let flops = 2.0 * (tokens * hidden * vocab) as f64;
        Some(weighted(&self.losses, &[ln(tokens), ln(hidden), ln(vocab)])?.scaled(flops))
    }
}

/// Between two points of a line; its ends go on as they are.
fn along(points: &[(f64, Pair)], at: f64) -> Pair {
    let above = points.partition_point(|(x, _)| *x < at);
    match (above.checked_sub(1).map(|below| points[below]), points.get(above)) {
        (Some((x, a)), Some((y, b))) => {
            let share = (at - x) / (y - x);
            // Rates, not their reciprocals, lie on the line.
            let mix = |a: f64, b: f64| 1.0 / ((1.0 - share) / a + share / b);
            Pair { forward_s: mix(a.forward_s, b.forward_s), backward_s: mix(a.backward_s, b.backward_s) }
        }
        (Some((_, end)), None) | (None, Some(&(_, end))) => end,
        (None, None) => Pair::default(),
    }
}

/// Between scattered points.
fn weighted(points: &[Point], at: &[f64]) -> Option<Pair> {
    let mut total = 0.0;
    let mut sum = Pair::default();
    for point in points {
        let distance: f64 = point.at.iter().zip(at).map(|(a, b)| (a - b).powi(2)).sum();
        if distance < 1e-12 {
            return Some(point.value);
        }
        let weight = distance.powi(-2);
        total += weight;
        sum.forward_s += weight * point.value.forward_s;
        sum.backward_s += weight * point.value.backward_s;
    }
    (total > 0.0).then(|| sum.scaled(1.0 / total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hardware::{AttentionRow, Launch, LayerRow, Product};

    fn measured() -> Measured {
        let product = |tokens, inputs, outputs, rate: f64| {
            let forward_s = 2.0 * (tokens * inputs * outputs) as f64 / rate;
            Product { tokens, inputs, outputs, forward_s, input_grad_s: forward_s, weight_grad_s: forward_s * 1.5 }
        };
        let products = [(1024, 4e14), (4096, 6e14)]
            .into_iter()
            .flat_map(|(tokens, rate)| [(1024, 1024), (1024, 4096), (4096, 1024)].map(|(i, o)| product(tokens, i, o, rate)))
            .collect();
        let attention = vec![AttentionRow { sequences: 1, seq: 4096, heads: 8, head_dim: 128, forward_s: 1e-3, backward_s: 3e-3 }];
        let layers = vec![LayerRow {
            sequences: 1,
            seq: 4096,
            hidden: 1024,
            inner: 4096,
            heads: 8,
            forward_s: 2e-3,
            backward_s: 6e-3,
            sustained_s: Some(9e-3),
        }];
        Measured { products, attention, layers, ..Measured::default() }
    }

    #[test]
    fn what_was_measured_takes_what_was_measured() {
        let measured = measured();
        let tables = Tables::new(&measured).unwrap();
        for row in &measured.products {
            let found = tables.product(row.tokens, row.inputs, row.outputs);
            assert!((found.forward_s / row.forward_s - 1.0).abs() < 1e-12);
            assert!((found.backward_s / (row.input_grad_s + row.weight_grad_s) - 1.0).abs() < 1e-12);
        }
        // A whole layer is the sum of its parts again.
        let row = measured.layers[0];
        let parts = [(4.0, 1024, 1024), (2.0, 1024, 4096), (1.0, 4096, 1024)];
        let products: f64 = parts.iter().map(|&(times, i, o)| times * tables.product(4096, i, o).forward_s).sum();
        let attention = tables.attention(4096, 128, 8, 2.0 * 4096.0 * 4096.0 * 1024.0).forward_s;
        let rest = tables.element_wise(4096, 1024, layer_bytes(1024, 4096) * 4096.0).unwrap().forward_s;
        assert!((products + attention + rest - row.forward_s).abs() < 1e-9);
        assert!((tables.sustained(4096, 1024) - 9.0 / 8.0).abs() < 1e-9);
    }

    #[test]
    fn a_layer_that_python_may_have_held_up_says_nothing_about_the_power_limit() {
        let launch = |ns| Launch {
            forward_ns: ns,
            backward_ns: ns,
            checkpointed_forward_ns: ns,
            checkpointed_backward_ns: ns,
            outside_forward_ns: ns,
            outside_backward_ns: ns,
            step_ns: ns,
            probe_ns: None,
        };
        // The layer takes 8 ms, 9 without a pause.
        for (ns, layers_kept_busy, factor) in [(2_600_000, false, 9.0 / 8.0), (2_700_000, false, 1.0), (2_700_000, true, 9.0 / 8.0)] {
            let tables = Tables::new(&Measured { launch: Some(launch(ns)), layers_kept_busy, ..measured() }).unwrap();
            assert!((tables.sustained(4096, 1024) - factor).abs() < 1e-9);
        }
    }

    #[test]
    fn layers_that_were_not_sustained_say_nothing_about_the_power_limit() {
        let mut measured = measured();
        let short = LayerRow { sequences: 2, seq: 1024, forward_s: 1e-3, backward_s: 3e-3, sustained_s: None, ..measured.layers[0] };
        measured.layers.push(short);
        let tables = Tables::new(&measured).unwrap();
        for tokens in [1024, 2048, 3000, 1 << 15] {
            assert!((tables.sustained(tokens, 1024) - 9.0 / 8.0).abs() < 1e-9, "{tokens} tokens");
        }
        measured.layers.remove(0);
        let none = Tables::new(&measured).unwrap();
        assert!((none.sustained(2048, 1024) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn more_rows_of_a_product_are_no_slower_each() {
        let mut measured = measured();
        let slow: Vec<Product> = measured.products.iter().filter(|row| row.tokens == 4096).copied().collect();
        // Eight times the rows take ten times as long forward, and six times as long backward.
        measured.products.extend(slow.iter().map(|row| Product {
            tokens: 8 * row.tokens,
            forward_s: 10.0 * row.forward_s,
            input_grad_s: 6.0 * row.input_grad_s,
            weight_grad_s: 6.0 * row.weight_grad_s,
            ..*row
        }));
        let tables = Tables::new(&measured).unwrap();
        for row in slow {
            let found = tables.product(8 * row.tokens, row.inputs, row.outputs);
            assert!((found.forward_s / row.forward_s - 8.0).abs() < 1e-9);
            assert!((found.backward_s / (row.input_grad_s + row.weight_grad_s) - 6.0).abs() < 1e-9);
        }
    }

    #[test]
    fn between_sizes_the_rate_lies_between() {
        let tables = Tables::new(&measured()).unwrap();
        let rate = |tokens: u64, inputs: u64, outputs: u64| {
            2.0 * (tokens * inputs * outputs) as f64 / tables.product(tokens, inputs, outputs).forward_s
        };
        assert!((rate(2048, 1024, 1024) / 5e14 - 1.0).abs() < 1e-9);
        assert!((rate(1 << 20, 1024, 1024) / 6e14 - 1.0).abs() < 1e-9, "beyond the ends nothing changes");
        let between = rate(2048, 2048, 2048);
        assert!((4e14..=6e14).contains(&between), "{between}");
    }

    #[test]
    fn nothing_measured_is_no_table() {
        assert!(Tables::new(&Measured::default()).is_none());
        let tables = Tables::new(&Measured { layers: Vec::new(), ..measured() }).unwrap();
        assert!(tables.element_wise(4096, 1024, 1.0).is_none() && tables.loss(4096, 1024, 32_000).is_none());
    }
}
