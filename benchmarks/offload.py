"""One training step of a Hugging Face LLaMA, ours beside its floor and its peers, in one run.

    python benchmarks/offload.py --size 1b --tokens 16384 --micro-batch 4 --rows floor,gpu,ours-all,ours-host,ds2

Every row runs in a process of its own on the same GPU, one after the other, with the same weights' shapes, sequence length, clipping and
AdamW settings; kernels of liger-kernel where it is installed. A row's step is the median of its timed steps. MFU counts
6 N + 6 layers hidden sequence FLOPs per token (no recomputation) against the device's dense bf16 peak; HFU adds the recomputed forwards,
which stop before a layer's last product, unless layers are compiled.

Rows: floor (forward and backward only, gradients dropped), floor-ours (the same with our kernels instead of liger's loss, and with
`--rematerialize` as plans run that make cheap outputs again), gpu (everything on the GPU, fused AdamW over fp32 masters), ours-all (a
budget that holds everything), ours-host (optimizer in host memory), ours (the planner chooses), ds2 (DeepSpeed ZeRO-2, optimizer on the
CPU), ds3 (ZeRO-3, optimizer and parameters on the CPU), ds3tf (ZeRO-3 Twin-Flow, ratio 0.6), fsdp2 (CPUOffloadPolicy, fused CPU AdamW).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from llama import SIZES
from offload_rows import ROWS, liger

PEAK_FLOPS = 989.4e12  # dense bf16 of an H100 SXM, by its datasheet


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=SIZES, default="1b")
    p.add_argument("--tokens", type=int, default=16384, help="tokens per optimizer step")
    p.add_argument("--micro-batch", default="4", help='sequences per forward pass; "auto" (row `ours` only): the planner chooses')
    p.add_argument("--seq", type=int, default=4096, help="tokens per sequence")
    p.add_argument("--steps", type=int, default=5, help="steps of a row; the first two are not timed")
    p.add_argument("--recompute", default="full", help='"full", "none", "auto" (ours only) or a number of layers that are kept')
    p.add_argument("--max-norm", type=float, default=1.0, help="gradient clipping; 0.001 clips at every step")
    p.add_argument("--clip-mode", default="defer", choices=["defer", "speculate", "auto"])
    p.add_argument("--accumulate-dtype", default="fp32", choices=["fp32", "bf16"], help="of our sums of gradients")
    p.add_argument("--attention", default="flash", choices=["flash", "cudnn"])
    p.add_argument("--rematerialize", action="store_true", help="row `floor-ours` makes outputs of cheap kernels again in backward")
    p.add_argument("--compile", action="store_true", help="compile every layer with torch.compile, in every row but the DeepSpeed ones")
    p.add_argument("--device-budget", default=None, help="of the rows `ours` and `ours-host`, such as 75GB")
    p.add_argument(
        "--reserve", default=None, help="device memory that the plan keeps free for temporaries, such as 4GB; default: the plugin's"
    )
    p.add_argument("--host-budget", default="110GB")
    p.add_argument("--rows", default="floor,gpu,ours-all,ours-host,ds2")
    p.add_argument("--row-timeout", type=int, default=280, help="seconds")
    p.add_argument("--json", default=None, help="file that gets one JSON line per row")
    p.add_argument("--trace", default=None, help="file for the timeline of ours")
    p.add_argument("--row", default=None, help=argparse.SUPPRESS)
    return p


def timed(a: argparse.Namespace, step: Callable[[], float], extra: dict[str, Any]) -> tuple[float, list[float], float]:
    import psutil
    import torch

    times, loss = [], 0.0
    memory: list[tuple[int, int, int]] = []
    process = psutil.Process()
    for _ in range(a.steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), process.memory_info().rss))
    # After the third step everything that is made once has been made.
    names = ("device_allocated_gb", "device_reserved_gb", "host_process_gb")
    for name, values in zip(names, zip(*memory[2:], strict=True), strict=True):
        extra[name + "_third_most_last"] = [round(x / 1e9, 3) for x in (values[0], max(values), values[-1])]
    return statistics.median(times[2:]), times, loss


class HostPeak(threading.Thread):
    """Most host memory in use, in bytes; stops the process before the machine runs out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Looks ten times a second."""
        import psutil

        while True:
            memory = psutil.virtual_memory()
            self.peak = max(self.peak, memory.total - memory.available)
            if memory.available < 2.5e9:
                print("host memory is used up", flush=True)
                os._exit(77)
            time.sleep(0.1)


def run_row(a: argparse.Namespace) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", TOKENIZERS_PARALLELISM="false"
    )
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    host = HostPeak()
    host.start()
    torch.cuda.set_device(0)
    backend = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}[a.attention]
    start = time.perf_counter()
    ours = a.row.startswith("ours") or a.row == "floor-ours"
    kernels = False if ours else liger(not a.compile or a.row.startswith("ds"), loss=True)
    a.planned = a.micro_batch == "auto"
    if a.planned and not a.row.startswith("ours"):
        raise SystemExit(f"row {a.row} needs a number for --micro-batch")
    a.micro_batch = a.tokens // a.seq if a.planned else int(a.micro_batch)
    accumulation = a.tokens // (a.micro_batch * a.seq)
    ids = torch.randint(0, 32000, (a.micro_batch, a.seq), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    extra: dict[str, Any] = {"liger": kernels}
    # Ours chooses cuDNN's attention by its own option.
    with contextlib.nullcontext() if ours and a.attention == "cudnn" else sdpa_kernel([backend]):
        _model, step, recomputed = ROWS[a.row](a, batch, accumulation, extra)
        setup = time.perf_counter() - start
        seconds, times, loss = timed(a, step, extra)
    hidden, intermediate, layers, _ = SIZES[a.size]
    numel = extra.pop("numel")
    tokens = a.micro_batch * a.seq * accumulation
    per_token = 6 * numel + 6 * layers * hidden * a.seq
    mfu = tokens / seconds * per_token / PEAK_FLOPS
    if "finish" in extra:
        extra.update(extra.pop("finish")())
        recomputed = extra["recomputed"]
    # A checkpoint stops at the last tensor that backward needs; a compiled layer saves all of them at its end.
    last_product = 0 if a.compile and not a.row.startswith("ds") else 2 * hidden * intermediate
    again = 2 * (4 * hidden * hidden + 3 * hidden * intermediate) + 2 * hidden * a.seq - last_product
    print(
        "RESULT",
        json.dumps(
            {
                "row": a.row,
                "size": a.size,
                "tokens": tokens,
                "micro_batch": a.micro_batch,
                "step_s": round(seconds, 4),
                "tokens_per_s": round(tokens / seconds),
                "mfu": round(mfu * 100, 2),
                "hfu": round(mfu * 100 * (1 + recomputed * again / per_token), 2),
                "device_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1),
                "host_gb": round(host.peak / 1e9, 1),
                "setup_s": round(setup, 1),
                "first_s": round(times[0], 2),
                "loss": round(loss, 4),
                "times": [round(t, 3) for t in times[:20]],
                **extra,
            }
        ),
        flush=True,
    )


def main() -> int:
    a = parser().parse_args()
    if a.row:
        run_row(a)
        return 0
    results = []
    for row in a.rows.split(","):
        if row not in ROWS:
            print(f"unknown row {row!r}; known are {', '.join(ROWS)}", file=sys.stderr)
            return 2
        command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=a.row_timeout)
            lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
            if row.startswith("ours"):
                print(
                    *[x for x in done.stderr.splitlines() if x.startswith(("  ", "device", "host", "recomputed", "predicted"))][:9],
                    sep="\n",
                )
            error = f"exit {done.returncode}: " + (done.stderr.strip() or done.stdout.strip())[-1500:]
        except subprocess.TimeoutExpired as late:
            lines, error = [], f"no result after {late.timeout:.0f} s"
        if lines:
            results.append(json.loads(lines[-1][len("RESULT ") :]))
            if a.json:
                with open(a.json, "a") as file:
                    file.write(lines[-1][len("RESULT ") :] + "\n")
        else:
            print(f"{row}: {error}", flush=True)
    by_row = {r["row"]: r for r in results}
    reference = by_row.get("floor", by_row.get("floor-ours"))
    print(f"{'row':10} {'step s':>8} {'tok/s':>8} {'MFU%':>6} {'HFU%':>6} {'x floor':>8} {'dev GB':>7} {'host GB':>8} {'setup s':>8}")
    for r in results:
        ratio = f"{r['step_s'] / reference['step_s']:8.3f}" if reference else " " * 8
        print(
            f"{r['row']:10} {r['step_s']:8.3f} {r['tokens_per_s']:8d} {r['mfu']:6.1f} {r['hfu']:6.1f} {ratio} {r['device_gb']:7.1f} "
            f"{r['host_gb']:8.1f} {r['setup_s']:8.1f}",
            flush=True,
        )
    for r in results:
        keys = ("micro_batches", "recomputed", "predicted_s", "wait_ms_per_step", "host_slab_gb", "clipped", "times", "losses", "loss")
        print(r["row"], {k: r[k] for k in keys if k in r})
    return 0 if results else 1


if __name__ == "__main__":
    sys.exit(main())
