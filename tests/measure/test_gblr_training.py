"""The training run of layers with learned masks: what it learns from, what it writes, and what is read back."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import gblr_training
from structfly.patterns.width_budget import WidthBudget


def test_every_tenth_document_is_held_out() -> None:
    data = gblr_training.Bytes.of([chr(ord("a") + at) for at in range(12)])
    assert bytes(data.held_out.tolist()) == b"ak"
    assert bytes(data.training.tolist()) == b"bcdefghijl"


def test_the_byte_that_follows_is_the_target() -> None:
    source = torch.arange(100, dtype=torch.uint8)
    windows, following = gblr_training.drawn(source, 4, 10, torch.Generator().manual_seed(0))
    assert torch.equal(windows[:, 1:] - windows[:, :-1], torch.ones(10, 3, dtype=torch.long))
    assert torch.equal(following, windows[:, -1] + 1)


def test_masks_are_intervals_in_the_end() -> None:
    sigmas = [gblr_training.sigma_at(step, 1000) for step in range(1000)]
    assert sigmas[0] == 1
    assert sigmas == sorted(sigmas)
    assert all(map(math.isinf, sigmas[800:]))
    assert math.isfinite(sigmas[799])


def test_a_run_meets_its_target_and_its_masks_are_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gblr_training.SIZES, "cpu", {"window": 4, "embedding": 8, "batch": 16})
    monkeypatch.setattr(gblr_training, "_EVALUATED", 64)
    monkeypatch.setattr(gblr_training, "_MULTIPLE", 8)
    monkeypatch.setattr(gblr_training, "python_sources", lambda: [f"x = {number}\n" * 20 for number in range(40)])
    output = tmp_path / "result"
    assert gblr_training.main(["--device", "cpu", "--steps", "60", "--output", str(output)]) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    losses = {row["mode"]: row["p50"] for row in rows if row["metric"] == "held_out_loss"}
    before = losses.pop("60 steps")
    assert all(after == pytest.approx(before, rel=1e-5) for after in losses.values())
    densities = {row["provider"]: row["p50"] for row in rows if row["metric"] == "density"}
    layers = gblr_training.layers_of(tmp_path / "result.json", dtype=torch.float32)
    assert [(*layer.sizes,) for layer in layers.values()] == [(32, 32), (32, 128)]
    for name, layer in layers.items():
        assert densities[name] == pytest.approx(gblr_training.density(layer))
        assert densities[name] == pytest.approx(0.25, abs=0.05)  # widths are rounded to whole features
        assert WidthBudget(layer, 1.0, 1.0).cost() == pytest.approx(densities[name])
    fills = [row["p50"] for row in rows if row["metric"] == "fill"]
    assert len(fills) == 2 * len(gblr_training.SIDES)
    assert all(0 < fill <= 1 for fill in fills)
