"""Attention masks that a model would make only because it cannot know that it needs none.

transformers looks at the values of `position_ids` to find sequences that are packed into one row. On a GPU that waits for the device once
per forward; in a trace, where tensors have no values, it makes a mask of tokens x tokens for every row, which training never sees. Without
`position_ids` in the call positions simply count up: nothing is packed, and attention is causal without a mask.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_SPARED: dict[int, int] = {}
"""Thread -> forwards in it that are known to pack nothing; a forward that was interrupted may be closed by another thread."""
_LOOKS = "find_packed_sequence_indices"


@contextlib.contextmanager
def without_packing(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Spares a model's forward of `args` and `kwargs` the search for packed sequences, if it is called without positions."""
    masks = sys.modules.get("transformers.masking_utils")
    search = getattr(masks, _LOOKS, None)
    if search is None or len(args) > 1 or kwargs.get("position_ids") is not None:
        yield
        return
    if not hasattr(search, "_tierwise_original"):
        setattr(masks, _LOOKS, _sparing(search))
    thread = threading.get_ident()
    _SPARED[thread] = _SPARED.get(thread, 0) + 1
    try:
        yield
    finally:
        _SPARED[thread] -= 1
        if not _SPARED[thread]:
            del _SPARED[thread]


def _sparing(search: Any) -> Any:
    @functools.wraps(search)
    def find_packed_sequence_indices(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and threading.get_ident() in _SPARED:
            return None
        return search(*args, **kwargs)

    find_packed_sequence_indices._tierwise_original = search  # type: ignore[attr-defined]
    return find_packed_sequence_indices
