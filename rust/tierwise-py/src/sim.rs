//! The `tierwise-sim` command in this process.

use pyo3::prelude::*;
use std::ffi::OsString;

/// Runs `tierwise-sim` with `args` (without the program's name) on this process's stdout and stderr; gives the exit code.
#[pyfunction]
pub fn sim_main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    let args = std::iter::once(OsString::from("tierwise-sim")).chain(args);
    py.detach(|| tierwise_sim::cli::main(args, &mut std::io::stdout().lock(), &mut std::io::stderr().lock()))
}
