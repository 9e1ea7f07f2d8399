"""Fused kernels for the modules of a boosted model, chosen per device: liger-kernel where Triton runs, plain torch otherwise.

Sources: RMSNorm (Zhang and Sennrich 2019), SwiGLU (Shazeer 2020), RoPE (Su et al. 2021); kernels by liger-kernel (LinkedIn, BSD-2-Clause).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from tierwise.kernels.rematerialize import Recipe, attach


def liger_is_available() -> bool:
    """Whether liger-kernel is installed and Triton can run its kernels on a CUDA device."""
    return torch.cuda.is_available() and all(importlib.util.find_spec(name) is not None for name in ("triton", "liger_kernel"))


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
    )


def _is_swiglu(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj")
    return all(isinstance(getattr(module, part, None), nn.Linear) for part in parts) and isinstance(
        getattr(module, "act_fn", None), nn.SiLU | _silu_class()
    )


def _silu_class() -> type:
    """transformers' own SiLU module where it has one, else torch's."""
    activations = sys.modules.get("transformers.activations")
    found = getattr(activations, "SiLUActivation", nn.SiLU)
    return found if isinstance(found, type) else nn.SiLU


class _SavesLike(torch.autograd.Function):
    """Stands for a fused kernel in a trace: the output has the first input's shape, and every input is saved."""

    @staticmethod
    def forward(ctx: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise AssertionError("a trace has no backward")


def _runs(tensor: torch.Tensor, kernel: Any) -> bool:
    """Whether the fused kernel, or what stands for it in a trace, takes this tensor. A compiler fuses the plain code better."""
    if torch.compiler.is_compiling():
        return False
    return is_fake(tensor) or (tensor.is_cuda and kernel is not None)


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory: a trace runs the model with such tensors, which claim to be on the device."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def fuse_normalization(model: nn.Module) -> int:
    """Gives RMSNorm modules of LLaMA-style models liger's fused kernel; returns how many. Does nothing without liger-kernel and CUDA.

    The kernel computes in fp32 and rounds once, in transformers' order ("llama" casting mode): outputs agree to one unit in the last place.
    """
    if not liger_is_available():
        return 0
    function = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return _fuse_normalization([model], function)


def _fuse_normalization(parts: Collection[nn.Module], function: Any) -> int:
    """With a kernel, or without one where the compiler will fuse: then only a trace sees the difference."""

    def run(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if is_fake(hidden_states):
            row = hidden_states.new_empty(hidden_states.shape[:-1], dtype=torch.float32)
            return _SavesLike.apply(hidden_states, module.weight, row)  # type: ignore[no-any-return]
        # Not in place: the gradient of the output may be read by others.
        return function.apply(  # type: ignore[no-any-return]
            hidden_states, module.weight, module.variance_epsilon, 0.0, "llama", False
        )

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if not _runs(hidden_states, function):
            return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
        kept = hidden_states.detach()
        # Weakly: a tensor that autograd holds hides a cycle through it from the collector.
        module = weakref.ref(self)
        return attach(run(self, hidden_states), Recipe(lambda: run(module(), kept), 2 * kept.nbytes))

    return sum(_replace(part, _is_rms_norm, forward) for part in parts)


def fuse_activations(model: nn.Module) -> int:
    """Gives SwiGLU MLPs and rotary embeddings of LLaMA-style models liger's fused kernels; returns how many modules changed."""
    if not liger_is_available():
        return 0
    silu_mul = importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction
    changed = _fuse_activations([model], silu_mul)
    modeling = sys.modules.get(type(model).__module__)
    if changed and modeling is not None and hasattr(modeling, "apply_rotary_pos_emb"):
        # A function of the modeling module, shared by every model of the family in this process.
        modeling.apply_rotary_pos_emb = _rotary(modeling.apply_rotary_pos_emb)  # type: ignore[attr-defined]
    return changed


def _fuse_activations(parts: Collection[nn.Module], silu_mul: Any) -> int:
    """With a kernel, or without one where the compiler will fuse: then only a trace sees the difference."""

    def run(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (_SavesLike if is_fake(gate) else silu_mul).apply(gate, up)  # type: ignore[no-any-return]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if not _runs(x, silu_mul):
            return type(self).forward(self, x)  # type: ignore[no-any-return]
        gate, up = self.gate_proj(x), self.up_proj(x)
        kept = gate.detach(), up.detach()
        product = attach(run(gate, up), Recipe(lambda: run(*kept), 3 * gate.nbytes))
        out: torch.Tensor = self.down_proj(product)
        return out

    return sum(_replace(part, _is_swiglu, forward) for part in parts)


def trace_as_fused(parts: Collection[nn.Module]) -> None:
    """Lets traces count normalizations and gated products of these modules as fused, because the compiler will fuse them. What runs stays
    the plain code."""
    _fuse_normalization(parts, None)
    _fuse_activations(parts, None)


def _rotary(plain: Any) -> Any:
    if getattr(plain, "_tierwise_fused", False):
        return plain
    function = importlib.import_module("liger_kernel.ops.rope").LigerRopeFunction

    def apply_rotary_pos_emb(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        if torch.compiler.is_compiling() or not q.is_cuda or unsqueeze_dim != 1 or is_fake(q):
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return function.apply(q, k, cos, sin, None, unsqueeze_dim)

    apply_rotary_pos_emb._tierwise_fused = True  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _replace(model: nn.Module, wanted: Any, forward: Any) -> int:
    changed = 0
    for module in model.modules():
        # An instance that already has its own forward was wrapped by somebody else.
        if wanted(module) and "forward" not in vars(module):
            module.forward = types.MethodType(forward, module)
            changed += 1
    return changed


@contextlib.contextmanager
def attention_backends(enabled: bool = True) -> Iterator[None]:
    """Prefers cuDNN's attention, then flash, for `scaled_dot_product_attention` on CUDA.

    Left alone under `torch.use_deterministic_algorithms`, because cuDNN's backward is not deterministic.
    """
    if not enabled or not torch.cuda.is_available() or torch.are_deterministic_algorithms_enabled():
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield
