"""Records real training steps, to compare the simulator's predictions with: one JSON file in the schema of `tierwise-sim validate`.

    tierwise calibrate --out machine.json
    python benchmarks/record.py --hardware machine.json --out runs.json --limit 480

Every configuration trains a Hugging Face LLaMA (random weights, bf16, AdamW) through `GeminiPlugin`, one after the other in a worker
process: those of `--list full`, or of `large`, without steps that Python bounds. A configuration begins only where the device is empty. A
worker that failed, hangs or keeps memory is replaced, and the next configuration begins in a new one. The file is written again after each
configuration, and what is in it is not recorded again: the same command continues after an interruption. A configuration that runs out of
memory is a record too: it did not fit. One that fails otherwise is named at the end and tried again by the next command.

A step is from the end of one backward pass to the end of the next on the compute stream, as the simulator counts it; the first steps are
not timed, and nothing waits for the device between timed steps but for the probes, which part them in three. `recorded` has the median,
the times themselves, the allocator's peak of device bytes since training began, the engine's peak of host bytes, and how long the compute
stream waited per step. `executed` is the plan that ran, after its correction. `observed` sums the timeline of two more steps by track and
kind, and has how many seconds the training thread was in its calls in the timed steps (`thread_s`, medians: forward and backward of a
micro-batch, step of an optimizer step).
`host_adam_params_per_s` and `launch_probe_ns` are how fast the host's Adam was on memory of its own and how long a fixed piece of work took
a training thread, before, between and after these parts, measured as `calibrate` does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path
from typing import Any

import record_worker
from record_list import LISTS, Configuration

START_S = 120
"""In which a worker has to be there: it imports torch and opens the device."""
ENDING_S = 60
"""After the time limit a configuration that runs may still end."""


class LostError(Exception):
    """A worker that ended or does not answer."""


class Worker:
    """A process that records configurations until one of them spoils it."""

    def __init__(self, a: argparse.Namespace) -> None:
        spawning = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawning.Pipe()
        self.process = spawning.Process(target=record_worker.serve, args=(theirs, a), daemon=True)
        self.process.start()
        theirs.close()
        self.machine: dict[str, Any] = self._answer(START_S)

    def record(self, run: Configuration, seconds: float) -> record_worker.Answer:
        """Raises LostError if the worker ends or takes longer."""
        self.pipe.send(run)
        answer: record_worker.Answer = self._answer(seconds)
        return answer

    def _answer(self, seconds: float) -> Any:
        try:
            if self.pipe.poll(seconds):
                return self.pipe.recv()
        except EOFError:
            self.process.join()
            raise LostError(f"the worker ended with code {self.process.exitcode}") from None
        raise LostError(f"no answer within {seconds:.0f} s")

    def end(self) -> None:
        """Its memory is free afterwards. Killed: an engine that waits for its device would not end."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hardware", required=True, help="file of `tierwise calibrate`, of this machine and day")
    p.add_argument("--out", required=True, help="file to write, or to continue")
    p.add_argument("--list", choices=LISTS, default="full")
    p.add_argument("--device", choices=("auto", "cuda", "emulated"), default="auto")
    p.add_argument("--limit", type=float, default=480, help="seconds after which no further configuration is begun")
    p.add_argument("--each", type=float, default=90, help="seconds that one configuration may take")
    p.add_argument("--skip", action="append", default=[], help="file whose configurations are not recorded again")
    p.add_argument("--timelines", default=None, help="folder for the timeline of every configuration, gzipped, for Perfetto")
    p.add_argument("--only", default=None, help="regular expression that names must match")
    return p


def begun(a: argparse.Namespace) -> dict[str, Any]:
    """The file as an earlier command left it, or a new one."""
    try:
        text = Path(a.out).read_text(encoding="utf-8")
    except FileNotFoundError:
        source = f"benchmarks/record.py, {time.strftime('%Y-%m-%d')}"
        return {"schema_version": 1, "source": source, "machine": {}, "models": {}, "runs": []}
    result: dict[str, Any] = json.loads(text)
    others = {run["hardware"] for run in result["runs"]} - {Path(a.hardware).name}
    if others:
        raise SystemExit(f"{a.out} has runs of {', '.join(sorted(others))}: name another --out, or the hardware of those runs")
    return result


def write(a: argparse.Namespace, result: dict[str, Any]) -> None:
    partial = Path(f"{a.out}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(a.out)


def shown(run: dict[str, Any]) -> str:
    recorded = run["recorded"]
    if not recorded["fits"]:
        return f"did not fit: {run['failed'][:160]}"
    spread = f"{min(recorded['step_times_s']):.4f} to {max(recorded['step_times_s']):.4f}"
    sizes = f"device {recorded['device_peak_bytes'] / 1e9:.2f} GB, host {recorded['host_peak_bytes'] / 1e9:.2f} GB"
    return f"{recorded['step_s']:.4f} s ({spread}), {sizes}"


def main() -> int:
    a = parser().parse_args()
    started = time.monotonic()

    def elapsed() -> float:
        return time.monotonic() - started

    hardware = json.loads(Path(a.hardware).read_text(encoding="utf-8"))
    measured = hardware.get("measured", {})
    if "host_numel" not in measured or "probe_ns" not in (measured.get("launch") or {}):
        lacks = "measured.launch.probe_ns" if "host_numel" in measured else "measured.host_numel"
        why = hardware.get("sources", {}).get("not measured", "it is of an earlier version")
        raise SystemExit(f"{a.hardware} lacks {lacks}, which probes are compared with ({why}): make it anew with `tierwise calibrate`")
    result = begun(a)
    if a.timelines is not None:
        Path(a.timelines).mkdir(parents=True, exist_ok=True)
    done = {run["name"] for runs in (result["runs"], *(json.loads(Path(path).read_text())["runs"] for path in a.skip)) for run in runs}
    wanted = [run for run in LISTS[a.list] if run.name not in done and (a.only is None or re.search(a.only, run.name))]
    failed: list[str] = []
    left = len(wanted)
    worker: Worker | None = None
    for number, run in enumerate(wanted, 1):
        if elapsed() > a.limit:
            print(f"time is up: {left} configurations are left", flush=True)
            break
        begin = elapsed()
        try:
            worker = worker or Worker(a)
            result["machine"] = worker.machine
            answer = worker.record(run, min(a.each, a.limit + ENDING_S - elapsed()))
        except LostError as error:
            answer = record_worker.Answer(run=None, problem=str(error), dirty=str(error))
        if answer.run is None:
            failed.append(f"{run.name}: {answer.problem}")
        else:
            result["models"][run.size] = run.config()
            result["runs"].append(answer.run)
            write(a, result)
            left -= 1
        text = f"not recorded: {answer.problem}" if answer.run is None else shown(answer.run)
        print(f"[{number}/{len(wanted)}, {elapsed():.0f} s] {run.name}: {text}, took {elapsed() - begin:.1f} s", flush=True)
        if answer.dirty is not None and worker is not None:
            print(f"a new worker: {answer.dirty}", flush=True)
            worker.end()
            worker = None
    if worker is not None:
        worker.end()
    print(f"{len(result['runs'])} configurations are in {a.out}; {len(wanted) - left} were recorded in {elapsed():.0f} s", flush=True)
    for text in failed:
        print(f"not recorded: {text}", file=sys.stderr, flush=True)
    return 0 if len(wanted) == 0 or left < len(wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
