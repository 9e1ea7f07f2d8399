"""Predictions of the committed code in docs/ are what the simulator says."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tierwise
from tierwise.sim import Shortage

DOCS = Path(__file__).parents[2] / "docs"
POLICIES = {
    "Tierwise": "tierwise", "ZeRO 2": "zero2", "ZeRO 3": "zero3", "ZeRO 2, optimizer on the CPU": "zero2-offload",
    "ZeRO 3, optimizer on the CPU": "zero3-offload", "FSDP": "fsdp", "FSDP, CPU offload": "fsdp-offload",
}  # fmt: skip
SEARCHED: dict[str, Any] = {"tensor_parallel": 2, "zero": 3, "device_budget": "36641439744"}
"""What `search` finds for the row that names it, in ten seconds."""


def text(page: str, after: str) -> str:
    """A page's text from some words on."""
    found = (DOCS / page).read_text(encoding="utf-8").partition(after)
    assert found[1], f"{page} no longer says {after!r}"
    return found[2]


def rows(page: str, after: str) -> Iterator[list[str]]:
    """Cells of the rows of the first table after some words."""
    lines = iter(text(page, after).splitlines())
    table = itertools.takewhile(lambda line: line.startswith("|"), itertools.dropwhile(lambda line: not line.startswith("|"), lines))
    yield from [[cell.strip() for cell in line.strip("|").split("|")] for line in table][2:]


def prose(page: str, after: str) -> str:
    """What follows some words, on one line."""
    return " ".join(text(page, after).split())


def simulated(model: str, gpus: int, tokens: int, policy: Any, micro_batch_size: int = 1, **more: Any) -> Any:
    return tierwise.simulate(
        model, hardware="dgx-a100-40", gpus=gpus, micro_batch_size=micro_batch_size, tokens_per_step=tokens, policy=policy, **more
    )


def assert_said(said: str, found: float) -> None:
    """The same to the last digit that is said, but for how a half is rounded."""
    digits = len(said.partition(".")[2])
    assert abs(float(said.replace(",", "")) - found) <= 0.501 * 10**-digits, f"the page says {said}, the simulator {found}"


def test_seven_billion_parameters_on_eight() -> None:
    table = list(rows("scaling.md", "## LLaMA-2-7B on 8"))
    assert [row[0] for row in table] == list(POLICIES)
    found_s = {}
    for name, *cells, device, host in table:
        least, _, most = device.partition(" to ")
        for cell, tokens in zip(cells, (1 << 16, 1 << 20), strict=True):
            result = simulated("llama2-7b", 8, tokens, POLICIES[name])
            step, mfu, hfu = re.fullmatch(r"([\d.]+) \(([\d.]+) / ([\d.]+)\)", cell).groups()  # type: ignore[union-attr]
            for said, found in ((step, result.step_s), (mfu, 100 * result.mfu), (hfu, 100 * result.hfu)):
                assert_said(said, found)
            assert_said(host, result.host_peak_bytes / 1e9)
            assert float(least) - 0.5 <= result.device_peak_bytes / 1e9 <= float(most or least) + 0.5, (name, device)
            found_s[name, tokens] = result.step_s
    ours, theirs, offloaded = ([found_s[name, tokens] for tokens in (1 << 16, 1 << 20)] for name in
                               ("Tierwise", "ZeRO 3", "ZeRO 3, optimizer on the CPU"))  # fmt: skip
    slower = max(a / b - 1 for a, b in zip(ours, theirs, strict=True))
    two = {policy: simulated("llama2-7b", 8, 1 << 20, policy, micro_batch_size=2) for policy in ("zero3", "tierwise")}
    assert prose("scaling.md", "nothing is faster than ZeRO 3: ").startswith(
        f"Tierwise is level with it ({100 * slower:.1f} % slower at most). Against ZeRO 3 with the optimizer on the CPU "
        f"it is {offloaded[0] / ours[0]:.1f} times as fast at 64k tokens per step and {100 * (offloaded[1] / ours[1] - 1):.0f} % faster "
        "at 1M, because the CPU's step is paid once per step whatever its size. At micro-batch 2 ZeRO 3 has to recompute everything "
        f"({two['zero3'].step_s:.1f} s), Tierwise nothing ({two['tierwise'].step_s:.1f} s; it keeps "
        f"{two['tierwise'].host_peak_bytes / 1e9:.0f} GB per GPU on the host instead)."
    )


