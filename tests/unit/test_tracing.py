"""Tracing without data agrees with what really happens, and leaves no trace of itself."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tierwise.gemini.chunking import group
from tierwise.gemini.inputs import count_tokens
from tierwise.gemini.recompute import recomputes_whole
from tierwise.gemini.tracing import trace
from tierwise.kernels.linear_cross_entropy import linear_cross_entropy


def llama(**config: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "attention_dropout": 0.1,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **config}))


IDS = torch.zeros((2, 16), dtype=torch.long)


def run(model: Any, **kwargs: Any) -> Any:
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False, **kwargs}
    return trace(model, group(model), (), inputs, torch.bfloat16, torch.device("cpu"))


def test_units_and_operations_in_order() -> None:
    model = llama()
    traced = run(model)
    names = [group(model).units[unit].name for unit in traced.order]
    assert names == ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head"]
    assert traced.ops == [(u, "forward") for u in range(6)] + [(u, "backward") for u in reversed(range(6))]
    assert traced.exact
    assert traced.tokens == 32


class Attention(nn.Module):
    """Grouped-query attention by one of CUDA's kernels, named: without a device, torch would choose none of them."""

    def __init__(self, operation: str, key_heads: int) -> None:
        super().__init__()
        self.operation = getattr(torch.ops.aten, f"_scaled_dot_product_{operation}_attention")
        self.query = nn.Parameter(torch.zeros(64, 4 * 16))
        self.key = nn.Parameter(torch.zeros(64, key_heads * 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = ((x @ weight).unflatten(-1, (-1, 16)).transpose(1, 2) for weight in (self.query, self.key))
        extra = () if self.operation is torch.ops.aten._scaled_dot_product_flash_attention else (None, True)
        output: torch.Tensor = self.operation(query, key, key, *extra)[0]
        return output


@pytest.mark.parametrize("operation", ["flash", "efficient", "cudnn"])
def test_attention_of_fewer_key_heads_is_traced_for_cuda(operation: str) -> None:
    flops = []
    for key_heads in (4, 2):
        model = Attention(operation, key_heads)
        traced = trace(model, group(model), (torch.zeros(2, 16, 64),), {}, torch.bfloat16, torch.device("cuda"))
        assert traced.exact, "estimated: torch before 2.15 has no formula for these shapes"
        flops.append(traced.flops() - sum(2 * 2 * 16 * p.numel() for p in (model.query, model.key)))
    assert flops == [2 * 2 * 4 * 16 * 16 * (16 + 16)] * 2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_bytes_are_those_of_a_real_forward(dropout: float) -> None:
    model = llama(attention_dropout=dropout).bfloat16().train()
    params = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    keep = []

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in params:
            storages[storage.data_ptr()] = storage.nbytes()
            keep.append(tensor.detach())
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    traced = run(model)
    planned = sum(unit.saved_bytes for unit in traced.units) + traced.outer_saved_bytes
    # Attention kernels differ by their small statistics; a plan has a reserve for that.
    assert planned == pytest.approx(sum(storages.values()), rel=0.1)
    del loss


def test_flops_are_two_per_weight_and_token() -> None:
    traced = run(llama())
    layer = 2 * 32 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert layer <= traced.units[1].flops <= 1.2 * layer
    assert traced.units[5].flops == 2 * 32 * 64 * 128
    assert traced.units[1].input_bytes >= 2 * 16 * 64 * 2


def test_nothing_is_left_behind() -> None:
    model = llama()
    model.eval()
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    random = torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])
        assert type(value) is torch.Tensor


def test_checkpointing_is_off_while_tracing_and_on_again_after() -> None:
    model = llama()
    plain = run(model)
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    again = run(model)
    assert [unit.saved_bytes for unit in again.units] == [unit.saved_bytes for unit in plain.units]
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_an_attention_mask_with_padding() -> None:
    traced = run(llama(), attention_mask=torch.ones_like(IDS))
    assert traced.exact


def test_a_frozen_front_has_no_backward() -> None:
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    traced = run(model)
    backward = [unit for unit, phase in traced.ops if phase == "backward"]
    assert 0 not in backward
    assert 1 not in backward
    assert traced.units[1].saved_bytes == 0


def test_peak_with_and_without_recomputation() -> None:
    traced = run(llama())
    nothing = traced.activation_peak_bytes(["keep"] * 6)
    layers = traced.activation_peak_bytes(["keep", *["recompute"] * 3, "keep", "keep"])
    assert nothing == sum(unit.saved_bytes for unit in traced.units) + traced.outer_saved_bytes
    assert layers < nothing


def test_tokens_of_a_batch() -> None:
    assert count_tokens((), {"input_ids": IDS}) == 32
    assert count_tokens((torch.ones(4, 8),), {}) == 4
    assert count_tokens((torch.ones(2, 3, 8), IDS), {}) == 32
    assert count_tokens((), {}) == 1


def test_the_fused_loss_is_traced_for_cuda() -> None:
    # An estimate in its place would be wrong by a third, and nothing but a slower plan would tell.
    weight = torch.nn.Parameter(torch.randn(32, 8))

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            labels = torch.zeros(hidden.shape[0], dtype=torch.long, device=hidden.device)
            return linear_cross_entropy(hidden * self.weight.sum(), self.weight, labels)

    model = Loss()
    traced = trace(model, group(model), (torch.zeros(16, 8),), {}, torch.bfloat16, torch.device("cuda"))
    assert traced.exact


def test_a_recomputation_stops_where_the_trace_says() -> None:
    def backward_flops(checkpointed: bool) -> float:
        model = llama(attention_dropout=0.0).to(torch.bfloat16)
        for layer in model.model.layers if checkpointed else ():
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return float(counter.get_total_flops())

    traced = run(llama(attention_dropout=0.0))
    layers = traced.units[1:4]
    # The last product of a layer gives what nobody saves inside of it.
    assert [unit.tail_flops for unit in layers] == [2.0 * IDS.numel() * 64 * 96] * 3
    again = backward_flops(True) - backward_flops(False)
    assert again == sum(unit.flops - unit.tail_flops for unit in layers)
    whole = traced.recomputed_whole([True, True, True, False, True, True])
    assert [unit.tail_flops for unit in whole.units[1:4]] == [0.0, 0.0, layers[2].tail_flops]


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_a_checkpoint_of_the_model_leaves_out_is_not_seen(reentrant: bool) -> None:
    model = llama()
    layer = model.model.layers[1]
    original = layer.forward
    # A reentrant one takes no keywords.
    layer.forward = lambda x, **kwargs: checkpoint(functools.partial(original, **kwargs), x, use_reentrant=reentrant)
    tails = [unit.tail_flops for unit in run(model).units[1:4]]
    assert tails[1] == 0.0
    assert tails[0] == tails[2] > 0.0


# torch 2.11 warns of its own code when its compiler is imported.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_layers_that_recompute_their_whole_forward() -> None:
    layer = llama().model.layers[0]
    assert not recomputes_whole(layer)
    layer.forward = torch.compile(layer.forward)
    assert recomputes_whole(layer)
    layer = llama().model.layers[0]
    layer.mlp.compile()
    assert recomputes_whole(layer)
    for reentrant in (False, True):
        model = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 gives it another name.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        assert recomputes_whole(model.model.layers[0]) == reentrant
