"""Groups parameters by module: chunks (what moves as one) and units (modules that read chunks)."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclasses.dataclass
class Chunk:
    """Parameters that move as one, in a fixed order."""

    name: str
    params: list[nn.Parameter]
    names: list[str]


@dataclasses.dataclass
class Unit:
    """A module whose forward and backward read chunks."""

    name: str
    module: nn.Module
    chunks: list[int]
    recomputable: bool
    params: list[nn.Parameter]
    """Parameters that its forward may read; a parent's children that are units of their own are not among them."""


@dataclasses.dataclass
class Grouping:
    """Chunks and units of a model. The order is the model's own, so it does not depend on any plan."""

    chunks: list[Chunk]
    units: list[Unit]
    place: dict[nn.Parameter, tuple[int, int]]
    """Parameter -> (chunk, position in the chunk)."""
    names: dict[nn.Parameter, list[str]]
    """Parameter -> all its qualified names; tied parameters have several."""

    def ancestors(self) -> list[set[int]]:
        """Per unit: the units whose modules contain its module."""
        inside = [set(map(id, unit.module.modules())) for unit in self.units]
        return [
            {other for other in range(len(self.units)) if other != unit and id(self.units[unit].module) in inside[other]}
            for unit in range(len(self.units))
        ]


def group(model: nn.Module, trained: Container[nn.Parameter] | None = None) -> Grouping:
    """Groups the parameters of `model`; `trained` are those that an optimizer steps, by default those that require gradients.

    Elements of ModuleLists, ModuleDicts and Sequentials are units with everything inside them (decoder layers); every other module that
    owns parameters directly is a unit of its own (embedding, norm, head, or a root with loose parameters). A unit whose parameters are
    trained in part has two chunks, so that adapters are stepped wherever that is best and the frozen rest is only read. A tied parameter
    belongs to the chunk of its first owner, and every unit that reads it lists that chunk.

    Raises ValueError for a model without parameters.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(name)
    if not names:
        raise ValueError(f"{type(model).__name__} has no parameters: there is nothing to boost")
    if trained is None:
        trained = {param for param in names if param.requires_grad}
    grouping = Grouping([], [], {}, names)
    seen: set[int] = set()
    for name, module, whole in _unit_modules(model, "", False):
        if id(module) in seen:
            continue
        seen.add(id(module))
        _add_unit(grouping, name, module, list(module.parameters(recurse=whole)), whole, trained)
    return grouping


def _add_unit(
    grouping: Grouping, name: str, module: nn.Module, params: list[nn.Parameter], whole: bool, trained: Container[nn.Parameter]
) -> None:
    new = [param for param in params if param not in grouping.place]
    shared = [grouping.place[param][0] for param in params if param in grouping.place]
    chunks = list(dict.fromkeys(shared))
    stepped, frozen = [param for param in new if param in trained], [param for param in new if param not in trained]
    called = name or type(module).__name__
    for own, suffix in ((stepped, ""), (frozen, " (frozen)" if stepped else "")):
        if not own:
            continue
        index = len(grouping.chunks)
        grouping.chunks.append(Chunk(called + suffix, own, [grouping.names[param][0] for param in own]))
        for position, param in enumerate(own):
            grouping.place[param] = (index, position)
        chunks.append(index)
    # Recomputing a batch norm would update its running statistics twice.
    stateful = any(isinstance(m, _BatchNorm) and m.track_running_stats for m in module.modules())
    recomputable = whole and not stateful and next(module.children(), None) is not None
    grouping.units.append(Unit(name or type(module).__name__, module, chunks, recomputable, params))


def _unit_modules(module: nn.Module, name: str, element: bool) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields (qualified name, module, whether everything inside belongs to it) in definition order."""
    container = isinstance(module, _CONTAINERS)
    if element and not container:
        if next(module.parameters(), None) is not None:
            yield name, module, True
        return
    if next(module.parameters(recurse=False), None) is not None:
        yield name, module, False
    for child_name, child in module.named_children():
        qualified = f"{name}.{child_name}" if name else child_name
        yield from _unit_modules(child, qualified, container and _is_block(module, child))


def _is_block(parent: nn.Module, child: nn.Module) -> bool:
    """Whether a container's element is one unit. A whole model inside a Sequential is not: its own layers are."""
    if isinstance(parent, nn.Sequential):
        return not any(isinstance(m, nn.ModuleList) for m in child.modules())
    return True
