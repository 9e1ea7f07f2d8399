//! Models of the LLaMA family: parameters, FLOPs and saved activations, from their configuration.
//!
//! Saved bytes per token of a decoder layer in bf16, following Korthikanti et al. 2022 (arXiv 2205.05198, section 4) with attention scores
//! never stored (flash attention), and RMSNorm, SwiGLU and the loss in fused kernels; `h` hidden, `i` intermediate, `q`/`kv` widths of the
//! query and of key or value, `a` heads:
//!
//! | saved tensor | bytes |
//! |---|---|
//! | inputs of both norms and of the projections behind them | 8 h |
//! | query, key, value, attention output | 4 q + 4 kv |
//! | log-sum-exp of attention | 4 a |
//! | gate and up projections, input of the down projection | 6 i |
//! | both norms' reciprocal deviations | 8 |
//!
//! With recomputation only the layer's input stays: 2 h. Outside the layers the final norm keeps its input (2 h) and the head its input
//! (2 h) and one chunk of fp32 logits, whose chunks are as many as make it about 4 h per token.

use serde::Deserialize;
use tierwise_core::ChunkId;
use tierwise_core::layout::{Layout, ParamSpec, Precision};
use tierwise_core::trace::{Op, Phase, Trace, Unit};

/// A model by the fields of its Hugging Face `config.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Model {
    /// Name on the command line.
    #[serde(default)]
    pub name: String,
    /// Architecture; only `llama` is known.
    pub model_type: String,
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Width inside the MLP.
    pub intermediate_size: u64,
    /// Decoder layers.
    pub num_hidden_layers: u64,
    /// Query heads.
    pub num_attention_heads: u64,
    /// Key and value heads; as many as query heads if absent.
    #[serde(default)]
    pub num_key_value_heads: Option<u64>,
    /// Width of a head; `hidden_size / num_attention_heads` if absent.
    #[serde(default)]
    pub head_dim: Option<u64>,
    /// Tokens of the vocabulary.
    pub vocab_size: u64,
    /// Whether the head reads the embedding's parameters.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Whether attention projections have biases.
    #[serde(default)]
    pub attention_bias: bool,
    /// Whether MLP projections have biases.
    #[serde(default)]
    pub mlp_bias: bool,
}

/// What a unit does per token in forward; backward does twice of each.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Work {
    /// FLOPs of matrix products.
    pub matmul_flops: f64,
    /// FLOPs of causal attention: half of the full square.
    pub attention_flops: f64,
    /// Bytes that element-wise kernels read and write.
    pub memory_bytes: f64,
}

/// A model at one micro-batch: what the planner reads, and the work of every unit.
#[derive(Debug, Clone, PartialEq)]
pub struct Built {
    /// Chunks: the embedding, every layer, the final norm, the head.
    pub layout: Layout,
    /// Units of the same names and their operations.
    pub trace: Trace,
    /// Per unit: work of one micro-batch in forward.
    pub work: Vec<Work>,
}

/// All presets.
pub fn presets() -> Vec<Model> {
    // LLaMA (Touvron et al. 2023, arXiv 2302.13971, table 2) and Llama 2 (arXiv 2307.09288) with the sizes of their published configs.
    let table: [(&str, u64, u64, u64, u64, u64); 8] = [
        ("llama-1.35b", 2048, 5504, 24, 16, 16),
        ("llama-7b", 4096, 11_008, 32, 32, 32),
        ("llama-13b", 5120, 13_824, 40, 40, 40),
        ("llama-33b", 6656, 17_920, 60, 52, 52),
        ("llama-65b", 8192, 22_016, 80, 64, 64),
        ("llama2-7b", 4096, 11_008, 32, 32, 32),
        ("llama2-13b", 5120, 13_824, 40, 40, 40),
        ("llama2-70b", 8192, 28_672, 80, 64, 8),
    ];
    table
        .into_iter()
        .map(|(name, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, kv)| Model {
            name: name.to_owned(),
            model_type: "llama".to_owned(),
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads: Some(kv),
            head_dim: None,
            vocab_size: 32_000,
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
        })
        .collect()
}

/// The preset of a name.
pub fn preset(name: &str) -> Option<Model> {
    presets().into_iter().find(|m| m.name == name)
}

