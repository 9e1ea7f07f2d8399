"""Linear projection and cross entropy in one, chunk by chunk, so that the logits are never whole.

The method is that of "Cut Your Losses" and Liger-Kernel in plain torch: loss and gradients of a chunk of tokens are computed together in
forward, the softmax in fp32; backward multiplies by the incoming gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
_CHUNK_LOGITS = 2**24
"""Most logits per chunk: 64 MiB in fp32."""


def chunk_tokens(weight_shape: torch.Size) -> int:
    """Tokens per chunk: so many that the matrix products are efficient, so few that logits stay small beside the weight's gradient."""
    return max(min(_CHUNK_LOGITS, weight_shape.numel() // 4) // weight_shape[0], 64)


def temporary_bytes(weight_shape: torch.Size) -> int:
    """Most bytes that the loss needs for itself: the weight's gradient in fp32 and one chunk's in 16 bit, and one chunk of logits."""
    return 6 * weight_shape.numel() + 12 * chunk_tokens(weight_shape) * weight_shape[0]


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
        step = chunk_tokens(weight.shape)
        for start in range(0, tokens, step):
            rows = hidden[start : start + step]
            labels = target[start : start + step]
            valid = labels != ignore_index
            logits = (rows @ weight.t()).float()
            picked = labels.clamp(min=0).unsqueeze(1)
            normalizer = torch.logsumexp(logits, dim=1, keepdim=True)
            losses = (normalizer - logits.gather(1, picked)).squeeze(1)
            total += torch.where(valid, losses, losses.new_zeros(())).sum()
            if not (needs_hidden or needs_weight):
                continue
            grad = logits.sub_(normalizer).exp_()
            grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
            # Not a multiplication: an ignored row may hold infinities.
            grad.masked_fill_(~valid.unsqueeze(1), 0.0)
            if not late:
                grad /= divisor
            cast = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(cast, weight, out=grad_hidden[start : start + step])
            if grad_weight is not None:
                grad_weight += cast.t() @ rows
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
