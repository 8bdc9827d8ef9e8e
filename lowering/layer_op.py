"""Ops that apply a linear layer whose weight is made of factors: schema, fake, autograd, autocast and vmap, once.

Every structure has one such op.  It takes ``x`` (*rows, in), the factors and a bias (out,) and gives ``y`` (*rows, out)
with what its backward needs of the way there; nothing of the size of the dense weight is ever made.  What is kept for
backward is a choice of each call: with ``keep`` off the backward makes it again from ``x`` (rematerialisation).  So is
an activation of y, for calls whose gradients nobody wants: a backward would need what it was applied to.

Which products are made, and so how what is kept is stored, may depend on whether TF32 is allowed.  That is an argument,
too: a backward makes the same products as its forward, and compiled graphs are found again by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from structfly.errors import UnsupportedError
from structfly.lowering.activations import activated
from structfly.lowering.layer_products import Applied, Backward, Between, Finish, InChunks
from structfly.lowering.precision import tf32_allowed
from structfly.lowering.replay.replayed import replayed
from structfly.lowering.vmap import one_by_one

DEVICES = ("cpu", "cuda")
_BY_TORCH = "its products are torch's, and Inductor gives them their epilogues"
_LIBRARY = torch.library.Library("structfly", "FRAGMENT")


class _Forward(NamedTuple):
    """What an op is called with, in its schema's order."""

    x: Tensor
    factors: Sequence[Tensor]
    bias: Tensor | None
    static: Sequence[int]
    keep: bool
    activation: str
    tf32: bool


class _Backward(NamedTuple):
    """What its backward is called with, in its schema's order."""

    grad: Tensor
    x: Tensor
    factors: Sequence[Tensor]
    kept: Sequence[Tensor]
    static: Sequence[int]
    wanted: Sequence[bool]
    tf32: bool


Shapes = Sequence[Sequence[int]]
# (x (*rows, in), factors, bias, static) -> y (*rows, out), in torch's own operations
Plain = Callable[[Tensor, Sequence[Tensor], Tensor | None, Sequence[int]], Tensor]


FORWARD_OPS: dict[Any, LayerOp] = {}
"""All that were made, by the overload that applies them."""


