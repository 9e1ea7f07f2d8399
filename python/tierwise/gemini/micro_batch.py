"""`micro_batch_size="auto"`: how many rows of a batch go through the model at once.

More rows at once mean fewer sums of gradients and more computation to hide the optimizer behind; fewer leave memory for optimizer states
and for layers that need not be recomputed. Only a plan of each tells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tierwise import _core
from tierwise._core import BudgetError
from tierwise.gemini.inputs import map_tensors
from tierwise.gemini.model_trace import ModelTrace, UnitTrace
from tierwise.gemini.planning import executed_seconds, make_plan, pick

if TYPE_CHECKING:
    from tierwise.gemini.search import PlanSearch

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A micro-batch size with what the planner thinks of all."""

    rows: int
    accumulation: int
    predicted_s: dict[int, float]
    """Seconds of a step by rows of a micro-batch, by the planner's formulas; sizes that do not fit are missing."""
    executed_s: dict[int, float]
    """The same as the simulator executes it, for the sizes that look fastest."""
    layer_rows: int | None = None
    """Rows that a recomputed layer takes at a time; None: all of the micro-batch."""


def batch_rows(batch: object) -> int:
    """Rows of a batch: the first dimension that its tensors share. Raises ValueError if they share none."""
    values = batch.values() if isinstance(batch, Mapping) else batch
    assert not isinstance(values, Tensor)
    rows = {value.shape[0] for value in values if isinstance(value, Tensor) and value.dim() > 0}  # type: ignore[attr-defined]
    if len(rows) != 1:
        raise ValueError(f"the tensors of a batch must share their first dimension, got {sorted(rows)}")
    return int(rows.pop())


def _traces(search: PlanSearch, trace: ModelTrace, size: int) -> Iterator[tuple[ModelTrace, int | None]]:
    """Ways to run a micro-batch, each with the rows that a layer takes at a time.

    Layer by layer is one of them where sums of gradients may be rounded, because autograd adds up those of the parts.
    """
    plugin = search.plugin
    if plugin.layer_batch_size is not None:
        counts = [plugin.layer_batch_size]
    else:
        yield from ((variant, None) for variant in search.variants(trace))
        counts = _halves(size) if plugin.accumulate_dtype == "bf16" and plugin.recompute != "none" else []
        if search.why_not_by_rows(trace) is not None:
            counts = []
    for rows in counts:
        yield from ((variant, rows) for variant in search.variants(search.layer_by_layer(trace, rows)))


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """A way to run the step."""

    predicted_s: float
    rows: int
    layer_rows: int | None
    trace: ModelTrace
    wanted: dict[str, Any]


_EXECUTED = 4
"""So many of the ways that look fastest by the planner's formulas are executed by the simulator, and the best of as many other sizes."""


def _halves(size: int) -> list[int]:
    """Half of the rows, a quarter, and so on."""
    found = []
    while size > 1 and size % 2 == 0:
        size //= 2
        found.append(size)
    return found


def choose(search: PlanSearch, inputs: Inputs, rows: int) -> Choice:
    """The micro-batch size with the fastest plan for a step of `rows` rows, the largest of equally fast ones.

    That is by the planner's formulas, unless the simulator executes another of the first few 1 % faster.

    `inputs` are those of the whole step; the model is traced with one of their rows and with two, and sizes between are on the line through
    both. Raises BudgetError if no size fits, with what one row would need.
    """
    sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
    one = search.trace(*_rows(inputs, rows, 1))
    two = search.trace(*_rows(inputs, rows, 2)) if rows > 1 else one
    found: list[_Candidate] = []
    for offload in search.offloads():
        for size in sizes:
            for trace, layer_rows in _traces(search, _between(one, two, size), size):
                wanted = search.request(trace, rows // size, offload)
                try:
                    plan = _core.plan(search.layout, trace.to_json(search.grouping), json.dumps(wanted))
                except BudgetError:
                    continue
                found.append(_Candidate(json.loads(plan)["predicted_step_s"], size, layer_rows, trace, wanted))
        if found:
            break
    if not found:
        # Says what is missing and what would fit.
        make_plan(search.plugin, search.layout, search.grouping, one, search.request(one, rows, search.offloads()[-1]))
    found.sort(key=lambda candidate: (candidate.predicted_s, -candidate.rows))
    predicted: dict[int, float] = {}
    for candidate in found:
        predicted.setdefault(candidate.rows, candidate.predicted_s)
    # Of every one of the best sizes the best way, and whatever else is among the best.
    best_of = {candidate.rows: candidate for candidate in reversed(found)}
    first = [candidate for at, candidate in enumerate(found) if at < _EXECUTED or candidate is best_of[candidate.rows]]
    first = first[: 2 * _EXECUTED]
    plans = [make_plan(search.plugin, search.layout, search.grouping, candidate.trace, candidate.wanted) for candidate in first]
    seconds = [executed_seconds(plan, search.layout) for plan in plans]
    best = first[pick(plans, seconds)]
    executed: dict[int, float] = {}
    for candidate, taken in sorted(zip(first, seconds, strict=True), key=lambda pair: pair[1]):
        executed.setdefault(candidate.rows, taken)
    return Choice(best.rows, rows // best.rows, predicted, executed, best.layer_rows)


def _rows(inputs: Inputs, rows: int, count: int) -> Inputs:
    def cut(tensor: Tensor) -> Tensor:
        shared = tensor.dim() > 0 and tensor.shape[0] == rows
        return tensor.new_empty((count, *tensor.shape[1:])) if shared else tensor

    return map_tensors(inputs[0], cut), map_tensors(dict(inputs[1]), cut)


def _between(one: ModelTrace, two: ModelTrace, rows: int) -> ModelTrace:
    """A trace of `rows` rows, on the line through those of one and of two: some of what is saved does not grow with the batch."""

    def line(first: float, second: float) -> float:
        return first + (second - first) * (rows - 1)

    def unit(a: UnitTrace, b: UnitTrace) -> UnitTrace:
        fields = [field.name for field in dataclasses.fields(UnitTrace)]
        found = UnitTrace(**{name: type(getattr(a, name))(line(getattr(a, name), getattr(b, name))) for name in fields})
        # From some size on a tensor is worth a copy: that is no line.
        offload = min(max(found.offload_bytes, 0), found.saved_bytes)
        tail = min(max(found.tail_flops, 0.0), found.flops)
        return dataclasses.replace(found, offload_bytes=offload, offload_host_bytes=max(found.offload_host_bytes, offload), tail_flops=tail)

    units = [unit(a, b) for a, b in zip(one.units, two.units, strict=True)]
    outer = int(line(one.outer_saved_bytes, two.outer_saved_bytes))
    return dataclasses.replace(one, units=units, outer_saved_bytes=outer, tokens=int(line(one.tokens, two.tokens)), rows=rows)
