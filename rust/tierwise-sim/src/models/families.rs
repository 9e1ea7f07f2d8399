//! The known architectures, each as the blocks that transformers builds from its configuration.

mod bert;
mod bloom;
mod glm;
mod gpt2;
mod llama;
mod opt;
mod t5;

use super::blocks::Block;
use super::config::Config;

/// What a family reads from its configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Architecture {
    /// Width of the residual stream.
    pub hidden_size: u64,
    /// Layers, encoder and decoder together.
    pub num_layers: u64,
    /// Query heads of a layer.
    pub num_heads: u64,
    /// Key and value heads of a layer.
    pub num_kv_heads: u64,
    /// Tokens of the vocabulary.
    pub vocab_size: u64,
    /// Blocks in the order of a forward pass.
    pub blocks: Vec<Block>,
}

type Reader = fn(&Config) -> Result<Architecture, String>;

/// `model_type`, the class that is counted, and the reader.
const FAMILIES: [(&str, &str, Reader); 8] = [
    ("bert", "BertForMaskedLM", bert::read),
    ("bloom", "BloomForCausalLM", bloom::read),
    ("glm", "GlmForCausalLM", glm::read),
    ("glm4", "Glm4ForCausalLM", glm::read),
    ("gpt2", "GPT2LMHeadModel", gpt2::read),
    ("llama", "LlamaForCausalLM", llama::read),
    ("opt", "OPTForCausalLM", opt::read),
    ("t5", "T5ForConditionalGeneration", t5::read),
];

/// Reads a configuration of any known family.
pub fn read(config: &Config) -> Result<Architecture, String> {
    let model_type = config.model_type()?;
    let Some((_, _, reader)) = FAMILIES.iter().find(|(name, _, _)| *name == model_type) else {
        let known = FAMILIES.map(|(name, _, _)| name).join(", ");
        return Err(format!("model_type is `{model_type}`; known are {known}"));
    };
    reader(config)
}

/// The transformers class whose parameters are counted for a `model_type`.
pub fn class_of(model_type: &str) -> Option<&'static str> {
    FAMILIES.iter().find(|(name, _, _)| *name == model_type).map(|(_, class, _)| *class)
}
