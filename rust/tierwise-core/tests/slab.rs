//! Slab placement against a reference that tries every aligned offset.

use proptest::prelude::*;
use std::cmp::Reverse;
use tierwise_core::ChunkId;
use tierwise_core::slab::{Place, SLOT_ALIGN, Slab};

/// An occupant: offset and size in slots, and its next use (`None`: may not leave).
type Occupant = (u64, u64, Option<u64>);

fn reference(slots: u64, occupants: &[Occupant], wanted: u64, needed_at: u64) -> Option<(Reverse<u64>, u64, u64)> {
    (0..=slots.checked_sub(wanted)?)
        .filter_map(|offset| {
            let hit: Vec<_> = occupants.iter().filter(|(at, len, _)| *at < offset + wanted && at + len > offset).collect();
            if hit.iter().any(|(_, _, next)| next.is_none_or(|next| next <= needed_at)) {
                return None;
            }
            let earliest = hit.iter().filter_map(|(_, _, next)| *next).min().unwrap_or(u64::MAX);
            Some((Reverse(earliest), hit.iter().map(|(_, len, _)| len).sum(), offset))
        })
        .min()
}

/// Occupants that do not overlap: gaps and lengths one after the other.
fn occupants() -> impl Strategy<Value = Vec<Occupant>> {
    let next = prop_oneof![1 => Just(None), 1 => Just(Some(u64::MAX)), 6 => (0_u64..20).prop_map(Some)];
    prop::collection::vec((0_u64..4, 1_u64..6, next), 0..8).prop_map(|parts| {
        let mut end = 0;
        parts
            .into_iter()
            .map(|(gap, len, next)| {
                let at = end + gap;
                end = at + len;
                (at, len, next)
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_best_place_is_found(occupants in occupants(), spare in 0_u64..6, wanted in 1_u64..12, needed_at in 0_u64..20) {
        let slots = occupants.last().map_or(0, |(at, len, _)| at + len) + spare;
        let mut slab = Slab::new(slots * SLOT_ALIGN);
        for (i, (at, len, _)) in occupants.iter().enumerate() {
            slab.insert(ChunkId(i as u32), at * SLOT_ALIGN, len * SLOT_ALIGN);
        }
        let place = slab.place(wanted * SLOT_ALIGN, needed_at, |chunk| occupants[chunk.index()].2);
        let expected = reference(slots, &occupants, wanted, needed_at);
        prop_assert_eq!(place.is_some(), expected.is_some(), "{:?} {:?}", place, expected);
        if let (Some(Place { offset, evict }), Some((earliest, evicted, _))) = (place, expected) {
            // Among equally good places the reference may name another; what counts is what has to leave.
            let leaving: u64 = evict.iter().map(|c| occupants[c.index()].1).sum();
            let first = evict.iter().filter_map(|c| occupants[c.index()].2).min().unwrap_or(u64::MAX);
            prop_assert_eq!((Reverse(first), leaving), (earliest, evicted));
            prop_assert_eq!(offset % SLOT_ALIGN, 0);
            prop_assert!(offset + wanted * SLOT_ALIGN <= slab.bytes());
            let used = slab.used();
            for chunk in &evict {
                slab.remove(occupants[chunk.index()].0 * SLOT_ALIGN);
            }
            slab.insert(ChunkId(99), offset, wanted * SLOT_ALIGN);
            prop_assert_eq!(slab.used(), used - leaving * SLOT_ALIGN + wanted * SLOT_ALIGN);
            let mut end = 0;
            for (offset, _, bytes) in slab.occupants() {
                prop_assert!(offset >= end, "slots overlap");
                end = offset + bytes;
            }
            prop_assert!(end <= slab.bytes());
        }
    }
}
