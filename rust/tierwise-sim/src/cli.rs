//! The command line: parses, asks [`crate::report`], prints.

use crate::hardware::{self, Hardware};
use crate::models::{self, Model};
use crate::report::{Answer, Error, Request, SCHEMA_VERSION, answer};
use crate::units::{gigabytes, parse_bytes};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use tierwise_core::plan::ClipMode;
use tierwise_core::planner::Recompute;

/// Exit codes.
const OK: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const DOES_NOT_FIT: u8 = 3;

/// Does it fit, and how fast? Plans and simulates a training step without a GPU.
#[derive(Debug, Parser)]
#[command(name = "tierwise-sim", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Simulate one steady-state step.
    Run(Box<RunArgs>),
    /// List the known models.
    Models(ListArgs),
    /// List the known machines.
    Hardware(ListArgs),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RecomputeArg {
    Auto,
    None,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ClipModeArg {
    Defer,
    Speculate,
    Auto,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Name of a model, or the path of a Hugging Face config.json.
    #[arg(long)]
    model: String,
    /// Name of a machine, or the path of a JSON file with its figures.
    #[arg(long, default_value = "h100")]
    hardware: String,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 4096)]
    seq: u64,
    /// Sequences of a micro-batch.
    #[arg(long, default_value_t = 1)]
    micro_batch: u64,
    /// Tokens of an optimizer step; one micro-batch if left out.
    #[arg(long)]
    tokens_per_step: Option<u64>,
    /// Limit of device memory, such as 80GB or 75GiB; what the machine has if left out.
    #[arg(long, value_parser = parse_bytes)]
    device_budget: Option<u64>,
    /// Limit of pinned host memory; what the machine has if left out.
    #[arg(long, value_parser = parse_bytes)]
    host_budget: Option<u64>,
    /// Device memory kept free for the CUDA context, workspaces and fragmentation.
    #[arg(long, value_parser = parse_bytes, default_value = "2GB")]
    reserve: u64,
    /// Which layers are recomputed in backward.
    #[arg(long, value_enum, default_value = "auto")]
    recompute: RecomputeArg,
    /// How clipping and the host's optimizer step overlap.
    #[arg(long, value_enum, default_value = "defer")]
    clip_mode: ClipModeArg,
    /// Assume that no step is clipped; otherwise every one is.
    #[arg(long)]
    never_clips: bool,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Write the step's timeline for Perfetto to this file.
    #[arg(long)]
    trace: Option<PathBuf>,
}

/// Runs the command; `args` starts with the program's name. Gives the exit code.
pub fn main(args: impl IntoIterator<Item = OsString>, out: &mut dyn Write, log: &mut dyn Write) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let to: &mut dyn Write = if error.use_stderr() { log } else { out };
            let _ = write!(to, "{}", error.render());
            return if error.use_stderr() { USAGE } else { OK };
        }
    };
    let result = match cli.command {
        Command::Run(args) => run(&args, out),
        Command::Models(args) => models(args.format, out),
        Command::Hardware(args) => hardware(args.format, out),
    };
    result.unwrap_or_else(|failure| {
        let _ = writeln!(log, "error: {}", failure.message);
        failure.code
    })
}

struct Failure {
    code: u8,
    message: String,
}

fn usage(message: impl Into<String>) -> Failure {
    Failure { code: USAGE, message: message.into() }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Failure { code: FAILED, message: format!("cannot write the result: {error}") }
    }
}

impl From<serde_json::Error> for Failure {
    fn from(error: serde_json::Error) -> Self {
        Failure { code: FAILED, message: format!("cannot write JSON: {error}") }
    }
}

