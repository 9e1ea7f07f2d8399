"""A tiny LLaMA, and a training loop that gives everything a test may want to compare."""

from __future__ import annotations

import dataclasses
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

from tierwise import BudgetError
from tierwise.booster import Booster
from tierwise.booster.plugin import GeminiPlugin

BATCH, SEQ, VOCAB = 2, 16, 128

# Tiny tensors: a second thread only waits, and badly so on a busy machine.
torch.set_num_threads(1)


def llama(layers: int = 3, tied: bool = False, seed: int = 0, **config: Any) -> Any:
    """A LLaMA of hidden size 64 in training mode."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        **config,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).train()


def batches(count: int, rows: int = BATCH, seq: int = SEQ, seed: int = 1) -> list[Any]:
    """Token batches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (rows, seq), generator=generator) for _ in range(count)]


@dataclasses.dataclass
class Result:
    """What training gave."""

    losses: list[float]
    weights: dict[str, Any]
    norms: list[float]
    booster: Any
    model: Any
    optimizer: Any

    def same_as(self, other: Result) -> None:
        """Bits are equal."""
        assert self.losses == other.losses
        assert self.norms == other.norms
        assert self.weights.keys() == other.weights.keys()
        for name, weight in self.weights.items():
            assert torch.equal(weight, other.weights[name]), name


def plugin(**options: Any) -> GeminiPlugin:
    """A plugin for the emulated device with budgets that hold everything."""
    defaults = {
        "device": "emulated",
        "device_budget": "256MiB",
        "host_budget": "256MiB",
        "reserve": 0,
        "micro_batch_size": BATCH,
        "seq_len": SEQ,
        "num_threads": 1,
    }
    if "nvme_path" in options:
        # Plans should not depend on how busy the disk is.
        defaults |= {"nvme_read_bytes_per_second": 2.5e9, "nvme_write_bytes_per_second": 2e9}
    return GeminiPlugin(**{**defaults, **options})


def boosted(model: Any, lr: float = 3e-3, weight_decay: float = 0.1, **options: Any) -> tuple[Any, Any, Any]:
    """(booster, model, optimizer)."""
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    booster = Booster(plugin(**options))
    model, optimizer, *_ = booster.boost(model, optimizer)
    return booster, model, optimizer


def train(model: Any, steps: int = 20, synchronous: bool = False, rows: int = BATCH, seq: int = SEQ, **options: Any) -> Result:
    """Trains a causal LM; `synchronous` flushes after every step."""
    booster, model, optimizer = boosted(model, **{"micro_batch_size": rows, "seq_len": seq, **options})
    accumulation = booster.plugin.gradient_accumulation_steps
    losses: list[float] = []
    norms: list[float] = []
    data = iter(batches(steps * accumulation, rows, seq))
    for _ in range(steps):
        for _ in range(accumulation):
            ids = next(data)
            loss = model(input_ids=ids, labels=ids).loss
            losses.append(loss.item())
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        if synchronous:
            booster.flush()
            norms.append(optimizer.grad_norm)
    if not synchronous:
        norms = []
    weights = dict(model.state_dict())
    if booster.plugin.precision != "fp32":
        booster.flush()
        for name, param in model.named_parameters():
            weights[f"{name}.master"] = optimizer.read_state(param)["master"]
    return Result(losses, weights, norms, booster, model, optimizer)


def steps(booster: Any, model: Any, optimizer: Any, data: list[Any], scheduler: Any = None) -> list[float]:
    """A causal LM's losses over these batches, each of which is a micro-batch; a learning rate scheduler steps after each."""
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return losses


def fit(model: Any, loss_of: Callable[[Any, int], Any], steps: int = 6, **options: Any) -> Result:
    """Trains any module; `loss_of(model, step)` gives the loss. The plan is made at the first forward."""
    booster, model, optimizer = boosted(model, **{"precision": "fp32", "micro_batch_size": None, "seq_len": None, **options})
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        losses.append(loss.item())
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    return Result(losses, dict(model.state_dict()), [], booster, model, optimizer)


def plain_fit(model: Any, loss_of: Callable[[Any, int], Any], steps: int = 6, lr: float = 3e-3, weight_decay: float = 0.1) -> Result:
    """The same with plain torch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    losses = []
    for step in range(steps):
        loss = loss_of(model, step)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Result(losses, dict(model.state_dict()), [], None, model, optimizer)


def tightest(make_model: Callable[[], Any], **options: Any) -> int:
    """The smallest device budget that the planner names for this model."""
    with pytest.raises(BudgetError) as caught:
        boosted(make_model(), **{**options, "device_budget": 1})
    assert caught.value.tier == "device"
    return int(caught.value.needed_bytes)


@pytest.fixture(autouse=True)
def _free_engines() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def kit() -> Any:
    """The helpers of this file (tests are imported by path, so they cannot import it)."""
    functions = (Result, llama, batches, plugin, boosted, train, steps, fit, plain_fit, tightest)
    return types.SimpleNamespace(BATCH=BATCH, SEQ=SEQ, VOCAB=VOCAB, **{function.__name__: function for function in functions})
