"""Between training steps: evaluation, generation, forked workers."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

import tierwise
from tests.support.traps import STREAMED, VISITING


def test_eval_in_the_middle_and_other_sequence_lengths(kit: Any) -> None:
    def run(**options: Any) -> tuple[list[float], Any]:
        booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", max_norm=0.5, **options)
        seen = []
        for step, ids in enumerate(kit.batches(6)):
            ids = ids[:, : 16 - 3 * (step % 3)]
            loss = model(input_ids=ids, labels=ids).loss
            seen.append(loss.item())
            booster.backward(loss, optimizer)
            if step == 3:
                # Before the step is committed: the weights are still the old ones.
                model.eval()
                with torch.no_grad():
                    seen.append(model(input_ids=ids).logits.float().sum().item())
                model.train()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen.append(model(input_ids=ids, labels=ids).loss.item())
                assert model(input_ids=ids, labels=ids).logits is not None
            model.train()
        return seen, booster

    expected, _ = run()
    for options in (STREAMED, VISITING, {**STREAMED, "clip_mode": "speculate"}):
        seen, booster = run(**options)
        assert seen == expected
        assert booster.stats()["off_trace"] > 0, "eval passes are not in the trace, and are counted"


def test_generate_while_streamed(kit: Any) -> None:
    expected = kit.llama().eval()
    ids = kit.batches(1)[0][:, :4]
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = expected.generate(ids, **settings)
    _, model, _ = kit.boosted(kit.llama(), precision="fp32", **STREAMED)
    model.eval()
    assert torch.equal(model.generate(ids, **settings), want)


def _in_child(queue: Any, booster: Any) -> None:
    try:
        booster._runtime.engine.flush()
    except tierwise.TierwiseError as error:
        queue.put(str(error))
    else:
        queue.put("no error")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_are_harmless(kit: Any) -> None:
    booster, model, optimizer = kit.boosted(kit.llama(), precision="bf16", **STREAMED)
    context = multiprocessing.get_context("fork")
    rows: Any = [ids[0] for ids in kit.batches(4)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, num_workers=1, multiprocessing_context=context)
    for ids in loader:
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(queue, booster))
    child.start()
    message = queue.get(timeout=30)
    child.join(30)
    assert child.exitcode == 0
    assert "process" in message
    booster.flush()
