//! Recorded runs: the schema of their files, and what is predicted for each.

use crate::given::GivenPlan;
use crate::hardware::{self, Hardware};
use crate::models::{self, Model};
use crate::parallel::Parallel;
use crate::peers::Policy;
use crate::report::{Report, simulate};
use crate::request::{Error, Memory, Plans, Request};
use crate::units::Shortfall;
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tierwise_core::plan::ClipMode;
use tierwise_core::planner::{Offload, Placement, Recompute};
use tierwise_core::timeline::Timeline;

/// A file of recorded runs.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    /// Version of this schema.
    pub schema_version: u32,
    /// Where the records come from.
    #[serde(rename = "source")]
    _source: String,
    /// What recorded them.
    #[serde(default, rename = "machine")]
    _machine: Value,
    /// Models by the names that runs use.
    #[serde(default)]
    models: BTreeMap<String, Value>,
    /// Largest errors allowed, per metric, in percent.
    #[serde(default)]
    pub gate: BTreeMap<String, Limits>,
    /// The runs.
    pub runs: Vec<Run>,
    /// What was recorded while other programs had the machine; not simulated.
    #[serde(default, rename = "disturbed")]
    _disturbed: Value,
}

/// Largest errors, in percent.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Of the absolute error's median.
    pub median: Option<f64>,
    /// Of its 95th percentile.
    pub p95: Option<f64>,
    /// Of the largest.
    pub max: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Recomputes {
    None,
    Full,
    Auto,
}

/// One recorded run. What is left out is what the command line takes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(clippy::struct_excessive_bools, reason = "independent switches, as on the command line")]
pub struct Run {
    /// Name in the tables.
    pub name: String,
    /// A name in the file's `models`, a preset, the path of a config.json, or the fields of one.
    model: Value,
    hardware: String,
    #[serde(default)]
    network: Option<String>,
    #[serde(default = "ours")]
    policy: String,
    #[serde(default = "one")]
    gpus: u64,
    #[serde(default = "one")]
    tensor_parallel: u64,
    seq: u64,
    micro_batch: u64,
    tokens_per_step: u64,
    #[serde(default = "auto")]
    recompute: Recomputes,
    #[serde(default)]
    recompute_whole: bool,
    #[serde(default)]
    eager_kernels: bool,
    #[serde(default)]
    pageable: bool,
    #[serde(default = "whole")]
    cpu_share: f64,
    #[serde(default)]
    device_budget: Option<u64>,
    #[serde(default)]
    host_budget: Option<u64>,
    #[serde(default)]
    nvme_budget: u64,
    #[serde(default)]
    reserve_bytes: Option<u64>,
    #[serde(default = "by_planner")]
    placement: Placement,
    #[serde(default = "defer")]
    clip_mode: ClipMode,
    #[serde(default = "yes")]
    clips: bool,
    /// Whether there was a limit of the norm at all: without one nothing clips.
    #[serde(default = "yes")]
    has_max_norm: bool,
    /// Parameters per second of the host's Adam around the run, measured as the calibrated hardware's with all threads. The host's figures
    /// are scaled by their mean: a shared machine's memory is faster in one minute than in the next.
    #[serde(default)]
    host_adam_params_per_s: Vec<f64>,
    /// Nanoseconds of a fixed piece of work of a training thread around the run, the calibrated hardware's `measured.launch.probe_ns`. What
    /// the training thread takes is scaled by their median: other programs have a part of its core's caches, and now and then its core.
    #[serde(default)]
    launch_probe_ns: Vec<f64>,
    /// The plan that ran. Without one the planner is asked.
    #[serde(default)]
    executed: Option<GivenPlan>,
    /// What was measured.
    pub recorded: Recorded,
    /// What the runtime asked its planner.
    #[serde(default, rename = "plan_request")]
    _plan_request: Value,
    /// What the runtime's trace says.
    #[serde(default, rename = "traced")]
    _traced: Value,
    /// More that was measured.
    #[serde(default, rename = "observed")]
    _observed: Value,
    /// Why it did not fit.
    #[serde(default, rename = "failed")]
    _failed: Value,
}

/// What was measured; what was not is left out.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recorded {
    /// Whether it ran.
    #[serde(default = "yes")]
    pub fits: bool,
    /// Seconds of a step.
    pub step_s: Option<f64>,
    /// Seconds of single steps.
    #[serde(default, rename = "step_times_s")]
    _step_times_s: Vec<f64>,
    /// Tokens per second.
    pub tokens_per_s: Option<f64>,
    /// Most bytes of device memory.
    pub device_peak_bytes: Option<f64>,
    /// Most bytes of pinned host memory.
    pub host_peak_bytes: Option<f64>,
    /// Seconds per step that the compute stream waited for the engine.
    #[serde(rename = "wait_s")]
    _wait_s: Option<f64>,
}

fn ours() -> String {
    "tierwise".to_owned()
}

fn one() -> u64 {
    1
}

fn whole() -> f64 {
    1.0
}

fn auto() -> Recomputes {
    Recomputes::Auto
}

fn by_planner() -> Placement {
    Placement::Auto
}

