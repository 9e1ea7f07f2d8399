"""`micro_batch_size="auto"`: the planner splits the batch of `Booster.train_step`."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch

from tierwise import BudgetError
from tierwise.booster import Booster
from tierwise.booster.plugin import GeminiPlugin
from tierwise.gemini import micro_batch
from tierwise.gemini.micro_batch import Choice, _between

ROWS = 8


def step_on(kit: Any, steps: int = 3, rows: int = ROWS, **options: Any) -> tuple[Booster, Any, list[float]]:
    """Boosts a tiny LLaMA and takes some steps of so many rows."""
    booster, model, _ = kit.boosted(kit.llama(), precision="fp32", **options)
    losses = [booster.train_step({"input_ids": ids, "labels": ids}).item() for ids in kit.batches(steps, rows=rows)]
    booster.flush()
    return booster, model, losses


def smallest(kit: Any, rows: int) -> int:
    """The smallest device budget, in steps of 16 KiB, at which micro-batches of `rows` rows fit."""
    for budget in range(16 << 10, 64 << 20, 16 << 10):
        try:
            kit.boosted(
                kit.llama(), precision="fp32", device_budget=budget, micro_batch_size=rows, gradient_accumulation_steps=ROWS // rows
            )
        except BudgetError:
            continue
        return budget
    raise AssertionError("no budget is enough")


def test_with_memory_to_spare_the_whole_batch_goes_at_once(kit: Any) -> None:
    booster, _, losses = step_on(kit, micro_batch_size="auto")
    assert booster.stats()["steps"] == 3
    assert "micro_batch_size 8 chosen; predicted steps by size: 1: " in booster.explain()
    assert booster.plan()["accumulation"] == 1
    _, _, expected = step_on(kit, micro_batch_size=ROWS)
    assert losses == expected


def test_little_memory_makes_it_smaller_with_the_bits_of_that_size(kit: Any) -> None:
    whole = smallest(kit, ROWS)
    booster, model, losses = step_on(kit, micro_batch_size="auto", device_budget=whole - (32 << 10))
    assert booster._runtime is not None
    size = booster._runtime.micro_batch_size
    assert size in (1, 2, 4)
    assert booster._runtime.accumulation == ROWS // size
    assert booster.stats()["device_peak_bytes"] <= whole - (32 << 10)
    _, fixed, expected = step_on(kit, micro_batch_size=size, gradient_accumulation_steps=ROWS // size)
    assert losses == expected
    for (name, ours), theirs in zip(model.state_dict().items(), fixed.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_the_simulator_has_the_last_word(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen() -> Choice:
        booster, _, _ = step_on(kit, steps=1, rows=24, micro_batch_size="auto")
        assert booster._runtime is not None and booster._runtime.choice is not None
        assert f"micro_batch_size {booster._runtime.choice.rows} chosen" in booster.explain()
        return booster._runtime.choice

    by_formula = chosen()
    assert by_formula.rows == 24
    assert sorted(by_formula.predicted_s) == [1, 2, 3, 4, 6, 8, 12, 24]
    monkeypatch.setattr(micro_batch, "_EXECUTED", 2)
    assert sorted(chosen().executed_s) == [6, 8, 12, 24]
    monkeypatch.undo()

    # As if steps of several micro-batches were much faster than the formulas say.
    def seconds(planned: Any, layout: Any) -> float:
        return 1.0 / planned.plan["accumulation"]

    monkeypatch.setattr(micro_batch, "executed_seconds", seconds)
    choice = chosen()
    assert choice.rows == min(choice.executed_s) < 24


def test_nothing_fits_and_the_error_says_what_one_row_needs(kit: Any) -> None:
    booster, _, _ = kit.boosted(kit.llama(), precision="fp32", micro_batch_size="auto", device_budget=4096)
    ids = kit.batches(1, rows=ROWS)[0]
    with pytest.raises(BudgetError, match=r"more device memory at .*these fit: "):
        booster.train_step({"input_ids": ids, "labels": ids})


def test_the_dataloader_decides_at_boost(kit: Any) -> None:
    data: Any = [{"input_ids": ids[0], "labels": ids[0]} for ids in kit.batches(ROWS)]
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model = kit.llama()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    booster = Booster(kit.plugin(precision="fp32", micro_batch_size="auto", seq_len=None))
    booster.boost(model, optimizer, dataloader=loader)
    assert "micro_batch_size 4 chosen" in booster.explain()
    for batch in loader:
        booster.train_step(batch)
    booster.flush()
    assert booster.stats()["steps"] == 2
    other = torch.zeros(6, 16, dtype=torch.long)
    with pytest.raises(ValueError, match=r"got 6 rows; the first batch, by which micro_batch_size='auto' was decided, asks for 4 x 1"):
        booster.train_step({"input_ids": other, "labels": other})


def test_positional_batches(kit: Any) -> None:
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1), torch.nn.Flatten(0), _Mean())
    optimizer: Any = torch.optim.AdamW(model.parameters())
    booster = Booster(kit.plugin(precision="fp32", micro_batch_size="auto", seq_len=None))
    booster.boost(model, optimizer)
    booster.train_step((torch.randn(6, 4),))
    booster.flush()
    assert booster.stats()["steps"] == 1


class _Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().mean()


def test_what_contradicts_it_is_refused(kit: Any) -> None:
    with pytest.raises(ValueError, match=r"chooses gradient_accumulation_steps too \(got 4\)"):
        GeminiPlugin(micro_batch_size="auto", gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="micro_batch_size must be an integer of at least 1, got 'atuo'"):
        GeminiPlugin(micro_batch_size="atuo")  # type: ignore[arg-type]
    booster, model, _ = kit.boosted(kit.llama(), precision="fp32", micro_batch_size="auto")
    with pytest.raises(ValueError, match="not planned yet"):
        booster.plan()
    with pytest.raises(ValueError, match="decided by the first batch of booster"):
        model(input_ids=torch.zeros(1, 16, dtype=torch.long))


def test_sizes_between_are_on_the_line_that_a_trace_of_them_gives(kit: Any) -> None:
    booster, _, _ = kit.boosted(kit.llama(), precision="fp32")
    assert booster._runtime is not None

    def traced(rows: int) -> Any:
        ids = torch.zeros(rows, 16, dtype=torch.long)
        return booster._runtime.search.trace((), {"input_ids": ids, "labels": ids})

    line, real = _between(traced(1), traced(2), 6), traced(6)
    assert (line.tokens, line.outer_saved_bytes) == (real.tokens, real.outer_saved_bytes)
    assert [(u.saved_bytes, u.flops) for u in line.units] == [(u.saved_bytes, u.flops) for u in real.units]
    layers = [i for i, unit in enumerate(real.order) if booster._runtime.grouping.units[unit].recomputable]
    assert [line.units[i].input_bytes for i in layers] == [real.units[i].input_bytes for i in layers]
