"""The boosted model as users see it: `state_dict` gathers, `load_state_dict` writes through, `full_parameters` lends real tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tierwise.gemini.runtime import Runtime, runtime_of


def gather(runtime: Runtime, param: nn.Parameter, device: torch.device | str = "cpu") -> Tensor:
    """A copy of a parameter in the model's dtype; call after `Runtime.flush`."""
    chunk, position = runtime.grouping.place[param]
    return runtime.memory.read_param(chunk, position).detach().to(device, copy=True)


def install_state_dict_hooks(runtime: Runtime) -> None:
    """`state_dict()` of the model and of every submodule gives full CPU tensors; tied names share theirs."""
    cache: dict[str, Any] = {"of": None, "values": {}}

    def after(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
        if not runtime.ready:
            return
        if cache["of"] is None or cache["of"]() is not state:
            runtime.flush()
            cache["of"], cache["values"] = weakref.ref(state), weakref.WeakValueDictionary()
        for name, param in module._parameters.items():
            if param is not None and prefix + name in state:
                value = cache["values"].get(id(param))
                if value is None:
                    value = cache["values"][id(param)] = gather(runtime, param)
                state[prefix + name] = value

    def before_load(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
        if runtime.ready:
            runtime.flush()
            for param in module._parameters.values():
                if param is not None:
                    param.data = gather(runtime, param, runtime.target.torch_device)

    def after_load(module: nn.Module, incompatible: Any) -> None:
        if runtime.ready:
            for name, param in module._parameters.items():
                if param is None:
                    continue
                if param not in runtime.grouping.place:
                    raise ValueError(f"load_state_dict(assign=True) replaced {name!r}; boosted parameters can only be copied into")
                _write_back(runtime, param)

    for module in runtime.model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_state_dict_post_hook(after)
            module.register_load_state_dict_pre_hook(before_load)
            module.register_load_state_dict_post_hook(after_load)


def _write_back(runtime: Runtime, param: nn.Parameter) -> None:
    chunk, position = runtime.grouping.place[param]
    runtime.memory.write_param(chunk, position, param.data, param in runtime.trainable)
    if chunk in runtime.memory.resident:
        param.data = runtime.memory.views(runtime.memory.resident[chunk], chunk)[position]
    else:
        param.data = runtime.absent(chunk)[position]
    runtime.target.synchronize()


@contextlib.contextmanager
def full_parameters(model: nn.Module) -> Iterator[nn.Module]:
    """Within this context every parameter of a boosted model is a real, full tensor on the compute device.

    Changes are written back at the end: to the 16-bit parameter, and where it changed to the fp32 master. Needs room for the whole model
    on the device; the model must not be trained inside.
    """
    runtime = runtime_of(model)
    if not runtime.ready:
        yield model
        return
    runtime.flush()
    params = list(runtime.grouping.place)
    for param in params:
        param.data = gather(runtime, param, runtime.target.torch_device)
    runtime.lent = True
    try:
        yield model
    finally:
        runtime.lent = False
        for param in params:
            _write_back(runtime, param)
