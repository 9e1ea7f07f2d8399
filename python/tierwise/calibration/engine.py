"""What the engine and its hooks cost: the training thread per unit, and optimizer steps on the host and on the device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tierwise._core import HostBench
from tierwise.calibration.host import KERNELS
from tierwise.calibration.thread import LaunchProbe
from tierwise.calibration.timing import free

_PROBE_S = 0.08
"""Seconds of the probe before every turn of a model, and after the last."""
_ROUNDS, _STEPS, _WARM = 4, 3, 1
"""Times that every model has its turn, steps of a turn, and those of them that are not timed."""
_FEW, _MANY = 4, 16
"""Layers of the models whose difference is what a layer takes."""
_ON_CUDA, _ON_CPU = (1024, 2816, 16), (64, 128, 1)
"""(hidden, inner, heads) of the model that is launched: small, and of a size that `compute.layers` has compiled its kernels for."""
_STEPPED_ON_CUDA = (2048, 5504, 16)
"""The same of the model that is stepped: 700 MB of parameters, gradients and states per layer, more than any cache holds."""
_SEQ_ON_CUDA, _SEQ_ON_CPU = 1024, 32
"""Tokens of the one sequence of the model that is launched: on CUDA enough for the kernels and for the allocator's large blocks that
training has, and few enough for the device to wait for Python."""
_STEPPED_SEQ_ON_CUDA = 4096
"""Of a sequence of the model that is stepped: as of the layers' whose kernels are there."""
_VOCABULARY = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Trained:
    """A model whose steps are looked at."""

    layers: int
    offload_optim_frac: float
    steps: int
    sequences_on_cuda: int = 1
    vocabulary_on_cuda: int = _VOCABULARY
    recompute: str = "none"
    speculates: bool = False


_ON_HOST = _Trained(layers=8, offload_optim_frac=1.0, steps=9, sequences_on_cuda=4, vocabulary_on_cuda=6144, recompute="full")
"""Backward is long enough to hide moments that are written late, as training does where that is faster. The head has a quarter of a layer's
parameters, and says what a step takes beside its bytes. One pass and the same pass again differ by 5 % (quartiles), one gigabyte of a
virtual machine's memory and the next by as much: 6 GB are stepped nine times, rather than half of them twice as often."""
_ONE_ON_HOST = _Trained(layers=8, offload_optim_frac=1 / 8, steps=12, speculates=True)
"""What is speculated is the last layer, whose gradients come first: no others leave while it is stepped. It is speculated only if they have
landed when the training thread is through with the other layers."""
_LEAST_HEADS, _MOST_OF_A_LAYER = 6, 0.3
"""Steps of a head that say what is not their bytes', and the part of a layer's parameters that it has at most: the fewer, the more its time
is something else's."""
_FEW_BESIDE = 0.05
"""Of a pass: so much of it may run beside copies of which nothing is known here."""
_NEVER_CLIPS = 1e9
"""Limit of the norm with which nothing that was speculated is undone."""
_AROUND_S = 0.5
"""Seconds of the host's Adam before and after the engine's: as long as probes of recordings, which stand for the engine's through it."""
_LONGEST_GAP_NS = 1e6
"""Between steps of which the second waits for nothing."""
_WHOLE_BYTES, _PASS_BYTES, _UNDOABLE_BYTES = 26, 18, 38
"""Of memory traffic per parameter: of a step, of either of its two passes, and of a step with its undo record (split masters)."""


