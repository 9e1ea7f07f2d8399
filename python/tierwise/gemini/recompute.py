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
from tierwise.gemini.inputs import first_rows, map_tensors

if TYPE_CHECKING:
    from tierwise.gemini.runtime import Runtime


def checkpoints_itself(module: nn.Module) -> bool:
    """Whether Hugging Face's own gradient checkpointing is on for this layer."""
    return getattr(module, "gradient_checkpointing", False) is True


def recomputes_whole(module: nn.Module) -> bool:
    """Whether a recomputation of this layer runs its whole forward: Hugging Face's reentrant checkpoint does, and a compiled layer saves
    all of its tensors at its end."""
    checkpointing = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    reentrant = checkpoints_itself(module) and checkpointing.get("use_reentrant") is True
    return reentrant or any(
        getattr(part, "_compiled_call_impl", None) is not None or hasattr(part.forward, "_torchdynamo_orig_callable")
        for part in module.modules()
    )


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
        if runtime.layer_rows is not None and runtime.micro_rows > runtime.layer_rows:
            name = runtime.grouping.units[index].name
            return _by_rows(run, name, runtime.micro_rows, runtime.layer_rows, args, kwargs)
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    module.forward = forward


def _by_rows(run: Callable[..., Any], name: str, rows: int, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`run` over `count` of the micro-batch's `rows` at a time, each part in a checkpoint. Tensors with as many rows are cut, others are
    shared. Raises TierwiseError for a layer whose rows are not the first dimension of what it takes and gives."""
    if first_rows(args, kwargs) != rows:
        raise TierwiseError(
            f"layer_batch_size={count} cuts the first dimension, but that of {name!r}'s input is {first_rows(args, kwargs)} and the "
            f"micro-batch has {rows} rows; leave layer_batch_size out"
        )
    parts = -(-rows // count)
    cut: dict[int, tuple[Tensor, ...]] = {}

    def part(tensor: Tensor, index: int) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != rows:
            return tensor
        if id(tensor) not in cut:
            # One node for all parts: backward of a slice would fill a tensor of the whole size, part by part.
            cut[id(tensor)] = tensor.split(count)
        return cut[id(tensor)][index]

    outputs = []
    for index in range(parts):
        own = map_tensors(args, functools.partial(part, index=index))
        named = map_tensors(dict(kwargs), functools.partial(part, index=index))
        outputs.append(checkpoint(run, *own, use_reentrant=False, **named))
    return _joined(outputs, [min(count, rows - index * count) for index in range(parts)], name)


def _joined(parts: list[Any], rows: list[int], name: str) -> Any:
    first = parts[0]
    if isinstance(first, Tensor) and all(part.dim() and part.shape[0] == count for part, count in zip(parts, rows, strict=True)):
        return torch.cat(parts)
    if type(first) in (tuple, list):
        return type(first)(_joined(list(values), rows, name) for values in zip(*parts, strict=True))
    if first is None:
        return None
    what = f"a tensor of shape {tuple(first.shape)} for {rows[0]} rows" if isinstance(first, Tensor) else type(first).__name__
    raise TierwiseError(
        f"layer_batch_size cannot join the outputs of {name!r}, which returns {what}; leave it out, or use a smaller micro_batch_size"
    )
