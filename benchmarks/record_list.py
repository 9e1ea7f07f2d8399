"""The configurations that `record.py` records."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from llama import fields

from tierwise.config import parse_bytes

PLACEMENTS: dict[str, dict[str, float]] = {
    "device": {"offload_optim_frac": 0.0},
    "half": {"offload_optim_frac": 0.5},
    "host": {"offload_optim_frac": 1.0},
    "stream-half": {"offload_optim_frac": 1.0, "offload_param_frac": 0.5},
    "stream": {"offload_optim_frac": 1.0, "offload_param_frac": 1.0},
}
CLIPS: dict[str, float | None] = {"fires": 1e-4, "quiet": 1e6, "off": None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configuration:
    """One training run; `tokens` per optimizer step."""

    size: str
    placement: str
    """A key of `PLACEMENTS`, or a device budget such as "auto:20GB" that the planner fills."""
    micro_batch: int
    tokens: int
    seq: int = 4096
    recompute: Literal["none", "full", "auto"] = "none"
    clip_mode: Literal["defer", "speculate", "auto"] = "defer"
    clip: str = "fires"
    beyond: bool = False
    """The budget is more than the device has: whether it fits is the device's answer, not the planner's."""
    offload: bool = False
    """All activations that are not recomputed go to host memory."""
    timed: int | None = None
    """Steps; None: by the size of the model."""

    @property
    def name(self) -> str:
        """Unique in a list."""
        parts = [self.size, self.placement, f"{self.micro_batch}x{self.seq}", f"{self.tokens // 1024}k", self.recompute]
        return " ".join([*parts, self.clip_mode, self.clip, *(["offload"] if self.offload else [])])

    @property
    def timed_steps(self) -> int:
        """How many steps are timed: hosts vary from step to step, and short steps are cheap."""
        return {"350m": 21, "1b": 13, "2b": 11, "7b-8-layers": 11}.get(self.size, 7) if self.timed is None else self.timed

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step."""
        return self.tokens // (self.micro_batch * self.seq)

    def model(self) -> dict[str, int]:
        """Fields of a LLaMA's config.json."""
        return fields(self.size, max(self.seq, 2048), 512 if self.size == "tiny" else 32000)

    def config(self) -> dict[str, Any]:
        """The same as the simulator reads it; sequences only bound it."""
        return {"model_type": "llama", **fields(self.size, 4096, 512 if self.size == "tiny" else 32000)}

    def budgets(self) -> dict[str, Any]:
        """Budgets as the plugin takes them."""
        if self.placement.startswith("auto:"):
            return {"device_budget": self.placement.removeprefix("auto:"), **self.host_budget()}
        return {**({"device_budget": "200GB"} if self.beyond else {}), **self.host_budget()}

    def host_budget(self) -> dict[str, Any]:
        """A fixed one, so that it is known without asking the machine."""
        return {"host_budget": "1GB" if self.size == "tiny" else "110GB"}

    def plugin_options(self) -> dict[str, Any]:
        """Options of `GeminiPlugin`."""
        static = PLACEMENTS.get(self.placement)
        placed: dict[str, Any] = {"placement_policy": "auto"} if static is None else {"placement_policy": "static", **static}
        return {
            **placed,
            **self.budgets(),
            "offload_activations": "full" if self.offload else "none",
            "recompute": self.recompute,
            "clip_mode": self.clip_mode,
            "max_norm": CLIPS[self.clip],
        }

    def request(self) -> dict[str, Any]:
        """The same in the schema of `validate`."""
        static = PLACEMENTS.get(self.placement)
        placed: Any = "auto" if static is None else {"static": {"shard_param_frac": 1.0, "offload_param_frac": 0.0, **static}}
        budgets = {name: parse_bytes(value) for name, value in self.budgets().items()}
        return {
            "placement": placed,
            **budgets,
            "recompute": self.recompute,
            "clip_mode": self.clip_mode,
            "clips": self.clip == "fires",
            "has_max_norm": self.clip != "off",
        }


def _of(size: str, placement: str, micro_batch: int, thousand_tokens: int, recompute: str = "none", **more: Any) -> Configuration:
    tokens = thousand_tokens * 1024
    return Configuration(size=size, placement=placement, micro_batch=micro_batch, tokens=tokens, recompute=recompute, **more)  # type: ignore[arg-type]