fn defer() -> ClipMode {
    ClipMode::Defer
}

fn yes() -> bool {
    true
}

/// Device bytes kept free where a plan is made and the record does not say how many were.
const RESERVE_BYTES: u64 = 2_000_000_000;

/// The model of a name: a preset or the path of a config.json.
pub fn find_model(name: &str) -> Result<Model, String> {
    if let Some(model) = models::preset(name) {
        return Ok(model);
    }
    let text = read_file("model", Path::new(name), &models::names().join(", "))?;
    let mut model = Model::from_json(&text).map_err(|error| format!("{name}: {error}"))?;
    if model.name.is_empty() {
        name.clone_into(&mut model.name);
    }
    Ok(model)
}

/// The machine of a name: a preset or the path of a hardware file, which is looked for in `folder`; on another network if one is named.
pub fn find_hardware(name: &str, network: Option<&str>, folder: &Path) -> Result<Hardware, String> {
    let hardware = if let Some(hardware) = hardware::preset(name) {
        hardware
    } else {
        let text = read_file("hardware", &folder.join(name), &hardware::names().join(", "))?;
        Hardware::from_json(&text).map_err(|error| format!("{name}: {error}"))?
    };
    let Some(network) = network else { return Ok(hardware) };
    let known = hardware::networks();
    let found = known.iter().find(|n| n.name == network).ok_or_else(|| {
        let names = known.iter().map(|n| n.name.as_str()).collect::<Vec<_>>().join(", ");
        format!("unknown network `{network}`; known are {names}")
    })?;
    Ok(hardware.on_network(found))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])
}

fn read_file(what: &str, path: &Path, known: &str) -> Result<String, String> {
    std::fs::read_to_string(path)
        .map_err(|error| format!("unknown {what} `{}` and no such file ({error}); known are {known}", path.display()))
}

impl File {
    /// Reads a file's text.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let file: File = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if file.schema_version != 1 {
            return Err(format!("schema_version is {}; this program reads 1", file.schema_version));
        }
        Ok(file)
    }

    /// What is predicted for a run; the inner error says what would not fit. Hardware files are looked for in `folder`.
    pub fn predict(&self, run: &Run, folder: &Path) -> Result<Result<(Box<Report>, Timeline), Shortfall>, Error> {
        simulate(&self.request(run, folder).map_err(Error::Usage)?)
    }

    fn request(&self, run: &Run, folder: &Path) -> Result<Request, String> {
        let model = match &run.model {
            Value::String(name) => match self.models.get(name) {
                Some(config) => {
                    let mut model = Model::from_value(config.clone())?;
                    name.clone_into(&mut model.name);
                    model
                }
                None => find_model(name)?,
            },
            config => Model::from_value(config.clone())?,
        };
        let model = if run.eager_kernels { model.eager() } else { model };
        let hardware = find_hardware(&run.hardware, run.network.as_deref(), folder)?;
        let hardware = match run.host_adam_params_per_s.as_slice() {
            [] => hardware,
            probes => hardware.with_host_adam(mean(probes))?,
        };
        let hardware = match run.launch_probe_ns.as_slice() {
            [] => hardware,
            probes => hardware.with_launch_probe(median(probes))?,
        };
        let policy = match run.policy.as_str() {
            "tierwise" => None,
            name => Some(Policy::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| {
                let known = Policy::ALL.map(Policy::name).join(", ");
                format!("unknown policy `{name}`; known are tierwise, {known}")
            })?),
        };
        let parallel = Parallel { tensor: run.tensor_parallel, ..Parallel::data_parallel(run.gpus) };
        parallel.check(&model, &hardware, run.seq)?;
        let share = hardware.per_gpu(parallel.gpus_on_node(&hardware));
        let memory = match (&run.executed, run.placement, run.reserve_bytes) {
            // A run of ours: what its kernels need for themselves is counted where they run.
            (Some(given), _, _) => Memory::Given(given.clone()),
            (None, placement @ Placement::Static { .. }, None) if policy.is_none() => Memory::Placed(placement),
            (None, _, reserve) => Memory::Reserve(reserve.unwrap_or(RESERVE_BYTES)),
        };
        let least = |asked: Option<u64>, has: u64| asked.map_or(has, |asked| asked.min(has));
        Ok(Request {
            policy,
            parallel,
            seq: run.seq,
            micro_batch: run.micro_batch,
            tokens_per_step: run.tokens_per_step,
            device_budget: least(run.device_budget, hardware.device_memory_bytes),
            host_budget: run.host_budget.unwrap_or(share.host_memory_bytes),
            nvme_budget: run.nvme_budget,
            memory,
            recompute: match run.recompute {
                Recomputes::None => Recompute::None,
                Recomputes::Full => Recompute::Full,
                Recomputes::Auto => Recompute::Auto,
            },
            recompute_whole: run.recompute_whole,
            plans: Plans::Compared,
            // A run that offloads activations has the plan that says which.
            offload: Offload::None,
            pageable: run.pageable,
            cpu_share: run.cpu_share,
            clip_mode: run.clip_mode,
            clips: run.clips && run.has_max_norm,
            model,
            hardware,
        })
    }
}
