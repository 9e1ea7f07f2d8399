"""`tierwise.observe`: metrics, step lines, FLOPs and memory."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tierwise.observe import (
    MemoryUse,
    MetricsLogger,
    StepMeter,
    StepMetrics,
    StepReporter,
    format_step,
    peak_flops,
    peak_rss_bytes,
    plain_adamw_bytes,
    reset_peak_rss,
    training_flops_per_token,
)


def metrics(**changes: Any) -> StepMetrics:
    values: dict[str, Any] = {
        "step": 3,
        "loss": 1.5,
        "grad_norm": 0.25,
        "learning_rate": 3e-4,
        "tokens": 2048,
        "seconds": 2.0,
        "tokens_per_second": 1024.0,
        "mfu": 0.5,
        "device_bytes": 2**29,
        "device_peak_bytes": 2**30,
        "host_bytes": 2**31,
        "host_peak_bytes": 2**31,
        "h2d_bytes": 10,
        "d2h_bytes": 20,
        "wait_ms": 12.4,
    }
    return StepMetrics(**(values | changes))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_importing_needs_no_torch() -> None:
    code = "import sys, tierwise, tierwise.observe, tierwise.data; sys.exit('torch' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_logged_line_is_whole_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "metrics.jsonl"
    with MetricsLogger(path) as logger:
        for step in range(1, 4):
            logger.log(metrics(step=step))
            # Read while the logger is open: nothing waits in a buffer.
            lines = path.read_text(encoding="utf-8").splitlines()
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    assert json.loads(lines[0]) == {name: getattr(metrics(step=1), name) for name in StepMetrics.__dataclass_fields__}


def test_two_loggers_append_to_one_file_without_tearing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def write(first: int) -> None:
        with MetricsLogger(path) as logger:
            for step in range(first, first + 200):
                logger.log(metrics(step=step))

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()) == list(range(400))


@pytest.mark.parametrize(("loss", "word"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_json_has_no_number_for_becomes_a_word(loss: float, word: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(metrics(loss=loss).to_json(), parse_constant=refuse)["loss"] == word


def test_a_closed_logger_refuses(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "metrics.jsonl")
    logger.close()
    logger.close()
    with pytest.raises(ValueError, match="is closed"):
        logger.log(metrics())


def test_a_full_disk_is_noticed() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with MetricsLogger("/dev/full") as logger, pytest.raises(OSError, match="No space left"):
        logger.log(metrics())


def test_a_step_line_names_every_figure() -> None:
    line = format_step(metrics(), total_steps=40)
    assert line == (
        "step  3/40  loss 1.5000  norm 0.250  lr 3.00e-04  1,024 tok/s  MFU 50.0%  "
        "device 512.00 MiB (peak 1.00 GiB)  host 2.00 GiB  wait 12 ms"
    )


def test_a_step_line_says_what_is_not_known() -> None:
    line = format_step(metrics(mfu=None, grad_norm=None, learning_rate=None))
    assert "MFU n/a" in line
    assert "norm n/a" in line
    assert "lr" not in line


def test_reporter_prints_plain_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with StepReporter(4, stream=stream, every=2) as reporter:
        for step in range(1, 5):
            reporter.update(metrics(step=step))
    assert stream.getvalue().splitlines() == [format_step(metrics(step=step), 4) for step in (2, 4)]


def test_reporter_always_shows_the_last_step() -> None:
    stream = io.StringIO()
    with StepReporter(3, stream=stream, every=10) as reporter:
        for step in range(1, 4):
            reporter.update(metrics(step=step))
    assert stream.getvalue().startswith("step 3/3")


def test_reporter_shows_a_bar_on_a_terminal_and_leaves_it_after_an_error() -> None:
    pytest.importorskip("rich")
    stream = Terminal()

    def fail() -> None:
        with StepReporter(2, stream=stream, description="demo") as reporter:
            reporter.update(metrics(step=1))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail()
    text = stream.getvalue()
    assert "loss 1.5000" in text
    assert "1/2" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # The cursor is hidden once and shown again.


def test_reporter_does_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    stream = Terminal()
    with StepReporter(1, stream=stream) as reporter:
        reporter.update(metrics(step=1))
    assert stream.getvalue() == format_step(metrics(step=1), 1) + "\n"


def test_meter_reports_growth_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 12.0, 12.0, 16.0, 16.0])
    monkeypatch.setattr("tierwise.observe.metrics.time.perf_counter", lambda: next(clock))
    meter = StepMeter(flops_per_token=3e9, peak_flops=6e12)
    meter.start({"wait_ns": 5_000_000, "h2d_bytes": 100})
    first = meter.measure(
        step=1,
        loss=2.0,
        grad_norm=1.0,
        tokens=1000,
        stats={"wait_ns": 7_000_000, "h2d_bytes": 150, "d2h_bytes": 30, "device_bytes": 9, "host_bytes": 8, "device_peak_bytes": 11},
    )
    assert (first.seconds, first.tokens_per_second) == (2.0, 500.0)
    assert (first.wait_ms, first.h2d_bytes, first.d2h_bytes) == (2.0, 50, 30)
    assert (first.device_bytes, first.device_peak_bytes, first.host_bytes) == (9, 11, 8)
    assert first.mfu == pytest.approx(500.0 * 3e9 / 6e12)
    second = meter.measure(step=2, loss=2.0, grad_norm=None, tokens=1000, stats={"wait_ns": 7_500_000, "h2d_bytes": 150, "d2h_bytes": 30})
    assert (second.seconds, second.wait_ms, second.h2d_bytes, second.d2h_bytes) == (4.0, 0.5, 0, 0)


def test_mfu_needs_a_known_peak() -> None:
    assert StepMeter(flops_per_token=1e9).measure(step=1, loss=1.0, grad_norm=None, tokens=1, stats={}).mfu is None
    with pytest.raises(ValueError, match="peak_flops must be positive"):
        StepMeter(peak_flops=0.0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("cpu", None),
    ],
)
def test_peaks_go_by_name(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_flops_of_a_token_against_a_count_by_hand() -> None:
    # One layer of width 4 with square attention and a 4x MLP, vocabulary 10, sequence 6: multiply-adds of every matrix product, times two
    # for multiply and add, times three for forward and both halves of backward.
    hidden, seq, vocabulary = 4, 6, 10
    matrices = 4 * hidden * hidden + 2 * 4 * hidden * hidden + hidden * vocabulary
    causal_attention = 2 * hidden * seq / 2  # Scores and values, half of the square on average.
    assert training_flops_per_token(matrices, 1, hidden, seq) == 2 * 3 * (matrices + causal_attention)
    with pytest.raises(ValueError, match="cannot be negative"):
        training_flops_per_token(-1, 1, 1, 1)


def test_plain_adamw_needs_16_bytes_per_parameter() -> None:
    assert plain_adamw_bytes(135_000_000) == 2_160_000_000
    with pytest.raises(ValueError, match="cannot be negative"):
        plain_adamw_bytes(-1)


def test_peak_rss_sees_an_allocation() -> None:
    if not reset_peak_rss():
        pytest.skip("this system does not reset the peak")
    before = peak_rss_bytes()
    block = bytearray(b"x") * (64 * 2**20)
    del block
    assert peak_rss_bytes() >= before + 60 * 2**20


def test_memory_use_reads_the_peaks() -> None:
    stats = {
        "device_peak_bytes": 1,
        "device_budget_bytes": 2,
        "host_peak_bytes": 3,
        "host_budget_bytes": 4,
        "activation_peak_bytes": 5,
        "other": "ignored",
    }
    assert MemoryUse.of(stats) == MemoryUse(
        device_peak_bytes=1, device_budget_bytes=2, host_peak_bytes=3, host_budget_bytes=4, activation_peak_bytes=5
    )
    with pytest.raises(KeyError):
        MemoryUse.of({})
