"""Links, host Adam and compute, alone and beside each other."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from tierwise._core import HostBench
from tierwise.calibration.host import KERNELS
from tierwise.config import available_memory_bytes

_ACTORS = ("h2d", "d2h", "adam", "compute")
_PASSES = {"params_first": "d2h", "moments": "h2d", "undoable": "h2d"}
"""What Adam does instead of whole steps, and the copies that it does not run beside."""
_PIECE_BYTES, _MOST_PIECES, _PARTS = 128 * 2**20, 8, 16
"""Of what is copied in turn in either direction, because the memory of a virtual machine is not equally fast everywhere; both
together take at most one of so many parts of what is free."""
_ROUNDS = 2
"""Of all sets, because a shared machine is faster in one moment than in the next: speeds are compared within a round."""


def beside(device: torch.device, bench: HostBench, seconds: float, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every set of actors running together, `seconds` each in all: bytes per second of each copy direction, parameters per second of Adam,
    and compute's speed as a share of its speed alone. Half as long with one of Adam's two passes, or a step that may be undone, in its
    place, beside the copies that it meets, and how fast these are then: the first pass runs while parameters go to the device, the others
    while gradients come from there."""
    machine = _Machine(device, bench)
    rounds = [_once(machine, seconds / _ROUNDS) for _ in range(_ROUNDS)]
    rows = []
    for actors in rounds[0]:
        row: dict[str, Any] = {"actors": list(actors)} | dict.fromkeys(("h2d_bytes_per_s", "d2h_bytes_per_s", "adam_params_per_s"))
        row["compute_share"] = None
        for figure in rounds[0][actors]:
            row |= {figure: statistics.median(_of_alone(figure, actors, of, rounds) for of in rounds)}
        rows.append(row)
        shown = [f"{name} {value / 1e9:.2f}e9" for name, value in row.items() if name.endswith("per_s") and value is not None]
        shown += [f"compute {row['compute_share']:.3f} of its speed"] if "compute" in actors else []
        log(f"together: {', '.join(shown)}")
    return rows


_Round = dict[tuple[str, ...], dict[str, float]]
"""Figures by set of actors."""


def _once(machine: _Machine, seconds: float) -> _Round:
    """All sets, one after the other."""
    figures: _Round = {}
    names = {"h2d": "h2d_bytes_per_s", "d2h": "d2h_bytes_per_s", "adam": "adam_params_per_s", "compute": "compute_share"}
    for count in range(1, len(_ACTORS) + 1):
        for actors in itertools.combinations(_ACTORS, count):
            found = machine.run(actors, seconds)
            row = {names[actor]: value for actor, value in found.items()}
            for kernel, never in _PASSES.items() if "adam" in actors else ():
                if never not in actors:
                    found = machine.run(actors, seconds / 2, kernel)
                    row[KERNELS[kernel]] = found["adam"]
                    row |= {f"{kernel}_{names[copy]}": found[copy] for copy in ("h2d", "d2h") if copy in found}
            figures[actors] = row
    return figures


def _of_alone(figure: str, actors: tuple[str, ...], of: _Round, rounds: list[_Round]) -> float:
    """A figure of one round. What the host and compute do is as fast as it was in all rounds where nothing ran beside it, times what was
    left of that beside the others in this round; compute's speed alone is 1."""
    alone: tuple[str, ...] = ("compute",) if figure == "compute_share" else ("adam",)
    value = of[actors][figure]
    if figure not in of[alone]:
        return value
    left = value / of[alone][figure]
    return left if figure == "compute_share" else left * statistics.median(each[alone][figure] for each in rounds)


