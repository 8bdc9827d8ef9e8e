"""The rates of a device: measured, kept, and what is predicted from them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from structfly import Budget, restructure_
from structfly.layer_times import rates, store
from structfly.layer_times.rates import measured_rates, profile_on
from structfly.layer_times.store import DeviceRates, TimesFile, read_times, write_times
from structfly.lowering.device_profile import device_profile
from structfly.rewriter.layer_costs import Conditions, dense_cost
from tests.layer_times.fabricated import CPU, HERE, SMALL
from tests.restructure.models import make

positive = st.floats(1e-9, 1e15)


def made(rate: float, bandwidth: float = 1e9, launch: float = 1e-6, **origin: str) -> DeviceRates:
    return DeviceRates(
        **HERE._replace(**origin)._asdict(),
        matrix_rate={"float32": rate},
        bandwidth=bandwidth,
        launch_seconds=launch,
    )


@given(rate=positive, bandwidth=positive, launch=positive, tokens=st.integers(1, 9000))
def test_the_roofline_is_that_of_the_measured_rates(rate: float, bandwidth: float, launch: float, tokens: int) -> None:
    """The longest of arithmetic, traffic and a launch."""
    profile = profile_on(CPU, HERE, TimesFile(devices=(made(rate, bandwidth, launch),)))
    predicted = Conditions(tokens, profile).amounts(dense_cost(*SMALL))["time"]
    inputs, outputs = SMALL.sizes
    arithmetic = 2 * tokens * inputs * outputs / rate * (1 + profile.half_rate_rows / tokens)
    traffic = 4 * (tokens * inputs + inputs * outputs + tokens * outputs) / bandwidth
    assert predicted == pytest.approx(max(arithmetic, traffic, launch))


def test_rates_of_what_was_not_measured_stay_and_those_of_others_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = device_profile(CPU)
    others = TimesFile(devices=(made(1.0, device="another"), made(2.0, torch="2.0")))
    assert profile_on(CPU, HERE, others) == plain
    measured = profile_on(CPU, HERE, TimesFile(devices=(made(3.0),)))
    assert measured.matrix_rate == {**plain.matrix_rate, torch.float32: 3.0}
    monkeypatch.setattr(rates, "shipped_files", lambda: iter([others]))  # any torch, but this device
    assert profile_on(CPU, HERE, TimesFile()).rate(torch.float32) == 2.0
    assert profile_on(CPU, HERE, TimesFile(devices=(made(3.0),))).rate(torch.float32) == 3.0


def test_they_are_measured_and_kept_precision_by_precision() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        first = measured_rates(HERE, CPU, [torch.float32, torch.float64])
    assert first.matrix_rate.keys() == {"float32", "float64"}
    assert 1e8 < first.matrix_rate["float64"] < 1e14
    assert 1e8 < first.bandwidth < 1e13
    assert 1e-8 < first.launch_seconds < 1e-2
    file = TimesFile().with_rates(made(1.0, device="another")).with_rates(first).with_rates(made(5.0))
    write_times(store.user_path(), file)
    other, here = read_times(store.user_path()).devices
    assert (other.device, other.matrix_rate) == ("another", {"float32": 1.0})
    assert here.matrix_rate == {"float32": 5.0, "float64": first.matrix_rate["float64"]}
    assert here.bandwidth == 1e9
    with pytest.raises(ValueError, match=r"devices\.1 is of the same device as devices\.0; remove one"):
        TimesFile(devices=(first, first))


def test_plans_under_a_budget_of_time_predict_from_them() -> None:
    write_times(store.user_path(), TimesFile(devices=(made(1e15, 1e15, 7.0),)))
    plan = restructure_(make(), Budget(time=2.0), tokens=64, timing_seconds=0, progress=False)
    assert {each.costs["time"] for each in plan.layers.values()} == {7.0}  # a launch
