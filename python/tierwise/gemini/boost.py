"""Boosting: groups the model, converts the optimizer, and prepares the runtime as early as the shapes are known."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from tierwise.gemini import root
from tierwise.gemini.chunking import Unit, group
from tierwise.gemini.compiled import LayerCompiler, refuse_cuda_graphs
from tierwise.gemini.hyper import Hyper, check_optimizer
from tierwise.gemini.inputs import map_tensors
from tierwise.gemini.materialize import Materializer
from tierwise.gemini.micro_batch import batch_rows
from tierwise.gemini.model import install_state_dict_hooks
from tierwise.gemini.optimizer import convert
from tierwise.gemini.runtime import Runtime, find_runtime
from tierwise.kernels.fused import fuse_activations, fuse_normalization
from tierwise.kernels.fused_loss import FusedLoss

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin


def boost(plugin: GeminiPlugin, model: nn.Module, optimizer: Optimizer | None, dataloader: Iterable[Any] | None) -> Runtime:
    """Converts `model` and `optimizer` in place.

    Raises ValueError for a model or optimizer that cannot be boosted, BudgetError if no plan fits the budgets. Warns of parameters that
    require gradients and are in no optimizer.
    """
    if find_runtime(model) is not None:
        raise ValueError("this model is boosted already")
    if "_tierwise_failed" in model.__dict__:
        raise ValueError("an earlier booster.boost of this model failed and left its hooks in it; build the model and its optimizer again")
    refuse_cuda_graphs(model)
    hyper = None
    held: list[nn.Parameter] = []
    if optimizer is not None:
        check_optimizer(optimizer)
        held = [param for group_ in optimizer.param_groups for param in group_["params"]]
    trained = {param for param in held if param.requires_grad}
    grouping = group(model, trained)
    trainable = {param: place for param, place in grouping.place.items() if param in trained}
    if optimizer is not None:
        strangers = [param for param in held if param not in grouping.place]
        if strangers:
            raise ValueError(
                f"the optimizer holds {len(strangers)} parameters that the model does not have (the first has shape "
                f"{tuple(strangers[0].shape)}); build the optimizer from this model's parameters()"
            )
        hyper = Hyper(optimizer, isinstance(optimizer, torch.optim.AdamW))
        left_out = [names[0] for param, names in grouping.names.items() if param.requires_grad and param not in trained]
        if left_out:
            warnings.warn(
                f"{len(left_out)} parameters require gradients, but the optimizer does not hold them (the first is {left_out[0]!r}): their "
                "gradients are computed and kept on the device, outside every budget; call requires_grad_(False) on what is not trained",
                stacklevel=4,
            )
    # Before the model is changed: there may be nothing to compile.
    compiler = LayerCompiler(grouping.units) if plugin.compile_layers else None
    fused = FusedLoss.install(model) if plugin.fused_loss else None
    if fused is not None:
        chunk, _ = grouping.place[fused.weight]
        grouping.units.append(Unit("loss", fused.module, [chunk], False, [fused.weight]))
    if plugin.enable_fused_normalization or plugin.enable_all_optimization:
        fuse_normalization(model)
    if plugin.enable_jit_fused or plugin.enable_all_optimization:
        fuse_activations(model)
    runtime = Runtime(plugin, model, grouping, trainable, hyper, Materializer(model, grouping), fused, compiler)
    root.install(runtime)
    install_state_dict_hooks(runtime)
    model.__dict__["_tierwise_runtime"] = runtime
    try:
        if runtime.undecided:
            whole = _batch_inputs(model, _first_batch(dataloader))
            if whole is not None:
                runtime.decide_micro_batch(*whole, batch_rows(whole[1]))
        inputs = None if runtime.undecided else example_inputs(runtime.micro_batch_size, plugin.seq_len, model, dataloader)
        if inputs is not None:
            runtime.prepare(*inputs)
    except BaseException:
        del model.__dict__["_tierwise_runtime"]
        model.__dict__["_tierwise_failed"] = True
        raise
    if optimizer is not None:
        convert(optimizer, runtime)
    return runtime


def _batch_inputs(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """A batch as the model's forward takes it, if it is a mapping."""
    if not isinstance(batch, Mapping):
        return None
    known = _forward_parameters(model)
    return (), {key: value for key, value in batch.items() if known is None or key in known}


def example_inputs(
    micro_batch_size: int | None, seq_len: int | None, model: nn.Module, dataloader: Iterable[Any] | None
) -> tuple[tuple[Any, ...], Mapping[str, Any]] | None:
    """Inputs whose shapes the first plan is made for, or None if nothing says them before the first forward.

    A map-style dataset of the dataloader is asked for one batch (its sampler and random state stay untouched); else
    `micro_batch_size` and `seq_len` describe a language model's `input_ids` and `labels`.
    """
    batch = _first_batch(dataloader)
    inputs = _batch_inputs(model, batch)
    if inputs is not None:
        return (), {key: _shaped(value, micro_batch_size, seq_len, batch) for key, value in inputs[1].items()}
    if micro_batch_size is None or seq_len is None:
        return None
    known = _forward_parameters(model)
    shape = (micro_batch_size, seq_len)
    ids = torch.zeros(shape, dtype=torch.long)
    if known is not None and "input_ids" in known:
        return (), {"input_ids": ids, "labels": ids} if "labels" in known else {"input_ids": ids}
    return (ids,), {}


def _forward_parameters(model: nn.Module) -> set[str] | None:
    """Names that `forward` takes; None if it takes any."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "input_ids" not in parameters:
        return None
    return set(parameters)


def _first_batch(dataloader: Iterable[Any] | None) -> Any:
    dataset = getattr(dataloader, "dataset", None)
    collate = getattr(dataloader, "collate_fn", None)
    size = getattr(dataloader, "batch_size", None)
    if dataset is None or collate is None or not size or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    count = min(size, len(dataset))
    with torch.random.fork_rng(devices=[]):
        return collate([dataset[index] for index in range(count)]) if count else None


def _shaped(value: Any, micro_batch_size: int | None, seq_len: int | None, batch: Mapping[str, Any]) -> Any:
    """Cuts or repeats the batch dimension to the micro-batch, and the sequence to `seq_len`, where they are given."""
    rows = next((v.shape[0] for v in batch.values() if isinstance(v, torch.Tensor) and v.dim() > 0), None)
    ids = batch.get("input_ids")
    length = ids.shape[1] if isinstance(ids, torch.Tensor) and ids.dim() == 2 else None

    def shape(tensor: torch.Tensor) -> torch.Tensor:
        size = list(tensor.shape)
        if micro_batch_size is not None and size and size[0] == rows:
            size[0] = micro_batch_size
        if seq_len is not None and len(size) > 1 and size[1] == length:
            size[1] = seq_len
        return tensor.new_empty(size)

    return map_tensors(value, shape)
