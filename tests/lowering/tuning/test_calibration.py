"""``structfly.tune`` and the command line, with a stand-in for the GPU and its clock."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import structfly
from structfly import calibration
from structfly.calibration import search_products
from structfly.cli import main
from structfly.errors import ArgumentError, StructflyError, UnsupportedError
from structfly.lowering.device_profile import device_profile
from structfly.lowering.gemm import TORCH_MM, Tiles
from structfly.lowering.linear_cross_entropy.tiles import PRODUCTS, HeadTiles, head_class, head_tiles
from structfly.lowering.tuning.table import Table, read_user_table, user_path
from structfly.records import DeviceProfile
from tests.lowering.tuning.conftest import forget
from tests.patterns.linear_cross_entropy.test_menu import H100

pytestmark = pytest.mark.usefixtures("cache")

SHAPE = (16384, 2048, 131072)
KIND = head_class(H100.model, hidden=2048, classes=131072, weight_row=2048, nonlinear=False)


class Timer:
    """Products with tiles of 64 rows are the fastest."""

    def __init__(self, *_: Any) -> None:
        pass

    def seconds(self, name: str, tiles: HeadTiles) -> float:
        cut = getattr(tiles, name)
        if cut == TORCH_MM:
            return 0.75e-3
        if cut.stages == 4:
            raise UnsupportedError("OutOfResources: more than there is\nand more")
        return 1e-3 * (0.5 if cut.m == 64 else 1.0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> DeviceProfile:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(calibration, "device_profile", lambda _: H100)
    monkeypatch.setattr(calibration, "HeadTimer", Timer)
    return H100


def test_the_fastest_are_kept_and_used_in_the_next_process(gpu: DeviceProfile) -> None:
    report = structfly.tune([SHAPE])
    assert report.in_effect
    assert report.path == user_path()
    assert len(read_user_table().products) == len(PRODUCTS)
    tiles = head_tiles(KIND)
    assert {getattr(tiles, name).m for name in PRODUCTS} == {64}
    other = head_class(H100.model, hidden=1024, classes=131072, weight_row=1024, nonlinear=False)
    assert head_tiles(other).exponentials.m == 128
    assert head_tiles(other).block_hidden_sum.m == 128


def test_a_process_that_has_chosen_keeps_to_it(gpu: DeviceProfile) -> None:
    before = head_tiles(KIND)
    report = structfly.tune([SHAPE])
    assert not report.in_effect
    assert "processes that start from now on will use them" in str(report)
    assert head_tiles(KIND) == before
    forget()
    assert head_tiles(KIND) != before


def test_tuning_again_starts_from_what_was_found() -> None:
    def seconds_of(name: str, tiles: HeadTiles) -> float:
        cut = getattr(tiles, name)
        return 0.5 if cut != TORCH_MM and cut.group == 7 else 1.0

    shipped = search_products(KIND, seconds_of, Table(), until=1e9, clock=lambda: 0.0)
    chosen = [found.chosen for found in shipped]
    assert all(isinstance(cut, Tiles) and cut.group != 7 for cut in chosen)
    tuned = Tiles(m=64, n=128, k=32, group=7, parts=2, warps=4, stages=2)
    table = Table().with_choices([(found.product, tuned) for found in shipped])
    again = search_products(KIND, seconds_of, table, until=1e9, clock=lambda: 0.0)
    assert [found.chosen for found in again] == [tuned] * len(PRODUCTS)


def test_the_time_is_shared_by_the_products() -> None:
    now = 0.0

    def seconds_of(*_: Any) -> float:
        nonlocal now
        now += 1.0
        return 1.0

    searches = search_products(KIND, seconds_of, Table(), until=35.0, clock=lambda: now)
    assert now <= 35.0 + len(PRODUCTS)
    assert min(len(found.trials) for found in searches) >= 4


def test_the_command_prints_what_was_tried(gpu: DeviceProfile, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "--shapes", "16384x2048x131072", "4096x768x50257", "--dtype", "bfloat16", "--softcap", "30"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "16384x2048x131072, softcap" in printed
    assert "4096x768x50257, softcap" in printed
    assert printed.count("  chosen") == 2 * len(PRODUCTS)
    assert "OutOfResources: more than there is\n" in printed
    assert "exponentials: linear_cross_entropy_exponentials (stored, nonlinear), nt" in printed
    assert f"Kept in {user_path()}; this process will use them." in printed


def test_without_a_gpu_the_command_says_so_and_exits_2(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["calibrate", "--shapes", "16384x2048x131072"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert main(["calibrate", "--shapes", "16384x2048x131072", "--device", "cpu"]) == 2
    assert "device is 'cpu'" in capsys.readouterr().err
    assert not user_path().exists()


def test_the_package_is_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "structfly", "calibrate", "--shapes", "1x2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "'1x2' is no shape; allowed: tokens x hidden units x classes" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": []}, "shapes is empty"),
        ({"shapes": [(1, 2)]}, r"a shape is \(1, 2\); allowed: rows, hidden units and classes, all above 0"),
        ({"shapes": [(1, 8, 0)]}, r"a shape is \(1, 8, 0\)"),
        ({"shapes": [(64, 12, 100)]}, "a shape has 12 hidden units; generated products take multiples of 8"),
        ({"shapes": [SHAPE], "dtype": torch.float16}, "dtype is torch.float16; allowed: torch.bfloat16"),
        ({"shapes": [SHAPE], "seconds": 0}, "seconds is 0; allowed: a number above 0"),
    ],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        structfly.tune(**arguments)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_timed(
    gpu: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STRUCTFLY_CACHE_DIR", "/proc/structfly")
    monkeypatch.setattr(Timer, "seconds", lambda *_: pytest.fail("timed"))
    with pytest.raises(StructflyError, match="tuned tiles cannot be kept in"):
        structfly.tune([SHAPE])


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"transposed": True}, {"softcap": 30.0}])
def test_tuning_on_a_gpu(options: dict[str, Any]) -> None:
    report = structfly.tune([(4096, 512, 32000)], seconds=30.0, **options)
    (searches,) = report.searches
    assert all(found.trials[0].seconds for found in searches)
    assert all(trial.seconds is None or trial.seconds > 0 for found in searches for trial in found.trials)
    assert {found.product.device for found in searches} == {device_profile(torch.device("cuda")).model}
    assert len(read_user_table().products) == len(PRODUCTS)
