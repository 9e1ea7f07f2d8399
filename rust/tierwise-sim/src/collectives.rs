//! How long collectives take: rings and trees over the links inside a node and between nodes.
//!
//! A ring of `n` ranks moves `(n - 1) / n` of the gathered bytes over its slowest link and makes `n - 1` hops. Between nodes a group has as
//! many adapters as it has ranks on a node. A tree moves the bytes twice in `2 log2(nodes)` hops; all-reduce takes the faster of both.

use crate::hardware::{Hardware, Link};

/// Ranks that exchange data, equally many on each of their nodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    ranks: u64,
    per_node: u64,
    intra: Option<Link>,
    network: Option<Link>,
}

impl Group {
    /// `ranks` ranks, neighbours of which are `stride` GPUs apart (the ranks between belong to other groups that communicate as much).
    pub fn new(hardware: &Hardware, ranks: u64, stride: u64) -> Result<Group, String> {
        let gpus = u64::from(hardware.gpus_per_node);
        let per_node = (gpus / stride).clamp(1, ranks);
        let group = Group { ranks, per_node, intra: hardware.intra_node, network: hardware.network };
        if group.nodes() > 1 && hardware.network.is_none() {
            return Err(format!(
                "{ranks} ranks need {} nodes, but {} has no network; use a node preset such as dgx-h100, or give `network` in its file",
                group.nodes(),
                hardware.name
            ));
        }
        Ok(group)
    }

    /// Ranks of the group.
    pub fn ranks(&self) -> u64 {
        self.ranks
    }

    fn nodes(&self) -> u64 {
        self.ranks.div_ceil(self.per_node)
    }

    /// Bytes per second of a ring, per rank.
    fn bytes_per_s(&self) -> f64 {
        let intra = if self.per_node > 1 { self.intra.map_or(f64::INFINITY, |link| link.bytes_per_s) } else { f64::INFINITY };
        let network = if self.nodes() > 1 {
            self.network.map_or(f64::INFINITY, |link| link.bytes_per_s * self.per_node as f64)
        } else {
            f64::INFINITY
        };
        intra.min(network)
    }

    fn hop_ns(link: Option<Link>) -> f64 {
        link.map_or(0.0, |link| link.latency_ns as f64)
    }

    fn ring_hops_ns(&self) -> f64 {
        let between = if self.nodes() > 1 { self.nodes() } else { 0 };
        let inside = (self.ranks - 1).saturating_sub(between);
        inside as f64 * Self::hop_ns(self.intra) + between as f64 * Self::hop_ns(self.network)
    }

    /// Nanoseconds in which every rank gathers `bytes` in all, or reduces and scatters as many.
    pub fn all_gather_ns(&self, bytes: f64) -> u64 {
        if self.ranks == 1 || bytes == 0.0 {
            return 0;
        }
        let share = (self.ranks - 1) as f64 / self.ranks as f64;
        (bytes * share / self.bytes_per_s() * 1e9 + self.ring_hops_ns()).ceil() as u64
    }

    /// Nanoseconds in which every rank gets the sum of `bytes`.
    pub fn all_reduce_ns(&self, bytes: f64) -> u64 {
        if self.ranks == 1 || bytes == 0.0 {
            return 0;
        }
        let ring = 2 * self.all_gather_ns(bytes);
        let depth = 2.0 * (self.nodes() as f64).log2().ceil();
        let inside = 2.0 * (self.per_node - 1) as f64;
        let hops = depth * Self::hop_ns(self.network) + inside * Self::hop_ns(self.intra);
        let tree = (2.0 * bytes / self.bytes_per_s() * 1e9 + hops).ceil() as u64;
        ring.min(tree)
    }

    /// Nanoseconds in which every rank sends `bytes` in all to the others, equally much to each.
    pub fn all_to_all_ns(&self, bytes: f64) -> u64 {
        if self.ranks == 1 || bytes == 0.0 {
            return 0;
        }
        let away = (self.ranks - self.per_node) as f64 / (self.ranks - 1).max(1) as f64;
        let network = if away > 0.0 { self.network.map_or(0.0, |link| bytes * away / link.bytes_per_s) } else { 0.0 };
        let inside = if self.per_node > 1 { self.intra.map_or(0.0, |link| bytes * (1.0 - away) / link.bytes_per_s) } else { 0.0 };
        let hop = if away > 0.0 { Self::hop_ns(self.network) } else { Self::hop_ns(self.intra) };
        (network.max(inside) * 1e9 + hop).ceil() as u64
    }

    /// Nanoseconds in which a rank sends `bytes` to the next of its group.
    pub fn send_ns(&self, bytes: f64) -> u64 {
        if self.ranks == 1 {
            return 0;
        }
        let link = if self.per_node == self.ranks { self.intra } else { self.network };
        link.map_or(0, |link| (bytes / link.bytes_per_s * 1e9) as u64 + link.latency_ns)
    }
}
