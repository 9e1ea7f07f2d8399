"""Checkpoints: Hugging Face can read them, training goes on to the bit, and a kill leaves a complete one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tierwise.booster import Booster

STREAMED: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "offload_param_frac": 1.0}
VISITING: dict[str, Any] = {"placement_policy": "static", "offload_optim_frac": 1.0, "stream_optim_frac": 0.6}


def build(kit: Any, seed: int = 0, **options: Any) -> tuple[Any, Any, Any, Any]:
    model = kit.llama(seed=seed, tied=True)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scheduler: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[2, 5], gamma=0.5)
    booster = Booster(kit.plugin(max_norm=0.5, **options))
    model, optimizer, _, _, scheduler = booster.boost(model, optimizer, lr_scheduler=scheduler)
    return booster, model, optimizer, scheduler


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("shard", "placement"), [(True, STREAMED), (False, VISITING)], ids=["folder, streamed", "file, visiting"])
def test_training_goes_on_to_the_bit(kit: Any, tmp_path: Path, precision: str, shard: bool, placement: dict[str, Any]) -> None:
    data = kit.batches(8)
    booster, model, optimizer, scheduler = build(kit, precision=precision, **placement)
    kit.steps(booster, model, optimizer, data[:4], scheduler)
    names = ("model", "optimizer") if shard else ("model.safetensors", "optimizer.safetensors")
    booster.save_model(model, tmp_path / names[0], shard=shard)
    booster.save_optimizer(optimizer, tmp_path / names[1], shard=shard)
    booster.save_lr_scheduler(scheduler, tmp_path / "scheduler.json")
    expected = kit.steps(booster, model, optimizer, data[4:], scheduler)
    # Another placement, another seed; the order of loading does not matter.
    for order, elsewhere in enumerate([{}, VISITING]):
        other, fresh, restarted, rescheduled = build(kit, seed=9, precision=precision, **elsewhere)
        kit.steps(other, fresh, restarted, data[:1], rescheduled)
        loads = [(other.load_model, fresh, names[0]), (other.load_optimizer, restarted, names[1])]
        for load, what, name in loads if order else reversed(loads):
            load(what, tmp_path / name)
        other.load_lr_scheduler(rescheduled, tmp_path / "scheduler.json")
        assert kit.steps(other, fresh, restarted, data[4:], rescheduled) == expected


def test_hugging_face_reads_it(kit: Any, tmp_path: Path) -> None:
    booster, model, optimizer, scheduler = build(kit, precision="bf16", **STREAMED)
    kit.steps(booster, model, optimizer, kit.batches(2), scheduler)
    booster.save_model(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in stored, "tied weights are saved once"
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    reverse = Booster(kit.plugin(precision="bf16"))
    again = kit.llama(tied=True, seed=4)
    loaded.save_pretrained(tmp_path / "by_hugging_face")
    reverse.load_model(reverse.boost(again, torch.optim.AdamW(again.parameters()))[0], tmp_path / "by_hugging_face")
    for name, value in again.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_shards_and_their_index(kit: Any, tmp_path: Path) -> None:
    model = kit.llama(hidden_size=256)
    booster = Booster(kit.plugin())
    booster.save_model(model, tmp_path, size_per_shard=1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    for file in files:
        tensors = load_file(tmp_path / file)
        assert sum(t.numel() * 4 for t in tensors.values()) <= 10**6 or len(tensors) == 1
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    # Again sharded, then as one file, then sharded: nothing stays behind.
    booster.save_model(kit.llama(hidden_size=256, seed=1), tmp_path, size_per_shard=1)
    assert not files & set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert not any((tmp_path / file).exists() for file in files)
    booster.save_model(kit.llama(hidden_size=256, seed=2), tmp_path)
    assert {path.name for path in tmp_path.glob("model*")} == {"model.safetensors"}
    booster.save_model(model, tmp_path, size_per_shard=1)
    assert not (tmp_path / "model.safetensors").exists()


def test_fp32_weights_become_the_exact_master(kit: Any, tmp_path: Path) -> None:
    source = kit.llama(tied=True)
    Booster(kit.plugin()).save_model(source, tmp_path)
    booster, model, optimizer, _ = build(kit, seed=7, precision="bf16", **STREAMED)
    booster.load_model(model, tmp_path)
    masters = optimizer.state_dict()["state"]
    assert masters == {}, "no step was taken"
    for (name, value), param in zip(source.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(optimizer.read_state(param)["master"], value), name


def test_pickles_are_neither_written_nor_read(kit: Any, tmp_path: Path) -> None:
    model = kit.llama()
    booster = Booster(kit.plugin())
    with pytest.raises(ValueError, match="pickle"):
        booster.save_model(model, tmp_path, use_safetensors=False)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        booster.load_model(model, tmp_path)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        booster.load_model(model, tmp_path / "pytorch_model.bin")


def test_another_optimizer_is_refused(kit: Any, tmp_path: Path) -> None:
    booster, model, optimizer, scheduler = build(kit, precision="bf16")
    kit.steps(booster, model, optimizer, kit.batches(1), scheduler)
    booster.save_optimizer(optimizer, tmp_path)
    other, _, larger = kit.boosted(kit.llama(layers=4), precision="bf16")
    with pytest.raises(ValueError, match=r"lacks .*'model.layers.3"):
        other.load_optimizer(larger, tmp_path)
    plain = torch.optim.AdamW(kit.llama().parameters())
    with pytest.raises(ValueError, match="was not boosted"):
        booster.save_optimizer(plain, tmp_path)


CHILD = """
import sys, pathlib
sys.path.insert(0, {here!r})
import torch
from tierwise.checkpoint.format import Entry, write_set
folder = pathlib.Path({folder!r})
round = 0
while True:
    value = float(round)
    entries = [Entry(f"t{{i}}", torch.float32, (200,), lambda v=value: torch.full((200,), v)) for i in range(40)]
    write_set(folder, "model", entries, 4000 if round % 3 else 10**9, {{}}, {{"round": round}})
    if round == 0:
        print("ready", flush=True)
    round += 1
