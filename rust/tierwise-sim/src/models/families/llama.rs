//! LLaMA: RMSNorm, rotary embeddings, grouped queries, SwiGLU.

use super::Architecture;
use crate::models::blocks::{Attention, Block, Bytes, Kind, Params, Tensor, embedding, final_norm, head};
use crate::models::config::Config;
use crate::models::kernels::Eager;

/// Sizes of a gated decoder layer; GLM shares it.
pub struct GatedLayer {
    pub hidden: u64,
    pub inner: u64,
    pub heads: u64,
    pub kv_heads: u64,
    pub head_dim: u64,
}

impl GatedLayer {
    pub fn read(config: &Config) -> Result<Self, String> {
        let hidden = config.size(&["hidden_size"])?;
        let heads = config.size(&["num_attention_heads"])?;
        Ok(GatedLayer {
            hidden,
            heads,
            inner: config.size(&["intermediate_size"])?,
            kv_heads: config.size_or(&["num_key_value_heads"], heads)?,
            head_dim: config.size_or(&["head_dim"], (hidden / heads).max(1))?,
        })
    }

    pub fn query_width(&self) -> u64 {
        self.heads * self.head_dim
    }

    pub fn kv_width(&self) -> u64 {
        self.kv_heads * self.head_dim
    }

    /// Saved in bf16: inputs of both norms and of the projections behind them (8 h), query, key, value, attention output (4 q + 4 kv), its
    /// log-sum-exp (4 a), gate and up projections and the input of the down projection (6 i), both norms' reciprocal deviations (8).
    pub fn block(&self, name: String, params: Vec<Tensor>) -> Block {
        let (h, i, q, kv) = (self.hidden, self.inner, self.query_width(), self.kv_width());
        Block {
            name,
            kind: Kind::Layer,
            params,
            shares: None,
            products: vec![(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)],
            attention: vec![Attention { width: q, kv_width: kv, causal: true }],
            // Two norms (8 h), two residual sums (12 h), rotary embeddings (4 q + 4 kv), SwiGLU (6 i).
            memory_bytes: 20 * h + 4 * q + 4 * kv + 6 * i,
            saved_bytes: 8 * h + 4 * q + 4 * kv + 4 * self.heads + 6 * i + 8,
            // Outputs of both norms and of the gated product.
            cheap_bytes: [4 * h + 2 * i, 8 * h + 6 * i],
            saved_once_bytes: 0,
            forward_transient: Bytes::default(),
            // The gradients of the output, which is the residual sum's too, and of the gated product, whose own gradients take the place of
            // gate and up.
            backward_transient: Bytes::per_token(2 * h + 2 * i),
            input_bytes: 2 * h,
            reductions: 2,
            // Two norms; rotary embeddings as two products, half a negation, a concatenation and a sum (20 each instead of 4); SwiGLU as two
            // operations (10 i instead of 6 i).
            eager: Eager {
                memory_bytes: 2 * Eager::rms_norm(h).memory_bytes + 16 * (q + kv) + 4 * i,
                saved_bytes: 2 * Eager::rms_norm(h).saved_bytes,
                transient_bytes: 0,
            },
            ends_in_product: true,
        }
    }
}

pub fn read(config: &Config) -> Result<Architecture, String> {
    let layer = GatedLayer::read(config)?;
    let (h, i, q, kv) = (layer.hidden, layer.inner, layer.query_width(), layer.kv_width());
    let (vocab, layers) = (config.size(&["vocab_size"])?, config.size(&["num_hidden_layers"])?);
    let attention_bias = config.flag_or("attention_bias", false)?;
    let mlp_bias = config.flag_or("mlp_bias", false)?;
    let mut blocks = vec![embedding("model.embed_tokens", h, Params::default().tensor("weight", vocab * h, true).done())];
    for number in 0..layers {
        let params = Params::default()
            .column("self_attn.q_proj", h, q, attention_bias)
            .column("self_attn.k_proj", h, kv, attention_bias)
            .column("self_attn.v_proj", h, kv, attention_bias)
            .row("self_attn.o_proj", q, h, attention_bias)
            .column("mlp.gate_proj", h, i, mlp_bias)
            .column("mlp.up_proj", h, i, mlp_bias)
            .row("mlp.down_proj", i, h, mlp_bias)
            .rms_norm("input_layernorm", h)
            .rms_norm("post_attention_layernorm", h);
        blocks.push(layer.block(format!("model.layers.{number}"), params.done()));
    }
    let norm = final_norm("model.norm", h, Params::default().tensor("weight", h, false).done());
    blocks.push(Block { eager: Eager::rms_norm(h), ..norm });
    blocks.push(untied_head(config, h, vocab, false)?);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: layer.heads, num_kv_heads: layer.kv_heads, vocab_size: vocab, blocks })
}

/// `lm_head` with its own weights, or with the embedding's if they are tied.
pub fn untied_head(config: &Config, hidden: u64, vocab: u64, tied_by_default: bool) -> Result<Block, String> {
    let tied = config.flag_or("tie_word_embeddings", tied_by_default)?;
    let params = if tied { Vec::new() } else { Params::default().tensor("weight", vocab * hidden, true).done() };
    Ok(head("lm_head", hidden, vocab, params, tied.then_some(0)))
}
