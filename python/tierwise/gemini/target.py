"""The compute device: its torch device, the engine's handle, and the current stream."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tierwise._core import Device, HostBench, kernel_threads
from tierwise.config import Speeds, available_memory_bytes, default_speeds, parse_bytes

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_HALF_SPEED_TOKENS = 256
"""Tokens of a micro-batch at which a GPU reaches half its speed. Between what layers did on an H100: with 4,096 tokens 496 TFLOP/s at
hidden size 2048 and 689 at 4096, with 16,384 tokens 632 and 696."""

_BENCH_NUMEL = 2**26
"""Parameters on which the CPU's optimizer is measured: far more than its caches hold."""
_BESIDE_COPIES = 0.8
"""Share of its speed alone that the CPU's optimizer keeps while parameters are copied to the device from the same memory."""
_FIRST_OF_TWO = 1.3
"""Times as many parameters in the first of two passes as whole: 1.28 to 1.36 on six hosts of H100s with all 16 CPUs."""

_LIMITS: dict[torch.device, int] = {}
"""How many limits every device's allocator was given."""


@functools.cache
def _host_adam_params(threads: int) -> dict[str, float]:
    """Parameters per second that the CPU steps beside copies, whole and in the first of two passes: measured, because the same machine is
    half as fast in a busy hour, and few threads gain less by moving less."""
    bench = HostBench(_BENCH_NUMEL)
    bench.rate("adam", 0.05, threads)
    kernels = {"host_adam_params": "adam", "host_params_first": "params_first"}
    return {speed: bench.rate(kernel, 0.15, threads) * _BESIDE_COPIES for speed, kernel in kernels.items()}


def expand_segments() -> bool:
    """Lets torch's CUDA allocator grow its segments, unless it was told otherwise; gives whether it does.

    Layers whose activations are kept, recomputed and offloaded ask for blocks of changing sizes: fixed segments lose several percent of the
    device between them. What is allocated already stays where it is.
    """
    # Before torch 2.15 only the environment tells what is set.
    asked: str = getattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "")()
    asked = asked or os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    settings = dict(part.strip().partition(":")[::2] for part in asked.split(",") if part.strip())
    if "expandable_segments" in settings:
        return settings["expandable_segments"].strip().lower() == "true"
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is None or settings.get("backend", "native").strip() != "native":
        return False
    # The settings are replaced as a whole: what was set before goes in again.
    change(",".join([*filter(None, [asked.strip().rstrip(",")]), "expandable_segments:True"]))
    return True


@dataclasses.dataclass(frozen=True)
class Target:
    """Where the model computes."""

    torch_device: torch.device
    core: Device
    emulated: bool
    expandable: bool = False
    """Whether torch's allocator grows its segments instead of taking more of them."""

    @staticmethod
    def choose(plugin: GeminiPlugin) -> Target:
        """The device that the plugin asks for. Raises ValueError if it asks for CUDA where there is none."""
        usable = torch.cuda.is_available() and Device.cuda_is_available()
        if plugin.device == "cuda" and not usable:
            raise ValueError("device='cuda' but no CUDA device can be used; device='emulated' trains in host memory")
        if plugin.device == "cuda" or (plugin.device == "auto" and usable):
            ordinal = torch.cuda.current_device()
            torch.cuda.synchronize(ordinal)  # The primary context has to exist before the engine retains it.
            expandable = expand_segments()
            return Target(torch.device("cuda", ordinal), Device.cuda(ordinal), emulated=False, expandable=expandable)
        core = Device.emulated(
            h2d_bytes_per_second=plugin.h2d_bytes_per_second,
            d2h_bytes_per_second=plugin.d2h_bytes_per_second,
            latency_ns=plugin.link_latency_ns,
            threads=plugin.num_threads,
        )
        return Target(torch.device("cpu"), core, emulated=True)

    def stream(self) -> int:
        """The raw current stream; 0 on the emulated device."""
        return 0 if self.emulated else int(torch.cuda.current_stream(self.torch_device).cuda_stream)

    def synchronize(self) -> None:
        """Waits for everything that torch has enqueued."""
        if not self.emulated:
            torch.cuda.synchronize(self.torch_device)

    def reset_peak(self) -> None:
        """Forgets torch's memory peak so far: filling chunks needs room that training does not."""
        if not self.emulated:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.torch_device)

    def limit(self, device_budget: int | None) -> Callable[[], None]:
        """Makes torch's allocator refuse what exceeds the budget: on CUDA it holds everything but the context. None: no limit.

        The limit is the process's, and the latest one counts: what is returned lifts it, unless another came after it.
        """
        if self.emulated:
            return lambda: None
        _, total = torch.cuda.mem_get_info(self.torch_device)
        fraction = 1.0 if device_budget is None else min(device_budget / total, 1.0)
        torch.cuda.set_per_process_memory_fraction(fraction, self.torch_device)
        device, process = self.torch_device, os.getpid()
        turn = _LIMITS[device] = _LIMITS.get(device, 0) + 1

        def lift() -> None:
            # A forked child has the model too, but no device.
            if _LIMITS[device] == turn and os.getpid() == process:
                torch.cuda.set_per_process_memory_fraction(1.0, device)

        return lift

    def device_budget(self, plugin: GeminiPlugin) -> int:
        """The plugin's device budget, or what the device has left (see `GeminiPlugin.device_budget`)."""
        if plugin.device_budget is not None:
            return parse_bytes(plugin.device_budget)
        if self.emulated:
            return int(available_memory_bytes() * 0.8)
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        return int((free + torch.cuda.memory_reserved(self.torch_device)) * 0.98)

    def fragmentation_bytes(self, device_budget: int) -> int:
        """Device bytes that torch's allocator loses between its blocks: some 4 % were seen, next to nothing with expandable segments; the
        emulated device loses none."""
        return 0 if self.emulated else device_budget // (128 if self.expandable else 24)

    def host_budget(self, plugin: GeminiPlugin) -> int:
        """The plugin's host budget, or 80 % of the free RAM."""
        return parse_bytes(plugin.host_budget) if plugin.host_budget is not None else int(available_memory_bytes() * 0.8)

    def speeds(self, plugin: GeminiPlugin, tokens: int) -> Speeds:
        """Speeds for the planner: by device name; links and the CPU's optimizer as the plugin gives them, the latter else beside CUDA as
        measured here. Small micro-batches leave a GPU partly idle."""
        name = "emulated" if self.emulated else torch.cuda.get_device_name(self.torch_device)
        threads = kernel_threads(plugin.num_threads)
        speeds = default_speeds(name, threads)
        if plugin.host_adam_params_per_second is not None:
            whole = plugin.host_adam_params_per_second * _BESIDE_COPIES
            speeds = dataclasses.replace(speeds, host_adam_params=whole, host_params_first=whole * _FIRST_OF_TWO)
        elif not self.emulated and self.host_budget(plugin) > _BENCH_NUMEL * 14:
            speeds = dataclasses.replace(speeds, **_host_adam_params(threads))
        return dataclasses.replace(
            speeds,
            flops=speeds.flops if self.emulated else speeds.flops * tokens / (tokens + _HALF_SPEED_TOKENS),
            h2d_bytes=plugin.h2d_bytes_per_second or speeds.h2d_bytes,
            d2h_bytes=plugin.d2h_bytes_per_second or speeds.d2h_bytes,
        )
