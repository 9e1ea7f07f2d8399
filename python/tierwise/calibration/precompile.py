"""What each process of `ahead.Ahead` runs: the kernels of its share of the layers are compiled, and by one of them the loss's.

python -m tierwise.calibration.precompile WHICH COUNT DEVICE
"""

from __future__ import annotations

import sys

import torch

from tierwise.calibration import compute
from tierwise.calibration.timing import Timer

_SHARE = 0.1
"""Of the device's memory, that the process which measures can do without."""


def main(which: int, count: int, device_index: int) -> None:
    """Compiles every `count`-th layer's kernels, from the `which`-th on; before the last layer's, which are no more than the others', the
    loss's, which is measured first. Raises torch.OutOfMemoryError where a tenth of the device is too little."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", device_index)
        torch.cuda.set_device(device)
        torch.cuda.set_per_process_memory_fraction(_SHARE, device)
    sizes = compute.DEVICE_SIZES if device.type == "cuda" else compute.CPU_SIZES
    timer, share = Timer(device, 0.0), range(which, len(sizes.layers), count)
    if len(sizes.layers) - 1 in share:
        compute.compile_loss(sizes, timer)
    compute.compile_layers(sizes, timer, share)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
