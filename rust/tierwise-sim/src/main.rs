//! The `tierwise-sim` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    let code = tierwise_sim::cli::main(std::env::args_os(), &mut std::io::stdout().lock(), &mut std::io::stderr().lock());
    ExitCode::from(code)
}
