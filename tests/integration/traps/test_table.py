"""The table of traps in README.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[2]


def _defined(file: Path) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_trap_has_its_test() -> None:
    missing = []
    section = ""
    rows = 0
    for line in (_HERE / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        row = re.fullmatch(r"\|.*\| `(?:(?P<file>[\w/]+\.py)::)?(?P<test>test_\w+)`.*\|", line)
        if row is None:
            # Only the two lines above each table's rows may look like this.
            assert not line.startswith("|") or line in ("| trap | test |", "|---|---|"), line
            continue
        rows += 1
        file = _ROOT / row["file"] if row["file"] else _HERE / section
        if not file.is_file() or row["test"] not in _defined(file):
            missing.append(line)
    assert rows > 0
    assert not missing, "\n".join(missing)


def test_every_file_has_its_section() -> None:
    sections = re.findall(r"^## (\S+)$", (_HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(sections) == sorted(file.name for file in _HERE.glob("test_*.py") if file.name != Path(__file__).name)
