"""Records real training steps, to compare the simulator's predictions with: one JSON file in the schema of `tierwise-sim validate`.

    tierwise calibrate --out machine.json
    python benchmarks/record.py --hardware machine.json --out runs.json --limit 480

Every configuration trains a Hugging Face LLaMA (random weights, bf16, AdamW) through `GeminiPlugin`, one after the other in a worker
process: those of `--list full`, or of `large`, without steps that Python bounds. A configuration begins only where the device is empty. A
worker that failed, hangs or keeps memory is replaced, and the next configuration begins in a new one. The file is written again after each
configuration, and what is in it is not recorded again: the same command continues after an interruption. A configuration that runs out of
memory is a record too: it did not fit. One that fails otherwise is named at the end and tried again by the next command.

With `--visits` the whole list is gone through so many times, and each visit of a configuration times its share of the steps, but at least
three: a shared machine is faster in one minute than in the next, and not all of its memory is equally fast (`mix_memory.py`). Of a
configuration's visits the fastest counts, by its median step, because whoever shares a machine makes it slower. The lesser of two medians
is also less than their mean by half of what such medians differ by, so these times are not compared with those of one visit. Visits of a
configuration must have executed the same plan: the planner is told how fast the host was calibrated.

A step is from the end of one backward pass to the end of the next on the compute stream, as the simulator counts it; the first steps are
not timed, and nothing waits for the device between timed steps but for the probes, which part them in three (two visits or more are not
parted). `recorded` has the median, the times themselves, the allocator's peak of device bytes since training began, the engine's peak of
host bytes, and how long the compute stream waited per step. `executed` is the plan that ran, after its correction. `observed` sums the
timeline of two more steps of the first visit by track and kind, and has how many seconds the training thread was in its calls in the timed
steps (`thread_s`, medians: forward and backward of a micro-batch, step of an optimizer step) and in `per_step` the engine's counters.
`visits` in it has what belongs to every visit; `recorded`, probes, `thread_s` and `per_step` are those of the one that counts, but for the
peaks, which are the most of all. A visit beside which the training thread's probe takes more than twice what it took `calibrate`
(`--disturbed`) says more of who shares the machine than of the configuration: it is kept under `disturbed`, and made again at the end, up
to three of a configuration.

`host_adam_params_per_s` and `launch_probe_ns` are how fast the host's Adam was on memory of its own and how long a fixed piece of work took
a training thread, before, between and after these parts, measured as `calibrate` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import record_worker
from record_list import LISTS, Configuration

NOT_SIMULATED = ("device", "predicted_step_s")
"""Of an executed plan: what the planner says of it, which depends on what it measured."""
PROBES = ("host_adam_params_per_s", "launch_probe_ns")
"""Of a run: how fast the host and the training thread were meanwhile."""
TRIES = 3
"""Visits of a configuration that may be disturbed before a command gives it up."""
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

    def record(self, run: Configuration, first: bool, seconds: float) -> record_worker.Answer:
        """Raises LostError if the worker ends or takes longer."""
        self.pipe.send((run, first))
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
    p.add_argument("--visits", type=int, default=1, help="times that the list is gone through, and parts of the timed steps")
    p.add_argument("--disturbed", type=float, default=2.0, help="times the calibrated probe from which on a visit does not count")
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


def visits(run: dict[str, Any]) -> float:
    """How often a configuration was visited; one that did not fit will not the next time."""
    return len(run["observed"].get("visits", [None])) if run["recorded"]["fits"] else float("inf")


def joined(run: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """A run with another visit of its configuration. Raises ValueError if that was no repetition."""
    if not again["recorded"]["fits"]:
        raise ValueError(f"visited again it did not fit: {again['failed']}")

    def plan(of: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in of["executed"].items() if name not in NOT_SIMULATED}

    if plan(run) != plan(again):
        differs = [name for name, value in plan(run).items() if value != plan(again).get(name)]
        raise ValueError(f"visited again another plan was executed: {', '.join(differs)}")

    timed, seen = ("step_s", "step_times_s", "wait_s"), ("thread_s", "per_step")

    def visit(of: dict[str, Any]) -> dict[str, Any]:
        parts = ((of["recorded"], timed), (of["observed"], seen), (of, PROBES))
        return {name: part[name] for part, names in parts for name in names}

    all_visits = [*run["observed"].get("visits", [visit(run)]), visit(again)]
    if any(one.keys() != all_visits[-1].keys() for one in all_visits):
        raise ValueError("its visits are those of an earlier version of this file: name another --out")
    fastest = min(all_visits, key=lambda one: float(one["step_s"]))
    recorded = {
        **run["recorded"],
        **{name: fastest[name] for name in timed},
        **{peak: max(run["recorded"][peak], again["recorded"][peak]) for peak in ("device_peak_bytes", "host_peak_bytes")},
    }
    observed = {**run["observed"], **{name: fastest[name] for name in seen}, "visits": all_visits}
    return {**run, "recorded": recorded, "observed": observed, **{name: fastest[name] for name in PROBES}}


def is_disturbed(run: dict[str, Any], longest_probe_ns: float) -> bool:
    """Whether another program had the processors."""
    return max(run.get("launch_probe_ns", [0.0])) > longest_probe_ns


def left_out(run: dict[str, Any]) -> dict[str, Any]:
    """What a file keeps of a visit that was disturbed."""
    return {
        "name": run["name"],
        **{name: run[name] for name in PROBES},
        **{name: run["recorded"][name] for name in ("step_s", "step_times_s")},
        "thread_s": run["observed"]["thread_s"],
    }


def shown(run: dict[str, Any]) -> str:
    recorded = run["recorded"]
    if not recorded["fits"]:
        return f"did not fit: {run['failed'][:160]}"
    spread = f"{min(recorded['step_times_s']):.4f} to {max(recorded['step_times_s']):.4f}"
    sizes = f"device {recorded['device_peak_bytes'] / 1e9:.2f} GB, host {recorded['host_peak_bytes'] / 1e9:.2f} GB"
    return f"{recorded['step_s']:.4f} s ({spread}), {sizes}"


def main() -> int:
    a = parser().parse_args()
    if a.visits < 1:
        raise SystemExit(f"--visits is {a.visits}: the list is gone through at least once")
    if not a.disturbed > 0:
        raise SystemExit(f"--disturbed is {a.disturbed}: it must be more than 0, or every visit is disturbed")
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
    places = {run["name"]: place for place, run in enumerate(result["runs"])}
    skipped = {run["name"] for path in a.skip for run in json.loads(Path(path).read_text())["runs"]}
    listed = [run for run in LISTS[a.list] if run.name not in skipped and (a.only is None or re.search(a.only, run.name))]
    done = {run.name: visits(result["runs"][places[run.name]]) if run.name in places else 0 for run in listed}
    wanted = [run for visit in range(a.visits) for run in listed if done[run.name] <= visit]
    asked, recorded, number = len(wanted), 0, 0
    failed: dict[str, str] = {}
    disturbed: Counter[str] = Counter()
    worker: Worker | None = None
    # What is disturbed comes again at the end.
    while number < len(wanted):
        run = wanted[number]
        known = result["runs"][places[run.name]] if run.name in places else None
        if run.name in failed or (known is not None and not known["recorded"]["fits"]):
            number += 1
            continue  # Nothing else will come of it.
        if elapsed() > a.limit:
            print(f"time is up: {len(wanted) - number} {'configurations' if a.visits == 1 else 'visits'} are left", flush=True)
            break
        number += 1
        begin = elapsed()
        try:
            worker = worker or Worker(a)
            result["machine"] = worker.machine
            answer = worker.record(run, known is None, min(a.each, a.limit + ENDING_S - elapsed()))
        except LostError as error:
            answer = record_worker.Answer(run=None, problem=str(error), dirty=str(error))
        again = False
        if answer.run is not None and is_disturbed(answer.run, a.disturbed * measured["launch"]["probe_ns"]):
            result.setdefault("disturbed", []).append(left_out(answer.run))
            write(a, result)
            probes = " and ".join(f"{ns / 1e6:.1f}" for ns in answer.run["launch_probe_ns"])
            calibrated = f"{measured['launch']['probe_ns'] / 1e6:.1f} ms when this machine was calibrated"
            answer = dataclasses.replace(answer, run=None, problem=f"disturbed: the training thread's probes took {probes}, {calibrated}")
            disturbed[run.name] += 1
            again = disturbed[run.name] < TRIES
        elif answer.run is not None and known is not None:
            try:
                result["runs"][places[run.name]] = joined(known, answer.run)
            except ValueError as error:
                answer = dataclasses.replace(answer, run=None, problem=str(error))
        elif answer.run is not None:
            places[run.name] = len(result["runs"])
            result["runs"].append(answer.run)
        if answer.run is not None:
            result["models"][run.size] = run.config()
            write(a, result)
            recorded += 1
        elif again:
            wanted.append(run)
        else:
            failed[run.name] = answer.problem or "no answer"
        text = f"not recorded: {answer.problem}" if answer.run is None else shown(result["runs"][places[run.name]])
        print(f"[{number}/{len(wanted)}, {elapsed():.0f} s] {run.name}: {text}, took {elapsed() - begin:.1f} s", flush=True)
        if answer.dirty is not None and worker is not None:
            print(f"a new worker: {answer.dirty}", flush=True)
            worker.end()
            worker = None
    if worker is not None:
        worker.end()
    made = "were recorded" if a.visits == 1 else "visits were made"
    print(f"{len(result['runs'])} configurations are in {a.out}; {recorded} {made} in {elapsed():.0f} s", flush=True)
    for name, problem in failed.items():
        print(f"not recorded: {name}: {problem}", file=sys.stderr, flush=True)
    return 0 if recorded or not asked else 1


if __name__ == "__main__":
    sys.exit(main())
