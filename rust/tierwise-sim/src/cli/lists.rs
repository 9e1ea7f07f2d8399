//! The commands that list what is known.

use super::{Failure, Format, OK, SCHEMA_VERSION};
use crate::hardware;
use crate::models;
use crate::units::gigabytes;
use std::io::Write;

/// Lists the models.
pub fn models(format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
    let presets = models::presets();
    match format {
        Format::Table => {
            writeln!(out, "{:<15}{:>16}{:>8}{:>8}{:>8}{:>8}  source", "model", "parameters", "layers", "hidden", "heads", "kv")?;
            for m in presets {
                let sizes = (m.architecture.num_layers, m.architecture.hidden_size, m.architecture.num_heads, m.architecture.num_kv_heads);
                let head = format!("{:<15}{:>16}{:>8}{:>8}", m.name, m.num_params(), sizes.0, sizes.1);
                writeln!(out, "{head}{:>8}{:>8}  {}", sizes.2, sizes.3, m.source)?;
            }
        }
        Format::Json => {
            let models: Vec<_> = presets
                .iter()
                .map(|m| {
                    serde_json::json!({
                        "name": m.name, "source": m.source, "num_params": m.num_params(), "num_hidden_layers": m.architecture.num_layers,
                        "hidden_size": m.architecture.hidden_size, "num_attention_heads": m.architecture.num_heads, "num_key_value_heads": m.architecture.num_kv_heads,
                        "vocab_size": m.architecture.vocab_size, "class": models::class_of(&m.model_type), "config": m.config(),
                        "forward_matmul_flops_per_token": m.architecture.blocks.iter().map(models::Block::matmul_flops).sum::<u64>(),
                    })
                })
                .collect();
            let value = serde_json::json!({"schema_version": SCHEMA_VERSION, "models": models});
            writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        }
    }
    Ok(OK)
}

/// Lists machines and networks.
pub fn hardware(format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
    let (presets, networks) = (hardware::presets(), hardware::networks());
    match format {
        Format::Table => {
            writeln!(out, "{:<13}{:>8}  {:>9}{:>12}{:>12}  between GPUs", "hardware", "TFLOP/s", "GPUs", "device", "host")?;
            for h in presets {
                let link = |link: Option<hardware::Link>| link.map_or("-".to_owned(), |l| format!("{:.0} GB/s", l.bytes_per_s / 1e9));
                let (device, host) = (gigabytes(h.device_memory_bytes), gigabytes(h.host_memory_bytes));
                let head = format!("{:<13}{:>8.1}  {:>9}{device:>12}{host:>12}", h.name, h.peak_flops / 1e12, h.gpus_per_node);
                writeln!(out, "{head}  {}, network {}", link(h.intra_node), link(h.network))?;
            }
            writeln!(out, "\n{:<16}{:>16}  source", "network", "GB/s of a node")?;
            for n in networks {
                writeln!(out, "{:<16}{:>16.1}  {}", n.name, n.node_bytes_per_s / 1e9, n.source)?;
            }
        }
        Format::Json => {
            let value = serde_json::json!({"schema_version": SCHEMA_VERSION, "hardware": presets, "networks": networks});
            writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        }
    }
    Ok(OK)
}
