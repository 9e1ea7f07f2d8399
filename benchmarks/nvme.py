"""The NVMe tier beside its disk: throughput, bytes per spilled parameter, and a training step against what the disk allows, in one run.

    python benchmarks/nvme.py --size 7b --host-budget 24GiB --nvme-path /mnt/nvme       # on a GPU
    python benchmarks/nvme.py --size tiny --seq 64 --host-budget 12MiB --nvme-path /var/tmp    # a smoke test on the CPU

The raw loop moves blocks of 4 MiB with O_DIRECT in a file of its own, as many at once as the engine does: reads alone, writes alone, and
both at once. `fio` does the same where it is installed. The engine is measured while training runs: bytes read and written in a step, over
its time. A step can be no shorter than its compute, and than its disk bytes at the speed at which the raw loop reads and writes at once;
`bound` is the larger of the two, compute being forward, backward and the way of the gradients, measured in the same process without a step.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from typing import Any

from llama import SIZES, fields, llama
from offload import BETAS, DECAY, LR

BLOCK = 4 << 20
DEPTH = 32
"""Transfers that the engine's spill file has in flight."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="7b")
    p.add_argument("--nvme-path", default=tempfile.gettempdir(), help="directory on the disk to measure")
    p.add_argument("--nvme-budget", default=None, help="of the spill file, such as 400GB")
    p.add_argument("--host-budget", default="24GiB")
    p.add_argument("--device-budget", default=None)
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


class Raw:
    """Threads that read or write aligned blocks of one preallocated file, past the page cache where the file system can."""

    def __init__(self, directory: str, size: int, seconds: float) -> None:
        self.blocks = max(size // BLOCK, 2 * DEPTH)
        self.seconds = seconds
        self.direct = True
        flags = os.O_RDWR | os.O_TMPFILE
        try:
            self.fd = os.open(directory, flags | os.O_DIRECT, 0o600)
        except OSError:
            self.fd, self.direct = os.open(directory, flags, 0o600), False
        os.posix_fallocate(self.fd, 0, self.blocks * BLOCK)

    def move(self, kinds: tuple[bool, ...], once: bool = False) -> tuple[float, float]:
        """Bytes per second (read, written) with `DEPTH` blocks on their way; every thread goes through `kinds` (whether to write) again and
        again, so that both directions move the same bytes. `once` stops after every block."""
        turns = itertools.cycle(range(self.blocks)) if not once else iter(range(self.blocks))
        lock = threading.Lock()
        moved = [0, 0]
        end = time.perf_counter() + (1e9 if once else self.seconds)

        def work(number: int) -> None:
            memory = mmap.mmap(-1, BLOCK)
            memory.write(os.urandom(BLOCK))
            for turn in itertools.count(number):
                write = kinds[turn % len(kinds)]
                with lock:
                    block = next(turns, None) if time.perf_counter() < end else None
                if block is None:
                    return
                count = os.pwritev(self.fd, [memory], block * BLOCK) if write else os.preadv(self.fd, [memory], block * BLOCK)
                with lock:
                    moved[write] += count

        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(DEPTH)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - start
        return moved[0] / elapsed, moved[1] / elapsed

    def measure(self) -> dict[str, float]:
        """Bytes per second: `read`, `write`, and `mixed` (both directions together, the same bytes each)."""
        self.move((True,), once=True)
        read, _ = self.move((False,))
        _, write = self.move((True,))
        mixed = self.move((False, True))
        os.close(self.fd)
        return {"read": read, "write": write, "mixed_read": mixed[0], "mixed_write": mixed[1], "mixed": sum(mixed)}


def fio(directory: str, size: int, seconds: float) -> float | None:
    """Bytes per second of `fio` reading and writing at once, or None where it is not installed."""
    if shutil.which("fio") is None:
        return None
    with tempfile.TemporaryDirectory(dir=directory) as folder:
        options = {"name": "mixed", "directory": folder, "rw": "rw", "bs": "4m", "direct": 1, "ioengine": "io_uring", "iodepth": DEPTH}
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
        device_budget=a.device_budget,
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
    spilled = sum(layout.state_numel(c) for c, placed in enumerate(plan["chunks"]) if placed["class"] == "nvme")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32000, (a.micro_batch, a.seq), generator=generator).to("cuda" if cuda else "cpu")

    def passes() -> None:
        for _ in range(a.accumulation):
            loss = model(input_ids=ids, labels=ids).loss
            history.append(loss.detach())
            booster.backward(loss, optimizer)

    counters = ("nvme_read_bytes", "nvme_written_bytes", "nvme_wait_ns")
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
    bits = [float(value).hex() for value in history]
    if a.compare_host_budget is not None:
        bits += [str(int(value.view(torch.int16).sum(dtype=torch.int64))) for value in model.state_dict().values()]
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
        "boost_s": boosted,
        "step_s": statistics.median(times[i] for i in timed),
        "steps_s": times,
        "compute_s": min(without),
        "read_bytes": statistics.median(moved[i]["nvme_read_bytes"] for i in timed),
        "written_bytes": statistics.median(moved[i]["nvme_written_bytes"] for i in timed),
        "waits_s": statistics.median(moved[i]["nvme_wait_ns"] for i in timed) / 1e9,
        "host_peak_bytes": stats["host_peak_bytes"],
        "host_budget_bytes": stats["host_budget_bytes"],
        "nvme": stats.get("nvme"),
        "bits": bits,
        "homes": sorted({f"{placed['class']}/{placed['home']}" for placed in plan["chunks"]}),
    }


