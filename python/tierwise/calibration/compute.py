"""The device's kernels by size: matrix products, attention, whole layers with what lies between, and the loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tierwise.calibration.timing import Timer
from tierwise.kernels.fused import attention_backends, fuse_activations, fuse_normalization
from tierwise.kernels.linear_cross_entropy import chunk_tokens, linear_cross_entropy

_SUSTAINED_S = 1.2
"""Of forward and backward in turn, of which the last two thirds count: the power limit is felt after less than a tenth of a second, but a
device that is still cool draws less, and its regulation swings with a period of about a second."""

_COMPILED_TOKENS = 512
"""Of a sequence. Per multiprocessor of an H100 norms get 4 to 32 rows of it, where they get 32 to 249 in `layers`: divisible by 16, or not,
and never 1, which is compiled for itself."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured; every LLaMA layer is interpolated between these."""

    layers: tuple[tuple[int, int, int], ...]
    """(hidden, inner, heads)."""
    tokens: tuple[int, ...]
    """Rows of matrix products."""
    attention: tuple[tuple[int, int], ...]
    """(heads, head size)."""
    sequences: tuple[tuple[int, int], ...]
    """(sequences, tokens per sequence) of attention."""
    whole: tuple[tuple[int, int], ...]
    """(sequences, tokens per sequence) of whole layers."""
    vocab: int

    def largest(self) -> tuple[int, int]:
        """The whole layer of the most tokens."""
        return max(self.whole, key=lambda whole: whole[0] * whole[1])


DEVICE_SIZES = Sizes(
    layers=((1024, 2816, 16), (2048, 5504, 16), (4096, 11008, 32)),
    tokens=(2048, 4096, 8192, 16384, 32768),
    attention=((16, 64), (16, 128), (32, 128)),
    sequences=((16, 1024), (4, 4096), (1, 4096)),
    whole=((1, 4096), (2, 4096), (4, 4096)),
    vocab=32000,
)
CPU_SIZES = Sizes(layers=((64, 160, 4),), tokens=(64, 256), attention=((4, 16),), sequences=((2, 64),), whole=((1, 64), (4, 64)), vocab=512)


