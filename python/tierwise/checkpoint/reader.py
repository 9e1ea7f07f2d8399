"""Reads safetensors: one file, or a folder with one file or an index of shards. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tierwise.checkpoint.format import DTYPES


class SafetensorsReader:
    """Names, shapes and dtypes of a checkpoint without its data, and single tensors on demand.

    Raises FileNotFoundError if there is no checkpoint, ValueError if it is incomplete or of another format.
    """

    def __init__(self, path: str | os.PathLike[str], stem: str = "model") -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        if self.path.is_dir():
            single, index = self.path / f"{stem}.safetensors", self.path / f"{stem}.safetensors.index.json"
            if single.exists():
                self._add(single)
            elif index.exists():
                self._add_index(index)
            else:
                pickled = sorted(p.name for p in self.path.glob("*.bin")) + sorted(p.name for p in self.path.glob("*.pt"))
                hint = f"; {pickled[0]} is a pickle, which is not read: convert it to safetensors" if pickled else ""
                raise FileNotFoundError(f"no {single.name} or {index.name} in {self.path}{hint}")
        elif self.path.is_file():
            if self.path.name.endswith(".index.json"):
                self._add_index(self.path)
            else:
                self._add(self.path)
        else:
            raise FileNotFoundError(f"no checkpoint at {self.path}")

    def _add(self, file: Path) -> None:
        try:
            handle = safe_open(file, framework="pt")
        except Exception as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from error
        with handle:
            metadata = handle.metadata() or {}
            self.metadata.update({key: _parsed(value) for key, value in metadata.items()})
            for name in handle.keys():  # noqa: SIM118 (not a mapping)
                self._file_of[name] = file

    def _add_index(self, index: Path) -> None:
        content = json.loads(index.read_text(encoding="utf-8"))
        self.metadata.update(content.get("metadata", {}))
        for name, file in content["weight_map"].items():
            self._file_of[name] = index.parent / file
        missing = sorted({file.name for file in self._file_of.values() if not file.exists()})
        if missing:
            raise ValueError(f"{index} names shards that are missing: {', '.join(missing)}")

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._file_of)

    def _handle(self, name: str) -> Any:
        file = self._file_of[name]
        if self._open is None or self._open[0] != file:
            self._open = (file, safe_open(file, framework="pt"))
        return self._open[1]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def is_floating_point(self, name: str) -> bool:
        """Whether a tensor's dtype is a float."""
        dtype = self._handle(name).get_slice(name).get_dtype()
        return dtype in DTYPES and DTYPES[dtype].is_floating_point

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value
