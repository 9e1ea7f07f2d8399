"""Types of the Rust core. Bytes are `_bytes`, elements are `numel`; addresses are plain integers."""

import os
from collections.abc import Sequence
from typing import Any, final

__version__: str

class TierwiseError(RuntimeError):
    """Base class of every error that Tierwise raises itself."""

class BudgetError(TierwiseError):
    """A plan or an allocation does not fit a tier's budget.

    Raised by `plan` with the attributes `tier` ("device", "host" or "nvme"), `op` (str or None), `needed_bytes`, `budget_bytes`,
    `shortfall_bytes` and `breakdown` (dict of bytes by purpose).
    """

    tier: str
    op: str | None
    needed_bytes: int
    budget_bytes: int
    shortfall_bytes: int
    breakdown: dict[str, int]

class ScheduleError(TierwiseError):
    """The engine refused an event: an illegal transition, no free slot, a missing optimizer step."""

class DeviceError(TierwiseError):
    """The device driver refused a call."""

class EngineStoppedError(TierwiseError):
    """A worker failed earlier; the engine does nothing any more."""

class StorageError(TierwiseError, OSError):
    """The disk, or the spill file on it, failed.

    `errno` and `strerror` are the system's where a call failed; EIO for data that is not what was written, ENOSPC for a spill file without
    room, ETIMEDOUT for a disk that does not answer. `filename` is the directory of the spill file. Each is None where there is none.
    """

class StorageStoppedError(EngineStoppedError, StorageError):
    """The disk failed a worker earlier; the engine does nothing any more."""

@final
class Layout:
    """Chunks and the element offsets of their parameters."""

    def __new__(cls, precision: str, chunks: Sequence[tuple[str, Sequence[tuple[str, int, bool]]]], sums: str = "fp32") -> Layout:
        """Lays out `chunks`: `(chunk name, [(parameter name, numel, trainable), ...])`; precision "bf16", "fp16" or "fp32". Sums of the
        gradients of several micro-batches are kept in fp32, or in `precision`."""

    @property
    def precision(self) -> str: ...
    @property
    def num_chunks(self) -> int: ...
    def param_offsets(self, chunk: int) -> list[int]:
        """First element of every parameter of a chunk, in the order given, the same in every payload."""

    def param_indices(self, chunk: int) -> list[int]:
        """Global index of every parameter of a chunk, in the order given."""

    def numel(self, chunk: int) -> int:
        """Elements of the parameter payload."""

    def state_numel(self, chunk: int) -> int:
        """Elements of the gradient and state payloads (the trainable prefix)."""

    def param_bytes(self, chunk: int) -> int: ...
    def grad_bytes(self, chunk: int) -> int: ...
    def grad_acc_bytes(self, chunk: int) -> int: ...
    def state_bytes(self, chunk: int) -> int: ...
    def to_json(self) -> str: ...
    @staticmethod
    def from_json(text: str) -> Layout: ...

def plan(layout: Layout, trace: str, request: str) -> str:
    """Plans a step; `trace`, `request` and the result are JSON (`Trace`, `PlanRequest` and `Plan` of tierwise-core)."""

def choose_plan(layout: Layout, trace: str, request: str) -> str:
    """Plans a step as `plan` does, and takes another of the planner's best plans if the simulator executes it at least 1 % faster."""

@final
class Device:
    """A device that the engine drives."""

    @staticmethod
    def cuda(ordinal: int = 0) -> Device:
        """The CUDA device of this ordinal. Raises DeviceError where the driver is missing."""

    @staticmethod
    def emulated(
        *,
        h2d_bytes_per_second: float | None = None,
        d2h_bytes_per_second: float | None = None,
        latency_ns: int = 0,
        threads: int | None = None,
    ) -> Device:
        """Host memory that behaves like a device; links are as fast as memory unless a speed is given."""

    @staticmethod
    def cuda_is_available() -> bool: ...
    @property
    def name(self) -> str: ...
    def fail_next(self, queue: str, message: str) -> None:
        """Emulated device only: the next command on "h2d", "d2h", "optimizer", "states_in" or "states_out" fails with this message."""

