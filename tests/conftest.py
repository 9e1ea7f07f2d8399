"""What holds for every test: no network, the installed wheel where that is asked for, GPU tests only where there is a GPU."""

from __future__ import annotations

import functools
import os
from pathlib import Path

# Before any test imports torch or a Hugging Face library.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Threads that spin while they wait make a busy machine many times slower.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest

import tierwise

# Their assertions show values too, when they fail.
pytest.register_assert_rewrite("tests.support")

_ROOT = Path(__file__).resolve().parents[1]
_GPU = _ROOT / "tests" / "gpu"

# Time is no property: a busy machine must not make a test fail. pytest-timeout ends what hangs.
hypothesis.settings.register_profile("tierwise", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tierwise")


def _installed_from() -> Path:
    assert tierwise.__file__ is not None
    return Path(tierwise.__file__).resolve().parent


def pytest_configure(config: pytest.Config) -> None:
    """`make test` tests what users get: the wheel, never the sources that it was built from."""
    if os.environ.get("TIERWISE_REQUIRE_WHEEL") == "1" and _installed_from().is_relative_to(_ROOT / "python"):
        raise pytest.UsageError(f"tierwise was imported from the source tree ({_installed_from()}), not from the installed wheel")


def pytest_report_header(config: pytest.Config) -> str:
    """Which package is tested."""
    return f"tierwise {tierwise.__version__} from {_installed_from()}"


@functools.cache
def _cuda_device_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in tests/gpu carries the marker `gpu`, and `gpu` is skipped where there is no device."""
    for item in items:
        if item.path.is_relative_to(_GPU):
            item.add_marker("gpu")
        if item.get_closest_marker("gpu") is not None and not _cuda_device_is_there():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
