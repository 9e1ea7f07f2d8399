"""LR schedulers step at accumulation boundaries only."""

from __future__ import annotations

from typing import Any

from tierwise.gemini.runtime import Runtime


def convert(lr_scheduler: Any, runtime: Runtime) -> None:
    """Makes `lr_scheduler.step()` do nothing between accumulation boundaries; the object and its state dict stay the same."""
    own = type(lr_scheduler)

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if runtime.window_open:
            return None
        return own.step(self, *args, **kwargs)

    lr_scheduler.__class__ = type(own.__name__, (own,), {"step": step, "__module__": own.__module__, "__doc__": own.__doc__})
