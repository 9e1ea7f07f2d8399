//! Python bindings: parse, give the GIL back, call, map the error.

mod device;
mod disk;
mod engine;
mod errors;
mod functions;
mod layout;
mod measure;
mod sim;

use pyo3::prelude::*;

/// The Rust core of Tierwise.
#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::device::Device;
    #[pymodule_export]
    use crate::disk::{RawDisk, probe_disk};
    #[pymodule_export]
    use crate::engine::{Engine, HostBuffer};
    #[pymodule_export]
    use crate::functions::{adam_step, join_master, kernel_threads, plan, split_master, sum_squares};
    #[pymodule_export]
    use crate::layout::Layout;
    #[pymodule_export]
    use crate::measure::HostBench;
    #[pymodule_export]
    use crate::sim::{choose_plan, sim_main, sim_output, simulate_plan};
    use pyo3::prelude::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        crate::errors::register(module)
    }
}

/// Parses JSON that Python built; a mistake there is a `ValueError` that names what was parsed.
fn parse<T: serde::de::DeserializeOwned>(text: &str, what: &str) -> PyResult<T> {
    serde_json::from_str(text).map_err(|e| pyo3::exceptions::PyValueError::new_err(format!("{what}: {e}")))
}
