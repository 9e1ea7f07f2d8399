//! Parameters and activations against known numbers.

use tierwise_core::trace::Phase;
use tierwise_sim::models::{Model, preset, presets};

#[test]
fn parameter_counts_are_exact() {
    // What `sum(p.numel() for p in model.parameters())` gives for the published configurations.
    for (name, expected) in [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
    ] {
        assert_eq!(preset(name).unwrap().num_params(), expected, "{name}");
    }
}

#[test]
fn the_layout_holds_exactly_the_parameters() {
    for model in presets() {
        let built = model.build(4096, 1);
        let params = || built.layout.chunks.iter().flat_map(|c| &c.params);
        assert_eq!(params().map(|p| p.numel).sum::<u64>(), model.num_params(), "{}", model.name);
        let mut names: Vec<_> = params().map(|p| &p.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), params().count(), "{}", model.name);
    }
}

#[test]
fn forward_flops_are_a_third_of_the_model_flops_without_norms_and_embedding() {
    let model = preset("llama2-7b").unwrap();
    let built = model.build(4096, 2);
    let forward: f64 = built.trace.units.iter().map(|u| u.flops).sum();
    let unmultiplied = 32_000 * 4096 + 65 * 4096;
    let expected = (model.model_flops_per_token(4096) - 6.0 * f64::from(unmultiplied)) * 8192.0 / 3.0;
    assert!((forward / expected - 1.0).abs() < 1e-12, "{forward} {expected}");
}

/// Parameters and what forward and the first backwards keep, with the last `kept` layers not recomputed.
fn peak_bytes(model: &Model, micro_batch: u64, kept: u64) -> u64 {
    let built = model.build(4096, micro_batch);
    let recomputed = |unit: u32| u64::from(unit) <= model.architecture.num_layers - kept && built.trace.units[unit as usize].recomputable;
    let mut alive = 2 * model.num_params();
    let mut peak = 0;
    for op in &built.trace.ops {
        let unit = &built.trace.units[op.unit as usize];
        let held = if recomputed(op.unit) { unit.input_bytes } else { unit.saved_bytes };
        let grad: u64 = unit.chunks.iter().map(|&c| built.layout.grad_bytes(c)).sum();
        match op.phase {
            Phase::Forward => {
                alive += held;
                peak = peak.max(alive);
            }
            Phase::Backward => {
                let again = if recomputed(op.unit) { unit.saved_bytes - unit.input_bytes } else { 0 };
                peak = peak.max(alive + again + grad);
                alive -= held;
            }
        }
    }
    peak
}

#[test]
fn activations_match_measured_peaks() {
    // Peak of torch's allocator in forward + backward on an H100, gradients freed as they come, in GB.
    for (name, micro_batch, kept, measured) in [
        ("llama2-7b", 8, 0, 27.3),
        ("llama2-7b", 8, 4, 39.7),
        ("llama2-7b", 8, 8, 55.8),
        ("llama2-7b", 8, 12, 72.0),
        ("llama2-7b", 4, 8, 34.8),
        ("llama2-7b", 4, 12, 42.9),
        ("llama2-7b", 4, 16, 51.0),
        ("llama2-7b", 3, 24, 53.9),
        ("llama2-7b", 2, 26, 42.5),
        ("llama2-7b", 2, 32, 48.6),
        ("llama2-13b", 4, 0, 36.0),
        ("llama2-13b", 8, 0, 46.0),
        ("llama2-13b", 4, 10, 59.0),
    ] {
        let predicted = peak_bytes(&preset(name).unwrap(), micro_batch, kept) as f64 / 1e9;
        let error = predicted / measured - 1.0;
        eprintln!("{name} x{micro_batch}, {kept} kept: {predicted:.2} predicted, {measured} measured, {:+.1} %", 100.0 * error);
        // The allocator rounds, and temporaries of a kernel are not modelled.
        assert!(error.abs() < 0.03, "{name} x{micro_batch}, {kept} kept: {predicted:.2} GB predicted, {measured} measured");
    }
}

#[test]
fn hugging_face_configs_are_read() {
    let json = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
        "tie_word_embeddings": true, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}"#;
    let model = Model::from_json(json).unwrap();
    // Llama-3.2-1B.
    assert_eq!(model.num_params(), 1_235_814_400);
    let built = model.build(1024, 1);
    assert_eq!(built.layout.chunks.len() + 1, built.trace.units.len());
    assert_eq!(built.trace.units[0].chunks, built.trace.units.last().unwrap().chunks);
}

#[test]
fn other_architectures_and_nonsense_are_refused() {
    let mamba = r#"{"model_type": "mamba", "hidden_size": 8}"#;
    assert!(Model::from_json(mamba).unwrap_err().contains("known are bert, bloom, glm, glm4, gpt2, llama, opt, t5"));
    let empty = r#"{"model_type": "gpt2", "n_embd": 8, "n_layer": 0}"#;
    assert!(Model::from_json(empty).unwrap_err().contains("n_layer is 0"));
    assert!(Model::from_json("[]").unwrap_err().contains("JSON object"));
    assert!(Model::from_json(r#"{"model_type": "llama", "hidden_size": 8}"#).unwrap_err().contains("num_attention_heads is missing"));
}

#[test]
fn tensor_parallel_ranks_have_all_parameters_between_them() {
    for name in ["llama2-70b", "gpt2-xl", "opt-350m", "bloom-560m", "flan-t5-xl", "bert-large", "glm-4-9b"] {
        let model = preset(name).unwrap();
        for ways in [2, 4] {
            let split: u64 = model.architecture.blocks.iter().map(|b| ways * b.split_numel(ways)).sum();
            let whole: u64 = model.architecture.blocks.iter().flat_map(|b| &b.params).filter(|p| !p.split).map(|p| p.numel).sum();
            let tensors = model.architecture.blocks.iter().map(|b| b.params.len() as u64).sum::<u64>();
            // Every split tensor is rounded up, every other one is on all ranks.
            assert!(split - (ways - 1) * whole - model.num_params() < ways * tensors, "{name}");
        }
    }
}