@final
class HostBuffer:
    """Pinned host memory of an engine, as a writable buffer of bytes (`memoryview`, `torch.frombuffer`)."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class Engine:
    """Executes a plan: moves chunks, reduces norms, runs optimizer steps. Every call that can wait releases the GIL and heeds Ctrl-C."""

    def __new__(
        cls,
        layout: Layout,
        trace: str,
        plan: str,
        device: Device,
        *,
        device_budget: int,
        host_budget: int,
        max_norm: float | None = None,
        threads: int | None = None,
        host_spare_bytes: int = 0,
        nvme_path: str | os.PathLike[str] | None = None,
        nvme_budget: int = 0,
    ) -> Engine:
        """Maps, pre-faults and page-locks the host slab of `plan` (plus `host_spare_bytes` for later re-planning).

        `device_budget` and `host_budget` are hard limits in bytes, checked by `bind`, `bind_slab` and `account`. A plan that spills needs
        `nvme_path`, a directory where a spill file of at most `nvme_budget` bytes is made and allocated.
        """

    # ---- memory -------------------------------------------------------------------------------------------------
    @property
    def host_buffer(self) -> HostBuffer: ...
    def host_offset(self, chunk: int, payload: str) -> int | None:
        """Byte offset of a payload in `host_buffer`, or None if it has none there.

        Payloads: "param", "master" (bf16: int16 low half; fp16: fp32; fp32: none), "exp_avg", "exp_avg_sq", "grad".
        """

    def bind(self, chunk: int, *, param: int | None = None, states: int | None = None, accumulator: int | None = None) -> None:
        """Gives device memory to a chunk: resident parameters; states (master, exp_avg, exp_avg_sq, one after the other); accumulator."""

    def bind_slab(self, address: int) -> None:
        """Gives the device memory that streamed chunks pass through (`stream_slab_bytes` of the plan)."""

    def bind_staging(self, address: int) -> None:
        """Gives the device memory that the states of "streamed" chunks pass through (`device.staging` bytes of the plan)."""

    def set_class(self, chunk: int, cls: str) -> None:
        """Moves a chunk to the "device", "streamed" or "host" class (after `flush`); the caller copies what moves and binds what is new.

        States that stay in host memory stay where they are. Streamed parameters become resident with a class that is stepped on the device:
        bind them first. Back to "host" they stay resident.
        """

    def account(self, kind: str, delta_bytes: int) -> None:
        """Counts device bytes that live outside the engine ("activations", "gradients"); BudgetError if they do not fit."""

    # ---- the step -----------------------------------------------------------------------------------------------
    def start(self) -> None:
        """All memory is bound and filled, and no stream still works on it: from now on the engine moves things, on streams of its own."""

    def enter(self, unit: int, backward: bool, stream: int) -> list[tuple[int, int]] | None:
        """Makes the unit's chunks readable on the compute stream; returns (chunk, slot byte offset) of its streamed chunks."""

    def leave(self, unit: int, backward: bool, stream: int) -> list[int] | None:
        """The unit's kernels are enqueued; returns its streamed chunks that nothing uses any more."""

    def forward_begin(self, stream: int) -> None:
        """The model's outermost forward starts: what an interrupted one left entered is not in use any more."""

    def touch(self, chunk: int, stream: int) -> int:
        """Makes a chunk readable outside the traced operations until the next enter, leave or end of backward; returns its slot offset."""

    def send_activation(self, unit: int, address: int, nbytes: int, stream: int) -> int | None:
        """Starts the copy of a storage that a unit saved into the activation region of the host slab; returns a ticket, or None if there is no
        room. The storage must stay alive and unchanged until it has left."""

    def activation_has_left(self, ticket: int, wait: bool, stream: int) -> bool:
        """Whether a storage is on the host; with `wait`, once it is (the timeline says what `stream` would have done meanwhile)."""

    def fetch_activation(self, ticket: int, address: int, stream: int) -> None:
        """Starts the copy of a storage back to `address`. The memory must stay alive until a stream has waited for it."""

    def await_activation(self, ticket: int, stream: int) -> None:
        """Makes the compute stream wait for the latest `fetch_activation` of a storage."""

    def free_activation(self, ticket: int) -> None:
        """Gives the host memory of a storage back."""

    def generation(self, chunk: int) -> int:
        """How often the parameters of a chunk were rewritten."""

    def set_hyper(self, groups: Sequence[tuple[float, float, float, float, float, bool]], group_of_param: Sequence[int]) -> None:
        """Hyperparameters for coming steps: groups of (lr, beta1, beta2, eps, weight_decay, decoupled); group of every parameter by global
        index, -1 for parameters that no group holds."""

    def backward_begin(self, grad_scale: float = 1.0) -> None:
        """A backward pass starts; speculated steps use `grad_scale` and the hyperparameters of this moment. Waits while the previous step is
        undecided."""
    def grads(self, chunk: int, grads: Sequence[tuple[int, int]], stream: int) -> int:
        """Hands over the gradients of a chunk in this micro-batch: (position in the chunk, address). The tensors must stay alive and unchanged
        until the returned ticket is collected. Waits while more gradients are on their way than the plan allows."""

    def collect(self) -> list[int]:
        """Tickets whose gradients may be freed now; each is returned once."""

    def backward_end(self, stream: int) -> None: ...
    def commit(self, stream: int, grad_scale: float = 1.0) -> None:
        """`optimizer.step()`: from now on the steps of this batch's gradients run, where and when the plan says. `grad_scale` multiplies every
        gradient first (the inverse loss scale). Does not wait."""

    def drop_grads(self) -> None:
        """`zero_grad()` without a step: forgets the gradients and undoes speculated steps."""

    def decision(self, wait: bool) -> tuple[int, float, float, bool] | None:
        """(step number, gradient norm, clip coefficient, skipped) of the latest committed step, or None if it is not known yet (never None with
        `wait`, unless nothing was committed)."""

    def flush(self) -> None:
        """Waits until the visible state equals that of a synchronous optimizer."""

    def read_spilled(self, chunk: int, payload: str, first: int, numel: int, address: int) -> None:
        """Copies `numel` elements from `first` of a spilled payload ("param", "master", "exp_avg", "exp_avg_sq") to memory at `address`, piece
        by piece; after `flush`. Raises ValueError for elements that are not spilled."""

    def write_spilled(self, chunk: int, payload: str, first: int, numel: int, address: int) -> None:
        """Replaces elements of a spilled payload with those at `address`; see `read_spilled`."""

    # ---- state --------------------------------------------------------------------------------------------------
    @property
    def max_norm(self) -> float | None: ...
    @max_norm.setter
    def max_norm(self, value: float | None) -> None: ...
    def param_steps(self) -> list[int]:
        """Steps taken by every parameter, by global index."""

    def set_param_steps(self, steps: Sequence[int]) -> None: ...
    def stats(self) -> dict[str, Any]:
        """Counters: bytes and peaks per tier, fetches, demand fetches, evictions, steps, skipped, clipped, speculated, undone, wait_ns, ..."""

    def residency(self) -> str:
        """JSON of every chunk's residency, slot, pins and pending work (for tests and messages)."""

    def record_timeline(self, enabled: bool) -> None:
        """Starts (dropping what was recorded) or stops recording spans."""

    def timeline(self) -> str:
        """What was recorded since, as trace-event JSON for Perfetto."""

