"""What autograd saves: views of the streaming slab become (chunk, generation, offset), what the plan offloads goes to host memory,
everything else is counted.

Slots move and autograd remembers addresses, so a saved view of the slab would read another chunk's bytes in backward.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tierwise._core import Engine, TierwiseError
from tierwise.gemini.offload import ActivationOffload
from tierwise.gemini.offloaded import Offloaded, check_unchanged
from tierwise.gemini.target import Target
from tierwise.kernels.rematerialize import Rematerialized, recipe_of


@dataclasses.dataclass(frozen=True, slots=True)
class SlabRef:
    """A saved view of a streamed chunk, whatever slot it will be in."""

    chunk: int
    generation: int
    offset_bytes: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Saved:
    """A saved tensor, and its version then: torch checks that only where no hooks are."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.version = 0 if tensor.is_inference() else tensor._version

    def unchanged(self) -> Tensor:
        """The tensor. Raises RuntimeError if it was changed in place."""
        if not self.tensor.is_inference():
            check_unchanged(self.tensor.shape, self.version, self.tensor._version)
        return self.tensor


class _Counted(_Saved):
    """A saved tensor whose storage counts as an activation while this lives."""

    __slots__ = ("counter", "key")

    def __init__(self, tensor: Tensor, key: int, counter: ActivationCounter) -> None:
        super().__init__(tensor)
        self.key = key
        self.counter = counter

    def __del__(self) -> None:
        self.counter.release(self.key)


class Account(Protocol):
    """Counts device bytes by kind, hard-limited."""

    def __call__(self, kind: str, delta_bytes: int) -> None:
        """Adds `delta_bytes` (negative: frees). Raises BudgetError if they do not fit."""


class ActivationCounter:
    """Bytes of distinct storages that autograd keeps alive."""

    def __init__(self, account: Account) -> None:
        self.live_bytes = 0
        self.peak_bytes = 0
        self.excluded: set[int] = set()
        self._account = account
        self._storages: dict[int, list[int]] = {}

    def holds(self, key: int) -> bool:
        """Whether a saved tensor of this storage is kept."""
        return key in self._storages

    def hold(self, tensor: Tensor, key: int, nbytes: int) -> Any:
        """Counts a saved tensor."""
        entry = self._storages.get(key)
        if entry is None:
            self.add(nbytes)
            self._storages[key] = [1, nbytes]
        else:
            entry[0] += 1
        return _Counted(tensor, key, self)

    def release(self, key: int) -> None:
        """One saved tensor of this storage is gone."""
        entry = self._storages[key]
        entry[0] -= 1
        if entry[0] == 0:
            del self._storages[key]
            self.add(-entry[1])

    def add(self, delta_bytes: int) -> None:
        """Counts bytes that no saved tensor shows (recomputed activations)."""
        self._account("activations", delta_bytes)
        self.live_bytes += delta_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


class SavedTensors:
    """The saved-tensor hooks of one runtime, entered around the outermost boosted forward."""

    def __init__(self, engine: Engine, target: Target, slab: Tensor | None, counter: ActivationCounter | None) -> None:
        self.mapped: dict[int, int] = {}
        """Streamed chunk -> first byte of the slot that it is in now."""
        self.counter = counter
        self.offload: ActivationOffload | None = None
        self._engine = engine
        self._target = target
        self._slab = slab
        self._slab_pointer = -1 if slab is None else slab.untyped_storage().data_ptr()
        self._typed: dict[torch.dtype, Tensor] = {}
        self._sizes: dict[int, int] = {}
        self.rematerialize = False
        """Whether outputs of cheap kernels are made again instead of kept."""
        self._active: contextlib.ExitStack | None = None
        # torch.compile would compile them where a compiled block saves tensors, once per shape.
        self._hooks = torch.compiler.disable(self.pack), torch.compiler.disable(self.unpack)

    @property
    def active(self) -> bool:
        """Whether the hooks are on."""
        return self._active is not None

    @property
    def needed(self) -> bool:
        """Whether there is anything to pack or to count."""
        return self._slab is not None or self.counter is not None or self.rematerialize

    def set_sizes(self, sizes: dict[int, int]) -> None:
        """Bytes of every streamed chunk."""
        self._sizes = sizes

    def enter(self) -> None:
        """Turns the hooks on."""
        assert self._active is None
        self._active = contextlib.ExitStack()
        self._active.enter_context(saved_tensors_hooks(*self._hooks))

    def exit(self) -> None:
        """Turns the hooks off; harmless if they are."""
        active, self._active = self._active, None
        if active is not None:
            active.close()

    def pack(self, tensor: Tensor) -> Any:
        """What autograd keeps instead of `tensor`. Never `tensor` itself: that would be a reference cycle."""
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            return tensor.detach()
        storage = tensor.untyped_storage()
        pointer = storage.data_ptr()
        if pointer == self._slab_pointer:
            return self._reference(tensor)
        if self.rematerialize:
            recipe = recipe_of(tensor)
            if recipe is not None:
                return Rematerialized.of(tensor, recipe)
        if self.counter is not None and pointer and pointer not in self.counter.excluded:
            if self.offload is not None and not self.counter.holds(pointer):
                offloaded = self.offload.pack(tensor)
                if offloaded is not None:
                    return offloaded
            return self.counter.hold(tensor, pointer, storage.nbytes())
        return _Saved(tensor)

    def _reference(self, tensor: Tensor) -> SlabRef:
        start = int(tensor.storage_offset()) * tensor.dtype.itemsize
        for chunk, slot in self.mapped.items():
            if slot <= start < slot + self._sizes[chunk]:
                generation = self._engine.generation(chunk)
                return SlabRef(chunk, generation, start - slot, tensor.shape, tensor.stride(), tensor.dtype)
        raise TierwiseError("autograd saves a view of a streamed parameter outside the module that owns it; call that module instead")

    def unpack(self, packed: Any) -> Tensor:
        """The saved tensor, for a slab view where its chunk is now."""
        if isinstance(packed, _Saved):
            return packed.unchanged()
        if isinstance(packed, Rematerialized):
            return packed.tensor()
        if isinstance(packed, Offloaded):
            assert self.offload is not None
            return self.offload.unpack(packed)
        if isinstance(packed, Tensor):
            return packed
        assert isinstance(packed, SlabRef) and self._slab is not None
        generation = self._engine.generation(packed.chunk)
        if generation != packed.generation:
            raise TierwiseError(
                f"backward needs generation {packed.generation} of chunk {packed.chunk}, which an optimizer step has rewritten since "
                f"(now {generation}); call booster.backward before optimizer.step(), on a loss of the current parameters"
            )
        slot = self._engine.touch(packed.chunk, self._target.stream())
        typed = self._typed.get(packed.dtype)
        if typed is None:
            typed = self._typed[packed.dtype] = self._slab.view(packed.dtype)
        return torch.as_strided(typed, packed.shape, packed.stride, (slot + packed.offset_bytes) // packed.dtype.itemsize)
