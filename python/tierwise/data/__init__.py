"""Text for training: files become token blocks of one length. torch is imported when the first block is read."""

from tierwise.data.packing import TokenBlocks, pack_tokens
from tierwise.data.text import read_texts

__all__ = ["TokenBlocks", "pack_tokens", "read_texts"]
