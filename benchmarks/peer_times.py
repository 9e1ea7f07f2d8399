"""Times what other systems' code takes on the host, without a GPU: their hooks on the training thread, and memory that is fresh every time.

    python benchmarks/peer_times.py [plain|zero2|zero3|fsdp2 ...]

A Hugging Face LLaMA with as many modules as LLaMA 1.35B (24 layers of 13 modules) and tensors so small that Python is all that takes time
is trained on the CPU on one rank, with every layer checkpointed, once as it is and once inside each system. Thresholds that count elements
are scaled with the tensors, so that the same parameters are prefetched, released and kept as in the large model. Prints one JSON object
per system: milliseconds of the processor per layer in a forward pass and in a backward pass with its recomputation, medians over the
steps, and the medians of what they are above `plain`, each step against the plain step beside it in time. The last object is of a
conversion to bf16 into fresh memory, in GB/s of that memory: taking it from the system, with all threads, and giving it back, with one.
Needs transformers, and DeepSpeed for zero2 and zero3.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before torch starts its threads: what is measured runs on one, and DeepSpeed would look for a GPU.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.update(MASTER_ADDR="127.0.0.1", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
os.environ.setdefault("MASTER_PORT", "29513")

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS = 24
HIDDEN = 64
#: Elements of the large model's tensors per element here.
SCALE = (2048 // HIDDEN) ** 2

Step = Callable[[], tuple[float, float]]


def build() -> Any:
    """The small model, in bf16, its layers checkpointed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=172,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    return model


def timed(forward: Callable[[], Any], backward: Callable[[Any], None], after: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the processor in a forward and in a backward pass: both run on this thread, and others on the machine do not count."""
    start = time.thread_time()
    loss = forward()
    middle = time.thread_time()
    backward(loss)
    end = time.thread_time()
    after()
    return middle - start, end - middle


def plain(tokens: torch.Tensor) -> Step:
    """The model alone."""
    model = build()

    def after() -> None:
        model.zero_grad(set_to_none=True)

    return lambda: timed(lambda: model(input_ids=tokens, labels=tokens).loss, lambda loss: loss.backward(), after)


def fsdp2(tokens: torch.Tensor) -> Step:
    """torch's `fully_shard`, layer by layer."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = build().float()
    mesh = init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)

    def after() -> None:
        model.zero_grad(set_to_none=True)

    return lambda: timed(lambda: model(input_ids=tokens, labels=tokens).loss, lambda loss: loss.backward(), after)


def deepspeed(stage: int) -> Callable[[torch.Tensor], Step]:
    """DeepSpeed's ZeRO of a stage."""

    def make(tokens: torch.Tensor) -> Step:
        import deepspeed as ds

        model = build()
        zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": int(5e8 / SCALE)}
        if stage == 3:
            zero |= {
                "stage3_prefetch_bucket_size": int(5e7 / SCALE),
                "stage3_max_live_parameters": int(1e9 / SCALE),
                "stage3_max_reuse_distance": int(1e9 / SCALE),
                # Between the norms' elements and the smallest matrix's, as in the large model.
                "stage3_param_persistence_threshold": 10 * HIDDEN,
            }
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
        engine, *_ = ds.initialize(model=model, optimizer=optimizer, config=settings)
        return lambda: timed(lambda: engine(input_ids=tokens, labels=tokens).loss, engine.backward, engine.step)

    return make


SYSTEMS: dict[str, Callable[[torch.Tensor], Step]] = {"plain": plain, "fsdp2": fsdp2, "zero2": deepspeed(2), "zero3": deepspeed(3)}


def fresh_memory(numel: int = 400_000_000, repeats: int = 5) -> dict[str, float]:
    """GB/s of memory that is taken from the system, beside the conversion that touches it, and given back."""
    source, warm = torch.zeros(numel), torch.zeros(numel, dtype=torch.bfloat16)
    taken, given = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        warm.copy_(source)
        converted = time.perf_counter()
        fresh = source.to(torch.bfloat16)
        made = time.perf_counter()
        del fresh
        given.append(time.perf_counter() - made)
        taken.append((made - converted) - (converted - start))
    bytes_each = 2 * numel
    return {
        "taken_gb_per_s": round(bytes_each / statistics.median(taken) / 1e9, 2),
        "given_back_gb_per_s": round(bytes_each / statistics.median(given) / 1e9, 2),
    }


def main() -> None:
    """Steps of every system take turns, so that a busy moment of the machine slows all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("systems", nargs="*", default=list(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=5)
    args = parser.parse_args()
    if unknown := set(args.systems) - set(SYSTEMS):
        parser.error(f"unknown {', '.join(sorted(unknown))}; known are {', '.join(SYSTEMS)}")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokens = torch.randint(0, 128, (1, 16))
    names = ["plain", *(name for name in args.systems if name != "plain")]
    steps = {name: SYSTEMS[name](tokens) for name in names}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(args.warm_up + args.steps):
        for name, step in steps.items():
            seconds = step()
            if number >= args.warm_up:
                times[name].append(seconds)
    for name in names:
        row: dict[str, Any] = {"system": name}
        for at, what in enumerate(("forward", "backward")):
            own = [seconds[at] for seconds in times[name]]
            above = [mine[at] - base[at] for mine, base in zip(times[name], times["plain"], strict=True)]
            row[f"{what}_ms_per_layer"] = round(statistics.median(own) / LAYERS * 1e3, 3)
            row[f"{what}_above_plain_ms_per_layer"] = round(statistics.median(above) / LAYERS * 1e3, 3)
        print(json.dumps(row), flush=True)
    torch.set_num_threads(os.cpu_count() or 1)
    print(json.dumps(fresh_memory()), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
