//! What units cost, against sums by hand.

use tierwise_sim::costs::Costs;
use tierwise_sim::hardware::{self, Hardware, HostRow, Measured};
use tierwise_sim::models::{Model, preset};

const SEQ: u64 = 4096;

fn h100() -> Hardware {
    hardware::preset("h100").unwrap()
}

fn layer_of(model: &Model) -> (Costs, usize) {
    let built = model.build(SEQ, 1);
    let layer = built.trace.units.iter().position(|u| u.recomputable).unwrap();
    (Costs::new(&built, &h100()), layer)
}

#[test]
fn a_recomputation_leaves_out_the_last_product_and_the_residual_sum() {
    let hardware = h100();
    let (mut costs, layer) = layer_of(&preset("llama2-7b").unwrap());
    let product = (2 * SEQ * 11_008 * 4096) as f64 / hardware.matmul_forward_flops;
    let sum = (SEQ * 3 * 2 * 4096) as f64 / hardware.device_memory_bytes_per_s;
    let saved = (costs.forward_ns[layer] - costs.recompute_ns[layer]) as f64 / 1e9;
    assert!((saved - product - sum).abs() < 2e-9, "{saved} {product} {sum}");
    costs.recompute_whole();
    assert_eq!(costs.recompute_ns, costs.forward_ns);
}

#[test]
fn a_layer_that_ends_in_a_norm_is_recomputed_whole() {
    for name in ["bert-large", "glm-4-9b", "opt-350m"] {
        let model = preset(name).unwrap();
        let built = model.build(512, 1);
        let costs = Costs::new(&built, &h100());
        let whole = costs.recompute_ns == costs.forward_ns;
        // glm-4-9b is the older architecture, without norms after the halves.
        assert_eq!(whole, name != "glm-4-9b", "{name}");
    }
}

#[test]
fn heads_that_are_no_multiple_of_8_wide_are_padded_by_copies() {
    let of = |heads: u64| {
        let config = format!(
            r#"{{"model_type": "llama", "hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 1, "vocab_size": 32000,
            "num_attention_heads": {heads}}}"#
        );
        Model::from_json(&config).unwrap()
    };
    let padding = |heads: u64| of(heads).architecture.blocks[1].padding_bytes(heads);
    // Heads of 100 become 104: three fills of 3328 and copies of 3200, and a copy of the output; the reverse in backward.
    assert_eq!(padding(32), [3 * (2 * 3328 + 4 * 3200) + 4 * 3200, 2 * 3328 + 4 * 3200 + 3 * 4 * 3200]);
    assert_eq!(padding(25), [0, 0], "heads of 128");
    // Both compute attention at 128, so the rest differs by what the kernel pads.
    let (wide, layer) = layer_of(&of(25));
    let (narrow, _) = layer_of(&of(32));
    assert!(narrow.forward_ns[layer] > wide.forward_ns[layer]);
}

#[test]
fn kernels_that_are_not_fused_move_more_bytes_and_save_more() {
    let model = preset("llama2-7b").unwrap();
    let (h, i, vocab) = (4096, 11_008, 32_000);
    let (fused, eager) = (model.clone(), model.eager());
    let blocks = |at: usize| (&fused.architecture.blocks[at], &eager.architecture.blocks[at]);
    let (fused_layer, eager_layer) = blocks(1);
    assert_eq!(eager_layer.memory_bytes - fused_layer.memory_bytes, 2 * 32 * h + 16 * 2 * h + 4 * i);
    assert_eq!(eager_layer.saved_bytes - fused_layer.saved_bytes, 8 * h);
    let (fused_head, eager_head) = blocks(fused.architecture.blocks.len() - 1);
    // Of the loss over forward and backward: three times what is counted for forward.
    assert_eq!(3 * eager_head.memory_bytes, (2 + 6 + 8 + 8 + 6) * vocab);
    assert!(fused_head.saved_once_bytes > 0 && eager_head.saved_once_bytes == 0);
    assert_eq!(eager.clone().eager(), eager, "it is eager already");
    assert_eq!(preset("gpt2-xl").unwrap().eager().architecture.blocks[1], preset("gpt2-xl").unwrap().architecture.blocks[1]);
}

