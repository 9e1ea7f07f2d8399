"""Step lines for people: a progress bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from tierwise.config import format_bytes
from tierwise.observe.metrics import StepMetrics

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def format_step(metrics: StepMetrics, total_steps: int | None = None) -> str:
    """The step line: loss, gradient norm, learning rate, speed, utilisation, bytes per tier, and what the compute stream waited."""
    of = "" if total_steps is None else f"/{total_steps}"
    parts = [
        f"step {metrics.step:>{len(of) - 1 if of else 4}}{of}",
        f"loss {metrics.loss:.4f}",
        f"norm {metrics.grad_norm:.3f}" if metrics.grad_norm is not None else "norm n/a",
    ]
    if metrics.learning_rate is not None:
        parts.append(f"lr {metrics.learning_rate:.2e}")
    spilled = f"nvme {format_bytes(metrics.nvme_bytes)} ({format_bytes(metrics.nvme_read_bytes)} read)"
    parts += [
        f"{metrics.tokens_per_second:,.0f} tok/s",
        f"MFU {metrics.mfu:.1%}" if metrics.mfu is not None else "MFU n/a",
        f"device {format_bytes(metrics.device_bytes)} (peak {format_bytes(metrics.device_peak_bytes)})",
        f"host {format_bytes(metrics.host_bytes)}",
        *([spilled] if metrics.nvme_bytes else []),
        f"wait {metrics.wait_ms:.0f} ms",
    ]
    return "  ".join(parts)


class StepReporter:
    """Shows steps as they happen. On a terminal, and with `rich` installed, step lines scroll above a progress bar.

    Use it as a context manager: leaving it restores the terminal, also after an exception.
    """

    def __init__(self, total_steps: int, *, stream: TextIO | None = None, description: str = "training", every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}")
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._description = description
        self._every = every
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._progress = _progress_bar(self._stream)
        if self._progress is not None:
            self._task = self._progress.add_task(self._description, total=self._total_steps)
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def update(self, metrics: StepMetrics) -> None:
        """Shows one step: every `every`-th as a line, each in the progress bar."""
        if metrics.step % self._every == 0 or metrics.step == self._total_steps:
            self.print(format_step(metrics, self._total_steps))
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=metrics.step)

    def print(self, line: str) -> None:
        """Prints a line without disturbing the progress bar."""
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


def _progress_bar(stream: TextIO) -> Progress | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    except ImportError:
        return None
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Steps may be many seconds apart: the default would forget the last one before the next.
    return Progress(*columns, console=Console(file=stream), speed_estimate_period=600.0)
