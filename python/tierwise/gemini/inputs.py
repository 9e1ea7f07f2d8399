"""Tensors inside the arguments and results of modules, and what a batch's say about its size."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def count_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Tokens of a batch: elements of its first integer tensor, else rows of its first floating one."""
    tensors = list(tensors_in((args, kwargs)))
    for tensor in tensors:
        if not tensor.is_floating_point():
            return max(tensor.numel(), 1)
    return max(tensors[0].numel() // max(tensors[0].shape[-1], 1), 1) if tensors and tensors[0].dim() else 1


def first_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of a forward's inputs: the first dimension of the first tensor; 1 without any."""
    first = next(tensors_in((args, kwargs)), None)
    return first.shape[0] if first is not None and first.dim() else 1


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors inside tuples, lists, mappings (model outputs are such) and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def map_tensors(value: Any, function: Any) -> Any:
    """`value` with every tensor inside plain tuples, lists and dicts replaced by `function(tensor)`."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(map_tensors(item, function) for item in value)
    if type(value) is dict:
        return {key: map_tensors(item, function) for key, item in value.items()}
    return value
