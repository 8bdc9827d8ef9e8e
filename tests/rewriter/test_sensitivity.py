"""Statistics of layers against their definition, by autograd, one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from structfly.errors import ArgumentError
from structfly.records.layer import LayerStatistics
from structfly.rewriter.sensitivity import Watched, measure_statistics


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def rows(value: Tensor) -> Tensor:
    return value.reshape(-1, value.shape[-1])


def watched(model: Net) -> dict[str, Watched]:
    layers = {"first": model.first, "second": model.second, "unused": model.unused}
    return {name: Watched(layer, layer.in_features, layer.out_features, rows, True) for name, layer in layers.items()}


def losses(model: nn.Module, batch: Any) -> Tensor:
    """A row of each two tokens is a term; its last token is padding."""
    found: Tensor = model(batch)
    return found[:, :-1].square().sum((1, 2))


def data(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 5, generator=generator) for _ in range(count)]


def make() -> Net:
    torch.manual_seed(0)
    return Net()


def measure(model: Net, **options: Any) -> dict[str, LayerStatistics]:
    return measure_statistics(model, watched(model), data(), losses, progress=False, **options)


def test_statistics_are_those_of_autograd_token_by_token() -> None:
    model = make()
    found = measure(model)
    assert set(found) == {"first", "second"}  # no loss depends on the third
    mean, inputs, gradients, count = torch.zeros(7), torch.zeros(7, 7), torch.zeros(3, 3), 0
    for batch in data():
        hidden = torch.tanh(model.first(batch)).detach()
        out = model.second(hidden).detach().requires_grad_()
        (g,) = torch.autograd.grad(out[:, :-1].square().sum(), out)
        x, g = hidden[:, :-1].reshape(-1, 7), g[:, :-1].reshape(-1, 3)
        mean += x.sum(0)
        inputs += x.t() @ x
        gradients += g.t() @ g
        count += len(x)
    second = found["second"]
    assert second.tokens == count == 3 * 4 * 2
    assert second.input_covariance is not None
    assert second.output_fisher is not None
    assert second.input_mean is not None
    mean /= count
    torch.testing.assert_close(second.input_mean, mean)
    torch.testing.assert_close(second.input_covariance, inputs / count - torch.outer(mean, mean))
    torch.testing.assert_close(second.output_fisher, gradients / (3 * 4))


def test_the_predicted_loss_is_the_measured_one_where_both_are_quadratic() -> None:
    """Of a linear model with a squared loss and sampled targets, the Fisher's prediction is the mean rise."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4, bias=False)
    x = torch.randn(4000, 6) @ torch.randn(6, 6)

    def sampled(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = model(batch)
        return (out * torch.randn_like(out)).sum(1)

    watch = {"layer": Watched(layer, 6, 4, rows, False)}
    (statistics,) = measure_statistics(layer, watch, x.split(500), sampled, progress=False).values()
    change = 0.1 * torch.randn(4, 6)
    rise = 0.5 * (x @ change.t()).square().sum(1).mean()
    assert statistics.loss_of(change) == pytest.approx(float(rise), rel=0.1)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "statistics.safetensors"
    expected = measure(make())
    seen = 0

    def stopped(model: nn.Module, batch: Any) -> Tensor:
        nonlocal seen
        seen += 1
        return losses(model, batch)

    first = data()[:2]
    measure_statistics(model, watched(model), first, stopped, progress=False, resume=path)
    found = measure_statistics(model, watched(model), data(), stopped, progress=False, resume=path)
    assert seen == 3
    for name, each in expected.items():
        torch.testing.assert_close(found[name].input_covariance, each.input_covariance)
        torch.testing.assert_close(found[name].output_fisher, each.output_fisher)
        torch.testing.assert_close(found[name].input_mean, each.input_mean)
        assert found[name].tokens == each.tokens


def test_a_file_of_other_layers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    measure(make(), resume=path)
    other = nn.Linear(5, 5)
    with pytest.raises(ArgumentError, match="holds the statistics of other layers; delete it"):
        measure_statistics(
            other, {"other": Watched(other, 5, 5, rows, True)}, data(), losses, progress=False, resume=path
        )


def test_without_batches_or_gradients_there_is_an_error() -> None:
    model = make()
    with pytest.raises(ArgumentError, match="no batches"):
        measure_statistics(model, watched(model), [], losses, progress=False)
    with pytest.raises(ArgumentError, match="does not depend on any of the layers"):
        measure_statistics(model, watched(model), data(), lambda m, b: losses(m, b).detach(), progress=False)


def test_no_gradient_is_left_and_flags_are_as_before() -> None:
    model = make()
    model.first.weight.requires_grad_(False)
    measure(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.first.parameters()] == [False, True]
    assert model.training
