"""The rows of `offload.py`: how each system builds the model and takes a step."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from llama import fields, llama

LR, BETAS, DECAY = 1e-5, (0.9, 0.95), 0.1

Row = tuple[Any, Callable[[], float], int]
"""The model, a step that gives the loss, and how many layers are recomputed."""


def build(a: argparse.Namespace, device: str, lazy: bool = False) -> Any:
    return llama(fields(a.size, a.seq), device, lazy)


def liger(model_kernels: bool, loss: bool) -> bool:
    """Puts liger's kernels into transformers' LLaMA where it is installed."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError:
        return False
    apply_liger_kernel_to_llama(
        rope=model_kernels, swiglu=model_kernels, rms_norm=model_kernels, cross_entropy=False, fused_linear_cross_entropy=loss
    )
    return True


def checkpoint_layers(model: Any, a: argparse.Namespace) -> int:
    """Wraps layers for recomputation, compiled if that is asked for; gives how many are recomputed."""
    import torch
    from torch.utils.checkpoint import checkpoint

    layers = model.model.layers
    count = {"full": len(layers), "auto": len(layers), "none": 0}.get(a.recompute)
    count = len(layers) - int(a.recompute) if count is None else count
    for layer in layers if a.compile and not a.row.startswith("ds") else ():
        layer.forward = torch.compile(layer.forward)
    for layer in layers[:count]:
        layer.forward = (lambda f: lambda *x, **k: checkpoint(f, *x, use_reentrant=False, **k))(layer.forward)
    return int(count)


CACHED_NUMEL = 50_000_000
"""Parameters of a layer, 100 MB in bf16, that no device's cache holds."""


