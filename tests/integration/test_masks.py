"""A causal model without positions in its call needs no mask: none is planned for, and nothing looks at values to find that out."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import masking_utils

from tierwise.kernels import masks
from tierwise.kernels.masks import without_packing

SEQ = 256


def step(kit: Any, **inputs: Any) -> Any:
    booster, model, optimizer = kit.boosted(
        kit.llama(), precision="fp32", micro_batch_size=2, seq_len=SEQ, gradient_accumulation_steps=1, recompute="none"
    )
    ids = torch.randint(0, kit.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    loss = model(input_ids=ids, labels=ids, **inputs).loss
    booster.backward(loss, optimizer)
    optimizer.step()
    return booster, loss.detach()


def looks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Results of the search for packed sequences from now on."""
    found: list[Any] = []
    search = masking_utils.find_packed_sequence_indices
    search = getattr(search, "_tierwise_original", search)

    def spy(positions: torch.Tensor) -> Any:
        found.append(search(positions))
        return found[-1]

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", spy)
    return found


def test_no_mask_is_planned_and_no_value_is_read(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = looks(monkeypatch)
    booster, _ = step(kit)
    assert not found
    stats = booster.stats()
    assert stats["planned_activation_bytes"] == stats["activation_peak_bytes"]


def test_packed_sequences_are_found_and_kept_apart(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, whole = step(kit)
    found = looks(monkeypatch)
    positions = torch.arange(SEQ // 2).repeat(2).expand(2, SEQ)
    _, packed = step(kit, position_ids=positions)
    assert any(isinstance(value, torch.Tensor) for value in found)
    plain = kit.llama().train()
    ids = torch.randint(0, kit.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    expected = plain(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
    assert packed.item() == pytest.approx(expected.item(), rel=1e-5)
    assert packed.item() != pytest.approx(whole.item(), rel=1e-5)


class Wrapper(torch.nn.Module):
    """Hands a batch on as it is: nobody sees from outside whether it has positions."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        return self.lm(**batch, use_cache=False).loss


def test_positions_that_a_wrapper_hands_on_are_heeded(kit: Any) -> None:
    positions = torch.arange(SEQ // 2).repeat(2).expand(2, SEQ)
    ids = torch.randint(0, kit.VOCAB, (2, SEQ), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    expected = Wrapper(kit.llama())(batch)
    _, model, _ = kit.boosted(Wrapper(kit.llama()), precision="fp32", micro_batch_size=None, seq_len=None)
    assert model(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_spared_model_is_not_kept(kit: Any) -> None:
    model = kit.llama()
    # As an interrupted forward leaves it: what is open is held by the model's own hooks.
    model.__dict__["open"] = interrupted = without_packing(model, (), {})
    interrupted.__enter__()
    assert len(masks._SPARED) == 1
    gone = weakref.ref(model)
    del model, interrupted
    gc.collect()
    assert gone() is None
    assert not masks._SPARED


def test_only_the_forward_itself_is_spared(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = kit.llama(), kit.llama()
    ids = kit.batches(1, seq=SEQ)[0]
    found = looks(monkeypatch)

    def searches(which: Any, **inputs: Any) -> int:
        before = len(found)
        which(input_ids=ids, use_cache=False, **inputs)
        return len(found) - before

    assert searches(model) == 1
    # As an interrupted forward leaves it: open, while others run.
    with without_packing(model, (), {"input_ids": ids}):
        assert searches(model) == 0
        assert searches(other) == 1
    assert searches(model) == 1
    with without_packing(model, (), {"input_ids": ids, "position_ids": torch.arange(SEQ)[None]}):
        assert searches(model) == 1
    with without_packing(Wrapper(model), (), {"input_ids": ids}):
        assert searches(model) == 1
