"""Outputs of cheap kernels that backward makes again instead of keeping them.

A normalization and the product of a gated MLP move a few bytes per value and take a percent of a layer's time, but what they write is a
quarter of what the layer saves, and their inputs are saved anyway. The same kernel on the same inputs gives the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

_ATTRIBUTE = "_tierwise_recipe"


class Recipe:
    """How to make a tensor again. Several saved views share what was made; it is dropped after the last of them."""

    __slots__ = ("_left", "_uses", "_value", "make", "traffic_bytes")

    def __init__(self, make: Callable[[], Tensor], traffic_bytes: int) -> None:
        self.make = make
        self.traffic_bytes = traffic_bytes
        """Bytes of device memory that making it moves."""
        self._uses = 0
        self._left = 0
        self._value: Tensor | None = None

    def saved(self) -> None:
        """One more saved tensor will ask for it."""
        self._uses += 1

    def take(self) -> Tensor:
        """The tensor, made by the first that asks."""
        value = self._value
        if value is None:
            with torch.no_grad():
                value = self._value = self.make()
            self._left = self._uses
        self._left -= 1
        if self._left <= 0:
            self._value = None
        return value


def attach(output: Tensor, recipe: Recipe) -> Tensor:
    """Tells the saved-tensor hooks how to make `output` again. Whoever saves it keeps what the recipe needs too. A compiled graph decides
    itself what it saves."""
    if not torch.compiler.is_compiling():
        setattr(output, _ATTRIBUTE, recipe)
        if output._base is not None:
            # A kernel that returns a view: views of it name the same base, not the output.
            setattr(output._base, _ATTRIBUTE, recipe)
    return output


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe of a tensor, or of the one that it is a view of."""
    found = getattr(tensor, _ATTRIBUTE, None)
    if found is None and tensor._base is not None:
        found = getattr(tensor._base, _ATTRIBUTE, None)
    return found if isinstance(found, Recipe) else None


@dataclasses.dataclass(frozen=True, slots=True)
class Rematerialized:
    """A saved view of a tensor that is made again."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: Tensor, recipe: Recipe) -> Rematerialized:
        """What stands for `tensor`."""
        recipe.saved()
        return Rematerialized(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def tensor(self) -> Tensor:
        """The view, of a tensor made now."""
        return torch.as_strided(self.recipe.take(), self.shape, self.stride, self.offset)
