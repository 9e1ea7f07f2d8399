"""Continues the training of a pretrained language model in less memory than its states need.

Runs offline: SmolLM2-135M comes from an installed package, the text is the source of Python's standard library. Without a GPU it runs on
the emulated device, host memory with a hard budget; with one, the same script runs on CUDA. See `--help`, or `make demo`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Idle threads of torch must not spin on cores that the engine's workers can use.
os.environ.setdefault("TQDM_DISABLE", "1")  # The libraries' own progress bars while loading.

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from smollm2 import load_model, standard_library_blocks
from tierwise.booster import Booster
from tierwise.booster.plugin import GeminiPlugin
from tierwise.config import format_bytes
from tierwise.data import TokenBlocks
from tierwise.observe import (
    MemoryUse,
    MetricsLogger,
    StepMeter,
    StepReporter,
    peak_flops,
    peak_rss_bytes,
    plain_adamw_bytes,
    reset_peak_rss,
    training_flops_per_token,
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--passes", type=int, default=2, help="times that the text is read")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per pass")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="sequences per forward")
    parser.add_argument("--accumulation", type=int, default=4, help="micro-batches per optimizer step")
    parser.add_argument("--precision", choices=("bf16", "fp16", "fp32"), default="bf16", help="dtype of parameters and activations")
    parser.add_argument("--device-budget", default="600MB", help="hard limit of device memory, bytes or with a unit (MB, GiB, ...)")
    parser.add_argument("--host-budget", default=None, help="hard limit of pinned host memory; left out: 80%% of the free RAM")
    parser.add_argument("--device", choices=("auto", "cuda", "emulated"), default="auto", help="auto takes CUDA where there is one")
    parser.add_argument("--recompute", choices=("auto", "none", "full"), default="auto", help="which layers recompute their forward")
    parser.add_argument("--clip-mode", choices=("defer", "speculate", "auto"), default="defer", help="how clipping overlaps with steps")
    parser.add_argument("--max-norm", type=float, default=1.0, help="global gradient norm above which gradients are clipped")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate after the warmup")
    parser.add_argument("--warmup", type=int, default=5, help="optimizer steps until the full learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decoupled weight decay of matrices (norms have none)")
    parser.add_argument("--eval-blocks", type=int, default=8, help="held-out sequences for the loss before and after")
    parser.add_argument("--peak-flops", type=float, default=None, help="peak FLOP/s of the device for the MFU; left out: by its name")
    parser.add_argument("--seed", type=int, default=0, help="seed of the data order")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder for metrics, timeline and model")
    args = parser.parse_args(argv)
    for name in ("passes", "steps", "seq_len", "micro_batch_size", "accumulation", "warmup", "eval_blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def warmup_then_cosine(step: int, warmup: int, steps: int) -> float:
    """Factor of the learning rate: linear warmup, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay, vectors (norms) do not."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: torch.nn.Module, blocks: TokenBlocks, batch_size: int, device: torch.device) -> float:
    """Mean loss over held-out blocks, in nats per token."""
    model.eval()
    losses = []
    for batch in DataLoader(blocks, batch_size=batch_size):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        losses += [float(model(**batch).loss)] * len(batch["input_ids"])
    model.train()
    return statistics.fmean(losses)


@dataclasses.dataclass
class Run:
    """What training showed."""

    losses: list[float]
    clipped: int
    stats: dict[str, Any]


def train(args: argparse.Namespace, booster: Booster, boosted: tuple[Any, ...], meter: StepMeter, device: torch.device) -> Run:
    """The training loop: forward, backward, step; one line and one record per optimizer step."""
    model, optimizer, _, dataloader, lr_scheduler = boosted
    losses: list[float] = []
    clipped = 0
    metrics_path = args.out / "metrics.jsonl"
    metrics_path.unlink(missing_ok=True)
    steps = args.passes * args.steps
    with MetricsLogger(metrics_path) as logger, StepReporter(steps) as reporter:
        meter.start(booster.stats())
        micro_losses: list[torch.Tensor] = []
        for batch in itertools.chain.from_iterable(itertools.repeat(dataloader, args.passes)):
            if not micro_losses and len(losses) == steps - 1:
                booster.record_timeline()  # Of the last step, and of what it leaves to do.
            batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
            learning_rate = optimizer.param_groups[0]["lr"]
            loss = model(**batch).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
            micro_losses.append(loss.detach())
            if len(micro_losses) < args.accumulation:
                continue
            losses.append(float(torch.stack(micro_losses).mean()))
            micro_losses.clear()
            norm = optimizer.grad_norm
            clipped += norm is not None and norm > args.max_norm
            metrics = meter.measure(
                step=len(losses),
                loss=losses[-1],
                grad_norm=norm,
                tokens=args.accumulation * args.micro_batch_size * args.seq_len,
                stats=booster.stats(),
                learning_rate=learning_rate,
            )
            logger.log(metrics)
            reporter.update(metrics)
    return Run(losses, clipped, booster.stats())


