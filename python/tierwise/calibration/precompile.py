"""What each process of `ahead.Ahead` runs: its share of the layers' kernels is compiled, by one of them the loss's, by one the engine's.

python -m tierwise.calibration.precompile WHICH COUNT DEVICE
"""

from __future__ import annotations

import sys

import torch

from tierwise._core import Device
from tierwise.calibration import compute
from tierwise.calibration.timing import Timer

_SHARE = 0.1
"""Of the device's memory, that the process which measures can do without."""


def main(which: int, count: int, device_index: int) -> None:
    """Compiles the layers' kernels for every `count`-th of their batches, from the `which`-th on; the last process, which has no more of
    them than others, first the loss's, measured before, and the first one the engine's after them, needed later. Raises
    torch.OutOfMemoryError where a tenth of the device is too little, TierwiseError where the engine cannot use it."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index)
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(_SHARE, device)
    sizes = compute.DEVICE_SIZES if device.type == "cuda" else compute.CPU_SIZES
    timer = Timer(device, 0.0)
    if which == count - 1:
        compute.compile_loss(sizes, timer)
    compute.compile_layers(sizes, timer, compute.compiled(sizes)[which::count])
    if which == 0 and device.type == "cuda":
        # The driver compiles the engine's kernels when they are loaded, and keeps them on the disk.
        Device.cuda(device_index)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
