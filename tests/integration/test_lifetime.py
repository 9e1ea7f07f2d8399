"""The engine's threads read and write memory that Python owns: it comes to rest before that memory goes."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

SLOW: dict[str, Any] = {"h2d_bytes_per_second": 4e5, "d2h_bytes_per_second": 4e5}
HOST: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0}


def moving(engine: Any) -> bool:
    """Whether gradients, optimizer steps or optimizer states are on their way."""
    if engine.stats()["states_visiting_chunks"]:
        return True
    return any((chunk["grad"], chunk["work"]) != ("none", "idle") for chunk in json.loads(engine.residency()))


@pytest.mark.parametrize("at_once", [True, False], ids=["at_once", "moving"])
@pytest.mark.parametrize(
    "options",
    [HOST, {**HOST, "offload_param_frac": 1.0}, {**HOST, "stream_optim_frac": 1.0}],
    ids=["resident", "streamed", "visiting"],
)
def test_the_engine_rests_before_its_memory_is_freed(kit: Any, options: dict[str, Any], at_once: bool) -> None:
    gc.collect()
    gc.freeze()  # Collecting only what the test makes takes less time than the step.
    booster, model, optimizer = kit.boosted(kit.llama(), precision="fp32", **options, **SLOW)
    ids = kit.batches(1)[0]
    booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
    optimizer.step()
    engine = booster._runtime.engine
    # States leave only when the engine's thread has seen the norm, which may be later than here.
    began = time.monotonic()
    while not at_once and not moving(engine):
        assert time.monotonic() - began < 20, "the step is meant to be on its way when everything is dropped"
    runtime = weakref.ref(booster._runtime)
    del booster, model, optimizer
    gc.collect()
    gc.unfreeze()
    assert runtime() is None, "something that the collector does not see through holds the model"
    for _ in range(20):
        assert not moving(engine)
        time.sleep(0.005)


SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("helpers", {conftest!r})
helpers = importlib.util.module_from_spec(spec)
sys.modules["helpers"] = helpers
spec.loader.exec_module(helpers)
options = dict(precision="fp32", h2d_bytes_per_second=4e6, d2h_bytes_per_second=4e6, placement_policy="static", offload_optim_frac=1.0)
booster, model, optimizer = helpers.boosted(helpers.llama(), **options)
ids = helpers.batches(1)[0]
booster.backward(model(input_ids=ids, labels=ids).loss, optimizer)
optimizer.step()
print("stepped", flush=True)
{end}
"""


@pytest.mark.parametrize(("end", "code"), [("", 0), ("sys.exit(3)", 3), ("raise RuntimeError", 1)])
def test_the_process_ends_while_a_step_is_on_its_way(end: str, code: int) -> None:
    script = SCRIPT.format(conftest=str(Path(__file__).with_name("conftest.py")), end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "stepped" in done.stdout
    assert done.returncode == code, done.stderr
