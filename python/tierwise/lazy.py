"""`lazy_init`: build a model without memory for its parameters; `booster.boost` fills it chunk by chunk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from torch import nn


@contextlib.contextmanager
def lazy_init(checkpoint: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Modules built inside have parameters on the meta device and real buffers.

    `booster.boost` (or the first forward, where the plan is made then) gives them values, one chunk at a time: from `checkpoint`, a
    safetensors file or a directory with `model.safetensors` or `model.safetensors.index.json`; without one by the modules' own
    initialisation (Hugging Face `_init_weights`, else `reset_parameters`). Random values differ from those of a model built eagerly with
    the same seed, because they are drawn in another order.

    Raises FileNotFoundError if `checkpoint` does not exist.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None and not path.exists():
        raise FileNotFoundError(f"lazy_init: no checkpoint at {path}")
    original = nn.Module.register_parameter

    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        original(self, name, param)
        if param is None or param.is_meta:
            return
        lazy = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        lazy.__dict__.update(param.__dict__)
        if path is not None:
            lazy.__dict__["_tierwise_checkpoint"] = str(path)
        self._parameters[name] = lazy

    # `Parameter(torch.empty(...))` has touched no page yet when it arrives here, so even a huge one costs nothing.
    nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def is_lazy(model: nn.Module) -> bool:
    """Whether any parameter of `model` has no values yet."""
    return any(param.is_meta for param in model.parameters())


def attach_checkpoint(model: nn.Module, checkpoint: str | os.PathLike[str]) -> None:
    """The values of a lazily built model will come from `checkpoint`."""
    for param in model.parameters():
        if param.is_meta:
            param.__dict__["_tierwise_checkpoint"] = str(checkpoint)
