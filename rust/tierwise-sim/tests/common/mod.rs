//! What several test files simulate.

use tierwise_core::plan::ClipMode;
use tierwise_core::planner::{Offload, Recompute};
use tierwise_sim::hardware;
use tierwise_sim::models::Model;
use tierwise_sim::parallel::Parallel;
use tierwise_sim::report::{Report, simulate};
use tierwise_sim::request::{Memory, Plans, Request};

/// A data-parallel step of one sequence per micro-batch, with all that the machine has.
pub fn request(model: Model, machine: &str, gpus: u64, tokens_per_step: u64) -> Request {
    let hardware = hardware::preset(machine).unwrap();
    let parallel = Parallel::data_parallel(gpus);
    Request {
        model,
        device_budget: hardware.device_memory_bytes,
        host_budget: hardware.per_gpu(parallel.gpus_on_node(&hardware)).host_memory_bytes,
        nvme_budget: 0,
        hardware,
        parallel,
        policy: None,
        seq: 4096,
        micro_batch: 1,
        tokens_per_step,
        memory: Memory::Reserve(2_000_000_000),
        recompute: Recompute::Auto,
        recompute_whole: false,
        plans: Plans::Compared,
        offload: Offload::None,
        pageable: false,
        cpu_share: 1.0,
        clip_mode: ClipMode::Defer,
        clips: true,
    }
}

pub fn report(request: &Request) -> Report {
    *simulate(request).unwrap().unwrap().0
}
