"""Hyperparameters and states of the user's optimizer, in the engine's terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from tierwise._core import Engine, Layout
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.memory import ChunkMemory

_REFUSED = ("amsgrad", "maximize", "capturable", "differentiable")

Group = tuple[float, float, float, float, float, bool]


def check_optimizer(optimizer: Optimizer) -> None:
    """Raises ValueError unless `optimizer` is a plain Adam or AdamW with options that the engine has."""
    if type(optimizer) not in (Adam, AdamW):
        raise ValueError(
            f"{type(optimizer).__name__} is not supported; the engine steps torch.optim.AdamW and torch.optim.Adam "
            "(and no subclasses of them)"
        )
    for index, group in enumerate(optimizer.param_groups):
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"param group {index} has {option}=True, which is not supported; build the optimizer without {option}")


class Hyper:
    """Reads the optimizer's param_groups; they stay the user's and may change at any time."""

    def __init__(self, optimizer: Optimizer, decoupled: bool) -> None:
        self.optimizer = optimizer
        self._decoupled = decoupled
        self._sent: tuple[list[Group], list[int]] | None = None

    def groups(self) -> list[Group]:
        """(lr, beta1, beta2, eps, weight_decay, decoupled) per group."""
        return [
            (
                float(group["lr"]),
                float(group["betas"][0]),
                float(group["betas"][1]),
                float(group["eps"]),
                float(group["weight_decay"]),
                bool(group.get("decoupled_weight_decay", self._decoupled)),
            )
            for group in self.optimizer.param_groups
        ]

    def send(self, engine: Engine, layout: Layout, grouping: Grouping) -> None:
        """Tells the engine, if anything changed."""
        of_param: dict[Any, int] = {}
        for index, group in enumerate(self.optimizer.param_groups):
            for param in group["params"]:
                of_param[param] = index
        group_of_param = [-1] * sum(len(chunk.params) for chunk in grouping.chunks)
        for index, chunk in enumerate(grouping.chunks):
            for position, param in zip(layout.param_indices(index), chunk.params, strict=True):
                group_of_param[position] = of_param.get(param, -1)
        current = (self.groups(), group_of_param)
        if current != self._sent:
            engine.set_hyper(*current)
            self._sent = current

    def check(self, trainable: dict[nn.Parameter, tuple[int, int]]) -> None:
        """Raises ValueError if the optimizer holds parameters that get gradients but were frozen or unknown at boost."""
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad and param not in trainable:
                    raise ValueError(
                        f"a parameter of shape {tuple(param.shape)} was frozen, or not in the optimizer, when booster.boost ran; it has no "
                        "optimizer state here. Set requires_grad before boosting"
                    )

    def carry_over(self, param: nn.Parameter, memory: ChunkMemory, chunk: int, position: int) -> int:
        """Moves the state that the optimizer had before boosting into the chunk; returns the parameter's step count."""
        state: dict[str, Any] = self.optimizer.state.pop(param, {})
        if not state:
            return 0
        for payload in ("exp_avg", "exp_avg_sq"):
            value = state[payload]
            assert isinstance(value, Tensor)
            memory.write_state(chunk, position, payload, value.detach().to(torch.float32))
        return int(state["step"])
