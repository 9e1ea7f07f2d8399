//! Hardware presets: what a machine sustains, with where each figure comes from.
//!
//! Rates are what long-running training sustains, not data-sheet peaks; `peak_flops` alone is the data sheet's (it divides MFU and HFU).

use serde::{Deserialize, Serialize};

/// One machine with one GPU in use.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hardware {
    /// Name on the command line.
    pub name: String,
    /// Where the figures come from.
    pub source: String,
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
    /// Bytes per second that host memory carries in all, copies included.
    pub host_memory_bytes_per_s: f64,
    /// Bytes per second that the host's own streaming kernels (norms, sums) reach.
    pub host_stream_bytes_per_s: f64,
    /// bf16 parameters per second that the host's Adam steps while nothing else uses its memory.
    pub host_adam_params_per_s: f64,
    /// Usable pinned host memory, in bytes.
    pub host_memory_bytes: u64,
    /// Share of compute lost while a device-to-host copy runs.
    pub d2h_compute_tax: f64,
    /// Share of compute lost while the host's Adam runs.
    pub host_adam_compute_tax: f64,
    /// Nanoseconds in which the training thread enqueues one unit's forward or backward.
    pub launch_ns: u64,
}

/// All presets.
pub fn presets() -> Vec<Hardware> {
    vec![h100(), a100_80(), a100_40(), rtx_4090()]
}

/// The preset of a name.
pub fn preset(name: &str) -> Option<Hardware> {
    presets().into_iter().find(|h| h.name == name)
}

/// H100 SXM5 80 GB behind PCIe Gen5 x16, 16 cores of a Sapphire Rapids Xeon.
fn h100() -> Hardware {
    Hardware {
        name: "h100".to_owned(),
        source: "measured on one H100 80GB HBM3; compute rates fitted on forward + backward of LLaMA 1.35B, 7B and 13B".to_owned(),
        // NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 TFLOP/s with sparsity.
        peak_flops: 989.4e12,
        // Least squares over 14 timings of 1.35B, 7B and 13B, all within 3.2 %; a lone 8192^3 product runs at 799 TFLOP/s.
        matmul_forward_flops: 790e12,
        matmul_backward_flops: 752e12,
        attention_forward_flops: 600e12,
        attention_backward_flops: 217e12,
        device_memory_bytes_per_s: 2.9e12,
        // 79 GiB are visible to a process.
        device_memory_bytes: 79 << 30,
        h2d_bytes_per_s: 53.9e9,
        d2h_bytes_per_s: 55.1e9,
        h2d_duplex_bytes_per_s: 42e9,
        d2h_duplex_bytes_per_s: 50e9,
        host_memory_bytes_per_s: 165e9,
        host_stream_bytes_per_s: 120e9,
        host_adam_params_per_s: 5.9e9,
        host_memory_bytes: 125 << 30,
        d2h_compute_tax: 0.03,
        host_adam_compute_tax: 0.01,
        launch_ns: 300_000,
    }
}

/// What an A100 sustains, by the ratio of the data sheets where nothing better is published. Not measured.
fn a100(name: &str, memory_bytes: u64, memory_bytes_per_s: f64) -> Hardware {
    Hardware {
        name: name.to_owned(),
        source: "estimated from data sheets and published kernels, not measured".to_owned(),
        // NVIDIA A100 Tensor Core GPU data sheet: 312 TFLOP/s dense bf16.
        peak_flops: 312e12,
        // The H100's share of its peak.
        matmul_forward_flops: 249e12,
        matmul_backward_flops: 237e12,
        // FlashAttention-2 (Dao 2023, arXiv 2307.08691), figures 4 to 6: causal, head dimension 128, 2k to 4k tokens.
        attention_forward_flops: 180e12,
        attention_backward_flops: 120e12,
        device_memory_bytes_per_s: memory_bytes_per_s,
        device_memory_bytes: memory_bytes,
        // PCIe Gen4 x16: 31.5 GB/s raw.
        h2d_bytes_per_s: 25e9,
        d2h_bytes_per_s: 25e9,
        h2d_duplex_bytes_per_s: 20e9,
        d2h_duplex_bytes_per_s: 22e9,
        // One socket of eight DDR4-3200 channels: 205 GB/s raw.
        host_memory_bytes_per_s: 130e9,
        host_stream_bytes_per_s: 100e9,
        host_adam_params_per_s: 4.6e9,
        host_memory_bytes: 250 << 30,
        d2h_compute_tax: 0.03,
        host_adam_compute_tax: 0.01,
        launch_ns: 400_000,
    }
}