def main(argv: list[str] | None = None) -> None:
    """Loads, boosts, trains, saves, and says what it took."""
    args = parse_args(argv)
    started = time.perf_counter()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if args.device != "emulated" and torch.cuda.is_available() else "cpu")
    libraries_bytes = peak_rss_bytes()

    model, tokenizer = load_model()
    numel = sum(p.numel() for p in model.parameters())
    layers, hidden = model.config.num_hidden_layers, model.config.hidden_size
    sequences = args.steps * args.accumulation * args.micro_batch_size
    blocks = standard_library_blocks(tokenizer, args.seq_len, args.eval_blocks + sequences, args.seed)
    held_out, text = blocks.split(args.eval_blocks)
    say("model", f"{numel / 1e6:.1f} M parameters, {layers} layers; loaded in {time.perf_counter() - started:.1f} s")
    say("data", f"{len(text):,} blocks of {args.seq_len} tokens to train on, {args.passes} times, and {len(held_out)} held out")

    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=args.lr, betas=(0.9, 0.95))
    steps = args.passes * args.steps
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_then_cosine(step, args.warmup, steps))
    order = torch.Generator().manual_seed(args.seed)
    dataloader = DataLoader(text, batch_size=args.micro_batch_size, shuffle=True, drop_last=True, generator=order)

    plugin = GeminiPlugin(
        precision=args.precision,
        device=args.device,
        device_budget=args.device_budget,
        host_budget=args.host_budget,
        max_norm=args.max_norm,
        clip_mode=args.clip_mode,
        gradient_accumulation_steps=args.accumulation,
        micro_batch_size=args.micro_batch_size,
        seq_len=args.seq_len,
        recompute=args.recompute,
    )
    booster = Booster(plugin=plugin)
    boosted = booster.boost(model, optimizer, None, dataloader, lr_scheduler)
    say("plan", booster.explain().replace("\n", "\n" + " " * 10))

    rss_was_reset = reset_peak_rss()
    loss_before = evaluate(model, held_out, args.micro_batch_size, device)
    say("held out", f"loss {loss_before:.4f} before training")
    peak = args.peak_flops
    if peak is None and device.type == "cuda":
        peak = peak_flops(torch.cuda.get_device_name())
    meter = StepMeter(flops_per_token=training_flops_per_token(numel, layers, hidden, args.seq_len), peak_flops=peak)
    run = train(args, booster, boosted, meter, device)
    process_bytes = peak_rss_bytes()
    booster.timeline(args.out / "timeline.json")
    loss_after = evaluate(model, held_out, args.micro_batch_size, device)
    booster.save_model(model, args.out / "model", shard=True, use_safetensors=True)
    tokenizer.save_pretrained(args.out / "model")
    saved: Any = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype="auto")
    loss_saved = evaluate(saved.to(device), held_out, args.micro_batch_size, device)

    use = MemoryUse.of(run.stats)
    activations = "" if use.activation_peak_bytes is None else f"; saved activations {format_bytes(use.activation_peak_bytes)} at most"
    since = "since boosting" if rss_was_reset else "loading included"
    print()
    first, last = statistics.fmean(run.losses[: args.steps]), statistics.fmean(run.losses[-args.steps :])
    say("loss", f"{first:.4f} (mean of the first pass over the text) -> {last:.4f} (of the last)")
    say("clipped", f"{run.clipped} of {len(run.losses)} steps")
    say("held out", f"loss {loss_before:.4f} -> {loss_after:.4f}; the saved model, read back by transformers: {loss_saved:.4f}")
    say("device", f"peak {format_bytes(use.device_peak_bytes)} of a budget of {format_bytes(use.device_budget_bytes)}{activations}")
    say("host", f"peak {format_bytes(use.host_peak_bytes)} pinned")
    inside = ", the emulated device in it" if device.type == "cpu" else ""
    say("process", f"peak {format_bytes(process_bytes)} resident {since}{inside}; libraries alone take {format_bytes(libraries_bytes)}")
    say("AdamW", f"plain would need {format_bytes(plain_adamw_bytes(numel))} on the device (16 bytes per parameter) plus all activations")
    say("wrote", f"{args.out}/metrics.jsonl, {args.out}/timeline.json (for https://ui.perfetto.dev), {args.out}/model/")
    say("took", f"{time.perf_counter() - started:.0f} s")
    if not all(math.isfinite(loss) for loss in run.losses):
        sys.exit("a loss was not finite")


def say(what: str, text: str) -> None:
    """One line of the report."""
    print(f"{what:<9} {text}", flush=True)


if __name__ == "__main__":
    main()
