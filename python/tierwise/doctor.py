"""What this machine has for training: device, host memory, CPU, disk; what will be used, and why not better."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from typing import Any

from tierwise import _core
from tierwise._core import TierwiseError
from tierwise.config import available_memory_bytes, format_bytes

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part of the machine."""

    part: str
    """"device", "host", "cpu" or "disk"."""
    usable: bool
    facts: dict[str, Any]
    advice: list[str]
    """What is not as good as it could be, each with what to do."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found."""

    findings: list[Finding]

    @property
    def usable(self) -> bool:
        """Whether everything that was asked for can be used. A machine without a GPU trains on the emulated device."""
        return all(finding.usable for finding in self.findings if finding.part != "device")

    def to_dict(self) -> dict[str, Any]:
        """The report with its schema's version."""
        return {"schema_version": SCHEMA_VERSION, "usable": self.usable, "findings": [dataclasses.asdict(f) for f in self.findings]}

    def to_text(self) -> str:
        """The report for people."""
        lines = []
        for finding in self.findings:
            facts = ", ".join(f"{name} {_readable(name, value)}" for name, value in finding.facts.items() if value not in (None, []))
            lines.append(f"{finding.part:<8}{'' if finding.usable else 'NOT USABLE  '}{facts}")
            lines += [f"{'':<8}hint: {text}" for text in finding.advice]
        return "\n".join(lines)


def diagnose(nvme_path: str | None, probe_bytes: int = 2**30) -> Report:
    """Checks the machine; `nvme_path` is measured with a spill file of up to `probe_bytes` that is gone afterwards."""
    findings = [_device(), _host(), _cpu()]
    if nvme_path is not None:
        findings.append(_disk(nvme_path, probe_bytes))
    return Report(findings)


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", False, {"torch": "not installed"}, ["pip install 'tierwise[train]'"])
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__}
    if not torch.cuda.is_available():
        return Finding("device", False, facts, ["torch sees no CUDA device: training runs on the emulated device, in host memory"])
    if not _core.Device.cuda_is_available():
        return Finding("device", False, facts, ["torch sees a CUDA device, but the driver's library libcuda.so.1 cannot be loaded"])
    free, total = torch.cuda.mem_get_info()
    facts |= {"name": torch.cuda.get_device_name(), "memory_bytes": total, "free_bytes": free}
    return Finding("device", True, facts, [])


def _host() -> Finding:
    return Finding("host", True, {"available_bytes": available_memory_bytes()}, [])


def _cpu() -> Finding:
    try:
        return Finding("cpu", True, {"kernel threads": _core.kernel_threads()}, [])
    except ValueError as error:
        return Finding("cpu", False, {}, [str(error)])


def _disk(path: str, probe_bytes: int) -> Finding:
    try:
        report = json.loads(_core.probe_disk(path, probe_bytes))
    except (ValueError, TierwiseError) as error:
        return Finding("disk", False, {"directory": path}, [str(error)])
    advice = report.pop("advice")
    setup = report.pop("setup")
    return Finding("disk", True, {**report, **setup}, advice)


def _readable(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return format_bytes(value)
    return f"{value:.0f}" if isinstance(value, float) else str(value)
