//! BLOOM: ALiBi instead of positions, a norm behind the embedding. Attention is costed as if its kernel knew ALiBi.

use super::Architecture;
use super::llama::untied_head;
use crate::models::blocks::{GptLayer, Params, embedding, final_norm};
use crate::models::config::Config;

pub fn read(config: &Config) -> Result<Architecture, String> {
    // transformers reads `n_embed`, the name of the first checkpoints, before `hidden_size`.
    let h = config.size_or(&["n_embed", "hidden_size"], 64)?;
    let heads = config.size_or(&["n_head", "num_attention_heads"], 8)?;
    let layers = config.size_or(&["n_layer", "num_hidden_layers"], 2)?;
    let vocab = config.size_or(&["vocab_size"], 250_880)?;
    let tables = Params::default().tensor("word_embeddings.weight", vocab * h, true).layer_norm("word_embeddings_layernorm", h);
    let mut first = embedding("transformer", h, tables.done());
    first.memory_bytes += 4 * h;
    first.saved_bytes += 2 * h + 8;
    first.input_bytes += 2 * h + 8;
    let mut blocks = vec![first];
    let layer = GptLayer { hidden: h, width: h, heads, inner: 4 * h, causal: true };
    for number in 0..layers {
        let params = Params::default()
            .layer_norm("input_layernorm", h)
            .column("self_attention.query_key_value", h, 3 * h, true)
            .row("self_attention.dense", h, h, true)
            .layer_norm("post_attention_layernorm", h)
            .column("mlp.dense_h_to_4h", h, 4 * h, true)
            .row("mlp.dense_4h_to_h", 4 * h, h, true);
        blocks.push(layer.block(format!("transformer.h.{number}"), params.done()));
    }
    blocks.push(final_norm("transformer.ln_f", h, Params::default().tensor("weight", h, false).tensor("bias", h, false).done()));
    blocks.push(untied_head(config, h, vocab, true)?);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: heads, num_kv_heads: heads, vocab_size: vocab, blocks })
}
