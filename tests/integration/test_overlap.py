"""What overlaps with what, by the order of spans: gradients leave in backward, the host steps in the order of the next forward, and what it
stepped is back before it is read. Layers and links are slowed down until the order does not depend on the machine."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.support.timelines import Tracks, record, slow_down

LAYERS = 5
STATIC_HOST = {"placement_policy": "static", "offload_optim_frac": 1.0, "precision": "fp32"}
ORDER = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(LAYERS)), "model.norm", "lm_head"]
"""Chunks in the order of the forward."""
SLOW = 2e6
"""Bytes per second: a layer's parameters take some 50 ms."""


def run(kit: Any, path: Path, seconds: float, steps: int = 2, vocab_size: int = 128, **options: Any) -> Tracks:
    """Timeline of `steps` steps after one that is not recorded."""
    model = kit.llama(layers=LAYERS, vocab_size=vocab_size)
    slow_down(model.model.layers, seconds)
    booster, model, optimizer = kit.boosted(model, **{**STATIC_HOST, **options})
    return record(booster, model, optimizer, kit.batches(1 + steps), path / "timeline.json")


def test_gradients_leave_during_backward(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.02, steps=1)
    sent = tracks.of("d2h", "gradients model.layers.")
    assert [span.name for span in sent] == [f"gradients model.layers.{layer}" for layer in reversed(range(LAYERS))]
    for layer in range(1, LAYERS):
        leaving = tracks.first("d2h", f"gradients model.layers.{layer}")
        own, next_ = (tracks.first("compute", f"model.layers.{at} backward") for at in (layer, layer - 1))
        # Not before they are there, and out while the layer before computes: nothing waits for the end.
        assert own.start <= leaving.start
        assert leaving.end <= next_.end
    assert not tracks.maybe("compute wait", "model.layers")


def test_a_slow_link_holds_gradients_in_their_order(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.0, steps=1, d2h_bytes_per_second=SLOW)
    sent = tracks.of("d2h", "gradients ")
    assert all(before.end <= after.start for before, after in itertools.pairwise(sent))
    assert all(span.end - span.start >= span.nbytes / SLOW * 1e6 for span in sent)
    # The plan bounds what is on its way: backward is over only when most has left.
    backward = tracks.of("compute")[-1]
    assert sum(span.end <= backward.end for span in sent) >= len(sent) - 4
    # Exact clipping: no step before the last gradient.
    assert min(span.start for span in tracks.of("host optimizer", "step ")) >= max(span.end for span in sent)


@pytest.mark.parametrize("param_frac", [0.0, 1.0], ids=["resident", "streamed"])
def test_the_host_steps_in_the_order_of_the_next_forward(kit: Any, tmp_path: Path, param_frac: float) -> None:
    tracks = run(kit, tmp_path, seconds=0.02, offload_param_frac=param_frac)
    steps = tracks.of("host optimizer", "step ")
    names = [span.name.removeprefix("step ") for span in steps]
    assert names == ORDER * 2
    assert all(before.end <= after.start for before, after in itertools.pairwise(steps))


def test_new_parameters_are_back_before_their_layer_and_not_all_before_the_first(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.0, h2d_bytes_per_second=SLOW)
    back = tracks.of("h2d", "refresh model.layers.")[:LAYERS]
    assert [span.name for span in back] == [f"refresh model.layers.{layer}" for layer in range(LAYERS)]
    forward = [tracks.last("compute", f"model.layers.{layer} forward") for layer in range(LAYERS)]
    for layer in range(LAYERS):
        step = tracks.first("host optimizer", f"step model.layers.{layer}")
        assert step.end <= back[layer].start
        assert back[layer].end <= forward[layer].start, "a layer read what was not there"
        if layer:
            # The forward of one layer overlaps with the parameters of the next on their way.
            assert forward[layer - 1].start < back[layer].end
            # The layer waited for its own parameters, until they came.
            wait = next(span for span in tracks.of("compute wait", f"model.layers.{layer}") if span.end >= back[layer].end)
            assert wait.start < back[layer].end <= wait.end <= forward[layer].start + 1


def test_a_fast_link_and_a_fast_host_are_not_waited_for(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.03)
    # The first layers may wait for the step; behind them 30 ms hide a step and a copy of some 100 KB.
    late = [span.name for span in tracks.maybe("compute wait") if span.name in {f"model.layers.{layer}" for layer in range(2, LAYERS)}]
    assert not late
    for layer in range(2, LAYERS):
        forward = tracks.last("compute", f"model.layers.{layer} forward")
        assert tracks.first("h2d", f"refresh model.layers.{layer}").end <= forward.start
        assert tracks.first("host optimizer", f"step model.layers.{layer}").end <= forward.start


