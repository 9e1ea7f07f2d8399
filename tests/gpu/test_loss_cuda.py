"""The chunked loss on CUDA against torch's own on whole logits in f64."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs torch: install tierwise[train]")

import torch

from tierwise.kernels import linear_cross_entropy as module
from tierwise.kernels.linear_cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [50, 32000])
def test_the_fused_loss_equals_the_definition(dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    hidden = torch.randn(512, 64, generator=generator, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(vocab, 64, generator=generator, device="cuda") / 8).to(dtype).requires_grad_()
    target = torch.randint(0, vocab, (512,), generator=generator, device="cuda")
    target[::3] = -100
    whole = hidden.double() @ weight.double().t()
    expected = torch.nn.functional.cross_entropy(whole, target)
    monkeypatch.setattr(module, "chunk_tokens", lambda weight_shape, device: 100)
    ours = linear_cross_entropy(hidden, weight, target)
    # Logits are rounded to the model's dtype before the softmax, as in the plain model.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=1e-5)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    for mine, theirs in zip(
        torch.autograd.grad(ours * scale, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight]), strict=True
    ):
        assert mine.dtype == dtype
        error = (mine.double() / scale - theirs.double()).norm() / theirs.double().norm()
        assert error < {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]


def test_two_runs_give_equal_bits() -> None:
    hidden = torch.randn(9000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 32000, (9000,), device="cuda")
    runs = []
    for _ in range(2):
        loss = linear_cross_entropy(hidden, weight, target)
        runs.append([loss, *torch.autograd.grad(loss, [hidden, weight])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_losses_are_read_before_gradients_overwrite_their_logits() -> None:
    triton_cross_entropy = pytest.importorskip("tierwise.kernels.triton_cross_entropy", reason="needs triton")
    logits = torch.randn(8192, 32000, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, 32000, (8192,), device="cuda")
    expected = triton_cross_entropy.cross_entropy(logits, target, None, -100, gradient=False)
    assert (expected - torch.nn.functional.cross_entropy(logits.float(), target, reduction="none")).abs().max() < 1e-4
    # About one row in a hundred thousand lost the race.
    for _ in range(100):
        losses = triton_cross_entropy.cross_entropy(logits.clone(), target, None, -100, gradient=True)
        assert torch.equal(losses, expected)
