//! Other systems' steps, modelled from what their code does: bytes, copies, collectives and what overlaps.
//!
//! A policy is data ([`policy`]); one program ([`step`]) carries it out on the same lanes as our executor. DeepSpeed's follow its
//! `runtime/zero/stage_1_and_2.py` and `stage3.py` with `overlap_comm` on; FSDP's and DDP's follow their documentation.
//! Not modelled: unfused optimizers, and fragmentation beyond `--reserve`.

mod gradients;
mod memory;
mod policy;
mod program;
mod step;

pub use policy::Policy;
pub use step::step;
