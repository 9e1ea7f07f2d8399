//! Hardware: what a node sustains, read from files of one format; the presets are such files.
//!
//! Rates are what long-running training sustains, not data-sheet peaks; `peak_flops` alone is the data sheet's (it divides MFU and HFU).
//! Figures of the GPU, its host link and `network` are per GPU, those of the host are the whole node's.

mod measured;

pub use measured::{AttentionRow, Disk, HostRow, Launch, LayerRow, LossRow, Measured, Product, Sharing};

use crate::costs::ADAM_BYTES_PER_PARAM;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use tierwise_core::planner::FIRST_PASS_BYTES;

/// Of memory traffic per parameter of the second of two passes: moments read and written, the gradient read.
const MOMENTS_BYTES: f64 = 18.0;

/// Version of the file format. Version 1 had no `measured`.
pub const HARDWARE_VERSION: u32 = 2;

/// Share of host memory that copies of one direction may take: on nodes of many fast links the CPU and the other direction keep the rest.
const COPY_SHARE: f64 = 0.6;

/// A link between GPUs, per GPU and direction.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Bytes per second that a long collective reaches.
    pub bytes_per_s: f64,
    /// Nanoseconds of one hop.
    pub latency_ns: u64,
}

/// A machine, or one node of many.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Version of this format.
    pub schema_version: u32,
    /// Name on the command line.
    pub name: String,
    /// Where the figures come from, by the fields they are in.
    pub sources: BTreeMap<String, String>,
    /// Dense bf16 FLOP/s of the data sheet.
    pub peak_flops: f64,
    /// FLOP/s of matrix products in forward.
    pub matmul_forward_flops: f64,
    /// FLOP/s of matrix products in backward.
    pub matmul_backward_flops: f64,
    /// FLOP/s of causal attention in forward; half of the full square is counted.
    pub attention_forward_flops: f64,
    /// FLOP/s of causal attention in backward, which is counted as twice the forward.
    pub attention_backward_flops: f64,
    /// Device memory bytes per second of element-wise kernels.
    pub device_memory_bytes_per_s: f64,
    /// Usable device memory, in bytes.
    pub device_memory_bytes: u64,
    /// Host-to-device bytes per second, alone.
    pub h2d_bytes_per_s: f64,
    /// Device-to-host bytes per second, alone.
    pub d2h_bytes_per_s: f64,
    /// Host-to-device bytes per second while the other direction is busy.
    pub h2d_duplex_bytes_per_s: f64,
    /// Device-to-host bytes per second while the other direction is busy.
    pub d2h_duplex_bytes_per_s: f64,
    /// Bytes per second of copies from or to memory that is not pinned.
    pub pageable_bytes_per_s: f64,
    /// GPUs that share one link to the host.
    pub gpus_per_host_link: u32,
    /// Bytes per second that host memory carries in all, copies included.
    pub host_memory_bytes_per_s: f64,
    /// Bytes per second that the host's own streaming kernels (norms, sums) reach.
    pub host_stream_bytes_per_s: f64,
    /// bf16 parameters per second that the host's Adam steps while nothing else uses its memory.
    pub host_adam_params_per_s: f64,
    /// The same of the first pass, where moments are written later; by its share of the memory traffic if it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_params_first_per_s: Option<f64>,
    /// Usable pinned host memory, in bytes.
    pub host_memory_bytes: u64,
    /// Share of compute lost while a device-to-host copy runs.
    pub d2h_compute_tax: f64,
    /// Share of compute lost while the host's Adam runs.
    pub host_adam_compute_tax: f64,
    /// Share of compute lost while a collective runs beside it: its kernels occupy multiprocessors.
    #[serde(default)]
    pub collective_compute_tax: f64,
    /// Nanoseconds in which the training thread enqueues one unit's forward or backward.
    pub launch_ns: u64,
    /// The node's NVMe disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvme: Option<Disk>,
    /// GPUs of a node.
    pub gpus_per_node: u32,
    /// Between the GPUs of a node, if it has several.
    pub intra_node: Option<Link>,
    /// Between nodes, per GPU of a node, if there is a network.
    pub network: Option<Link>,
    /// Measurements by size, in files that `calibrate` wrote.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// A network that replaces a node's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Network {
    /// Name on the command line.
    pub name: String,
    /// Where the figures come from.
    pub source: String,
    /// Bytes per second and direction of a node.
    pub node_bytes_per_s: f64,
    /// Nanoseconds of one hop.
    pub latency_ns: u64,
}

