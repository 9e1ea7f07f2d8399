"""From the inputs of a micro-batch to the plan of a step: traces the model, plans every way to run the trace, keeps the fastest."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tierwise._core import BudgetError, Layout
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.model_trace import ModelTrace
from tierwise.gemini.planning import Planned, executed_seconds, make_plan, pick, request
from tierwise.gemini.recompute import checkpoints_itself, recomputes_whole
from tierwise.gemini.target import DTYPES, Target
from tierwise.gemini.tracing import FusedLossMismatchError
from tierwise.gemini.tracing import trace as trace_model
from tierwise.kernels import linear_cross_entropy
from tierwise.kernels.fused import attention_backends

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin
    from tierwise.kernels.fused_loss import FusedLoss


@dataclasses.dataclass
class PlanSearch:
    """What plans of one model's steps depend on. Changes nothing in the model."""

    plugin: GeminiPlugin
    model: nn.Module
    grouping: Grouping
    layout: Layout
    target: Target
    fused: FusedLoss | None
    fused_attention: bool
    tracing: bool = False
    """Whether a trace is being made: hooks of the model have nothing to do then."""

    def trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelTrace:
        """Traces the model for these inputs, which give shapes and dtypes only."""
        self.tracing = True
        try:
            trace = self._trace(args, kwargs)
        finally:
            self.tracing = False
        return trace.recomputed_whole([self.plugin.compile_layers or recomputes_whole(unit.module) for unit in self.grouping.units])

    def _trace(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelTrace:
        device, dtype = self.target.torch_device, DTYPES[self.plugin.precision]
        with contextlib.ExitStack() as stack:
            # Kernels of attention differ in what they save.
            stack.enter_context(attention_backends(self.fused_attention))
            if self.fused is not None:
                stack.enter_context(self.fused.active(args, kwargs, training=True))
            try:
                return trace_model(self.model, self.grouping, args, kwargs, dtype, device)
            except FusedLossMismatchError:
                assert self.fused is not None
                self.fused.refuse()
        with attention_backends(self.fused_attention):
            return trace_model(self.model, self.grouping, args, kwargs, dtype, device)

    def variants(self, trace: ModelTrace) -> list[ModelTrace]:
        """The trace with everything kept, and where it has any, with outputs of cheap kernels made again in backward."""
        if trace.parts > 1:
            return [trace]
        if not self.plugin.rematerialize or not trace.cheap_bytes or self.plugin.offload_activations == "full":
            return [trace]
        speeds = self.target.speeds(self.plugin, trace.tokens)
        return [trace, trace.rematerialized(speeds.flops / speeds.device_memory_bytes)]

    def why_not_by_rows(self, trace: ModelTrace) -> str | None:
        """Why layers cannot take the rows part by part; None if they can."""
        return trace.why_not_by_rows(self.grouping, self._checkpointing())

    def layer_by_layer(self, trace: ModelTrace, rows: int) -> ModelTrace:
        """The trace with layers that take `rows` rows at a time. Raises ValueError if they cannot."""
        reason = self.why_not_by_rows(trace)
        if reason is not None:
            raise ValueError(f"layer_batch_size={rows} cannot be used: {reason}; leave it out")
        return trace.layer_by_layer(self.grouping, rows)

    def offloads(self) -> list[str]:
        """How activations may be offloaded, in the order in which plans are looked for.

        On CUDA only where nothing else fits: copies of activations were seen to slow the CPU's optimizer more than they saved on an H100.
        """
        asked = self.plugin.offload_activations
        return ["none", "auto"] if asked == "auto" and not self.target.emulated else [asked]

    def best(self, trace: ModelTrace, accumulation: int) -> tuple[ModelTrace, Planned]:
        """The fastest plan of a trace's variants for so many micro-batches, with its variant. Raises BudgetError if none fits."""
        refused: BudgetError | None = None
        for offload in self.offloads():
            found: list[tuple[ModelTrace, Planned]] = []
            for variant in self.variants(trace):
                wanted = self.request(variant, accumulation, offload)
                try:
                    found.append((variant, make_plan(self.plugin, self.layout, self.grouping, variant, wanted)))
                except BudgetError as error:
                    refused = error
            if len(found) == 1:
                return found[0]
            if found:
                plans = [planned for _, planned in found]
                return found[pick(plans, [executed_seconds(planned, self.layout) for planned in plans])]
        assert refused is not None
        raise refused

    def request(self, trace: ModelTrace, accumulation: int, offload: str) -> dict[str, Any]:
        """The core's `PlanRequest` for a step of so many micro-batches like the traced one, activations offloaded as in `offloads`."""
        recompute: object = "full" if trace.parts > 1 else self.plugin.recompute
        own = self._checkpointing()
        if any(own):
            # The model recomputes these itself: the plan has to count with it.
            by_trace = [own[unit] or recompute == "full" for unit in trace.order]
            recompute = {"units": [r and self.grouping.units[u].recomputable for r, u in zip(by_trace, trace.order, strict=True)]}
        device_budget = self.target.device_budget(self.plugin)
        speeds, host_budget = self.target.speeds(self.plugin, trace.tokens // trace.parts), self.target.host_budget(self.plugin)
        unseen = self.temporary_bytes(trace) + self.target.fragmentation_bytes(device_budget)
        return request(self.plugin, speeds, accumulation, device_budget, host_budget, recompute, offload, unseen)

    def temporary_bytes(self, trace: ModelTrace) -> int:
        """Device bytes beside everything traced; the emulated device counts only what is traced."""
        if self.target.emulated:
            return 0
        loss = 0
        if self.fused is not None and self.fused.enabled:
            loss = linear_cross_entropy.temporary_bytes(self.fused.weight.shape, self.target.torch_device)
        return max(trace.temporary_bytes(), loss)

    def _checkpointing(self) -> list[bool]:
        """Per unit: whether the model recomputes it itself."""
        return [checkpoints_itself(unit.module) for unit in self.grouping.units]
