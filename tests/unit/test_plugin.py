"""Options: parsed, validated, and refused with a suggestion."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tierwise._core import kernel_threads
from tierwise.config import available_memory_bytes, default_speeds, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"), [(5, 5), ("5", 5), ("6GiB", 6 * 2**30), ("700MB", 700 * 10**6), ("1.5 kb", 1500), (" 2 TiB ", 2 * 2**40)]
)
def test_sizes(text: int | str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "6 gigs", "-1", "0", 0, -5, True, 1.5, None, "1e9"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="device_budget"):
        parse_bytes(text, "device_budget")


def test_sizes_for_people() -> None:
    assert [format_bytes(n) for n in (0, 1023, 2**20, 5 * 2**29)] == ["0 B", "1023 B", "1.00 MiB", "2.50 GiB"]


def test_speeds_of_known_and_unknown_devices() -> None:
    assert default_speeds("NVIDIA H100 80GB HBM3", 16).flops == 6.8e14
    assert default_speeds("NVIDIA H100 80GB HBM3", 8).host_adam_params == pytest.approx(8 * 3.4e8)
    assert default_speeds("NVIDIA H100 80GB HBM3", 64).host_adam_params == 3.8e9
    assert default_speeds("Some New Device", 1).flops > 0


def test_threads_are_counted_as_the_kernels_count_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # One count for the kernels, the planner and `tierwise doctor`.
    for value in ("3", None):
        if value is None:
            monkeypatch.delenv("TIERWISE_NUM_THREADS")
        else:
            monkeypatch.setenv("TIERWISE_NUM_THREADS", value)
        expected = 3 if value else len(os.sched_getaffinity(0))
        assert kernel_threads() == expected
        script = (
            "import torch; from tierwise.booster import Booster; from tierwise.booster.plugin import GeminiPlugin\n"
            "net = torch.nn.Linear(4, 4); booster = Booster(GeminiPlugin(device='emulated', device_budget='64MiB', host_budget='64MiB'))\n"
            "net, *_ = booster.boost(net, torch.optim.AdamW(net.parameters())); net(torch.zeros(2, 4)); print(booster.stats()['threads'])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
        assert int(done.stdout) == expected


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, tierwise; from tierwise.config import parse_bytes; assert 'torch' not in sys.modules; tierwise.TierwiseError"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- the plugin -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin() -> Any:
    pytest.importorskip("torch")
    from tierwise.booster.plugin import GeminiPlugin

    return GeminiPlugin


def test_unknown_options_are_refused_with_a_suggestion(plugin: Any) -> None:
    with pytest.raises(ValueError, match="no option 'precison'; did you mean 'precision'"):
        plugin(precison="bf16")
    with pytest.raises(ValueError, match=r"known options are .*clip_mode"):
        plugin(zzz=1)
    with pytest.raises(ValueError, match="keyword arguments only"):
        plugin("bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "precision='int8' is not one of 'bf16', 'fp16', 'fp32'"),
        ({"placement_policy": "cuda"}, "placement_policy"),
        ({"clip_mode": "never"}, "clip_mode"),
        ({"device": "tpu"}, "device="),
        ({"device_budget": "lots"}, "device_budget"),
        ({"host_budget": 0}, "host_budget"),
        ({"max_norm": 0.0}, "max_norm must be a positive finite number"),
        ({"max_norm": float("nan")}, "max_norm must be a positive finite number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps"),
        ({"micro_batch_size": 1.5}, "micro_batch_size"),
        ({"num_threads": 0}, "num_threads"),
        ({"num_threads": 100_000}, "at most 1024"),
        ({"max_norm": True}, "max_norm must be a positive finite number or None, got True"),
        ({"max_norm": float("inf")}, "max_norm"),
        ({"max_norm": "1"}, "max_norm"),
        ({"offload_optim_frac": "a"}, "offload_optim_frac must be a finite number, got 'a'"),
        ({"growth_factor": float("inf")}, "growth_factor"),
        ({"fused_loss": "no"}, "fused_loss must be True or False, got 'no'"),
        ({"link_latency_ns": -1}, "link_latency_ns must be an integer of at least 0, got -1"),
        ({"link_latency_ns": 1.5}, "link_latency_ns"),
        ({"h2d_bytes_per_second": "25GB"}, "h2d_bytes_per_second"),
        ({"d2h_bytes_per_second": 0}, "d2h_bytes_per_second"),
        ({"host_adam_params_per_second": -1.0}, "host_adam_params_per_second must be a positive finite number"),
        ({"offload_optim_frac": 0.5}, "belongs to placement_policy='static'"),
        ({"placement_policy": "static", "offload_optim_frac": 1.5}, "between 0 and 1"),
        ({"placement_policy": "static", "shard_param_frac": 0.2, "offload_param_frac": 0.5, "offload_optim_frac": 1.0}, "not kept whole"),
        ({"placement_policy": "static", "offload_param_frac": 0.5}, "needs offload_optim_frac"),
        ({"stream_optim_frac": 0.5}, "stream_optim_frac belongs to placement_policy='static'"),
        ({"placement_policy": "static", "stream_optim_frac": -0.5}, "stream_optim_frac must be between 0 and 1"),
        ({"placement_policy": "static", "stream_optim_frac": 0.5}, "there are none: raise offload_optim_frac"),
        ({"initial_scale": 0.5}, "min <= initial <= max"),
        ({"backoff_factor": 1.0}, "backoff_factor"),
    ],
)
def test_values_that_cannot_work(plugin: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin(**options)


def test_it_is_frozen_and_budgets_become_bytes(plugin: Any) -> None:
    made = plugin(device_budget="700MB", host_budget="1GiB")
    assert (made.device_budget, made.host_budget) == (700 * 10**6, 2**30)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.precision = "fp32"


def test_the_reserve_is_proportional_on_small_budgets(plugin: Any) -> None:
    assert plugin().reserve_bytes(80 * 10**9) == 256 * 10**6
    assert plugin().reserve_bytes(80 * 10**6) == 10 * 10**6
    assert plugin(reserve="1MB").reserve_bytes(80 * 10**9) == 10**6
    assert plugin(reserve=0).reserve_bytes(80 * 10**9) == 0


@pytest.mark.parametrize(
    ("limit", "expected"), [("max", 900 * 2**20), (str(800 * 2**20), (800 - 500 + 300) * 2**20), (str(100 * 2**20), 0)]
)
def test_a_control_group_leaves_what_its_files_would_give_up(monkeypatch: pytest.MonkeyPatch, limit: str, expected: int) -> None:
    texts = {
        "/proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {900 * 2**10} kB\n",
        "/sys/fs/cgroup/memory.max": limit + "\n",
        "/sys/fs/cgroup/memory.current": f"{500 * 2**20}\n",
        "/sys/fs/cgroup/memory.stat": f"file {400 * 2**20}\ninactive_file {300 * 2**20}\nactive_file 1\n",
    }
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: texts[str(self)])
    assert available_memory_bytes() == expected
