"""The runtime of one boosted model: owns the engine, swaps `Parameter.data`, and runs backward and the optimizer step."""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tierwise._core import BudgetError, Engine, EngineStoppedError, Layout, TierwiseError
from tierwise.config import format_bytes
from tierwise.gemini import correction
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.compiled import LayerCompiler
from tierwise.gemini.gradients import Gradients
from tierwise.gemini.hooks import UnitHooks
from tierwise.gemini.hyper import Hyper
from tierwise.gemini.materialize import Materializer
from tierwise.gemini.memory import ChunkMemory
from tierwise.gemini.micro_batch import Choice, choose
from tierwise.gemini.model_trace import ModelTrace
from tierwise.gemini.offload import ActivationOffload
from tierwise.gemini.planning import Planned
from tierwise.gemini.recompute import wrap
from tierwise.gemini.saved_tensors import ActivationCounter, SavedTensors
from tierwise.gemini.scaler import LossScaler
from tierwise.gemini.search import PlanSearch
from tierwise.gemini.target import DTYPES, Target
from tierwise.kernels.fused import attention_backends

if TYPE_CHECKING:
    from tierwise.booster.plugin.gemini import GeminiPlugin
    from tierwise.kernels.fused_loss import FusedLoss


class Runtime:
    """Drives one model. Built by `boost`; `ready` once the plan is made and memory is filled."""

    engine: Engine
    memory: ChunkMemory
    gradients: Gradients
    saved: SavedTensors
    planned: Planned
    trace: ModelTrace

    def __init__(
        self,
        plugin: GeminiPlugin,
        model: nn.Module,
        grouping: Grouping,
        trainable: dict[nn.Parameter, tuple[int, int]],
        hyper: Hyper | None,
        materializer: Materializer,
        fused: FusedLoss | None,
        compiler: LayerCompiler | None = None,
    ) -> None:
        self.plugin = plugin
        self.model = model
        self.grouping = grouping
        self.trainable = trainable
        self.hyper = hyper
        self.materializer = materializer
        self.fused = fused
        self.compiler = compiler
        self.target = Target.choose(plugin)
        self.dtype = DTYPES[plugin.precision]
        self.fused_attention = not self.target.emulated and (plugin.enable_flash_attention or plugin.enable_all_optimization)
        self.ready = False
        self.lent = False
        """Inside `full_parameters`: every parameter is real, hooks have nothing to do."""
        self.counter: ActivationCounter | None = None
        self.unit_ids: list[int] = []
        self.recompute: list[bool] = [False] * len(grouping.units)
        self.accumulation = plugin.gradient_accumulation_steps
        """Micro-batches per optimizer step."""
        self.micro_batch_size = None if plugin.micro_batch_size == "auto" else plugin.micro_batch_size
        """Rows of a micro-batch, where they are known."""
        self.layer_rows = plugin.layer_batch_size
        """Rows that a recomputed layer takes at a time; None: all."""
        self.choice: Choice | None = None
        self.micro_done = 0
        self.steps = 0
        self.micro_tokens = 0
        self.micro_rows = 1
        self._views: dict[tuple[int, int], list[Tensor]] = {}
        self._absent: dict[int, list[Tensor]] = {}
        self.layout = Layout(
            plugin.precision,
            [
                (chunk.name, [(name, p.numel(), p in trainable) for name, p in zip(chunk.names, chunk.params, strict=True)])
                for chunk in grouping.chunks
            ],
            sums=plugin.accumulate_dtype,
        )
        self.search = PlanSearch(plugin, model, grouping, self.layout, self.target, fused, self.fused_attention)
        self.scaler: LossScaler | None = None
        if plugin.precision == "fp16":
            self.scaler = LossScaler(
                plugin.initial_scale,
                plugin.min_scale,
                plugin.max_scale,
                plugin.growth_factor,
                plugin.backoff_factor,
                plugin.growth_interval,
            )
        self.hooks = UnitHooks(self)
        for index, unit in enumerate(grouping.units):
            if unit.recomputable:
                wrap(self, index, unit.module)

    # ---- preparation --------------------------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Traces the model for these inputs, plans, takes memory and fills it. Inputs give shapes and dtypes only."""
        if self.undecided:
            raise ValueError(
                "micro_batch_size='auto' is decided by the first batch of booster.train_step, or by the dataloader that booster.boost "
                "gets; use one of them before calling the model, or give micro_batch_size a number"
            )
        trace = self.search.trace(args, kwargs)
        if self.layer_rows is not None:
            trace = self.search.layer_by_layer(trace, self.layer_rows)
        self.trace, self.planned = self.search.best(trace, self.accumulation)
        self._build()

    @property
    def undecided(self) -> bool:
        """Whether the size of micro-batches is still to be chosen."""
        return self.plugin.micro_batch_size == "auto" and self.choice is None

    def decide_micro_batch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: int) -> None:
        """Chooses the micro-batch size for steps like this one. Raises BudgetError if none fits."""
        self.choice = choose(self.search, (args, kwargs), rows)
        self.micro_batch_size, self.accumulation = self.choice.rows, self.choice.accumulation
        self.layer_rows = self.choice.layer_rows

    def _build(self) -> None:
        plan = self.planned.plan
        self.unit_ids = [0] * len(self.grouping.units)
        for position, unit in enumerate(self.trace.order):
            self.unit_ids[unit] = position
            self.recompute[unit] = plan["activations"][position] == "recompute"
        self.engine = Engine(
            self.layout,
            self.planned.trace_json,
            self.planned.plan_json,
            self.target.core,
            device_budget=self.planned.device_budget,
            host_budget=self.planned.host_budget,
            max_norm=self.plugin.max_norm,
            threads=self.plugin.num_threads,
            nvme_path=self.plugin.nvme_path,
            nvme_budget=0 if self.planned.wanted["nvme"] is None else self.planned.wanted["nvme"]["budget"],
        )
        # The limit goes with the model; at exit there is nobody left to whom it matters.
        lift = self.target.limit(self.planned.device_budget if self.plugin.device_budget is not None else None)
        weakref.finalize(self, lift).atexit = False
        self.memory = ChunkMemory(self.engine, self.layout, self.grouping, plan, self.target)
        offloaded = {unit: at for at, unit in enumerate(self.trace.order) if plan["activations"][at] == "offload"}
        if self.target.emulated or offloaded:
            # On CUDA the counter must not hold on to the runtime for a limit that the allocator keeps.
            self.counter = ActivationCounter(self.account if self.target.emulated else _uncounted)
            self.counter.excluded = {tensor.untyped_storage().data_ptr() for tensor in self.memory.resident.values()}
        self.saved = SavedTensors(self.engine, self.target, self.memory.slab, self.counter)
        self.saved.rematerialize = any(unit.extra_flops for unit in self.trace.units)
        if self.compiler is not None:
            self.compiler.thrifty = self.saved.rematerialize
        if offloaded and self.counter is not None:
            lasting = {buffer.untyped_storage()._cdata for buffer in self.model.buffers()}
            self.saved.offload = ActivationOffload(self.engine, self.target, self.counter, offloaded, plan["offload_window_bytes"], lasting)
        streamed = [chunk for chunk in range(self.layout.num_chunks) if chunk not in self.memory.resident]
        self.saved.set_sizes({chunk: self.layout.param_bytes(chunk) for chunk in streamed})
        self.gradients = Gradients(self.engine, self.grouping, self.trainable, self._shared_chunks(), self.target, self.account)
        self._fill()
        self.hooks.watch_parameters()
        # Whatever order the collector frees things in, and at exit: the engine comes to rest before the memory that it copies goes.
        weakref.finalize(self, _rest, self.engine)
        self.engine.start()
        self.memory.started = True
        self.ready = True
        self._send_hyper()

    def _shared_chunks(self) -> set[int]:
        """Chunks that several units read: their gradients may arrive in parts until the end of backward."""
        readers: dict[int, int] = {}
        for unit in self.grouping.units:
            if self.fused is not None and self.fused.enabled and unit.module is self.fused.head:
                continue  # Under the fused loss the head passes its input on, and the loss reads the weight.
            for chunk in unit.chunks:
                readers[chunk] = readers.get(chunk, 0) + 1
        return {chunk for chunk, count in readers.items() if count > 1}

    def _fill(self) -> None:
        steps = [0] * sum(len(chunk.params) for chunk in self.grouping.chunks)
        for index, chunk in enumerate(self.grouping.chunks):
            indices = self.layout.param_indices(index)
            for position, value in enumerate(self.materializer.values(chunk, self.target.torch_device)):
                param = chunk.params[position]
                self.memory.write_param(index, position, value, param in self.trainable)
                if self.hyper is not None and param in self.trainable:
                    steps[indices[position]] = self.hyper.carry_over(param, self.memory, index, position)
            if index in self.memory.resident:
                views = self.memory.views(self.memory.resident[index], index)
            else:
                views = self._absent[index] = [self._nan(param) for param in chunk.params]
            for param, view in zip(chunk.params, views, strict=True):
                self.materializer.set_data(param, view)
                param.grad = None
        self.materializer.finish(self.target.torch_device, self.dtype)
        self.target.synchronize()
        self.target.reset_peak()
        self.engine.set_param_steps(steps)

    def _nan(self, param: nn.Parameter) -> Tensor:
        """A streamed-out parameter: one NaN expanded to the full shape, so a stray read is loud."""
        return torch.full((), float("nan"), dtype=self.dtype, device=self.target.torch_device).expand(param.shape)

    # ---- what hooks call ----------------------------------------------------------------------------------------

    def map_chunks(self, chunks: Iterable[tuple[int, int]] | None) -> None:
        """Points parameters of streamed chunks at their slots."""
        for chunk, slot in chunks or ():
            if self.saved.mapped.get(chunk) == slot:
                continue
            views = self._views.get((chunk, slot))
            if views is None:
                views = self._views[chunk, slot] = self.memory.slot_views(chunk, slot)
            for param, view in zip(self.grouping.chunks[chunk].params, views, strict=True):
                param.data = view
            self.saved.mapped[chunk] = slot

    def unmap_chunks(self, chunks: Iterable[int] | None) -> None:
        """Points parameters of streamed chunks at NaN."""
        for chunk in chunks or ():
            if self.saved.mapped.pop(chunk, None) is not None:
                for param, absent in zip(self.grouping.chunks[chunk].params, self._absent[chunk], strict=True):
                    param.data = absent

    def move_to_device(self, chunk: int) -> None:
        """Gives a flushed chunk with states in host memory to the device class; streamed parameters get a fixed place."""
        streamed = chunk not in self.memory.resident
        self.memory.move_to_device(chunk)
        if not streamed:
            return
        self.unmap_chunks([chunk])
        del self._absent[chunk]
        resident = self.memory.resident[chunk]
        for param, view in zip(self.grouping.chunks[chunk].params, self.memory.views(resident, chunk), strict=True):
            param.data = view
        if self.counter is not None:
            self.counter.excluded.add(resident.untyped_storage().data_ptr())

    @property
    def passive(self) -> bool:
        """Whether hooks leave forwards alone."""
        return self.search.tracing or self.lent

    def absent(self, chunk: int) -> list[Tensor]:
        """What parameters of a streamed-out chunk point at."""
        return self._absent[chunk]

    def saved_bytes(self, unit: int) -> int:
        """Bytes that a recomputed unit saves again, by the trace."""
        return self.trace.units[self.unit_ids[unit]].saved_bytes

    def out_of_memory(self, operation: str) -> str:
        """What an out-of-memory error of torch does not say: where, what the plan holds there, what to do."""
        held = {name: size for name, size in self.planned.plan["device"].items() if size}
        listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in sorted(held.items(), key=lambda item: -item[1]))
        reserve = held.get("reserve", 0)
        remedies = [f"raise the reserve (now {format_bytes(reserve)}): GeminiPlugin(reserve='{reserve * 3 // 2 // 2**20}MiB')"]
        if not all(self.recompute[unit] for unit in self.trace.order if self.grouping.units[unit].recomputable):
            remedies.append("recompute='full'")
        if self.micro_tokens > self.trace.tokens:
            remedies.append(f"batches of at most the planned {self.trace.tokens} tokens (this one has {self.micro_tokens})")
        else:
            remedies.append("a smaller micro_batch_size")
        budget = format_bytes(self.planned.device_budget)
        return f"Tierwise: in {operation}; the plan holds {listed} of a budget of {budget}. What helps: {'; or '.join(remedies)}"

    def make_room(self, unit: int) -> None:
        """Waits until a unit's forward fits beside gradients that still wait for their step, or to be added to their sum."""
        # Those of a whole batch that was not committed wait for `optimizer.step()`, not for time.
        if self.gradients.outstanding and self.micro_done < self.accumulation and not self.target.emulated:
            traced = self.trace.units[self.unit_ids[unit]]
            kept = traced.input_bytes if self.recompute[unit] else traced.saved_bytes
            self.gradients.make_room(kept + self.planned.plan["device"]["reserve"], self.planned.device_budget)

    def account(self, kind: str, delta_bytes: int) -> None:
        """Counts device bytes outside the engine; on CUDA torch's allocator holds the limit itself."""
        if not self.target.emulated or not delta_bytes:
            return
        try:
            self.engine.account(kind, delta_bytes)
        except EngineStoppedError:
            # What is freed after a failure is nobody's concern any more, and it may be freed anywhere.
            if delta_bytes > 0:
                raise
        except BudgetError:
            # Gradients that the engine has not read yet, or activations on their way out, may be all that is in the way.
            if self.saved.offload is not None:
                self.saved.offload.wait_leaving()
            self.engine.flush()
            self.gradients.collect()
            self.engine.account(kind, delta_bytes)

    # ---- the step -----------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """One micro-batch's backward; see `Booster.backward`."""
        if self.hyper is None:
            raise ValueError("this model was boosted without an optimizer; pass one to booster.boost")
        if not self.ready:
            raise TierwiseError("backward before the first forward of the boosted model")
        accumulation = self.accumulation
        if self.micro_done >= accumulation:
            raise TierwiseError(
                f"booster.backward ran {self.micro_done + 1} times without optimizer.step(), but "
                f"gradient_accumulation_steps={accumulation}; call optimizer.step() after every {accumulation}, "
                f"or set gradient_accumulation_steps={self.micro_done + 1}"
            )
        scale = 1.0
        if self.scaler is not None:
            self._update_scaler()
            scale = self.scaler.scale
            loss = loss.float()
        if scale != 1.0 or accumulation != 1:
            loss = loss * (scale / accumulation)
        self._send_hyper()
        self.gradients.begin()
        try:
            self.engine.backward_begin(1.0 / scale)
            with attention_backends(self.fused_attention):
                loss.backward(retain_graph=retain_graph)
            self.hooks.end_backward()
            self.gradients.finish()
            self.unmap_chunks(list(self.saved.mapped))
            self.engine.backward_end(self.target.stream())
        except BaseException as error:
            if isinstance(error, torch.OutOfMemoryError) and not hasattr(error, "__notes__"):
                error.add_note(self.out_of_memory(self.hooks.running))
            if self.micro_done:
                error.add_note(
                    f"booster.backward failed in micro-batch {self.micro_done + 1} of {accumulation}: the gradients of the "
                    f"{self.micro_done} before it were dropped too; run the step again from its first micro-batch"
                )
            self._abort_backward()
            raise
        self.micro_done += 1
        self.gradients.collect()

    def _abort_backward(self) -> None:
        # The first error is what the user has to see.
        for undo in (
            self.hooks.end_backward,
            self.gradients.abort,
            lambda: self.unmap_chunks(list(self.saved.mapped)),
            lambda: self.engine.backward_end(self.target.stream()),
            self.engine.drop_grads,
            self.gradients.collect,
        ):
            with contextlib.suppress(Exception):
                undo()
        self.micro_done = 0

    def _update_scaler(self) -> None:
        decision = self.engine.decision(wait=True)
        if decision is not None and self.scaler is not None:
            self.scaler.update(decision[0], decision[3])

    def _send_hyper(self) -> None:
        if self.hyper is not None:
            self.hyper.send(self.engine, self.layout, self.grouping)

    @property
    def window_open(self) -> bool:
        """Whether some, but not all, micro-batches of a step are in."""
        return 0 < self.micro_done < self.accumulation

    def step(self) -> None:
        """`optimizer.step()`: commits at an accumulation boundary, does nothing before it."""
        if not self.ready or self.micro_done < self.accumulation:
            return
        assert self.hyper is not None
        self.hyper.check(self.trainable)
        self._send_hyper()
        scale = 1.0 if self.scaler is None else self.scaler.scale
        self.engine.commit(self.target.stream(), 1.0 / scale)
        self.micro_done = 0
        self.steps += 1
        self.gradients.collect()
        if self.steps == 1:
            correction.correct(self)

    def zero_grad(self) -> None:
        """Forgets a complete batch of gradients that was not stepped; between boundaries there is nothing to do."""
        if self.ready and self.micro_done >= self.accumulation:
            self.engine.drop_grads()
            self.micro_done = 0
            self.gradients.collect()

    def flush(self) -> None:
        """Waits until weights and states equal those of a synchronous optimizer."""
        if self.ready:
            self.engine.flush()
            self.gradients.collect()

    def stats(self) -> dict[str, Any]:
        """Counters of the engine and what Python counts beside it."""
        if self.ready and self.saved.offload is not None:
            self.saved.offload.settle()
        stats: dict[str, Any] = dict(self.engine.stats()) if self.ready else {}
        stats["optimizer_steps"] = self.steps
        stats["recomputed_units"] = sum(self.recompute)
        stats["offloaded_units"] = self.planned.plan["activations"].count("offload") if self.ready else 0
        stats["loss_scale"] = None if self.scaler is None else self.scaler.scale
        if self.ready:
            stats["micro_batch_flops"] = 3.0 * self.trace.flops()
            stats["micro_batch_tokens"] = self.micro_tokens or self.trace.tokens
            stats["planned_activation_bytes"] = self.planned.plan["device"]["activations"]
            if self.counter is not None:
                stats["activation_bytes"] = self.counter.live_bytes
                stats["activation_peak_bytes"] = self.counter.peak_bytes
            stats["offload_kept_bytes"] = 0 if self.saved.offload is None else self.saved.offload.kept_bytes
        return stats

    def residency(self) -> Any:
        """Every chunk's residency, for messages and tests."""
        return json.loads(self.engine.residency())

    def __deepcopy__(self, memo: object) -> Runtime:
        raise TierwiseError("a boosted model cannot be copied; copy it before booster.boost, or save and load it")

    def __reduce__(self) -> str:
        raise TierwiseError("a boosted model cannot be pickled; use booster.save_model")


def _uncounted(kind: str, delta_bytes: int) -> None:
    """Where torch's allocator holds the limit, counting is for reports only."""


def _rest(engine: Engine) -> None:
    """Waits until the engine moves nothing any more. A stopped one, or that of a parent process, has nothing to wait for."""
    with contextlib.suppress(TierwiseError):
        engine.flush()


def find_runtime(value: object) -> Runtime | None:
    """The runtime of a boosted model, or None."""
    return getattr(value, "__dict__", {}).get("_tierwise_runtime")


def runtime_of(value: object, what: str = "model") -> Runtime:
    """The runtime of a boosted model. Raises ValueError if it was not boosted."""
    runtime = find_runtime(value)
    if runtime is None:
        raise ValueError(f"this {what} was not boosted; pass it to booster.boost first")
    return runtime
