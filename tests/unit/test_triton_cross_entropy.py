"""The Triton kernel of the loss, by Triton's interpreter: it needs no GPU, only a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="torch of this platform comes without Triton; a Linux wheel from PyPI has it")

PROGRAM = """
    import torch
    from tierwise.kernels.linear_cross_entropy import _plain_cross_entropy
    from tierwise.kernels.triton_cross_entropy import cross_entropy

    generator = torch.Generator().manual_seed(0)
    for vocab in (1, 3, 64, 5000, 9001):
        for dtype in (torch.float32, torch.bfloat16):
            logits = (torch.randn(7, vocab, generator=generator) * 8).to(dtype)
            logits[3] = torch.inf  # Its target is ignored.
            target = torch.randint(0, vocab, (7,), generator=generator)
            target[3] = -100
            for divisor in (None, torch.tensor(5.5)):
                expected, expected_grad = _plain_cross_entropy(logits.clone(), target, divisor, -100, True)
                grad = logits.clone()
                losses = cross_entropy(grad, target, divisor, -100, True)
                torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(grad, expected_grad, rtol=8e-3 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)
                untouched = logits.clone()
                assert torch.equal(cross_entropy(untouched, target, divisor, -100, False), losses)
                assert torch.equal(untouched, logits)
    wide = torch.randn(4, 20, generator=generator)
    rows = wide[:, :10]  # Rows that do not follow one another.
    expected, expected_grad = _plain_cross_entropy(rows.clone(), torch.arange(4), None, -100, True)
    torch.testing.assert_close(cross_entropy(rows, torch.arange(4), None, -100, True), expected)
    torch.testing.assert_close(rows, expected_grad)
    losses = cross_entropy(torch.randn(3, 10), torch.tensor([10, -1, 9]), None, -100, True)
    assert losses.isnan().tolist() == [True, True, False]
    print("equal")
"""


def test_it_agrees_with_plain_torch() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
