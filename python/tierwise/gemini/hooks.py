"""Module hooks: forward, backward and recomputation of units become enter and leave of the engine.

A unit's backward is entered by a gradient hook on its outputs. It is left when every parameter accumulation is in (where its inputs need no
gradient), else when the next unit's backward is entered, else at the end of backward. That is safe because autograd runs ready nodes of
later forwards first; and a node that does come late reads its weights through the saved-tensor hooks, wherever they are.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tierwise._core import TierwiseError
from tierwise.gemini.chunking import Unit
from tierwise.gemini.gradients import BARE_BACKWARD
from tierwise.gemini.inputs import tensors_in
from tierwise.gemini.offloaded import Visit

if TYPE_CHECKING:
    from tierwise.gemini.runtime import Runtime


def in_graph_task() -> bool:
    """Whether this thread is inside a backward pass: a forward that runs now is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@dataclasses.dataclass
class _Backward:
    """A unit whose backward is open."""

    missing: set[nn.Parameter]
    """Parameters whose gradients have not come yet."""
    frozen: bool
    """Some of its parameters get no gradient: then `missing` does not tell when it is over."""
    leaf: bool = False
    """Its inputs need no gradient."""
    entered: bool = False
    """A gradient of its outputs came; before that only a recomputation opened it."""
    recomputed: bool = False
    recomputed_bytes: int = 0
    visit: Visit | None = None
    """The forward that it belongs to, where activations are offloaded."""

    @property
    def over(self) -> bool:
        """Whether the unit is done once another unit's turn has come. What a recomputation opened ahead of its turn is not before all its
        gradients are in: raw views of its slots are saved."""
        return self.entered or not (self.missing or self.frozen)


