//! OPT: learned positions with two extra rows; the 350M model projects its embedding and norms after each half.

use super::Architecture;
use crate::models::blocks::{Block, GptLayer, Params, embedding, final_norm, head};
use crate::models::config::Config;

pub fn read(config: &Config) -> Result<Architecture, String> {
    let h = config.size_or(&["hidden_size"], 768)?;
    let heads = config.size_or(&["num_attention_heads"], 12)?;
    let layers = config.size_or(&["num_hidden_layers"], 12)?;
    let inner = config.size_or(&["ffn_dim"], 3072)?;
    let vocab = config.size_or(&["vocab_size"], 50_272)?;
    let positions = config.size_or(&["max_position_embeddings"], 2048)?;
    let embed = config.size_or(&["word_embed_proj_dim"], h)?;
    let bias = config.flag_or("enable_bias", true)?;
    let affine = config.flag_or("layer_norm_elementwise_affine", true)?;
    let norm = |params: Params, name: &str| if affine { params.layer_norm(name, h) } else { params };
    let mut tables = Params::default()
        .tensor("embed_tokens.weight", vocab * embed, true)
        // transformers' OPTLearnedPositionalEmbedding starts at row 2.
        .tensor("embed_positions.weight", (positions + 2) * h, false);
    if embed != h {
        tables = tables.tensor("project_in.weight", embed * h, true);
    }
    let mut first = embedding("model.decoder", h, tables.done());
    if embed != h {
        first.products = vec![(embed, h)];
        first.saved_bytes += 2 * embed;
        first.input_bytes += 2 * embed;
    }
    let mut blocks = vec![first];
    let layer = GptLayer { hidden: h, width: h, heads, inner, causal: true };
    let norm_first = config.flag_or("do_layer_norm_before", true)?;
    for number in 0..layers {
        let params = Params::default()
            .column("self_attn.k_proj", h, h, bias)
            .column("self_attn.v_proj", h, h, bias)
            .column("self_attn.q_proj", h, h, bias)
            .row("self_attn.out_proj", h, h, bias);
        let params = norm(params, "self_attn_layer_norm").column("fc1", h, inner, bias).row("fc2", inner, h, bias);
        let block = layer.block(format!("model.decoder.layers.{number}"), norm(params, "final_layer_norm").done());
        blocks.push(Block { ends_in_product: norm_first, ..block });
    }
    if norm_first && !config.flag_or("_remove_final_layer_norm", false)? && affine {
        let params = Params::default().tensor("weight", h, false).tensor("bias", h, false);
        blocks.push(final_norm("model.decoder.final_layer_norm", h, params.done()));
    }
    let tied = config.flag_or("tie_word_embeddings", true)?;
    let mut params = Params::default();
    if embed != h {
        params = params.tensor("project_out.weight", h * embed, true);
    }
    if !tied {
        params = params.tensor("weight", vocab * embed, true);
    }
    let mut last = head("lm_head", embed, vocab, params.done(), tied.then_some(0));
    if embed != h {
        last.products.push((h, embed));
        last.saved_bytes += 2 * h;
        last.input_bytes += 2 * h;
    }
    blocks.push(last);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: heads, num_kv_heads: heads, vocab_size: vocab, blocks })
}
