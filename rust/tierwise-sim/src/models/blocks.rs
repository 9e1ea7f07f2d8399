//! The parts of a model in the order in which a forward pass uses them.

use super::kernels::Eager;
use tierwise_core::layout::ParamSpec;

/// One parameter tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Name within its block.
    pub name: String,
    /// Elements.
    pub numel: u64,
    /// Whether tensor parallelism splits it; norms and biases that are added after a reduction stay whole.
    pub split: bool,
}

/// Attention of one block: `4 keys width` FLOPs per query token, half of that if causal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Width of all query heads.
    pub width: u64,
    /// Width of all key heads.
    pub kv_width: u64,
    /// Whether a token sees only those before it.
    pub causal: bool,
}

/// Bytes that depend on the tokens, and that do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Bytes {
    /// Per token.
    pub per_token: u64,
    /// Once.
    pub once: u64,
}

impl Bytes {
    /// For so many tokens.
    pub fn of(self, tokens: u64) -> u64 {
        self.per_token * tokens + self.once
    }

    /// Of which every token has so many.
    pub fn per_token(bytes: u64) -> Self {
        Bytes { per_token: bytes, once: 0 }
    }
}

/// What a block is to the schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Looked up, not multiplied.
    Embedding,
    /// A layer: may be recomputed, may be split over pipeline stages.
    #[default]
    Layer,
    /// The final norm.
    Norm,
    /// The head and the loss.
    Head,
}

/// A module whose parameters are used together. All figures are per token of a forward pass.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// Qualified module name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Its own parameters.
    pub params: Vec<Tensor>,
    /// Earlier block whose parameters it reads too (tied weights).
    pub shares: Option<usize>,
    /// Its matrix products: input and output features.
    pub products: Vec<(u64, u64)>,
    /// Its attentions.
    pub attention: Vec<Attention>,
    /// Bytes that element-wise kernels read and write.
    pub memory_bytes: u64,
    /// Bytes that autograd saves when nothing is recomputed.
    pub saved_bytes: u64,
    /// Of these, outputs of cheap kernels that backward may make again; and the device memory traffic of that.
    pub cheap_bytes: [u64; 2],
    /// Bytes that autograd saves once, however many tokens there are.
    pub saved_once_bytes: u64,
    /// Bytes that its kernels need for themselves in forward, beside what is saved.
    pub forward_transient: Bytes,
    /// The same in backward.
    pub backward_transient: Bytes,
    /// Bytes that stay when it is recomputed.
    pub input_bytes: u64,
    /// All-reduces of a hidden vector per token in forward, with tensor parallelism.
    pub reductions: u64,
    /// What is more where kernels are not fused.
    pub eager: Eager,
    /// Whether it ends in its last product and a residual sum: autograd saves nothing of either, and a recomputation stops before them.
    pub ends_in_product: bool,
}

impl Block {
    /// FLOPs of its matrix products.
    pub fn matmul_flops(&self) -> u64 {
        self.products.iter().map(|(inputs, outputs)| 2 * inputs * outputs).sum()
    }

    /// Elements of its own parameters.
    pub fn numel(&self) -> u64 {
        self.params.iter().map(|p| p.numel).sum()
    }

    /// Elements of its own parameters on each of `ways` tensor-parallel ranks, rounded up per tensor.
    pub fn split_numel(&self, ways: u64) -> u64 {
        self.params.iter().map(|p| if p.split { p.numel.div_ceil(ways) } else { p.numel }).sum()
    }

    /// FLOPs of attention per query token over `keys` tokens.
    pub fn attention_flops(&self, keys: u64) -> u64 {
        self.attention.iter().map(|a| if a.causal { 2 } else { 4 } * keys * a.width).sum()
    }

    /// Its parameters as the core describes them, with `ways` tensor-parallel ranks.
    pub fn specs(&self, ways: u64) -> Vec<ParamSpec> {
        self.params
            .iter()
            .map(|p| ParamSpec {
                name: format!("{}.{}", self.name, p.name),
                numel: if p.split { p.numel.div_ceil(ways) } else { p.numel },
                trainable: true,
            })
            .collect()
    }
}

/// Collects the parameters of a block.
#[must_use]
#[derive(Debug, Default)]
pub struct Params(Vec<Tensor>);

impl Params {
    /// A tensor.
    pub fn tensor(mut self, name: &str, numel: u64, split: bool) -> Self {
        self.0.push(Tensor { name: name.to_owned(), numel, split });
        self
    }

    /// A weight that is split by its output features, with its bias.
    pub fn column(self, name: &str, input: u64, output: u64, bias: bool) -> Self {
        let with = self.tensor(&format!("{name}.weight"), input * output, true);
        if bias { with.tensor(&format!("{name}.bias"), output, true) } else { with }
    }

    /// A weight that is split by its input features; its bias is added after the reduction.
    pub fn row(self, name: &str, input: u64, output: u64, bias: bool) -> Self {
        let with = self.tensor(&format!("{name}.weight"), input * output, true);
        if bias { with.tensor(&format!("{name}.bias"), output, false) } else { with }
    }

