"""Which parameters move together, and which modules read them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from torch import nn

from tierwise.gemini.chunking import group


def units(model: nn.Module) -> dict[str, list[str]]:
    grouping = group(model)
    return {unit.name: [grouping.chunks[chunk].name for chunk in unit.chunks] for unit in grouping.units}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.head = nn.Linear(2, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def test_layers_are_units_with_everything_inside() -> None:
    assert units(Model()) == {"embed": ["embed"], "layers.0": ["layers.0"], "layers.1": ["layers.1"], "head": ["head"]}
    grouping = group(Model())
    assert grouping.chunks[1].names == [
        "layers.0.experts.0.weight",
        "layers.0.experts.0.bias",
        "layers.0.experts.1.weight",
        "layers.0.experts.1.bias",
        "layers.0.norm.weight",
        "layers.0.norm.bias",
    ]
    assert [unit.recomputable for unit in grouping.units] == [False, True, True, False]


def test_a_tied_parameter_belongs_to_its_first_owner() -> None:
    grouping = group(Model(tied=True))
    assert units(Model(tied=True))["head"] == ["embed"]
    assert len(grouping.chunks) == 3
    weight = grouping.chunks[0].params[0]
    assert grouping.names[weight] == ["embed.weight", "head.weight"]


def test_every_parameter_is_in_one_chunk() -> None:
    for tied in (False, True):
        model = Model(tied)
        grouping = group(model)
        placed = [param for chunk in grouping.chunks for param in chunk.params]
        assert len(placed) == len(set(placed)) == len(list(model.parameters()))
        for index, chunk in enumerate(grouping.chunks):
            for position, param in enumerate(chunk.params):
                assert grouping.place[param] == (index, position)


def test_loose_parameters_make_their_module_a_unit_around_its_children() -> None:
    class Root(Model):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    grouping = group(Root())
    assert units(Root())["Root"] == ["Root"]
    assert grouping.chunks[0].names == ["scale"]
    ancestors = grouping.ancestors()
    assert all(0 in ancestors[unit] for unit in range(1, len(grouping.units)))
    assert ancestors[0] == set()


def test_sequentials() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert units(plain) == {"0": ["0"], "2": ["2"]}
    stages = nn.Sequential(nn.Sequential(Layer(), Layer()), nn.Sequential(Layer()))
    assert list(units(stages)) == ["0.0.experts.0", "0.0.experts.1", "0.0.norm"] + [
        f"{name}.{part}" for name in ("0.1", "1.0") for part in ("experts.0", "experts.1", "norm")
    ]
    wrapped = nn.Sequential(Model(), nn.Linear(4, 4))
    assert list(units(wrapped)) == ["0.embed", "0.layers.0", "0.layers.1", "0.head", "1"], "a whole model is not one unit"


def test_a_module_used_twice_is_one_unit() -> None:
    layer = Layer()
    model = nn.ModuleList([layer, layer])
    assert list(units(model)) == ["0"]


def test_batch_norm_is_not_recomputed() -> None:
    block: Any = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    assert [unit.recomputable for unit in group(block).units] == [False, False]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

    assert [unit.recomputable for unit in group(nn.ModuleList([Block()])).units] == [False]


def test_nothing_to_boost() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        group(nn.ReLU())