class UnitHooks:
    """Enter and leave of every unit of one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._units = runtime.grouping.units
        self._ancestors = runtime.grouping.ancestors()
        self._params = [{p for p in unit.params if p in runtime.trainable} for unit in self._units]
        self._readers: dict[nn.Parameter, list[int]] = {}
        for index, params in enumerate(self._params):
            for param in params:
                self._readers.setdefault(param, []).append(index)
        self._stack: list[int] = []
        self._packing_owner: int | None = None
        self._open: dict[int, _Backward] = {}
        for index, unit in enumerate(self._units):
            self._install(index, unit)

    def _install(self, index: int, unit: Unit) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._before(index, args, kwargs)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._after(index, args, kwargs, output)

        unit.module.register_forward_pre_hook(torch.compiler.disable(before), with_kwargs=True)
        unit.module.register_forward_hook(torch.compiler.disable(after), with_kwargs=True, always_call=True)

    def watch_parameters(self) -> None:
        """Takes gradients from now on. Only once parameters are filled: a lazily built one is another tensor before."""
        # The collector does not see through hooks that C++ holds: a strong reference would keep model and engine for ever.
        hooks = weakref.ref(self)

        def accumulated(param: Tensor) -> None:
            this = hooks()
            if this is not None:
                assert isinstance(param, nn.Parameter)
                this._accumulated(param)

        disabled = torch.compiler.disable(accumulated)
        for param in self._runtime.trainable:
            param.register_post_accumulate_grad_hook(disabled)

    # ---- forward ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """A forward starts at the root: forgets what an interrupted one left open."""
        runtime = self._runtime
        if self._stack:
            self._stack.clear()
            runtime.unmap_chunks(list(runtime.saved.mapped))
        # Not only for what is on the stack: an interrupt may have come between entering and writing it there.
        runtime.engine.forward_begin(runtime.target.stream())
        self._packing_owner = None
        if runtime.saved.offload is not None:
            runtime.saved.offload.reset()

    def _before(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        runtime = self._runtime
        if runtime.passive:
            return
        if in_graph_task():
            self.recompute(index)
            return
        if not runtime.ready:
            raise TierwiseError(
                f"{self._units[index].name!r} ran before the boosted model did, and its plan is made at the first forward; call the model "
                "first, or give GeminiPlugin micro_batch_size and seq_len"
            )
        runtime.gradients.collect()
        runtime.make_room(index)
        if not self._stack and not runtime.saved.active and runtime.saved.needed and torch.is_grad_enabled():
            # A submodule called on its own saves slab views too.
            runtime.saved.enter()
            self._packing_owner = index
        slots = runtime.engine.enter(runtime.unit_ids[index], False, runtime.target.stream())
        # At once: an interrupt between enter and append would leave the chunks in use for ever.
        self._stack.append(index)
        if runtime.saved.offload is not None:
            runtime.saved.offload.enter(index)
        runtime.map_chunks(slots)

    def _after(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        runtime = self._runtime
        if runtime.passive or in_graph_task():
            return
        if self._packing_owner == index and (not self._stack or self._stack[0] == index):
            runtime.saved.exit()
            self._packing_owner = None
        error = sys.exception() if output is None else None
        if isinstance(error, torch.OutOfMemoryError) and not hasattr(error, "__notes__"):
            error.add_note(runtime.out_of_memory(f"{self._units[index].name} forward"))
        if not self._stack or self._stack[-1] != index:
            return  # Its enter failed: there is nothing to leave.
        self._stack.pop()
        try:
            visit = None if runtime.saved.offload is None else runtime.saved.offload.leave()
            if output is not None and torch.is_grad_enabled():
                self._watch(index, args, kwargs, output, visit)
        finally:
            self._leave_forward(index)

    def _leave_forward(self, index: int) -> None:
        runtime = self._runtime
        runtime.unmap_chunks(runtime.engine.leave(runtime.unit_ids[index], False, runtime.target.stream()))

    def _watch(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, visit: Visit | None) -> None:
        outputs = [t for t in tensors_in(output) if t.requires_grad and not t.is_leaf]
        if not outputs:
            return
        leaf = not any(t.requires_grad for t in tensors_in((args, kwargs)))
        if visit is not None and self._runtime.saved.offload is not None:
            self._runtime.saved.offload.expect(visit)
        hook = torch.compiler.disable(self._once_per_backward(index, leaf, self._generations(index), visit))
        for tensor in outputs:
            tensor.register_hook(hook)

    def _generations(self, index: int) -> list[int]:
        """How often the parameters of a unit's chunks were rewritten, chunk by chunk."""
        generation = self._runtime.engine.generation
        return [generation(chunk) for chunk in self._units[index].chunks]

    def _once_per_backward(self, index: int, leaf: bool, generations: list[int], visit: Visit | None) -> Callable[[Tensor], None]:
        fired = -1

        def enter(grad: Tensor) -> None:
            nonlocal fired
            task = torch._C._current_graph_task_id()
            if task != fired:
                fired = task
                self.enter_backward(index, leaf, visit)
                # After entering: that waits for steps which still run.
                if self._generations(index) != generations:
                    raise TierwiseError(
                        f"backward through {self._units[index].name!r}, whose parameters an optimizer step has rewritten since its "
                        "forward; call booster.backward before optimizer.step(), on a loss of the current parameters"
                    )

        return enter

    # ---- backward -----------------------------------------------------------------------------------------------

    def enter_backward(self, index: int, leaf: bool, visit: Visit | None) -> None:
        """The first gradient of a unit's outputs is there."""
        if not self._runtime.gradients.in_backward:
            raise TierwiseError(BARE_BACKWARD)
        for other, opened in list(self._open.items()):
            if opened.over and not self._related(index, other) and (other != index or opened.entered):
                self._leave_backward(other)
        state = self._open.get(index) or self._enter(index)
        state.entered = True
        state.leaf = leaf
        if visit is not None and self._runtime.saved.offload is not None:
            state.visit = visit
            self._runtime.saved.offload.backward(visit)

    def recompute(self, index: int) -> None:
        """A unit's forward runs inside a backward: its backward is entered now, ahead of its turn, because what is saved now is not packed
        and its chunks have to stay."""
        runtime = self._runtime
        if not runtime.gradients.in_backward:
            raise TierwiseError(BARE_BACKWARD)
        state = self._open.get(index)
        if state is None:
            if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
                # A reentrant checkpoint (the other kind recomputes inside hooks): units before it are over.
                for other, opened in list(self._open.items()):
                    if opened.over and not self._related(index, other):
                        self._leave_backward(other)
            state = self._enter(index)
        if not state.recomputed:
            state.recomputed = True
            if runtime.counter is not None:
                state.recomputed_bytes = runtime.saved_bytes(index)
                runtime.counter.add(state.recomputed_bytes)

    def _related(self, index: int, other: int) -> bool:
        """Whether one of two units is inside the other."""
        return other in self._ancestors[index] or index in self._ancestors[other]

    def _enter(self, index: int) -> _Backward:
        runtime = self._runtime
        runtime.map_chunks(runtime.engine.enter(runtime.unit_ids[index], True, runtime.target.stream()))
        missing = {param for param in self._params[index] if param.requires_grad}
        state = self._open[index] = _Backward(missing, len(missing) < len(self._units[index].params))
        return state

    def _leave_backward(self, index: int) -> None:
        runtime = self._runtime
        state = self._open.pop(index)
        if state.visit is not None and runtime.saved.offload is not None:
            runtime.saved.offload.left(state.visit)
        if state.recomputed_bytes and runtime.counter is not None:
            runtime.counter.add(-state.recomputed_bytes)
        runtime.unmap_chunks(runtime.engine.leave(runtime.unit_ids[index], True, runtime.target.stream()))

    def _accumulated(self, param: nn.Parameter) -> None:
        self._runtime.gradients.arrived(param)
        for index in self._readers.get(param, ()):
            state = self._open.get(index)
            if state is not None:
                state.missing.discard(param)
                if not state.missing and state.entered and state.leaf:
                    self._leave_backward(index)

    @property
    def running(self) -> str:
        """The unit whose backward was entered last."""
        return f"{self._units[list(self._open)[-1]].name} backward" if self._open else "backward"

    def end_backward(self) -> None:
        """Leaves what is still open."""
        for index in list(self._open):
            self._leave_backward(index)
