//! GLM-4: LLaMA's layer with gate and up in one matrix; `glm4` adds a norm behind each half.

use super::Architecture;
use super::llama::{GatedLayer, untied_head};
use crate::models::blocks::{Params, embedding, final_norm};
use crate::models::config::Config;
use crate::models::kernels::Eager;

pub fn read(config: &Config) -> Result<Architecture, String> {
    let layer = GatedLayer::read(config)?;
    let (h, i, q, kv) = (layer.hidden, layer.inner, layer.query_width(), layer.kv_width());
    let (vocab, layers) = (config.size(&["vocab_size"])?, config.size(&["num_hidden_layers"])?);
    let four_norms = config.model_type()? == "glm4";
    let bias = config.flag_or("attention_bias", !four_norms)?;
    let mut blocks = vec![embedding("model.embed_tokens", h, Params::default().tensor("weight", vocab * h, true).done())];
    for number in 0..layers {
        let mut params = Params::default()
            .column("self_attn.q_proj", h, q, bias)
            .column("self_attn.k_proj", h, kv, bias)
            .column("self_attn.v_proj", h, kv, bias)
            .row("self_attn.o_proj", q, h, false)
            .column("mlp.gate_up_proj", h, 2 * i, false)
            .row("mlp.down_proj", i, h, false)
            .rms_norm("input_layernorm", h)
            .rms_norm("post_attention_layernorm", h);
        if four_norms {
            params = params.rms_norm("post_self_attn_layernorm", h).rms_norm("post_mlp_layernorm", h);
        }
        let mut block = layer.block(format!("model.layers.{number}"), params.done());
        if four_norms {
            // Their inputs and deviations are saved, and read and written once more.
            block.saved_bytes += 4 * h + 8;
            block.memory_bytes += 8 * h;
            block.ends_in_product = false;
            block.eager.memory_bytes += 2 * Eager::rms_norm(h).memory_bytes;
            block.eager.saved_bytes += 2 * Eager::rms_norm(h).saved_bytes;
        }
        blocks.push(block);
    }
    blocks.push(final_norm("model.norm", h, Params::default().tensor("weight", h, false).done()));
    blocks.push(untied_head(config, h, vocab, false)?);
    Ok(Architecture { hidden_size: h, num_layers: layers, num_heads: layer.heads, num_kv_heads: layer.kv_heads, vocab_size: vocab, blocks })
}
