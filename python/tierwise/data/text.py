"""Reads the text files of a folder in an order that depends on nothing but their names and a seed."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from pathlib import Path


def read_texts(folder: Path, pattern: str = "*.py", *, exclude: Collection[str] = (), seed: int = 0) -> Iterator[str]:
    """Yields the text of every file under `folder` that matches `pattern`, in an order shuffled by `seed`.

    Folders named in `exclude` are left out at every depth, and so are files that are empty or not UTF-8. Raises FileNotFoundError if
    no file matches.
    """
    names = sorted(path for path in folder.rglob(pattern) if path.is_file() and not set(path.relative_to(folder).parts) & set(exclude))
    if not names:
        raise FileNotFoundError(f"no file matches {pattern!r} under {folder}")
    random.Random(seed).shuffle(names)
    for path in names:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            yield text