def main() -> None:
    a = parser().parse_args()
    a.recompute = "full"
    if a.compare_host_budget is not None:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        import torch

        torch.use_deterministic_algorithms(True)
    raw = Raw(a.nvme_path, a.raw_bytes, a.raw_seconds)
    direct = raw.direct
    before = raw.measure()
    ours = train(a)
    # Disks slow down while they are written: the bound is taken from both sides of the training run.
    after = Raw(a.nvme_path, a.raw_bytes, a.raw_seconds).measure()
    disk = {name: (before[name] + after[name]) / 2 for name in before}
    if a.compare_host_budget is not None:
        gc.collect()
        memory = train(a, disk=False)
        same = memory["bits"] == ours["bits"]
        print(f"{'EQUAL' if same else 'DIFFERENT'} bits without a disk: losses, norms and sums over the bits of {len(ours['bits'])} values")
        if not same:
            raise SystemExit("the disk changed a result")
    theirs = fio(a.nvme_path, a.raw_bytes, a.raw_seconds)
    moved = ours["read_bytes"] + ours["written_bytes"]
    bound = max(ours["compute_s"], moved / disk["mixed"])
    gb = 1e9
    print(f"\n{'raw loop, ' + ('O_DIRECT' if direct else 'page cache'):<34}{'before':>10}{'after':>10}   GB/s, {DEPTH} blocks of 4 MiB")
    for name in ("read", "write", "mixed_read", "mixed_write", "mixed"):
        print(f"  {name:<32}{before[name] / gb:>10.2f}{after[name] / gb:>10.2f}")
    if theirs is not None:
        print(f"  {'fio, mixed':<32}{'':>10}{theirs / gb:>10.2f}")
    print(f"\n{'engine, while ' + a.size + ' trains':<34}{'GB/s':>10}{'of raw':>10}")
    for name, size in (("read", ours["read_bytes"]), ("written", ours["written_bytes"]), ("both", moved)):
        speed = size / ours["step_s"]
        against = {"read": "mixed_read", "written": "mixed_write", "both": "mixed"}[name]
        print(f"  {name:<32}{speed / gb:>10.2f}{speed / disk[against]:>10.2f}")
    per = moved / ours["spilled_parameters"] if ours["spilled_parameters"] else 0.0
    of = f"{ours['spilled_parameters'] / 1e6:.1f} M of {ours['model_parameters'] / 1e6:.1f} M"
    print(f"\nspilled parameters {of} ({', '.join(ours['homes'])})")
    print(f"bytes per spilled parameter and step {per:.2f}")
    print(f"step {ours['step_s']:.3f} s, compute {ours['compute_s']:.3f} s, disk bytes / mixed speed {moved / disk['mixed']:.3f} s")
    print(f"step / bound {ours['step_s'] / bound:.3f}")
    print(f"host peak {ours['host_peak_bytes'] / 2**30:.2f} of {ours['host_budget_bytes'] / 2**30:.2f} GiB")
    if a.json:
        with open(a.json, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(a), "raw_before": before, "raw_after": after, "fio": theirs, "ours": ours, "bound_s": bound}, file)


if __name__ == "__main__":
    main()
