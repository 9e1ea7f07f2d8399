"""Values for chunks: the parameters that a model has, or for lazily built ones a checkpoint or their own initialisation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tierwise._core import TierwiseError
from tierwise.checkpoint.reader import SafetensorsReader
from tierwise.gemini.chunking import Chunk, Grouping


class Materializer:
    """Gives the values of one chunk at a time and moves buffers last, so that a lazily built model is never whole in host memory."""

    def __init__(self, model: nn.Module, grouping: Grouping) -> None:
        self._model = model
        self._grouping = grouping
        self._reader: SafetensorsReader | None = None
        self._reader_path: str | None = None
        self._owners: dict[nn.Parameter, nn.Module] = {}
        for module in model.modules():
            for param in module.parameters(recurse=False):
                self._owners.setdefault(param, module)
        self._hugging_face = _hugging_face_parents(model)

    def values(self, chunk: Chunk, device: torch.device) -> list[Tensor]:
        """Values of a chunk's parameters, in any float dtype, on any device; random ones are drawn on `device`: a GPU is faster."""
        checkpoints = {getattr(param, "_tierwise_checkpoint", None) for param in chunk.params if param.is_meta}
        checkpoints.discard(None)
        if checkpoints:
            return [self._load(param, checkpoints.pop() if len(checkpoints) == 1 else None) for param in chunk.params]
        if any(param.is_meta for param in chunk.params):
            return self._initialize(chunk, device)
        return [param.detach() for param in chunk.params]

    def _load(self, param: nn.Parameter, fallback: Any) -> Tensor:
        path = getattr(param, "_tierwise_checkpoint", None) or self._reader_path or fallback
        if not param.is_meta:
            return param.detach()
        if self._reader is None or self._reader_path != str(path):
            self._reader, self._reader_path = SafetensorsReader(path), str(path)
        for name in self._grouping.names[param]:
            if name in self._reader.names:
                value = self._reader.read(name)
                if value.shape != param.shape:
                    raise ValueError(f"{name!r} has shape {tuple(value.shape)} in {path}, the model wants {tuple(param.shape)}")
                return value
        raise ValueError(f"{path} has no tensor {self._grouping.names[param][0]!r}; its first names are {sorted(self._reader.names)[:5]}")

    def _initialize(self, chunk: Chunk, device: torch.device) -> list[Tensor]:
        """Runs the modules' own initialisation on real parameters that stand in for all of theirs; NaN shows what it left out. Those that
        have values already, here or in another chunk, keep them: their stand-ins are copies.

        Raises TierwiseError for a parameter that nothing initialises.
        """
        modules = dict.fromkeys(self._owners[param] for param in chunk.params)
        stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        flags = [(param, param.__dict__.get("_is_hf_initialized")) for param in self._grouping.place]
        try:
            for param, _ in flags:
                # Hugging Face initialisers leave flagged tensors alone: those of other chunks, which may be in place already.
                param.__dict__["_is_hf_initialized"] = True
            for module in modules:
                for name, own in list(module._parameters.items()):
                    if own is None:
                        continue
                    param = own
                    if param not in stand_ins:
                        fresh = torch.full(param.shape, torch.nan, dtype=param.dtype, device=device) if param.is_meta else None
                        value = param.detach().clone() if fresh is None else fresh
                        stand_ins[param] = nn.Parameter(value, requires_grad=param.requires_grad)
                        if not param.is_meta:
                            stand_ins[param].__dict__["_is_hf_initialized"] = True
                    module._parameters[name] = stand_ins[param]
                    swapped.append((module, name, param))
            with torch.no_grad():
                for parent in self._children_first(modules):
                    self._run_initializer(parent)
                missing = [param for param in chunk.params if param.is_meta and stand_ins[param].isnan().any()]
                if missing:
                    # Some models initialise an embedding or a head from above.
                    for parent in self._above({self._owners[param] for param in missing}):
                        self._run_initializer(parent)
        finally:
            for module, name, param in swapped:
                module._parameters[name] = param
            for param, flag in flags:
                param.__dict__.pop("_is_hf_initialized")
                if flag is not None:
                    param.__dict__["_is_hf_initialized"] = flag
        for param, name in zip(chunk.params, chunk.names, strict=True):
            if param.is_meta and stand_ins[param].isnan().any():
                raise TierwiseError(
                    f"nothing initialises {name!r}: {type(self._owners[param]).__name__} has no reset_parameters() that sets it; build the "
                    "model outside lazy_init, or give lazy_init a checkpoint"
                )
        return [stand_ins[param].detach() if param.is_meta else param.detach() for param in chunk.params]

    def _children_first(self, modules: Iterable[nn.Module]) -> list[nn.Module]:
        """The modules and those between them, which may refine what their children set (GPT-2 scales its projections so)."""
        wanted = set(modules)
        around = [m for m in self._model.modules() if m in wanted or (wanted & set(m.modules()) and set(_owning(m)) <= wanted)]
        return around[::-1]

    def _above(self, modules: set[nn.Module]) -> list[nn.Module]:
        return [m for m in self._model.modules() if modules & set(m.modules()) and m not in modules][::-1]

    def _run_initializer(self, module: nn.Module) -> None:
        parent = self._hugging_face.get(module)
        if parent is not None:
            parent._init_weights(module)  # type: ignore[operator]
            return
        for name in ("reset_parameters", "_reset_parameters"):
            reset = getattr(module, name, None)
            if reset is not None and next(module.parameters(recurse=False), None) is not None:
                reset()
                return

    @staticmethod
    def set_data(param: nn.Parameter, value: Tensor) -> None:
        """Points a parameter at `value`; a meta parameter keeps its identity."""
        if param.is_meta:
            attributes = dict(param.__dict__)
            torch.utils.swap_tensors(param, nn.Parameter(value, requires_grad=param.requires_grad))
            attributes.pop("_tierwise_checkpoint", None)
            param.__dict__.update(attributes)
        else:
            param.data = value

    def finish(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves buffers to the compute device. They stay in their own dtype, except running statistics: batch norm wants them as its
        weight is."""
        self._reader = None
        for module in self._model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    raise TierwiseError(
                        f"buffer {name!r} of {type(module).__name__} is on the meta device; build it with tierwise.lazy_init"
                    )
                if buffer is None:
                    continue
                cast = isinstance(module, _NormBase) and buffer.is_floating_point()
                module._buffers[name] = buffer.to(device=device, dtype=dtype if cast else buffer.dtype)


def _owning(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]


def _hugging_face_parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Per module the innermost Hugging Face model around it: its `_init_weights` initialises the module."""
    parents: dict[nn.Module, nn.Module] = {}
    for parent in model.modules():
        if hasattr(parent, "_init_weights"):
            for child in parent.modules():
                parents[child] = parent
    return parents
