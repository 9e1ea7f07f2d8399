//! The one place where Rust errors become Python exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyBaseException, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use std::path::Path;
use tierwise_core::planner::PlanError;
use tierwise_runtime::error::Error;

create_exception!(tierwise._core, TierwiseError, PyRuntimeError, "Base class of every error that Tierwise raises itself.");
create_exception!(tierwise._core, BudgetError, TierwiseError, "A plan or an allocation does not fit a tier's budget.");
create_exception!(tierwise._core, ScheduleError, TierwiseError, "The engine refused an event.");
create_exception!(tierwise._core, DeviceError, TierwiseError, "The device driver refused a call.");
create_exception!(tierwise._core, EngineStoppedError, TierwiseError, "A worker failed earlier; the engine does nothing any more.");

/// Adds the exceptions to the module.
pub fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    module.add("TierwiseError", py.get_type::<TierwiseError>())?;
    module.add("BudgetError", py.get_type::<BudgetError>())?;
    module.add("ScheduleError", py.get_type::<ScheduleError>())?;
    module.add("DeviceError", py.get_type::<DeviceError>())?;
    module.add("EngineStoppedError", py.get_type::<EngineStoppedError>())?;
    for class in [&STORAGE_ERROR, &STORAGE_STOPPED_ERROR] {
        module.add(class.name, class.get(py)?)?;
    }
    Ok(())
}

/// An exception class with two bases, which `create_exception!` cannot make.
struct TwoBases {
    name: &'static str,
    doc: &'static str,
    bases: fn(Python<'_>) -> PyResult<[Bound<'_, PyType>; 2]>,
    class: PyOnceLock<Py<PyType>>,
}

impl TwoBases {
    fn get<'py>(&self, py: Python<'py>) -> PyResult<&Bound<'py, PyType>> {
        let class = self.class.get_or_try_init(py, || {
            let namespace = PyDict::new(py);
            namespace.set_item("__module__", "tierwise._core")?;
            namespace.set_item("__doc__", self.doc)?;
            // `OSError` builds a text of its own from number and file; ours says what was read or written, and what to do.
            namespace.set_item("__str__", py.get_type::<PyBaseException>().getattr("__str__")?)?;
            let class = py.get_type::<PyType>().call1((self.name, PyTuple::new(py, (self.bases)(py)?)?, namespace))?;
            PyResult::Ok(class.cast_into::<PyType>()?.unbind())
        });
        class.map(|class| class.bind(py))
    }
}

static STORAGE_ERROR: TwoBases = TwoBases {
    name: "StorageError",
    doc: "The disk, or the spill file on it, failed.",
    bases: |py| Ok([py.get_type::<TierwiseError>(), py.get_type::<PyOSError>()]),
    class: PyOnceLock::new(),
};

static STORAGE_STOPPED_ERROR: TwoBases = TwoBases {
    name: "StorageStoppedError",
    doc: "The disk failed a worker earlier; the engine does nothing any more.",
    bases: |py| Ok([py.get_type::<EngineStoppedError>(), STORAGE_ERROR.get(py)?.clone()]),
    class: PyOnceLock::new(),
};

fn storage_error(py: Python<'_>, class: &TwoBases, message: String, path: Option<&Path>, error: &tierwise_io::error::Error) -> PyErr {
    let make = || -> PyResult<PyErr> {
        let value = class.get(py)?.call1((message,))?;
        value.setattr("errno", error.errno())?;
        value.setattr("strerror", error.errno().map(|errno| py.import("os")?.call_method1("strerror", (errno,))).transpose()?)?;
        value.setattr("filename", path.map(Path::as_os_str))?;
        Ok(PyErr::from_value(value))
    };
    make().unwrap_or_else(|error| error)
}

/// The numbers of a budget error, as attributes.
struct Numbers<'a> {
    tier: &'a str,
    op: Option<&'a str>,
    needed: u64,
    budget: u64,
    shortfall: u64,
    breakdown: serde_json::Value,
}

