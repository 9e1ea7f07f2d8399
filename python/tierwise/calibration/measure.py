"""Runs the measurements that this machine allows and puts them into a hardware file."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from tierwise import _core
from tierwise._core import HostBench
from tierwise.calibration import ahead, host
from tierwise.calibration.summary import hardware
from tierwise.config import available_memory_bytes

_COMPILING_S = 15.0
"""After which kernels that are still being compiled by other processes are compiled by this one."""
_NUMEL = 400_000_000
"""Parameters to measure on where memory allows it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure. Raises ValueError for values that cannot work."""

    name: str = "this-machine"
    """Name of the machine in reports."""
    device: Literal["auto", "cuda", "emulated"] = "auto"
    """"emulated" measures the CPU as the device; "auto" takes CUDA where there is one."""
    disk: str | None = None
    """Directory to measure as the NVMe tier."""
    host_numel: int | None = None
    """Parameters on which the host's kernels are measured, 14 bytes each; None: 400 million, or fewer where memory is scarce. The memory of
    a virtual machine is not equally fast everywhere."""
    seconds: float = 45.0
    """All measurements together, about; those of single kernels are shortened for it."""

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cuda", "emulated"):
            raise ValueError(f"device={self.device!r} is not one of 'auto', 'cuda', 'emulated'")
        if not 1.0 <= self.seconds <= 3600.0:
            raise ValueError(f"seconds must be between 1 and 3600, got {self.seconds}")
        if self.host_numel is None:
            return
        if self.host_numel < 1:
            raise ValueError(f"host_numel must be at least 1, got {self.host_numel}")
        most = available_memory_bytes() // 2
        if 14 * self.host_numel > most:
            raise ValueError(
                f"host_numel={self.host_numel} takes {14 * self.host_numel} bytes; at most {most}, half of what is free, may be"
            )

    def numel(self) -> int:
        """How many parameters `host_numel` stands for now."""
        return max(min(_NUMEL, available_memory_bytes() // 8 // 14), 1) if self.host_numel is None else self.host_numel


def calibrate(options: Options, log: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measures and returns the contents of a hardware file (`schema_version` 2).

    Raises ValueError if CUDA is asked for where there is none, the disk is no directory, or there is no memory for `host_numel`; OSError if
    the disk cannot be measured; ImportError without torch: then `tierwise-sim calibrate` measures what needs no torch.
    """
    _possible(options)
    # Before anything that is measured takes some.
    host_bytes, host_numel = available_memory_bytes(), options.numel()
    sections = _Sections()
    scale = options.seconds / 45.0
    missing: list[str] = []
    # They import torch while this process does. Whoever compiles has ended before layers and the host are measured.
    with ThreadPoolExecutor(1) as beside_imports, ahead.Ahead(_device_index(options), log) as compiling:
        # The system takes its time to give so much memory.
        made = beside_imports.submit(HostBench, host_numel)
        import torch

        device = _device(options)
        bench = made.result()
        cuda = sections.cuda = device.type == "cuda"
        if not cuda:
            # The driver has a device, and torch cannot use it.
            compiling.stop()
        free_device_bytes = torch.cuda.mem_get_info(device)[0] if cuda else host_bytes
        measured = _kernels(device, scale, log, sections, missing, compiling)
    if cuda:
        # Whoever compiles may have held some of it before.
        free_device_bytes = max(free_device_bytes, torch.cuda.mem_get_info(device)[0])
    with sections("host"):
        measured["host"] = host.by_threads(bench, 2.0 * scale, log)
        measured["host_numel"] = bench.numel
    from tierwise.calibration.sharing import beside

    with sections("links"):
        measured["sharing"] = beside(device, host.fewer(bench), 0.16 * scale, log)
    with sections("launches"):
        from tierwise.calibration import engine

        measured["launch"] = _if_possible("launches", lambda: engine.launches(device), log, missing)
    with sections("Adam"):
        probe = engine.HostProbe(bench)
        adam = _if_possible("Adam in the engine", lambda: engine.adam(device, measured, probe, log), log, missing) or engine.Adam()
        apart = (
            _if_possible("steps on the device", lambda: engine.speculation(device, measured, probe, adam.host_fixed_ns), log, missing)
            or engine.Adam()
        )
        adam = dataclasses.replace(
            adam, device_params_per_s=apart.device_params_per_s, host_undoable_params_per_s=apart.host_undoable_params_per_s
        )
    measured["device_adam_params_per_s"] = adam.device_params_per_s
    measured["host_adam_params_per_s"] = adam.host_params_per_s
    measured["host_params_first_per_s"] = adam.host_params_first_per_s
    measured["host_moments_per_s"] = adam.host_moments_per_s
    measured["host_undoable_params_per_s"] = adam.host_undoable_params_per_s
    measured["host_gap_ns"] = adam.host_gap_ns
    log(f"Adam: {adam}; launches: {measured['launch']}")
    if not cuda:
        measured["workspace_bytes"] = 0
    with sections("disk"):
        measured["disk"] = _disk(options.disk)
    log(sections.summary())
    about = {
        "machine": f"{torch.cuda.get_device_name(device) if cuda else 'emulated device'}, {os.cpu_count()} CPUs, {platform.machine()}",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}, tierwise {_core.__version__}",
        "measured": f"tierwise calibrate, {time.strftime('%Y-%m-%d')}",
        **({"not measured": "; ".join(missing)} if missing else {}),
    }
    device_name = torch.cuda.get_device_name(device) if cuda else None
    return hardware(options.name, about, measured, device_name, free_device_bytes, host_bytes)


