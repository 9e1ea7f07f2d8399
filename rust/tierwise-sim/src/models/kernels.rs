//! What kernels move and save beside the least: where nothing is fused, and where heads are padded.

use super::blocks::{Attention, Block, Bytes};

/// Bytes per token that a block takes more where norms, rotary embeddings, activations and the loss run operation by operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_field_names, reason = "bytes are named so everywhere")]
pub struct Eager {
    /// Read and written by element-wise kernels.
    pub memory_bytes: u64,
    /// Saved by autograd when nothing is recomputed.
    pub saved_bytes: u64,
    /// Needed by kernels for themselves, in forward and in backward.
    pub transient_bytes: u64,
}

impl Eager {
    /// Of an RMS norm of bf16: to fp32 (6), square (8), mean (4), scale (8), to bf16 (6) and weight (4) instead of one kernel (4); the input
    /// is saved in fp32 too (4).
    pub fn rms_norm(width: u64) -> Self {
        Eager { memory_bytes: 32 * width, saved_bytes: 4 * width, transient_bytes: 0 }
    }
}

impl Block {
    /// The same without fused kernels.
    #[must_use]
    pub fn eager(self) -> Block {
        let more = |bytes: Bytes| Bytes { per_token: bytes.per_token + self.eager.transient_bytes, once: 0 };
        Block {
            memory_bytes: self.memory_bytes + self.eager.memory_bytes,
            saved_bytes: self.saved_bytes + self.eager.saved_bytes,
            cheap_bytes: [0, 0],
            // Only the fused loss makes gradients in forward.
            saved_once_bytes: 0,
            forward_transient: more(self.forward_transient),
            backward_transient: more(self.backward_transient),
            eager: Eager::default(),
            ..self
        }
    }

    /// Bytes per token that copies around attention read and write in forward and in backward, where a head's width is no multiple of 8.
    ///
    /// torch pads queries, keys and values to one (aten/src/ATen/native/transformers/attention.cpp, `pad_last_dim`): the padded tensor is
    /// filled, then what there is copied into it (aten/src/ATen/native/PadNd.cpp). What is cut off the output makes it
    /// not contiguous, so it is copied. Backward fills and copies for the output, and copies what it cuts off the three gradients.
    pub fn padding_bytes(&self, heads: u64) -> [u64; 2] {
        let of = |a: &Attention| {
            let head_dim = (a.width / heads).max(1);
            if head_dim.is_multiple_of(8) {
                return [0, 0];
            }
            let padded = |width: u64| width * head_dim.next_multiple_of(8) / head_dim;
            let (fill_and_copy, copy) = (|width: u64| 2 * padded(width) + 4 * width, |width: u64| 4 * width);
            let inputs = [a.width, a.kv_width, a.kv_width];
            let forward = inputs.map(fill_and_copy).iter().sum::<u64>() + copy(a.width);
            [forward, fill_and_copy(a.width) + inputs.map(copy).iter().sum::<u64>()]
        };
        self.attention.iter().map(of).fold([0, 0], |sum, part| [sum[0] + part[0], sum[1] + part[1]])
    }
}
