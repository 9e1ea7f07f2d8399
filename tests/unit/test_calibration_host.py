"""The host alone: how long every kernel is measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tierwise import _core
from tierwise.calibration import host


def test_what_later_probes_are_compared_with_is_measured_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, float, int]] = []

    def rate(kernel: str, seconds: float, threads: int) -> float:
        asked.append((kernel, seconds, threads))
        return 1e9

    bench: Any = SimpleNamespace(numel=100, rate=rate)
    monkeypatch.setattr(_core, "kernel_threads", lambda: 4)
    rows = host.by_threads(bench, 9.0, lambda text: None)
    assert [row["threads"] for row in rows] == [1, 2, 4]
    assert sum(seconds for _, seconds, _ in asked) == pytest.approx(9.0)
    share = min(seconds for _, seconds, _ in asked)
    longer = [(kernel, threads) for kernel, seconds, threads in asked if seconds > 1.5 * share]
    assert longer == [("adam", 4)] * host._ROUNDS