def test_speculation_steps_during_backward(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.02, steps=1, clip_mode="speculate", max_norm=1e6)
    backward = tracks.first("compute", "model.layers.0 backward")
    for layer in range(2, LAYERS):
        span = tracks.first("host optimizer", f"speculate model.layers.{layer}")
        assert tracks.first("d2h", f"gradients model.layers.{layer}").end <= span.start < span.end
        assert span.end <= backward.end, "with 20 ms a layer, those before the last are stepped in backward"


def test_what_is_undone_is_seen(kit: Any, tmp_path: Path) -> None:
    tracks = run(kit, tmp_path, seconds=0.02, steps=1, clip_mode="speculate", max_norm=1.5)
    for span in tracks.of("host optimizer", "undo "):
        step = tracks.first("host optimizer", span.name.replace("undo", "speculate"))
        assert step.end <= span.start < span.end
        # Of an fp32 parameter 12 bytes are read and written to undo what a step of 28 overwrote, which wrote them down.
        assert span.nbytes * (28 + 12) == step.nbytes * 24


def test_streamed_layers_come_while_the_one_before_computes(kit: Any, tmp_path: Path) -> None:
    # An embedding as large as a layer: any two of them fill the slab, and nothing between them is lost.
    tracks = run(kit, tmp_path, seconds=0.02, steps=1, offload_param_frac=1.0, vocab_size=482)
    for layer in range(1, LAYERS):
        fetches = [span for span in tracks.of("h2d", f"fetch model.layers.{layer}") if span.name == f"fetch model.layers.{layer}"]
        forward, before = (tracks.first("compute", f"model.layers.{at} forward") for at in (layer, layer - 1))
        arrived = [span for span in fetches if span.end <= forward.start]
        assert arrived, f"layer {layer} was not fetched ahead"
        assert arrived[-1].start < before.end
    assert not tracks.maybe("h2d", "demand fetch")


def test_states_visit_the_device_beside_the_steps_of_the_cpu(kit: Any, tmp_path: Path) -> None:
    """A slow link carries states both ways at once while the CPU steps its own chunks; new parameters do not wait behind all states."""
    tracks = run(kit, tmp_path, seconds=0.0, stream_optim_frac=0.6, h2d_bytes_per_second=SLOW, d2h_bytes_per_second=SLOW)
    decided = max(span.end for span in tracks.of("d2h", "gradients ") if span.end <= tracks.of("states in")[0].end)
    names = [span.name.removeprefix("states ") for span in tracks.of("states in")]
    visiting = names[: len(names) // 2]
    assert names == visiting * 2
    assert visiting == [name for name in ORDER if name in visiting], "in the order of the next forward"
    on_cpu = [name for name in ORDER if name not in visiting]
    assert len(visiting) > 2
    assert len(on_cpu) > 2
    inside, out = ({name: tracks.first(f"states {way}", f"states {name}") for name in visiting} for way in ("in", "out"))
    stepped = {name: tracks.first("device optimizer", f"step {name}") for name in visiting}
    for name in visiting:
        assert decided <= inside[name].start
        assert inside[name].end <= stepped[name].start
        assert stepped[name].end <= out[name].start
    # Both directions at once, and the CPU at the same time.
    large = [name for name in visiting if name != "model.norm"]
    for name, after in itertools.pairwise(large):
        assert inside[after].start < out[name].end
        assert out[name].start < inside[after].end
    steps = [tracks.first("host optimizer", f"step {name}") for name in on_cpu]
    assert max(span.end for span in steps) < inside[large[1]].end, "the CPU waited for states"
    # The refreshed parameters shared the link with the states, instead of coming after them.
    back = [tracks.first("h2d", f"refresh {name}") for name in on_cpu]
    assert back[1].end < inside[large[-1]].end
    # What a layer reads is there before.
    for name in visiting:
        if name.startswith("model.layers"):
            assert stepped[name].end <= tracks.last("compute", f"{name} forward").start
    # Two queues have the speed of one link.
    window = [
        span for track in ("h2d", "states in") for span in tracks.of(track) if span.start >= decided and span.end <= out[visiting[-1]].end
    ]
    seconds = (max(span.end for span in window) - min(span.start for span in window)) / 1e6
    assert sum(span.nbytes for span in window) <= seconds * SLOW * 1.001
