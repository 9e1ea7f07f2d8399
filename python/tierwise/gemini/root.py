"""Hooks of the root module: the first plan, input dtypes, saved-tensor hooks, the fused loss."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from tierwise.gemini.hooks import in_graph_task
from tierwise.gemini.inputs import count_tokens, first_rows, map_tensors
from tierwise.gemini.runtime import Runtime
from tierwise.kernels.fused import attention_backends
from tierwise.kernels.masks import without_packing


def install(runtime: Runtime) -> None:
    """Installs the root's hooks. Its pre-hook runs before those of units, so that the root may be one."""
    model = runtime.model
    parameters = inspect.signature(model.forward).parameters
    takes_cache = "use_cache" in parameters
    open_forwards = contextlib.ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if in_graph_task():
            return None
        # An interrupted forward (Ctrl-C skips hooks) may have left these open.
        open_forwards.close()
        if runtime.passive:
            return None
        if not runtime.ready:
            runtime.prepare(args, kwargs)
        else:
            runtime.saved.exit()
            runtime.hooks.reset()
        args, kwargs = map_tensors(args, _cast(runtime.dtype)), map_tensors(dict(kwargs), _cast(runtime.dtype))
        training = module.training and torch.is_grad_enabled()
        if training:
            runtime.micro_tokens = count_tokens(args, kwargs)
            runtime.micro_rows = first_rows(args, kwargs)
            if takes_cache and kwargs.get("use_cache") is None and kwargs.get("past_key_values") is None:
                # A cache would be appended to twice where a layer is recomputed, and training has no use for it.
                kwargs["use_cache"] = False
        open_forwards.enter_context(attention_backends(runtime.fused_attention))
        open_forwards.enter_context(without_packing(model, args, kwargs))
        if runtime.fused is not None:
            open_forwards.enter_context(runtime.fused.active(args, kwargs, training))
        if runtime.saved.needed and torch.is_grad_enabled():
            runtime.saved.enter()
            open_forwards.callback(runtime.saved.exit)
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if runtime.passive or in_graph_task():
            return None
        if output is not None and runtime.fused is not None:
            output = runtime.fused.without_logits(output)
        open_forwards.close()
        return output

    model.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True, prepend=True)
    model.register_forward_hook(torch.compiler.disable(after), with_kwargs=True, always_call=True)


def _cast(dtype: torch.dtype) -> Any:
    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor

    return cast
