"""The NVMe tier beside its disk: throughput, bytes per spilled parameter, and a training step against what the disk allows, in one run.

    python benchmarks/nvme.py --size 7b --host-budget 24GiB --nvme-path /mnt/nvme       # on a GPU
    python benchmarks/nvme.py --size tiny --seq 64 --host-budget 12MiB --nvme-path /var/tmp    # a smoke test on the CPU

The raw loop moves blocks of the engine's size with O_DIRECT in a file of its own, as many at once as the engine does: reads alone, writes
alone, and both at once, as many bytes each way as a step moves, block by block in turn or as many of each as the engine moves at a time
(the one counts that is faster over all rounds). `fio` does the same where it is installed. Disks are faster in one minute than in the next,
so training runs in rounds of a few steps, and the raw loop before, between and after them, while the engine rests; a step is compared with
the mean of the raw loops on both sides of its round. The engine is measured while training runs, twice: its bytes over the whole step, and
over the time in which the disk had something to do (`nvme_busy_ns`), because nothing can fill a disk that nobody asks. `depth` is how many
blocks the disk had at once in that time, on average. A step can be no shorter than its compute, and than its disk bytes at the speed at
which the raw loop reads and writes at once: it is compared with the larger of the two, compute being forward, backward and the way of the
gradients, measured in the same process without a step. The raw loop's file takes as much of the disk again as what is spilled.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from typing import Any

from llama import SIZES, fields, llama
from offload_rows import BETAS, DECAY, LR


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="7b")
    p.add_argument("--nvme-path", default=tempfile.gettempdir(), help="directory on the disk to measure")
    p.add_argument("--nvme-budget", default=None, help="of the spill file, such as 400GB")
    p.add_argument("--host-budget", default="24GiB")
    p.add_argument("--device-budget", default=None)
    p.add_argument(
        "--reserve", default=None, help="device memory that the plan keeps free for temporaries, such as 4GB; default: the plugin's"
    )
    p.add_argument("--micro-batch", type=int, default=4, help="sequences per forward pass")
    p.add_argument("--accumulation", type=int, default=1, help="forward passes per step")
    p.add_argument("--seq", type=int, default=4096, help="tokens per sequence")
    p.add_argument("--rounds", type=int, default=2, help="times that the raw loop is run again after training")
    p.add_argument("--steps", type=int, default=4, help="steps of a round; its first is not timed, and the first two of all are not")
    p.add_argument(
        "--offload-optim-frac", type=float, default=None, help="share of the states that leave the device; default: the planner's"
    )
    p.add_argument("--max-norm", type=float, default=1.0)
    p.add_argument(
        "--raw-bytes", type=int, default=None, help="size of the raw loop's file; default: of what is spilled, or half of what is free"
    )
    p.add_argument("--raw-seconds", type=float, default=8.0, help="time of each of its measurements")
    p.add_argument(
        "--compare-host-budget",
        default=None,
        help="train the same steps again without a disk, within this host budget, and compare every bit (deterministic algorithms)",
    )
    p.add_argument("--json", default=None, help="file that gets the numbers")
    p.add_argument("--trace", default=None, help="file for the timeline of the last step")
    return p


# ---- the disk without an engine ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class RawLoop:
    """A loop over a file of its own, and how many blocks the engine moves at a time."""

    disk: Any
    piece_blocks: int

    def speeds(self, seconds: float) -> dict[str, float]:
        """Bytes per second: `read`, `write`, and both directions together, block by block in turn (`by_block`) and as many of each as the
        engine moves at a time (`by_piece`)."""
        read, _ = self.disk.run(True, False, seconds)
        _, write = self.disk.run(False, True, seconds)
        by_block, by_piece = (sum(self.disk.run(True, True, seconds, blocks)) for blocks in (1, self.piece_blocks))
        found = {"read": read, "write": write, "by_block": by_block, "by_piece": by_piece}
        print("raw loop, GB/s:", ", ".join(f"{name} {speed / 1e9:.2f}" for name, speed in found.items()), flush=True)
        return found


def with_mixed(raws: list[dict[str, float]]) -> None:
    """Adds `mixed`: the way of reading and writing at once that the disk likes better, by all rounds together."""
    better = max(("by_block", "by_piece"), key=lambda name: sum(raw[name] for raw in raws))
    for raw in raws:
        raw["mixed"] = raw[better]


def raw_loop(a: argparse.Namespace, plan: dict[str, Any], setup: dict[str, Any]) -> RawLoop:
    """With the engine's blocks, depth and backend, over a file as large as what is spilled."""
    from tierwise._core import RawDisk

    block = plan["nvme"]["block_bytes"]
    # The spill file has its room already.
    free = shutil.disk_usage(a.nvme_path).free // 2
    size = min(plan["nvme"]["payload_bytes"], free) // block * block if a.raw_bytes is None else a.raw_bytes
    memory = plan["host"]["nvme_staging"]
    disk = RawDisk(a.nvme_path, max(size, block), block, setup["queue_depth"], memory, setup["backend"] == "io_uring")
    return RawLoop(disk, max(plan["nvme"]["buffer_bytes"] // block, 1))


def fio(directory: str, size: int, seconds: float, block: int, depth: int) -> float | None:
    """Bytes per second of `fio` reading and writing at once, or None where it is not installed."""
    if shutil.which("fio") is None:
        return None
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        options = {"name": "mixed", "directory": folder, "rw": "rw", "bs": block, "direct": 1, "ioengine": "io_uring", "iodepth": depth}
        options |= {"size": size, "runtime": int(seconds), "time_based": 1, "output-format": "json"}
        done = subprocess.run(["fio", *[f"--{k}={v}" for k, v in options.items()]], capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    job = json.loads(done.stdout)["jobs"][0]
    return float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"])


# ---- the engine while it trains ------------------------------------------------------------------------------------------------


def train(a: argparse.Namespace, disk: bool = True) -> dict[str, Any]:
    """Trains and measures; times in seconds, sizes in bytes. Without `disk` host memory takes what the device does not."""
    import torch

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin

    cuda = torch.cuda.is_available()
    options: dict[str, Any] = {}
    if a.offload_optim_frac is not None:
        options = {"placement_policy": "static", "offload_optim_frac": a.offload_optim_frac}
    elif not cuda:
        options = {"placement_policy": "static", "offload_optim_frac": 1.0}
    plugin = GeminiPlugin(
        micro_batch_size=a.micro_batch,
        seq_len=a.seq,
        gradient_accumulation_steps=a.accumulation,
        max_norm=a.max_norm,
        recompute="full" if cuda else "auto",
        enable_fused_normalization=cuda,
        enable_jit_fused=cuda,
        device_budget=a.device_budget,
        reserve=a.reserve,
        host_budget=a.host_budget if disk else a.compare_host_budget,
        nvme_path=a.nvme_path if disk else None,
        nvme_budget=a.nvme_budget if disk else None,
        **options,
    )
    model = llama(fields(a.size, a.seq), "cpu", lazy=True)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    booster = Booster(plugin=plugin)
    started = time.perf_counter()
    model, optimizer, *_ = booster.boost(model, optimizer)
    boosted = time.perf_counter() - started
    print(booster.explain(), flush=True)
    runtime = booster._runtime
    assert runtime is not None
    plan, layout = runtime.memory.plan, runtime.layout
    setup = booster.stats().get("nvme")
    raw = raw_loop(a, plan, setup) if setup is not None else None
    raws = [raw.speeds(a.raw_seconds)] if raw is not None else []
    spilled = sum(layout.state_numel(c) for c, placed in enumerate(plan["chunks"]) if placed["class"] == "nvme")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (a.micro_batch, a.seq), generator=generator).to("cuda" if cuda else "cpu")

    def passes() -> None:
        for _ in range(a.accumulation):
            loss = model(input_ids=ids, labels=ids).loss
            history.append(loss.detach())
            booster.backward(loss, optimizer)

    counters = ("nvme_read_bytes", "nvme_written_bytes", "nvme_wait_ns", "nvme_busy_ns", "nvme_transfer_ns")
    times, moved = [], []
    timed: list[tuple[int, int]] = []
    history: list[Any] = []
    for round_ in range(a.rounds):
        before, start = booster.stats(), time.perf_counter()
        for step in range(a.steps):
            if a.trace and round_ == a.rounds - 1 and step == a.steps - 1:
                booster.record_timeline()
            passes()
            optimizer.step()
            optimizer.zero_grad()
            # A step ends when its norm is known: the next one overlaps with its optimizer work, as in training.
            norm = optimizer.grad_norm
            now, stats = time.perf_counter(), booster.stats()
            if step > 0 and len(times) > 1:
                timed.append((len(times), round_))
            times.append(now - start)
            history.append(norm)
            moved.append({name: stats.get(name, 0) - before.get(name, 0) for name in counters})
            print(f"step {len(times)}: {times[-1]:.2f} s, norm {norm:.3f}, {moved[-1]}", flush=True)
            start, before = now, stats
        booster.flush()
        if raw is not None:
            raws.append(raw.speeds(a.raw_seconds))
    if raws:
        with_mixed(raws)
    if a.trace:
        booster.timeline(a.trace)
    kinds = ["loss"] * a.accumulation + ["norm"]
    bits = {f"{kinds[i % len(kinds)]} {i // len(kinds) + 1}.{i % len(kinds)}": float(value).hex() for i, value in enumerate(history)}
    if a.compare_host_budget is not None:
        bits |= {name: str(int(value.view(torch.int16).sum(dtype=torch.int64))) for name, value in model.state_dict().items()}
    without = []
    for _ in range(2):
        start = time.perf_counter()
        passes()
        optimizer.zero_grad()
        booster.flush()
        without.append(time.perf_counter() - start)
    stats = booster.stats()
    measured = [i for i, _ in timed]
    return {
        "model_parameters": sum(layout.numel(c) for c in range(layout.num_chunks)),
        "spilled_parameters": spilled,
        "spilled_bytes": plan["nvme"]["payload_bytes"] if raw is not None else 0,
        "planned_bytes": plan["nvme"]["read_bytes"] + plan["nvme"]["written_bytes"] if raw is not None else 0,
        "boost_s": boosted,
        "step_s": statistics.median(times[i] for i in measured),
        "steps_s": times,
        "compute_s": min(without),
        "read_bytes": statistics.median(moved[i]["nvme_read_bytes"] for i in measured),
        "written_bytes": statistics.median(moved[i]["nvme_written_bytes"] for i in measured),
        "waits_s": statistics.median(moved[i]["nvme_wait_ns"] for i in measured) / 1e9,
        "busy_s": statistics.median(moved[i]["nvme_busy_ns"] for i in measured) / 1e9,
        "timed": [
            {
                "step_s": times[i],
                "bytes": moved[i]["nvme_read_bytes"] + moved[i]["nvme_written_bytes"],
                "busy_s": moved[i]["nvme_busy_ns"] / 1e9,
                "raw_mixed": (raws[round_]["mixed"] + raws[round_ + 1]["mixed"]) / 2,
            }
            for i, round_ in timed
            if raws
        ],
        "depth": statistics.median(moved[i]["nvme_transfer_ns"] / max(moved[i]["nvme_busy_ns"], 1) for i in measured),
        "raw": raws,
        "raw_direct": raw is not None and raw.disk.direct,
        "block_bytes": plan["nvme"]["block_bytes"] if raw is not None else 0,
        "queue_depth": setup["queue_depth"] if setup is not None else 0,
        "host_peak_bytes": stats["host_peak_bytes"],
        "host_budget_bytes": stats["host_budget_bytes"],
        "nvme": stats.get("nvme"),
        "bits": bits,
        "homes": sorted({f"{placed['class']}/{placed['home']}, gradients {placed['accumulate']}" for placed in plan["chunks"]}),
    }


def judge(ours: dict[str, Any], same: bool | None) -> str:
    """The table of what the tier is judged by; every step beside the raw loops of its round. `same`: bits without a disk, None if not
    compared."""
    spilled = max(ours["spilled_parameters"], 1)
    per = (ours["read_bytes"] + ours["written_bytes"]) / spilled
    planned = ours["planned_bytes"] / spilled
    shares = [step["bytes"] / max(step["busy_s"], 1e-9) / step["raw_mixed"] for step in ours["timed"]]
    slowness = [step["step_s"] / max(ours["compute_s"], step["bytes"] / step["raw_mixed"]) for step in ours["timed"]]
    share, slower = statistics.median(shares), statistics.median(slowness)
    busy = f"engine while busy / raw mixed [{min(shares):.2f}, {max(shares):.2f}]"
    bound = f"step / max(compute, bytes / raw) [{min(slowness):.2f}, {max(slowness):.2f}]"
    rows = [
        ("state on the disk, GB", f"{ours['spilled_bytes'] / 1e9:.2f}", ">= 20", ours["spilled_bytes"] >= 20e9),
        # Blocks are written whole.
        ("bytes per spilled parameter and step", f"{per:.2f}", f"<= {planned:.2f} as planned", per <= planned * 1.01),
        (busy, f"{share:.3f}", ">= 0.95", share >= 0.95),
        (bound, f"{slower:.3f}", "<= 1.10", slower <= 1.10),
        ("bits of the same steps without a disk", "not compared" if same is None else "equal" if same else "different", "equal", same),
    ]
    lines = [f"{'judged by':<50}{'measured':>14}  wanted"]
    for name, value, wanted, met in rows:
        verdict = "" if met is None else "met" if met else "MISSED"
        lines.append(f"  {name:<48}{value:>14}  {wanted:<24}{verdict}".rstrip())
    return "\n".join(lines)


def main() -> None:
    a = parser().parse_args()
    if a.rounds < 1 or a.steps < 2 or a.rounds * (a.steps - 1) < 2:
        raise SystemExit(
            f"--steps {a.steps} and --rounds {a.rounds} leave no step to time: the first of a round, and the first two of all, are not"
        )
    a.recompute = "full"
    if a.compare_host_budget is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        torch.use_deterministic_algorithms(True)
        # Our kernels write all that they allocate; filling it first would be a part of every step.
        torch.utils.deterministic.fill_uninitialized_memory = False
    ours = train(a)
    if not ours["timed"]:
        raise SystemExit("nothing is spilled, or no step is timed: lower --host-budget, or raise --steps")
    disk = {name: statistics.mean(raw[name] for raw in ours["raw"]) for name in ours["raw"][0]}
    same = None
    if a.compare_host_budget is not None:
        gc.collect()
        memory = train(a, disk=False)
        others = {name: value for name, value in memory["bits"].items() if ours["bits"].get(name) != value}
        same = memory["bits"].keys() == ours["bits"].keys() and not others
        print(f"{'EQUAL' if same else 'DIFFERENT'} bits without a disk: losses, norms and sums over the bits of {len(ours['bits'])} values")
        for name, value in list(others.items())[:10]:
            print(f"  {name}: {ours['bits'].get(name)} with a disk, {value} without")
    theirs = fio(a.nvme_path, a.raw_bytes or ours["spilled_bytes"], a.raw_seconds, ours["block_bytes"], ours["queue_depth"])
    moved = ours["read_bytes"] + ours["written_bytes"]
    gb = 1e9
    how = "O_DIRECT" if ours["raw_direct"] else "page cache"
    blocks = f"{ours['queue_depth']} blocks of {ours['block_bytes'] / 2**20:g} MiB"
    print(
        f"\n{'raw loop, ' + how:<34}"
        + "".join(f"{f'round {i}' if i else 'before':>10}" for i in range(len(ours["raw"])))
        + f"   GB/s, {blocks}"
    )
    for name in ("read", "write", "by_block", "by_piece", "mixed"):
        print(f"  {name:<32}" + "".join(f"{raw[name] / gb:>10.2f}" for raw in ours["raw"]))
    if theirs is not None:
        print(f"  {'fio, mixed':<32}{'':>10}{theirs / gb:>10.2f}")
    print(f"\n{'engine, while ' + a.size + ' trains':<34}{'GB/s':>10}{'of raw':>10}")
    print(f"  {'whole step, both':<32}{moved / ours['step_s'] / gb:>10.2f}{moved / ours['step_s'] / disk['mixed']:>10.2f}")
    speeds = [step["bytes"] / max(step["busy_s"], 1e-9) for step in ours["timed"]]
    spread = f"[{min(speeds) / gb:.2f}, {max(speeds) / gb:.2f}]"
    busy = statistics.median(speeds)
    print(f"  {'while the disk is busy, both':<32}{busy / gb:>10.2f}{busy / disk['mixed']:>10.2f}   {spread}")
    print(f"the disk is busy {ours['busy_s'] / ours['step_s']:.1%} of a step, {ours['depth']:.1f} blocks at once on average")
    of = f"{ours['spilled_parameters'] / 1e6:.1f} M of {ours['model_parameters'] / 1e6:.1f} M"
    print(f"\nspilled parameters {of} ({', '.join(ours['homes'])})")
    print(f"step {ours['step_s']:.3f} s, compute {ours['compute_s']:.3f} s, disk bytes / mixed speed {moved / disk['mixed']:.3f} s")
    print(f"host peak {ours['host_peak_bytes'] / 2**30:.2f} of {ours['host_budget_bytes'] / 2**30:.2f} GiB\n")
    print(judge(ours, same))
    if a.json:
        with open(a.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(a), "fio": theirs, "ours": ours, "same_bits": same}, file)
    if same is False:
        raise SystemExit("the disk changed a result")


if __name__ == "__main__":
    main()
