//! Checksums of blocks: xxh3, seeded with what the block is, so that the right bytes of the wrong block do not pass.

use crate::Key;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The seed of one block of one generation of a payload.
pub fn seed(key: Key, generation: u64, block: u32) -> u64 {
    let mut identity = [0u8; 20];
    identity[..4].copy_from_slice(&key.chunk.to_le_bytes());
    identity[4..8].copy_from_slice(&key.payload.to_le_bytes());
    identity[8..16].copy_from_slice(&generation.to_le_bytes());
    identity[16..].copy_from_slice(&block.to_le_bytes());
    xxh3_64_with_seed(&identity, 0)
}

/// The checksum of a block's payload bytes.
pub fn checksum(bytes: &[u8], seed: u64) -> u64 {
    xxh3_64_with_seed(bytes, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_of_the_identity_changes_the_checksum() {
        let key = Key { chunk: 3, payload: 1 };
        let bytes = [7u8; 4096];
        let identities =
            [seed(key, 5, 0), seed(Key { chunk: 4, ..key }, 5, 0), seed(Key { payload: 2, ..key }, 5, 0), seed(key, 6, 0), seed(key, 5, 1)];
        let sums: std::collections::BTreeSet<u64> = identities.iter().map(|&seed| checksum(&bytes, seed)).collect();
        assert_eq!(sums.len(), identities.len());
    }

    #[test]
    fn every_bit_counts() {
        let mut bytes = [0u8; 300];
        let clean = checksum(&bytes, 1);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&bytes, 1), clean, "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }
}