def split_master(src: int, hi: int, lo: int, numel: int, threads: int | None = None) -> None:
    """Splits fp32 masters at `src` into bf16 parameters at `hi` and int16 low halves at `lo`."""

def join_master(hi: int, lo: int, dst: int, numel: int, threads: int | None = None) -> None:
    """Joins bf16 parameters and low halves into fp32 masters at `dst`."""

def adam_step(
    precision: str,
    param: int,
    master: int,
    exp_avg: int,
    exp_avg_sq: int,
    grad: int,
    numel: int,
    hyper: tuple[float, float, float, float, float, bool],
    step: int,
    grad_scale: float = 1.0,
    threads: int | None = None,
) -> None:
    """One CPU optimizer step over raw memory (for tests and benchmarks); gradients are in the precision's dtype."""

def sum_squares(grad: int, dtype: str, numel: int, threads: int | None = None) -> float:
    """Sum of squares in the reduction tree that every device shares; dtype "bf16", "fp16" or "fp32"."""

@final
class HostBench:
    """Memory of 14 bytes per parameter on which the host's kernels are measured. Raises ValueError for more than can be allocated."""

    def __new__(cls, numel: int) -> HostBench: ...
    @property
    def numel(self) -> int: ...
    def rate(self, kernel: str, seconds: float, threads: int | None = None) -> float:
        """Elements per second of the median pass: parameters of "adam" (26 bytes of traffic each), of the two passes that its steps may
        take, "params_first" and "moments" (18 each), of steps that may be undone, "undoable" (38), of "accumulate" (bf16 into fp32) and of
        "norm" (bf16), bytes of "copy". Raises ValueError for another kernel."""

def sim_main(args: list[str]) -> int:
    """Runs the `tierwise-sim` command with these arguments; returns its exit code."""

def kernel_threads(threads: int | None = None) -> int:
    """Threads of the CPU kernels: `threads`, else TIERWISE_NUM_THREADS, else the CPUs of this process. Raises ValueError for less than 1
    and more than 1024."""

def probe_disk(directory: str | os.PathLike[str], max_bytes: int = 1073741824, max_seconds: float = 6.0) -> str:
    """Measures a directory as the NVMe tier; returns what would be used there, why not better and how fast it is, as JSON.

    Raises ValueError for a file system in memory and for too little room, TierwiseError if the disk refuses."""

@final
class RawDisk:
    """A loop over a spill file of its own that only moves blocks: what a disk gives at a depth, to compare the engine with."""

    def __new__(
        cls, directory: str | os.PathLike[str], nbytes: int, block_bytes: int, depth: int, memory_bytes: int, ring: bool
    ) -> RawDisk:
        """Makes the file and writes it once. `ring`: io_uring, else `depth` threads; blocks go through `memory_bytes` in turn (at least
        `depth` blocks). Raises ValueError and StorageError."""

    @property
    def direct(self) -> bool:
        """Whether the page cache is bypassed."""

    def run(self, reads: bool, writes: bool, seconds: float, blocks: int = 1) -> tuple[float, float]:
        """Moves blocks for so long, so many in each direction in turn where both are asked for; returns bytes per second read and
        written. Raises StorageError, also for no blocks."""

def simulate_plan(layout: Layout, trace: str, plan: str, request: str) -> str:
    """Executes a plan of `plan` in virtual time, with the speeds of its request; returns the step (`Outcome` of tierwise-sim) as JSON.

    Raises ValueError if plan, trace and layout do not belong together."""

def sim_output(args: list[str]) -> tuple[int, str, str]:
    """Runs the `tierwise-sim` command with these arguments; returns its exit code, what it printed and its messages."""
