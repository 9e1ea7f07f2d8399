"""Packs tokenised documents into blocks of one length, so that no token of a batch is padding."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import Dataset

    _Dataset = Dataset[dict[str, Tensor]]
else:
    _Dataset = object  # torch's DataLoader takes anything with a length and items.


def pack_tokens(documents: Iterable[Sequence[int]], seq_len: int, separator: int, max_blocks: int | None = None) -> TokenBlocks:
    """Joins documents, each followed by `separator`, and cuts them into blocks of `seq_len` tokens.

    Stops reading once `max_blocks` are full; the tail that fills no block is dropped. Raises ValueError if not even one block is full.
    """
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2 tokens (a token and its successor), got {seq_len}")
    tokens = array("i")
    for document in documents:
        tokens.extend(document)
        tokens.append(separator)
        if max_blocks is not None and len(tokens) >= max_blocks * seq_len:
            break
    blocks = len(tokens) // seq_len
    if max_blocks is not None:
        blocks = min(blocks, max_blocks)
    if blocks < 1:
        raise ValueError(f"{len(tokens)} tokens do not fill a block of {seq_len}")
    return TokenBlocks(tokens[: blocks * seq_len], seq_len)


class TokenBlocks(_Dataset):
    """A map-style dataset of equal blocks for causal language models.

    `blocks[i]` is `{"input_ids": int64 [seq_len], "labels": the same tensor}`; models of Hugging Face transformers shift the labels.
    """

    def __init__(self, tokens: array[int], seq_len: int) -> None:
        if len(tokens) % seq_len:
            raise ValueError(f"{len(tokens)} tokens are no whole number of blocks of {seq_len}")
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return len(self.tokens) // self.seq_len

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        import torch

        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        block = torch.tensor(self.tokens[index * self.seq_len : (index + 1) * self.seq_len], dtype=torch.long)
        return {"input_ids": block, "labels": block}

    def split(self, first: int) -> tuple[TokenBlocks, TokenBlocks]:
        """The first `first` blocks, and the rest. Raises ValueError if either would be empty."""
        if not 0 < first < len(self):
            raise ValueError(f"cannot split {len(self)} blocks after {first}")
        cut = first * self.seq_len
        return TokenBlocks(self.tokens[:cut], self.seq_len), TokenBlocks(self.tokens[cut:], self.seq_len)
