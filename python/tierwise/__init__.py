"""Tierwise: train models that are bigger than your GPU.

Importing this package is cheap: torch is imported by `tierwise.booster` and by `tierwise.lazy_init`, not here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tierwise._core import (
    BudgetError,
    DeviceError,
    EngineStoppedError,
    ScheduleError,
    StorageError,
    StorageStoppedError,
    TierwiseError,
    __version__,
)

if TYPE_CHECKING:
    from tierwise.gemini.model import full_parameters
    from tierwise.lazy import lazy_init
    from tierwise.sim import search, simulate

__all__ = [
    "BudgetError",
    "DeviceError",
    "EngineStoppedError",
    "ScheduleError",
    "StorageError",
    "StorageStoppedError",
    "TierwiseError",
    "__version__",
    "full_parameters",
    "lazy_init",
    "search",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "lazy_init":
        from tierwise.lazy import lazy_init

        return lazy_init
    if name == "full_parameters":
        from tierwise.gemini.model import full_parameters

        return full_parameters
    if name in ("search", "simulate"):
        from tierwise import sim

        return getattr(sim, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