def write(path: str, contents: dict[str, Any]) -> None:
    """Writes a hardware file under its final name only when it is complete."""
    target = Path(path)
    partial = target.with_name(f"{target.name}.partial")
    partial.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


_NO_CUDA = "device='cuda' but no CUDA device can be used; device='emulated' measures the CPU"


def _possible(options: Options) -> None:
    """Raises what would be raised anyway, as far as can be told without torch, before gigabytes are touched and a minute is over."""
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    if options.disk is not None and not Path(options.disk).is_dir():
        raise ValueError(f"disk={options.disk!r} is not a directory: name one on the disk to measure")
    if options.device == "cuda" and not _core.Device.cuda_is_available():
        raise ValueError(_NO_CUDA)


def _device_index(options: Options) -> int | None:
    """Of the CUDA device that will be measured, without importing torch; None if it will be the CPU."""
    if options.device == "emulated" or not _core.Device.cuda_is_available():
        return None
    torch = sys.modules.get("torch")
    if torch is None:
        return 0
    # Only who has torch may have chosen another than the first.
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else None


def _device(options: Options) -> Any:
    import torch

    usable = torch.cuda.is_available() and _core.Device.cuda_is_available()
    if options.device == "cuda" and not usable:
        raise ValueError(_NO_CUDA)
    if options.device != "emulated" and usable:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Sections:
    """How long every part of the calibration took: what has to be shortened if it takes too long. Frees memory between them."""

    def __init__(self, cuda: bool = False) -> None:
        self.cuda = cuda
        self.took: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        from tierwise.calibration.timing import free

        begun = time.perf_counter()
        yield
        free(self.cuda)
        self.took[name] = time.perf_counter() - begun

    def summary(self) -> str:
        return f"measured in {sum(self.took.values()):.0f} s: " + ", ".join(f"{name} {took:.1f}" for name, took in self.took.items())


def _kernels(
    device: Any,
    scale: float,
    log: Callable[[str], None],
    sections: _Sections,
    missing: list[str],
    compiling: ahead.Ahead,
) -> dict[str, Any]:
    """What the device computes."""
    from tierwise.calibration import compute
    from tierwise.calibration.timing import Timer

    sizes = compute.DEVICE_SIZES if device.type == "cuda" else compute.CPU_SIZES
    timer = Timer(device, 0.01 * scale)
    found: dict[str, Any] = {}
    with sections("products"):
        found["products"] = compute.products(sizes, timer, log)
    with sections("attention"):
        found["attention"] = compute.attention(sizes, timer, log)
    with sections("losses"):
        found["losses"] = compute.losses(sizes, timer, log)
    if compiling.count:
        with sections("compiling"):
            compute.import_layers(sizes, timer)
            codes = compiling.wait(_COMPILING_S)
            log(f"layers compiled beside these: {codes.count(0)} of {len(codes)} processes were ready")
    with sections("layers"):
        found["layers"] = _if_possible("layers", lambda: compute.layers(sizes, timer, log), log, missing) or []
    found["layers_kept_busy"] = any(row["sustained_s"] is not None for row in found["layers"])
    return found


def _if_possible(what: str, measure: Callable[[], Any], log: Callable[[str], None], missing: list[str]) -> Any:
    """What needs transformers, and goes through more of it and of torch than a file of figures should fail for: the file says why not."""
    try:
        return measure()
    except (ImportError, TypeError, RuntimeError) as error:
        log(f"{what} not measured: {type(error).__name__}: {error}")
        missing.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
        return None


def _disk(directory: str | None) -> Any:
    if directory is None:
        return None
    found = json.loads(_core.probe_disk(directory))
    return {"write_bytes_per_s": 1e6 * found["write_mb_per_s"], "read_bytes_per_s": 1e6 * found["read_mb_per_s"]}
