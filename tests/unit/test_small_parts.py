"""The loss scale, JSON for schedulers, and the safetensors writer."""

from __future__ import annotations

import collections
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

pytest.importorskip("torch")
pytest.importorskip("safetensors")

import torch

from tierwise.checkpoint.format import Entry, shards, write_file
from tierwise.checkpoint.optimizer import from_json, to_json
from tierwise.checkpoint.reader import SafetensorsReader
from tierwise.gemini.scaler import LossScaler


def scaler(**options: Any) -> LossScaler:
    defaults = {"scale": 16.0, "min_scale": 1.0, "max_scale": 64.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 3}
    return LossScaler(**{**defaults, **options})


def test_the_scale_falls_at_once_and_grows_slowly() -> None:
    scale = scaler()
    seen = []
    for step, skipped in enumerate([True, False, False, False, False, False, False, True, False, False, False], start=1):
        scale.update(step, skipped)
        scale.update(step, skipped)  # A decision that is read twice counts once.
        seen.append(scale.scale)
    assert seen == [8, 8, 8, 16, 16, 16, 32, 16, 16, 16, 32]


def test_the_scale_stays_within_its_limits() -> None:
    scale = scaler(growth_interval=1)
    for step in range(1, 8):
        scale.update(step, skipped=False)
    assert scale.scale == 64.0
    for step in range(8, 20):
        scale.update(step, skipped=True)
    assert scale.scale == 1.0
    other = scaler()
    other.load_state_dict(scale.state_dict())
    assert other.scale == 1.0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


@hypothesis.given(values)
def test_json_gives_back_what_it_got(value: Any) -> None:
    hypothesis.assume("__" not in repr(value))
    assert from_json(json.loads(json.dumps(to_json(value)))) == value


def test_json_of_scheduler_states() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedulers = torch.optim.lr_scheduler
    makes: list[Callable[[], Any]] = [
        lambda: schedulers.MultiStepLR(optimizer, [2, 2, 5]),
        lambda: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
        lambda: schedulers.SequentialLR(optimizer, [schedulers.ConstantLR(optimizer), schedulers.ExponentialLR(optimizer, 0.9)], [3]),
        lambda: schedulers.ReduceLROnPlateau(optimizer),
        lambda: schedulers.OneCycleLR(optimizer, 1.0, 10),
    ]
    for make in makes:
        scheduler = make()
        state = scheduler.state_dict()
        restored = from_json(json.loads(json.dumps(to_json(state))))
        make().load_state_dict(restored)
        assert restored.keys() == state.keys()
    counter = from_json(json.loads(json.dumps(to_json(collections.Counter({2: 1, 5: 2})))))
    assert counter == collections.Counter({2: 1, 5: 2})
    assert isinstance(counter, collections.Counter)
    with pytest.raises(ValueError, match="cannot be saved without pickle"):
        to_json({"x": object()})


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.float64]


def test_files_are_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = {f"t{i}": (torch.arange(i * 3).reshape(i, 3) % 2).to(dtype) for i, dtype in enumerate(DTYPES)}
    tensors["scalar"] = torch.tensor(2.5)
    tensors["strided"] = torch.arange(12.0).reshape(3, 4).t()
    entries = [Entry(name, t.dtype, tuple(t.shape), functools.partial(torch.Tensor.detach, t)) for name, t in tensors.items()]
    write_file(tmp_path / "model.safetensors", entries, {"note": "hello"})
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    reader = SafetensorsReader(tmp_path)
    assert reader.metadata["note"] == "hello"
    assert reader.shape("strided") == (4, 3)
    assert not reader.is_floating_point("t3")
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_failing_write_leaves_what_was_there(tmp_path: Path) -> None:
    def fail() -> Any:
        raise OSError("wanted by the test")

    good = Entry("a", torch.float32, (2,), lambda: torch.ones(2))
    write_file(tmp_path / "model.safetensors", [good], {})
    with pytest.raises(OSError, match="wanted"):
        write_file(tmp_path / "model.safetensors", [good, Entry("b", torch.float32, (2,), fail)], {})
    assert SafetensorsReader(tmp_path).names == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="which safetensors does not have"):
        write_file(tmp_path / "other.safetensors", [Entry("c", torch.complex64, (1,), fail)], {})


@hypothesis.given(st.lists(st.integers(0, 50), max_size=30), st.integers(1, 120))
def test_shards_keep_order_and_limit(sizes: list[int], limit: int) -> None:
    entries = [Entry(str(i), torch.uint8, (size,), lambda: torch.empty(0)) for i, size in enumerate(sizes)]
    parts = shards(entries, limit)
    assert [entry for part in parts for entry in part] == entries
    for part in parts:
        assert sum(entry.nbytes for entry in part) <= limit or len(part) == 1 or all(e.nbytes == 0 for e in part[1:])
