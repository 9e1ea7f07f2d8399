"""`tierwise doctor` on a machine with a GPU: driver, page-locked memory, and the link in both directions."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs torch: install tierwise[train]")

import torch

from tierwise.doctor import diagnose

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_link_is_measured() -> None:
    report = diagnose(None)
    findings = {finding.part: finding for finding in report.findings}
    assert report.usable
    assert findings["device"].facts["compute capability"]
    facts = findings["link"].facts
    for name in ("h2d_mb_per_s", "d2h_mb_per_s", "both_at_once_mb_per_s"):
        # PCIe Gen3 x4 at least, NVLink-C2C at most.
        assert 2e3 < facts[name] < 1e6, facts
    assert "link" in report.to_text()
