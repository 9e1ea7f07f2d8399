"""What this machine has for training: device, host memory, CPU, disk; what will be used, and why not better."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import resource
import time
from pathlib import Path
from typing import Any

from tierwise import _core
from tierwise._core import TierwiseError
from tierwise.config import available_memory_bytes, format_bytes

SCHEMA_VERSION = 1
_LINK_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class Finding:
    """One part of the machine."""

    part: str
    """"device", "link", "host", "cpu" or "disk"."""
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
    if findings[0].usable:
        findings.insert(1, _link())
    if nvme_path is not None:
        findings.append(_disk(nvme_path, probe_bytes))
    return Report(findings)


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", False, {"torch": "not installed"}, ["pip install 'tierwise[train]'"])
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__}
    if not torch.cuda.is_available():
        advice = ["torch sees no CUDA device: training runs on the emulated device, in host memory"]
        if torch.version.cuda is None:
            advice.append("this torch was built without CUDA: install one with it where there is a GPU")
        elif _driver_version() is not None:
            advice.append(
                f"NVIDIA's driver {_driver_version()} is loaded: is the GPU visible (CUDA_VISIBLE_DEVICES), and new enough a driver?"
            )
        return Finding("device", False, facts, advice)
    if not _core.Device.cuda_is_available():
        return Finding("device", False, facts, ["torch sees a CUDA device, but the driver's library libcuda.so.1 cannot be loaded"])
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    facts |= {"name": torch.cuda.get_device_name(), "memory_bytes": total, "free_bytes": free, "compute capability": f"{major}.{minor}"}
    facts |= {"driver": _driver_version(), "CUDA of torch": torch.version.cuda}
    advice = []
    if total - free > total // 10:
        advice.append(
            f"{format_bytes(total - free)} of the device are taken by other processes (see nvidia-smi): they lower the device budget"
        )
    if major < 8:
        advice.append("the GPU has no fast bf16: train with precision='fp16'")
    return Finding("device", True, facts, advice)


def _driver_version() -> str | None:
    """Of NVIDIA's kernel module, where it says so."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return None if found is None else found[0]


def _link() -> Finding:
    """Page-locks host memory and measures copies between it and the device, each direction alone and both at once."""
    import torch

    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    facts: dict[str, Any] = {"page-lock limit": "none" if limit == resource.RLIM_INFINITY else format_bytes(limit)}
    try:
        host = [torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        device = [torch.empty(_LINK_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2)]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        return Finding(
            "link", False, facts, [f"page-locked memory is refused ({reason}): raise `ulimit -l`, in containers --ulimit memlock=-1"]
        )

    def seconds(*copies: tuple[Any, Any]) -> float:
        streams = [torch.cuda.Stream() for _ in copies]
        best = math.inf
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for stream, (target, source) in zip(streams, copies, strict=True):
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - start)
        return best

    to_device, to_host = (device[0], host[0]), (host[1], device[1])
    rates = {"h2d": _LINK_BYTES / seconds(to_device), "d2h": _LINK_BYTES / seconds(to_host)}
    both = _LINK_BYTES / seconds(to_device, to_host)
    facts |= {f"{name}_mb_per_s": rate / 1e6 for name, rate in rates.items()} | {"both_at_once_mb_per_s": both / 1e6}
    advice = []
    if min(rates.values()) < 10e9:
        advice.append(
            "copies are slower than a PCIe Gen4 x8 link allows: check the slot (lspci -vv, LnkSta), and that the process runs on its node"
        )
    if both < 0.6 * min(rates.values()):
        advice.append("both directions together are much slower than one: host memory or the link is shared")
    return Finding("link", True, facts, advice)


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
