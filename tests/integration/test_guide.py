"""The code of docs/guide.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

_GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide.md"


def test_the_guide_runs(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", _GUIDE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    monkeypatch.chdir(tmp_path)
    kit.llama().save_pretrained("llama")
    rows = [{"input_ids": ids[0], "labels": ids[0]} for ids in kit.batches(12)]
    there: dict[str, Any] = {"dataloader": torch.utils.data.DataLoader(rows, batch_size=4)}  # type: ignore[arg-type]
    for block in blocks[:-1]:
        exec(compile(block, str(_GUIDE), "exec"), there)
    first = {name: value.clone() for name, value in there["model"].state_dict().items()}
    exec(compile(blocks[-1], str(_GUIDE), "exec"), there)
    assert torch.isfinite(there["loss"])
    printed = capsys.readouterr().out
    assert "micro_batch_size 4 chosen" in printed
    assert "more device memory at" in printed
    # The resumed run is where the first one ended.
    assert there["lr_scheduler"].last_epoch == 3
    steps = {int(state["step"]) for state in there["optimizer"].state_dict()["state"].values()}
    assert steps == {3}
    for name, value in there["model"].state_dict().items():
        assert torch.equal(value, first[name]), name
