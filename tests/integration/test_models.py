"""Other architectures: streamed training equals training on the device, and plain torch in fp32."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}
IDS = [torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(step)) for step in range(4)]


def causal(model: Any, step: int) -> torch.Tensor:
    return model(input_ids=IDS[step], labels=IDS[step]).loss


def sequence_to_sequence(model: Any, step: int) -> torch.Tensor:
    return model(input_ids=IDS[step], labels=IDS[step][:, :5].contiguous()).loss


def masked(model: Any, step: int) -> torch.Tensor:
    mask = torch.ones_like(IDS[step])
    mask[1, 8:] = 0
    return model(input_ids=IDS[step], attention_mask=mask, labels=IDS[step]).loss


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=3, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> Any:
    general: dict[str, Any] = {"decoder_start_token_id": 0}  # Taken by all configurations, and in the signature of none.
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0, **general)
    return transformers.T5ForConditionalGeneration(config)


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForMaskedLM(config)


def opt() -> Any:
    config = transformers.OPTConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=48,
        dropout=0.0,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    )
    return transformers.OPTForCausalLM(config)


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=1,
    )
    return transformers.MixtralForCausalLM(config)


def gemma2() -> Any:
    general: dict[str, Any] = {"attn_implementation": "eager"}  # Taken by all configurations, and in the signature of none.
    config = transformers.Gemma2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=5.0,
        **general,
    )
    return transformers.Gemma2ForCausalLM(config)


def albert() -> Any:
    config = transformers.AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48
    )
    return transformers.AlbertForMaskedLM(config)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, int], Any]]] = {
    "gpt2": (gpt2, causal),
    "t5": (t5, sequence_to_sequence),
    "bert": (bert, masked),
    "opt": (opt, causal),
    "mixtral": (mixtral, causal),
    "gemma2": (gemma2, causal),
    "albert": (albert, masked),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_architectures(kit: Any, name: str) -> None:
    make, loss = MODELS[name]

    def build() -> Any:
        torch.manual_seed(0)
        return make().train()

    reference = kit.plain_fit(build(), loss, steps=4)
    device = kit.fit(build(), loss, steps=4)
    streamed = kit.fit(build(), loss, steps=4, **STREAMED)
    streamed.same_as(device)
    recomputed = kit.fit(build(), loss, steps=4, **STREAMED, recompute="full")
    recomputed.same_as(device)
    assert device.losses == pytest.approx(reference.losses, rel=2e-5)
    # Before transformers 5.20 OPT reads the values of its mask and Mixtral those of its router: their traces are estimates.
    older = tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 20)
    assert device.booster._runtime.trace.exact or (older and name in ("opt", "mixtral"))
    assert streamed.booster.stats()["off_trace"] == 0 or not device.booster._runtime.trace.exact


def test_a_head_that_changes_its_logits_is_left_alone(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="tierwise"):
        _, model, _ = kit.boosted(gemma2().train(), precision="fp32", micro_batch_size=2, seq_len=12)
    assert "the fused loss is off" in caplog.text
    assert model(input_ids=IDS[0], labels=IDS[0]).logits is not None


@pytest.mark.parametrize("tied", [False, True])
def test_the_fused_loss_is_that_of_hugging_face(kit: Any, tied: bool) -> None:
    ids = kit.batches(1, rows=2)[0]
    ignored = ids.clone()
    ignored[0, 3:9] = -100
    shifted = torch.nn.functional.pad(ignored, (0, 1), value=-100)[..., 1:].contiguous()
    for extra in ({"labels": ignored}, {"labels": ignored, "num_items_in_batch": 13}, {"labels": ids, "shift_labels": shifted}):
        losses, norms = [], []
        for fused in (True, False):
            booster, model, optimizer = kit.boosted(kit.llama(tied=tied), precision="fp32", fused_loss=fused, **STREAMED)
            output = model(input_ids=ids, **extra)
            assert (output.logits is None) == fused
            assert isinstance(model(input_ids=ids, return_dict=False, **extra), tuple)
            losses.append(output.loss.item())
            booster.backward(output.loss, optimizer)
            optimizer.step()
            norms.append(optimizer.grad_norm)
            model.eval()
            assert model(input_ids=ids, **extra).logits is not None
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_an_encoder_with_batch_norm_and_float_inputs(kit: Any) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        stages = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (3, 8, 8)]
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(8 * 16, 4))

    def loss(model: Any, step: int) -> torch.Tensor:
        images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        return nn.functional.cross_entropy(model(images).float(), torch.arange(4))

    reference = kit.plain_fit(build(), loss)
    device = kit.fit(build(), loss, recompute="full")
    assert device.losses == pytest.approx(reference.losses, rel=1e-4)
    assert torch.equal(device.weights["0.1.num_batches_tracked"], reference.weights["0.1.num_batches_tracked"])
    torch.testing.assert_close(device.weights["1.1.running_var"], reference.weights["1.1.running_var"])
    kit.fit(build(), loss, **STREAMED).same_as(device)
    kit.fit(build(), loss, precision="bf16", **STREAMED).same_as(kit.fit(build(), loss, precision="bf16"))


def test_a_model_that_cannot_be_traced_is_estimated(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = x + layer(x)
                if x.abs().max().item() > 1e9:
                    raise FloatingPointError
            return x

    def loss(model: Any, step: int) -> torch.Tensor:
        return model(torch.randn(4, 16, generator=torch.Generator().manual_seed(step))).square().mean()

    with caplog.at_level(logging.WARNING, logger="tierwise"):
        device = kit.fit(Peeks(), loss)
    assert "cannot be traced" in caplog.text
    assert not device.booster._runtime.trace.exact
    assert "estimated" in device.booster.explain()
    kit.fit(Peeks(), loss, **STREAMED).same_as(device)
    assert device.losses == pytest.approx(kit.plain_fit(Peeks(), loss).losses, rel=1e-5)
