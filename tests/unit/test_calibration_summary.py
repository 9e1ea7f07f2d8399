"""One figure each of what was measured."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tierwise.calibration import summary


def _measured(layer_s: float) -> dict[str, Any]:
    """Of a layer that takes so long, of which its products and its attention are 10 ms."""
    products = [
        {"tokens": 1000, "inputs": inputs, "outputs": outputs, "forward_s": seconds, "input_grad_s": seconds, "weight_grad_s": seconds}
        for inputs, outputs, seconds in ((64, 64, 1e-3), (64, 128, 1e-3), (128, 64, 1e-3))
    ]
    attention = [{"sequences": 1, "seq": 1000, "heads": 1, "head_dim": 64, "forward_s": 3e-3, "backward_s": 6e-3}]
    layers = [{"sequences": 1, "seq": 1000, "hidden": 64, "inner": 128, "heads": 1, "forward_s": layer_s}]
    rates = {"h2d_bytes_per_s": 1e10, "d2h_bytes_per_s": 1e10, "adam_params_per_s": 1e9, "compute_share": 1.0}
    actors = ("h2d", "d2h", "adam", "compute")
    sets = [list(found) for count in (1, 2, 3) for found in itertools.combinations(actors, count)]
    host = {"copy_bytes_per_s": 2e10, "norm_numel_per_s": 1e10, "adam_params_per_s": 1e9, "params_first_per_s": 1e9}
    return {
        "products": products, "attention": attention, "layers": layers, "losses": [], "launch": None, "host": [host],
        "sharing": [{"actors": found, **rates} for found in sets],
    }  # fmt: skip


def _memory(layer_s: float, name: str | None) -> float:
    figure = summary.hardware("here", {}, _measured(layer_s), name, 1 << 30, 1 << 30)["device_memory_bytes_per_s"]
    assert isinstance(figure, float)
    return figure


def test_device_memory_is_as_fast_as_what_is_left_of_layers_says() -> None:
    # 28 bytes of each of 64 features and 6 of each of 128, of 1000 tokens, in 2 ms.
    assert _memory(12e-3, "NVIDIA H200") == pytest.approx(1000 * (28 * 64 + 6 * 128) / 2e-3)


def test_device_memory_is_no_faster_than_its_data_sheet() -> None:
    left_s = 1e-10
    assert _memory(10e-3 + left_s, "NVIDIA H200") == 4.8e12
    assert _memory(10e-3 + left_s, "NVIDIA GH200 480GB") == 4.9e12
    assert _memory(10e-3 + left_s, "another device") > 1e13


def test_layers_that_leave_nothing_say_nothing() -> None:
    assert _memory(9e-3, None) == 4e10
