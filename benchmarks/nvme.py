"""The NVMe tier beside its disk: throughput, bytes per spilled parameter, and a training step against what the disk allows, in one run.

    python benchmarks/nvme.py --size 7b --host-budget 24GiB --nvme-path /mnt/nvme       # on a GPU
    python benchmarks/nvme.py --size tiny --seq 64 --host-budget 12MiB --nvme-path /var/tmp    # a smoke test on the CPU

The raw loop moves blocks of the engine's size with O_DIRECT in a file of its own, as many at once as the engine does: reads alone, writes
alone, and both at once, as many bytes each way as a step moves, block by block in turn or as many of each as the engine moves at a time
(the faster counts). `fio` does the same where it is installed. The raw loop runs before the first step and after the last, while the engine
rests; the engine is measured while training runs, twice: its bytes over the whole step, and over the time in which the disk had something
to do (`nvme_busy_ns`), because nothing can fill a disk that nobody asks. `depth` is how many blocks the disk had at once in that time, on
average. A step can be no shorter than its compute, and than its disk bytes at the speed at which the raw loop reads and writes at once;
`bound` is the larger of the two, compute being forward, backward and the way of the gradients, measured in the same process without a step.
"""

from __future__ import annotations

import argparse
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
    p.add_argument("--steps", type=int, default=4, help="steps; the first two are not timed")
    p.add_argument(
        "--offload-optim-frac", type=float, default=None, help="share of the states that leave the device; default: the planner's"
    )
    p.add_argument("--max-norm", type=float, default=1.0)
    p.add_argument("--raw-bytes", type=int, default=8 << 30, help="size of the raw loop's file")
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