def pieces(size: int) -> int:
    """How many pieces of `size` bytes are copied in turn in either direction."""
    return min(max(available_memory_bytes() // _PARTS // (2 * size), 1), _MOST_PIECES)


class _Machine:
    """Buffers and streams of the actors."""

    def __init__(self, device: torch.device, bench: HostBench) -> None:
        self.device, self.bench = device, bench
        self.cuda = device.type == "cuda"
        size = _PIECE_BYTES if self.cuda else _PIECE_BYTES // 64
        width = 8192 if self.cuda else 128
        count = pieces(size)
        whole = {name: torch.ones(count * size, dtype=torch.uint8, pin_memory=self.cuda) for name in ("h2d", "d2h")}
        self.host = {name: itertools.cycle(of.chunk(count)) for name, of in whole.items()}
        self.remote = {name: torch.ones(size, dtype=torch.uint8, device=device) for name in ("h2d", "d2h")}
        # Zeros draw little power: at its limit a device slows down and speeds up by itself.
        self.factors = [torch.zeros(width, width, dtype=torch.bfloat16, device=device) for _ in range(3)]
        for actor in ("h2d", "d2h", "compute"):
            self.work(actor)  # The first of each also loads what it needs.
        self.piece = {"h2d": float(size), "d2h": float(size), "compute": 1.0}
        self.adam_s = bench.numel / bench.rate("adam", 0.0)
        self.alone_s = {actor: self._once(actor) for actor in ("h2d", "d2h", "compute")} if self.cuda else {}

    def work(self, actor: str) -> None:
        if actor == "compute":
            torch.mm(self.factors[0], self.factors[1], out=self.factors[2])
        elif actor == "h2d":
            self.remote[actor].copy_(next(self.host[actor]), non_blocking=True)
        else:
            next(self.host[actor]).copy_(self.remote[actor], non_blocking=True)

    def run(self, actors: tuple[str, ...], seconds: float, kernel: str = "adam") -> dict[str, float]:
        queued = [actor for actor in actors if actor != "adam"]
        adam = kernel if "adam" in actors else None
        return self._on_streams(queued, adam, seconds) if self.cuda else self._on_threads(queued, adam, seconds)

    def _adam(self, kernel: str | None, seconds: float) -> dict[str, float]:
        if kernel is not None:
            return {"adam": self.bench.rate(kernel, seconds)}
        time.sleep(seconds)
        return {}

    def _on_streams(self, actors: list[str], adam: str | None, seconds: float) -> dict[str, float]:
        marks: dict[str, list[torch.cuda.Event]] = {}
        for actor in actors:
            # More than the time holds, and runs of Adam before and after it: nobody has the machine to himself at the end of it. Who is
            # slowed down works longer anyway.
            count = int((1.15 * seconds + (3 * self.adam_s if adam is not None else 0.0)) / self.alone_s[actor]) + 2
            stream = torch.cuda.Stream(self.device)
            marks[actor] = []
            with torch.cuda.stream(stream):
                for _ in range(count):
                    self.work(actor)
                    event = torch.cuda.Event(enable_timing=True)
                    event.record(stream)
                    marks[actor].append(event)
        found = self._adam(adam, seconds)
        torch.cuda.synchronize(self.device)
        for actor, events in marks.items():
            first = events[0]
            inside = [e for e in events[1:] if first.elapsed_time(e) / 1e3 <= seconds] or events[1:2]
            found[actor] = self.piece[actor] * len(inside) / (first.elapsed_time(inside[-1]) / 1e3)
        return found

    def _once(self, actor: str) -> float:
        """Seconds of one piece alone."""
        self.work(actor)
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(4):
            self.work(actor)
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / 4

    def _on_threads(self, actors: list[str], adam: str | None, seconds: float) -> dict[str, float]:
        """The emulated device: copies and products are the CPU's."""
        found: dict[str, float] = {}
        until = time.perf_counter() + seconds

        def loop(actor: str) -> None:
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() < until:
                self.work(actor)
                count += 1
            found[actor] = self.piece[actor] * count / (time.perf_counter() - start)

        threads = [threading.Thread(target=loop, args=(actor,)) for actor in actors]
        for thread in threads:
            thread.start()
        found |= self._adam(adam, seconds)
        for thread in threads:
            thread.join()
        return found
