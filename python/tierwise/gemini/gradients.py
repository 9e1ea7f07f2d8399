"""Hands gradients over to the engine, chunk by chunk, as soon as a chunk's touched set is complete."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tierwise._core import Engine, TierwiseError
from tierwise.gemini.chunking import Grouping
from tierwise.gemini.target import Target

BARE_BACKWARD = (
    "loss.backward() on a boosted model: gradients would be left where no optimizer step finds them; "
    "call booster.backward(loss, optimizer) instead"
)


def _allocated_bytes(device: torch.device) -> int:
    """As `torch.cuda.memory_allocated`, without sorting all statistics: this is asked before every unit."""
    return int(torch.cuda.memory_stats_as_nested_dict(device)["allocated_bytes"]["all"]["current"])


class Gradients:
    """Gradients of one backward pass: touched parameters, chunks handed over, tensors that the engine still reads."""

    def __init__(
        self,
        engine: Engine,
        grouping: Grouping,
        trainable: dict[nn.Parameter, tuple[int, int]],
        shared_chunks: set[int],
        target: Target,
        account: Callable[[str, int], None],
    ) -> None:
        self.in_backward = False
        self._engine = engine
        self._grouping = grouping
        self._trainable = trainable
        self._shared = shared_chunks
        self._target = target
        self._account = account
        self._touched: dict[int, dict[int, int]] = {}
        self._handed: set[int] = set()
        self._expected: dict[int, int] = {}
        self._tickets: dict[int, tuple[list[Tensor], int]] = {}

    def begin(self) -> None:
        """A backward pass starts."""
        self._touched = {}
        self._handed = set()
        self._expected = {}
        for param, (chunk, _) in self._trainable.items():
            if param.requires_grad:
                self._expected[chunk] = self._expected.get(chunk, 0) + 1
        self.in_backward = True

    def arrived(self, param: nn.Parameter) -> None:
        """autograd accumulated into `param.grad`."""
        if not self.in_backward:
            param.grad = None
            raise TierwiseError(BARE_BACKWARD)
        chunk, position = self._trainable[param]
        grad = param.grad
        assert grad is not None
        name = self._grouping.chunks[chunk].names[position]
        if chunk in self._handed:
            param.grad = None
            raise TierwiseError(
                f"the gradient of {name!r} arrived again after its chunk was handed over in the same backward; this happens with "
                "reentrant checkpointing of a module that is called twice: use use_reentrant=False, or call booster.backward per call"
            )
        if grad.layout is not torch.strided:
            param.grad = None
            raise ValueError(f"{name!r} has a sparse gradient; build its embedding with sparse=False")
        touched = self._touched.setdefault(chunk, {})
        nbytes = grad.numel() * grad.dtype.itemsize
        before = touched.get(position, 0)
        if nbytes != before:
            self._account("gradients", nbytes - before)
        touched[position] = nbytes
        if len(touched) == self._expected.get(chunk, -1) and chunk not in self._shared:
            self._hand_over(chunk)

    def finish(self) -> None:
        """The backward pass is over: what is left is handed over, unused parameters stay untouched."""
        for chunk in list(self._touched):
            if chunk not in self._handed:
                self._hand_over(chunk)
        self.in_backward = False
        for param, (chunk, position) in self._trainable.items():
            if param.grad is not None:
                param.grad = None
                raise TierwiseError(
                    f"{self._grouping.chunks[chunk].names[position]!r} has a gradient that no hook saw; its hooks were dropped, which "
                    "happens when something replaces the tensor of a boosted parameter (a dtype or device move, swap_tensors)"
                )

    def abort(self) -> None:
        """The backward pass failed: forgets what was not handed over."""
        self.in_backward = False
        for chunk, touched in self._touched.items():
            if chunk in self._handed:
                continue
            for position, nbytes in touched.items():
                self._grouping.chunks[chunk].params[position].grad = None
                self._account("gradients", -nbytes)
        self._touched = {}

    def _hand_over(self, chunk: int) -> None:
        params = self._grouping.chunks[chunk].params
        touched = self._touched[chunk]
        tensors: list[Tensor] = []
        addresses: list[tuple[int, int]] = []
        for position in sorted(touched):
            param = params[position]
            assert param.grad is not None
            tensor = param.grad.contiguous()
            tensors.append(tensor)
            addresses.append((position, tensor.data_ptr()))
            param.grad = None
        self._handed.add(chunk)
        try:
            ticket = self._engine.grads(chunk, addresses, self._target.stream())
        except BaseException:
            # An interrupted wait handed nothing over: the gradients are gone, and so are their bytes.
            self._account("gradients", -sum(touched.values()))
            raise
        self._tickets[ticket] = (tensors, sum(touched.values()))
        self.collect()

    def make_room(self, needed_bytes: int, device_budget: int) -> None:
        """Waits, on CUDA, until `needed_bytes` fit beside what torch has allocated, as far as gradients that wait for their step are in the
        way: Python runs ahead of the device, and the next forward would take memory that the plan lends to both in turn."""
        while self._tickets and not self._target.emulated:
            if _allocated_bytes(self._target.torch_device) + needed_bytes <= device_budget:
                return
            time.sleep(2e-4)
            self.collect()

    @property
    def outstanding(self) -> bool:
        """Whether the engine still reads gradients."""
        return bool(self._tickets)

    def collect(self) -> None:
        """Frees gradients that the engine has read."""
        if not self._tickets:
            return
        for ticket in self._engine.collect():
            _, nbytes = self._tickets.pop(ticket)
            self._account("gradients", -nbytes)
