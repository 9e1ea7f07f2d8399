"""The safetensors format, streamed: a header first, then every tensor's bytes in order, so no shard is ever whole in memory.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor that will be written; `read` gives it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def shards(entries: Iterable[Entry], limit_bytes: int) -> list[list[Entry]]:
    """Entries in order, cut so that a shard has at most `limit_bytes` unless one tensor alone has more."""
    result: list[list[Entry]] = []
    size = 0
    for entry in entries:
        if not result or size + entry.nbytes > limit_bytes:
            result.append([])
            size = 0
        result[-1].append(entry)
        size += entry.nbytes
    return result


def write_file(path: Path, entries: list[Entry], metadata: dict[str, str]) -> None:
    """Writes a safetensors file to `path` by way of a temporary file beside it; it appears complete or not at all."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise ValueError(f"{entry.name!r} has dtype {entry.dtype}, which safetensors does not have; it has {', '.join(DTYPES)}")
        header[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for entry in entries:
            tensor = entry.read().detach().to(device="cpu", dtype=entry.dtype).contiguous()
            if tuple(tensor.shape) != entry.shape:
                raise AssertionError(f"{entry.name}: {tuple(tensor.shape)} is not {entry.shape}")
            if tensor.numel():
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


class atomic:  # Reads as a verb: `with atomic(path) as temporary`.
    """A temporary path beside `path` that is renamed onto it at the end, or removed if the body fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return self._temporary

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
            return
        os.replace(self._temporary, self._path)
        sync_directory(self._path.parent)


def sync_directory(path: Path) -> None:
    """Makes renames in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Writes JSON durably: complete or not at all."""
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())


def write_set(
    folder: Path, stem: str, entries: list[Entry], limit_bytes: int, metadata: dict[str, str], index_metadata: dict[str, object]
) -> None:
    """Writes a set of tensors as one file or as shards with an index, replacing the set that `folder` has.

    New shards get names that the present index does not use; then one rename (of the index, or of the single file) makes the new set the
    current one; then the old files go. Killed at any instant, the folder loads as the old set or as the new one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    for leftover in folder.glob(f".{stem}*.tmp"):
        leftover.unlink(missing_ok=True)
    parts = shards(entries, limit_bytes)
    keep: set[str]
    if len(parts) <= 1:
        extra = {key: json.dumps(value) for key, value in index_metadata.items()}
        write_file(single, parts[0] if parts else [], {**metadata, **extra})
        index.unlink(missing_ok=True)
        keep = {single.name}
    else:
        used = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.exists() else set()
        infix = ""
        while any(f"{stem}{infix}-{i + 1:05d}-of-{len(parts):05d}.safetensors" in used for i in range(len(parts))):
            infix = f"-r{int(infix[2:] or 0) + 1}" if infix else "-r1"
        weight_map: dict[str, str] = {}
        for number, part in enumerate(parts):
            name = f"{stem}{infix}-{number + 1:05d}-of-{len(parts):05d}.safetensors"
            write_file(folder / name, part, metadata)
            weight_map.update({entry.name: name for entry in part})
        total = sum(entry.nbytes for entry in entries)
        write_json(index, {"metadata": {"total_size": total, **index_metadata}, "weight_map": weight_map})
        # Readers prefer the single file: the old set counts until it is gone.
        single.unlink(missing_ok=True)
        keep = set(weight_map.values())
    for old in folder.glob(f"{stem}*.safetensors"):
        if old.name not in keep and (old.name == single.name or old.name[len(stem)] == "-"):
            old.unlink(missing_ok=True)
    sync_directory(folder)
