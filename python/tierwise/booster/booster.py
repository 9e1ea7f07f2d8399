"""`Booster`: the five lines that a training script changes."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tierwise.booster.explain import explain
from tierwise.booster.plugin.base import Plugin
from tierwise.booster.plugin.gemini import GeminiPlugin
from tierwise.checkpoint import model as model_checkpoint
from tierwise.checkpoint import optimizer as optimizer_checkpoint
from tierwise.gemini import lr
from tierwise.gemini.inputs import map_tensors
from tierwise.gemini.micro_batch import batch_rows
from tierwise.gemini.optimizer import GeminiOptimizer
from tierwise.gemini.runtime import Runtime, find_runtime, runtime_of

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

_Criterion = TypeVar("_Criterion")
_Loader = TypeVar("_Loader")
_Path = str | os.PathLike[str]


class Booster:
    """Boosts a model, its optimizer and its scheduler, and runs backward, checkpoints and reports for them.

    One booster serves one model.
    """

    def __init__(self, plugin: Plugin | None = None) -> None:
        self.plugin = GeminiPlugin() if plugin is None else plugin
        if not isinstance(self.plugin, Plugin):
            raise ValueError(f"plugin must be a tierwise plugin, got {type(plugin).__name__}")
        self._runtime: Runtime | None = None
        self._optimizer: Optimizer | None = None
        self._lr_scheduler: Any = None

    def boost(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        criterion: _Criterion | None = None,
        dataloader: _Loader | None = None,
        lr_scheduler: LRScheduler | None = None,
    ) -> tuple[nn.Module, Optimizer | None, _Criterion | None, _Loader | None, LRScheduler | None]:
        """Converts model, optimizer and LR scheduler in place and returns all five.

        Parameters are cast to the plugin's precision (fp32 values become the exact fp32 master), buffers are left alone. Where the
        plugin or the dataloader says the shape of a micro-batch the plan is made here, else at the first forward.

        Raises ValueError for what cannot be boosted, BudgetError with two settings that fit if the budgets cannot work.
        """
        if self._runtime is not None:
            raise ValueError("this booster has boosted a model already; use one Booster per model")
        self._runtime = self.plugin.configure(model, optimizer, dataloader)  # type: ignore[arg-type]
        self._optimizer, self._lr_scheduler = optimizer, lr_scheduler
        if lr_scheduler is not None:
            lr.convert(lr_scheduler, self._runtime)
        return model, optimizer, criterion, dataloader, lr_scheduler

    def _boosted(self) -> Runtime:
        if self._runtime is None:
            raise ValueError("call booster.boost(model, optimizer, ...) first")
        return self._runtime

    # ---- training -----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, optimizer: Optimizer | None = None, retain_graph: bool = False) -> None:
        """Backward of one micro-batch. Divides the loss by `gradient_accumulation_steps` and applies the fp16 loss scale.

        Raises TierwiseError if called more often than `gradient_accumulation_steps` without `optimizer.step()`.
        """
        runtime = self._boosted() if optimizer is None else runtime_of(optimizer, "optimizer")
        runtime.backward(loss, retain_graph)

    def train_step(self, batch: Any) -> Tensor:
        """One optimizer step on `batch`: forward and backward of its micro-batches, then optimizer, scheduler and `zero_grad`.

        `batch`: a mapping of keyword arguments, or positional ones, whose tensors share their first dimension; it is split into
        `gradient_accumulation_steps` parts of equal size (and `micro_batch_size` rows, where that is given; with "auto" the first batch
        decides, and later ones have as many rows). With `labels`, parts count by their tokens that are not ignored, so the result equals
        the mean over the whole batch. Returns that loss, detached.

        Raises ValueError if the batch cannot be split so, or the model returns no loss.
        """
        runtime = self._boosted()
        if not isinstance(self._optimizer, GeminiOptimizer):
            raise ValueError("train_step needs the optimizer that was boosted with the model")
        if runtime.micro_done:
            raise ValueError("train_step in the middle of an accumulation; finish it with booster.backward and optimizer.step()")
        parts = self._split(batch, runtime)
        shares = _shares(parts)
        total: Tensor | None = None
        for index, part in enumerate(parts):
            output = runtime.model(**part) if isinstance(part, Mapping) else runtime.model(*part)
            loss = _loss_of(output)
            if shares is not None:
                loss = loss * shares[index].to(loss.device)
            total = loss.detach() if total is None else total + loss.detach()
            self.backward(loss, self._optimizer)  # Divides by the number of parts.
            del output, loss
        self._optimizer.step()
        if self._lr_scheduler is not None:
            self._lr_scheduler.step()
        self._optimizer.zero_grad()
        assert total is not None
        return total / len(parts)

    def _split(self, batch: Any, runtime: Runtime) -> list[Any]:
        if isinstance(batch, Tensor):
            batch = (batch,)
        if not isinstance(batch, (Mapping, tuple, list)):
            raise ValueError(f"batch must be a mapping, a tuple or a tensor, got {type(batch).__name__}")
        batch = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
        total = batch_rows(batch)
        if runtime.undecided:
            args, kwargs = ((), batch) if isinstance(batch, dict) else (batch, {})
            runtime.decide_micro_batch(args, kwargs, total)
        count, size = runtime.accumulation, runtime.micro_batch_size
        if total % count or (size is not None and total != size * count):
            wanted = f"{size} x {count} = {size * count}" if size is not None else f"a multiple of {count}"
            asks = "the first batch, by which micro_batch_size='auto' was decided, asks" if runtime.choice else ""
            raise ValueError(f"train_step got {total} rows; {asks or 'micro_batch_size and gradient_accumulation_steps ask'} for {wanted}")
        size = total // count

        def part(start: int) -> Any:
            return map_tensors(batch, lambda t: t[start : start + size] if t.dim() > 0 else t)

        return [part(start) for start in range(0, total, size)]

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module | None = None, optimizer: Optimizer | None = None) -> Iterator[None]:
        """Does nothing on one device: accumulation without communication is what `gradient_accumulation_steps` does."""
        yield

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def save_model(
        self,
        model: nn.Module,
        checkpoint: _Path,
        shard: bool = True,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
        use_safetensors: bool = True,
    ) -> None:
        """Writes a Hugging Face checkpoint (a folder, or one file with `shard=False`); `size_per_shard` in MB.

        Killed at any instant, the folder loads as the old checkpoint or as the new one. Raises ValueError for `use_safetensors=False`
        (pickles are not written) and `gather_dtensor=False` (there is one device).
        """
        if not use_safetensors:
            raise ValueError("use_safetensors=False would write a pickle; only safetensors are written")
        if not gather_dtensor:
            raise ValueError("gather_dtensor=False needs several devices; on one there is nothing to leave distributed")
        _check_shard_size(size_per_shard)
        model_checkpoint.save_model(model, checkpoint, shard=shard, prefix=prefix, size_per_shard=size_per_shard)

    def load_model(self, model: nn.Module, checkpoint: _Path, strict: bool = True) -> nn.Module:
        """Loads a safetensors file or folder, before or after boosting, also into a `lazy_init` model."""
        model_checkpoint.load_model(model, checkpoint, strict=strict)
        return model

    def save_optimizer(
        self,
        optimizer: Optimizer,
        checkpoint: _Path,
        shard: bool = True,
        gather_dtensor: bool = True,
        prefix: str | None = None,
        size_per_shard: int = 1024,
    ) -> None:
        """Writes moments, fp32 masters, step counts, param_groups and the loss scale: all that an exact resume needs beside the model."""
        _check_shard_size(size_per_shard)
        optimizer_checkpoint.save_optimizer(_gemini(optimizer), checkpoint, shard=shard, prefix=prefix, size_per_shard=size_per_shard)

    def load_optimizer(self, optimizer: Optimizer, checkpoint: _Path, prefix: str | None = None) -> None:
        """Continues from `save_optimizer`; sets the parameters too, where it has their masters."""
        optimizer_checkpoint.load_optimizer(_gemini(optimizer), checkpoint, prefix)

    def save_lr_scheduler(self, lr_scheduler: Any, checkpoint: _Path) -> None:
        """Writes the scheduler's state as JSON."""
        optimizer_checkpoint.save_lr_scheduler(lr_scheduler, checkpoint)

    def load_lr_scheduler(self, lr_scheduler: Any, checkpoint: _Path) -> None:
        """Continues from `save_lr_scheduler`."""
        optimizer_checkpoint.load_lr_scheduler(lr_scheduler, checkpoint)

    # ---- reports ------------------------------------------------------------------------------------------------

    def explain(self) -> str:
        """What the plan chose and what bounds the step, for people."""
        return explain(self._boosted())

    def plan(self) -> dict[str, Any]:
        """What the plan chose, as data: placement per chunk, recomputed units, micro-batches, bytes per tier, predicted seconds.

        Raises ValueError before the plan is made, which without shapes is at the first forward.
        """
        runtime = self._boosted()
        if not runtime.ready:
            raise ValueError("not planned yet: the plan is made at the first forward, for its shapes")
        return copy.deepcopy(runtime.memory.plan)

    def stats(self) -> dict[str, Any]:
        """Counters: bytes and peaks per tier, fetches, steps, clips, nanoseconds that compute waited, FLOPs of a micro-batch."""
        return self._boosted().stats()

    def record_timeline(self, enabled: bool = True) -> None:
        """Starts (dropping what was recorded) or stops recording spans."""
        self._boosted().engine.record_timeline(enabled)

    def timeline(self, path: _Path) -> None:
        """Writes what was recorded as a trace that Perfetto opens (https://ui.perfetto.dev)."""
        runtime = self._boosted()
        runtime.flush()
        Path(path).write_text(runtime.engine.timeline(), encoding="utf-8")

    def flush(self) -> None:
        """Waits until weights and optimizer states equal those of a synchronous optimizer."""
        self._boosted().flush()


