//! Other systems' steps, modelled from what their code does: bytes, copies, collectives and what overlaps.
//!
//! A policy is data ([`policy`]); one program ([`step`]) carries it out on the same lanes as our executor. Read: DeepSpeed 0.16 to 0.19
//! (`runtime/zero/stage_1_and_2.py`, `stage3.py`, `overlap_comm` on), torch 2.11 (`distributed/fsdp/_fully_shard`, `DistributedDataParallel`).
//! Not modelled: their hooks' time on the CPU, unfused optimizers, and fragmentation beyond `--reserve`.

mod policy;
mod program;
mod step;

pub use policy::Policy;
pub use step::step;
