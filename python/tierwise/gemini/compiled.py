"""`torch.compile` on chunks that move: everything but CUDA graphs, which replay addresses; and layers compiled by an option."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tierwise.gemini.chunking import Unit
from tierwise.kernels.fused import trace_as_fused

_THRIFTY = 0.9
"""Any budget below 1 lets the partitioner make again first what costs next to nothing; this one asks for nothing else."""


class LayerCompiler:
    """Compiles layers one by one, when they first run: by then the plan says whether cheap outputs are kept."""

    backend = "inductor"

    def __init__(self, units: list[Unit]) -> None:
        self.thrifty = False
        """Whether outputs of normalizations and gated products are made again in backward; to be set before the first forward."""
        modules = [unit.module for unit in units if unit.recomputable]
        if not modules:
            raise ValueError(
                "compile_layers=True, but the model has no layers (elements of a ModuleList with modules inside); leave it out"
            )
        trace_as_fused(modules)
        for module in modules:
            module.forward = torch.compile(module.forward, backend=self._compile)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend
        from torch._functorch import config

        with config.patch(activation_memory_budget=_THRIFTY if self.thrifty else 1.0):
            return lookup_backend(self.backend)(graph, inputs)


def refuse_cuda_graphs(model: nn.Module) -> None:
    """Raises ValueError if a part of `model` is compiled in a mode that captures CUDA graphs: they would read a chunk's former slot."""
    for name, module in model.named_modules():
        # Compiled as `module.compile()`, as `torch.compile(module)`, or as its `forward`.
        for function in (getattr(module, "_compiled_call_impl", None), vars(module).get("forward")):
            config = getattr(function, "get_compiler_config", None)
            if config is not None and (config() or {}).get("triton.cudagraphs"):
                raise ValueError(
                    f"{name or type(model).__name__!r} is compiled with CUDA graphs, which replay fixed addresses while parameters move; "
                    "compile it with mode='default' or mode='max-autotune-no-cudagraphs'"
                )
