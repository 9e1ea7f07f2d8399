"""Adapters on a frozen model: it is only read, so it may stream from the disk, and what is trained is placed by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tierwise import BudgetError, StorageStoppedError
from tierwise.booster import Booster

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

pytestmark = pytest.mark.timeout(120)

STREAMED = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}


class Adapter(nn.Module):
    """A frozen linear layer with a trained product of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) / 8)

    def forward(self, x: Any) -> Any:
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(kit: Any, seed: int = 0) -> Any:
    """A frozen LLaMA of 3 million parameters with adapters."""
    model = kit.llama(hidden_size=192, intermediate_size=512, layers=6, seed=seed).requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, Adapter(getattr(layer.self_attn, name)))
    return model


def tightest_host(kit: Any, disk: Path, **options: Any) -> int:
    """The smallest host budget that the planner names when it may use the disk."""
    with pytest.raises(BudgetError) as caught:
        kit.boosted(adapted(kit), **options, host_budget=1000, nvme_path=disk)
    assert caught.value.tier == "host"
    return int(caught.value.needed_bytes)


def steps(kit: Any, booster: Any, model: Any, optimizer: Any, count: int = 5, seed: int = 1) -> list[float]:
    losses: list[float] = kit.steps(booster, model, optimizer, kit.batches(count * booster.plugin.gradient_accumulation_steps, seed=seed))
    return losses


def placed(booster: Any) -> set[tuple[str, str]]:
    return {(chunk["class"], chunk["home"]) for chunk in booster.plan()["chunks"]}


def frozen_bytes(booster: Any) -> int:
    runtime = booster._runtime
    chunks = enumerate(runtime.memory.plan["chunks"])
    return sum(runtime.layout.param_bytes(index) for index, chunk in chunks if chunk["class"] == "frozen")


def smallest_frozen(booster: Any) -> int:
    runtime = booster._runtime
    placed = enumerate(runtime.memory.plan["chunks"])
    return min(runtime.layout.param_bytes(i) for i, chunk in placed if chunk["home"] == "fetched" and chunk["class"] == "frozen")