/// The preset files.
const PRESETS: [(&str, &str); 14] = [
    ("h100", include_str!("../presets/hardware/h100.json")),
    ("a100-80", include_str!("../presets/hardware/a100-80.json")),
    ("a100-40", include_str!("../presets/hardware/a100-40.json")),
    ("h200", include_str!("../presets/hardware/h200.json")),
    ("b200", include_str!("../presets/hardware/b200.json")),
    ("gh200", include_str!("../presets/hardware/gh200.json")),
    ("rtx3090", include_str!("../presets/hardware/rtx3090.json")),
    ("rtx4090", include_str!("../presets/hardware/rtx4090.json")),
    ("rtx5090", include_str!("../presets/hardware/rtx5090.json")),
    ("dgx-a100-40", include_str!("../presets/hardware/dgx-a100-40.json")),
    ("dgx-a100-80", include_str!("../presets/hardware/dgx-a100-80.json")),
    ("dgx-h100", include_str!("../presets/hardware/dgx-h100.json")),
    ("dgx-h200", include_str!("../presets/hardware/dgx-h200.json")),
    ("dgx-b200", include_str!("../presets/hardware/dgx-b200.json")),
];

/// The networks by name.
const NETWORKS: &str = include_str!("../presets/networks.json");

/// Names of all presets.
pub fn names() -> Vec<&'static str> {
    PRESETS.iter().map(|(name, _)| *name).collect()
}

/// All presets.
pub fn presets() -> Vec<Hardware> {
    names().into_iter().filter_map(preset).collect()
}

/// The preset of a name.
pub fn preset(name: &str) -> Option<Hardware> {
    let (_, text) = PRESETS.iter().find(|(known, _)| *known == name)?;
    Some(Hardware::from_json(text).expect("the presets are part of the program"))
}

/// All networks.
pub fn networks() -> Vec<Network> {
    #[derive(Deserialize)]
    struct File {
        networks: Vec<Network>,
    }
    serde_json::from_str::<File>(NETWORKS).expect("the presets are part of the program").networks
}

/// Bytes that are read and written when an element in 16 bit is added to its sum in fp32.
const ADDED_BYTES: f64 = 10.0;

/// What one thread moves when it adds where that was not measured, on the host of the `h100` preset.
const ONE_THREAD_BYTES_PER_S: f64 = 24e9;

