"""`layer_batch_size`: a micro-batch goes through the model layer by layer, a few rows at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tierwise import BudgetError

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


def test_outputs_that_cannot_be_joined_are_refused(kit: Any) -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"x": self.inner(x)}

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Odd(), Odd()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)["x"]
            return x

    booster, model, _ = kit.boosted(Net(), precision="fp32", micro_batch_size=None, seq_len=None, layer_batch_size=2)
    with pytest.raises(Exception, match="cannot join the outputs of a layer that returns dict"):
        model(torch.ones(4, 8))
    del booster


@pytest.mark.parametrize("option", [{"recompute": "none"}, {"offload_activations": "full"}])
def test_what_recomputes_every_layer_keeps_none(kit: Any, option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"layer_batch_size=2 recomputes every layer"):
        kit.plugin(layer_batch_size=2, **option)
