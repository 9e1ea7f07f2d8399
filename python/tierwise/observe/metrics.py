"""Metrics of training steps: measured, typed, and appended to a JSON Lines file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """One optimizer step. Sizes are bytes, times are what their names say."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean loss over the micro-batches of the step, in nats per token."""
    grad_norm: float | None
    """Global gradient norm before clipping; None while it is not known."""
    learning_rate: float | None
    """Learning rate of the first parameter group during this step."""
    tokens: int
    """Tokens trained on in this step."""
    seconds: float
    """Wall-clock time of the step."""
    tokens_per_second: float
    """`tokens / seconds`."""
    mfu: float | None
    """Model FLOP utilisation, 0 to 1; None where the device's peak is not known."""
    device_bytes: int
    """Device bytes in use at the end of the step."""
    device_peak_bytes: int
    """Most device bytes in use at any moment so far."""
    host_bytes: int
    """Pinned host bytes in use at the end of the step."""
    host_peak_bytes: int
    """Most pinned host bytes in use at any moment so far."""
    h2d_bytes: int
    """Bytes copied from host to device in this step."""
    d2h_bytes: int
    """Bytes copied from device to host in this step."""
    wait_ms: float
    """Milliseconds that the compute stream waited for copies, for optimizer steps and until gradients could be handed over in this step."""

    nvme_bytes: int = 0
    """Bytes of the spill file that hold data at the end of the step."""
    nvme_read_bytes: int = 0
    """Bytes read from the spill file in this step."""
    nvme_written_bytes: int = 0
    """Bytes written to the spill file in this step."""
    nvme_wait_ms: float = 0.0
    """Milliseconds that optimizer steps waited for reads in this step."""
    nvme_busy_ms: float = 0.0
    """Milliseconds of this step in which the disk had something to do: at least one read or write was submitted and had not ended."""

    def to_json(self) -> str:
        """One line of JSON. Numbers that JSON has no word for become the strings "nan", "inf" and "-inf"."""
        return json.dumps({name: _plain(value) for name, value in dataclasses.asdict(self).items()}, allow_nan=False)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


_GROWING = ("wait_ns", "h2d_bytes", "d2h_bytes", "nvme_read_bytes", "nvme_written_bytes", "nvme_wait_ns", "nvme_busy_ns")
"""Counters of `Booster.stats()` that only grow."""


class StepMeter:
    """Turns counters that only grow (`Booster.stats()`) and the clock into `StepMetrics`, one step at a time.

    `flops_per_token` (see `training_flops_per_token`) and the device's `peak_flops` per second give the MFU; without either it is None.
    """

    def __init__(self, *, flops_per_token: float | None = None, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops must be positive FLOP/s or None, got {peak_flops}")
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._before: dict[str, int] = {}
        self._started = time.perf_counter()

    def start(self, stats: Mapping[str, Any] | None = None) -> None:
        """Starts the clock of the next step, after work that is no part of a step (loading, evaluation)."""
        self._before = {name: int((stats or {}).get(name, self._before.get(name, 0))) for name in _GROWING}
        self._started = time.perf_counter()

    def measure(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float | None,
        tokens: int,
        stats: Mapping[str, Any],
        learning_rate: float | None = None,
    ) -> StepMetrics:
        """Metrics of the step that ends now; the next one starts here."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        before = self._before
        self.start(stats)
        growth = {name: self._before[name] - before.get(name, 0) for name in self._before}
        rate = tokens / seconds
        known = self._flops_per_token is not None and self._peak_flops is not None
        return StepMetrics(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=seconds,
            tokens_per_second=rate,
            mfu=rate * (self._flops_per_token or 0.0) / (self._peak_flops or 1.0) if known else None,
            device_bytes=int(stats.get("device_bytes", 0)),
            device_peak_bytes=int(stats.get("device_peak_bytes", 0)),
            host_bytes=int(stats.get("host_bytes", 0)),
            host_peak_bytes=int(stats.get("host_peak_bytes", 0)),
            h2d_bytes=growth["h2d_bytes"],
            d2h_bytes=growth["d2h_bytes"],
            wait_ms=growth["wait_ns"] / 1e6,
            nvme_bytes=int(stats.get("nvme_bytes", 0)),
            nvme_read_bytes=growth["nvme_read_bytes"],
            nvme_written_bytes=growth["nvme_written_bytes"],
            nvme_wait_ms=growth["nvme_wait_ns"] / 1e6,
            nvme_busy_ms=growth["nvme_busy_ns"] / 1e6,
        )


class MetricsLogger:
    """Appends one line of JSON per step to a file.

    Every line goes out in one write, so a reader (`tail -f`, a second process) sees whole lines only, and a killed run loses none
    that was logged. Use it as a context manager or call `close`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        folder = os.path.dirname(os.fspath(path))
        if folder:
            os.makedirs(folder, exist_ok=True)
        self.path = os.fspath(path)
        self._file: int | None = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def log(self, metrics: StepMetrics) -> None:
        """Appends one step. Raises ValueError after `close`, OSError if the line could not be written whole."""
        if self._file is None:
            raise ValueError(f"the metrics logger of {self.path} is closed")
        line = (metrics.to_json() + "\n").encode()
        written = os.write(self._file, line)
        if written != len(line):
            raise OSError(f"{self.path}: wrote {written} of {len(line)} bytes of step {metrics.step}; is the disk full?")

    def close(self) -> None:
        """Closes the file; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
