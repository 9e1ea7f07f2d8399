"""Linear projection and cross entropy in one, chunk by chunk, so that the logits are never whole.

The method is that of "Cut Your Losses" and Liger-Kernel in plain torch: loss and gradients of a chunk of tokens are computed together in
forward, the softmax in fp32; backward multiplies by the incoming gradient.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tierwise.kernels.fused import is_fake

IGNORE_INDEX = -100
_CHUNK_LOGITS = 2**24
"""Most logits per chunk in plain torch, which holds several fp32 copies of them: 64 MiB each."""
_CHUNK_LOGITS_FUSED = 2**27
"""Most logits per chunk of the fused kernel, which holds them once: 256 MiB in 16 bit."""


def _fused_kernel(device: torch.device) -> ModuleType | None:
    """The Triton kernel where it runs: on CUDA, with Triton installed."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("tierwise.kernels.triton_cross_entropy")


def chunk_tokens(weight_shape: torch.Size, device: torch.device) -> int:
    """Tokens per chunk: so many that the matrix products are efficient, so few that logits stay small beside the weight's gradient."""
    fused = _fused_kernel(device) is not None
    logits = min(_CHUNK_LOGITS_FUSED, weight_shape.numel()) if fused else min(_CHUNK_LOGITS, weight_shape.numel() // 4)
    return max(logits // weight_shape[0], 64)


def temporary_bytes(weight_shape: torch.Size, device: torch.device) -> int:
    """Most bytes that the loss needs for itself: the weight's gradient in fp32 and in 16 bit, and the logits of one chunk."""
    per_logit = 2 if _fused_kernel(device) is not None else 12
    return 6 * weight_shape.numel() + per_logit * chunk_tokens(weight_shape, device) * weight_shape[0]


def _plain_cross_entropy(
    logits: Tensor, target: Tensor, divisor: Tensor | None, ignore_index: int, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses of a chunk, and the gradient of its logits in their dtype."""
    dtype = logits.dtype
    valid = target != ignore_index
    logits = logits.float()
    picked = target.clamp(min=0).unsqueeze(1)
    normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
    losses = (normalizer - logits.gather(1, picked)).squeeze(1)
    losses = torch.where(valid, losses, losses.new_zeros(()))
    if not gradient:
        return losses, None
    grad = logits.sub_(normalizer).exp_()
    grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
    # Not a multiplication: an ignored row may hold infinities.
    grad.masked_fill_(~valid.unsqueeze(1), 0.0)
    if divisor is not None:
        grad /= divisor
    return losses, grad.to(dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in fp32; on CUDA by the matrix product itself, elsewhere after rounding the product to its own dtype."""
    if not total.is_cuda or is_fake(total):
        # torch 2.11 cannot trace the product that adds to fp32.
        total += left @ right
    elif left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, divisor: Tensor, ignore_index: int) -> Tensor:
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        tokens = hidden.shape[0]
        # fp16 gradients of a mean would underflow: there the division waits for backward, where the loss scale is known.
        late = hidden.dtype == torch.float16
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needs_weight else None
        fused = None if is_fake(hidden) else _fused_kernel(hidden.device)
        step = chunk_tokens(weight.shape, hidden.device)
        for start in range(0, tokens, step):
            rows = hidden[start : start + step]
            labels = target[start : start + step]
            logits = rows @ weight.t()
            arguments = labels, None if late else divisor, ignore_index, needs_hidden or needs_weight
            if fused is None:
                losses, grad = _plain_cross_entropy(logits, *arguments)
            else:
                losses, grad = fused.cross_entropy(logits, *arguments), logits
            total += losses.sum()
            if grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[start : start + step])
            if grad_weight is not None:
                _add_product(grad_weight, grad.t(), rows)
        if grad_weight is not None and not late:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.late = late
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight, divisor)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight, divisor = ctx.saved_tensors
        scale = grad_output / divisor if ctx.late else grad_output
        if grad_hidden is not None:
            grad_hidden = (grad_hidden.float() * scale).to(grad_hidden.dtype) if ctx.late else grad_hidden * scale
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, num_items: Tensor | float | None = None, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Cross entropy of `hidden @ weight.T` against `target`, fp32 scalar.

    hidden: (tokens, hidden_size), weight: (vocab_size, hidden_size) of the same dtype, target: (tokens,) int64. The sum over targets other
    than `ignore_index` is divided by `num_items`, or by their number (the mean). Saves gradients of `hidden` and `weight`, no logits.
    Raises ValueError if shapes do not match.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or target.shape != hidden.shape[:1]:
        raise ValueError(f"shapes do not match: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}")
    if num_items is None:
        divisor = (target != ignore_index).sum().float()
    else:
        divisor = torch.as_tensor(num_items, dtype=torch.float32, device=hidden.device)
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, target, divisor, ignore_index)
    return loss
