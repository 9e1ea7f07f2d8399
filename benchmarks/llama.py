"""The LLaMAs that are measured: sizes, configuration, random weights."""

from __future__ import annotations

from typing import Any

SIZES = {  # hidden, intermediate, layers, heads
    "tiny": (64, 160, 3, 4),
    "350m": (1024, 2816, 24, 16),
    "1b": (2048, 5504, 24, 16),
    "2b": (3072, 8192, 16, 24),
    "3b": (3200, 8640, 26, 32),
    "7b-8-layers": (4096, 11008, 8, 32),
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
}


def fields(size: str, seq: int, vocab: int = 32000) -> dict[str, int]:
    """Fields of the config.json of a size; `seq` is the most tokens of a sequence."""
    hidden, inner, layers, heads = SIZES[size]
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": seq,
    }


def llama(config: dict[str, int], device: str, lazy: bool = False) -> Any:
    """A Hugging Face LLaMA in bf16 with random weights, on `device` or not yet anywhere."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tierwise

    made = LlamaConfig(**config, use_cache=False, attn_implementation="sdpa")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with tierwise.lazy_init() if lazy else torch.device(device):
            return LlamaForCausalLM(made)
    finally:
        torch.set_default_dtype(torch.float32)
