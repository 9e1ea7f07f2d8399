//! Models: parameters, FLOPs and saved activations, from their Hugging Face configuration.
//!
//! A configuration becomes [`Block`]s (what a forward pass uses, in order), and blocks become chunks, units and work at one micro-batch.
//! What each layer saves for backward is said where its block is built. Outside the layers the final norm and the head keep their inputs.

pub mod blocks;
mod build;
mod config;
mod families;
mod kernels;

pub use blocks::{Block, Kind};
pub use build::{Built, Share, Work};
pub use families::class_of;

use config::Config;
pub use families::Architecture;
use serde::Deserialize;
use serde_json::Value;

/// A model.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// Name on the command line.
    pub name: String,
    /// Where its sizes come from.
    pub source: String,
    /// `model_type` of its configuration.
    pub model_type: String,
    /// Sizes and blocks, as its family reads them from the configuration.
    pub architecture: Architecture,
    config: Config,
}

#[derive(Deserialize)]
struct Presets {
    models: Vec<Preset>,
}

#[derive(Deserialize)]
struct Preset {
    name: String,
    source: String,
    config: Value,
}

/// Preset configurations, with their sources.
const PRESETS: &str = include_str!("../presets/models.json");

fn stored() -> Vec<Preset> {
    serde_json::from_str::<Presets>(PRESETS).expect("the presets are part of the program").models
}

fn known(preset: Preset) -> Model {
    let mut model = Model::from_value(preset.config).expect("the presets are part of the program");
    (model.name, model.source) = (preset.name, preset.source);
    model
}

/// All presets.
pub fn presets() -> Vec<Model> {
    stored().into_iter().map(known).collect()
}

/// Names of all presets.
pub fn names() -> Vec<String> {
    stored().into_iter().map(|p| p.name).collect()
}

/// The preset of a name.
pub fn preset(name: &str) -> Option<Model> {
    stored().into_iter().find(|p| p.name == name).map(known)
}

impl Model {
    /// The same model without fused norms, rotary embeddings, activations and loss.
    #[must_use]
    pub fn eager(mut self) -> Self {
        self.architecture.blocks = self.architecture.blocks.into_iter().map(Block::eager).collect();
        self
    }

    /// Reads a Hugging Face `config.json`.
    pub fn from_json(text: &str) -> Result<Self, String> {
        Model::from_value(serde_json::from_str(text).map_err(|e| e.to_string())?)
    }

    /// Reads a parsed `config.json`.
    pub fn from_value(value: Value) -> Result<Self, String> {
        let config = Config::new(value)?;
        let layers = config.size_or(&["num_hidden_layers", "n_layer", "num_layers"], 1)?;
        if layers > 4096 {
            return Err(format!("{layers} layers; at most 4096 are simulated"));
        }
        let architecture = families::read(&config)?;
        Ok(Model {
            name: config.text_or("name", "").to_owned(),
            source: "config.json".to_owned(),
            model_type: config.model_type()?.to_owned(),
            architecture,
            config,
        })
    }

    /// Its configuration, as Hugging Face writes it.
    pub fn config(&self) -> Value {
        self.config.value()
    }

    /// Exact number of parameters.
    pub fn num_params(&self) -> u64 {
        self.architecture.blocks.iter().map(Block::numel).sum()
    }

    /// Useful FLOPs of forward and backward per token: 6 per parameter, and three times those of attention's forward (`6 layers width seq`
    /// if it is causal). Recomputation is not counted.
    pub fn model_flops_per_token(&self, seq: u64) -> f64 {
        let attention: u64 = self.architecture.blocks.iter().map(|b| b.attention_flops(seq)).sum();
        6.0 * self.num_params() as f64 + 3.0 * attention as f64
    }

    /// Chunks, units and work of one micro-batch of `sequences` sequences of `seq` tokens.
    pub fn build(&self, seq: u64, sequences: u64) -> Built {
        self.build_share(seq, sequences, &Share::whole(self))
    }
}
