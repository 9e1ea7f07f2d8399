"""Spans of a few training steps, and layers that take their time, so that their order says what overlaps with what."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch


class _Slow(torch.autograd.Function):
    """Takes its time in both directions, and saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


def slow_down(layers: Any, seconds: float) -> None:
    """Makes every layer take `seconds` in forward and in backward."""
    for layer in layers:
        layer.mlp.register_forward_hook(lambda module, args, output: _Slow.apply(output, seconds))


@dataclasses.dataclass(frozen=True)
class Span:
    """A span of the timeline, in microseconds."""

    name: str
    start: float
    end: float
    nbytes: int


class Tracks:
    """The spans of a timeline by track, each in order of their starts."""

    def __init__(self, path: Path) -> None:
        self._tracks: dict[str, list[Span]] = {}
        for event in json.loads(path.read_text(encoding="utf-8"))["traceEvents"]:
            if event["ph"] == "X":
                span = Span(event["name"], event["ts"], event["ts"] + event["dur"], event["args"]["bytes"])
                self._tracks.setdefault(event["cat"], []).append(span)
        for spans in self._tracks.values():
            spans.sort(key=lambda span: span.start)

    def of(self, track: str, prefix: str = "") -> list[Span]:
        """Spans of a track whose names start like this; none is an error of the test."""
        found = self.maybe(track, prefix)
        assert found, f"no span {prefix!r} on {track}; there are {sorted(self._tracks)}"
        return found

    def maybe(self, track: str, prefix: str = "") -> list[Span]:
        """The same, where there may be none."""
        return [span for span in self._tracks.get(track, []) if span.name.startswith(prefix)]

    def last(self, track: str, name: str) -> Span:
        """The last span of this name."""
        return [span for span in self.of(track, name) if span.name == name][-1]

    def first(self, track: str, name: str) -> Span:
        """The first span of this name."""
        return next(span for span in self.of(track, name) if span.name == name)


def record(booster: Any, model: Any, optimizer: Any, batches: list[Any], path: Path) -> Tracks:
    """Trains a causal LM on all batches, and records all but the first."""
    for step, ids in enumerate(batches):
        if step == 1:
            booster.flush()
            booster.record_timeline()
        booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
        optimizer.step()
    booster.timeline(path)
    return Tracks(path)