def _gemini(optimizer: Optimizer) -> GeminiOptimizer:
    if not isinstance(optimizer, GeminiOptimizer) or find_runtime(optimizer) is None:
        raise ValueError("this optimizer was not boosted; pass it to booster.boost first")
    return optimizer


def _check_shard_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size_per_shard must be at least 1 MB, got {size}")


def _loss_of(output: Any) -> Tensor:
    loss = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if loss is None and isinstance(output, Mapping):
        loss = output.get("loss")
    if loss is None and isinstance(output, tuple) and output:
        loss = output[0]
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise ValueError("train_step needs a model that returns a scalar loss (pass labels to a Hugging Face model)")
    return loss


def _shares(parts: list[Any]) -> Tensor | None:
    """Weights of the parts in the batch's loss, relative to an equal share: by target tokens where there are labels; None if all are equal.

    They stay on the labels' device: reading them here would wait for everything that it has to do.
    """
    labels = [part.get("labels") if isinstance(part, Mapping) else None for part in parts]
    if len(parts) == 1 or any(not isinstance(label, Tensor) or label.dim() < 2 or label.is_floating_point() for label in labels):
        return None
    counts = torch.stack([(label[..., 1:] != -100).sum() for label in labels if isinstance(label, Tensor)]).double()
    total = counts.sum()
    return torch.where(total > 0, counts * len(parts) / total.clamp(min=1), 1.0).float()
