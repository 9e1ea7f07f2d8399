"""`tierwise calibrate` and `benchmarks/record.py` on this machine: their files are what the simulator reads."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tierwise
from tierwise import _core
from tierwise.cli import main

_BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hardware file of this machine, its CPU standing for the device."""
    path = tmp_path_factory.mktemp("calibrated") / "here.json"
    quick = ["--device", "emulated", "--host-numel", "200000", "--seconds", "1"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(["calibrate", "--out", str(path), "--name", "here", *quick]) == 0
    path.with_suffix(".log").write_text(said.getvalue())
    return path


@pytest.mark.timeout(300)
def test_a_calibrated_machine_is_simulated(hardware: Path) -> None:
    contents = json.loads(hardware.read_text())
    measured = contents["measured"]
    assert [row["actors"] for row in measured["sharing"]][:4] == [["h2d"], ["d2h"], ["adam"], ["compute"]]
    assert len(measured["sharing"]) == 15
    for row in measured["sharing"]:
        adam = "adam" in row["actors"]
        assert (row.get("params_first_per_s", 0) > 0) == (adam and "d2h" not in row["actors"]), row
        assert (row.get("moments_per_s", 0) > 0) == (adam and "h2d" not in row["actors"]), row
    assert all(row["moments_per_s"] > 0 for row in measured["host"])
    assert measured["host"][-1]["threads"] == _core.kernel_threads()
    for table in ("products", "attention", "layers", "losses"):
        for row in measured[table]:
            # A CPU has no power limit to meet.
            assert all(value > 0 for name, value in row.items() if name != "sustained_s"), (table, row)
    # Nor is it asked whether it waited for Python.
    assert measured["layers_kept_busy"] is False
    assert measured["launch"]["backward_ns"] > 1
    assert measured["launch"]["probe_ns"] > 1
    result = tierwise.simulate("llama2-7b", hardware=hardware, host_budget="200GB", device_budget="100GB")
    assert isinstance(result, tierwise.sim.Simulation)
    assert result.hardware == "here"


def test_a_calibration_says_when_it_said_what(hardware: Path) -> None:
    lines = hardware.with_suffix(".log").read_text().splitlines()
    ours = [line for line in lines if re.match(r" *\d+\.\d s: ", line)]
    seconds = [float(line.partition(" s: ")[0]) for line in ours]
    assert len(ours) > 10 and seconds == sorted(seconds)
    (last,) = (line for line in ours if " s: measured in " in line)
    begun, measured = (float(found) for found in re.findall(r"([\d.]+) s", last)[:2])
    # Sections are what takes the time, but for what is asked before the first.
    assert seconds[0] < begun and measured - 1.5 <= begun <= measured + 30


def test_a_calibration_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["calibrate", "--out", str(tmp_path / "x.json"), "--device", "emulated", "--host-numel", "1000000000000"])
    assert refused.value.code == 2
    assert "half of what is free" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def _record(hardware: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    # Tests run beside others, and disturb each other.
    args = ["--hardware", str(hardware), "--out", str(out), "--list", "tiny", "--device", "emulated", "--disturbed", "1e6", *more]
    # The package that is tested, wherever it was imported from.
    path = os.pathsep.join([str(Path(tierwise.__file__).resolve().parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    # As many threads as the calibration had here: the probe's small products wait for a second one.
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(_BENCHMARKS / "record.py"), *args], env=env, capture_output=True, text=True)


@pytest.mark.timeout(300)
def test_recorded_runs_are_validated(hardware: Path, tmp_path: Path) -> None:
    out = hardware.parent / "runs.json"
    # A recording is continued: what an earlier command recorded stays as it is.
    first = _record(hardware, out, "--only", "tiny device.* fires$")
    assert first.returncode == 0, first.stderr
    begun = json.loads(out.read_text())["runs"]
    assert len(begun) == 1
    timelines = tmp_path / "timelines"
    ran = _record(hardware, out, "--timelines", str(timelines))
    assert ran.returncode == 0, ran.stderr
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"]
    assert runs[0] == begun[0]
    assert [run["recorded"]["fits"] for run in runs] == [True] * 6 + [False]
    assert runs[2]["executed"]["streamed_chunks"]
    assert runs[2]["executed"]["recomputed_units"] == [f"model.layers.{i}" for i in range(3)]
    assert runs[3]["observed"]["per_step"]["speculated"] > 0
    assert runs[5]["executed"]["offload_window_bytes"] > 0
    assert "BudgetError" in runs[6]["failed"]
    for run in runs[:6]:
        assert all(len(run[probe]) == 3 and min(run[probe]) > 0 for probe in ("host_adam_params_per_s", "launch_probe_ns")), run["name"]
        assert min(run["observed"]["thread_s"].values()) > 0
    assert len(list(timelines.iterdir())) == 5
    spans = json.loads(gzip.decompress((timelines / f"{runs[1]['name'].replace(' ', '_')}.json.gz").read_bytes()))["traceEvents"]
    assert any(span["name"].startswith("step") for span in spans)
    # Nothing is left to do, and that needs no worker.
    again = _record(hardware, out, "--limit", "0")
    assert again.returncode == 0, again.stderr
    assert json.loads(out.read_text())["runs"] == runs
    code, text, log = _core.sim_output(["validate", str(out), "--format", "json"])
    assert code == 0, log
    found = json.loads(text)
    assert [run["fits"] for run in found["runs"]] == [run["recorded"]["fits"] for run in runs]
    for run in found["runs"][:6]:
        # Bytes that nobody measures by a clock are predicted to the byte of the host's slab.
        assert run["metrics"]["host_peak_bytes"]["error_percent"] == 0, run


@pytest.mark.timeout(300)
def test_visits_of_a_configuration_become_one_run(hardware: Path, tmp_path: Path) -> None:
    out, only = hardware.parent / "visits.json", ["--only", "tiny (device|host).* defer fires$|100KB"]
    ran = _record(hardware, out, *only)
    assert ran.returncode == 0, ran.stderr
    once = json.loads(out.read_text())["runs"]
    assert all("visits" not in run.get("observed", {}) for run in once)
    # Another visit is added to what is there; what did not fit is not visited again.
    ran = _record(hardware, out, "--visits", "2", *only)
    assert ran.returncode == 0, ran.stderr
    assert "2 visits were made" in ran.stdout
    twice = json.loads(out.read_text())["runs"]
    assert [run["name"] for run in twice] == [run["name"] for run in once]
    for before, after in zip(once[:2], twice[:2], strict=True):
        first, second = after["observed"]["visits"]
        assert first["step_times_s"] == before["recorded"]["step_times_s"]
        assert first["host_adam_params_per_s"] == before["host_adam_params_per_s"]
        assert (len(second["step_times_s"]), len(second["launch_probe_ns"])) == (2, 2), "of so few steps no visit times less"
        # Who shares the machine only makes it slower.
        fastest = min(first, second, key=lambda visit: visit["step_s"])
        for name in ("step_s", "step_times_s", "wait_s"):
            assert after["recorded"][name] == fastest[name]
        for name in ("host_adam_params_per_s", "launch_probe_ns"):
            assert after[name] == fastest[name]
        for name in ("thread_s", "per_step"):
            assert after["observed"][name] == fastest[name]
        assert after["recorded"]["device_peak_bytes"] >= before["recorded"]["device_peak_bytes"]
        assert after["observed"]["spans"] == before["observed"]["spans"]
        assert after["executed"] == before["executed"]
    assert twice[2] == once[2]
    assert _core.sim_output(["validate", str(out)])[0] == 0
    # Nothing of another plan is added.
    contents = json.loads(out.read_text())
    contents["runs"][0]["executed"]["undo_bytes"] += 64
    out.write_text(json.dumps(contents))
    ran = _record(hardware, out, "--visits", "3", "--only", "tiny device.* defer fires$")
    assert ran.returncode == 1
    assert "visited again another plan was executed: undo_bytes" in ran.stderr
    assert json.loads(out.read_text()) == contents
    # Nor to visits of which an earlier version kept less.
    contents["runs"][0]["executed"]["undo_bytes"] -= 64
    del contents["runs"][0]["observed"]["visits"][0]["step_times_s"]
    out.write_text(json.dumps(contents))
    ran = _record(hardware, out, "--visits", "3", "--only", "tiny device.* defer fires$")
    assert ran.returncode == 1
    assert "name another --out" in ran.stderr
    assert json.loads(out.read_text()) == contents
    for option in ("--visits", "--disturbed"):
        refused = _record(hardware, out, option, "0")
        assert refused.returncode == 1
        assert f"{option} is 0" in refused.stderr


@pytest.mark.timeout(300)
def test_a_visit_beside_another_program_does_not_count(hardware: Path) -> None:
    only = ["--only", "tiny device.* defer fires$|100KB"]
    out = hardware.parent / "disturbed.json"
    # No training thread is so much faster than it was calibrated.
    ran = _record(hardware, out, *only, "--disturbed", "1e-6", "--visits", "2")
    assert ran.returncode == 0, ran.stderr
    found = json.loads(out.read_text())
    # What did not fit did not because of another program.
    assert [run["recorded"]["fits"] for run in found["runs"]] == [False]
    assert [visit["name"] for visit in found["disturbed"]] == 3 * ["tiny device 2x64 0k none defer fires"]
    assert all(visit["step_s"] > 0 and len(visit["launch_probe_ns"]) == 2 for visit in found["disturbed"])
    assert ran.stderr.count("not recorded: tiny device") == 1
    assert "disturbed: the training thread's probes took" in ran.stderr
    assert _core.sim_output(["validate", str(out)])[0] == 0
    ran = _record(hardware, out, *only)
    assert ran.returncode == 0, ran.stderr
    again = json.loads(out.read_text())
    assert [run["recorded"]["fits"] for run in again["runs"]] == [False, True]
    assert again["disturbed"] == found["disturbed"]


@pytest.mark.timeout(300)
def test_a_configuration_that_fails_does_not_end_the_recording(hardware: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    # No worker answers in so short a time: each is replaced.
    ran = _record(hardware, out, "--each", "0.01", "--only", "tiny device.* fires$|100KB")
    assert ran.returncode == 1
    assert ran.stdout.count("a new worker: no answer within 0 s") == 2
    assert ran.stderr.count("not recorded: tiny") == 2
    assert not out.exists()
    unprobed = tmp_path / "unprobed.json"
    contents = json.loads(hardware.read_text())
    contents["measured"]["launch"] = None
    contents["sources"]["not measured"] = "launches: no memory"
    unprobed.write_text(json.dumps(contents))
    refused = _record(unprobed, tmp_path / "unrecorded.json")
    assert refused.returncode == 1
    assert "measured.launch.probe_ns, which probes are compared with (launches: no memory)" in refused.stderr
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema_version": 1, "runs": [{"name": "x", "hardware": "elsewhere.json"}]}))
    mixed = _record(hardware, other)
    assert mixed.returncode == 1
    assert "elsewhere.json" in mixed.stderr