impl Hardware {
    /// Reads a machine from JSON with the fields of this struct.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let hardware: Hardware = serde_json::from_str(text).map_err(|e| e.to_string())?;
        hardware.check()?;
        Ok(hardware)
    }

    /// What a step that may be undone takes on the lane of the host's Adam beside a plain one of `step` bytes, in bytes of that one's traffic:
    /// its record of `undo` bytes is written. A calibrated machine says how fast both are together, in the engine no faster than alone; one
    /// that was calibrated when records were copied before, how fast that was.
    pub fn undoable_work(&self, step: u64, undo: u64) -> f64 {
        if self.copied_undo_records() {
            return self.copy_work(undo);
        }
        let longer = |rate: f64| self.host_adam_bytes_per_s() / (rate * ADAM_BYTES_PER_PARAM) - 1.0;
        self.undoable_params_per_s().map_or(undo as f64, |rate| (step as f64 * longer(rate)).max(0.0))
    }

    fn undoable_params_per_s(&self) -> Option<f64> {
        let measured = self.measured.as_ref()?;
        let alone = measured.host.last().and_then(|row| row.undoable_params_per_s);
        [measured.host_undoable_params_per_s, alone].into_iter().flatten().reduce(f64::min)
    }

    /// Whether this machine was calibrated when the engine still copied what a step would overwrite before it, in many pieces.
    pub fn copied_undo_records(&self) -> bool {
        self.measured.is_some() && self.undoable_params_per_s().is_none()
    }

    /// What putting an undo record back takes on the lane of the host's Adam, in bytes of its traffic: all of it is read and written, and a
    /// calibrated machine says how fast copies are, in the engine no faster than alone.
    pub fn copy_work(&self, bytes: u64) -> f64 {
        let measured = self.measured.as_ref();
        let own = measured.and_then(|m| m.host_undo_bytes_per_s);
        let copy = measured.and_then(|m| m.host.last()).map(|row| own.map_or(row.copy_bytes_per_s, |own| own.min(row.copy_bytes_per_s)));
        copy.map_or(2.0, |copy| self.host_adam_bytes_per_s() / copy) * bytes as f64
    }

    /// What passes between two steps on the host takes, in bytes of the traffic of the host's Adam.
    pub fn gap_work(&self) -> f64 {
        let gap_ns = self.measured.as_ref().and_then(|m| m.host_gap_ns);
        gap_ns.map_or(0.0, |ns| self.host_adam_bytes_per_s() * ns / 1e9)
    }

    /// Bytes per second that whole steps on the host move: the engine's, where they were seen, whose kernel is no faster than alone.
    pub fn host_adam_bytes_per_s(&self) -> f64 {
        let own = self.measured.as_ref().and_then(Measured::whole_step_in_engine);
        own.map_or(self.host_adam_params_per_s, |own| own.min(self.host_adam_params_per_s)) * ADAM_BYTES_PER_PARAM
    }

    /// What a first pass that moves so many bytes takes on the lane of the host's Adam, in bytes of that one's traffic.
    pub fn params_first_work(&self, bytes: u64) -> f64 {
        if let Some(rate) = self.measured.as_ref().and_then(|m| m.host_params_first_per_s) {
            return bytes as f64 * self.host_adam_bytes_per_s() / (rate * FIRST_PASS_BYTES);
        }
        let whole = self.host_adam_params_per_s * ADAM_BYTES_PER_PARAM;
        bytes as f64 * self.host_params_first_per_s.map_or(1.0, |rate| whole / (rate * FIRST_PASS_BYTES))
    }

    /// The same of a second pass.
    pub fn moments_work(&self, bytes: u64) -> f64 {
        if let Some(rate) = self.measured.as_ref().and_then(|m| m.host_moments_per_s) {
            return bytes as f64 * self.host_adam_bytes_per_s() / (rate * MOMENTS_BYTES);
        }
        let whole = self.host_adam_params_per_s * ADAM_BYTES_PER_PARAM;
        let measured = self.measured.as_ref().and_then(|m| m.host.last()?.moments_per_s);
        bytes as f64 * measured.map_or(1.0, |rate| whole / (rate * MOMENTS_BYTES))
    }

    /// What adding gradients to their sums takes on the landing worker's lane, whose rate is that of norms, in bytes of its traffic.
    pub fn addition_work(&self, bytes: u64) -> f64 {
        bytes as f64 * self.host_stream_bytes_per_s / self.added_bytes_per_s()[1]
    }

    /// Bytes per second that one thread moves when it adds, and all threads together: what element-wise passes of others are measured by.
    pub fn added_bytes_per_s(&self) -> [f64; 2] {
        let rows = self.measured.as_ref().map_or(&[][..], |measured| &measured.host);
        let added = |row: &HostRow| row.accumulate_numel_per_s * ADDED_BYTES;
        let all = rows.last().map_or(self.host_stream_bytes_per_s, added);
        let one = rows.iter().find(|row| row.threads == 1);
        [one.map_or(ONE_THREAD_BYTES_PER_S, added).min(all), all]
    }

    /// The same on the lane of the host's Adam, in bytes of that one's traffic.
    pub fn addition_work_of_adam(&self, bytes: u64) -> f64 {
        let added = self.measured.as_ref().and_then(|m| m.host.last()).map(|row| row.accumulate_numel_per_s);
        added.map_or(1.0, |added| self.host_adam_bytes_per_s() / (added * ADDED_BYTES)) * bytes as f64
    }

    fn check(&self) -> Result<(), String> {
        let least = if self.measured.is_some() { 2 } else { 1 };
        if !(least..=HARDWARE_VERSION).contains(&self.schema_version) {
            return Err(format!("schema_version is {}; this program reads {least} to {HARDWARE_VERSION}", self.schema_version));
        }
        let mut rates = vec![
            ("peak_flops", self.peak_flops),
            ("matmul_forward_flops", self.matmul_forward_flops),
            ("matmul_backward_flops", self.matmul_backward_flops),
            ("attention_forward_flops", self.attention_forward_flops),
            ("attention_backward_flops", self.attention_backward_flops),
            ("device_memory_bytes_per_s", self.device_memory_bytes_per_s),
            ("h2d_bytes_per_s", self.h2d_bytes_per_s),
            ("d2h_bytes_per_s", self.d2h_bytes_per_s),
            ("h2d_duplex_bytes_per_s", self.h2d_duplex_bytes_per_s),
            ("d2h_duplex_bytes_per_s", self.d2h_duplex_bytes_per_s),
            ("pageable_bytes_per_s", self.pageable_bytes_per_s),
            ("host_memory_bytes_per_s", self.host_memory_bytes_per_s),
            ("host_stream_bytes_per_s", self.host_stream_bytes_per_s),
            ("host_adam_params_per_s", self.host_adam_params_per_s),
        ];
        rates.extend(self.host_params_first_per_s.map(|rate| ("host_params_first_per_s", rate)));
        rates.extend(self.nvme.map(|disk| ("nvme.read_bytes_per_s", disk.read_bytes_per_s)));
        rates.extend(self.nvme.map(|disk| ("nvme.write_bytes_per_s", disk.write_bytes_per_s)));
        rates.extend(self.intra_node.map(|link| ("intra_node.bytes_per_s", link.bytes_per_s)));
        rates.extend(self.network.map(|link| ("network.bytes_per_s", link.bytes_per_s)));
        for (name, rate) in rates {
            // Slower than this, a step would not fit 64 bits of nanoseconds.
            if !rate.is_finite() || rate < 1e3 {
                return Err(format!("{name} is {rate}; it must be at least 1000 per second"));
            }
        }
        for (name, tax) in [
            ("d2h_compute_tax", self.d2h_compute_tax),
            ("host_adam_compute_tax", self.host_adam_compute_tax),
            ("collective_compute_tax", self.collective_compute_tax),
        ] {
            if !(0.0..=0.4).contains(&tax) {
                return Err(format!("{name} is {tax}; it must be between 0 and 0.4"));
            }
        }
        for (name, count) in [("gpus_per_node", self.gpus_per_node), ("gpus_per_host_link", self.gpus_per_host_link)] {
            if !(1..=1024).contains(&count) {
                return Err(format!("{name} is {count}; it must be between 1 and 1024"));
            }
        }
        if let Some(measured) = &self.measured {
            measured.check()?;
        }
        if self.gpus_per_node > 1 && self.intra_node.is_none() {
            return Err(format!("intra_node is missing: gpus_per_node is {}", self.gpus_per_node));
        }
        Ok(())
    }

    /// What one of `gpus` equally busy GPUs of a node has of it.
    #[must_use]
    pub fn per_gpu(&self, gpus: u32) -> Hardware {
        let gpus = gpus.clamp(1, self.gpus_per_node);
        let (of_host, of_link) = (f64::from(gpus), f64::from(gpus.min(self.gpus_per_host_link)));
        let most = COPY_SHARE * self.host_memory_bytes_per_s / of_host;
        let link = |rate: f64| (rate / of_link).min(most);
        Hardware {
            h2d_bytes_per_s: link(self.h2d_bytes_per_s),
            d2h_bytes_per_s: link(self.d2h_bytes_per_s),
            h2d_duplex_bytes_per_s: link(self.h2d_duplex_bytes_per_s),
            d2h_duplex_bytes_per_s: link(self.d2h_duplex_bytes_per_s),
            host_memory_bytes_per_s: self.host_memory_bytes_per_s / of_host,
            host_stream_bytes_per_s: self.host_stream_bytes_per_s / of_host,
            host_adam_params_per_s: self.host_adam_params_per_s / of_host,
            host_params_first_per_s: self.host_params_first_per_s.map(|rate| rate / of_host),
            measured: self.measured.as_ref().map(|measured| measured.part_of_host(of_host)),
            host_memory_bytes: self.host_memory_bytes / u64::from(gpus),
            nvme: self.nvme.map(|disk| Disk {
                read_bytes_per_s: disk.read_bytes_per_s / of_host,
                write_bytes_per_s: disk.write_bytes_per_s / of_host,
            }),
            ..self.clone()
        }
    }

    /// The same machine when its host's Adam, measured as `calibrate` does with all threads, makes so many parameters per second: whatever
    /// the host's kernels do is as much faster or slower. An error where that was not calibrated.
    pub fn with_host_adam(self, params_per_s: f64) -> Result<Hardware, String> {
        let calibrated = self.measured.as_ref().and_then(|m| m.host.last()).map(|row| row.adam_params_per_s);
        let Some(calibrated) = calibrated else {
            return Err(format!(
                "host_adam_params_per_s needs a calibrated machine to be compared with; {} has no `measured.host`",
                self.name
            ));
        };
        let factor = params_per_s / calibrated;
        if !(factor.is_finite() && (0.01..=100.0).contains(&factor)) {
            return Err(format!("host_adam_params_per_s is {params_per_s}; it was calibrated as {calibrated}"));
        }
        let hardware = Hardware {
            host_memory_bytes_per_s: self.host_memory_bytes_per_s * factor,
            host_stream_bytes_per_s: self.host_stream_bytes_per_s * factor,
            host_adam_params_per_s: self.host_adam_params_per_s * factor,
            host_params_first_per_s: self.host_params_first_per_s.map(|rate| rate * factor),
            measured: self.measured.as_ref().map(|measured| measured.with_host(factor)),
            ..self
        };
        hardware.check()?;
        Ok(hardware)
    }

    /// The same machine when a training thread takes `probe_ns` for what `calibrate` measured as `measured.launch.probe_ns`: whatever it
    /// launches takes as much longer or shorter. An error where that was not calibrated.
    pub fn with_launch_probe(self, probe_ns: f64) -> Result<Hardware, String> {
        let calibrated = self.measured.as_ref().and_then(|m| m.launch).and_then(|launch| launch.probe_ns);
        let Some(calibrated) = calibrated else {
            return Err(format!(
                "launch_probe_ns needs a calibrated machine to be compared with; {} has no `measured.launch.probe_ns`",
                self.name
            ));
        };
        let factor = probe_ns / calibrated as f64;
        if !(factor.is_finite() && (0.01..=100.0).contains(&factor)) {
            return Err(format!("launch_probe_ns is {probe_ns}; it was calibrated as {calibrated}"));
        }
        let hardware = Hardware { measured: self.measured.as_ref().map(|measured| measured.with_thread(factor)), ..self };
        hardware.check()?;
        Ok(hardware)
    }

    /// The same nodes on another network.
    #[must_use]
    pub fn on_network(self, network: &Network) -> Hardware {
        let per_gpu = Link { bytes_per_s: network.node_bytes_per_s / f64::from(self.gpus_per_node), latency_ns: network.latency_ns };
        Hardware { name: format!("{} on {}", self.name, network.name), network: Some(per_gpu), ..self }
    }
}