def raw_speeds(raw: Any, seconds: float, piece_blocks: int) -> dict[str, float]:
    """Bytes per second: `read`, `write`, and `mixed` (both directions together): block by block in turn, or as many of each as the engine
    moves at a time, whichever the disk likes better."""
    read, _ = raw.run(True, False, seconds)
    _, write = raw.run(False, True, seconds)
    mixed = max((raw.run(True, True, seconds, blocks) for blocks in (1, piece_blocks)), key=sum)
    return {"read": read, "write": write, "mixed_read": mixed[0], "mixed_write": mixed[1], "mixed": sum(mixed)}


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

    from tierwise._core import RawDisk
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
    raw, before_raw, piece_blocks = None, {}, 1
    setup = booster.stats().get("nvme")
    if setup is not None:
        block, depth = plan["nvme"]["block_bytes"], setup["queue_depth"]
        raw = RawDisk(a.nvme_path, a.raw_bytes, block, depth, plan["host"]["nvme_staging"], setup["backend"] == "io_uring")
        piece_blocks = max(plan["nvme"]["buffer_bytes"] // block, 1)
        before_raw = raw_speeds(raw, a.raw_seconds, piece_blocks)
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
    history: list[Any] = []
    before = booster.stats()
    start = time.perf_counter()
    for step in range(a.steps):
        if a.trace and step == a.steps - 1:
            booster.record_timeline()
        passes()
        optimizer.step()
        optimizer.zero_grad()
        # A step ends when its norm is known: the next one overlaps with its optimizer work, as in training.
        norm = optimizer.grad_norm
        now, stats = time.perf_counter(), booster.stats()
        times.append(now - start)
        history.append(norm)
        moved.append({name: stats.get(name, 0) - before.get(name, 0) for name in counters})
        print(f"step {step + 1}: {times[-1]:.2f} s, norm {norm:.3f}, {moved[-1]}", flush=True)
        start, before = now, stats
    if a.trace:
        booster.timeline(a.trace)
    booster.flush()
    kinds = ["loss"] * a.accumulation + ["norm"]
    bits = {f"{kinds[i % len(kinds)]} {i // len(kinds) + 1}.{i % len(kinds)}": float(value).hex() for i, value in enumerate(history)}
    if a.compare_host_budget is not None:
        bits |= {name: str(int(value.view(torch.int16).sum(dtype=torch.int64))) for name, value in model.state_dict().items()}
    # Disks slow down while they are written: the raw loop runs on both sides of the training steps.
    after_raw = raw_speeds(raw, a.raw_seconds, piece_blocks) if raw is not None else {}
    without = []
    for _ in range(2):
        start = time.perf_counter()
        passes()
        optimizer.zero_grad()
        booster.flush()
        without.append(time.perf_counter() - start)
    stats = booster.stats()
    timed = range(2, a.steps) if a.steps > 2 else range(a.steps)
    return {
        "model_parameters": sum(layout.numel(c) for c in range(layout.num_chunks)),
        "spilled_parameters": spilled,
        "spilled_bytes": plan["nvme"]["payload_bytes"] if raw is not None else 0,
        "planned_bytes": plan["nvme"]["read_bytes"] + plan["nvme"]["written_bytes"] if raw is not None else 0,
        "boost_s": boosted,
        "step_s": statistics.median(times[i] for i in timed),
        "steps_s": times,
        "compute_s": min(without),
        "read_bytes": statistics.median(moved[i]["nvme_read_bytes"] for i in timed),
        "written_bytes": statistics.median(moved[i]["nvme_written_bytes"] for i in timed),
        "waits_s": statistics.median(moved[i]["nvme_wait_ns"] for i in timed) / 1e9,
        "busy_s": statistics.median(moved[i]["nvme_busy_ns"] for i in timed) / 1e9,
        "busy_speeds": [
            (moved[i]["nvme_read_bytes"] + moved[i]["nvme_written_bytes"]) * 1e9 / max(moved[i]["nvme_busy_ns"], 1) for i in timed
        ],
        "depth": statistics.median(moved[i]["nvme_transfer_ns"] / max(moved[i]["nvme_busy_ns"], 1) for i in timed),
        "raw_before": before_raw,
        "raw_after": after_raw,
        "raw_direct": raw is not None and raw.direct,
        "block_bytes": plan["nvme"]["block_bytes"] if raw is not None else 0,
        "queue_depth": setup["queue_depth"] if setup is not None else 0,
        "host_peak_bytes": stats["host_peak_bytes"],
        "host_budget_bytes": stats["host_budget_bytes"],
        "nvme": stats.get("nvme"),
        "bits": bits,
        "homes": sorted({f"{placed['class']}/{placed['home']}, gradients {placed['accumulate']}" for placed in plan["chunks"]}),
    }


def judge(ours: dict[str, Any], mixed: float, bound_s: float, same: bool | None) -> str:
    """The table of what the tier is judged by; `mixed` is the raw loop's speed. `same`: bits without a disk, None if not compared."""
    spilled = max(ours["spilled_parameters"], 1)
    per = (ours["read_bytes"] + ours["written_bytes"]) / spilled
    planned = ours["planned_bytes"] / spilled
    shares = [speed / mixed for speed in ours["busy_speeds"]]
    share, slower = statistics.median(shares), ours["step_s"] / bound_s
    rows = [
        ("state on the disk, GB", f"{ours['spilled_bytes'] / 1e9:.2f}", ">= 20", ours["spilled_bytes"] >= 20e9),
        # Blocks are written whole.
        ("bytes per spilled parameter and step", f"{per:.2f}", f"<= {planned:.2f} as planned", per <= planned * 1.01),
        (f"engine while busy / raw mixed [{min(shares):.2f}, {max(shares):.2f}]", f"{share:.3f}", ">= 0.95", share >= 0.95),
        ("step / max(compute, disk bytes / raw mixed)", f"{slower:.3f}", "<= 1.10", slower <= 1.10),
        ("bits of the same steps without a disk", "not compared" if same is None else "equal" if same else "different", "equal", same),
    ]
    lines = [f"{'judged by':<50}{'measured':>14}  wanted"]
    for name, value, wanted, met in rows:
        verdict = "" if met is None else "met" if met else "MISSED"
        lines.append(f"  {name:<48}{value:>14}  {wanted:<24}{verdict}".rstrip())
    return "\n".join(lines)


def main() -> None:
    a = parser().parse_args()
    a.recompute = "full"
    if a.compare_host_budget is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        torch.use_deterministic_algorithms(True)
    ours = train(a)
    before, after = ours["raw_before"], ours["raw_after"]
    if not before:
        raise SystemExit("nothing is spilled: lower --host-budget")
    disk = {name: (before[name] + after[name]) / 2 for name in before}
    same = None
    if a.compare_host_budget is not None:
        gc.collect()
        memory = train(a, disk=False)
        others = {name: value for name, value in memory["bits"].items() if ours["bits"].get(name) != value}
        same = memory["bits"].keys() == ours["bits"].keys() and not others
        print(f"{'EQUAL' if same else 'DIFFERENT'} bits without a disk: losses, norms and sums over the bits of {len(ours['bits'])} values")
        for name, value in list(others.items())[:10]:
            print(f"  {name}: {ours['bits'].get(name)} with a disk, {value} without")
    theirs = fio(a.nvme_path, a.raw_bytes, a.raw_seconds, ours["block_bytes"], ours["queue_depth"])
    moved = ours["read_bytes"] + ours["written_bytes"]
    bound = max(ours["compute_s"], moved / disk["mixed"])
    gb = 1e9
    how = "O_DIRECT" if ours["raw_direct"] else "page cache"
    blocks = f"{ours['queue_depth']} blocks of {ours['block_bytes'] / 2**20:g} MiB"
    print(f"\n{'raw loop, ' + how:<34}{'before':>10}{'after':>10}   GB/s, {blocks}")
    for name in ("read", "write", "mixed_read", "mixed_write", "mixed"):
        print(f"  {name:<32}{before[name] / gb:>10.2f}{after[name] / gb:>10.2f}")
    if theirs is not None:
        print(f"  {'fio, mixed':<32}{'':>10}{theirs / gb:>10.2f}")
    print(f"\n{'engine, while ' + a.size + ' trains':<34}{'GB/s':>10}{'of raw':>10}")
    for name, size in (("read", ours["read_bytes"]), ("written", ours["written_bytes"]), ("both", moved)):
        speed = size / ours["step_s"]
        against = {"read": "mixed_read", "written": "mixed_write", "both": "mixed"}[name]
        print(f"  {'whole step, ' + name:<32}{speed / gb:>10.2f}{speed / disk[against]:>10.2f}")
    busy = statistics.median(ours["busy_speeds"])
    spread = f"[{min(ours['busy_speeds']) / gb:.2f}, {max(ours['busy_speeds']) / gb:.2f}]"
    print(f"  {'while the disk is busy, both':<32}{busy / gb:>10.2f}{busy / disk['mixed']:>10.2f}   {spread}")
    print(f"the disk is busy {ours['busy_s'] / ours['step_s']:.1%} of a step, {ours['depth']:.1f} blocks at once on average")
    of = f"{ours['spilled_parameters'] / 1e6:.1f} M of {ours['model_parameters'] / 1e6:.1f} M"
    print(f"\nspilled parameters {of} ({', '.join(ours['homes'])})")
    print(f"step {ours['step_s']:.3f} s, compute {ours['compute_s']:.3f} s, disk bytes / mixed speed {moved / disk['mixed']:.3f} s")
    print(f"host peak {ours['host_peak_bytes'] / 2**30:.2f} of {ours['host_budget_bytes'] / 2**30:.2f} GiB\n")
    print(judge(ours, disk["mixed"], bound, same))
    if a.json:
        with open(a.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(a), "fio": theirs, "ours": ours, "bound_s": bound, "same_bits": same}, file)
    if same is False:
        raise SystemExit("the disk changed a result")


if __name__ == "__main__":
    main()
