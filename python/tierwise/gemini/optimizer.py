"""The user's own optimizer object, converted in place: a real `torch.optim.Optimizer` whose steps the engine runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tierwise._core import TierwiseError
from tierwise.gemini.runtime import Runtime

_STATES = ("exp_avg", "exp_avg_sq")


class GeminiOptimizer(Optimizer):
    """What `booster.boost` makes of an Adam or AdamW: `param_groups` are untouched, states live in chunks.

    `step` and `zero_grad` act at accumulation boundaries and do nothing between them. `step` returns without waiting.
    """

    _tierwise_runtime: Runtime

    @Optimizer.profile_hook_step
    def _profiled_step(self) -> None:
        self._tierwise_runtime.step()

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Commits the gradients of `gradient_accumulation_steps` backward passes; before that it does nothing.

        Raises ValueError for a closure: the forward and backward are the caller's.
        """
        if closure is not None:
            raise ValueError("step(closure) is not supported; run forward and booster.backward before step()")
        self._opt_called = True
        self._profiled_step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets a complete batch of gradients that was not stepped. Gradients are consumed by `step`, so nothing else is left."""
        self._tierwise_runtime.zero_grad()

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the latest committed step, before clipping; waits for it. None before the first step."""
        runtime = self._tierwise_runtime
        decision = runtime.engine.decision(wait=True) if runtime.ready else None
        return None if decision is None else decision[1]

    @property
    def last_step_skipped(self) -> bool:
        """Whether the latest committed step was skipped because its gradient norm was not finite; waits for the decision."""
        runtime = self._tierwise_runtime
        decision = runtime.engine.decision(wait=True) if runtime.ready else None
        return decision is not None and decision[3]

    def clip_grad_norm_(self, max_norm: float | None) -> None:
        """Clips the global gradient norm of this and coming steps to `max_norm` (None: no clipping).

        The norm itself is known after `step`, see `grad_norm`: waiting for it here would cost the overlap.
        """
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
        if not self._tierwise_runtime.ready:
            raise TierwiseError("clip_grad_norm_ before the first forward; pass max_norm to GeminiPlugin instead")
        self._tierwise_runtime.engine.max_norm = max_norm

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raises ValueError: the optimizer states of a boosted model are laid out by `booster.boost`."""
        if "_tierwise_runtime" in self.__dict__:
            raise ValueError("add_param_group after booster.boost is not supported; add the group before boosting")
        super().add_param_group(param_group)

    # ---- state --------------------------------------------------------------------------------------------------

    def param_steps(self) -> dict[nn.Parameter, int]:
        """Optimizer steps that every parameter took; unused parameters take none."""
        runtime = self._tierwise_runtime
        counts = runtime.engine.param_steps() if runtime.ready else [0] * sum(len(c.params) for c in runtime.grouping.chunks)
        return {param: counts[runtime.layout.param_indices(chunk)[position]] for param, (chunk, position) in runtime.trainable.items()}

    def read_state(self, param: nn.Parameter) -> dict[str, Tensor]:
        """fp32 CPU copies of `exp_avg`, `exp_avg_sq` and (16-bit training) `master`; call after `Runtime.flush`."""
        runtime = self._tierwise_runtime
        chunk, position = runtime.trainable[param]
        state = {name: runtime.memory.read_state(chunk, position, name).to("cpu", copy=True) for name in _STATES}
        if runtime.plugin.precision != "fp32":
            state["master"] = runtime.memory.read_master(chunk, position)
        return state

    def write_state(self, param: nn.Parameter, state: dict[str, Any]) -> None:
        """Sets moments, and the parameter itself if there is a `master`; call after `Runtime.flush`."""
        runtime = self._tierwise_runtime
        chunk, position = runtime.trainable[param]
        for name in _STATES:
            if name not in state:
                raise ValueError(
                    f"optimizer state of {runtime.grouping.names[param][0]!r} has no {name!r}, only {', '.join(sorted(state))}"
                )
            value = state[name]
            if value.shape != param.shape:
                raise ValueError(
                    f"{name} of {runtime.grouping.names[param][0]!r} has shape {tuple(value.shape)}, expected {tuple(param.shape)}"
                )
            runtime.memory.write_state(chunk, position, name, value.to(torch.float32))
        if "master" in state:
            runtime.memory.write_param(chunk, position, state["master"].to(torch.float32), trainable=True)

    def packed_groups(self) -> list[dict[str, Any]]:
        """param_groups with parameters replaced by their indices, as torch.optim does it."""
        groups, start = [], 0
        for group in self.param_groups:
            packed = {key: value for key, value in group.items() if key != "params"}
            packed["params"] = list(range(start, start + len(group["params"])))
            start += len(group["params"])
            groups.append(packed)
        return groups

    def indexed_params(self) -> list[nn.Parameter]:
        """Parameters in the order of their indices in `state_dict`."""
        return [param for group in self.param_groups for param in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """torch.optim's format, gathered on the CPU: step, exp_avg, exp_avg_sq and, in 16-bit training, the fp32 `master`.

        Takes as much CPU memory as the states themselves; `booster.save_optimizer` streams instead.
        """
        runtime = self._tierwise_runtime
        state: dict[int, dict[str, Any]] = {}
        if runtime.ready:
            runtime.flush()
            steps = self.param_steps()
            for index, param in enumerate(self.indexed_params()):
                if steps.get(param):
                    state[index] = {"step": torch.tensor(float(steps[param])), **self.read_state(param)}
        else:
            for index, param in enumerate(self.indexed_params()):
                if param in self.state:
                    state[index] = dict(self.state[param])
        return {"state": state, "param_groups": self.packed_groups()}

    def load_groups(self, groups: list[dict[str, Any]]) -> None:
        """Takes over hyperparameters from saved param_groups. Raises ValueError if their sizes differ."""
        saved = [len(group["params"]) for group in groups]
        own = [len(group["params"]) for group in self.param_groups]
        if saved != own:
            raise ValueError(f"the saved optimizer has param groups of {saved} parameters, this one has {own}")
        for group, source in zip(self.param_groups, groups, strict=True):
            group.update({key: value for key, value in source.items() if key != "params"})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from `state_dict` of this class or of a plain Adam or AdamW with the same groups.

        Without a `master` the parameters keep their present values. Raises ValueError if groups or shapes differ.
        """
        runtime = self._tierwise_runtime
        self.load_groups(state_dict["param_groups"])
        params = self.indexed_params()
        entries = {int(index): dict(entry) for index, entry in state_dict["state"].items()}
        if not runtime.ready:
            # Memory is filled at the first forward: it carries over what is here then.
            for index, entry in entries.items():
                self.state[params[index]] = entry
            return
        runtime.flush()
        self.load_steps({params[index]: int(entry["step"]) for index, entry in entries.items()})
        for index, entry in entries.items():
            if params[index] in runtime.trainable:
                self.write_state(params[index], entry)
        runtime.target.synchronize()

    def load_steps(self, steps: dict[nn.Parameter, int]) -> None:
        """Sets every parameter's step count; parameters that are not named have taken none, so their moments become zero."""
        runtime = self._tierwise_runtime
        counts = [0] * sum(len(chunk.params) for chunk in runtime.grouping.chunks)
        for param, (chunk, position) in runtime.trainable.items():
            counts[runtime.layout.param_indices(chunk)[position]] = steps.get(param, 0)
            if not steps.get(param):
                for name in _STATES:
                    runtime.memory.set_state(chunk, position, name, torch.zeros(()))
        runtime.engine.set_param_steps(counts)


