//! The `tierwise-sim` command in this process.

use crate::layout::Layout;
use crate::{errors, parse};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::ffi::OsString;

fn with_name(args: Vec<OsString>) -> impl Iterator<Item = OsString> {
    std::iter::once(OsString::from("tierwise-sim")).chain(args)
}

/// Executes a plan in virtual time.
#[pyfunction]
pub fn simulate_plan(py: Python<'_>, layout: &Layout, trace: &str, plan: &str, request: &str) -> PyResult<String> {
    let (trace, plan, request) = (parse(trace, "trace")?, parse(plan, "plan")?, parse(request, "plan request")?);
    let outcome = py
        .detach(|| tierwise_sim::estimate::estimate(&layout.inner, &trace, &plan, &request))
        .map_err(|error| PyValueError::new_err(error.to_string()))?;
    serde_json::to_string(&outcome).map_err(|e| PyValueError::new_err(e.to_string()))
}

/// Plans a step: of the planner's best plans the one that is executed fastest.
#[pyfunction]
pub fn choose_plan(py: Python<'_>, layout: &Layout, trace: &str, request: &str) -> PyResult<String> {
    let (trace, request) = (parse(trace, "trace")?, parse(request, "plan request")?);
    let plan = py.detach(|| tierwise_sim::choose::choose(&layout.inner, &trace, &request)).map_err(|e| errors::planning(py, &e))?;
    serde_json::to_string(&plan).map_err(|e| PyValueError::new_err(e.to_string()))
}

/// Runs `tierwise-sim` with `args` (without the program's name) on this process's stdout and stderr; gives the exit code.
#[pyfunction]
pub fn sim_main(py: Python<'_>, args: Vec<OsString>) -> u8 {
    py.detach(|| tierwise_sim::cli::main(with_name(args), &mut std::io::stdout().lock(), &mut std::io::stderr().lock()))
}

/// Runs `tierwise-sim` with `args`; gives the exit code, what it printed and its messages.
#[pyfunction]
pub fn sim_output(py: Python<'_>, args: Vec<OsString>) -> (u8, String, String) {
    py.detach(|| {
        let (mut out, mut log) = (Vec::new(), Vec::new());
        let code = tierwise_sim::cli::main(with_name(args), &mut out, &mut log);
        (code, String::from_utf8_lossy(&out).into_owned(), String::from_utf8_lossy(&log).into_owned())
    })
}
