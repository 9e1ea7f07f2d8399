//! The simulator: the planner and the scheduler of Tierwise in virtual time.
//!
//! Data flows one way: [`models`] and [`hardware`] -> [`costs`] -> the core's planner -> [`executor`] -> [`report`]. Time is integer
//! nanoseconds, simultaneous events end in the order in which they began, and nothing reads a clock: equal inputs give equal bytes.

#![forbid(unsafe_code)]
#![allow(clippy::doc_markdown, reason = "LLaMA, RMSNorm and GeForce are names, not code")]

pub mod calibrate;
pub mod choose;
pub mod cli;
pub mod collectives;
pub mod costs;
pub mod estimate;
pub mod executor;
pub mod given;
pub mod hardware;
pub mod html;
pub mod models;
pub mod ours;
pub mod parallel;
pub mod peers;
pub mod pipeline;
pub mod recorded;
pub mod report;
pub mod request;
pub mod search;
pub mod units;
