"""What each process of `ahead.Ahead` runs: the kernels of its share of the layers are compiled.

python -m tierwise.calibration.precompile WHICH COUNT
"""

from __future__ import annotations

import sys

import torch

from tierwise.calibration import compute
from tierwise.calibration.timing import Timer


def main(which: int, count: int) -> None:
    """Compiles every `count`-th layer's kernels, from the `which`-th on."""
    cuda = torch.cuda.is_available()
    sizes = compute.DEVICE_SIZES if cuda else compute.CPU_SIZES
    compute.compile_layers(sizes, Timer(torch.device("cuda" if cuda else "cpu"), 0.0), range(which, len(sizes.layers), count))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
