//! States that visit the device: every stepped element once, in pieces that fit, cut where no bit depends on it.

mod common;

use common::{llama_7b, models};
use proptest::prelude::*;
use tierwise_core::layout::ALIGN_NUMEL;
use tierwise_core::plan::{ChunkPlan, OptimizerClass, ParamHome};
use tierwise_core::streaming::{PIECE_BYTES, STAGING_BUFFERS, Spread, piece_numel, pieces, staging_bytes};

const VISITING: ChunkPlan = ChunkPlan::new(OptimizerClass::Streamed, ParamHome::Resident);

proptest! {
    #[test]
    fn pieces_hold_every_stepped_element_once((layout, _) in models(), buffer in 1_u64..40, stepped in any::<u8>()) {
        let staging = STAGING_BUFFERS * buffer * ALIGN_NUMEL * layout.precision.state_bytes();
        let numel = piece_numel(&layout, staging);
        prop_assert_eq!(numel, buffer * ALIGN_NUMEL);
        for chunk in layout.ids() {
            let params = &layout.chunks[chunk.index()].params;
            let is_stepped = |position: usize| params[position].trainable && stepped >> position & 1 == 1;
            let pieces = pieces(&layout, chunk, staging, is_stepped);
            prop_assert!(pieces.iter().all(|p| p.start % ALIGN_NUMEL == 0 && p.start < p.end && p.end - p.start <= numel));
            prop_assert!(pieces.iter().all(|p| p.end <= layout.chunks[chunk.index()].state_numel));
            prop_assert!(pieces.windows(2).all(|pair| pair[0].end <= pair[1].start));
            for (position, param) in params.iter().enumerate() {
                let inside: u64 = pieces.iter().map(|p| p.end.min(param.offset + param.numel).saturating_sub(p.start.max(param.offset))).sum();
                if is_stepped(position) {
                    prop_assert_eq!(inside, param.numel);
                }
            }
            // No piece travels for nothing.
            let useful = |p: &std::ops::Range<u64>| params.iter().enumerate().any(|(i, param)| {
                is_stepped(i) && param.offset < p.end && p.start < param.offset + param.numel
            });
            prop_assert!(pieces.iter().all(useful));
        }
    }

    #[test]
    fn a_share_is_spread_evenly(numels in prop::collection::vec(1_u64..1000, 1..50), share in 0.0..=1.0_f64) {
        let mut spread = Spread::new(share);
        let (mut seen, mut chosen) = (0.0, 0.0);
        let largest = *numels.iter().max().unwrap() as f64;
        for numel in numels {
            seen += numel as f64;
            chosen += if spread.next(numel) { numel as f64 } else { 0.0 };
            // Never behind by more than rounding, never ahead by more than one chunk.
            prop_assert!(chosen + 0.5 >= share * seen && chosen <= share * seen + largest);
        }
    }
}

#[test]
fn staging_is_three_pieces_or_three_small_chunks() {
    let (layout, _) = llama_7b(1024);
    let on_host = ChunkPlan::new(OptimizerClass::Host, ParamHome::Resident);
    let mut chunks = vec![on_host; layout.chunks.len()];
    assert_eq!(staging_bytes(&layout, &chunks), 0);
    // The final norm: 4,096 elements.
    chunks[33] = VISITING;
    assert_eq!(staging_bytes(&layout, &chunks), 3 * 4096 * 10);
    chunks[1] = VISITING;
    assert_eq!(staging_bytes(&layout, &chunks), 3 * PIECE_BYTES);
}
