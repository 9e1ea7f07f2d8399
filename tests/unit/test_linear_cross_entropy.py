"""The chunked loss against torch's own on whole logits."""

from __future__ import annotations

from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest

pytest.importorskip("torch")

import torch

from tierwise.kernels import linear_cross_entropy as module
from tierwise.kernels.linear_cross_entropy import linear_cross_entropy


def reference(hidden: Any, weight: Any, target: Any, num_items: Any) -> Any:
    logits = hidden.double() @ weight.double().t()
    total = torch.nn.functional.cross_entropy(logits, target, ignore_index=-100, reduction="sum")
    return total / ((target != -100).sum() if num_items is None else num_items)


def gradients(loss: Any, hidden: Any, weight: Any, factor: float) -> list[Any]:
    return list(torch.autograd.grad(loss * factor, [hidden, weight]))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocab=st.integers(2, 30),
    chunk=st.integers(1, 17),
    ignored=st.floats(0, 0.9),
    num_items=st.sampled_from([None, 7, 3.5]),
    factor=st.sampled_from([1.0, 0.25, 1024.0]),
    seed=st.integers(0, 1000),
)
def test_it_equals_the_definition(
    tokens: int, width: int, vocab: int, chunk: int, ignored: float, num_items: Any, factor: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocab, width, generator=generator, requires_grad=True)
    target = torch.randint(0, vocab, (tokens,), generator=generator)
    target[torch.rand(tokens, generator=generator) < ignored] = -100
    target[0] = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "chunk_tokens", lambda weight_shape, device: chunk)
        ours = linear_cross_entropy(hidden, weight, target, num_items)
    assert ours.dtype == torch.float32
    expected = reference(hidden, weight, target, num_items)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(ours, hidden, weight, factor), gradients(expected, hidden, weight, factor), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_gradients_accumulate_in_fp32(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 32, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(50, 32, generator=generator) / 6).to(dtype).requires_grad_()
    target = torch.randint(0, 50, (512,), generator=generator)
    expected = gradients(reference(hidden, weight, target, None), hidden, weight, 1.0)
    monkeypatch.setattr(module, "chunk_tokens", lambda weight_shape, device: 8)
    scale = 2.0**12 if dtype is torch.float16 else 1.0
    ours = gradients(linear_cross_entropy(hidden, weight, target), hidden, weight, scale)
    for mine, theirs in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() / scale - theirs.double()).norm() / theirs.double().norm()
        # 64 additions in bf16 would lose some 3 %; one rounding loses 2^-9.
        assert error < 6e-3


def test_fp16_gradients_of_a_mean_over_many_tokens_do_not_underflow() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 8, generator=generator).half().requires_grad_()
    weight = torch.randn(20, 8, generator=generator).half().requires_grad_()
    target = torch.randint(0, 20, (32,), generator=generator)
    # The mean over two million tokens, of which these are a few: unscaled, fp16 has no number as small as its gradients.
    scale = 2.0**20
    ours = gradients(linear_cross_entropy(hidden, weight, target, 2e6), hidden, weight, scale)
    expected = gradients(reference(hidden, weight, target, 2e6), hidden, weight, scale)
    for mine, theirs in zip(ours, expected, strict=True):
        assert (mine.double() - theirs.double()).norm() < 4e-3 * theirs.double().norm()


def test_ignored_rows_may_hold_infinities() -> None:
    hidden = torch.ones(3, 2)
    hidden[1] = torch.inf
    hidden.requires_grad_()
    weight = torch.ones(4, 2, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.tensor([0, -100, 1]))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, hidden)[0].isfinite().all()


def test_logits_are_never_whole_and_nothing_is_saved_of_them() -> None:
    hidden = torch.randn(256, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, torch.zeros(256, dtype=torch.long))
    assert sum(saved) <= hidden.numel() + weight.numel() + 1


def test_shapes_are_checked_and_frozen_weights_work() -> None:
    with pytest.raises(ValueError, match="shapes do not match"):
        linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 5), torch.zeros(2, dtype=torch.long))
    hidden = torch.randn(4, 3, requires_grad=True)
    linear_cross_entropy(hidden, torch.randn(5, 3), torch.zeros(4, dtype=torch.long)).backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert linear_cross_entropy(hidden, torch.randn(5, 3), torch.zeros(4, dtype=torch.long)).isfinite()