fn budget_error(py: Python<'_>, message: String, numbers: &Numbers<'_>) -> PyErr {
    let error = BudgetError::new_err(message);
    let value = error.value(py);
    let set = || -> PyResult<()> {
        value.setattr("tier", numbers.tier)?;
        value.setattr("op", numbers.op)?;
        value.setattr("needed_bytes", numbers.needed)?;
        value.setattr("budget_bytes", numbers.budget)?;
        value.setattr("shortfall_bytes", numbers.shortfall)?;
        value.setattr("breakdown", crate::engine::to_python(py, &numbers.breakdown)?)
    };
    set().err().unwrap_or(error)
}

/// A runtime error as an exception.
pub fn runtime(py: Python<'_>, error: &Error) -> PyErr {
    use tierwise_io::error::Error as Disk;
    let message = error.to_string();
    match error {
        Error::Budget(e) => {
            let tier = e.tier.to_string();
            let numbers = Numbers {
                tier: &tier,
                op: None,
                needed: e.used + e.requested,
                budget: e.limit,
                shortfall: e.shortfall,
                breakdown: serde_json::json!({}),
            };
            budget_error(py, message, &numbers)
        }
        Error::Schedule(_) => ScheduleError::new_err(message),
        Error::Device { .. } => DeviceError::new_err(message),
        Error::HostMemory { .. } => PyMemoryError::new_err(message),
        Error::Stopped(_) => EngineStoppedError::new_err(message),
        Error::Storage { source, .. } if matches!(**source, Disk::InMemory { .. } | Disk::Usage(_)) => PyValueError::new_err(message),
        Error::Storage { path, source, .. } => storage_error(py, &STORAGE_ERROR, message, path.as_deref(), source),
        Error::StoppedByDisk { path, source, .. } => storage_error(py, &STORAGE_STOPPED_ERROR, message, path.as_deref(), source),
        Error::Staging(_) | Error::Forked { .. } | Error::Interrupted | Error::Internal(_) => TierwiseError::new_err(message),
        Error::Usage(_) => PyValueError::new_err(message),
    }
}

/// A storage error as an exception.
pub fn storage(py: Python<'_>, error: &tierwise_io::error::Error) -> PyErr {
    use tierwise_io::error::Error;
    match error {
        Error::InMemory { .. } | Error::Usage(_) => PyValueError::new_err(error.to_string()),
        _ => storage_error(py, &STORAGE_ERROR, error.to_string(), error.directory(), error),
    }
}

/// A planning error as an exception.
pub fn planning(py: Python<'_>, error: &PlanError) -> PyErr {
    let message = error.to_string();
    let json = |value: Result<serde_json::Value, serde_json::Error>| value.unwrap_or_default();
    let numbers = match error {
        PlanError::Device { op, needed, budget, shortfall, breakdown } => Numbers {
            tier: "device",
            op: Some(op),
            needed: *needed,
            budget: *budget,
            shortfall: *shortfall,
            breakdown: json(serde_json::to_value(breakdown)),
        },
        PlanError::Host { needed, budget, shortfall, breakdown } => Numbers {
            tier: "host",
            op: None,
            needed: *needed,
            budget: *budget,
            shortfall: *shortfall,
            breakdown: json(serde_json::to_value(breakdown)),
        },
        PlanError::Nvme { needed, budget, shortfall, breakdown } => Numbers {
            tier: "nvme",
            op: None,
            needed: *needed,
            budget: *budget,
            shortfall: *shortfall,
            breakdown: serde_json::json!({
                "payload": breakdown.payload_bytes,
                "copies_and_padding": breakdown.file_bytes - breakdown.payload_bytes,
            }),
        },
        PlanError::Invalid(_) => return PyValueError::new_err(message),
    };
    budget_error(py, message, &numbers)
}
