"""Dynamic loss scale for fp16."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class LossScaler:
    """Multiplies the loss so that fp16 gradients neither vanish nor overflow.

    The factor is folded into the clip coefficient by the engine, so gradients are never divided in fp16. A step whose gradients were not
    finite is skipped by the engine and halves the scale (`backoff_factor`); `growth_interval` good steps in a row grow it.
    """

    scale: float
    min_scale: float
    max_scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    good_steps: int = 0
    last_step: int = 0

    def update(self, step: int, skipped: bool) -> None:
        """Takes the decision of a step into account, each step once."""
        if step <= self.last_step:
            return
        self.last_step = step
        if skipped:
            self.scale = max(self.scale * self.backoff_factor, self.min_scale)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale = min(self.scale * self.growth_factor, self.max_scale)
            self.good_steps = 0

    def state_dict(self) -> dict[str, float]:
        """What `load_state_dict` needs to go on exactly."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continues from `state_dict`."""
        self.scale = float(state["scale"])
        self.good_steps = int(state["good_steps"])
