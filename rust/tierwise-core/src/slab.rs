//! Placement inside the streaming slab: where a chunk goes, and who has to leave for it.

use crate::ChunkId;
use std::collections::BTreeMap;

/// Slots start at multiples of this many bytes.
pub const SLOT_ALIGN: u64 = 256;

/// A byte range of the slab that a chunk occupies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Occupant {
    chunk: ChunkId,
    bytes: u64,
}

/// Where a chunk can go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// First byte of the slot.
    pub offset: u64,
    /// Chunks that overlap it and have to leave.
    pub evict: Vec<ChunkId>,
}

/// The occupied ranges of the slab.
#[derive(Debug, Clone, Default)]
pub struct Slab {
    bytes: u64,
    occupants: BTreeMap<u64, Occupant>,
}

impl Slab {
    /// An empty slab.
    pub fn new(bytes: u64) -> Self {
        Slab { bytes, occupants: BTreeMap::new() }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes occupied.
    pub fn used(&self) -> u64 {
        self.occupants.values().map(|o| o.bytes).sum()
    }

    /// Chunks present, by offset.
    pub fn occupants(&self) -> impl Iterator<Item = (u64, ChunkId, u64)> + '_ {
        self.occupants.iter().map(|(&offset, o)| (offset, o.chunk, o.bytes))
    }

    /// The best place for `bytes`, or `None` if no place is allowed.
    ///
    /// `next_use` gives the position of an occupant's next use in the cyclic step (`u64::MAX`: never before it is rewritten), or `None` for
    /// one that may not leave. A place is allowed if every overlapping occupant's next use is later than `needed_at`; the best one has the
    /// furthest earliest next use (free space counts as never), then evicts the fewest bytes, then has the lowest offset.
    pub fn place(&self, bytes: u64, needed_at: u64, next_use: impl Fn(ChunkId) -> Option<u64>) -> Option<Place> {
        let ranges: Vec<(u64, u64, Option<u64>, ChunkId)> =
            self.occupants.iter().map(|(&offset, o)| (offset, offset + o.bytes, next_use(o.chunk), o.chunk)).collect();
        // A slot starts at the slab's start or end, or touches an occupant's start or end: others only overlap more.
        let mut candidates: Vec<u64> = vec![0];
        for &(start, end, _, _) in &ranges {
            candidates.push(start);
            candidates.push(end.next_multiple_of(SLOT_ALIGN));
            if let Some(before) = start.checked_sub(bytes) {
                candidates.push(before / SLOT_ALIGN * SLOT_ALIGN);
            }
        }
        if let Some(last) = self.bytes.checked_sub(bytes) {
            candidates.push(last / SLOT_ALIGN * SLOT_ALIGN);
        }
        candidates.sort_unstable();
        candidates.dedup();
        let mut best: Option<(u64, u64, u64)> = None; // earliest next use, evicted bytes, offset
        for offset in candidates {
            let end = offset + bytes;
            if end > self.bytes {
                continue;
            }
            let mut earliest = u64::MAX;
            let mut evicted = 0;
            let allowed = ranges.iter().filter(|(s, e, _, _)| *s < end && *e > offset).all(|(s, e, next, _)| match next {
                Some(next) if *next > needed_at => {
                    earliest = earliest.min(*next);
                    evicted += e - s;
                    true
                }
                _ => false,
            });
            if allowed
                && best.is_none_or(|(use_, bytes_, offset_)| {
                    (std::cmp::Reverse(earliest), evicted, offset) < (std::cmp::Reverse(use_), bytes_, offset_)
                })
            {
                best = Some((earliest, evicted, offset));
            }
        }
        best.map(|(_, _, offset)| Place {
            offset,
            evict: ranges.iter().filter(|(s, e, _, _)| *s < offset + bytes && *e > offset).map(|&(_, _, _, chunk)| chunk).collect(),
        })
    }

    /// Occupies a range. The caller has removed what overlapped it.
    pub fn insert(&mut self, chunk: ChunkId, offset: u64, bytes: u64) {
        debug_assert!(offset + bytes <= self.bytes);
        debug_assert!(self.occupants.iter().all(|(&s, o)| s + o.bytes <= offset || s >= offset + bytes));
        self.occupants.insert(offset, Occupant { chunk, bytes });
    }

    /// Frees the range that starts at `offset`.
    pub fn remove(&mut self, offset: u64) {
        self.occupants.remove(&offset);
    }
}

/// Who still reads which bytes of the slab: whoever writes there next waits for them. `T` is what an executor waits for.
#[derive(Debug, Clone)]
pub struct Guards<T> {
    /// First byte, end, last reader.
    ranges: Vec<(u64, u64, T)>,
}

impl<T> Default for Guards<T> {
    fn default() -> Self {
        Guards { ranges: Vec::new() }
    }
}

impl<T: Clone> Guards<T> {
    /// The bytes have a reader, who is later than all that the same bytes had before.
    pub fn protect(&mut self, start: u64, end: u64, reader: T) {
        self.forget_within(start, end);
        self.ranges.push((start, end, reader));
    }

    /// The bytes are written next: whom that has to wait for. Writers are in order among each other, so it is said once.
    pub fn reuse(&mut self, start: u64, end: u64) -> Vec<T> {
        let readers = self.ranges.iter().filter(|(s, e, _)| *s < end && *e > start).map(|(_, _, reader)| reader.clone()).collect();
        self.forget_within(start, end);
        readers
    }

    /// A range that sticks out still protects its rest.
    fn forget_within(&mut self, start: u64, end: u64) {
        self.ranges.retain(|(s, e, _)| *s < start || *e > end);
    }
}

#[cfg(test)]
mod tests {
    use super::Guards;

    #[test]
    fn whoever_writes_waits_for_every_reader_of_these_bytes() {
        let mut guards = Guards::default();
        guards.protect(0, 100, "a");
        guards.protect(100, 200, "b");
        assert_eq!(guards.reuse(50, 150), ["a", "b"]);
        // Both stick out: their other halves are still read.
        assert_eq!(guards.reuse(0, 50), ["a"]);
        assert_eq!(guards.reuse(100, 200), ["b"]);
        assert_eq!(guards.reuse(150, 200), [""; 0]);
        guards.protect(0, 100, "c");
        guards.protect(0, 100, "d");
        assert_eq!(guards.reuse(0, 100), ["d"]);
        assert_eq!(guards.reuse(0, 100), [""; 0]);
    }
}
