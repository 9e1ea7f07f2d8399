//! Which generation of which payload lies in which blocks.

use super::RequestId;
use crate::Key;
use crate::blocks::Blocks;
use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// One complete or growing copy of a payload.
#[derive(Debug)]
pub(super) struct Extent {
    pub generation: u64,
    pub bytes: usize,
    pub blocks: Vec<u32>,
    /// Of each block; complete once the write is.
    pub checksums: Vec<u64>,
    readers: u32,
    /// A newer copy took its place; it goes when its last reader ends.
    replaced: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExtentId(u64);

#[derive(Debug, Clone, Copy)]
enum Entry {
    Stored(ExtentId),
    /// The last complete copy stays until the next one is complete.
    Writing {
        request: RequestId,
        next: ExtentId,
        last: Option<ExtentId>,
    },
}

/// Where a read gets its bytes from.
pub(super) enum Source {
    /// A complete copy.
    Stored(ExtentId),
    /// A copy that this write is making.
    Writing(ExtentId, RequestId),
}

#[derive(Debug)]
pub(super) struct Table {
    entries: BTreeMap<Key, Entry>,
    extents: BTreeMap<ExtentId, Extent>,
    blocks: Blocks,
    block_bytes: usize,
    next_extent: u64,
}

impl Table {
    pub(super) fn new(blocks: u32, block_bytes: usize) -> Self {
        Table { entries: BTreeMap::new(), extents: BTreeMap::new(), blocks: Blocks::new(blocks), block_bytes, next_extent: 0 }
    }

    pub(super) fn extent(&self, id: ExtentId) -> &Extent {
        &self.extents[&id]
    }

    pub(super) fn used_bytes(&self) -> u64 {
        ((self.blocks.total() - self.blocks.free()) * self.block_bytes) as u64
    }

    pub(super) fn free_bytes(&self) -> u64 {
        (self.blocks.free() * self.block_bytes) as u64
    }

    /// Generation of the last complete copy.
    pub(super) fn stored(&self, key: Key) -> Option<u64> {
        let extent = match self.entries.get(&key)? {
            Entry::Stored(extent) => *extent,
            Entry::Writing { last, .. } => (*last)?,
        };
        Some(self.extents[&extent].generation)
    }

    /// Blocks for a new copy, beside the last one.
    pub(super) fn begin_write(&mut self, key: Key, generation: u64, bytes: usize, request: RequestId) -> Result<ExtentId> {
        let last = match self.entries.get(&key) {
            None => None,
            Some(Entry::Stored(extent)) => Some(*extent),
            Some(Entry::Writing { next, .. }) => {
                let running = self.extents[next].generation;
                return Err(Error::Usage(format!(
                    "{key}: generation {generation} cannot be written while generation {running} is; wait for its ticket first"
                )));
            }
        };
        if let Some(stored) = self.stored(key).filter(|&stored| stored >= generation) {
            return Err(Error::Usage(format!(
                "{key}: generation {generation} cannot replace generation {stored}; generations only grow (`forget` starts anew)"
            )));
        }
        let count = bytes.div_ceil(self.block_bytes);
        let Some(blocks) = self.blocks.take(count) else {
            return Err(Error::Full {
                key,
                needed: (count * self.block_bytes) as u64,
                free: self.free_bytes(),
                capacity: (self.blocks.total() * self.block_bytes) as u64,
            });
        };
        let next = ExtentId(self.next_extent);
        self.next_extent += 1;
        self.extents.insert(next, Extent { generation, bytes, blocks, checksums: Vec::new(), readers: 0, replaced: false });
        self.entries.insert(key, Entry::Writing { request, next, last });
        Ok(next)
    }

    /// The new copy is complete and takes the place of the last one.
    pub(super) fn finish_write(&mut self, key: Key, checksums: Vec<u64>) {
        if let Some(&Entry::Writing { next, last, .. }) = self.entries.get(&key) {
            if let Some(extent) = self.extents.get_mut(&next) {
                extent.checksums = checksums;
            }
            self.entries.insert(key, Entry::Stored(next));
            if let Some(last) = last {
                self.replace(last);
            }
        }
    }

    /// The new copy will not be complete; the last one stays. Nobody may read the new one any more.
    pub(super) fn abort_write(&mut self, key: Key) {
        if let Some(&Entry::Writing { next, last, .. }) = self.entries.get(&key) {
            match last {
                Some(last) => self.entries.insert(key, Entry::Stored(last)),
                None => self.entries.remove(&key),
            };
            self.replace(next);
        }
    }

    /// Pins the copy of `generation` until [`Table::end_read`].
    pub(super) fn begin_read(&mut self, key: Key, generation: u64, bytes: usize) -> Result<Source> {
        let source = match self.entries.get(&key) {
            Some(Entry::Stored(extent)) if self.extents[extent].generation == generation => Source::Stored(*extent),
            Some(Entry::Writing { request, next, .. }) if self.extents[next].generation == generation => Source::Writing(*next, *request),
            Some(Entry::Writing { last: Some(last), .. }) if self.extents[last].generation == generation => Source::Stored(*last),
            _ => return Err(Error::NotStored { key, asked: generation, stored: self.stored(key) }),
        };
        let (Source::Stored(id) | Source::Writing(id, _)) = source;
        if let Some(extent) = self.extents.get_mut(&id) {
            if extent.bytes != bytes {
                return Err(Error::Usage(format!(
                    "{key}, generation {generation}, has {} bytes; it cannot be read into {bytes}",
                    extent.bytes
                )));
            }
            extent.readers += 1;
        }
        Ok(source)
    }

    pub(super) fn end_read(&mut self, id: ExtentId) {
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.readers -= 1;
            self.release(id);
        }
    }

    /// Gives the payload's blocks back, after its last reader.
    pub(super) fn forget(&mut self, key: Key) -> Result<()> {
        match self.entries.get(&key) {
            None => Ok(()),
            Some(&Entry::Stored(extent)) => {
                self.entries.remove(&key);
                self.replace(extent);
                Ok(())
            }
            Some(Entry::Writing { next, .. }) => {
                let generation = self.extents[next].generation;
                Err(Error::Usage(format!("{key} cannot be forgotten while generation {generation} is written; wait for its ticket first")))
            }
        }
    }

    fn replace(&mut self, id: ExtentId) {
        if let Some(extent) = self.extents.get_mut(&id) {
            extent.replaced = true;
            self.release(id);
        }
    }

    fn release(&mut self, id: ExtentId) {
        if self.extents.get(&id).is_some_and(|extent| extent.replaced && extent.readers == 0)
            && let Some(extent) = self.extents.remove(&id)
        {
            self.blocks.give(extent.blocks);
        }
    }
}