def launches(device: torch.device) -> dict[str, int]:
    """Nanoseconds in which the training thread enqueues a unit's forward and backward, with and without recomputation, and what a step
    takes beside its units: from a model so small that the device waits for Python; and those of `LaunchProbe` meanwhile. Raises ImportError
    without transformers."""
    probes: list[float] = []
    few, many, again = _step_ns(device, [(_FEW, "none"), (_MANY, "none"), (_MANY, "full")], probes)

    def line(what: str) -> tuple[float, float, float]:
        """Per layer, per recomputed layer, and beside all layers."""
        # Noise must not make what is outside the layers negative.
        slope = min((many[what] - few[what]) / (_MANY - _FEW), many[what] / _MANY)
        return slope, slope + (again[what] - many[what]) / _MANY, many[what] - _MANY * slope

    forward, backward = line("forward"), line("backward")
    return {
        "forward_ns": _positive(forward[0]),
        "backward_ns": _positive(backward[0]),
        "checkpointed_forward_ns": _positive(forward[1]),
        "checkpointed_backward_ns": _positive(backward[1]),
        "outside_forward_ns": _positive(forward[2]),
        "outside_backward_ns": _positive(backward[2]),
        "step_ns": _positive(many["step"]),
        "probe_ns": _positive(statistics.median(probes)),
    }


def _positive(ns: float) -> int:
    return max(round(ns), 1)


