"""`tierwise.data`: files to token blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierwise.data import TokenBlocks, pack_tokens, read_texts

SEPARATOR = 99


def tokens(blocks: Any) -> list[list[int]]:
    """The tokens of each block. Iterates by `__getitem__` until an IndexError, as Python does and mypy does not know."""
    return [block["input_ids"].tolist() for block in blocks]


@given(
    documents=st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=20),
    seq_len=st.integers(2, 9),
    max_blocks=st.none() | st.integers(1, 5),
)
def test_packing_is_joining_and_cutting(documents: list[list[int]], seq_len: int, max_blocks: int | None) -> None:
    joined = [token for document in documents for token in [*document, SEPARATOR]]
    wanted = [joined[start : start + seq_len] for start in range(0, len(joined) - seq_len + 1, seq_len)][:max_blocks]
    if not wanted:
        with pytest.raises(ValueError, match="do not fill a block"):
            pack_tokens(documents, seq_len, SEPARATOR, max_blocks)
        return
    blocks = pack_tokens(iter(documents), seq_len, SEPARATOR, max_blocks)
    assert tokens(blocks) == wanted
    assert len(blocks) == len(wanted)


def test_packing_reads_no_more_than_it_needs() -> None:
    def documents() -> object:
        yield [1, 2, 3]
        yield [4, 5, 6]
        raise AssertionError("read too far")

    assert len(pack_tokens(documents(), 4, SEPARATOR, max_blocks=2)) == 2  # type: ignore[arg-type]


def test_blocks_are_batches_for_a_language_model() -> None:
    torch = pytest.importorskip("torch")
    blocks = pack_tokens([list(range(11))], 4, SEPARATOR)
    batch = next(iter(torch.utils.data.DataLoader(blocks, batch_size=3)))
    assert batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, SEPARATOR]]
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_split_keeps_order() -> None:
    blocks = pack_tokens([list(range(11))], 4, SEPARATOR)
    first, rest = blocks.split(1)
    assert tokens(first) + tokens(rest) == tokens(blocks)
    for cut in (0, 3, 4):
        with pytest.raises(ValueError, match="cannot split"):
            blocks.split(cut)


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 tokens"):
        pack_tokens([[1, 2]], 1, SEPARATOR)
    blocks = pack_tokens([[1, 2, 3]], 2, SEPARATOR)
    with pytest.raises(IndexError):
        blocks[2]
    with pytest.raises(ValueError, match="no whole number of blocks"):
        TokenBlocks(blocks.tokens, 3)


def test_texts_come_in_an_order_of_names_and_seed(tmp_path: Path) -> None:
    for name in ("b/one.py", "a/two.py", "a/tests/no.py", "three.py", "notes.txt", "empty.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.py" else name, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"\xe9\n")
    texts = list(read_texts(tmp_path, exclude=("tests",), seed=1))
    assert sorted(texts) == ["a/two.py", "b/one.py", "three.py"]
    assert list(read_texts(tmp_path, exclude=("tests",), seed=1)) == texts
    assert any(list(read_texts(tmp_path, exclude=("tests",), seed=seed)) != texts for seed in range(2, 10))
    with pytest.raises(FileNotFoundError, match=r"no file matches '\*\.rs'"):
        next(read_texts(tmp_path, "*.rs"))
