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
    /// How to print.
    #[arg(long, value_enum, default_value = "table")]
    format: Format,
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
        Command::Validate(args) => validate::validate(&args.file, args.format, out),
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

fn completions(shell: clap_complete::Shell, out: &mut dyn Write) -> Result<u8, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tierwise-sim", &mut script);
    out.write_all(&script)?;
    Ok(OK)
}