#[test]
fn copies_and_additions_on_the_host_take_what_was_measured_of_them() {
    let preset = hardware::preset("h100").unwrap();
    assert!((preset.copy_work(1000) - 2000.0).abs() < 1e-9);
    assert!((preset.addition_work(1000) - 1000.0).abs() < 1e-9);
    let row = HostRow {
        threads: 16,
        adam_params_per_s: 4e9,
        params_first_per_s: None,
        moments_per_s: None,
        undoable_params_per_s: None,
        accumulate_numel_per_s: 1e10,
        norm_numel_per_s: 2e10,
        copy_bytes_per_s: 52e9,
    };
    let measured = Measured { host: vec![row], host_adam_params_per_s: Some(5e9), ..Measured::default() };
    let machine =
        Hardware { host_stream_bytes_per_s: 4e10, host_adam_params_per_s: 6e9, measured: Some(measured.clone()), ..preset.clone() };
    // In the time of a copy of 52 GB Adam moves 5e9 parameters of 26 bytes.
    assert!((machine.copy_work(52) - 130.0).abs() < 1e-9);
    // The engine's kernel is no faster than the same alone.
    let slower = Hardware { host_adam_params_per_s: 4e9, ..machine.clone() };
    assert!((slower.copy_work(52) - 104.0).abs() < 1e-9);
    let with_undo =
        |rate| Hardware { measured: Some(Measured { host_undo_bytes_per_s: Some(rate), ..measured.clone() }), ..machine.clone() };
    assert!((with_undo(26e9).copy_work(52) - 260.0).abs() < 1e-9, "half as fast in the engine");
    assert!((with_undo(60e9).copy_work(52) - 130.0).abs() < 1e-9, "no faster than alone");
    let later = Hardware { schema_version: 2, ..with_undo(26e9) }.with_host_adam(12e9).unwrap();
    assert!((later.copy_work(52) - 260.0).abs() < 1e-9, "all of the host is twice as fast");
    // A step that may be undone writes its record too, as fast as both were seen together, or as records were copied before.
    assert!((preset.undoable_work(26, 12) - 12.0).abs() < 1e-9);
    assert!((with_undo(26e9).undoable_work(26, 52) - 260.0).abs() < 1e-9);
    let undoable = |alone, engine| {
        let row = HostRow { undoable_params_per_s: alone, ..row };
        let measured = Measured { host: vec![row], host_undoable_params_per_s: engine, ..measured.clone() };
        Hardware { measured: Some(measured), ..machine.clone() }
    };
    for (alone, engine) in [(Some(2.5e9), None), (None, Some(2.5e9)), (Some(2.5e9), Some(4e9)), (Some(4e9), Some(2.5e9))] {
        assert!((undoable(alone, engine).undoable_work(260, 120) - 260.0).abs() < 1e-9, "half as fast as plain steps");
    }
    assert!(undoable(Some(7e9), None).undoable_work(260, 120).abs() < 1e-9, "no faster than plain steps");
    let twice = Hardware { schema_version: 2, ..undoable(Some(2.5e9), Some(4e9)) }.with_host_adam(12e9).unwrap();
    assert!((twice.undoable_work(260, 120) - 260.0).abs() < 1e-9, "all of the host is twice as fast");
    // Additions move 100 GB/s where norms read 40.
    assert!((machine.addition_work(100) - 40.0).abs() < 1e-9);
    assert!(machine.gap_work().abs() < 1e-9, "not measured");
    // The engine steps 5e9 parameters per second; its passes are as fast as they were seen, and 10 us pass between two steps.
    let measured = Measured { host_params_first_per_s: Some(8e9), host_moments_per_s: Some(10e9), host_gap_ns: Some(1e4), ..measured };
    let machine = Hardware { schema_version: 2, measured: Some(measured), ..machine };
    assert!((machine.params_first_work(18) - 16.25).abs() < 1e-9);
    assert!((machine.moments_work(18) - 13.0).abs() < 1e-9);
    assert!((machine.gap_work() - 5e9 * 26.0 * 1e-5).abs() < 1e-3);
    let twice = machine.with_host_adam(8e9).unwrap();
    assert!((twice.moments_work(18) - 13.0).abs() < 1e-9, "all of the host is twice as fast");
}
