"""What is known of one offloaded storage, and what autograd keeps instead of a tensor in it."""

from __future__ import annotations

import collections
import enum
import weakref

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MIN_BYTES = 16 * 1024
"""Smaller storages stay on the device: their copies would cost more than they free."""
REGION_BYTES = 4096
"""A storage takes a multiple of this in host memory."""


class State(enum.Enum):
    """Where a storage is."""

    SAVED = enum.auto()
    """On the device; it is sent away when the unit that saved it is left."""
    KEPT = enum.auto()
    """On the device for good: the host had no room."""
    LEAVING = enum.auto()
    """On the device; its copy to the host is on its way and frees it."""
    RECLAIMED = enum.auto()
    """The same, but backward wants it: it stays."""
    OUT = enum.auto()
    """In host memory only."""
    RETURNING = enum.auto()
    """Its copy back is on its way; no stream has waited for it."""
    BACK = enum.auto()
    """On the device again, and in host memory."""
    FREED = enum.auto()
    """Nobody needs it any more."""


class Storage:
    """One storage of an offloaded unit. `tensor` is its device copy, which counts, in every state but OUT and FREED."""

    __slots__ = ("key", "nbytes", "original", "saved", "settled_version", "state", "stream", "tensor", "ticket", "uses", "version")

    def __init__(self, tensor: Tensor, nbytes: int) -> None:
        storage = tensor.untyped_storage()
        self.key = storage._cdata
        # Its address is not used for another storage while this lives.
        self.original = StorageWeakRef(storage)
        self.version = tensor._version
        self.saved: list[Part] = []
        """What of it was saved before it was sent."""
        self.nbytes = nbytes
        self.ticket = -1
        self.uses = 0
        self.state = State.SAVED
        self.stream: int | None = None
        """The stream that `tensor` was fetched on; None: it is the tensor that was saved."""
        self.settled_version = self.version
        """The version when its copy to the host was done."""
        self.tensor: Tensor | None = tensor.detach()

    def content_version(self) -> int:
        """The version of the values that backward would read."""
        return self.tensor._version if self.tensor is not None and self.stream is None else self.settled_version

    def has(self, tensor: Tensor) -> bool:
        """Whether it is, or will be, sent with the values of `tensor`, which lies in the same storage."""
        if self.original.expired() or self.version != tensor._version:
            return False
        # Only what was saved is sure to have been written when it was sent.
        part = Part(tensor)
        return self.state is State.SAVED or any(saved.covers(part) for saved in self.saved)


class Part:
    """The bytes of a tensor in its storage."""

    __slots__ = ("end", "first", "layout")

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.dtype.itemsize
        self.layout = None if tensor.is_contiguous() else (tensor.shape, tensor.stride(), size)
        self.first = int(tensor.storage_offset()) * size
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.end = self.first + size * (1 + last) if tensor.numel() else self.first

    def covers(self, other: Part) -> bool:
        """Whether every byte of `other` is one of these."""
        inside = self.first <= other.first and other.end <= self.end
        return inside and (self.layout is None or (self.layout == other.layout and self.first == other.first))


class Offloaded:
    """What autograd keeps instead of a tensor in an offloaded storage."""

    __slots__ = ("dropped", "dtype", "offset", "shape", "storage", "stride", "version")

    def __init__(self, dropped: collections.deque[Storage], storage: Storage, tensor: Tensor) -> None:
        self.dropped = dropped
        self.storage = storage
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = int(tensor.storage_offset())
        self.version = tensor._version

    def view(self) -> Tensor:
        """The tensor, in the storage's device copy."""
        assert self.storage.tensor is not None
        check_unchanged(self.shape, self.version, self.storage.content_version())
        there = self.storage.tensor.untyped_storage()
        return torch.empty(0, dtype=self.dtype, device=there.device).set_(there, self.offset, self.shape, self.stride)

    def __del__(self) -> None:
        # Whatever thread or lock the collector is in: the next call of the owner sees to it.
        self.dropped.append(self.storage)


class Visit:
    """One forward of a unit and the storages that were sent away in it."""

    __slots__ = ("__weakref__", "previous", "storages", "unit")

    def __init__(self, unit: int) -> None:
        self.unit = unit
        self.previous: weakref.ref[Visit] | None = None
        """The one whose backward comes next; it lives as long as its graph."""
        self.storages: list[Storage] = []


def check_unchanged(shape: torch.Size, saved_version: int, version: int) -> None:
    """Raises RuntimeError for a saved tensor that was changed in place: torch does not check what passes through saved-tensor hooks."""
    if version != saved_version:
        raise RuntimeError(
            f"one of the variables needed for gradient computation has been modified by an inplace operation: a tensor of shape "
            f"{tuple(shape)} is at version {version}, backward needs version {saved_version}"
        )


def is_plain(tensor: Tensor) -> bool:
    """Whether its bytes are all that there is to it, and nobody else's to change: no parameter, no lazy conjugation."""
    if tensor.is_inference() or tensor.is_conj() or tensor.is_neg():
        return False
    base = tensor._base if tensor._is_view() else tensor
    return not (base is not None and base.is_leaf and base.requires_grad)
