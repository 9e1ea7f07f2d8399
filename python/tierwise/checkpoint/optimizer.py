"""Optimizer state and LR schedulers as safetensors and JSON."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tierwise.checkpoint.format import Entry, write_file, write_json, write_set
from tierwise.checkpoint.reader import SafetensorsReader
from tierwise.gemini.optimizer import GeminiOptimizer

_MB = 10**6
_META = "tierwise_optimizer"


def save_optimizer(
    optimizer: GeminiOptimizer, checkpoint: str | os.PathLike[str], *, shard: bool, prefix: str | None, size_per_shard: int
) -> None:
    """Writes moments and fp32 masters by parameter name, one tensor in memory at a time; step counts, param_groups and the loss scale
    travel in the same file (or its index), so one rename replaces all of it."""
    runtime = optimizer._tierwise_runtime
    if not runtime.ready:
        raise ValueError("the optimizer has no state yet: run a forward of the boosted model before saving it")
    runtime.flush()
    names = runtime.grouping.names
    steps = optimizer.param_steps()
    entries = [
        Entry(f"{names[param][0]}.{payload}", torch.float32, tuple(param.shape), _reader(optimizer, param, payload))
        for param in runtime.trainable
        if steps[param]
        for payload in ("exp_avg", "exp_avg_sq")
    ]
    if runtime.plugin.precision != "fp32":
        entries += [
            Entry(f"{names[param][0]}.master", torch.float32, tuple(param.shape), _reader(optimizer, param, "master"))
            for param in runtime.trainable
        ]
    meta = {
        "version": 1,
        "precision": runtime.plugin.precision,
        "param_groups": to_json(
            [
                {**group, "params": [names[p][0] for p in own["params"]]}
                for group, own in zip(optimizer.packed_groups(), optimizer.param_groups, strict=True)
            ]
        ),
        "steps": {names[param][0]: count for param, count in steps.items()},
        "scaler": None if runtime.scaler is None else runtime.scaler.state_dict(),
    }
    if shard:
        stem = f"{prefix}.optimizer" if prefix else "optimizer"
        write_set(Path(checkpoint), stem, entries, size_per_shard * _MB, {}, {_META: meta})
    else:
        write_file(Path(checkpoint), entries, {_META: json.dumps(meta)})


def _reader(optimizer: GeminiOptimizer, param: nn.Parameter, payload: str) -> Callable[[], Tensor]:
    runtime = optimizer._tierwise_runtime
    chunk, position = runtime.trainable[param]
    if payload == "master":
        return lambda: runtime.memory.read_master(chunk, position)
    return lambda: runtime.memory.read_state(chunk, position, payload)


def load_optimizer(optimizer: GeminiOptimizer, checkpoint: str | os.PathLike[str], prefix: str | None) -> None:
    """Continues exactly where `save_optimizer` was called. Raises ValueError that names parameters which do not match."""
    runtime = optimizer._tierwise_runtime
    if not runtime.ready:
        raise ValueError(
            "the plan is made at the first forward, and there is no memory for optimizer states before it; "
            "give GeminiPlugin micro_batch_size and seq_len, or load after a forward"
        )
    reader = SafetensorsReader(checkpoint, f"{prefix}.optimizer" if prefix else "optimizer")
    meta = reader.metadata.get(_META)
    if meta is None:
        raise ValueError(f"{checkpoint} was not written by save_optimizer: it has no {_META!r} in its metadata")
    by_name = {alias: param for param, aliases in runtime.grouping.names.items() for alias in aliases}
    own = [[runtime.grouping.names[p][0] for p in group["params"]] for group in optimizer.param_groups]
    groups = from_json(meta["param_groups"])
    if own != [group["params"] for group in groups]:
        saved = {name for group in groups for name in group["params"]}
        mine = {name for group in own for name in group}
        raise ValueError(
            f"{checkpoint} is of another optimizer: it lacks {sorted(mine - saved)[:8]}, has {sorted(saved - mine)[:8]} in addition, "
            "or groups the parameters differently"
        )
    available = set(reader.names)
    runtime.flush()
    optimizer.load_groups(groups)
    optimizer.load_steps({by_name[name]: count for name, count in meta["steps"].items()})
    for param in runtime.trainable:
        name = runtime.grouping.names[param][0]
        chunk, position = runtime.trainable[param]
        for payload in ("exp_avg", "exp_avg_sq"):
            if f"{name}.{payload}" in available:
                runtime.memory.write_state(chunk, position, payload, _checked(reader, f"{name}.{payload}", param))
        if f"{name}.master" in available:
            runtime.memory.write_param(chunk, position, _checked(reader, f"{name}.master", param), trainable=True)
    if runtime.scaler is not None and meta["scaler"] is not None:
        runtime.scaler.load_state_dict(meta["scaler"])
    runtime.target.synchronize()


def _checked(reader: SafetensorsReader, name: str, param: nn.Parameter) -> Tensor:
    value = reader.read(name)
    if value.shape != param.shape:
        raise ValueError(f"{name!r} has shape {tuple(value.shape)}, expected {tuple(param.shape)}")
    return value


def save_lr_scheduler(lr_scheduler: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Writes `lr_scheduler.state_dict()` as JSON. Raises ValueError for state that JSON cannot carry."""
    write_json(Path(checkpoint), to_json(lr_scheduler.state_dict()))


def load_lr_scheduler(lr_scheduler: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Continues from `save_lr_scheduler`."""
    lr_scheduler.load_state_dict(from_json(json.loads(Path(checkpoint).read_text(encoding="utf-8"))))


def to_json(value: Any) -> Any:
    """`value` as plain JSON; tuples, Counters (MultiStepLR) and scalar tensors are tagged so that they come back as they were."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, collections.Counter):
        return {"__counter__": [[key, count] for key, count in value.items()]}
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            return {"__items__": [[to_json(key), to_json(item)] for key, item in value.items()]}
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [to_json(item) for item in value]}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return {"__tensor__": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise ValueError(f"{type(value).__name__} cannot be saved without pickle: {value!r}")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "__counter__" in value:
        return collections.Counter({key: count for key, count in value["__counter__"]})
    if "__items__" in value:
        return {from_json(key): from_json(item) for key, item in value["__items__"]}
    if "__tuple__" in value:
        return tuple(from_json(item) for item in value["__tuple__"])
    if "__tensor__" in value:
        return torch.tensor(value["__tensor__"], dtype=getattr(torch, value["dtype"]))
    return {key: from_json(item) for key, item in value.items()}
