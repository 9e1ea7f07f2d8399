//! Layouts are exact and aligned; budgets refuse before they take.

use proptest::prelude::*;
use tierwise_core::budget::Budget;
use tierwise_core::layout::{ALIGN_NUMEL, Layout, ParamSpec, Precision};
use tierwise_core::{ChunkId, Tier};

fn specs() -> impl Strategy<Value = Vec<Vec<(u64, bool)>>> {
    prop::collection::vec(prop::collection::vec((1_u64..10_000, any::<bool>()), 0..8), 0..6)
}

proptest! {
    #[test]
    fn parameters_are_aligned_disjoint_and_the_trainable_come_first(chunks in specs()) {
        let named = |chunk: usize, i: usize| format!("c{chunk}.p{i}");
        let layout = Layout::new(
            Precision::Bf16,
            chunks
                .iter()
                .enumerate()
                .map(|(c, params)| {
                    let params = params.iter().enumerate();
                    (format!("c{c}"), params.map(|(i, &(numel, trainable))| ParamSpec { name: named(c, i), numel, trainable }).collect())
                })
                .collect(),
        );
        let mut index = 0;
        for (c, (chunk, given)) in layout.chunks.iter().zip(&chunks).enumerate() {
            prop_assert_eq!(chunk.params.len(), given.len());
            let aligned = |trainable: Option<bool>| -> u64 {
                given.iter().filter(|(_, t)| trainable.is_none_or(|wanted| *t == wanted)).map(|(n, _)| n.div_ceil(ALIGN_NUMEL) * ALIGN_NUMEL).sum()
            };
            prop_assert_eq!(chunk.numel, aligned(None));
            prop_assert_eq!(chunk.state_numel, aligned(Some(true)));
            let mut ranges = Vec::new();
            for (i, (param, &(numel, trainable))) in chunk.params.iter().zip(given).enumerate() {
                prop_assert_eq!(&param.name, &named(c, i));
                prop_assert_eq!((param.numel, param.trainable, param.index), (numel, trainable, index));
                prop_assert_eq!(param.offset % ALIGN_NUMEL, 0);
                prop_assert_eq!(trainable, param.offset + numel <= chunk.state_numel);
                prop_assert_eq!(trainable, param.offset < chunk.state_numel);
                ranges.push((param.offset, param.offset + numel));
                index += 1;
            }
            ranges.sort_unstable();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
            prop_assert!(ranges.last().is_none_or(|last| last.1 <= chunk.numel));
        }
    }

    #[test]
    fn a_budget_is_never_exceeded(limit in 0_u64..1000, takes in prop::collection::vec(0_u64..400, 0..40)) {
        let mut budget = Budget::new(Tier::Host, limit);
        let (mut held, mut used, mut peak) = (Vec::new(), 0, 0);
        for (i, bytes) in takes.into_iter().enumerate() {
            if i % 3 == 2 && let Some(back) = held.pop() {
                budget.release(back);
                used -= back;
            }
            match budget.reserve(bytes, "a test") {
                Ok(()) => {
                    held.push(bytes);
                    used += bytes;
                    peak = used.max(peak);
                }
                Err(error) => {
                    prop_assert_eq!((error.requested, error.used, error.limit), (bytes, used, limit));
                    prop_assert_eq!(error.shortfall, used + bytes - limit);
                    prop_assert!(used + bytes > limit);
                }
            }
            prop_assert_eq!((budget.used(), budget.peak(), budget.limit()), (used, peak, limit));
            prop_assert!(budget.used() <= limit);
        }
    }
}

#[test]
fn bytes_per_parameter_are_those_of_the_design() {
    let one = |precision| {
        let spec = |name: &str, trainable| ParamSpec { name: name.to_owned(), numel: 64, trainable };
        let layout = Layout::new(precision, vec![("c".to_owned(), vec![spec("frozen", false), spec("trained", true)])]);
        let c = ChunkId(0);
        [layout.param_bytes(c), layout.grad_bytes(c), layout.grad_acc_bytes(c), layout.state_bytes(c), layout.undo_bytes(c)].map(|b| b / 64)
    };
    // Two parameters in the chunk, one of them trained.
    assert_eq!(one(Precision::Bf16), [4, 2, 4, 10, 12]);
    assert_eq!(one(Precision::Fp16), [4, 2, 4, 12, 14]);
    assert_eq!(one(Precision::Fp32), [8, 4, 4, 8, 12]);
}

#[test]
fn a_full_budget_says_what_and_by_how_much() {
    let mut budget = Budget::new(Tier::Device, 100);
    budget.reserve(90, "the slab").unwrap();
    let error = budget.reserve(30, "a segment").unwrap_err().to_string();
    assert_eq!(error, "device budget exceeded: a segment needs 30 bytes, 90 of 100 bytes are in use (20 bytes short)");
    assert!(Budget::new(Tier::Nvme, u64::MAX).reserve(u64::MAX, "everything").is_ok());
    assert!(budget.reserve(u64::MAX, "an overflow").is_err());
}