def products(sizes: Sizes, timer: Timer, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """bf16 products of a LLaMA layer's matrices by tokens: forward, gradient of the input, gradient of the weight."""
    rows = []
    most = max(sizes.tokens)
    for hidden, inner, _ in sizes.layers:
        for inputs, outputs in ((hidden, hidden), (hidden, inner), (inner, hidden)):
            weight = _normal(timer, outputs, inputs)
            x, y = _normal(timer, most, inputs), _normal(timer, most, outputs)
            for tokens in sizes.tokens:
                a, b = x[:tokens], y[:tokens]
                pairs = {"forward_s": (a, weight.t()), "input_grad_s": (b, weight), "weight_grad_s": (b.t(), a)}
                times = {name: timer.seconds_of(functools.partial(torch.mm, *pair)) for name, pair in pairs.items()}
                rows.append({"tokens": tokens, "inputs": inputs, "outputs": outputs, **times})
            flops, seconds = 6 * most * inputs * outputs, sum(times.values())
            log(f"product {most} x {inputs} x {outputs}: {flops / seconds / 1e12:.1f} TFLOP/s forward and backward")
    return rows


def attention(sizes: Sizes, timer: Timer, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Causal attention, forward and backward, with the kernels that training uses."""
    rows = []
    known: set[int] = set()
    for heads, head_dim in sizes.attention:
        # More heads are as more sequences: of a width that was measured before, the least and the largest of whole layers are enough.
        shapes = (sizes.whole[0], sizes.whole[-1]) if head_dim in known else sizes.sequences
        known.add(head_dim)
        for sequences, seq in shapes:
            # As a model's projections leave them: heads inside tokens.
            q, k, v = (_normal(timer, sequences, seq, heads, head_dim).transpose(1, 2).requires_grad_() for _ in range(3))
            with attention_backends():

                def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
                    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

                row = {"sequences": sequences, "seq": seq, "heads": heads, "head_dim": head_dim, **_both(timer, forward, [q, k, v], 4)}
            rows.append(row)
            flops = 2 * sequences * seq * seq * heads * head_dim
            log(f"attention {sequences} x {seq}, {heads} heads of {head_dim}: {_rates(flops, row)}")
    return rows


def layers(sizes: Sizes, timer: Timer, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Whole decoder layers of transformers with our fused kernels. Raises ImportError without transformers."""
    rows: list[dict[str, Any]] = []
    made = [_Layer(timer, size) for size in sizes.layers]

    def measure(which: int, sequences: int, seq: int) -> None:
        hidden, inner, heads = sizes.layers[which]
        times = _both(timer, *made[which].step(sequences, seq), 25)
        row = {"sequences": sequences, "seq": seq, "hidden": hidden, "inner": inner, "heads": heads, **times, "sustained_s": None}
        rows.append(row)
        tokens = sequences * seq
        flops = 2 * tokens * (4 * hidden * hidden + 3 * hidden * inner) + 2 * tokens * seq * hidden
        log(f"layer {hidden} with {tokens} tokens: {_rates(flops, row)}")

    def sustain(which: int, sequences: int, seq: int) -> bool:
        """Whether Python keeps the device busy with that."""
        long = timer.sustained(functools.partial(_step, *made[which].step(sequences, seq)), _SUSTAINED_S)
        shape = {"sequences": sequences, "seq": seq, "hidden": sizes.layers[which][0]}
        if long is not None:
            next(row for row in rows if shape.items() <= row.items())["sustained_s"] = long
        return long is not None

    with attention_backends():
        for which in range(len(made)):
            for sequences, seq in sizes.whole:
                measure(which, sequences, seq)
        if not _has_power_limit(timer.device):
            return rows
        # The widest first: as hot as training makes the device, it stays for the others.
        for which in reversed(range(len(made))):
            sequences, seq = sizes.largest()
            if not sustain(which, sequences, seq):
                measure(which, 2 * sequences, seq)
                sustain(which, 2 * sequences, seq)
    return rows


def compile_loss(sizes: Sizes, timer: Timer) -> None:
    """Runs the loss of the narrowest layer once, whose kernel is that of all."""
    weight = _normal(timer, sizes.vocab, sizes.layers[0][0]).requires_grad_()
    tokens = chunk_tokens(weight.shape, timer.device)
    x = _normal(timer, tokens, weight.shape[1]).requires_grad_()
    _step(lambda: linear_cross_entropy(x, weight, torch.zeros(tokens, dtype=torch.long, device=timer.device)), [x, weight])


def compiled(sizes: Sizes) -> list[tuple[int, int]]:
    """What `layers` needs kernels for: every layer with as many sequences as it will have, for which Triton compiles anew. Twice as many
    as the others may have where Python does not keep the device busy otherwise: the narrowest, if any."""
    batches = sorted({sequences for sequences, _ in sizes.whole})
    return [(which, sequences) for which in range(len(sizes.layers)) for sequences in batches] + [(0, 2 * sizes.largest()[0])]


def compile_layers(sizes: Sizes, timer: Timer, share: Iterable[tuple[int, int]]) -> None:
    """Runs layers once with so many sequences each, so that their kernels are compiled. Triton compiles anew where a number is no longer
    divisible by 16, not for longer sequences: short ones are off the device before they disturb what is measured meanwhile. Attention is
    torch's own choice: what cuDNN prepares for a size serves no other process. Raises ImportError without transformers."""
    for which, sequences in share:
        _step(*_Layer(timer, sizes.layers[which]).step(sequences, _COMPILED_TOKENS))


def import_layers(sizes: Sizes, timer: Timer) -> None:
    """Imports what `layers` does, which takes seconds. What cannot be imported is for `layers` to say."""
    with contextlib.suppress(ImportError, TypeError, RuntimeError):
        _Layer(timer, sizes.layers[0])


class _Layer:
    """A decoder layer of transformers with our fused kernels. Raises ImportError without transformers."""

    def __init__(self, timer: Timer, size: tuple[int, int, int]) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        hidden, inner, heads = size
        config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads)
        config._attn_implementation = "sdpa"
        self.timer, self.hidden = timer, hidden
        with timer.device:
            self.layer = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
        fuse_normalization(self.layer)
        fuse_activations(self.layer)
        self.rotary = LlamaRotaryEmbedding(config).to(timer.device)

    def step(self, sequences: int, seq: int) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """Its forward, and what backward gives gradients of."""
        x = _normal(self.timer, sequences, seq, self.hidden).requires_grad_()
        places = torch.arange(seq, device=self.timer.device)[None]
        angles = self.rotary(x, places)

        def forward() -> Tensor:
            out = self.layer(x, position_ids=places, position_embeddings=angles)
            return out if isinstance(out, Tensor) else out[0]

        return forward, [x, *self.layer.parameters()]


def losses(sizes: Sizes, timer: Timer, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """The chunked head and loss; its gradients are computed in forward."""
    rows = []
    for hidden, _, _ in sizes.layers:
        for sequences, seq in sizes.whole:
            tokens = sequences * seq
            x = _normal(timer, tokens, hidden).requires_grad_()
            weight = (_normal(timer, sizes.vocab, hidden) * 0.02).requires_grad_()
            target = torch.randint(0, sizes.vocab, (tokens,), device=timer.device)

            def forward(x: Tensor = x, weight: Tensor = weight, target: Tensor = target) -> Tensor:
                return linear_cross_entropy(x, weight, target)

            row = {
                "tokens": tokens,
                "hidden": hidden,
                "vocab": sizes.vocab,
                **_both(timer, forward, [x, weight], 15 * tokens // chunk_tokens(weight.shape, timer.device) + 15),
            }
            rows.append(row)
        log(f"loss {hidden} with {tokens} tokens: {row['forward_s'] * 1e3:.2f} ms forward, {row['backward_s'] * 1e3:.2f} ms backward")
    return rows


def _has_power_limit(device: torch.device) -> bool:
    """Whether it is the device, not Python or a CPU's cores, that long work slows down."""
    return device.type == "cuda"


def _step(forward: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Forward and backward, as training does them."""
    with torch.enable_grad():
        out = forward()
        torch.autograd.grad(out, leaves, torch.ones_like(out))


def _both(timer: Timer, forward: Callable[[], Tensor], leaves: list[Tensor], kernels: int) -> dict[str, float]:
    """Seconds of forward alone, and of backward alone over one kept graph."""
    with torch.enable_grad():
        out = forward()
        grad = torch.ones_like(out)

        def backward() -> None:
            torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return {"forward_s": timer.seconds_of(forward, kernels), "backward_s": timer.seconds_of(backward, 2 * kernels)}


def _normal(timer: Timer, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=timer.device)


def _rates(flops: float, row: dict[str, Any]) -> str:
    return f"{flops / row['forward_s'] / 1e12:.1f} TFLOP/s forward, {2 * flops / row['backward_s'] / 1e12:.1f} backward"
