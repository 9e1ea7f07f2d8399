"""From measurements to the figures of a hardware file. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SCHEMA_VERSION = 2
_PEAKS = (  # part of the device's name, dense bf16 FLOP/s and bytes per second of memory of its data sheet, the largest that has this name
    ("B200", 2.25e15, 8.0e12),
    ("GH200", 989.4e12, 4.9e12),
    ("H200", 989.4e12, 4.8e12),
    ("H100", 989.4e12, 3.9e12),
    ("A100", 312e12, 2.04e12),
    ("5090", 209.5e12, 1.792e12),
    ("4090", 165.2e12, 1.008e12),
    ("3090", 71e12, 0.936e12),
)
_LEAST_SHARE = 0.25
"""Products of at least this share of the largest one's work count for the sustained rates."""


def hardware(
    name: str,
    about: dict[str, str],
    measured: dict[str, Any],
    device_name: str | None,
    device_memory_bytes: int,
    host_memory_bytes: int,
) -> dict[str, Any]:
    """The contents of a hardware file: what `measured` says in one figure each, and all of it."""
    products, sharing = measured["products"], measured["sharing"]
    forward = _rate(products, lambda row: row["forward_s"], 2.0)
    backward = _rate(products, lambda row: row["input_grad_s"] + row["weight_grad_s"], 4.0)
    longest = max(measured["attention"], key=lambda row: row["sequences"] * row["seq"] ** 2 * row["heads"] * row["head_dim"])
    attention_flops = 2.0 * longest["sequences"] * longest["seq"] ** 2 * longest["heads"] * longest["head_dim"]
    both = _row(sharing, "h2d", "d2h")
    adam_both = _row(sharing, "h2d", "d2h", "adam")
    best_host = measured["host"][-1]
    launch = measured["launch"]
    known, fastest_memory = next(((flops, memory) for part, flops, memory in _PEAKS if part in (device_name or "")), (None, float("inf")))
    return {
        "schema_version": SCHEMA_VERSION,
        "name": name,
        "sources": about,
        "peak_flops": known or max(forward, backward),
        "matmul_forward_flops": forward,
        "matmul_backward_flops": backward,
        "attention_forward_flops": attention_flops / longest["forward_s"],
        "attention_backward_flops": 2 * attention_flops / longest["backward_s"],
        # Products that are measured one after the other are hotter than layers that rest: what is left of a layer may be too little.
        "device_memory_bytes_per_s": min(_element_wise(measured) or best_host["copy_bytes_per_s"] * 2, fastest_memory),
        "device_memory_bytes": device_memory_bytes,
        "h2d_bytes_per_s": _row(sharing, "h2d")["h2d_bytes_per_s"],
        "d2h_bytes_per_s": _row(sharing, "d2h")["d2h_bytes_per_s"],
        "h2d_duplex_bytes_per_s": both["h2d_bytes_per_s"],
        "d2h_duplex_bytes_per_s": both["d2h_bytes_per_s"],
        "pageable_bytes_per_s": min(_row(sharing, "h2d")["h2d_bytes_per_s"], measured["host"][0]["copy_bytes_per_s"]),
        "gpus_per_host_link": 1,
        # What host memory carried when everything wanted it.
        "host_memory_bytes_per_s": max(
            adam_both["h2d_bytes_per_s"] + adam_both["d2h_bytes_per_s"] + 26 * adam_both["adam_params_per_s"],
            26 * best_host["adam_params_per_s"],
        ),
        "host_stream_bytes_per_s": 2 * best_host["norm_numel_per_s"],
        "host_adam_params_per_s": best_host["adam_params_per_s"],
        "host_params_first_per_s": best_host["params_first_per_s"],
        "host_memory_bytes": host_memory_bytes,
        "nvme": measured.get("disk"),
        "d2h_compute_tax": _tax(_row(sharing, "d2h", "compute")),
        "host_adam_compute_tax": _tax(_row(sharing, "adam", "compute")),
        "launch_ns": launch["forward_ns"] if launch else 300_000,
        "gpus_per_node": 1,
        "intra_node": None,
        "network": None,
        "measured": measured,
    }


def _row(sharing: Iterable[dict[str, Any]], *actors: str) -> dict[str, Any]:
    return next(row for row in sharing if row["actors"] == list(actors))


def _tax(row: dict[str, Any]) -> float:
    return min(max(1.0 - float(row["compute_share"]), 0.0), 0.4)


def _rate(products: list[dict[str, Any]], seconds: Any, flops_per_element: float) -> float:
    """FLOP/s over the larger products."""
    work = [row["tokens"] * row["inputs"] * row["outputs"] for row in products]
    large = [(w, seconds(row)) for w, row in zip(work, products, strict=True) if w >= _LEAST_SHARE * max(work)]
    return float(flops_per_element * sum(w for w, _ in large) / sum(s for _, s in large))


def _element_wise(measured: dict[str, Any]) -> float | None:
    """Device bytes per second of what a layer does between its products and its attention, in forward; None without whole layers."""
    counted, seconds = 0.0, 0.0
    for layer in measured["layers"]:
        tokens, hidden, inner = layer["sequences"] * layer["seq"], layer["hidden"], layer["inner"]
        known = {(row["tokens"], row["inputs"], row["outputs"]): row["forward_s"] for row in measured["products"]}
        product = [known[shape] for shape in ((tokens, hidden, hidden), (tokens, hidden, inner), (tokens, inner, hidden)) if shape in known]
        attention = next(
            (
                row["forward_s"] * layer["heads"] / row["heads"]
                for row in measured["attention"]
                if (row["sequences"], row["seq"], row["head_dim"]) == (layer["sequences"], layer["seq"], hidden // layer["heads"])
            ),
            None,
        )
        if attention is None or len(product) < 3:
            continue
        rest = layer["forward_s"] - attention - 4 * product[0] - 2 * product[1] - product[2]
        if rest > 0:
            # Two norms, two residual sums, rotary embeddings, SwiGLU, as the simulator counts them.
            counted += tokens * (20 * hidden + 8 * hidden + 6 * inner)
            seconds += rest
    return counted / seconds if seconds > 0 else None
