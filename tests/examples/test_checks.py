"""The demo's checks pass what is right and fail what is wrong."""

import math

import pytest
import torch
from torch import Tensor

from examples import checks

UNIT = 2.0**-24
EAGER = [4.0, 3.0, 2.0, 1.0]
PERTURBED = [4.0, 3.001, 2.0005, 1.002]


def first_steps() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """An exact first step, and one whose relative errors are all 1e-6."""
    generator = torch.Generator().manual_seed(0)
    exact = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in {
            "loss": (),
            "token_losses": (64,),
            "gradient.a": (8, 8),
            "gradient.b": (32,),
        }.items()
    }
    return exact, {name: value * (1 + 1e-6) for name, value in exact.items()}


def test_relative_error_is_frobenius() -> None:
    error = checks.relative_error(torch.tensor([3.0, 4.0 + 0.5]), torch.tensor([3.0, 4.0]))
    assert error == pytest.approx(0.1)


@pytest.mark.parametrize("factor", [0.0, 1.0, -1.9])
def test_errors_up_to_twice_eagers_pass(factor: float) -> None:
    exact, eager = first_steps()
    run = {name: value * (1 + factor * 1e-6) for name, value in exact.items()}
    assert all(v.passed for v in checks.check_first_step(run, eager, exact, unit=UNIT))


@pytest.mark.parametrize("name", ["loss", "gradient.a", "gradient.b"])
@pytest.mark.parametrize("factor", [1 + 2.2e-6, math.nan])
def test_one_wrong_tensor_fails(name: str, factor: float) -> None:
    exact, eager = first_steps()
    run = {**exact, name: exact[name] * factor}
    verdicts = {v.name: v for v in checks.check_first_step(run, eager, exact, unit=UNIT)}
    wrong = "first loss" if name == "loss" else "first gradients"
    assert [v for v in verdicts if not verdicts[v].passed] == [wrong]
    if name != "loss":
        assert name.removeprefix("gradient.") in verdicts[wrong].detail


def test_a_missing_gradient_fails() -> None:
    exact, eager = first_steps()
    run = {name: value for name, value in exact.items() if name != "gradient.b"}
    verdict = checks.check_first_step(run, eager, exact, unit=UNIT)[1]
    assert not verdict.passed
    assert "gradient.b" in verdict.detail


def test_the_band_grows_with_the_perturbation() -> None:
    allowed = checks.band(EAGER, PERTURBED, own_error=0.0, unit=0.0)
    assert allowed == pytest.approx([0.0, 4e-3, 4e-3, 8e-3])
    allowed = checks.band(EAGER, EAGER, own_error=1e-3, unit=1e-4)
    assert allowed == pytest.approx([3.1e-3 * loss for loss in EAGER])


def test_a_curve_inside_the_band_passes() -> None:
    allowed = checks.band(EAGER, PERTURBED, own_error=1e-6, unit=UNIT)
    verdict = checks.check_curve([4.0, 3.002, 1.998, 1.004], EAGER, allowed)
    assert verdict.passed
    assert "at most 50% of the band" in verdict.detail


@pytest.mark.parametrize("curve", [[4.0, 3.0, 2.0, 1.01], [4.0, 3.0, 2.0, math.nan], [4.01, 3.0, 2.0, 1.0]])
def test_a_wrong_curve_fails(curve: list[float]) -> None:
    allowed = checks.band(EAGER, PERTURBED, own_error=1e-6, unit=UNIT)
    verdict = checks.check_curve(curve, EAGER, allowed)
    assert not verdict.passed
    assert f"step {3 if curve[0] == 4.0 else 0}" in verdict.detail


def test_a_shorter_curve_is_an_error() -> None:
    with pytest.raises(ValueError, match="argument 2 is longer"):
        checks.check_curve([4.0], EAGER, [1.0] * 4)