class LayerOp:
    """One op, registered as ``structfly::{name}`` when the object is made.

    Args:
        name: with an ABI version, which goes up with any change of the schema, the fake or the autograd formula.
        between, finish: the forward in two steps, on matrices; backward makes the first again where nothing was kept.
        backward: the gradients, on matrices.
        out_features: of the factors' shapes and the static numbers.
        kept_shapes: of N rows, the factors' shapes and the static numbers: the shapes of what is made between.
        multiply_adds: of the same: those of each of the two steps; the backward has as many as both for x, and again
            for the factors.
        adds_bias: whether ``finish``, and a forward in chunks, add the bias within their products; else it is added
            to what they give.
        why_no_epilogue: says of a call why ``finish``, and a forward in chunks, do not apply an activation within
            their products, or "" where they do; None where they never do.
        in_chunks: takes their place where nothing is kept and it has nothing against the call, or None.
        plain: the layer in torch's own operations, where the op adds nothing to them: a compiler is given those.
    """

    def __init__(
        self,
        name: str,
        *,
        between: Between,
        finish: Finish,
        backward: Backward,
        out_features: Callable[[Shapes, Sequence[int]], int],
        kept_shapes: Callable[[int, Shapes, Sequence[int]], list[tuple[int, ...]]],
        multiply_adds: Callable[[int, Shapes, Sequence[int]], tuple[int, int]],
        adds_bias: bool = False,
        why_no_epilogue: Callable[[Applied], str] | None = None,
        in_chunks: InChunks | None = None,
        plain: Plain | None = None,
    ) -> None:
        self.name, self.between, self.finish, self.backward = name, between, finish, backward
        self.out_features, self.kept_shapes, self.multiply_adds = out_features, kept_shapes, multiply_adds
        self.adds_bias, self.plain = adds_bias, plain
        self._why_no_epilogue, self._in_chunks = why_no_epilogue, in_chunks
        forward_name, backward_name = f"structfly::{name}", f"structfly::{name}_backward"
        torch.library.define(
            forward_name,
            "(Tensor x, Tensor[] factors, Tensor? bias, int[] static, bool keep, str activation, bool tf32)"
            " -> (Tensor y, Tensor[] kept)",
        )
        torch.library.define(
            backward_name,
            "(Tensor grad, Tensor x, Tensor[] factors, Tensor[] kept, int[] static, bool[] wanted, bool tf32)"
            " -> Tensor[]",
        )
        torch.library.impl(forward_name, DEVICES)(replayed(self._forward))
        torch.library.impl(backward_name, DEVICES)(replayed(self._backward))
        torch.library.register_fake(forward_name, self._forward_fake)
        torch.library.register_fake(backward_name, self._backward_fake)
        torch.library.register_autograd(forward_name, self._differentiate, setup_context=self._setup_context)
        self._forward_op: Any = getattr(torch.ops.structfly, name).default
        self._backward_op: Any = getattr(torch.ops.structfly, f"{name}_backward").default
        FORWARD_OPS[self._forward_op] = self
        for device in DEVICES:
            _LIBRARY.impl(name, self._under_autocast(device), f"Autocast{device.upper()}")
        torch.library.register_vmap(forward_name, one_by_one(self._forward_op))
        torch.library.register_vmap(backward_name, one_by_one(self._backward_op))

    def __call__(
        self,
        x: Tensor,
        factors: Sequence[Tensor],
        bias: Tensor | None = None,
        static: Sequence[int] = (),
        *,
        rematerialise: bool = False,
    ) -> Tensor:
        """y of x (*rows, in).

        Args:
            factors: the weight's factors, and integer tensors that say where they stand, as the op has them.
            bias: (out,), or None.
            static: the op's numbers.
            rematerialise: make again in backward what it needs of the forward, rather than keep it.
        """
        learned = any(tensor.requires_grad for tensor in (x, *factors))
        keep = torch.is_grad_enabled() and learned and not rematerialise
        tf32 = x.is_cuda and x.dtype == torch.float32 and tf32_allowed()
        y: Tensor = self._forward_op(x, list(factors), bias, list(static), keep, "", tf32)[0]
        return y

    def lacks(self, kept: Sequence[Any], rows: int, shapes: Sequence[Any], static: Sequence[int]) -> bool:
        """Whether a backward that was given ``kept`` must make again what the forward makes between."""
        return not kept and bool(self.kept_shapes(rows, shapes, static))

    def why_no_epilogue(self, call: Applied) -> str:
        """Why an activation is not applied within the products, but to what they give, or ""."""
        return _BY_TORCH if self._why_no_epilogue is None else self._why_no_epilogue(call)

    # ---------------------------------------------------------------------------------------------------- kernels

    def _forward(self, *given: Any) -> tuple[Tensor, list[Tensor]]:
        x, factors, bias, static, keep, activation, tf32 = _Forward(*given)
        call = Applied(x.reshape(-1, x.shape[-1]), factors, static, bias if self.adds_bias else None, tf32=tf32)
        within = bool(activation) and not self.why_no_epilogue(call)
        if within:
            call = call._replace(activation=activation)
        kept: list[Tensor] = []
        forward = None if keep or self._in_chunks is None else self._in_chunks.forward
        if forward is not None and self._chunks(call):
            y = forward(call)
        else:
            kept = self.between(call)
            y = self.finish(call, kept)
        if bias is not None and not self.adds_bias:
            y += bias
        if not within:
            y = activated(y, activation)
        return y.view(*x.shape[:-1], y.shape[1]), kept if keep else []

    def _backward(self, *given: Any) -> list[Tensor]:
        grad, x, factors, kept, static, wanted, tf32 = _Backward(*given)
        call = Applied(x.reshape(-1, x.shape[-1]), factors, static, tf32=tf32)
        grad = grad.reshape(-1, grad.shape[-1])
        lacks = self.lacks(kept, len(call.x), [factor.shape for factor in factors], static)
        if lacks and not torch.is_grad_enabled() and (chunks := self._chunks(call)):
            made = chunks.backward(grad, call, wanted)
        else:
            made = self.backward(grad, call, self.between(call) if lacks else kept, wanted)
        return [
            x.new_empty(0) if gradient is None else gradient.contiguous().view(source.shape)
            for gradient, source in zip(made, (x, *factors), strict=True)
        ]

    def _chunks(self, call: Applied) -> InChunks | None:
        """What makes all in chunks, if it does; nothing of that can be differentiated."""
        return None if self._in_chunks is None or self._in_chunks.why_not(call) else self._in_chunks

    # ------------------------------------------------------------------------------------------------------ fakes

    def _forward_fake(self, *given: Any) -> tuple[Tensor, list[Tensor]]:
        x, factors, _, static, keep, activation, _ = _Forward(*given)
        rows = math.prod(x.shape[:-1])
        shapes = self.kept_shapes(rows, [f.shape for f in factors], static) if keep else []
        width = self.out_features([f.shape for f in factors], static)
        y = activated(x.new_empty(*x.shape[:-1], width), activation)
        return y, [x.new_empty(shape) for shape in shapes]

    def _backward_fake(self, *given: Any) -> list[Tensor]:
        _, x, factors, _, _, wanted, _ = _Backward(*given)
        pairs = zip((x, *factors), wanted, strict=True)
        return [x.new_empty(source.shape if want else (0,)) for source, want in pairs]

    # --------------------------------------------------------------------------------------------------- autograd

    def _setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, factors, _, static, _, activation, tf32 = _Forward(*inputs)
        if activation:
            raise UnsupportedError(
                f"gradients are wanted of structfly::{self.name} with activation={activation!r}, which keeps nothing "
                "of what that is applied to; call it with activation='' and apply the activation to what it gives"
            )
        _, kept = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.static, ctx.count, ctx.tf32 = list(static), len(factors), tf32
        ctx.save_for_backward(x, *factors, *kept)

    def _differentiate(self, ctx: Any, grad: Tensor | None, _: Any) -> tuple[Any, ...]:
        need_x, need_factors, need_bias, *_ = ctx.needs_input_grad
        of_static: list[Any] | None = None if ctx.static else []  # torch takes an empty list for a list of tensors
        x, *tensors = ctx.saved_tensors
        factors, kept = tensors[: ctx.count], tensors[ctx.count :]
        if grad is None:
            return None, [None] * ctx.count, None, of_static, None, None, None
        wanted = [need_x, *(need and f.is_floating_point() for need, f in zip(need_factors, factors, strict=True))]
        made: list[Tensor | None] = [None] * len(wanted)
        if any(wanted):
            if torch.is_grad_enabled():  # create_graph=True: differentiable operations, on nothing made before them
                found = self._backward(grad, x, factors, [], ctx.static, wanted, ctx.tf32)
            else:
                found = self._backward_op(grad, x, factors, kept, ctx.static, wanted, ctx.tf32)
            made = [gradient if want else None for gradient, want in zip(found, wanted, strict=True)]
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if need_bias else None
        return made[0], made[1:], of_bias, of_static, None, None, None

    def _under_autocast(self, device: str) -> Callable[..., Any]:
        """As autocast treats ``linear``: what is multiplied is cast, float64 is left alone."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
                return tensor
            return tensor.to(torch.get_autocast_dtype(device))

        def autocast(x: Tensor, factors: Sequence[Tensor], bias: Tensor | None, *others: Any) -> Any:
            given = cast(x), [cast(f) for f in factors], cast(bias)
            with torch.autocast(device, enabled=False):
                return self._forward_op(*given, *others)

        return autocast