impl Model {
    /// Reads a Hugging Face `config.json`.
    pub fn from_json(text: &str) -> Result<Self, String> {
        let model: Model = serde_json::from_str(text).map_err(|e| e.to_string())?;
        if model.model_type != "llama" {
            return Err(format!("model_type is `{}`; known is `llama`", model.model_type));
        }
        for (name, value) in [
            ("hidden_size", model.hidden_size),
            ("intermediate_size", model.intermediate_size),
            ("num_hidden_layers", model.num_hidden_layers),
            ("num_attention_heads", model.num_attention_heads),
            ("num_key_value_heads", model.kv_heads()),
            ("head_dim", model.head_width()),
            ("vocab_size", model.vocab_size),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(format!("{name} is {value}; it must be between 1 and {}", 1 << 24));
            }
        }
        Ok(model)
    }

    fn kv_heads(&self) -> u64 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_width(&self) -> u64 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }

    /// Width of all query heads.
    pub fn query_width(&self) -> u64 {
        self.num_attention_heads * self.head_width()
    }

    /// Width of all key heads.
    pub fn kv_width(&self) -> u64 {
        self.kv_heads() * self.head_width()
    }

    /// Exact number of parameters.
    pub fn num_params(&self) -> u64 {
        let layer: u64 = self.layer_params("").iter().map(|p| p.numel).sum();
        let embeddings = if self.tie_word_embeddings { 1 } else { 2 } * self.vocab_size * self.hidden_size;
        self.num_hidden_layers * layer + self.hidden_size + embeddings
    }

    /// Useful FLOPs of forward and backward per token: `6 N + 6 layers hidden seq`, recomputation not counted.
    pub fn model_flops_per_token(&self, seq: u64) -> f64 {
        6.0 * self.num_params() as f64 + 6.0 * (self.num_hidden_layers * self.query_width() * seq) as f64
    }

    /// Bytes that autograd saves per token in one decoder layer.
    pub fn saved_bytes_per_token(&self) -> u64 {
        8 * self.hidden_size + 4 * self.query_width() + 4 * self.kv_width() + 4 * self.num_attention_heads + 6 * self.intermediate_size + 8
    }

    fn layer_params(&self, prefix: &str) -> Vec<ParamSpec> {
        let (h, i, q, kv) = (self.hidden_size, self.intermediate_size, self.query_width(), self.kv_width());
        let mut params = Vec::new();
        let mut add = |name: String, numel: u64| params.push(ParamSpec { name: format!("{prefix}{name}"), numel, trainable: true });
        for (name, rows, columns, bias) in [
            ("self_attn.q_proj", q, h, self.attention_bias),
            ("self_attn.k_proj", kv, h, self.attention_bias),
            ("self_attn.v_proj", kv, h, self.attention_bias),
            ("self_attn.o_proj", h, q, self.attention_bias),
            ("mlp.gate_proj", i, h, self.mlp_bias),
            ("mlp.up_proj", i, h, self.mlp_bias),
            ("mlp.down_proj", h, i, self.mlp_bias),
        ] {
            add(format!("{name}.weight"), rows * columns);
            if bias {
                add(format!("{name}.bias"), rows);
            }
        }
        add("input_layernorm.weight".to_owned(), h);
        add("post_attention_layernorm.weight".to_owned(), h);
        params
    }

    /// Chunks, units and work of one micro-batch of `sequences` sequences of `seq` tokens.
    pub fn build(&self, seq: u64, sequences: u64) -> Built {
        let (h, i, q, kv, v) = (self.hidden_size, self.intermediate_size, self.query_width(), self.kv_width(), self.vocab_size);
        let tokens = seq * sequences;
        let single = |name: &str, numel: u64| (name.to_owned(), vec![ParamSpec { name: format!("{name}.weight"), numel, trainable: true }]);
        let mut builder = Builder { tokens, chunks: Vec::new(), units: Vec::new(), work: Vec::new() };
        let embedding = builder.chunk(single("model.embed_tokens", v * h));
        // Token ids stay; the output is the first layer's input.
        builder.unit("model.embed_tokens", embedding, [8, 8], false, Work { memory_bytes: (4 * h) as f64, ..Work::default() });
        let layer_work = Work {
            matmul_flops: (2 * (2 * h * q + 2 * h * kv + 3 * h * i)) as f64,
            attention_flops: (2 * seq * q) as f64,
            // Two norms (8 h), two residual sums (12 h), rotary embeddings (4 q + 4 kv), SwiGLU (6 i).
            memory_bytes: (20 * h + 4 * q + 4 * kv + 6 * i) as f64,
        };
        for layer in 0..self.num_hidden_layers {
            let name = format!("model.layers.{layer}");
            let chunk = builder.chunk((name.clone(), self.layer_params(&format!("{name}."))));
            builder.unit(&name, chunk, [self.saved_bytes_per_token(), 2 * h], true, layer_work);
        }
        let norm = builder.chunk(single("model.norm", h));
        builder.unit("model.norm", norm, [2 * h, 2 * h], false, Work { memory_bytes: (4 * h) as f64, ..Work::default() });
        let head = if self.tie_word_embeddings { embedding } else { builder.chunk(single("lm_head", v * h)) };
        // fp32 logits are written and read once.
        let head_work = Work { matmul_flops: (2 * v * h) as f64, attention_flops: 0.0, memory_bytes: (8 * v) as f64 };
        builder.unit("lm_head", head, [6 * h, 2 * h], false, head_work);
        let count = builder.units.len() as u32;
        let forward = (0..count).map(|unit| Op { unit, phase: Phase::Forward });
        let ops = forward.chain((0..count).rev().map(|unit| Op { unit, phase: Phase::Backward })).collect();
        Built {
            layout: Layout::new(Precision::Bf16, builder.chunks),
            trace: Trace { units: builder.units, ops, outer_saved_bytes: 0 },
            work: builder.work,
        }
    }
}

struct Builder {
    tokens: u64,
    chunks: Vec<(String, Vec<ParamSpec>)>,
    units: Vec<Unit>,
    work: Vec<Work>,
}

impl Builder {
    fn chunk(&mut self, chunk: (String, Vec<ParamSpec>)) -> ChunkId {
        self.chunks.push(chunk);
        ChunkId(self.chunks.len() as u32 - 1)
    }

    /// `kept` gives bytes per token without and with recomputation.
    fn unit(&mut self, name: &str, chunk: ChunkId, kept: [u64; 2], recomputable: bool, per_token: Work) {
        let tokens = self.tokens as f64;
        let work = Work {
            matmul_flops: per_token.matmul_flops * tokens,
            attention_flops: per_token.attention_flops * tokens,
            memory_bytes: per_token.memory_bytes * tokens,
        };
        self.units.push(Unit {
            name: name.to_owned(),
            chunks: vec![chunk],
            saved_bytes: kept[0] * self.tokens,
            input_bytes: kept[1] * self.tokens,
            recomputable,
            flops: work.matmul_flops + work.attention_flops,
        });
        self.work.push(work);
    }
}