def numel_of(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def share_weights(layers: Any) -> None:
    """Every layer gets parameters of its own (so gradients of its own) in the memory of the first layer's."""
    import torch

    for layer in layers[1:]:
        for module, first in zip(layer.modules(), layers[0].modules(), strict=True):
            for name, param in first._parameters.items():
                module._parameters[name] = None if param is None else torch.nn.Parameter(param.detach())


def row_floor(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    model = build(a, "cuda")
    extra["numel"] = sum(p.numel() for p in model.parameters())
    recomputed = checkpoint_layers(model, a)
    model.train()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> float:
        for _ in range(accumulation):
            loss = model(**batch).loss
            loss.backward()
        return float(loss)

    return model, step, recomputed


def row_floor_ours(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    """Our kernels on resident parameters, and nothing else: no engine, no chunks, no optimizer. All layers read the first layer's weights,
    so that the floor of a plan that streams them fits, unless a layer is so small that a cache would hold it. Recomputed layers keep all
    that they make again until their backward is over."""
    from torch.autograd.graph import saved_tensors_hooks

    from tierwise.kernels.fused import attention_backends, fuse_activations, fuse_normalization
    from tierwise.kernels.fused_loss import FusedLoss
    from tierwise.kernels.masks import without_packing
    from tierwise.kernels.rematerialize import Rematerialized, recipe_of

    model = build(a, "cuda")
    extra["numel"] = sum(p.numel() for p in model.parameters())
    if numel_of(model.model.layers[0]) > CACHED_NUMEL:
        share_weights(model.model.layers)
    fused = FusedLoss.install(model)
    assert fused is not None
    fuse_normalization(model)
    fuse_activations(model)
    recomputed = checkpoint_layers(model, a)
    model.train()
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def pack(tensor: Any) -> Any:
        recipe = recipe_of(tensor)
        return tensor.detach() if recipe is None else Rematerialized.of(tensor, recipe)

    def unpack(packed: Any) -> Any:
        return packed.tensor() if isinstance(packed, Rematerialized) else packed

    def forward() -> Any:
        with contextlib.ExitStack() as stack:
            stack.enter_context(without_packing(model, (), batch))
            stack.enter_context(fused.active((), batch, training=True))
            if a.rematerialize:
                stack.enter_context(saved_tensors_hooks(pack, unpack))
            return model(**batch, use_cache=False).loss

    def step() -> float:
        # Backward recomputes layers with the same attention.
        with attention_backends(a.attention == "cudnn"):
            for _ in range(accumulation):
                loss = forward()
                loss.backward()
        return float(loss)

    return model, step, recomputed


def row_gpu(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    import torch

    model = build(a, "cuda")
    extra["numel"] = sum(p.numel() for p in model.parameters())
    recomputed = checkpoint_layers(model, a)
    model.train()
    params = list(model.parameters())
    masters = [p.detach().float() for p in params]
    optimizer = torch.optim.AdamW(masters, lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

    def step() -> float:
        for _ in range(accumulation):
            loss = model(**batch).loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(params, a.max_norm)
        for master, p in zip(masters, params, strict=True):
            master.grad = p.grad.float()
            p.grad = None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_copy_([p.data for p in params], masters)
        return float(loss) * accumulation

    return model, step, recomputed


def row_ours(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    import torch

    from tierwise.booster import Booster
    from tierwise.booster.plugin import GeminiPlugin

    lazy = a.size in ("7b", "13b")
    model = build(a, "cuda", lazy=lazy)
    extra["numel"] = sum(p.numel() for p in model.parameters())
    placement: dict[str, Any] = {}
    if a.row == "ours-all":
        placement = {"placement_policy": "static", "offload_optim_frac": 0.0}
    elif a.row == "ours-host":
        placement = {"placement_policy": "static", "offload_optim_frac": 1.0}
    plugin = GeminiPlugin(
        precision="bf16",
        max_norm=a.max_norm,
        clip_mode=a.clip_mode,
        device_budget=a.device_budget,
        host_budget=a.host_budget,
        reserve=a.reserve,
        gradient_accumulation_steps=accumulation,
        accumulate_dtype=a.accumulate_dtype,
        micro_batch_size="auto" if a.planned else a.micro_batch,
        seq_len=a.seq,
        enable_flash_attention=a.attention == "cudnn",
        enable_fused_normalization=True,
        enable_jit_fused=True,
        compile_layers=a.compile,
        recompute=a.recompute if a.recompute in ("full", "none", "auto") else "auto",
        **placement,
    )
    booster = Booster(plugin=plugin)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
    model, optimizer, *_ = booster.boost(model, optimizer)
    model.train()
    losses: list[Any] = []

    def step() -> float:
        if a.trace and len(losses) == a.steps - 2:
            booster.record_timeline()  # The last two steps; a shorter record would lack the host steps that the second hides.
        if a.planned:
            losses.append(booster.train_step(batch))
            return 0.0
        for _ in range(accumulation):
            loss = model(**batch).loss
            booster.backward(loss, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        return 0.0

    def finish() -> dict[str, Any]:
        print(booster.explain(), file=sys.stderr)
        stats = booster.stats()
        plan = booster.plan()
        result_plan = {"micro_batches": plan["accumulation"], "predicted_s": round(plan["predicted_step_s"], 3)}
        recomputed = stats["recomputed_units"]
        result = {k: stats[k] for k in ("fetches", "demand_fetches", "steps", "clipped", "speculated", "undone", "h2d_bytes", "d2h_bytes")}
        result.update(result_plan, recomputed=recomputed)
        result["wait_ms_per_step"] = round(stats["wait_ns"] / 1e6 / a.steps, 1)
        result["host_slab_gb"] = round(stats["host_peak_bytes"] / 1e9, 1)
        result["losses"] = [round(float(x), 4) for x in losses[:20]]
        if a.trace:
            booster.timeline(a.trace)
        return result

    extra["finish"] = finish
    return model, step, 0


def row_deepspeed(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    import deepspeed

    model = build(a, "cuda")
    extra["numel"] = sum(p.numel() for p in model.parameters())
    recomputed = checkpoint_layers(model, a)
    model.train()
    offload: dict[str, Any] = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"overlap_comm": True, "contiguous_gradients": True, "offload_optimizer": offload}
    if a.row == "ds2":
        zero["stage"] = 2
    else:
        zero.update(stage=3, sub_group_size=200_000_000)
        if a.row == "ds3":
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
        else:
            offload["ratio"] = 0.6
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": a.micro_batch,
            "gradient_accumulation_steps": accumulation,
            "bf16": {"enabled": True},
            "zero_optimization": zero,
            "optimizer": {"type": "AdamW", "params": {"lr": LR, "betas": list(BETAS), "weight_decay": DECAY}},
            "gradient_clipping": a.max_norm,
            "steps_per_print": 10**9,
        },
    )

    def step() -> float:
        for _ in range(accumulation):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
        return float(loss)

    return model, step, recomputed


def row_fsdp2(a: argparse.Namespace, batch: dict[str, Any], accumulation: int, extra: dict[str, Any]) -> Row:
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    dist.init_process_group("cuda:nccl,cpu:gloo")
    model = build(a, "cuda")
    extra["numel"] = sum(p.numel() for p in model.parameters())
    recomputed = checkpoint_layers(model, a)
    model.to("cpu").float().train()
    options: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=True),
    }
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    for buffer in model.buffers():
        buffer.data = buffer.data.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=True)

    def step() -> float:
        for _ in range(accumulation):
            loss = model(**batch).loss / accumulation
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), a.max_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss) * accumulation

    return model, step, recomputed


ROWS: dict[str, Callable[[argparse.Namespace, dict[str, Any], int, dict[str, Any]], Row]] = {
    "floor": row_floor,
    "floor-ours": row_floor_ours,
    "gpu": row_gpu,
    "ours": row_ours,
    "ours-all": row_ours,
    "ours-host": row_ours,
    "ds2": row_deepspeed,
    "ds3": row_deepspeed,
    "ds3tf": row_deepspeed,
    "fsdp2": row_fsdp2,
}
