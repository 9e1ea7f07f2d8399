"""`layer_batch_size`: a micro-batch goes through the model layer by layer, a few rows at a time."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tierwise import BudgetError, TierwiseError

ROWS = 8
STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("options", [{}, STREAMED], ids=["resident", "streamed"])
def test_the_same_training(kit: Any, rows: int, options: dict[str, Any]) -> None:
    whole = kit.train(kit.llama(), steps=4, rows=ROWS, precision="fp32", max_norm=0.4)
    parts = kit.train(kit.llama(), steps=4, rows=ROWS, precision="fp32", max_norm=0.4, layer_batch_size=rows, **options)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=0, atol=2e-4)
    assert all(how == "recompute" for how in parts.booster.plan()["activations"][1:4])
    assert f"a layer takes {rows} rows at a time" in parts.booster.explain()


def test_placement_changes_no_bit(kit: Any) -> None:
    resident = kit.train(kit.llama(), steps=4, rows=ROWS, layer_batch_size=2)
    kit.train(kit.llama(), steps=4, rows=ROWS, layer_batch_size=2, **STREAMED).same_as(resident)


def test_a_layer_sees_as_many_rows_as_asked_for(kit: Any) -> None:
    seen: list[int] = []
    model = kit.llama()
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    booster, model, optimizer = kit.boosted(model, micro_batch_size=ROWS, layer_batch_size=3)
    seen.clear()  # The trace ran it too.
    ids = kit.batches(1, ROWS)[0]
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    assert seen == [3, 3, 2, 2, 3, 3], "forward in order, recomputed in backward from the last part on"
    optimizer.step()
    seen.clear()
    with torch.no_grad():
        model(input_ids=ids)
    assert seen == [ROWS]


def test_parameters_come_once_for_all_parts_and_less_memory_is_needed(kit: Any) -> None:
    def fetched(**options: Any) -> tuple[int, int]:
        booster, _, _ = kit.boosted(kit.llama(), recompute="full", **STREAMED, **options)
        ids = kit.batches(1, ROWS, seq=64)[0]
        for _ in range(3):
            booster.train_step({"input_ids": ids, "labels": ids})
        booster.flush()
        return booster.stats()["fetches"], booster.plan()["device"]["activations"]

    accumulated, _ = fetched(micro_batch_size=2, gradient_accumulation_steps=4, seq_len=64)
    whole, most = fetched(micro_batch_size=ROWS, seq_len=64)
    parts, least = fetched(micro_batch_size=ROWS, layer_batch_size=2, seq_len=64)
    assert parts == whole < accumulated / 2
    assert least < 0.7 * most


def test_the_planner_may_choose_it_where_sums_may_be_rounded(kit: Any) -> None:
    def chosen(**options: Any) -> Any:
        booster, _, _ = kit.boosted(
            kit.llama(), micro_batch_size="auto", h2d_bytes_per_second=2e7, d2h_bytes_per_second=2e7, **{"seq_len": None, **options}
        )
        ids = kit.batches(1, ROWS, seq=64)[0]
        losses = [booster.train_step({"input_ids": ids, "labels": ids}).item() for _ in range(3)]
        return booster._runtime.choice, losses

    with pytest.raises(BudgetError) as caught:
        kit.boosted(kit.llama(), micro_batch_size=ROWS, seq_len=64, recompute="full", device_budget=1)
    tight = {"device_budget": caught.value.needed_bytes - 64 * 1024}
    exact, losses = chosen(**tight)
    assert exact.layer_rows is None
    assert exact.rows < ROWS
    rounded, others = chosen(accumulate_dtype="bf16", **tight)
    assert rounded.layer_rows is not None
    assert rounded.rows > exact.rows
    assert rounded.predicted_s[rounded.rows] < exact.predicted_s[exact.rows]
    assert others == pytest.approx(losses, rel=2e-2)


class Layers(torch.nn.Module):
    """Two layers of a kind, applied in turn."""

    def __init__(self, layer: Any, turn: Any = lambda layer, x: layer(x)) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([layer(), layer()])
        self.turn = turn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = self.turn(block, x)
        return x


class Odd(torch.nn.Module):
    """Returns what it is told to."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        self.output = output

    def forward(self, x: torch.Tensor) -> Any:
        return self.output(self.inner(x))


@pytest.mark.parametrize(
    ("output", "turn", "what"),
    [
        (lambda y: {"x": y}, lambda layer, x: layer(x)["x"], "dict"),
        (lambda y: (y, y.mean()), lambda layer, x: layer(x)[0], r"a tensor of shape \(\) for 2 rows"),
        (lambda y: (y, y[:1]), lambda layer, x: layer(x)[0], r"a tensor of shape \(1, 8\) for 2 rows"),
    ],
    ids=["mapping", "scalar", "shared"],
)
def test_outputs_that_cannot_be_joined_are_refused(kit: Any, output: Any, turn: Any, what: str) -> None:
    options = {"precision": "fp32", "micro_batch_size": None, "seq_len": None, "layer_batch_size": 2}
    _, model, _ = kit.boosted(Layers(lambda: Odd(output), turn), **options)
    with pytest.raises(TierwiseError, match=rf"cannot join the outputs of 'blocks\.0', which returns {what}; leave it out"):
        model(torch.ones(4, 8))


def test_layers_whose_rows_are_not_first_are_refused(kit: Any) -> None:
    def turned(layer: Any, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = layer(x.transpose(0, 1)).transpose(0, 1)
        return result

    def layer() -> Any:
        return torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    options = {"precision": "fp32", "micro_batch_size": None, "seq_len": None, "layer_batch_size": 2}
    _, model, _ = kit.boosted(Layers(layer, turned), **options)
    with pytest.raises(ValueError, match=r"'blocks\.0' takes 6 in the first dimension of its input, and the micro-batch has 4 rows"):
        model(torch.ones(4, 6, 8))


def test_a_model_without_layers_is_refused(kit: Any) -> None:
    options = {"precision": "fp32", "micro_batch_size": None, "seq_len": None}
    _, model, _ = kit.boosted(torch.nn.Linear(4, 4), **options, layer_batch_size=2)
    with pytest.raises(ValueError, match="no layers that can be recomputed"):
        model(torch.ones(4, 4))


def test_layers_that_checkpoint_themselves_are_left_alone(kit: Any) -> None:
    def checkpointing() -> Any:
        model = kit.llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # The name changes in transformers 6.
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return model

    with pytest.raises(ValueError, match=r"layer_batch_size=2 cannot be used: 'model\.layers\.0' is checkpointed by the model itself"):
        kit.boosted(checkpointing(), micro_batch_size=ROWS, layer_batch_size=2)
    booster, _, _ = kit.boosted(checkpointing(), micro_batch_size="auto", accumulate_dtype="bf16", seq_len=None)
    ids = kit.batches(1, ROWS)[0]
    booster.train_step({"input_ids": ids, "labels": ids})
    assert booster._runtime.choice.layer_rows is None


def test_no_more_rows_than_asked_for_are_not_cut(kit: Any) -> None:
    options = {"device_budget": "64MiB", "micro_batch_size": 2}
    cut, _, _ = kit.boosted(kit.llama(), layer_batch_size=2, **options)
    whole, _, _ = kit.boosted(kit.llama(), **options)
    assert cut.plan() == whole.plan()
    assert "layer by layer" not in cut.explain()


@pytest.mark.parametrize("option", [{"recompute": "none"}, {"offload_activations": "full"}])
def test_what_recomputes_every_layer_keeps_none(kit: Any, option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"layer_batch_size=2 recomputes every layer"):
        kit.plugin(layer_batch_size=2, **option)
