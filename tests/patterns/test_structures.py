"""What every structure offers, and what it says that this costs."""

from __future__ import annotations

import pytest
import torch

from structfly.patterns.pixelfly import Pixelfly
from structfly.patterns.structure import Structure
from structfly.patterns.structures import STRUCTURES
from structfly.records.layer import NO_STATISTICS, LayerSizes
from tests.patterns.costs import check_cost
from tests.patterns.structures import statistics_of

SIZES = [LayerSizes(200, 330), LayerSizes(256, 128), LayerSizes(101, 104)]


def choices(structure: type[Structure], sizes: LayerSizes) -> list[Structure]:
    """Of a menu some, and each of these with all switches turned."""
    some = structure.menu(sizes)[::3]
    switches = [name for name, field in structure.model_fields.items() if field.annotation is bool]
    turned = [each.model_copy(update={name: not getattr(each, name)}) for each in some for name in switches]
    return [*some, *turned]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", STRUCTURES)
def test_costs_are_what_a_layer_keeps_takes_and_multiplies(name: str, sizes: LayerSizes) -> None:
    torch.manual_seed(0)
    for structure in choices(STRUCTURES[name], sizes):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 64):
                promised = check_cost(structure, sizes, dtype, tokens)
            assert promised < 3


def test_a_gate_is_among_the_switches() -> None:
    assert any(isinstance(each, Pixelfly) and each.gated for each in choices(Pixelfly, LayerSizes(256, 128)))


@pytest.mark.parametrize("sizes", [*SIZES, LayerSizes(384, 1536), LayerSizes(9, 5), LayerSizes(1, 1)])
@pytest.mark.parametrize("name", STRUCTURES)
def test_what_is_offered_fits_saves_parameters_and_is_offered_once(name: str, sizes: LayerSizes) -> None:
    menu = STRUCTURES[name].menu(sizes)
    assert [structure.why_not(sizes) for structure in menu] == [""] * len(menu)
    assert all(structure.cost(sizes, torch.float32).at(1)["parameters"] < sizes.parameters for structure in menu)
    assert len(set(menu)) == len(menu)


@pytest.mark.parametrize("with_statistics", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_projections_of_several_settings_are_those_of_each(name: str, with_statistics: bool) -> None:
    """What they share is not changed by any."""
    sizes, structure = LayerSizes(128, 96), STRUCTURES[name]
    weight = torch.randn(96, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = statistics_of(sizes) if with_statistics else NO_STATISTICS
    menu = structure.menu(sizes)
    some = [menu[0], menu[-1], menu[0]]
    for each, made in zip(some, structure.project_each(some, weight, statistics), strict=True):
        torch.testing.assert_close(made, each.project(weight, statistics))
