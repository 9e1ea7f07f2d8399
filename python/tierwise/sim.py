"""The simulator of the Rust core, without torch: `simulate`, `search`, and the console entry of `tierwise-sim`."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Literal

from tierwise import _core

Policy = Literal["tierwise", "ddp", "zero1", "zero2", "zero3", "zero2-offload", "zero3-offload", "fsdp", "fsdp1", "fsdp-offload"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
Recompute = Literal["auto", "none", "full"]
Offload = Literal["auto", "none", "full"]
ClipMode = Literal["defer", "speculate", "auto"]


@dataclass(frozen=True)
class Stalls:
    """Seconds that compute stood still in a step, by cause."""

    parameter_fetch_s: float
    optimizer_step_s: float
    gradient_hand_over_s: float
    communication_s: float
    pipeline_s: float
    device_memory_s: float
    activations_s: float
    launch_s: float


@dataclass(frozen=True)
class Simulation:
    """A step that fits; `compute_s + slowdown_s +` all stalls `= step_s`. Memory is per GPU, of the slowest rank's stage."""

    model: str
    num_params: int
    hardware: str
    policy: str
    gpus: int
    data_parallel: int
    accumulation: int
    step_s: float
    tokens_per_s: float
    mfu: float
    hfu: float
    compute_s: float
    slowdown_s: float
    stalls: Stalls
    device_peak_bytes: int
    device_peak_op: str
    host_peak_bytes: int
    h2d_bytes: int
    d2h_bytes: int
    nvme_read_bytes: int
    nvme_written_bytes: int

    @property
    def fits(self) -> Literal[True]:
        """True."""
        return True


@dataclass(frozen=True)
class Shortage:
    """A step that does not fit: what is missing where, and options of `tierwise-sim run` that fit, each found by simulating with it."""

    tier: str
    op: str | None
    needed_bytes: int
    shortfall_bytes: int
    alternatives: tuple[str, ...]

    @property
    def fits(self) -> Literal[False]:
        """False."""
        return False


@dataclass(frozen=True)
class SearchResult:
    """The fastest settings of those tried, as options of `tierwise-sim run`, and their step."""

    flags: str
    tried: int
    fitting: int
    best: Simulation


def simulate(
    model: str | os.PathLike[str],
    *,
    hardware: str | os.PathLike[str] = "h100",
    network: str | None = None,
    policy: Policy = "tierwise",
    gpus: int = 1,
    tensor_parallel: int = 1,
    sequence_parallel: int = 1,
    pipeline: int = 1,
    schedule: Schedule = "1f1b",
    zero: int = 3,
    seq: int = 4096,
    micro_batch_size: int = 1,
    tokens_per_step: int | None = None,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
    nvme_budget: int | str | None = None,
    recompute: Recompute = "auto",
    offload_activations: Offload = "none",
    clip_mode: ClipMode = "defer",
) -> Simulation | Shortage:
    """Plans and simulates one steady-state step.

    `model` is a preset's name or the path of a Hugging Face `config.json`; `hardware` a preset's name or the path of a hardware file.
    Budgets are per GPU, in bytes or as text such as "75GiB"; what is left out is what the machine has, and
    without `nvme_budget` nothing is spilled. `seq` and `tokens_per_step` are tokens, `micro_batch_size` sequences of a data-parallel rank.

    Raises ValueError for settings that contradict each other, with the values and what is allowed.
    """
    values = dict(
        model=os.fspath(model), hardware=os.fspath(hardware), network=network, policy=policy, gpus=gpus, tensor_parallel=tensor_parallel,
        sequence_parallel=sequence_parallel, pipeline=pipeline, schedule=schedule, zero=zero, seq=seq, micro_batch=micro_batch_size,
        tokens_per_step=tokens_per_step, device_budget=device_budget, host_budget=host_budget, nvme_budget=nvme_budget,
        recompute=recompute, offload_activations=offload_activations, clip_mode=clip_mode,
    )  # fmt: skip
    answer = _ask("run", values)
    return _simulation(answer) if answer["fits"] else _shortage(answer)


def search(
    model: str | os.PathLike[str],
    *,
    tokens_per_step: int,
    hardware: str | os.PathLike[str] = "h100",
    network: str | None = None,
    policy: Policy = "tierwise",
    gpus: int = 1,
    seq: int = 4096,
    device_budget: int | str | None = None,
    host_budget: int | str | None = None,
    nvme_budget: int | str | None = None,
    recompute: Recompute = "auto",
    clip_mode: ClipMode = "defer",
) -> SearchResult | Shortage:
    """Finds the fastest micro-batch, parallel sizes and sharding for a step of `tokens_per_step` tokens.

    Arguments and errors are those of `simulate`; a `Shortage` says what one sequence per rank and micro-batch lacks.
    """
    values = dict(
        model=os.fspath(model), hardware=os.fspath(hardware), network=network, policy=policy, gpus=gpus, seq=seq,
        tokens_per_step=tokens_per_step, device_budget=device_budget, host_budget=host_budget, nvme_budget=nvme_budget,
        recompute=recompute, clip_mode=clip_mode,
    )  # fmt: skip
    answer = _ask("search", values)
    if "best" not in answer:
        return _shortage(answer)
    return SearchResult(answer["flags"], answer["tried"], answer["fitting"], _simulation(answer["best"]))


def _ask(command: str, values: dict[str, Any]) -> dict[str, Any]:
    args = [command, "--format", "json"]
    # One word per option: a value that starts with a dash is then no option of its own.
    args += [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    code, out, log = _core.sim_output(args)
    if code == 2:
        raise ValueError(log.removeprefix("error: ").strip())
    if code not in (0, 3):
        raise RuntimeError(log.strip())
    answer: dict[str, Any] = json.loads(out)
    return answer


def _simulation(answer: dict[str, Any]) -> Simulation:
    asked, step = answer["asked"], answer["step"]
    return Simulation(
        model=asked["model"],
        num_params=asked["num_params"],
        hardware=asked["hardware"],
        policy=asked["policy"],
        gpus=asked["parallel"]["gpus"],
        data_parallel=asked["data_parallel"],
        accumulation=asked["accumulation"],
        step_s=step["step_ns"] / 1e9,
        tokens_per_s=answer["tokens_per_s"],
        mfu=answer["mfu"],
        hfu=answer["hfu"],
        compute_s=step["compute_ns"] / 1e9,
        slowdown_s=step["slowdown_ns"] / 1e9,
        stalls=Stalls(**{name.removesuffix("_ns") + "_s": ns / 1e9 for name, ns in step["stalls"].items()}),
        device_peak_bytes=step["device_peak_bytes"],
        device_peak_op=step["device_peak_op"],
        host_peak_bytes=step["host_peak_bytes"],
        h2d_bytes=step["h2d_bytes"],
        d2h_bytes=step["d2h_bytes"],
        nvme_read_bytes=step["nvme_read_bytes"],
        nvme_written_bytes=step["nvme_written_bytes"],
    )


def _shortage(answer: dict[str, Any]) -> Shortage:
    return Shortage(answer["tier"], answer["op"], answer["needed_bytes"], answer["shortfall_bytes"], tuple(answer["alternatives"]))


def main() -> int:
    """Runs `tierwise-sim` with the process's arguments.

    Returns the exit code: 0 if the step fits, 3 if it does not, 2 for a usage error, 4 if `validate` found a larger error than allowed, 1
    if the result cannot be written.
    """
    return _core.sim_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
