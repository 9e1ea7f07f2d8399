//! BERT with its masked-language-model head: bidirectional, norms behind each half.

use super::Architecture;
use crate::models::blocks::{Block, GptLayer, Params, embedding, head};
use crate::models::config::Config;

pub fn read(config: &Config) -> Result<Architecture, String> {
    let h = config.size_or(&["hidden_size"], 768)?;
    let heads = config.size_or(&["num_attention_heads"], 12)?;
    let layers = config.size_or(&["num_hidden_layers"], 12)?;
    let inner = config.size_or(&["intermediate_size"], 3072)?;
    let vocab = config.size_or(&["vocab_size"], 30_522)?;
    let positions = config.size_or(&["max_position_embeddings"], 512)?;
    let types = config.size_or(&["type_vocab_size"], 2)?;
    if config.flag_or("is_decoder", false)? {
        return Err("is_decoder is true; BERT is known as an encoder".to_owned());
    }
    let tables = Params::default()
        .tensor("word_embeddings.weight", vocab * h, true)
        .tensor("position_embeddings.weight", positions * h, false)
        .tensor("token_type_embeddings.weight", types * h, false)
        .layer_norm("LayerNorm", h);
    let mut first = embedding("bert.embeddings", h, tables.done());
    first.memory_bytes += 8 * h;
    first.saved_bytes += 2 * h + 8;
    first.input_bytes += 2 * h + 8;
    let mut blocks = vec![first];
    let layer = GptLayer { hidden: h, width: h, heads, inner, causal: false };
    for number in 0..layers {
        let params = Params::default()
            .column("attention.self.query", h, h, true)
            .column("attention.self.key", h, h, true)
            .column("attention.self.value", h, h, true)
            .row("attention.output.dense", h, h, true)
            .layer_norm("attention.output.LayerNorm", h)
            .column("intermediate.dense", h, inner, true)
            .row("output.dense", inner, h, true)
            .layer_norm("output.LayerNorm", h);
        // A norm comes last, whose input is saved.
        let block = layer.block(format!("bert.encoder.layer.{number}"), params.done());
        blocks.push(Block { ends_in_product: false, ..block });
    }
    let tied = config.flag_or("tie_word_embeddings", true)?;
    let mut params = Params::default()
        .tensor("transform.dense.weight", h * h, false)
        .tensor("transform.dense.bias", h, false)
        .layer_norm("transform.LayerNorm", h)
        .tensor("bias", vocab, true);
    if !tied {
        params = params.tensor("decoder.weight", vocab * h, true);
    }
    let mut last = head("cls.predictions", h, vocab, params.done(), tied.then_some(0));
    last.products.push((h, h));
    // Input of the transform, of its activation and of its norm.
    last.saved_bytes += 6 * h;
    last.memory_bytes += 8 * h;
    blocks.push(last);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: heads, num_kv_heads: heads, vocab_size: vocab, blocks })
}
