"""Speeds beside each other are compared within a round."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs torch: install tierwise[train]")

from tierwise._core import HostBench
from tierwise.calibration import host, measure, sharing

ALONE = {"h2d": 50e9, "d2h": 40e9, "adam": 5e9, "compute": 700.0}
TIMES = {"params_first": 1.5, "moments": 1.4, "undoable": 0.8}


class _Rounds:
    """A machine that is slower in its second round, host, device and links alike but for the links."""

    def __init__(self, *args: Any) -> None:
        self.runs = 0

    def run(self, actors: tuple[str, ...], seconds: float, kernel: str = "adam") -> dict[str, float]:
        # 15 sets, 4 of them with Adam and without copies to the host or the reverse each: 4 first passes, 4 second ones, 4 undoable steps.
        slower = 1.0 if self.runs < 15 + 12 else 0.5
        self.runs += 1
        left = 1.0 - 0.1 * (len(actors) - 1)
        found = {actor: ALONE[actor] * left for actor in actors}
        for actor in ("adam", "compute"):
            if actor in found:
                found[actor] *= slower
        if kernel != "adam":
            found["adam"] *= TIMES[kernel]
            found |= {copy: found[copy] * 0.6 * TIMES[kernel] for copy in ("h2d", "d2h") if copy in found}
        return found


def test_a_machine_that_is_slower_for_a_while_has_the_same_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = _Rounds()
    monkeypatch.setattr(sharing, "_Machine", lambda device, bench: machine)
    rows = sharing.beside(None, None, 0.2, lambda text: None)  # type: ignore[arg-type]
    assert machine.runs == 2 * (15 + 12)
    assert [tuple(row["actors"]) for row in rows] == [
        actors for count in range(1, 5) for actors in itertools.combinations(("h2d", "d2h", "adam", "compute"), count)
    ]
    for row in rows:
        actors = row["actors"]
        left = 1.0 - 0.1 * (len(actors) - 1)
        # Half of the rounds are half as fast.
        expected = {
            "h2d_bytes_per_s": 50e9 * left if "h2d" in actors else None,
            "d2h_bytes_per_s": 40e9 * left if "d2h" in actors else None,
            "adam_params_per_s": 0.75 * 5e9 * left if "adam" in actors else None,
            "compute_share": left if "compute" in actors else None,
        }
        if "adam" in actors and "d2h" not in actors:
            expected["params_first_per_s"] = TIMES["params_first"] * 0.75 * 5e9 * left
            if "h2d" in actors:
                expected["params_first_h2d_bytes_per_s"] = 0.6 * TIMES["params_first"] * 50e9 * left
        for kernel in ("moments", "undoable") if "adam" in actors and "h2d" not in actors else ():
            expected[host.KERNELS[kernel]] = TIMES[kernel] * 0.75 * 5e9 * left
            if "d2h" in actors:
                expected[f"{kernel}_d2h_bytes_per_s"] = 0.6 * TIMES[kernel] * 40e9 * left
        assert {name: value if value is None else pytest.approx(value) for name, value in row.items() if name != "actors"} == expected


@pytest.mark.parametrize(("free_bytes", "expected"), [(128 << 30, 8), (16 << 30, 4), (3 << 30, 1), (1 << 20, 1)])
def test_copies_take_a_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int, expected: int) -> None:
    monkeypatch.setattr(sharing, "available_memory_bytes", lambda: free_bytes)
    assert sharing.pieces(128 << 20) == expected


@pytest.mark.parametrize(("free_bytes", "expected"), [(128 << 30, 400_000_000), (14 * 8 * 1000, 1000), (50, 1)])
def test_the_host_is_measured_on_a_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int, expected: int) -> None:
    monkeypatch.setattr(measure, "available_memory_bytes", lambda: free_bytes)
    assert measure.Options().numel() == expected


def test_what_was_asked_for_is_measured() -> None:
    assert measure.Options(host_numel=1000).numel() == 1000


def test_few_parameters_are_measured_as_they_are() -> None:
    bench = HostBench(100_000)
    assert host.fewer(bench) is bench
