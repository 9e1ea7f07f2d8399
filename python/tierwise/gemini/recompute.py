"""Recomputation per unit: `unit.forward` runs inside a non-reentrant checkpoint where the plan says so.

The wrap is at `forward`, inside the unit's hooks: they see the forward once, and the wrapped function notices by itself that it runs again
inside a backward.

With `layer_batch_size` a batch goes through the model layer by layer: a recomputed layer takes a few rows at a time, each part in a
checkpoint of its own, so that backward needs the intermediates of one part only. Autograd adds up the gradients of the parts before it
hands them over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tierwise._core import TierwiseError
from tierwise.gemini.hooks import in_graph_task
from tierwise.gemini.tracing import map_tensors, tensors_in

if TYPE_CHECKING:
    from tierwise.gemini.runtime import Runtime


def checkpoints_itself(module: nn.Module) -> bool:
    """Whether Hugging Face's own gradient checkpointing is on for this layer."""
    return getattr(module, "gradient_checkpointing", False) is True


def wrap(runtime: Runtime, index: int, module: nn.Module) -> None:
    """Replaces `module.forward` by one that follows `runtime.recompute[index]`."""
    original = module.forward

    @functools.wraps(original)
    def run(*args: Any, **kwargs: Any) -> Any:
        if in_graph_task() and not runtime.passive:
            torch.compiler.disable(runtime.hooks.recompute)(index)
        return original(*args, **kwargs)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        wanted = runtime.recompute[index] and module.training and torch.is_grad_enabled()
        if not wanted or runtime.passive or in_graph_task() or checkpoints_itself(module):
            return run(*args, **kwargs)
        if runtime.layer_rows is not None:
            return _by_rows(run, runtime.layer_rows, args, kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    module.forward = forward


def _by_rows(run: Callable[..., Any], count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`run` over `count` rows at a time, each part in a checkpoint. What has as many rows as the first tensor is cut, the rest shared."""
    first = next(tensors_in((args, kwargs)), None)
    rows = first.shape[0] if first is not None and first.dim() else 0
    if rows <= count:
        return checkpoint(run, *args, use_reentrant=False, **kwargs)
    outputs = []
    for start in range(0, rows, count):

        def cut(tensor: Tensor, start: int = start) -> Tensor:
            return tensor[start : start + count] if tensor.dim() and tensor.shape[0] == rows else tensor

        outputs.append(checkpoint(run, *map_tensors(args, cut), use_reentrant=False, **map_tensors(dict(kwargs), cut)))
    return _joined(outputs)


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if type(first) in (tuple, list):
        return type(first)(_joined(list(values)) for values in zip(*parts, strict=True))
    if first is None:
        return None
    raise TierwiseError(
        f"layer_batch_size cannot join the outputs of a layer that returns {type(first).__name__}; leave it out, or use a smaller "
        "micro_batch_size"
    )
