"""Gate and input as what the op takes: it makes activations and the complement of the gate itself.

From ``c = a p + b`` to ``c = f p + w z``:

    a = sigmoid(y)                       f from its logits, and 1 - f as sigmoid(-y), which keeps its digits
    a = 1 - sigmoid(y)                   the same with -y
    b linear in f, and 0 where f = 1     w = 1 - f, and z is b where f = 0
    b = sigmoid(v) z, a a sigmoid        w from its logits
    z = tanh(u)                          z from u

The third holds of ``(1 - f) * z``, of ``z - f * z``, of ``z + f * (0 - z)``, and of whatever else is that polynomial: b
is expanded into sums of products, of f and of other expressions, in which f must not be.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

from structfly.patterns.linear_recurrence.affine import Affine
from structfly.patterns.linear_recurrence.expressions import (
    ONE,
    ZERO,
    Expression,
    Number,
    Operation,
    Part,
    depends,
    inner,
    neg,
    replaced,
    sub,
)
from structfly.patterns.linear_recurrence.steps import Run
from structfly.rewriter.calls import read
from structfly.rewriter.region import example
from structfly.rewriter.writes import written

_MOST_TERMS = 64
_ACTIVATIONS = ("sigmoid", "tanh")


class Folded(NamedTuple):
    """A step ``f p + w z`` by the op's arguments, and ``output_gate`` o of o c that is used in the place of states c;
    ``reset`` as in :class:`Affine`."""

    gate: Expression
    input: Expression
    input_gate: Expression | None = None
    output_gate: Expression | None = None
    complement: bool = False
    sigmoid: bool = False
    tanh: bool = False
    reset: Expression | None = None


def fold(step: Affine) -> Folded:
    """The step, with what the op makes itself."""
    gate, input, reset = step
    found = Folded(gate, input, reset=reset)
    if (logits := _argument(gate, "sigmoid")) is not None:
        input = replaced(input, Operation("sigmoid", (("input", neg(logits)),)), sub(ONE, gate))
        found = Folded(logits, input, sigmoid=True, reset=reset)
        rest = _factor(input, gate, root=1)
    elif (logits := _argument(_complement(gate), "sigmoid")) is not None:
        found = Folded(neg(logits), input, sigmoid=True, reset=reset)
        rest = _factor(input, _complement(gate), root=0)
    else:
        rest = None if isinstance(gate, Number) else _factor(input, gate, root=1)
    if rest is not None:
        found = found._replace(input=rest, complement=True)
    elif found.sigmoid and isinstance(input, Operation) and input.op == "mul":
        for weight, value in ((input["input"], input["other"]), (input["other"], input["input"])):
            if found.input_gate is None and (logits := _argument(weight, "sigmoid")) is not None:
                found = found._replace(input=value, input_gate=logits)
    squashed = _argument(found.input, "tanh")
    return found if squashed is None else found._replace(input=squashed, tanh=True)


def _argument(value: Expression | None, op: str) -> Expression | None:
    """What ``op`` is taken of, or None where ``value`` is no such thing."""
    if not isinstance(value, Operation) or value.op != op:
        return None
    found: Expression = value["input"]
    return found


def _complement(value: Expression) -> Expression | None:
    """u of 1 - u."""
    if not isinstance(value, Operation) or value.op != "sub" or value["input"] != ONE or value.get("alpha") is not None:
        return None
    found: Expression = value["other"]
    return found


def _factor(value: Expression, gate: Expression | None, *, root: int) -> Expression | None:
    """z of ``value = (1 - gate) z``, or with a root of 0 of ``value = gate z``; None where it is neither."""
    if gate is None:
        return None
    terms = _terms(value, gate)
    if terms is None or any(monomial.count(gate) > 1 for monomial in terms):
        return None
    at_root: dict[frozenset[tuple[Expression, int]], float] = defaultdict(float)
    for monomial, coefficient in terms.items():
        if root or gate not in monomial:
            at_root[frozenset(Counter(each for each in monomial if each != gate).items())] += coefficient
    if not terms or any(at_root.values()):
        return None
    return replaced(value, gate, ZERO if root else ONE)


def _terms(value: Expression, gate: Expression) -> dict[tuple[Expression, ...], float] | None:
    """``value`` as a sum of products, by their factors; None where the gate is within another operation."""
    if value == gate:
        return {(gate,): 1.0}
    if isinstance(value, Number):
        return {(): float(value.value)}
    if isinstance(value, Operation) and value.op in ("add", "sub", "mul", "neg") and value.get("alpha") is None:
        parts = [_terms(each, gate) for each in inner(value)]
        found: dict[tuple[Expression, ...], float] = defaultdict(float)
        if any(part is None or len(part) > _MOST_TERMS for part in parts):
            return None
        first, *rest = [part for part in parts if part is not None]
        if value.op == "mul":
            for one, its in first.items():
                for other, others in rest[0].items():
                    found[(*one, *other)] += its * others
            return found
        signs = {"neg": (-1,), "add": (1, 1), "sub": (1, -1)}[value.op]
        for part, sign in zip((first, *rest), signs, strict=True):
            for monomial, coefficient in part.items():
                found[monomial] += sign * coefficient
        return found
    return None if depends(value, gate) else {(value,): 1.0}


# --------------------------------------------------------------------------------------- what the sequences are made of


def opened(step: Affine, runs: tuple[Run, ...]) -> tuple[Affine, tuple[Run, ...]]:
    """The step with the activations of whole sequences as operations of the step; of what they are taken are sequences,
    too, behind the others."""
    gate, input, reset = step
    for number, run in enumerate(runs):
        for op in _ACTIVATIONS:
            inside = opened_run(run, op)
            if inside is not None:
                within = Operation(op, (("input", Part(len(runs))),), run.sequence.source)
                runs = (*runs, inside)
                gate, input = (replaced(each, Part(number), within) for each in (gate, input))
    return Affine(gate, input, reset), runs


def opened_run(run: Run, op: str) -> Run | None:
    """Of a sequence that is ``op`` of another one as a whole, that one; None of others."""
    call = read(run.sequence.source)
    if call is None or call.op != op or written(call.node):
        return None
    inside, whole = example(call["input"]), example(call.node)
    if inside is None or whole is None or inside.dtype != whole.dtype or inside.requires_grad != whole.requires_grad:
        return None
    return run._replace(sequence=run.sequence._replace(source=call["input"]))
