"""Traces one forward without data: which unit runs when, what autograd saves in it, how many FLOPs it has.

The model runs once on fake tensors (torch's FakeTensorMode) that stand for the compute device, so attention picks the implementation that
it would pick there, no memory is touched, and neither random state nor buffers change.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tierwise._core import TierwiseError
from tierwise.gemini.chunking import Grouping, Unit
from tierwise.gemini.inputs import count_tokens, first_rows, map_tensors, tensors_in
from tierwise.gemini.model_trace import ModelTrace, UnitTrace
from tierwise.gemini.offloaded import MIN_BYTES, REGION_BYTES
from tierwise.kernels.masks import without_packing
from tierwise.kernels.rematerialize import recipe_of

_log = logging.getLogger("tierwise")
_ONE_AT_A_TIME = threading.Lock()
"""The compiler's stance and the random state that a trace changes and restores are the process's."""


def trace(
    model: nn.Module, grouping: Grouping, args: tuple[Any, ...], kwargs: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> ModelTrace:
    """Traces `model(*args, **kwargs)` in training mode with parameters of `dtype` on `device`; inputs give shapes and dtypes only.

    A model that cannot run without data (its control flow reads values) is estimated instead, see `estimate`.
    """
    tokens = count_tokens(args, kwargs)
    attempts = [dict(kwargs)]
    if kwargs.get("attention_mask") is not None:
        # Mask code often looks at the values; the mask itself changes little of what is saved.
        attempts.append({key: value for key, value in kwargs.items() if key != "attention_mask"})
    for attempt in attempts:
        try:
            return _run(model, grouping, args, attempt, dtype, device, tokens)
        except TierwiseError:
            # Ours (a fused loss that does not fit, a refused budget): not a model that needs data.
            raise
        except Exception as error:
            _log.debug("tracing %s failed: %s", type(model).__name__, error, exc_info=True)
            failure = error
    _log.warning(
        "%s cannot be traced without data (%s: %s); its activations are estimated and corrected after the first step",
        type(model).__name__,
        type(failure).__name__,
        str(failure).split("\n", 1)[0],
    )
    return estimate(grouping, tokens, dtype)


class FusedLossMismatchError(TierwiseError):
    """The tensor that reaches the loss is not what the output embedding returned: the fused loss would be wrong."""


def estimate(grouping: Grouping, tokens: int, dtype: torch.dtype) -> ModelTrace:
    """A trace without running the model: units in definition order; a linear layer saves its input and what follows it saves its output,
    every other owner of parameters saves two tensors as wide as its last dimension."""
    traced = []
    for unit in grouping.units:
        values = 0
        width = 0
        numel = sum(param.numel() for param in unit.params)
        for module in unit.module.modules() if unit.recomputable else [unit.module]:
            if isinstance(module, nn.Linear):
                values += module.in_features + module.out_features
                width = width or module.in_features
            else:
                values += sum(2 * param.shape[-1] for param in module.parameters(recurse=False) if param.dim() > 0)
        saved = values * tokens * dtype.itemsize
        traced.append(
            UnitTrace(
                saved_bytes=saved,
                input_bytes=width * tokens * dtype.itemsize,
                flops=2.0 * numel * tokens,
                offload_bytes=saved,
                offload_host_bytes=saved,
            )
        )
    order = list(range(len(grouping.units)))
    ops = [(unit, "forward") for unit in order] + [(unit, "backward") for unit in reversed(order)]
    return ModelTrace(order, traced, ops, 0, tokens, exact=False)


@dataclasses.dataclass
class _Call:
    """A unit that runs."""

    flops: float
    """Before it began."""
    stops_early: bool
    """Whether its recomputation would stop at the last tensor that is saved in it, and that is seen here."""


class _Recorder:
    """Counts what units save while the fake forward runs."""

    def __init__(self, grouping: Grouping, params: set[int], flops: FlopCounterMode) -> None:
        self.order: list[int] = []
        self.units: dict[int, UnitTrace] = {}
        self.forward: list[int] = []
        self._leaves: list[tuple[list[int], list[Tensor]]] = []
        self.outer = 0
        self.alive: list[Tensor] = []
        self.regions: dict[int, set[int]] = {}
        self._region_hooks: list[object] = []
        self._params = params
        self._saved: dict[int, tuple[int, set[int]]] = {}
        """Storage -> (bytes, units that save it); -1 stands for none."""
        self._first: dict[int, int] = {}
        self._inputs: set[int] = set()
        self._stack: list[int] = []
        self._flops = flops
        self._last_flops = 0.0
        self._flops_at_save = 0.0
        """FLOPs before the latest tensor that something saved. A parameter counts too: a recomputation has to come to where it is saved."""
        self._calls: list[_Call] = []

    def pack(self, tensor: Tensor) -> Tensor:
        self._flops_at_save = float(self._flops.get_total_flops())
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._params:
            return tensor.detach()
        unit = self._stack[-1] if self._stack else -1
        saved = self._saved.get(key)
        if saved is None:
            self._saved[key] = storage.nbytes(), {unit}
            self._first[key] = unit
            self.alive.append(tensor.detach())
            if self._stack:
                traced = self.units[unit]
                traced.saved_bytes += storage.nbytes()
                recipe = recipe_of(tensor)
                if recipe is not None:
                    traced.cheap_bytes += storage.nbytes()
                    traced.cheap_traffic_bytes += recipe.traffic_bytes
            else:
                self.outer += storage.nbytes()
        else:
            saved[1].add(unit)
        return tensor.detach()

    def count_offloadable(self, lasting: set[int]) -> None:
        """What offloading would move; `lasting` storages are there anyway."""
        for key, (nbytes, units) in self._saved.items():
            first = self._first[key]
            if first < 0 or nbytes < MIN_BYTES or key in lasting:
                continue
            traced = self.units[first]
            traced.offload_host_bytes += -(-nbytes // REGION_BYTES) * REGION_BYTES
            if units == {first}:
                traced.offload_bytes += nbytes

    def _attribute_flops(self) -> None:
        total = float(self._flops.get_total_flops())
        if self._stack:
            self.units[self._stack[-1]].flops += total - self._last_flops
        self._last_flops = total

    def enter(self, unit: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._attribute_flops()
        if unit not in self.units:
            self.units[unit] = UnitTrace(rows=first_rows(args, kwargs))
            self.order.append(unit)
        for tensor in tensors_in((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._inputs and storage._cdata not in self._params:
                self._inputs.add(storage._cdata)
                self.alive.append(tensor.detach())
                self.units[unit].input_bytes += storage.nbytes()
        self.forward.append(unit)
        self._stack.append(unit)
        for outer in self._calls:
            outer.stops_early = False  # What comes last in it may be this unit's.
        self._calls.append(_Call(self._last_flops, torch.is_grad_enabled()))
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is not None and hooks[0] != self.pack:
            # Somebody else's hooks are innermost: a checkpoint. What it recomputes, it recomputes together.
            self._calls[-1].stops_early = False
            self._region_hooks.append(hooks)
            self.regions.setdefault(id(hooks[0]), set()).add(unit)

    def leave(self, unit: int, output: Any) -> None:
        self._attribute_flops()
        if self._stack and self._stack[-1] == unit:
            self._stack.pop()
            call = self._calls.pop()
            # Without anything computed before the last tensor that was saved here, a checkpoint inside of it has seen the others.
            if call.stops_early and self._flops_at_save > call.flops:
                self.units[unit].tail_flops += self._last_flops - self._flops_at_save
        outputs = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        if not outputs:
            return
        if self._leaves and outputs[0] is self._leaves[-1][1][0]:
            # A parent that returns its child's output: gradient hooks of one tensor run in the order of registration, child first.
            self._leaves[-1][0].append(unit)
        else:
            self._leaves.append(([unit], outputs))

    def backward(self) -> list[int]:
        """Units in the order in which their backward will be entered."""
        return [unit for units, _ in reversed(self._leaves) for unit in units]


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *args: Any, **kwargs: Any) -> int:
    """FLOPs of attention over shapes (batch, heads, tokens, head size). Before 2.15 torch's own formula refuses fewer key than query
    heads."""
    batch, heads, tokens, size = query
    return 2 * batch * heads * tokens * key[2] * (size + value[3])


_FLOPS = {
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
}


def _run(
    model: nn.Module,
    grouping: Grouping,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
) -> ModelTrace:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(_training_mode(model))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_packing(model, args, kwargs))
        mode = stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fake: dict[str, Tensor] = {}
        for param, names in grouping.names.items():
            value = torch.empty(param.shape, dtype=dtype, device=device, requires_grad=param.requires_grad)
            fake.update(dict.fromkeys(names, value))
        params = {value.untyped_storage()._cdata for value in fake.values()}
        lasting: set[int] = set()
        for name, buffer in model.named_buffers(remove_duplicate=False):
            fake[name] = torch.empty_like(mode.from_tensor(buffer), device=device)
            lasting.add(fake[name].untyped_storage()._cdata)

        def to_fake(tensor: Tensor) -> Tensor:
            target = dtype if tensor.is_floating_point() else tensor.dtype
            return torch.empty(tensor.shape, dtype=target, device=device)

        args, kwargs = map_tensors(args, to_fake), map_tensors(dict(kwargs), to_fake)
        flops = stack.enter_context(FlopCounterMode(display=False, custom_mapping=_FLOPS))
        recorder = _Recorder(grouping, params, flops)
        for index, unit in enumerate(grouping.units):
            stack.enter_context(_recording(recorder, index, unit))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda tensor: tensor))
        output = torch.func.functional_call(model, fake, args, dict(kwargs))
        del output
        recorder.count_offloadable(lasting)
    position = {unit: i for i, unit in enumerate(recorder.order)}
    called = [recorder.units[unit] for unit in recorder.order]
    # Units that this forward did not call are known to the engine too: another forward may call them.
    rest = [unit for unit in range(len(grouping.units)) if unit not in position]
    ops = [(position[unit], "forward") for unit in recorder.forward]
    ops += [(position[unit], "backward") for unit in recorder.backward()]
    return ModelTrace(
        recorder.order + rest,
        called + [UnitTrace() for _ in rest],
        ops,
        recorder.outer,
        tokens,
        True,
        list(recorder.regions.values()),
        first_rows(args, kwargs),
    )


@contextlib.contextmanager
def _recording(recorder: _Recorder, index: int, unit: Unit) -> Iterator[None]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.enter(index, args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        recorder.leave(index, output)

    handles = [unit.module.register_forward_pre_hook(before, with_kwargs=True), unit.module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Training mode without gradient checkpointing; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    checkpointing = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]
    try:
        model.train()
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]
