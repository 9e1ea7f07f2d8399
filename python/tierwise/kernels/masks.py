"""Attention masks that a model would make only because it cannot know that it needs none.

transformers looks at the values of `position_ids` to find sequences that are packed into one row. On a GPU that waits for the device once
per forward; in a trace, where tensors have no values, it makes a mask of tokens x tokens for every row, which training never sees. The
models below number their tokens from zero if they are called without `position_ids`: nothing is packed, and attention is causal without a
mask.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn

# Whose forward makes `position_ids` of torch.arange alone, in transformers 5.17 to 5.23.
_COUNTING = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2"})
_LOOKS = "find_packed_sequence_indices"
_DEPTH = 64
"""Frames between a model's forward and its mask: about a dozen, more under profilers and compilers."""
_SPARED: list[weakref.ref[nn.Module]] = []
"""Models whose forward packs nothing. Weakly: after an interrupted forward one stays until its next."""


@contextlib.contextmanager
def without_packing(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Spares the forward of `model` with `args` and `kwargs` the search for packed sequences, if it is a model of transformers that is
    called without positions. Other models that run meanwhile are not spared."""
    masks = sys.modules.get("transformers.masking_utils")
    search = getattr(masks, _LOOKS, None)
    counts = (
        type(model).__module__.startswith("transformers.models.")
        and getattr(getattr(model, "config", None), "model_type", None) in _COUNTING
        and len(args) <= 1
        and kwargs.get("position_ids") is None
    )
    if search is None or not counts:
        yield
        return
    if not hasattr(search, "_tierwise_original"):
        setattr(masks, _LOOKS, _sparing(search))
    spared = weakref.ref(model)
    _SPARED.append(spared)
    try:
        yield
    finally:
        _SPARED.remove(spared)


def _sparing(search: Any) -> Any:
    @functools.wraps(search)
    def find_packed_sequence_indices(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_spared(sys._getframe(1)):
            return None
        return search(*args, **kwargs)

    find_packed_sequence_indices._tierwise_original = search  # type: ignore[attr-defined]
    return find_packed_sequence_indices


def _is_spared(frame: FrameType | None) -> bool:
    """Whether a spared model's forward is among these frames, which are those of one thread."""
    spared = [model for found in _SPARED if (model := found()) is not None]
    for _ in range(_DEPTH if spared else 0):
        if frame is None:
            return False
        if frame.f_code.co_name == "forward":
            module = frame.f_locals.get("self")
            if any(module is model for model in spared):
                return True
        frame = frame.f_back
    return False
