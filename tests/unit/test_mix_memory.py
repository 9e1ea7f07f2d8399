"""`benchmarks/mix_memory.py`: it takes memory, gives it back, and says what it cannot do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tierwise

_SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "mix_memory.py"


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    # The package that is tested, wherever it was imported from.
    path = os.pathsep.join([str(Path(tierwise.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run([sys.executable, str(_SCRIPT), *args], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)


def test_a_share_of_the_memory_is_mixed() -> None:
    ran = _run("--share", "0.01", "--threads", "2")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("mixed ")
    assert "freed in" in ran.stdout


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (["--share", "0"], "--share is 0.0"),
        (["--areas", "-1"], "--areas is -1"),
        (["--threads", "0"], "--threads 0"),
        (["--share", "1e-9"], "less than"),
    ],
)
def test_what_cannot_be_is_refused(args: list[str], reason: str) -> None:
    ran = _run(*args)
    assert ran.returncode == 1
    assert reason in ran.stderr
    assert "Traceback" not in ran.stderr
