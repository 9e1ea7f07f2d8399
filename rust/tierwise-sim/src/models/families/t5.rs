//! T5: encoder and decoder of equal sequence length; version 1.1 has a gated MLP. The head is tied whatever `tie_word_embeddings` says:
//! transformers reads the field as "scale the decoder's output".

use super::Architecture;
use crate::models::blocks::{Attention, Block, Bytes, Kind, Params, embedding, final_norm, head};
use crate::models::config::Config;
use crate::models::kernels::Eager;

struct Sizes {
    hidden: u64,
    width: u64,
    heads: u64,
    inner: u64,
    buckets: u64,
    gated: bool,
}

pub fn read(config: &Config) -> Result<Architecture, String> {
    let h = config.size_or(&["d_model", "hidden_size"], 512)?;
    let heads = config.size_or(&["num_heads", "num_attention_heads"], 8)?;
    let encoders = config.size_or(&["num_layers", "num_hidden_layers"], 6)?;
    let decoders = config.size_or(&["num_decoder_layers"], encoders)?;
    let vocab = config.size_or(&["vocab_size"], 32_128)?;
    let sizes = Sizes {
        hidden: h,
        width: heads * config.size_or(&["d_kv"], 64)?,
        heads,
        inner: config.size_or(&["d_ff"], 2048)?,
        buckets: config.size_or(&["relative_attention_num_buckets"], 32)?,
        gated: config.text_or("feed_forward_proj", "relu").starts_with("gated-"),
    };
    let norm = |name: &str| final_norm(name, h, Params::default().tensor("weight", h, false).done());
    let mut blocks = vec![embedding("shared", h, Params::default().tensor("weight", vocab * h, true).done())];
    blocks.extend((0..encoders).map(|number| sizes.layer(&format!("encoder.block.{number}"), number == 0, false)));
    let mut encoded = norm("encoder.final_layer_norm");
    // Its output is the input of every cross-attention.
    encoded.saved_bytes += 2 * h;
    encoded.input_bytes += 2 * h;
    blocks.push(encoded);
    blocks.push(Block { shares: Some(0), ..embedding("decoder.embed_tokens", h, Vec::new()) });
    blocks.extend((0..decoders).map(|number| sizes.layer(&format!("decoder.block.{number}"), number == 0, true)));
    blocks.push(norm("decoder.final_layer_norm"));
    blocks.push(head("lm_head", h, vocab, Vec::new(), Some(0)));
    Ok(Architecture { hidden_size: h, num_layers: encoders + decoders, num_heads: heads, num_kv_heads: heads, vocab_size: vocab, blocks })
}

impl Sizes {
    fn layer(&self, name: &str, first: bool, decoder: bool) -> Block {
        let (h, q, i) = (self.hidden, self.width, self.inner);
        let attention = |params: Params, name: &str| {
            let part = |p: Params, matrix: &str| p.column(&format!("{name}.{matrix}"), h, q, false);
            part(part(part(params, "q"), "k"), "v").row(&format!("{name}.o"), q, h, false)
        };
        let mut params = attention(Params::default(), "layer.0.SelfAttention");
        if first {
            params = params.tensor("layer.0.SelfAttention.relative_attention_bias.weight", self.buckets * self.heads, true);
        }
        params = params.rms_norm("layer.0.layer_norm", h);
        if decoder {
            params = attention(params, "layer.1.EncDecAttention").rms_norm("layer.1.layer_norm", h);
        }
        let last = format!("layer.{}", if decoder { 2 } else { 1 });
        let inputs = if self.gated { 2 } else { 1 };
        for number in 0..inputs {
            let wi = if self.gated { format!("wi_{number}") } else { "wi".to_owned() };
            params = params.column(&format!("{last}.DenseReluDense.{wi}"), h, i, false);
        }
        params = params.row(&format!("{last}.DenseReluDense.wo"), i, h, false).rms_norm(&format!("{last}.layer_norm"), h);
        let attentions = if decoder { 2 } else { 1 };
        let mut all = vec![Attention { width: q, kv_width: q, causal: decoder }];
        if decoder {
            all.push(Attention { width: q, kv_width: q, causal: false });
        }
        let halves = attentions + 1;
        let mut products = [(h, q), (h, q), (h, q), (q, h)].repeat(attentions as usize);
        products.extend(std::iter::repeat_n((h, i), inputs as usize));
        products.push((i, h));
        Block {
            name: name.to_owned(),
            kind: Kind::Layer,
            params: params.done(),
            shares: None,
            products,
            attention: all,
            // Per half a norm (4 h) and a residual sum (6 h); the activation.
            memory_bytes: halves * 10 * h + 2 * (inputs + 1) * i,
            // Per half the inputs of norm and projection (4 h) and the deviation (4); query, key, value, output and log-sum-exp per
            // attention; inputs and output of the activation.
            saved_bytes: halves * (4 * h + 4) + attentions * (8 * q + 4 * self.heads) + 2 * (inputs + 1) * i,
            cheap_bytes: [0, 0],
            saved_once_bytes: 0,
            forward_transient: Bytes::default(),
            backward_transient: Bytes::per_token((halves * 4 * h + attentions * 8 * q + 2 * (inputs + 1) * i) * 3 / 5),
            input_bytes: 2 * h,
            reductions: halves,
            eager: Eager {
                memory_bytes: halves * Eager::rms_norm(h).memory_bytes,
                saved_bytes: halves * Eager::rms_norm(h).saved_bytes,
                transient_bytes: 0,
            },
            ends_in_product: true,
        }
    }
}
