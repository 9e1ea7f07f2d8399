"""The interface between `Booster` and a way of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tierwise.gemini.runtime import Runtime


class Plugin(ABC):
    """Prepares a model and its optimizer for training; frozen once constructed."""

    @abstractmethod
    def configure(self, model: nn.Module, optimizer: Optimizer | None, dataloader: Iterable[Any] | None) -> Runtime:
        """Converts `model` and `optimizer` in place and returns what drives them."""
