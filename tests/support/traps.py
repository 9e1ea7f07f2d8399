"""Small networks that go past the obvious, and checks that several tests of traps share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}
VISITING: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "stream_optim_frac": 1.0}


class Layers(nn.Module):
    """What a block is made of."""

    def __init__(self, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)


class Block(Layers):
    """Fails where a test sets `fail`."""

    fail = False

    def forward(self, *, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        hidden = torch.nn.functional.gelu(self.up(self.norm(x)))
        if self.fail:
            raise ArithmeticError("wanted by the test")
        return x + scale * self.down(hidden)


class Net(nn.Module):
    """Blocks that take keywords only; `mode` varies how they are called.

    Blocks of unequal size never come back to the slot that they had, so a stale address is not right by chance.
    """

    def __init__(self, blocks: int = 4, width: int = 32, mode: str = "plain", equal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, width)
        inner = [2 * width if equal else width * (1 + index * 3 % 4) for index in range(blocks)]
        # `Any`: what a list of modules gives back is a module that knows no `up`.
        self.blocks: Any = nn.ModuleList(Block(width, size) for size in inner)
        self.head = nn.Linear(width, 8)
        self.mode = mode

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        if self.mode == "region":
            for first in range(0, len(self.blocks), 2):
                x = checkpoint(self._pair, first, x, use_reentrant=False)
        else:
            for block in self.blocks:
                x = checkpoint(lambda x, b=block: b(x=x), x, use_reentrant=False) if self.mode == "checkpoint" else block(x=x)
                if self.mode == "twice":
                    x = block(x=x, scale=0.5)
        return self.head(x.mean(1))

    def _pair(self, first: int, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks[first : first + 2]:
            x = block(x=x)
        return x


def ids_of(step: int, rows: int = 4, seq: int = 6) -> torch.Tensor:
    return torch.randint(0, 64, (rows, seq), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    return model(ids_of(step)).square().mean()


def same(kit: Any, mode: str = "plain", loss: Any = loss_of, **options: Any) -> Any:
    """Streamed training equals plain torch in fp32, and itself on the device to the bit."""
    device = kit.fit(Net(mode=mode), loss)
    streamed = kit.fit(Net(mode=mode), loss, **{**STREAMED, **options})
    streamed.same_as(device)
    assert streamed.losses == pytest.approx(kit.plain_fit(Net(), loss).losses if mode != "twice" else device.losses, rel=1e-5)
    assert streamed.booster.stats()["fetches"] > 0
    return streamed


@contextlib.contextmanager
def pins_at(result: Any, module: nn.Module, chunk: str) -> Iterator[list[int]]:
    """How often backward pins a chunk at the moment when the gradient of a module's output is there."""
    runtime = result.booster._runtime
    index = [c.name for c in runtime.grouping.chunks].index(chunk)
    pins: list[int] = []

    def look(grad: torch.Tensor) -> None:
        pins.append(runtime.residency()[index]["backward_pins"])

    def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if not pins and output.requires_grad and torch._C._current_graph_task_id() == -1:
            output.register_hook(look)

    handle = module.register_forward_hook(watch)
    yield pins
    handle.remove()
