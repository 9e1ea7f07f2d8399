"""Activations in host memory: out over the idle link in forward, back in backward ahead of their use.

What a unit saved is sent when it is left, and is taken off the device once its copy is done. It comes back, as far ahead as the plan's
window allows, when the backward of a later unit is entered. What has no room in the host's region stays on the device.
"""

from __future__ import annotations

import collections
import threading
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierwise._core import BudgetError, Engine
from tierwise.gemini.offloaded import MIN_BYTES, Offloaded, Part, State, Storage, Visit, is_plain
from tierwise.gemini.target import Target

if TYPE_CHECKING:
    from tierwise.gemini.saved_tensors import ActivationCounter


class ActivationOffload:
    """The offloaded activations of one runtime."""

    def __init__(
        self, engine: Engine, target: Target, counter: ActivationCounter, unit_ids: dict[int, int], window_bytes: int, lasting: set[int]
    ) -> None:
        self.dropped: collections.deque[Storage] = collections.deque()
        self.kept_bytes = 0
        """Bytes so far for which the host's region had no room."""
        self.live_bytes = 0
        """Device bytes of offloaded storages."""
        self._engine = engine
        self._target = target
        self._counter = counter
        self._unit_ids = unit_ids
        """Offloaded units and what the trace calls them."""
        self._window_bytes = window_bytes
        self._lasting = lasting
        """Storages that are there anyway (buffers)."""
        self._stack: list[Visit] = []
        self._latest: weakref.ref[Visit] | None = None
        self._known: dict[int, Storage] = {}
        self._leaving: collections.deque[Storage] = collections.deque()
        self._ahead: collections.deque[Storage] = collections.deque()
        self._lock = threading.RLock()

    # ---- forward ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """A forward of the root starts."""
        self._stack.clear()
        self._latest = None
        self.settle()

    def enter(self, unit: int) -> None:
        """A unit's forward starts."""
        self._stack.append(Visit(unit))

    def leave(self) -> Visit | None:
        """The innermost unit's forward is over: what it saved is sent away."""
        if not self._stack:
            return None
        visit = self._stack.pop()
        with self._lock:
            for storage in visit.storages:
                if storage.state is State.SAVED:
                    self._send(storage, self._unit_ids[visit.unit])
        return visit

    def expect(self, visit: Visit) -> None:
        """A unit will have a backward."""
        visit.previous = self._latest
        self._latest = weakref.ref(visit)

    def pack(self, tensor: Tensor) -> Offloaded | None:
        """Takes over a saved tensor of an offloaded unit, or one whose storage was taken over before; None if it stays on the device."""
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        if nbytes < MIN_BYTES or storage._cdata in self._lasting or not is_plain(tensor):
            return None
        with self._lock:
            known = self._known.get(storage._cdata)
            if known is None or not known.has(tensor):
                visit = self._stack[-1] if self._stack else None
                if visit is None or visit.unit not in self._unit_ids or tensor.device != self._target.torch_device:
                    return None
                known = self._take(visit, tensor, nbytes)
            if known.state is State.SAVED:
                known.saved.append(Part(tensor))
            known.uses += 1
            return Offloaded(self.dropped, known, tensor)

    def _take(self, visit: Visit, tensor: Tensor, nbytes: int) -> Storage:
        self.settle()
        while self.live_bytes + nbytes > self._window_bytes and self._leaving:
            self._engine.activation_has_left(self._leaving[0].ticket, True, self._target.stream())
            self.settle()
        self._count(nbytes)
        taken = Storage(tensor, nbytes)
        self._known[taken.key] = taken
        visit.storages.append(taken)
        return taken

    def _send(self, storage: Storage, unit: int) -> None:
        assert storage.tensor is not None
        self.settle()
        address = storage.tensor.untyped_storage().data_ptr()
        ticket = self._engine.send_activation(unit, address, storage.nbytes, self._target.stream())
        if ticket is None:
            storage.state = State.KEPT
            self.kept_bytes += storage.nbytes
            self.live_bytes -= storage.nbytes
            return
        storage.ticket, storage.state = ticket, State.LEAVING
        self._leaving.append(storage)

    # ---- backward -----------------------------------------------------------------------------------------------

    def backward(self, visit: Visit) -> None:
        """The backward of a unit is entered: what it and the units before it saved comes back, as far ahead as the window allows."""
        with self._lock:
            self.settle()
            self._ahead.clear()
            reach = 0
            at: Visit | None = visit
            while at is not None and reach <= self._window_bytes:
                for storage in reversed(at.storages):
                    if storage.state is State.LEAVING:
                        storage.state = State.RECLAIMED
                    elif storage.state is State.OUT:
                        self._ahead.append(storage)
                        reach += storage.nbytes
                at = at.previous() if at.previous is not None else None
            self._fetch_ahead()

    def left(self, visit: Visit) -> None:
        """The backward of a unit is over: what its graph still holds (`retain_graph`) needs no device copy."""
        with self._lock:
            self.settle()
            for storage in visit.storages:
                self._give_up(storage)

    def unpack(self, packed: Offloaded) -> Tensor:
        """The saved tensor; the current stream waits until it is there."""
        storage = packed.storage
        with self._lock:
            self.settle()
            if storage.state is State.LEAVING:
                storage.state = State.RECLAIMED
            elif storage.state is State.OUT:
                self._make_room(storage.nbytes)
                self._fetch(storage)
            stream = self._target.stream()
            if storage.state in (State.RETURNING, State.BACK):
                self._engine.await_activation(storage.ticket, stream)
                storage.state = State.BACK
            tensor = storage.tensor
            assert tensor is not None
            if storage.stream not in (None, stream):
                tensor.record_stream(torch.cuda.current_stream(self._target.torch_device))
            view = packed.view()
            self._fetch_ahead()
        return view

    def _fetch_ahead(self) -> None:
        while self._ahead:
            storage = self._ahead[0]
            if storage.state is State.OUT:
                if self.live_bytes + storage.nbytes > self._window_bytes:
                    return
                try:
                    self._fetch(storage)
                except BudgetError:
                    return  # More is alive than was planned for: it comes when it is asked for.
            self._ahead.popleft()

    def _fetch(self, storage: Storage) -> None:
        self._count(storage.nbytes)
        try:
            tensor = torch.empty(storage.nbytes, dtype=torch.uint8, device=self._target.torch_device)
            stream = self._target.stream()
            self._engine.fetch_activation(storage.ticket, tensor.data_ptr(), stream)
        except BaseException:
            self._count(-storage.nbytes)
            raise
        storage.tensor, storage.stream, storage.state = tensor, stream, State.RETURNING

    def _make_room(self, nbytes: int) -> None:
        """What backward asked for out of turn goes before what was fetched ahead of its turn."""
        for storage in list(self._leaving):
            if self.live_bytes + nbytes <= self._window_bytes:
                return
            self._engine.activation_has_left(storage.ticket, True, self._target.stream())
            self.settle()
        for storage in list(self._known.values()):
            if self.live_bytes + nbytes <= self._window_bytes:
                return
            if storage.state is State.RETURNING:
                self._give_up(storage)

    # ---- the ways off the device --------------------------------------------------------------------------------

    def settle(self) -> None:
        """Takes storages off the device whose copies are done, and forgets those that nobody needs any more. Never waits."""
        with self._lock:
            while self.dropped:
                storage = self.dropped.popleft()
                storage.uses -= 1
                if storage.uses == 0:
                    self._free(storage)
            while self._leaving and self._engine.activation_has_left(self._leaving[0].ticket, False, 0):
                storage = self._leaving.popleft()
                assert storage.tensor is not None
                storage.settled_version = storage.tensor._version
                if storage.state is State.RECLAIMED:
                    storage.state = State.BACK
                    continue
                self._drop_tensor(storage)
                if storage.state is State.FREED:
                    self._engine.free_activation(storage.ticket)
                else:
                    storage.state = State.OUT

    def wait_leaving(self) -> None:
        """Waits until what is on its way to the host has left the device."""
        with self._lock:
            while self._leaving:
                self._engine.activation_has_left(self._leaving[0].ticket, True, self._target.stream())
                self.settle()

    def _free(self, storage: Storage) -> None:
        if self._known.get(storage.key) is storage:
            del self._known[storage.key]
        self._give_up(storage)
        if storage.state is State.OUT:
            self._engine.free_activation(storage.ticket)
        elif storage.state is State.SAVED:
            self._drop_tensor(storage)
        elif storage.state is State.KEPT:
            storage.tensor = None
            self._counter.add(-storage.nbytes)
        # What is leaving goes with the rest that is: the copy still reads it.
        storage.state = State.FREED

    def _give_up(self, storage: Storage) -> None:
        """The device copy is not wanted."""
        if storage.state is State.RECLAIMED:
            storage.state = State.LEAVING
        elif storage.state in (State.RETURNING, State.BACK):
            if storage.state is State.RETURNING:
                # The copy still writes it: the stream that it was allocated on does not go on before.
                assert storage.stream is not None
                self._engine.await_activation(storage.ticket, storage.stream)
            self._drop_tensor(storage)
            storage.state = State.OUT

    def _drop_tensor(self, storage: Storage) -> None:
        storage.tensor = None
        self._count(-storage.nbytes)

    def _count(self, delta_bytes: int) -> None:
        self._counter.add(delta_bytes)
        self.live_bytes += delta_bytes
