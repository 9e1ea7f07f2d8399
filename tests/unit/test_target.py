"""What the CUDA target asks of torch's allocator; the device itself is replaced."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tierwise._core import Device  # noqa: E402
from tierwise.booster.plugin import GeminiPlugin  # noqa: E402
from tierwise.gemini import target  # noqa: E402
from tierwise.gemini.target import Target, expand_segments  # noqa: E402


@pytest.fixture
def fractions(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    given: list[float] = []

    def limit(fraction: float, device: Any) -> None:
        given.append(fraction)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50, 100))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limit)
    return given


def cuda() -> Target:
    return Target(torch.device("cuda", 0), Device.emulated(), emulated=False)


def test_a_limit_is_lifted_by_its_own_model_only(fractions: list[float]) -> None:
    first = cuda().limit(20)
    second = cuda().limit(30)
    first()  # The earlier model is collected while the later one trains.
    assert fractions == [0.2, 0.3]
    second()
    assert fractions == [0.2, 0.3, 1.0]


def test_no_budget_is_no_limit_and_none_is_above_the_device(fractions: list[float]) -> None:
    cuda().limit(None)
    cuda().limit(1000)
    assert fractions == [1.0, 1.0]


def test_a_forked_child_leaves_the_device_alone(fractions: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    lift = cuda().limit(20)
    monkeypatch.setattr("os.getpid", lambda: -1)
    lift()
    assert fractions == [0.2]


def test_only_the_allocator_of_cuda_loses_bytes() -> None:
    assert cuda().fragmentation_bytes(24 * 10**9) == 10**9
    assert dataclasses.replace(cuda(), expandable=True).fragmentation_bytes(128 * 10**9) == 10**9
    assert Target(torch.device("cpu"), Device.emulated(), emulated=True).fragmentation_bytes(24 * 10**9) == 0


@pytest.mark.parametrize(
    ("environment", "changed", "expandable"),
    [
        ({}, ["expandable_segments:True"], True),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64,"}, ["max_split_size_mb:64,expandable_segments:True"], True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, [], True),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, [], False),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, [], False),
    ],
    ids=["default", "other settings stay", "asked for", "refused", "another allocator"],
)
def test_segments_grow_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], changed: list[str], expandable: bool
) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    seen: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", seen.append, raising=False)
    monkeypatch.delattr(torch._C, "_accelerator_getAllocatorSettings", raising=False)
    assert expand_segments() is expandable
    assert seen == changed


def test_what_a_program_has_set_stays_and_is_set_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    settings = ["garbage_collection_threshold:0.8"]
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append, raising=False)
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings[-1], raising=False)
    assert expand_segments()
    assert expand_segments()
    assert settings[1:] == ["garbage_collection_threshold:0.8,expandable_segments:True"]
    settings.append("expandable_segments:False")
    assert not expand_segments()


def test_a_host_whose_speed_was_given_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    measured = {"host_adam_params": 3e9, "host_params_first": 4e9}
    monkeypatch.setattr(target, "_host_adam_params", lambda threads: measured)
    options: dict[str, Any] = {"host_budget": "100GB", "micro_batch_size": 1, "seq_len": 16}
    assert cuda().speeds(GeminiPlugin(**options), 4096).host_adam_params == 3e9
    for where in (cuda(), Target(torch.device("cpu"), Device.emulated(), emulated=True)):
        speeds = where.speeds(GeminiPlugin(**options, host_adam_params_per_second=5e9), 4096)
        # Beside copies, and the first of two passes, which moves less.
        assert speeds.host_adam_params == pytest.approx(4e9)
        assert speeds.host_params_first == pytest.approx(5.2e9)
