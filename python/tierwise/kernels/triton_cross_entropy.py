"""Softmax cross entropy of a chunk of logits in one Triton kernel: two passes over a row instead of a dozen over memory.

Imported only where Triton is; `linear_cross_entropy` has the same in plain torch. The method is the online softmax of Milakov and
Gimelshein (2018).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator]
def _cross_entropy(  # type: ignore[no-untyped-def]
    logits,
    row_stride,
    targets,
    losses,
    divisor,
    columns,
    ignore_index,
    GRADIENT: tl.constexpr,
    DIVIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(losses + row, 0.0)
        if GRADIENT:
            for start in range(0, columns, BLOCK):
                at = start + tl.arange(0, BLOCK)
                tl.store(logits + at, tl.zeros([BLOCK], dtype=tl.float32).to(logits.dtype.element_ty), mask=at < columns)
        return
    highest = float("-inf")
    total = 0.0
    # Summed up with the rest: a load of its own could come after another warp has overwritten the logits.
    picked = 0.0
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), axis=0)
        highest = new
        picked += tl.sum(tl.where(at == target, x, 0.0), axis=0)
    normalizer = highest + tl.log(total)
    # A target outside of the vocabulary makes the loss, and so the step, not a number.
    known = (target >= 0) & (target < columns)
    tl.store(losses + row, tl.where(known, normalizer - picked, float("nan")))
    if GRADIENT:
        scale = tl.load(divisor) if DIVIDE else 1.0
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            x = tl.load(logits + at, mask=at < columns, other=float("-inf")).to(tl.float32)
            grad = tl.exp(x - normalizer)
            grad = tl.where(at == target, grad - 1.0, grad)
            if DIVIDE:
                grad = grad / scale
            tl.store(logits + at, grad.to(logits.dtype.element_ty), mask=at < columns)


def cross_entropy(logits: Tensor, target: Tensor, divisor: Tensor | None, ignore_index: int, gradient: bool) -> Tensor:
    """Losses of a chunk, (tokens,) fp32; 0 where the target is ignored.

    logits: (tokens, vocab_size), rows contiguous; with `gradient` their gradient, divided by `divisor` (fp32 scalar) where
    there is one, overwrites them. target: (tokens,) int64. Softmax in fp32.
    """
    tokens, columns = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    block = min(_MAX_BLOCK, triton.next_power_of_2(columns))
    launch: Any = _cross_entropy[(tokens,)]
    launch(
        logits,
        logits.stride(0),
        target.contiguous(),
        losses,
        losses if divisor is None else divisor,
        columns,
        ignore_index,
        GRADIENT=gradient,
        DIVIDE=divisor is not None,
        BLOCK=block,
        num_warps=max(min(block // 256, 16), 1),
    )
    return losses