"""


@pytest.mark.parametrize("delay", [0.01, 0.03, 0.05, 0.08, 0.13])
def test_a_kill_at_any_instant_leaves_a_complete_checkpoint(tmp_path: Path, delay: float) -> None:
    from tierwise.checkpoint.reader import SafetensorsReader

    script = CHILD.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    for _ in range(4):
        time.sleep(delay)
        child.send_signal(signal.SIGSTOP)  # The state at this instant is what a kill would leave.
        for _ in range(3):
            reader = SafetensorsReader(tmp_path)
            assert sorted(reader.names) == sorted(f"t{i}" for i in range(40))
            values = {reader.read(name).unique().item() for name in reader.names}
            assert len(values) == 1, "tensors of two checkpoints are mixed"
        child.send_signal(signal.SIGCONT)
    child.kill()
    child.wait()
    child.stdout.close()
    SafetensorsReader(tmp_path)


def test_every_instant_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without chance: the folder is looked at before and after every rename and removal."""
    from tierwise.checkpoint.format import Entry, write_set
    from tierwise.checkpoint.reader import SafetensorsReader

    def entries(value: float) -> list[Entry]:
        return [Entry(f"t{i}", torch.float32, (100,), lambda: torch.full((100,), value)) for i in range(12)]

    seen: list[float] = []

    def look() -> None:
        reader = SafetensorsReader(tmp_path)
        values = {reader.read(name).unique().item() for name in reader.names}
        assert len(reader.names) == 12
        assert len(values) == 1
        seen.append(values.pop())

    real_replace, real_unlink = os.replace, Path.unlink

    def replace(source: Any, target: Any) -> None:
        look()
        real_replace(source, target)
        look()

    def unlink(self: Path, missing_ok: bool = False) -> None:
        look()
        real_unlink(self, missing_ok)
        look()

    write_set(tmp_path, "model", entries(0.0), 10**9, {}, {})
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "unlink", unlink)
    for value, limit in ((1.0, 1000), (2.0, 1000), (3.0, 10**9), (4.0, 900), (5.0, 1000)):
        seen.clear()
        write_set(tmp_path, "model", entries(value), limit, {}, {})
        assert seen[0] == value - 1
        assert seen[-1] == value
        assert seen == sorted(seen), "an instant showed the old checkpoint after the new one"
    monkeypatch.undo()
