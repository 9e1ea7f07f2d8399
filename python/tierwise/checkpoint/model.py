"""Model weights as Hugging Face checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from tierwise.checkpoint.format import Entry, sync_directory, write_file, write_set
from tierwise.checkpoint.reader import SafetensorsReader
from tierwise.gemini.model import gather
from tierwise.gemini.runtime import Runtime, find_runtime
from tierwise.lazy import attach_checkpoint

_MB = 10**6


def save_model(model: nn.Module, checkpoint: str | os.PathLike[str], *, shard: bool, prefix: str | None, size_per_shard: int) -> None:
    """Writes weights and persistent buffers in the model's dtype, one tensor in memory at a time; tied weights once.

    `shard`: `checkpoint` is a folder, with the configuration of a Hugging Face model beside the weights; else one `.safetensors` file.
    """
    runtime = find_runtime(model)
    if runtime is not None:
        runtime.flush()
    entries = _entries(model, runtime)
    path = Path(checkpoint)
    if not shard:
        write_file(path, entries, {})
        return
    if path.is_file():
        raise ValueError(f"{path} is a file; a sharded checkpoint is a folder")
    stem = f"{prefix}.model" if prefix else "model"
    path.mkdir(parents=True, exist_ok=True)
    for name in ("config", "generation_config"):
        config = getattr(model, name, None)
        if config is not None and hasattr(config, "save_pretrained"):
            _save_config(config, path, name, runtime)
    write_set(path, stem, entries, size_per_shard * _MB, {}, {})


def _save_config(config: object, path: Path, name: str, runtime: Runtime | None) -> None:
    temporary = path / f".{name}.{os.getpid()}.tmp"
    try:
        before = getattr(config, "dtype", None)
        if runtime is not None and name == "config" and runtime.ready:
            config.dtype = runtime.dtype  # type: ignore[attr-defined]
        try:
            config.save_pretrained(temporary)  # type: ignore[attr-defined]
        finally:
            if runtime is not None and name == "config" and runtime.ready:
                config.dtype = before  # type: ignore[attr-defined]
        for file in temporary.iterdir():
            os.replace(file, path / file.name)
    finally:
        if temporary.exists():
            for file in temporary.iterdir():
                file.unlink()
            temporary.rmdir()
    sync_directory(path)


def _entries(model: nn.Module, runtime: Runtime | None) -> list[Entry]:
    entries: list[Entry] = []
    seen: set[int] = set()
    for name, value in model.named_parameters(remove_duplicate=False):
        if id(value) in seen:
            continue
        seen.add(id(value))
        dtype = value.dtype
        read: Callable[[], Tensor]
        if runtime is not None and runtime.ready:
            read = _reader(runtime, value)
        else:
            if value.is_meta:
                raise ValueError(f"{name!r} has no values yet: boost the model, or run its first forward, before saving it")
            read = value.detach
        entries.append(Entry(name, dtype, tuple(value.shape), read))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                entries.append(Entry(f"{prefix}.{name}" if prefix else name, buffer.dtype, tuple(buffer.shape), buffer.detach))
    return entries


def _reader(runtime: Runtime, param: nn.Parameter) -> Callable[[], Tensor]:
    return lambda: gather(runtime, param)


def load_model(model: nn.Module, checkpoint: str | os.PathLike[str], *, strict: bool) -> None:
    """Loads weights from a safetensors file or folder, one tensor in memory at a time, before or after boosting.

    fp32 weights become the exact fp32 master of 16-bit training. Raises ValueError that lists what is missing, unexpected or of another
    shape; with `strict=False` only shapes are checked.
    """
    reader = SafetensorsReader(checkpoint)
    runtime = find_runtime(model)
    params: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        params.setdefault(param, []).append(name)
    buffers: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                buffers[f"{prefix}.{name}" if prefix else name] = buffer
    names = set(reader.names)
    source = {param: next((name for name in aliases if name in names), None) for param, aliases in params.items()}
    known = {name for aliases in params.values() for name in aliases} | set(buffers)
    problems = []
    missing = sorted([params[p][0] for p, name in source.items() if name is None] + [name for name in buffers if name not in names])
    unexpected = sorted(names - known)
    if missing and strict:
        problems.append(f"missing {_listed(missing)}")
    if unexpected and strict:
        problems.append(f"unexpected {_listed(unexpected)}")
    for param, found in source.items():
        if found is not None and reader.shape(found) != tuple(param.shape):
            problems.append(f"{found!r} has shape {reader.shape(found)}, the model wants {tuple(param.shape)}")
        elif found is not None and not reader.is_floating_point(found):
            problems.append(f"{found!r} is not of a floating-point dtype")
    problems += [
        f"{name!r} has shape {reader.shape(name)}, the model wants {tuple(buffer.shape)}"
        for name, buffer in buffers.items()
        if name in names and reader.shape(name) != tuple(buffer.shape)
    ]
    if problems:
        raise ValueError(f"{checkpoint} does not fit {type(model).__name__}: {'; '.join(problems)}")
    for name, buffer in buffers.items():
        if name in names:
            buffer.copy_(reader.read(name))
    if runtime is not None and runtime.ready:
        runtime.flush()
        for param, found in source.items():
            if found is not None:
                chunk, position = runtime.grouping.place[param]
                runtime.memory.write_param(chunk, position, reader.read(found), param in runtime.trainable)
        runtime.target.synchronize()
        return
    attach_checkpoint(model, checkpoint)
    for param, found in source.items():
        if found is not None and not param.is_meta:
            param.data.copy_(reader.read(found))


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
