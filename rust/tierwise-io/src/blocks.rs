//! Which blocks of the spill file are free.

use std::collections::BTreeSet;

/// Free blocks; equal sizes, so that nothing fragments and "fits" is a count.
#[derive(Debug)]
pub(crate) struct Blocks {
    free: BTreeSet<u32>,
    total: u32,
}

impl Blocks {
    pub(crate) fn new(total: u32) -> Self {
        Blocks { free: (0..total).collect(), total }
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn total(&self) -> usize {
        self.total as usize
    }

    /// Takes the lowest free blocks, which keeps a payload's blocks neighbours where it can; `None` takes nothing.
    pub(crate) fn take(&mut self, count: usize) -> Option<Vec<u32>> {
        if count > self.free.len() {
            return None;
        }
        Some((0..count).map_while(|_| self.free.pop_first()).collect())
    }

    pub(crate) fn give(&mut self, blocks: impl IntoIterator<Item = u32>) {
        for block in blocks {
            let new = self.free.insert(block);
            debug_assert!(new && block < self.total, "block {block} was given back twice or is none of the {} blocks", self.total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taking_is_all_or_nothing_and_lowest_first() {
        let mut blocks = Blocks::new(4);
        assert_eq!(blocks.take(3), Some(vec![0, 1, 2]));
        assert_eq!(blocks.take(2), None);
        assert_eq!(blocks.free(), 1);
        blocks.give([1]);
        assert_eq!(blocks.take(2), Some(vec![1, 3]));
        assert_eq!((blocks.free(), blocks.total()), (0, 4));
    }
}
