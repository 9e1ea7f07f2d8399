"""What of `torch.compile` works on chunks that move: everything but CUDA graphs, which replay addresses."""

from __future__ import annotations

from torch import nn


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