# LR schedulers look for these: `step` was "wrapped" by their convention, so they leave it alone.
GeminiOptimizer.step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
GeminiOptimizer.step.hooked = True  # type: ignore[attr-defined]


def convert(optimizer: Optimizer, runtime: Runtime) -> None:
    """Makes `optimizer` a `GeminiOptimizer`, the same object: schedulers that hold it keep working."""
    own = type(optimizer)
    optimizer.__class__ = type(f"Gemini{own.__name__}", (GeminiOptimizer, own), {"__module__": __name__})
    # An LR scheduler may have patched `step` on the instance.
    optimizer.__dict__.pop("step", None)
    optimizer.__dict__["_tierwise_runtime"] = runtime
    for param in runtime.trainable:
        param.__dict__["_tierwise_managed"] = True
    _warn_about_torch_clipping()


def _warn_about_torch_clipping() -> None:
    original = nn.utils.clip_grad_norm_
    if getattr(original, "_tierwise", False):
        return

    def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        if any("_tierwise_managed" in tensor.__dict__ for tensor in tensors):
            warnings.warn(
                "torch.nn.utils.clip_grad_norm_ sees no gradients on a boosted model and clips nothing; pass max_norm to GeminiPlugin or "
                "call optimizer.clip_grad_norm_(max_norm)",
                UserWarning,
                stacklevel=2,
            )
        return original(tensors, *args, **kwargs)

    clip_grad_norm_._tierwise = True  # type: ignore[attr-defined]
    clip_grad_norm_.__doc__ = original.__doc__
    nn.utils.clip_grad_norm_ = clip_grad_norm_