def _boosted(
    device: torch.device,
    layers: int,
    size: tuple[int, int, int],
    shape: tuple[int, int],
    recompute: str,
    offload_optim_frac: float = 0.0,
    speculates: bool = False,
    vocabulary: int = _VOCABULARY,
) -> tuple[Any, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin

    hidden, inner, heads = size
    sequences, tokens = shape
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        vocab_size=vocabulary, max_position_embeddings=tokens, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    # Random numbers of so many weights take the CPU longer than all that is measured here.
    with device:
        model: nn.Module = LlamaForCausalLM(config)
    # Weights in fp32 would go through the CPU, which splits them into bf16 and the rest of the master.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    cuda = device.type == "cuda"
    plugin = GeminiPlugin(
        placement_policy="static", offload_optim_frac=offload_optim_frac, offload_activations="none",
        micro_batch_size=sequences, seq_len=tokens,
        recompute=recompute,  # type: ignore[arg-type]
        device="cuda" if cuda else "emulated", device_budget="12GB" if cuda else "1GB",
        host_budget="16GB" if offload_optim_frac and cuda else "256MB", enable_all_optimization=True,
        clip_mode="speculate" if speculates else "defer", max_norm=_NEVER_CLIPS if speculates else 1.0,
    )  # fmt: skip
    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    booster.boost(model, optimizer)
    model.train()
    return booster, model, optimizer


def _step_ns(device: torch.device, models: list[tuple[int, str]], probes: list[float]) -> list[dict[str, float]]:
    """Of models with so many layers and such recomputation, which take turns, with the probe before each turn and after the last. On CUDA
    steps follow each other as in training, where the engine's threads call the driver beside the training thread."""
    cuda = device.type == "cuda"
    probe = LaunchProbe(device)
    size, tokens = (_ON_CUDA, _SEQ_ON_CUDA) if cuda else (_ON_CPU, _SEQ_ON_CPU)
    boosted = [_boosted(device, layers, size, (1, tokens), recompute) for layers, recompute in models]
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    times: list[dict[str, list[list[float]]]] = [{"forward": [], "backward": [], "step": []} for _ in boosted]
    for _ in range(_ROUNDS):
        for of, (booster, model, optimizer) in zip(times, boosted, strict=True):
            probes.append(probe.ns(_PROBE_S))
            for turns in of.values():
                turns.append([])
            for step in range(_STEPS):
                marks = [time.perf_counter()]
                loss = model(input_ids=ids, labels=ids).loss
                marks.append(time.perf_counter())
                booster.backward(loss, optimizer)
                marks.append(time.perf_counter())
                optimizer.step()
                optimizer.zero_grad()
                marks.append(time.perf_counter())
                # A forward that waits for the step before, or for its norm, is not launching.
                if cuda:
                    booster._boosted().engine.decision(wait=True)
                else:
                    booster.flush()
                if step >= _WARM:
                    for name, start, end in zip(of, marks, marks[1:], strict=False):
                        of[name][-1].append(1e9 * (end - start))
            booster.flush()
    probes.append(probe.ns(_PROBE_S))
    before = [range(which, len(probes) - 1, len(models)) for which in range(len(models))]
    return [{name: as_probed(turns, probes, places) for name, turns in of.items()} for of, places in zip(times, before, strict=True)]


def as_probed(turns: list[list[float]], probes: list[float], before: Iterable[int]) -> float:
    """What a step of some turns takes when the probe takes its median; `before` says which probe came before each turn. A shared machine's
    processors are faster in one second than in the next, so turns are compared by how many times as long as the probes around them they
    took. Of these the median counts, one may have been disturbed, and so does a turn's median step."""
    around = (statistics.mean(probes[place : place + 2]) for place in before)
    return statistics.median(statistics.median(turn) / probe for turn, probe in zip(turns, around, strict=True)) * statistics.median(probes)


@dataclasses.dataclass(frozen=True)
class Adam:
    """The optimizer step as the engine runs it; None where that was not seen."""

    device_params_per_s: float | None = None
    host_params_per_s: float | None = None
    """Whole steps; the engine takes these, or two passes."""
    host_params_first_per_s: float | None = None
    host_moments_per_s: float | None = None
    host_undoable_params_per_s: float | None = None
    """Steps that may be undone, and their records."""
    host_gap_ns: float | None = None
    """Between one chunk's step on the host and the next one's, and what each takes beside its bytes; second passes go without."""
    host_fixed_ns: float = 0.0
    """The latter of the two, which rates of steps and first passes do without."""


@dataclasses.dataclass(frozen=True)
class Beside:
    """What the host's Adam keeps of its speed while something is copied: whole steps and first passes beside copies to the device, second
    passes beside those from it."""

    whole: float = 1.0
    first: float = 1.0
    moments: float = 1.0

    @classmethod
    def of(cls, sharing: list[dict[str, Any]], apart: bool) -> Beside:
        """From what `sharing.beside` measured. A device `apart` from the CPU computes without slowing the host down: then what was measured
        beside compute is the same once more, and the mean counts, as in the simulator."""
        rows = {tuple(row["actors"]): row for row in sharing}

        def rate(figure: str, *actors: str) -> float:
            found = [rows[actors], rows[*actors, "compute"]] if apart else [rows[actors]]
            return statistics.mean(float(row[figure]) for row in found)

        def kept(copy: str, figure: str) -> float:
            # Noise may make the busy machine the faster one.
            return min(rate(figure, copy, "adam") / rate(figure, "adam"), 1.0)

        whole, first, moments = (KERNELS[kernel] for kernel in ("adam", "params_first", "moments"))
        return cls(whole=kept("h2d", whole), first=kept("h2d", first), moments=kept("d2h", moments))


class HostProbe:
    """How fast the host's Adam is alone, in parameters per second, before and after something; between two that follow each other once."""

    def __init__(self, bench: HostBench) -> None:
        self.bench = bench
        self.last: float | None = None

    def around(self, measure: Callable[[], Adam]) -> tuple[Adam, float]:
        """What was measured, and the mean of the speeds before and after it. Raises what `measure` does."""
        before = self._rate() if self.last is None else self.last
        # A failure leaves no last one behind.
        self.last = None
        found = measure()
        self.last = self._rate()
        return found, statistics.mean((before, self.last))

    def _rate(self) -> float:
        return self.bench.rate("adam", _AROUND_S)


def adam(device: torch.device, measured: dict[str, Any], probe: HostProbe, log: Callable[[str], None]) -> Adam:
    """The host's steps in the engine, from the timeline of a model that is trained with all of its states on the host: medians, taken for
    steps that nothing is copied beside with what `measured.sharing` says. They are as much faster or slower as the kernel alone was when
    `measured.host` was measured: it is measured around them too."""
    beside = Beside.of(measured["sharing"], apart=device.type == "cuda")
    return _as_when(measured["host"][-1], probe, lambda: rates(_timeline(device, _ON_HOST), beside, log))


def speculation(device: torch.device, measured: dict[str, Any], probe: HostProbe, fixed_ns: float) -> Adam:
    """The device's steps, and the host's that may be undone, in the same way: of a model that has one layer's states on the host.
    `fixed_ns` is what a step on the host takes beside its bytes."""
    return _as_when(measured["host"][-1], probe, lambda: speculated_rates(_timeline(device, _ONE_ON_HOST), fixed_ns))


def _as_when(host: dict[str, Any], probe: HostProbe, measure: Callable[[], Adam]) -> Adam:
    """What the host does, times how much faster its kernel alone was when `host` was measured than around this."""
    found, around = probe.around(measure)
    then = host["adam_params_per_s"] / around
    names = ("host_params_per_s", "host_params_first_per_s", "host_moments_per_s", "host_undoable_params_per_s")
    seen: dict[str, Any] = {name: getattr(found, name) for name in names}
    return dataclasses.replace(found, **{name: rate * then for name, rate in seen.items() if rate is not None})


def _timeline(device: torch.device, trained: _Trained) -> str:
    """Of training steps that follow each other. An engine that was flushed after every step was seen to run the host's kernels at two
    thirds of their speed."""
    cuda = device.type == "cuda"
    size, shape = (_STEPPED_ON_CUDA, (trained.sequences_on_cuda, _STEPPED_SEQ_ON_CUDA)) if cuda else (_ON_CPU, (1, _SEQ_ON_CPU))
    vocabulary = trained.vocabulary_on_cuda if cuda else _VOCABULARY
    booster, model, optimizer = _boosted(
        device, trained.layers, size, shape, trained.recompute, trained.offload_optim_frac, trained.speculates, vocabulary
    )
    for step in range(1 + trained.steps):
        if step == 1:
            booster.flush()
            booster.record_timeline()
        # New ones for every step: of tokens that are all the same a model has soon learned everything.
        ids = torch.randint(0, vocabulary, shape, device=device)
        loss = model(input_ids=ids, labels=ids).loss
        booster.backward(loss, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    booster.flush()
    timeline: str = booster._boosted().engine.timeline()
    del booster, model, optimizer, loss
    free(cuda)
    return timeline


class _Timeline:
    """Spans by track."""

    def __init__(self, timeline: str) -> None:
        self.events = json.loads(timeline)["traceEvents"]
        self.tracks = {event["tid"]: event["args"]["name"] for event in self.events if event["ph"] == "M"}

    def track(self, name: str) -> list[dict[str, Any]]:
        """All spans of a track, in the order in which they began."""
        found = [e for e in self.events if e["ph"] == "X" and self.tracks[e["tid"]] == name and e["dur"] > 0]
        return sorted(found, key=lambda e: float(e["ts"]))

    def layers(self, track: str, kind: str) -> list[dict[str, Any]]:
        """Those of layers' chunks, of one kind."""
        return [e for e in self.track(track) if "layers" in e["name"] and e["name"].startswith(kind)]


def _share_beside(span: dict[str, Any], others: list[dict[str, Any]]) -> float:
    """Of a span's time, in which one of `others`, which do not overlap each other, ran too."""
    begin, end = float(span["ts"]), float(span["ts"]) + float(span["dur"])
    common = (min(end, float(o["ts"]) + float(o["dur"])) - max(begin, float(o["ts"])) for o in others)
    return sum(max(us, 0.0) for us in common) / (end - begin)


@dataclasses.dataclass(frozen=True)
class _Alone:
    """Spans of chunks of one size, as if nothing had been copied beside them."""

    us: float
    moved: float
    """Bytes."""

    @classmethod
    def of(cls, spans: list[dict[str, Any]], kept: float = 1.0, copies: list[dict[str, Any]] | None = None) -> _Alone | None:
        """The median one; `kept` is what copies leave it of its speed. None without any."""
        if not spans:
            return None
        us = (float(span["dur"]) * (1.0 - _share_beside(span, copies or []) * (1.0 - kept)) for span in spans)
        return cls(statistics.median(us), float(spans[0]["args"]["bytes"]))

    def rate(self, bytes_each: int, fixed_us: float = 0.0) -> float:
        """Parameters per second; `fixed_us` of the time, half of it at most, go to something else."""
        return 1e6 * self.moved / bytes_each / max(self.us - fixed_us, 0.5 * self.us)

    def fixed_us(self, smaller: _Alone | None) -> float:
        """What both take beside their bytes, if the other is small enough to tell: no more than half of the time."""
        if smaller is None or smaller.moved > _MOST_OF_A_LAYER * self.moved:
            return 0.0
        fixed = (smaller.us * self.moved - self.us * smaller.moved) / (self.moved - smaller.moved)
        # Noise may make a small one faster per byte, or slower than the large one.
        return min(max(fixed, 0.0), 0.5 * self.us)


def speculated_rates(timeline: str, fixed_ns: float) -> Adam:
    """Of steps on the device, and of those that may be undone, but for what each of these takes beside its bytes. None where there were
    none."""
    spans = _Timeline(timeline).layers
    # Only beside the last of each nothing is computed.
    last = {e["name"]: e for e in spans("device optimizer", "step")}
    device, undoable = _Alone.of(list(last.values())), _Alone.of(spans("host optimizer", "speculate"))
    return Adam(
        device_params_per_s=None if device is None else device.rate(_WHOLE_BYTES),
        host_undoable_params_per_s=None if undoable is None else undoable.rate(_UNDOABLE_BYTES, fixed_ns / 1e3),
    )


def rates(timeline: str, beside: Beside, log: Callable[[str], None]) -> Adam:
    """Of steps on the host that followed each other."""
    events = _Timeline(timeline)
    to_device, from_device, norms = (events.track(name) for name in ("h2d", "d2h", "host norm"))
    steps, late = (events.layers("host optimizer", kind) for kind in ("step", "moments"))
    passes = bool(late)
    kept, bytes_each = (beside.first, _PASS_BYTES) if passes else (beside.whole, _WHOLE_BYTES)

    def apart(spans: list[dict[str, Any]], never: list[dict[str, Any]]) -> list[dict[str, Any]]:
        # Beside these copies it is slower than `beside` says, and the threads are the norms' for a while.
        return [e for e in spans if _share_beside(e, never) <= _FEW_BESIDE and _share_beside(e, norms) == 0.0]

    first, seconds = apart(steps, from_device), apart(late, to_device)
    heads = apart([e for e in events.track("host optimizer") if e["name"] == "step lm_head"], from_device)
    step, head = _Alone.of(first, kept, to_device), _Alone.of(heads if len(heads) >= _LEAST_HEADS else [], kept, to_device)
    moments = _Alone.of(seconds, beside.moments, from_device)
    fixed_us = 0.0 if step is None else step.fixed_us(head)
    rate = None if step is None else step.rate(bytes_each, fixed_us)
    log(
        f"Adam in the engine: {len(first)} {'first passes' if passes else 'whole steps'}, {len(seconds)} second passes; "
        f"{fixed_us / 1e3:.2f} ms of a step are not its bytes', from {len(heads)} of a head"
    )
    pairs = [pair for pair in itertools.pairwise(events.layers("host optimizer", "")) if all(e["name"].startswith("step") for e in pair)]
    pauses = [1e3 * (float(after["ts"]) - float(before["ts"]) - float(before["dur"])) for before, after in pairs]
    # Longer ones wait for something.
    pauses = [ns for ns in pauses if ns < _LONGEST_GAP_NS]
    gap_ns = 1e3 * fixed_us + (statistics.median(pauses) if pauses else 0.0)
    return Adam(
        host_params_per_s=None if passes else rate,
        host_params_first_per_s=rate if passes else None,
        host_moments_per_s=None if moments is None else moments.rate(_PASS_BYTES),
        host_gap_ns=max(gap_ns, 1.0) if pauses or fixed_us else None,
        host_fixed_ns=1e3 * fixed_us,
    )
