"""Recomputation per unit: `unit.forward` runs inside a non-reentrant checkpoint where the plan says so.

The wrap is at `forward`, inside the unit's hooks: they see the forward once, and the wrapped function notices by itself that it runs again
inside a backward.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tierwise.gemini.hooks import in_graph_task

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
        return checkpoint(run, *args, use_reentrant=False, **kwargs)

    module.forward = forward
