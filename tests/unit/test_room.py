"""A forward waits for gradients whose memory it will take: those of the step before, and those of the micro-batch before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch: install tierwise[train]")

import torch

from tierwise.gemini.gradients import Gradients
from tierwise.gemini.runtime import Runtime

BUDGET, KEPT, RESERVE, GRADIENT = 1000, 300, 100, 200


class _Engine:
    """Reads one gradient each time it is asked."""

    def __init__(self, tickets: int) -> None:
        self.unread = list(range(tickets))

    def collect(self) -> list[int]:
        return [self.unread.pop(0)] if self.unread else []


@pytest.mark.parametrize(("micro_done", "waits"), [(0, True), (1, True), (2, False)])
def test_a_forward_waits_for_gradients_in_its_way(monkeypatch: pytest.MonkeyPatch, micro_done: int, waits: bool) -> None:
    device: Any = SimpleNamespace(emulated=False, torch_device="cuda")
    engine: Any = _Engine(4)
    freed: list[int] = []
    gradients = Gradients.__new__(Gradients)
    gradients._engine, gradients._target = engine, device
    gradients._account = lambda kind, nbytes: freed.append(-nbytes)
    gradients._tickets = {ticket: ([], GRADIENT) for ticket in range(4)}

    def stats(device: object) -> dict[str, Any]:
        return {"allocated_bytes": {"all": {"current": 100 + GRADIENT * len(gradients._tickets), "peak": 10 * BUDGET}}}

    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", stats)
    runtime: Any = SimpleNamespace(
        gradients=gradients, micro_done=micro_done, accumulation=2, target=device, unit_ids=[7], recompute=[False],
        trace=SimpleNamespace(units={7: SimpleNamespace(saved_bytes=KEPT, input_bytes=0)}),
        planned=SimpleNamespace(plan={"device": {"reserve": RESERVE}}, device_budget=BUDGET),
    )  # fmt: skip
    Runtime.make_room(runtime, 0)
    # 900 bytes are allocated: with two gradients less, the forward and what it needs for itself fit. Gradients of a whole batch would wait
    # for ever.
    assert freed == ([GRADIENT, GRADIENT] if waits else [])
