//! One read or write of a payload, cut into blocks.

use super::RequestId;
use super::table::ExtentId;
use crate::buffer::Buffer;
use crate::error::Error;
use crate::{Direction, Key, Priority};
use std::collections::VecDeque;

/// What a request is doing.
#[derive(Debug)]
pub(super) enum Phase {
    /// A read of what this write is writing.
    Waiting(RequestId),
    /// Its blocks move.
    Moving,
    /// It will end with this error once the transfers that own its buffer have ended.
    Draining(Error),
}

/// How far one block is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Progress {
    /// Bytes moved, a multiple of the alignment or all.
    pub done: usize,
    /// Transfers without progress since the last one with progress.
    pub fruitless: u32,
    /// Transfers of this block.
    pub attempts: u32,
    /// It was read with a wrong checksum once.
    pub reread: bool,
    /// Taken at the first transfer of a write.
    pub checksum: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Request {
    pub key: Key,
    pub generation: u64,
    pub direction: Direction,
    pub buffer: Buffer,
    pub priority: Priority,
    pub extent: ExtentId,
    pub phase: Phase,
    /// Blocks to be submitted, in order.
    pub queued: VecDeque<u32>,
    /// Blocks that wait for their next attempt.
    pub delayed: u32,
    pub in_flight: u32,
    pub blocks: Vec<Progress>,
}

impl Request {
    /// Whether nothing of it is left to do.
    pub(super) fn idle(&self) -> bool {
        self.in_flight == 0
            && match self.phase {
                Phase::Waiting(_) => false,
                Phase::Moving => self.queued.is_empty() && self.delayed == 0,
                Phase::Draining(_) => true,
            }
    }
}