def test_what_is_frozen_in_a_layer_is_a_chunk_of_its_own(kit: Any) -> None:
    booster, *_ = kit.boosted(adapted(kit))
    runtime = booster._runtime
    names = [chunk.name for chunk in runtime.grouping.chunks]
    assert names[:3] == ["model.embed_tokens", "model.layers.0", "model.layers.0 (frozen)"]
    assert runtime.grouping.units[1].chunks == [1, 2]
    assert [runtime.layout.state_numel(chunk) > 0 for chunk in range(3)] == [False, True, False]
    # Adapters are stepped on the device while the frozen rest of their layers streams.
    tight = kit.tightest(lambda: adapted(kit))
    booster, *_ = kit.boosted(adapted(kit), device_budget=tight * 11 // 10)
    assert placed(booster) >= {("device", "resident"), ("frozen", "streamed")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_frozen_model_on_the_disk_trains_the_same_adapters(kit: Any, tmp_path: Path, precision: str, accumulation: int) -> None:
    options: dict[str, Any] = {"precision": precision, "gradient_accumulation_steps": accumulation, "max_norm": 0.3}
    reference = kit.boosted(adapted(kit), **options)
    losses = steps(kit, *reference)
    expected = dict(reference[1].state_dict())
    for more in ({}, {"recompute": "full"}, {"device_budget": kit.tightest(lambda: adapted(kit), **options, **STREAMED)}):
        host = tightest_host(kit, tmp_path, **options, **STREAMED, **more)
        booster, model, optimizer = kit.boosted(adapted(kit), **options, **STREAMED, **more, host_budget=host, nvme_path=tmp_path)
        assert ("frozen", "fetched") in placed(booster), more
        assert frozen_bytes(booster) > 3 * host
        assert "frozen parameters" in booster.explain()
        at_start = booster.stats()
        assert steps(kit, booster, model, optimizer) == losses, more
        weights = model.state_dict()
        assert weights.keys() == expected.keys()
        for name, weight in expected.items():
            assert torch.equal(weight, weights[name]), name
        stats = booster.stats()
        assert stats["host_peak_bytes"] <= stats["host_budget_bytes"]
        assert stats["nvme_bytes"] <= stats["nvme_file_bytes"]
        # Read for every use, and written by no step: less than one of them beside the adapters' states.
        assert stats["nvme_fetched_bytes"] >= 5 * accumulation * frozen_bytes(booster) // 2
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        written = stats["nvme_written_bytes"] - at_start["nvme_written_bytes"]
        assert written < 7 * 40 * trained + smallest_frozen(booster), (written, trained)
    assert list(tmp_path.iterdir()) == []


def test_weights_on_the_disk_are_saved_and_replaced(kit: Any, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    options: dict[str, Any] = {"precision": "bf16", **STREAMED}
    spilling = {"host_budget": tightest_host(kit, disk, **options), "nvme_path": disk}
    memory, spilled = kit.boosted(adapted(kit), **options), kit.boosted(adapted(kit), **options, **spilling)
    other = kit.boosted(adapted(kit, seed=5), **options)
    assert ("frozen", "fetched") in placed(spilled[0])
    for booster, model, optimizer in (memory, spilled):
        steps(kit, booster, model, optimizer, 2)
    spilled[0].save_model(spilled[1], tmp_path / "saved")
    memory[0].save_model(memory[1], tmp_path / "expected")
    saved, expected = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors")} for name in ("saved", "expected"))
    assert saved == expected and saved
    # Other weights take their place, also where a slot has the old ones.
    other[0].save_model(other[1], tmp_path / "other")
    losses = []
    for booster, model, optimizer in (memory, spilled):
        booster.load_model(model, tmp_path / "other")
        losses.append(steps(kit, booster, model, optimizer, 3, seed=9))
    assert losses[0] == losses[1]
    booster, model, optimizer = kit.boosted(adapted(kit), **options)
    assert losses[0] != steps(kit, booster, model, optimizer, 3, seed=9)


def test_a_model_without_anything_to_train_streams_from_the_disk(kit: Any, tmp_path: Path) -> None:
    ids = kit.batches(1)[0]
    with torch.no_grad():
        expected = adapted(kit).eval()(input_ids=ids).logits
    options: dict[str, Any] = {"precision": "fp32", **STREAMED, "nvme_path": tmp_path}
    with pytest.raises(BudgetError) as caught:
        Booster(kit.plugin(**options, host_budget=1000)).boost(adapted(kit))
    booster = Booster(kit.plugin(**options, host_budget=caught.value.needed_bytes))
    model, *_ = booster.boost(adapted(kit).eval())
    assert placed(booster) == {("frozen", "fetched")}
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)
    plan = booster.plan()["nvme"]
    assert plan["written_bytes"] == 0 and plan["read_bytes"] > 0


@pytest.mark.filterwarnings("ignore:module forward hook with ``always_call=True`` raised:UserWarning")
def test_a_frozen_weight_that_the_disk_lost_is_never_used(kit: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"precision": "bf16", **STREAMED}
    host = tightest_host(kit, tmp_path, **options)
    booster, model, optimizer = kit.boosted(adapted(kit), **options, host_budget=host, nvme_path=tmp_path)
    steps(kit, booster, model, optimizer, 2)
    booster.flush()
    (path,) = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd") if spills_to(number, tmp_path))
    # The frozen weights alone: whichever of them and the trained chunks' states were read first would be found, else.
    lost = [name for name, value in adapted(kit).named_parameters() if not value.requires_grad and spoil(path, value)]
    assert len(lost) >= 6 * 7, lost
    with pytest.raises(StorageStoppedError, match=r"spilled param of `[\w.]+( \(frozen\))?`, elements \d+ to \d+: .*checksum"):
        steps(kit, booster, model, optimizer, 2)


def spoil(path: str, value: Any) -> bool:
    """Overwrite a parameter's bf16 elements in a file, and say whether they were there."""
    elements = value.detach().bfloat16().flatten()[:64].view(torch.uint8).numpy().tobytes()
    with open(path, "r+b", buffering=0) as file:
        at = file.readall().find(elements)
        if at >= 0:
            os.pwrite(file.fileno(), b"\x5a" * len(elements), at)
    return at >= 0


def spills_to(number: str, disk: Path) -> bool:
    """Whether an open file of this process has no name, in that directory."""
    try:
        target = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        return False
    return target.startswith(str(disk.resolve())) and target.endswith("(deleted)")
