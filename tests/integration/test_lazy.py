"""Models built without memory: initialised or loaded chunk by chunk when they are boosted."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import tierwise
from tierwise.booster import Booster

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


def boosted(kit: Any, model: Any, **options: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    booster = Booster(kit.plugin(precision="fp32", **{**STREAMED, **options}))
    return booster, booster.boost(model, optimizer)[0]


@pytest.mark.parametrize("tied", [False, True])
def test_a_lazy_model_is_initialised_as_hugging_face_does_it(kit: Any, tied: bool) -> None:
    eager = kit.llama(tied=tied)
    with tierwise.lazy_init():
        lazy = kit.llama(tied=tied)
    assert all(param.is_meta for param in lazy.parameters())
    optimizer: Any = torch.optim.AdamW(lazy.parameters(), lr=3e-3)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    booster = Booster(kit.plugin(precision="fp32", **STREAMED))
    model, optimizer, *_ = booster.boost(lazy, optimizer)
    assert [id(p) for p in model.parameters()] == held, "parameters keep their identity: the optimizer holds them"
    state = model.state_dict()
    for name, value in eager.state_dict().items():
        assert not state[name].isnan().any(), name
        assert state[name].std().item() == pytest.approx(value.std().item(), rel=0.1), name
    ids = kit.batches(1)[0]
    losses = []
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_parameters_that_a_parent_initialises(kit: Any) -> None:
    def build() -> Any:
        # `Any`: what all configurations take is not in the signature of each.
        settings: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=64, **settings))

    torch.manual_seed(0)
    eager = build().state_dict()
    with tierwise.lazy_init():
        lazy = build()
    _, model = boosted(kit, lazy, micro_batch_size=None, seq_len=None)
    ids = kit.batches(1)[0] % 64
    assert model(input_ids=ids, labels=ids).loss.isfinite()
    for name, value in model.state_dict().items():
        if value.numel() > 500:
            assert value.std().item() == pytest.approx(eager[name].std().item(), rel=0.15), name
    gpt = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=8, n_head=2, n_positions=32)
    with tierwise.lazy_init():
        lazy = transformers.GPT2LMHeadModel(gpt)
    _, model = boosted(kit, lazy)
    projection = model.state_dict()["transformer.h.3.mlp.c_proj.weight"]
    assert projection.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.1), "scaled by the depth, as the block does it"


def test_a_plain_module_uses_reset_parameters(kit: Any) -> None:
    with tierwise.lazy_init():
        lazy = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8))
    assert all(param.is_meta for param in lazy.parameters())
    _, model = boosted(kit, lazy, micro_batch_size=None, seq_len=None)
    assert model(torch.ones(2, 64)).isfinite().all()
    assert torch.equal(model.state_dict()["1.weight"], torch.ones(64))
    assert 0 < model.state_dict()["0.weight"].abs().max() <= 1 / 8


@pytest.mark.parametrize("trained", ["bias", "weight"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_modules_that_are_trained_in_part_are_initialised_once(kit: Any, trained: str, precision: str) -> None:
    """The same numbers are drawn whatever the placement; the frozen part's initialisation must not touch what is in place already."""

    def train(placement: dict[str, Any], lazy: bool = True) -> Any:
        torch.manual_seed(2)
        with tierwise.lazy_init() if lazy else contextlib.nullcontext():
            model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)))
        for name, param in model.named_parameters():
            param.requires_grad_(name.endswith(trained))
        torch.manual_seed(3)
        x = torch.linspace(-1, 1, 64).view(4, 16)
        loss_of = lambda model, step: model(x).square().mean()  # noqa: E731
        return kit.fit(model, loss_of, precision=precision, initial_scale=2.0**8, **placement)

    static = {"placement_policy": "static"}
    results = [
        train({**static, **more}) for more in ({}, {"offload_optim_frac": 1.0}, {"offload_optim_frac": 1.0, "offload_param_frac": 1.0})
    ]
    for result in results[1:]:
        result.same_as(results[0])
    # A model with values keeps them, whatever is frozen in it.
    results = [train({**static, **more}, lazy=False) for more in ({}, {"offload_optim_frac": 1.0, "offload_param_frac": 1.0})]
    results[1].same_as(results[0])


def test_what_nothing_initialises_is_an_error(kit: Any) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    with tierwise.lazy_init():
        lazy = Scaled()
    _, model = boosted(kit, lazy, micro_batch_size=None, seq_len=None)
    with pytest.raises(tierwise.TierwiseError, match=r"nothing initialises 'scale'.*checkpoint"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("size", [1, 1024], ids=["sharded", "one file"])
@pytest.mark.parametrize("when", ["lazy_init", "before boost", "after boost"])
def test_a_lazy_model_from_a_checkpoint(kit: Any, tmp_path: Any, when: str, size: int) -> None:
    eager = kit.llama(hidden_size=256, tied=True)
    expected = {name: value.clone() for name, value in eager.state_dict().items()}
    Booster(kit.plugin()).save_model(eager, tmp_path, size_per_shard=size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (size == 1)
    with tierwise.lazy_init(checkpoint=tmp_path if when == "lazy_init" else None):
        lazy = kit.llama(hidden_size=256, tied=True, seed=3)
    booster = Booster(kit.plugin(precision="fp32", **STREAMED))
    if when == "before boost":
        booster.load_model(lazy, tmp_path)
    model, *_ = booster.boost(lazy, torch.optim.AdamW(lazy.parameters()))
    if when == "after boost":
        booster.load_model(model, tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_checkpoints_that_do_not_fit_or_exist(kit: Any, tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint at"), tierwise.lazy_init(checkpoint=tmp_path / "none"):
        pass
    booster = Booster(kit.plugin())
    booster.save_model(kit.llama(layers=2), tmp_path)
    with tierwise.lazy_init(checkpoint=tmp_path):
        lazy = kit.llama(layers=3)
    with pytest.raises(ValueError, match=r"has no tensor 'model.layers.2"):
        boosted(kit, lazy)
    with pytest.raises(ValueError, match=r"missing 'model.layers.2.*and 1 more"):
        booster.load_model(kit.llama(layers=3), tmp_path)
    with pytest.raises(ValueError, match=r"unexpected 'model.layers.1"):
        booster.load_model(kit.llama(layers=1), tmp_path)
    with pytest.raises(ValueError, match=r"has shape \(96, 64\), the model wants \(80, 64\)"):
        booster.load_model(kit.llama(layers=2, intermediate_size=80), tmp_path)
    assert nn.Module.register_parameter.__qualname__ == "Module.register_parameter"
