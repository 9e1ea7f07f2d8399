"""`GeminiPlugin`: ZeRO-style training on one device with memory tiers, planned by the Rust core."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

from tierwise._core import kernel_threads
from tierwise.booster.plugin.base import Plugin
from tierwise.config import parse_bytes, unknown_option

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tierwise.gemini.runtime import Runtime

_DEFAULT_RESERVE = 256 * 10**6
_DISK_SPEEDS = ("nvme_read_bytes_per_second", "nvme_write_bytes_per_second")
_FRACTIONS = ("shard_param_frac", "offload_optim_frac", "offload_param_frac", "stream_optim_frac")


class _RefuseUnknown(type(Plugin)):  # type: ignore[misc]
    """Refuses unknown keyword arguments with a suggestion instead of the bare TypeError of a dataclass."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if args:
            raise ValueError(f"{cls.__name__} takes keyword arguments only, got {args!r}")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in kwargs:
            if name not in known:
                raise ValueError(unknown_option(name, known, cls.__name__))
        return super().__call__(**kwargs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeminiPlugin(Plugin, metaclass=_RefuseUnknown):
    """Options of training with memory tiers. Raises ValueError at construction for values that cannot work.

    Sizes are bytes or strings ("6GiB", "700MB"), speeds are bytes per second.
    """

    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Dtype of parameters, gradients and activations. Master weights and moments are always fp32."""
    placement_policy: Literal["auto", "static"] = "auto"
    """"auto": the planner's fastest plan within the budgets. "static": the fractions below."""
    device_budget: int | str | None = None
    """Hard limit of device bytes. None: what the GPU has free minus 2 %; on the emulated device 80 % of the free RAM."""
    host_budget: int | str | None = None
    """Hard limit of pinned host bytes. None: 80 % of the free RAM. What is pinned cannot be swapped or given up: the rest is for everything
    else on the machine, such as Python, data loading, and files that are read or written."""
    nvme_path: str | os.PathLike[str] | None = None
    """Directory on an NVMe disk for what host memory cannot hold: states, then parameters, then gradients. None: nothing is
    spilled. The spill file has no name and is gone when the process ends, however it ends."""
    nvme_budget: int | str | None = None
    """Hard limit of the spill file's bytes; needs `nvme_path`. None: 90 % of what the directory's file system has free."""
    nvme_read_bytes_per_second: float | None = None
    """Speed of the disk for the planner, while it only reads; needs `nvme_path`. None: measured when the model is boosted, in about a
    second."""
    nvme_write_bytes_per_second: float | None = None
    """Like `nvme_read_bytes_per_second`, while it only writes."""
    max_norm: float | None = None
    """Clip the global gradient norm to this. None: no clipping."""
    clip_mode: Literal["defer", "speculate", "auto"] = "defer"
    """How clipping and the host's optimizer step overlap; the result is the same.

    "defer": the host steps when the norm is known. "speculate": it steps during backward, and undoes what a clip makes wrong. "auto":
    speculates while clips are rare, if the planner finds that faster than "defer"."""
    gradient_accumulation_steps: int = 1
    """Calls of `Booster.backward` per optimizer step."""
    accumulate_on: Literal["auto", "device", "host"] = "auto"
    """Where the gradients of several micro-batches are added up, if the CPU steps their parameters. "auto": the planner's choice,
    chunk by chunk. Gradients of parameters that are stepped on the device are always added up there."""
    accumulate_dtype: Literal["fp32", "bf16"] = "fp32"
    """What the gradients of several micro-batches are added up in. "bf16" (with `precision="bf16"`) halves that memory and its traffic, and
    rounds every addition, as torch's own accumulation into `.grad` does."""
    micro_batch_size: int | Literal["auto"] | None = None
    """Sequences per forward: shapes the first plan, and how `Booster.train_step` splits a batch. "auto": the planner chooses the divisor of
    the batch that makes `Booster.train_step` fastest, and so the number of micro-batches. (Sums over other micro-batches round otherwise:
    losses agree, not their last bits.)"""
    layer_batch_size: int | None = None
    """Rows that a layer takes at a time: a micro-batch then goes through the model layer by layer, all layers recomputed, and parameters
    that are not on the device are fetched once for all of it. Gradients of the parts are added up by autograd, in their own precision.
    None: all rows at once; with `micro_batch_size="auto"` and `accumulate_dtype="bf16"` the planner's choice. Layers have to treat rows
    alike and to return tensors."""
    seq_len: int | None = None
    """Tokens per sequence, for the first plan. Without it and without a dataloader the first forward is what is planned for."""
    recompute: Literal["auto", "none", "full"] = "auto"
    """Which layers recompute their forward in backward."""
    offload_activations: Literal["auto", "none", "full"] = "auto"
    """Which layers keep what backward needs in pinned host memory: "auto": where nothing else fits, on the emulated device also where the
    planner predicts a faster step; "full": all that do not recompute. What a batch of other shapes has no room for there stays on the
    device."""
    rematerialize: bool = True
    """With liger-kernel or `compile_layers`: make outputs of normalizations and gated products again in backward where the planner finds
    that faster, instead of keeping them. Equal bits with liger-kernel."""
    shard_param_frac: float = 1.0
    """Static policy: share of parameters that need not stay whole on the device."""
    offload_optim_frac: float = 0.0
    """Static policy: share of optimizer states in host memory."""
    offload_param_frac: float = 0.0
    """Static policy: share of parameters streamed from host memory."""
    stream_optim_frac: float = 0.0
    """Static policy: share of the optimizer states in host memory that visit the device to be stepped there, beside the CPU's own steps.
    Their parameters stay on the device."""
    reserve: int | str | None = None
    """Device bytes for temporaries that no trace sees. None: 256 MB, but at most an eighth of the device budget;
    on CUDA also what the traced model's backward is expected to need, and what the allocator may lose: a 128th of the budget, or a 24th
    where the environment keeps it from using expandable segments."""
    initial_scale: float = 2.0**16
    """fp16: first loss scale."""
    min_scale: float = 1.0
    """fp16: smallest loss scale."""
    max_scale: float = 2.0**32
    """fp16: largest loss scale."""
    growth_factor: float = 2.0
    """fp16: the scale is multiplied by this after `growth_interval` good steps."""
    backoff_factor: float = 0.5
    """fp16: the scale is multiplied by this after a step whose gradients were not finite."""
    growth_interval: int = 1000
    """fp16: good steps before the scale grows."""
    num_threads: int | None = None
    """Threads of the CPU kernels. None: TIERWISE_NUM_THREADS, else the CPUs of this process."""
    fused_loss: bool = True
    """Compute the loss of Hugging Face causal LMs in chunks, never whole logits (`outputs.logits` is None in training)."""
    enable_flash_attention: bool = False
    """CUDA: prefer cuDNN's attention, then flash, in `scaled_dot_product_attention` (not under deterministic algorithms)."""
    enable_fused_normalization: bool = False
    """CUDA with liger-kernel: fused RMSNorm in LLaMA-style models. Agrees with the plain model to rounding, not to the bit."""
    enable_jit_fused: bool = False
    """CUDA with liger-kernel: fused SwiGLU and rotary embedding in LLaMA-style models. Agrees to rounding, not to the bit."""
    enable_all_optimization: bool = False
    """All three of the above."""
    compile_layers: bool = False
    """Compile every layer with `torch.compile` when it first runs: fuses what the options above fuse inside layers, and more. Agrees with
    the plain model to rounding; the first step takes longer by the compiler's time. Needs what torch's inductor needs."""
    device: Literal["auto", "cuda", "emulated"] = "auto"
    """"emulated" is host memory with a hard budget; "auto" takes CUDA where there is one."""
    h2d_bytes_per_second: float | None = None
    """Link speed: of the emulated device, and for the planner. None: as fast as memory; for CUDA a table by device name."""
    d2h_bytes_per_second: float | None = None
    """Like `h2d_bytes_per_second`, in the other direction."""
    host_adam_params_per_second: float | None = None
    """Parameters that the CPU's optimizer steps alone, for the planner: with the same figure, as `host_adam_params_per_s` of `tierwise
    calibrate`, every process plans alike. None: measured once per process beside CUDA, and a table for the emulated device."""
    link_latency_ns: int = 0
    """Emulated device: nanoseconds that every copy takes in addition."""

    def __post_init__(self) -> None:
        self._one_of("precision", ("bf16", "fp16", "fp32"))
        self._one_of("placement_policy", ("auto", "static"))
        self._one_of("clip_mode", ("defer", "speculate", "auto"))
        self._one_of("accumulate_on", ("auto", "device", "host"))
        self._one_of("accumulate_dtype", ("fp32", "bf16"))
        if self.accumulate_dtype == "bf16" and self.precision != "bf16":
            raise ValueError(f"accumulate_dtype='bf16' needs gradients in bf16, and precision={self.precision!r}; leave it 'fp32'")
        self._one_of("recompute", ("auto", "none", "full"))
        self._one_of("offload_activations", ("auto", "none", "full"))
        if self.layer_batch_size is not None and (self.recompute == "none" or self.offload_activations == "full"):
            raise ValueError(
                f"layer_batch_size={self.layer_batch_size} recomputes every layer: recompute={self.recompute!r} and "
                f"offload_activations={self.offload_activations!r} leave none; leave them 'auto'"
            )
        if self.recompute == "full" and self.offload_activations == "full":
            raise ValueError("recompute='full' leaves no activations for offload_activations='full'; set one of them to 'auto' or 'none'")
        self._one_of("device", ("auto", "cuda", "emulated"))
        for name in ("device_budget", "host_budget", "nvme_budget", "reserve"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, parse_bytes(value, name, minimum=0 if name == "reserve" else 1))
        if self.nvme_path is not None:
            if not isinstance(self.nvme_path, (str, os.PathLike)) or not os.path.isdir(self.nvme_path):
                raise ValueError(f"nvme_path={self.nvme_path!r} is not a directory; name one on an NVMe disk")
        else:
            for name in ("nvme_budget", *_DISK_SPEEDS):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}={getattr(self, name)} needs nvme_path, the directory to spill to")
        self._flags(
            "rematerialize",
            "fused_loss",
            "enable_flash_attention",
            "enable_fused_normalization",
            "enable_jit_fused",
            "enable_all_optimization",
            "compile_layers",
        )
        self._positive("max_norm", "h2d_bytes_per_second", "d2h_bytes_per_second", "host_adam_params_per_second", *_DISK_SPEEDS)
        self._numbers(*_FRACTIONS, "growth_factor", "backoff_factor")
        self._numbers("initial_scale", "min_scale", "max_scale")
        latency = self.link_latency_ns
        if isinstance(latency, bool) or not isinstance(latency, int) or latency < 0:
            raise ValueError(f"link_latency_ns must be an integer of at least 0, got {latency!r}")
        for name in ("gradient_accumulation_steps", "micro_batch_size", "layer_batch_size", "seq_len", "growth_interval", "num_threads"):
            value = getattr(self, name)
            if value is None and name not in ("gradient_accumulation_steps", "growth_interval"):
                continue
            if name == "micro_batch_size" and value == "auto":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if self.micro_batch_size == "auto" and self.gradient_accumulation_steps != 1:
            raise ValueError(
                "micro_batch_size='auto' chooses gradient_accumulation_steps too "
                f"(got {self.gradient_accumulation_steps}); leave one of them out"
            )
        if self.num_threads is not None:
            kernel_threads(self.num_threads)
        for name in _FRACTIONS:
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {value}")
        if self.placement_policy == "auto":
            fields = {field.name: field.default for field in dataclasses.fields(self)}
            for name in _FRACTIONS:
                if getattr(self, name) != fields[name]:
                    raise ValueError(f"{name} belongs to placement_policy='static'; the auto policy chooses placement itself")
        elif self.offload_param_frac > self.shard_param_frac:
            raise ValueError(
                f"offload_param_frac={self.offload_param_frac} exceeds shard_param_frac={self.shard_param_frac}: "
                "only parameters that are not kept whole can be offloaded"
            )
        elif self.offload_param_frac > 0 and self.offload_optim_frac < self.offload_param_frac:
            raise ValueError(
                f"offload_param_frac={self.offload_param_frac} needs offload_optim_frac of at least as much "
                f"(got {self.offload_optim_frac}): streamed parameters are stepped by the host"
            )
        elif self.stream_optim_frac > 0 and self.offload_optim_frac == 0:
            raise ValueError(
                f"stream_optim_frac={self.stream_optim_frac} is a share of the optimizer states in host memory, and there are none: "
                "raise offload_optim_frac (got 0)"
            )
        for name in ("initial_scale", "min_scale", "max_scale"):
            if not (getattr(self, name) > 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not self.min_scale <= self.initial_scale <= self.max_scale:
            raise ValueError(
                f"loss scales must be ordered min <= initial <= max, got {self.min_scale}, {self.initial_scale}, {self.max_scale}"
            )
        if not self.growth_factor >= 1.0 or not 0.0 < self.backoff_factor < 1.0:
            raise ValueError("growth_factor must be at least 1 and backoff_factor between 0 and 1")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")

    def _flags(self, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")

    def _numbers(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {value!r}")

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive finite number or None, got {value!r}")

    def reserve_bytes(self, device_budget: int, temporary_bytes: int = 0) -> int:
        """Device bytes kept free under this budget, for temporaries of about `temporary_bytes` and what the allocator loses."""
        if self.reserve is not None:
            return parse_bytes(self.reserve, minimum=0)
        return min(_DEFAULT_RESERVE, device_budget // 8) + temporary_bytes

    def configure(self, model: nn.Module, optimizer: Optimizer | None, dataloader: Iterable[Any] | None) -> Runtime:
        """Converts `model` and `optimizer` in place; see `Booster.boost`."""
        from tierwise.gemini.boost import boost

        return boost(self, model, optimizer, dataloader)
