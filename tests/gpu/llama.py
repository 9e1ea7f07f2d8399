"""A LLaMA small enough for many runs, and its batches, on CUDA."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tierwise.booster import Booster
from tierwise.booster.plugin import GeminiPlugin

ROWS, SEQ, VOCAB = 2, 128, 512


def small_llama(layers: int = 4) -> Any:
    """A LLaMA of hidden size 256 with fixed weights, on the CPU."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=VOCAB,
            use_cache=False,
        )
    )


def ids_of(step: int) -> Any:
    """The token ids of a step."""
    return torch.randint(0, VOCAB, (ROWS, SEQ), generator=torch.Generator().manual_seed(step)).cuda()


def boosted(model: Any, **options: Any) -> tuple[Any, Any, Any]:
    """(booster, model, optimizer)."""
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-3)
    booster = Booster(plugin=GeminiPlugin(micro_batch_size=ROWS, seq_len=SEQ, **options))
    model, optimizer, *_ = booster.boost(model, optimizer)
    return booster, model, optimizer
