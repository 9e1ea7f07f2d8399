"""`tierwise doctor`: what it finds on this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tierwise import doctor
from tierwise.cli import main


def test_a_directory_on_a_disk_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--nvme-path", str(tmp_path), "--bytes", "128MiB", "--format", "json"])
    report = json.loads(capsys.readouterr().out)
    disk = report["findings"][-1]
    if not disk["usable"]:
        # A test folder may be in memory: then it has to say so.
        assert "memory" in disk["advice"][0]
        assert code == 1
        return
    assert code == 0
    assert report["schema_version"] == 1
    assert disk["facts"]["write_mb_per_s"] > 0
    assert disk["facts"]["read_mb_per_s"] > 0
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a tmpfs at /dev/shm")
def test_memory_is_not_called_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nvme-path", "/dev/shm"]) == 1
    out = capsys.readouterr().out
    assert "NOT USABLE" in out
    assert "tmpfs" in out


def test_what_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--nvme-path", "/nowhere/at/all"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().out


def test_without_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernel threads" in out
    assert "disk" not in out


def test_a_bad_thread_count_is_not_usable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERWISE_NUM_THREADS", "many")
    assert main(["doctor"]) == 1
    assert "TIERWISE_NUM_THREADS='many'" in capsys.readouterr().out


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--bytes", "lots"])
    assert caught.value.code == 2
    assert "--bytes" in capsys.readouterr().err


def test_memory_that_cannot_be_page_locked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")

    def refused(*args: object, pin_memory: bool = False, **kwargs: object) -> None:
        assert pin_memory
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    monkeypatch.setattr(torch, "empty", refused)
    finding = doctor._link()
    assert not finding.usable
    assert "page-locked memory is refused (CUDA error: out of memory): raise `ulimit -l`" in finding.advice[0]
    assert finding.facts["page-lock limit"]
    assert not doctor.Report([finding]).usable