/// A100 SXM4 80 GB: 2,039 GB/s of HBM2e by the data sheet.
fn a100_80() -> Hardware {
    a100("a100-80", 79 << 30, 1.77e12)
}

/// A100 SXM4 40 GB: 1,555 GB/s of HBM2 by the data sheet.
fn a100_40() -> Hardware {
    a100("a100-40", 39 << 30, 1.35e12)
}

/// GeForce RTX 4090 in a desktop with two channels of DDR5.
fn rtx_4090() -> Hardware {
    Hardware {
        name: "rtx4090".to_owned(),
        source: "estimated from data sheets, not measured".to_owned(),
        // NVIDIA Ada GPU Architecture whitepaper, appendix A: 165.2 TFLOP/s dense bf16 with fp32 accumulation.
        peak_flops: 165.2e12,
        matmul_forward_flops: 148e12,
        matmul_backward_flops: 141e12,
        attention_forward_flops: 130e12,
        attention_backward_flops: 95e12,
        // 1,008 GB/s of GDDR6X by the same whitepaper.
        device_memory_bytes_per_s: 0.88e12,
        // 24 GB less what the driver and a desktop take.
        device_memory_bytes: 23 << 30,
        // PCIe Gen4 x16: 31.5 GB/s raw.
        h2d_bytes_per_s: 25e9,
        d2h_bytes_per_s: 25e9,
        h2d_duplex_bytes_per_s: 20e9,
        d2h_duplex_bytes_per_s: 22e9,
        // Two channels of DDR5-5600: 89.6 GB/s raw.
        host_memory_bytes_per_s: 72e9,
        host_stream_bytes_per_s: 60e9,
        host_adam_params_per_s: 2.6e9,
        host_memory_bytes: 58 << 30,
        d2h_compute_tax: 0.03,
        host_adam_compute_tax: 0.01,
        launch_ns: 300_000,
    }
}

impl Hardware {
    /// Reads a machine from JSON with the fields of this struct.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let hardware: Hardware = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let rates = [
            ("peak_flops", hardware.peak_flops),
            ("matmul_forward_flops", hardware.matmul_forward_flops),
            ("matmul_backward_flops", hardware.matmul_backward_flops),
            ("attention_forward_flops", hardware.attention_forward_flops),
            ("attention_backward_flops", hardware.attention_backward_flops),
            ("device_memory_bytes_per_s", hardware.device_memory_bytes_per_s),
            ("h2d_bytes_per_s", hardware.h2d_bytes_per_s),
            ("d2h_bytes_per_s", hardware.d2h_bytes_per_s),
            ("h2d_duplex_bytes_per_s", hardware.h2d_duplex_bytes_per_s),
            ("d2h_duplex_bytes_per_s", hardware.d2h_duplex_bytes_per_s),
            ("host_memory_bytes_per_s", hardware.host_memory_bytes_per_s),
            ("host_stream_bytes_per_s", hardware.host_stream_bytes_per_s),
            ("host_adam_params_per_s", hardware.host_adam_params_per_s),
        ];
        for (name, rate) in rates {
            // Slower than this, a step would not fit 64 bits of nanoseconds.
            if !rate.is_finite() || rate < 1e3 {
                return Err(format!("{name} is {rate}; it must be at least 1000 per second"));
            }
        }
        for (name, tax) in [("d2h_compute_tax", hardware.d2h_compute_tax), ("host_adam_compute_tax", hardware.host_adam_compute_tax)] {
            if !(0.0..=0.4).contains(&tax) {
                return Err(format!("{name} is {tax}; it must be between 0 and 0.4"));
            }
        }
        if hardware.host_memory_bytes_per_s <= hardware.d2h_bytes_per_s.max(hardware.d2h_duplex_bytes_per_s) {
            return Err("host_memory_bytes_per_s must be above d2h_bytes_per_s: copies pass through host memory".to_owned());
        }
        Ok(hardware)
    }
}