FULL = [
    _of("350m", "device", 4, 16),
    _of("350m", "host", 4, 16),
    _of("1b", "device", 4, 16, "full"),
    _of("1b", "host", 4, 16, "full"),
    _of("1b", "stream", 4, 16, "full"),
    _of("7b-8-layers", "device", 4, 16, "full"),
    _of("7b-8-layers", "host", 4, 16),
    _of("350m", "device", 4, 16, "full"),
    _of("350m", "device", 1, 4),
    _of("350m", "device", 8, 32, clip="off"),
    _of("350m", "device", 2, 32),
    _of("350m", "host", 4, 16, clip_mode="speculate", clip="quiet"),
    _of("350m", "host", 4, 16, clip_mode="speculate"),
    _of("350m", "host", 8, 32),
    _of("350m", "host", 2, 32),
    _of("350m", "half", 4, 16),
    _of("350m", "stream", 4, 16, "full"),
    _of("350m", "stream", 8, 32),
    _of("350m", "stream-half", 4, 16),
    _of("350m", "auto:8GB", 4, 16, "auto"),
    _of("1b", "device", 4, 16),
    _of("1b", "device", 2, 8),
    _of("1b", "host", 4, 16),
    _of("1b", "host", 4, 16, clip_mode="speculate", clip="quiet"),
    _of("1b", "host", 8, 32, "full"),
    _of("1b", "half", 4, 16),
    _of("1b", "host", 2, 32),
    _of("1b", "auto:30GB", 4, 32, "auto"),
    _of("1b", "auto:20GB", 4, 16, "auto"),
    _of("7b-8-layers", "device", 2, 8),
    _of("7b-8-layers", "host", 4, 16, "full"),
    _of("7b-8-layers", "stream", 4, 16, "full"),
    _of("7b-8-layers", "auto:30GB", 4, 16, "auto"),
    _of("7b", "auto:78GB", 4, 16, "auto", timed=3),
    _of("350m", "device", 32, 128, beyond=True, timed=2),
    _of("1b", "device", 16, 64, beyond=True, timed=2),
    _of("350m", "host", 4, 16, clip_mode="auto", clip="quiet"),
    _of("350m", "host", 16, 16, seq=1024),
    _of("350m", "device", 8, 16, seq=2048),
    _of("350m", "device", 20, 80, timed=3),
    _of("350m", "auto:6GB", 8, 32, "auto"),
    _of("1b", "stream", 4, 32, "full"),
    _of("1b", "device", 4, 32),
    _of("1b", "auto:14GB", 8, 32, "auto"),
    _of("1b", "host", 4, 16, clip_mode="auto", clip="quiet"),
    _of("7b-8-layers", "half", 4, 16),
    _of("7b-8-layers", "host", 2, 32),
    _of("7b-8-layers", "host", 4, 16, clip_mode="speculate", clip="quiet"),
    _of("350m", "device", 4, 16, offload=True),
    _of("1b", "device", 4, 16, offload=True),
    _of("1b", "host", 4, 16, offload=True),
    _of("7b-8-layers", "device", 4, 16, offload=True),
    _of("1b", "device", 8, 32, timed=3),
    _of("7b", "auto:78GB", 8, 32, "auto", timed=2),
    _of("7b", "auto:78GB", 2, 32, "auto", timed=2),
    _of("7b", "device", 1, 4, "full", beyond=True, timed=2),
]

TINY = [
    Configuration(size="tiny", placement="device", micro_batch=2, tokens=256, seq=64, timed=2),
    Configuration(size="tiny", placement="host", micro_batch=2, tokens=128, seq=64, timed=2),
    Configuration(size="tiny", placement="stream", micro_batch=2, tokens=128, seq=64, recompute="full", timed=2),
    Configuration(size="tiny", placement="host", micro_batch=2, tokens=128, seq=64, clip_mode="speculate", clip="quiet", timed=2),
    Configuration(size="tiny", placement="auto:3MB", micro_batch=2, tokens=128, seq=64, recompute="auto", timed=2),
    Configuration(size="tiny", placement="device", micro_batch=2, tokens=256, seq=64, offload=True, timed=2),
    Configuration(size="tiny", placement="auto:100KB", micro_batch=2, tokens=128, seq=64, timed=2),
]


def _of_size(size: str, budget: str) -> list[Configuration]:
    """Every placement, with what changes a step where it is the device or the host that bounds it."""
    return [
        _of(size, "device", 4, 16),
        _of(size, "host", 4, 16),
        _of(size, "stream", 4, 16, "full"),
        _of(size, f"auto:{budget}", 4, 16, "auto"),
        _of(size, "device", 4, 16, "full"),
        _of(size, "half", 4, 16),
        _of(size, "host", 4, 16, "full"),
        _of(size, "host", 2, 32),
        _of(size, "host", 4, 16, clip_mode="speculate", clip="quiet"),
        _of(size, "device", 2, 8, clip="off"),
        _of(size, "host", 8, 32, "full"),
        _of(size, "stream", 4, 32, "full"),
        _of(size, f"auto:{budget}", 4, 32, "auto"),
    ]


LARGE = [
    *(run for runs in zip(_of_size("1b", "20GB"), _of_size("2b", "25GB"), _of_size("7b-8-layers", "25GB"), strict=True) for run in runs),
    _of("1b", "host", 4, 16, clip_mode="speculate"),
    _of("2b", "host", 4, 16, clip_mode="auto", clip="quiet"),
    _of("1b", "device", 4, 16, offload=True),
    _of("2b", "device", 4, 16, offload=True),
    _of("7b", "auto:78GB", 4, 16, "auto", timed=3),
    _of("1b", "device", 16, 64, beyond=True, timed=2),
    _of("7b", "device", 1, 4, "full", beyond=True, timed=2),
    _of("1b", "device", 24, 96, beyond=True, timed=2),
    _of("7b", "device", 4, 16, beyond=True, timed=2),
]
"""Models of which a step takes longer than Python does to launch it; every size comes before the next placement does."""

LISTS = {"full": FULL, "large": LARGE, "tiny": TINY}
