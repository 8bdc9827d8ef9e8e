"""Quasi-recurrent networks."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structfly.errors import ArgumentError
from structfly.lowering.linear_recurrence.arguments import ProjectedArguments
from structfly.lowering.linear_recurrence.projected import fastest_cut
from structfly.lowering.linear_recurrence.projected_steps import in_one
from structfly.nn.window_product import projected
from structfly.nn.window_recurrence import why_in_two
from structfly.ops.joint_recurrence import joint_linear_recurrence
from structfly.ops.recurrence import linear_recurrence

_POOLINGS = {"f": "zf", "fo": "zfo", "ifo": "zfoi"}  # and what a unit takes, in the order of its projection


class QRNNState(NamedTuple):
    """What one call of :class:`QRNN` leaves to the next.

    Attributes:
        cell: (directions, B, H) states c, float32, or float64 for float64 inputs.
        window: (directions, B, window - 1, I) the inputs that the window reaches back to, in the order of time.
    """

    cell: Tensor
    window: Tensor


def _last(input: Tensor, beside: Tensor, *, reverse: bool) -> Tensor:
    """As many steps as lie beside the input: those that lie beside what comes next."""
    reach = beside.shape[1]
    if reverse:
        return torch.cat([input[:, :reach], beside], 1)[:, :reach]
    seen = torch.cat([beside, input[:, max(input.shape[1] - reach, 0) :]], 1)
    return seen[:, seen.shape[1] - reach :]


class QRNN(nn.Module):
    """A quasi-recurrent layer: a convolution over time makes candidates and gates, a gated recurrence pools them.

        z_t = tanh(W_z x),   f_t = sigmoid(W_f x),   o_t = sigmoid(W_o x),   i_t = sigmoid(W_i x)

    of x = (x_{t-window+1}, ..., x_t), with biases, and

        "f"     h_t = f_t h_{t-1} + (1 - f_t) z_t
        "fo"    c_t = f_t c_{t-1} + (1 - f_t) z_t,    h_t = o_t c_t
        "ifo"   c_t = f_t c_{t-1} + i_t z_t,          h_t = o_t c_t

    Args:
        input_size: I, features of the input.
        hidden_size: H, units.
        pooling: "f", "fo" or "ifo".
        window: steps that the convolution sees, the present one the last.
        bidirectional: a second layer goes through time the other way, with the window on its other side, and its h
            stand beside the first one's.
        zoneout: probability that a unit keeps its state through a step, in training; otherwise the state moves by
            1 - zoneout of what it would, the expectation.
        bias: whether there are biases.
        device, dtype: of the parameters.

    The parameters are those of one :class:`torch.nn.Linear` a direction, ``projections``, from (window I) features,
    the earliest step first, to those of z, f, o and i, in this order, as many as the pooling has.

    Raises:
        ArgumentError: a size is below 1, the pooling is none of these, or zoneout not in [0, 1).

    Source: Bradbury et al. 2017.  Zoneout: Krueger et al. 2017.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        pooling: str = "fo",
        window: int = 1,
        bidirectional: bool = False,
        zoneout: float = 0.0,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"input_size": input_size, "hidden_size": hidden_size, "window": window}.items():
            if value < 1:
                raise ArgumentError(f"{name} is {value}; allowed: from 1 up")
        if pooling not in _POOLINGS:
            raise ArgumentError(f"pooling is {pooling!r}; allowed: {', '.join(map(repr, _POOLINGS))}")
        if not 0.0 <= zoneout < 1.0:
            raise ArgumentError(f"zoneout is {zoneout}; allowed: from 0 up to, but not, 1")
        self.input_size, self.hidden_size, self.pooling, self.window = input_size, hidden_size, pooling, window
        self.bidirectional, self.zoneout = bidirectional, zoneout
        self.projections = nn.ModuleList(
            nn.Linear(window * input_size, len(_POOLINGS[pooling]) * hidden_size, bias=bias, device=device, dtype=dtype)
            for _ in range(2 if bidirectional else 1)
        )

    def forward(self, input: Tensor, state: QRNNState | None = None) -> tuple[Tensor, QRNNState]:
        """h of every step, and the state to go on from.

        Args:
            input: (B, T, I) in the parameters' dtype.
            state: of the steps before, as an earlier call returned it (a direction that goes back through time had it
                of the steps after); None for zeros.

        Returns:
            (B, T, H), or with both directions (B, T, 2 H), and the new state.

        Raises:
            ArgumentError: a shape is not as above.
        """
        self._check(input, state)
        outputs, cells, lasts = [], [], []
        for direction, projection in enumerate(self.projections):
            reverse = direction == 1
            cell = None if state is None else state.cell[direction]
            beside = self._beside(input, None if state is None else state.window[direction])
            order = _POOLINGS[self.pooling]
            if self.zoneout or why_in_two(projection, input, beside, order, cell):
                made = projected(projection, input, beside, reverse=reverse)
                output, cell = self._pooled(made, cell, reverse=reverse)
            else:
                weight: Any = projection.weight
                bias: Any = projection.bias
                call = ProjectedArguments(input, beside, weight, bias, cell, order, self.window, reverse, False)
                output, cell = in_one(call, fastest_cut(order, input.dtype))
            outputs.append(output)
            cells.append(cell)
            lasts.append(_last(input, beside, reverse=reverse))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return output, QRNNState(torch.stack(cells), torch.stack(lasts))

    def _beside(self, input: Tensor, window: Tensor | None) -> Tensor:
        """The steps beside the input that windows reach."""
        if window is None:
            return input.new_zeros(input.shape[0], self.window - 1, self.input_size)
        return window

    def _pooled(self, projected: Tensor, cell: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        order = _POOLINGS[self.pooling]
        options: dict[str, Any] = {
            "complement": "i" not in order,
            "gate_activation": "sigmoid",
            "input_activation": "tanh",
            "initial_state": cell,
            "reverse": reverse,
        }
        if not self.zoneout:
            return joint_linear_recurrence(projected, order, **options)
        z, f, *others = projected.split(self.hidden_size, -1)
        o = others[0] if others else None
        f, i = self._zoned_out(f, others[1] if len(others) > 1 else None)
        return linear_recurrence(f, z, input_gate=i, output_gate=o, **options)

    def _zoned_out(self, f: Tensor, i: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The logits of gates that keep the state, or in evaluation that move it by q = 1 - p of what it moved.

        Where y is the logit of f, that of f' with 1 - f' = q (1 - f) is log((p + e^y) / q); where it is that of i, the
        logit of q i is y + log q - log(1 + p e^y).
        """
        p = self.zoneout
        if self.training:
            kept = torch.rand_like(f, dtype=torch.float32) < p
            return f.masked_fill(kept, math.inf), None if i is None else i.masked_fill(kept, -math.inf)
        log_q = math.log1p(-p)
        f = torch.logaddexp(f, f.new_tensor(math.log(p))) - log_q
        return f, None if i is None else i + log_q - torch.nn.functional.softplus(i + math.log(p))

    def _check(self, input: Tensor, state: QRNNState | None) -> None:
        if input.ndim != 3 or input.shape[2] != self.input_size:
            raise ArgumentError(
                f"input has shape {tuple(input.shape)}; allowed: (batch, steps, {self.input_size}); for one stored "
                "(steps, batch, features) use input.transpose(0, 1)"
            )
        if state is None:
            return
        first = (len(self.projections), input.shape[0])
        cell, window = (*first, self.hidden_size), (*first, self.window - 1, self.input_size)
        for name, tensor, shape in (("cell", state.cell, cell), ("window", state.window, window)):
            if tuple(tensor.shape) != shape:
                raise ArgumentError(
                    f"the state's {name} has shape {tuple(tensor.shape)}; allowed: {shape}; pass what this layer "
                    "returned for a batch of this size"
                )

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, pooling={self.pooling!r}, window={self.window}, "
            f"bidirectional={self.bidirectional}, zoneout={self.zoneout}"
        )
