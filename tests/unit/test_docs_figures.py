"""Figures of docs/scaling.md are predictions of the committed code: what the page says is what the simulator says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tierwise
from tierwise.sim import Shortage

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
POLICIES = {
    "Tierwise": "tierwise", "ZeRO 2": "zero2", "ZeRO 3": "zero3", "ZeRO 2, optimizer on the CPU": "zero2-offload",
    "ZeRO 3, optimizer on the CPU": "zero3-offload", "FSDP": "fsdp", "FSDP, CPU offload": "fsdp-offload",
}  # fmt: skip
SEARCHED = {"tensor_parallel": 2, "zero": 3, "device_budget": "36641439744"}
"""What `search` finds for the row that names it, in ten seconds."""


def rows(heading: str) -> Iterator[list[str]]:
    """Cells of the rows of the only table under a heading."""
    section = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    (found,) = (part for part in section if part.startswith(heading))
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines() if line.startswith("|")]
    yield from table[2:]


def simulated(model: str, gpus: int, tokens: int, policy: Any, **more: Any) -> Any:
    return tierwise.simulate(
        model, hardware="dgx-a100-40", gpus=gpus, micro_batch_size=1, tokens_per_step=tokens, policy=policy, **more
    )  # fmt: skip


def assert_said(said: str, found: float) -> None:
    """The same to the last digit that is said, but for how a half is rounded."""
    digits = len(said.partition(".")[2])
    assert abs(float(said.replace(",", "")) - found) <= 0.501 * 10**-digits, f"the page says {said}, the simulator {found}"


def test_seven_billion_parameters_on_eight() -> None:
    table = list(rows("LLaMA-2-7B on 8"))
    assert [row[0] for row in table] == list(POLICIES)
    for name, *cells, _, host in table:
        for cell, tokens in zip(cells, (1 << 16, 1 << 20), strict=True):
            result = simulated("llama2-7b", 8, tokens, POLICIES[name])
            step, mfu, hfu = re.fullmatch(r"([\d.]+) \(([\d.]+) / ([\d.]+)\)", cell).groups()  # type: ignore[union-attr]
            for said, found in ((step, result.step_s), (mfu, 100 * result.mfu), (hfu, 100 * result.hfu)):
                assert_said(said, found)
            assert_said(host, result.host_peak_bytes / 1e9)


def test_seventy_billion_parameters_on_512() -> None:
    for name, step, tokens_per_s, used, device, host in rows("LLaMA-2-70B on 512"):
        searched = SEARCHED if "search" in name else {}
        result = simulated("llama2-70b", 512, 1 << 22, POLICIES[name.split(", `")[0]], **searched)
        mfu, hfu = used.split(" / ")
        for said, found in (
            (step, result.step_s), (mfu, 100 * result.mfu), (hfu, 100 * result.hfu),
            (device, result.device_peak_bytes / 1e9), (host, result.host_peak_bytes / 1e9),
        ):  # fmt: skip
            assert_said(said, found)
        assert float(tokens_per_s.replace(",", "")) == pytest.approx((1 << 22) / result.step_s, rel=5e-3)


def test_eight_to_sixteen_thousand_gpus() -> None:
    gpus = 0
    for count, *cells in rows("8 to 16,384"):
        gpus = int(count.replace(",", ""))
        runs = [(model, policy) for model in ("llama2-7b", "llama2-70b") for policy in ("tierwise", "zero3", "zero3-offload")]
        for said, (model, policy) in zip(cells, runs, strict=True):
            result = simulated(model, gpus, 8192 * gpus, policy)
            assert (said == "-") == isinstance(result, Shortage), (gpus, model, policy)
            if said != "-":
                assert_said(said, 100 * result.mfu)
    assert gpus == 16384
