//! GPT-2: learned positions, one matrix for query, key and value.

use super::Architecture;
use super::llama::untied_head;
use crate::models::blocks::{GptLayer, Params, embedding, final_norm};
use crate::models::config::Config;

pub fn read(config: &Config) -> Result<Architecture, String> {
    let h = config.size_or(&["n_embd", "hidden_size"], 768)?;
    let heads = config.size_or(&["n_head", "num_attention_heads"], 12)?;
    let layers = config.size_or(&["n_layer", "num_hidden_layers"], 12)?;
    let vocab = config.size_or(&["vocab_size"], 50_257)?;
    let positions = config.size_or(&["n_positions", "max_position_embeddings"], 1024)?;
    let inner = config.size_or(&["n_inner"], 4 * h)?;
    if config.flag_or("add_cross_attention", false)? {
        return Err("add_cross_attention is true; GPT-2 is known as a decoder alone".to_owned());
    }
    let tables = Params::default().tensor("wte.weight", vocab * h, true).tensor("wpe.weight", positions * h, false);
    let mut blocks = vec![embedding("transformer", h, tables.done())];
    let layer = GptLayer { hidden: h, width: h, heads, inner, causal: true };
    for number in 0..layers {
        let params = Params::default()
            .layer_norm("ln_1", h)
            .column("attn.c_attn", h, 3 * h, true)
            .row("attn.c_proj", h, h, true)
            .layer_norm("ln_2", h)
            .column("mlp.c_fc", h, inner, true)
            .row("mlp.c_proj", inner, h, true);
        blocks.push(layer.block(format!("transformer.h.{number}"), params.done()));
    }
    blocks.push(final_norm("transformer.ln_f", h, Params::default().tensor("weight", h, false).tensor("bias", h, false).done()));
    blocks.push(untied_head(config, h, vocab, true)?);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: heads, num_kv_heads: heads, vocab_size: vocab, blocks })
}
