"""A restructured model is the same again in a new process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from structfly import Budget, from_pretrained, save_pretrained
from structfly.errors import PlanError
from tests.restructure.models import Net, batches, make
from tests.restructure.test_restructure import plan_for

SCRIPT = """
import sys
import torch
from structfly import from_pretrained
from tests.restructure.models import Net, batches
model = from_pretrained(Net(), sys.argv[1])
torch.save(model(batches()[0]).detach(), sys.argv[2])
"""


def test_a_new_process_gives_the_same_outputs(tmp_path: Path) -> None:
    model = make()
    plan_for(Budget(params=0.6), model)
    save_pretrained(model, tmp_path / "model")
    outputs = tmp_path / "outputs.pt"
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(outputs)], check=True)
    assert torch.equal(torch.load(outputs), model(batches()[0]))


def test_a_model_on_the_meta_device_is_filled(tmp_path: Path) -> None:
    model = make()
    plan_for(Budget(params=0.6), model)
    save_pretrained(model, tmp_path)
    with torch.device("meta"):
        empty = Net()
    again = from_pretrained(empty, tmp_path, device="cpu")
    assert torch.equal(again(batches()[0]), model(batches()[0]))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    def tied() -> Net:
        model = make()
        model.conv = nn.Conv2d(32, 32, 1)
        model.lm_head = nn.Linear(32, 50, bias=False)
        model.lm_head.weight = model.embedding.weight
        return model

    model = tied()
    plan = plan_for(Budget(params=0.6), model, exclude=[])
    assert plan.left["lm_head"] == "its weight is shared with another module"
    save_pretrained(model, tmp_path)
    again = from_pretrained(tied(), tmp_path)
    assert again.lm_head.weight is again.embedding.weight  # type: ignore[union-attr]
    assert torch.equal(again(batches()[0]), model(batches()[0]))


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = make()
    plan_for(Budget(params=0.6), model)
    save_pretrained(model, tmp_path)
    with pytest.raises(PlanError, match=r"the plan restructures '.*' of .*; in this model: there is no such layer"):
        from_pretrained(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(PlanError, match=r"has no structfly.json; give a folder that save_pretrained has written"):
        from_pretrained(make(), tmp_path / "nothing")