fn run(args: &RunArgs, out: &mut dyn Write) -> Result<u8, Failure> {
    let model = find_model(&args.model)?;
    let hardware = find_hardware(&args.hardware)?;
    let request = Request {
        seq: args.seq,
        micro_batch: args.micro_batch,
        tokens_per_step: args.tokens_per_step.unwrap_or(args.seq.saturating_mul(args.micro_batch)),
        device_budget: args.device_budget.unwrap_or(hardware.device_memory_bytes),
        host_budget: args.host_budget.unwrap_or(hardware.host_memory_bytes),
        reserve_bytes: args.reserve,
        recompute: match args.recompute {
            RecomputeArg::Auto => Recompute::Auto,
            RecomputeArg::None => Recompute::None,
            RecomputeArg::Full => Recompute::Full,
        },
        clip_mode: match args.clip_mode {
            ClipModeArg::Defer => ClipMode::Defer,
            ClipModeArg::Speculate => ClipMode::Speculate,
            ClipModeArg::Auto => ClipMode::Auto,
        },
        clips: !args.never_clips,
        model,
        hardware,
    };
    let answer = answer(&request).map_err(|error| match error {
        Error::Usage(message) => usage(message),
        Error::Execution(_) => Failure { code: FAILED, message: error.to_string() },
    })?;
    match answer {
        Answer::Fits(report, timeline) => {
            if let Some(path) = &args.trace {
                std::fs::write(path, timeline.to_perfetto())
                    .map_err(|error| Failure { code: FAILED, message: format!("cannot write {}: {error}", path.display()) })?;
            }
            print(out, args.format, &report.to_table(), &*report)?;
            Ok(OK)
        }
        Answer::DoesNotFit(shortage) => {
            print(out, args.format, &shortage.to_table(), &*shortage)?;
            Ok(DOES_NOT_FIT)
        }
    }
}

fn print(out: &mut dyn Write, format: Format, table: &str, value: &impl serde::Serialize) -> Result<(), Failure> {
    match format {
        Format::Table => write!(out, "{table}")?,
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(value)?)?,
    }
    Ok(())
}

fn find_model(name: &str) -> Result<Model, Failure> {
    if let Some(model) = models::preset(name) {
        return Ok(model);
    }
    let known = models::names().join(", ");
    let text = read_file("model", name, &known)?;
    let mut model = Model::from_json(&text).map_err(|error| usage(format!("{name}: {error}")))?;
    if model.name.is_empty() {
        name.clone_into(&mut model.name);
    }
    Ok(model)
}

fn find_hardware(name: &str) -> Result<Hardware, Failure> {
    if let Some(hardware) = hardware::preset(name) {
        return Ok(hardware);
    }
    let known = hardware::names().join(", ");
    let text = read_file("hardware", name, &known)?;
    Hardware::from_json(&text).map_err(|error| usage(format!("{name}: {error}")))
}

fn read_file(what: &str, name: &str, known: &str) -> Result<String, Failure> {
    std::fs::read_to_string(name).map_err(|error| usage(format!("unknown {what} `{name}` and no such file ({error}); known are {known}")))
}

fn models(format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
    let presets = models::presets();
    match format {
        Format::Table => {
            writeln!(out, "{:<15}{:>16}{:>8}{:>8}{:>8}{:>8}  source", "model", "parameters", "layers", "hidden", "heads", "kv")?;
            for m in presets {
                let sizes = (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads);
                let head = format!("{:<15}{:>16}{:>8}{:>8}", m.name, m.num_params(), sizes.0, sizes.1);
                writeln!(out, "{head}{:>8}{:>8}  {}", sizes.2, sizes.3, m.source)?;
            }
        }
        Format::Json => {
            let models: Vec<_> = presets
                .iter()
                .map(|m| {
                    serde_json::json!({
                        "name": m.name, "source": m.source, "num_params": m.num_params(), "num_hidden_layers": m.num_layers,
                        "hidden_size": m.hidden_size, "num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads,
                        "vocab_size": m.vocab_size, "class": models::class_of(&m.model_type), "config": m.config(),
                        "forward_matmul_flops_per_token": m.blocks.iter().map(|b| b.matmul_flops).sum::<u64>(),
                    })
                })
                .collect();
            let value = serde_json::json!({"schema_version": SCHEMA_VERSION, "models": models});
            writeln!(out, "{}", serde_json::to_string_pretty(&value)?)?;
        }
    }
    Ok(OK)
}

fn hardware(format: Format, out: &mut dyn Write) -> Result<u8, Failure> {
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
