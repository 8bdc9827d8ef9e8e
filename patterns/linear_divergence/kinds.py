"""Which divergence a sum of probabilities times log-probabilities is."""

from __future__ import annotations

import math
from typing import NamedTuple

from structfly.patterns.linear_divergence.readings import Distribution, Divergence


class Kind(NamedTuple):
    """``scale`` times the divergence ``kind`` of the op, with ``beta`` for "jsd"."""

    kind: str
    scale: float
    beta: float = 0.5


def classify(divergence: Divergence, student: Distribution, teacher: Distribution, eps: float) -> Kind | None:
    """The op's divergence between these two, or None.

    Args:
        eps: of the dtype that the program computes log-probabilities in.  The weights of a mixture and of a
            Jensen-Shannon divergence's two sides may differ by as much as their logarithms are rounded.
    """
    terms = divergence.terms
    crossed = terms.get((teacher, student), 0.0)
    if terms.keys() == {(teacher, student)}:
        return Kind("cross_entropy", -crossed)
    if terms.keys() == {(teacher, student), (teacher, teacher)} and terms[teacher, teacher] == -crossed:
        return Kind("forward_kl", -crossed)
    if terms.keys() == {(student, student), (student, teacher)}:
        scale = terms[student, student]
        return Kind("reverse_kl", scale) if terms[student, teacher] == -scale else None
    return _jensen_shannon(divergence, student, teacher, eps)


def _jensen_shannon(divergence: Divergence, student: Distribution, teacher: Distribution, eps: float) -> Kind | None:
    terms = divergence.terms
    mixtures = [each for each in divergence.distributions if each.parts]
    if len(mixtures) != 1:
        return None
    (mixed,) = mixtures
    sides = {(each, other) for each in (student, teacher) for other in (each, mixed)}
    if terms.keys() != sides or any(terms[each, each] != -terms[each, mixed] for each in (student, teacher)):
        return None
    weights = dict(mixed.parts)
    if weights.keys() != {student, teacher}:
        return None
    scale = terms[student, student] + terms[teacher, teacher]
    if scale == 0.0:
        return None
    beta = terms[teacher, teacher] / scale
    for share, weight in ((beta, weights[teacher]), (1.0 - beta, weights[student])):
        if not 0.0 < share < 1.0 or weight <= 0.0:
            return None
        if abs(weight - share) > eps * (1.0 - math.log(min(share, weight))) * share:
            return None
    return Kind("jsd", 1.0 if abs(scale - 1.0) <= eps else scale, beta)