    /// A norm with a weight alone.
    pub fn rms_norm(self, name: &str, width: u64) -> Self {
        self.tensor(&format!("{name}.weight"), width, false)
    }

    /// A norm with weight and bias.
    pub fn layer_norm(self, name: &str, width: u64) -> Self {
        self.rms_norm(name, width).tensor(&format!("{name}.bias"), width, false)
    }

    /// All of them.
    pub fn done(self) -> Vec<Tensor> {
        self.0
    }
}

/// An embedding: token ids stay, the output is the first layer's input.
pub fn embedding(name: &str, width: u64, params: Vec<Tensor>) -> Block {
    Block {
        name: name.to_owned(),
        kind: Kind::Embedding,
        params,
        shares: None,
        products: Vec::new(),
        attention: Vec::new(),
        memory_bytes: 4 * width,
        saved_bytes: 8,
        cheap_bytes: [0, 0],
        saved_once_bytes: 0,
        forward_transient: Bytes::default(),
        backward_transient: Bytes::default(),
        input_bytes: 8,
        reductions: 1,
        eager: Eager::default(),
        ends_in_product: false,
    }
}

/// The norm after the last layer.
pub fn final_norm(name: &str, width: u64, params: Vec<Tensor>) -> Block {
    Block {
        name: name.to_owned(),
        kind: Kind::Norm,
        params,
        shares: None,
        products: Vec::new(),
        attention: Vec::new(),
        memory_bytes: 4 * width,
        saved_bytes: 2 * width,
        cheap_bytes: [0, 0],
        saved_once_bytes: 0,
        forward_transient: Bytes::default(),
        backward_transient: Bytes::per_token(2 * width),
        input_bytes: 2 * width,
        reductions: 0,
        eager: Eager::default(),
        ends_in_product: false,
    }
}

/// Most logits of a chunk of the loss.
const LOSS_CHUNK_LOGITS: u64 = 1 << 27;

/// The head with a chunked loss, which computes its gradients in forward: it keeps its input, that input's gradient and the weight's in
/// 16 bit; the logits are written and read once.
pub fn head(name: &str, width: u64, vocab: u64, params: Vec<Tensor>, shares: Option<usize>) -> Block {
    Block {
        name: name.to_owned(),
        kind: Kind::Head,
        params,
        shares,
        products: vec![(width, vocab)],
        attention: Vec::new(),
        memory_bytes: 8 * vocab,
        saved_bytes: 4 * width,
        cheap_bytes: [0, 0],
        saved_once_bytes: 2 * vocab * width,
        // The weight's gradient in fp32, and the logits of a chunk in 16 bit.
        forward_transient: Bytes { per_token: 0, once: 4 * vocab * width + 2 * LOSS_CHUNK_LOGITS.min(vocab * width) },
        backward_transient: Bytes::per_token(2 * width),
        input_bytes: 2 * width,
        reductions: 0,
        // Logits are written (2), made fp32 (6), and their log-softmax is made (8) and saved (4); backward reads it and writes their gradient (8)
        // and makes that bf16 (6). All of it is three times what is counted for forward.
        eager: Eager { memory_bytes: 2 * vocab, saved_bytes: 4 * vocab, transient_bytes: 6 * vocab },
        ends_in_product: false,
    }
}

/// Per-token figures of a layer of the GPT kind: norms with biases, two matrices in the MLP.
///
/// Saved in bf16, after Korthikanti et al. 2022 (arXiv 2205.05198, section 4) without stored attention scores and without dropout: inputs of
/// both norms and of the projections behind them (8 h), query, key, value and attention output (8 q), its log-sum-exp (4 a), input and
/// output of the activation (4 i), mean and deviation of both norms (16).
pub struct GptLayer {
    /// Width of the residual stream.
    pub hidden: u64,
    /// Width of all heads.
    pub width: u64,
    /// Heads.
    pub heads: u64,
    /// Width inside the MLP.
    pub inner: u64,
    /// Whether a token sees only those before it.
    pub causal: bool,
}

impl GptLayer {
    /// The layer's block.
    pub fn block(&self, name: String, params: Vec<Tensor>) -> Block {
        let Self { hidden: h, width: q, heads: a, inner: i, causal } = *self;
        Block {
            name,
            kind: Kind::Layer,
            params,
            shares: None,
            products: vec![(h, 3 * q), (q, h), (h, i), (i, h)],
            attention: vec![Attention { width: q, kv_width: q, causal }],
            // Two norms (8 h), two residual sums (12 h), the activation (4 i).
            memory_bytes: 20 * h + 4 * i,
            saved_bytes: 8 * h + 8 * q + 4 * a + 4 * i + 16,
            cheap_bytes: [0, 0],
            saved_once_bytes: 0,
            forward_transient: Bytes::default(),
            backward_transient: Bytes::per_token((8 * h + 8 * q + 4 * i) * 3 / 5),
            input_bytes: 2 * h,
            reductions: 2,
            // torch's own layer norm and activations are one kernel each.
            eager: Eager::default(),
            ends_in_product: true,
        }
    }
}
