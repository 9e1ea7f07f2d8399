//! The command line: parses, asks the library, prints.

mod args;
mod lists;
mod output;
mod steps;
mod validate;

use crate::report::SCHEMA_VERSION;
use args::StepArgs;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use output::Failure;
use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;

/// Exit codes.
const OK: u8 = 0;
const FAILED: u8 = 1;
const USAGE: u8 = 2;
const DOES_NOT_FIT: u8 = 3;
const GATE: u8 = 4;

/// Does it fit, and how fast? Plans and simulates a training step without a GPU.
///
/// Exit codes: 0 it fits, 1 the result could not be written, 2 usage error, 3 it does not fit, 4 `validate` found a larger error than allowed.
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
    /// Find the fastest settings: micro-batch, parallel sizes and what each rank keeps.
    Search(Box<SearchArgs>),
    /// Simulate the same step with several systems.
    Compare(Box<CompareArgs>),
    /// Compare recorded runs with their prediction.
    Validate(ValidateArgs),
    /// Measure this machine's host and write a hardware file. `tierwise calibrate` measures the device too.
    Calibrate(CalibrateArgs),
    /// List the known models.
    Models(ListArgs),
    /// List the known machines and networks.
    Hardware(ListArgs),
    /// Print a completion script.
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page.
    Man,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
struct ListArgs {
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    step: StepArgs,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
    /// Write the step's timeline for Perfetto to this file.
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Write a report with the memory timeline to this file.
    #[arg(long)]
    html: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct SearchArgs {
    #[command(flatten)]
    step: StepArgs,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

#[derive(Debug, Args)]
struct CompareArgs {
    #[command(flatten)]
    step: StepArgs,
    /// Systems to compare; all if left out.
    #[arg(long, value_delimiter = ',')]
    policies: Vec<args::PolicyArg>,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

#[derive(Debug, Args)]
struct ValidateArgs {
    /// Recorded runs, as docs/simulator.md describes them.
    file: PathBuf,
    /// Also write the predicted timeline of every run that fits into this folder, as trace-event JSON for Perfetto.
    #[arg(long, value_name = "FOLDER")]
    traces: Option<PathBuf>,
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
}

#[derive(Debug, Args)]
struct CalibrateArgs {
    /// File to write, for `--hardware`.
    #[arg(long)]
    out: PathBuf,
    /// Name of the machine in reports.
    #[arg(long, default_value = "this-machine")]
    name: String,
    /// Machine, or file, whose figures stand for what is not measured.
    #[arg(long, default_value = "h100")]
    base: String,
    /// Directory to measure as the NVMe tier.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Parameters to measure on, 14 bytes each.
    #[arg(long, default_value_t = 100_000_000, value_parser = clap::value_parser!(u64).range(1..=1 << 36))]
    host_numel: u64,
    /// Seconds of the host's measurements, about.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
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
        Command::Run(args) => steps::run(&args, out),
        Command::Search(args) => steps::search(&args, out),
        Command::Compare(args) => steps::compare(&args, out),
        Command::Validate(args) => validate::validate(&args.file, args.traces.as_deref(), args.format, out),
        Command::Calibrate(args) => calibrate(&args, out, log),
        Command::Models(args) => lists::models(args.format, out),
        Command::Hardware(args) => lists::hardware(args.format, out),
        Command::Completions { shell } => completions(shell, out),
        Command::Man => clap_mangen::Man::new(Cli::command()).render(out).map(|()| OK).map_err(Failure::from),
    };
    result.unwrap_or_else(|failure| {
        let _ = writeln!(log, "error: {}", failure.message);
        failure.code
    })
}

fn calibrate(args: &CalibrateArgs, out: &mut dyn Write, log: &mut dyn Write) -> Result<u8, Failure> {
    let options = crate::calibrate::Options {
        name: &args.name,
        base: args::find_hardware(&args.base, None)?,
        host_numel: args.host_numel as usize,
        time: std::time::Duration::from_secs(args.seconds),
        disk: args.disk.as_deref(),
    };
    let mut say = |text: &str| drop(writeln!(log, "{text}"));
    let measured = crate::calibrate::calibrate(&options, &mut say).map_err(output::usage)?;
    output::write_file(&args.out, &(serde_json::to_string_pretty(&measured)? + "\n"))?;
    writeln!(out, "{}", args.out.display())?;
    Ok(OK)
}

fn completions(shell: clap_complete::Shell, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tierwise-sim", &mut script);
    out.write_all(&script)?;
    Ok(OK)
}