def test_seventy_billion_parameters_on_512() -> None:
    found_s = []
    for name, step, tokens_per_s, used, device, host in rows("scaling.md", "## LLaMA-2-70B on 512"):
        searched: dict[str, Any] = SEARCHED if "search" in name else {}
        result = simulated("llama2-70b", 512, 1 << 22, POLICIES[name.split(", `")[0]], **searched)
        mfu, hfu = used.split(" / ")
        for said, found in (
            (step, result.step_s), (mfu, 100 * result.mfu), (hfu, 100 * result.hfu),
            (device, result.device_peak_bytes / 1e9), (host, result.host_peak_bytes / 1e9),
        ):  # fmt: skip
            assert_said(said, found)
        assert float(tokens_per_s.replace(",", "")) == pytest.approx((1 << 22) / result.step_s, rel=5e-3)
        found_s.append(result.step_s)
    short = [simulated("llama2-70b", 512, 512 * 2048, policy, seq=2048).step_s for policy in ("zero3-offload", "tierwise")]
    (same, best, one), offloaded = (found_s[0], found_s[1], short[0] / short[1]), found_s[3]
    assert prose("scaling.md", "not what these models give: ").startswith(
        f"{100 * (offloaded / same - 1):.0f} % with the same parallel sizes, {100 * (offloaded / best - 1):.0f} % with the best that "
        f"`search` finds, {100 * (one - 1):.0f} % with one sequence of 2,048 tokens per GPU and step."
    )


def test_eight_to_sixteen_thousand_gpus() -> None:
    gpus = 0
    for count, *cells in rows("scaling.md", "## 8 to 16,384"):
        gpus = int(count.replace(",", ""))
        runs = [(model, policy) for model in ("llama2-7b", "llama2-70b") for policy in ("tierwise", "zero3", "zero3-offload")]
        for said, (model, policy) in zip(cells, runs, strict=True):
            result = simulated(model, gpus, 8192 * gpus, policy)
            assert (said == "-") == isinstance(result, Shortage), (gpus, model, policy)
            if said != "-":
                assert_said(said, 100 * result.mfu)
    assert gpus == 16384


def test_a_step_on_one_gpu() -> None:
    asked = {"16k, 4 rows": (4, 1 << 14), "32k, 8 rows": (8, 1 << 15), "128k, 8 times 4 rows": (4, 1 << 17)}
    table = {tokens: (step, recomputed) for tokens, _, _, step, recomputed in rows("simulator.md", "(no calibration, its own plan)")}
    assert list(table) == list(asked)
    for tokens, (micro_batch, tokens_per_step) in asked.items():
        more: dict[str, Any] = {"micro_batch_size": micro_batch, "tokens_per_step": tokens_per_step, "host_budget": "110GB"}
        result = tierwise.simulate("llama2-7b", hardware="h100", **more)
        assert isinstance(result, tierwise.sim.Simulation)
        step, recomputed = table[tokens]
        assert_said(step, result.step_s)
        flags = [f"--{name.replace('_size', '').replace('_', '-')}={value}" for name, value in more.items()]
        command = [sys.executable, "-c", "import sys; from tierwise.sim import main; sys.exit(main())", "run", "--model=llama2-7b"]
        ran = subprocess.run([*command, "--hardware=h100", *flags], capture_output=True, text=True, check=True)
        assert re.search(rf"^recomputed layers +{recomputed} of 32$", ran.stdout, re.MULTILINE), ran.stdout
