"""Forms that real code writes, each a function (x, w, b, y, u, q, mask) of a scalar or per-token divergence.

Shapes: the student's x (B, T, H), w (V, H), b (V,); the teacher's y (B, T, G), u (V, G), which require no gradient;
probabilities q (B, T, V), in each row one that is 0; mask (B, T) bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """A spelling, and what the op is called with."""

    function: Loss
    kind: str
    schedule: str
    teacher: str


class NearMiss(NamedTuple):
    """Code that is almost a form, and what the report must say."""

    function: Loss
    reason: str


FORMS: dict[str, Form] = {}
NEAR_MISSES: dict[str, NearMiss] = {}


def form(kind: str, schedule: str = "forward", teacher: str = "head") -> Callable[[Loss], Loss]:
    def register(function: Loss) -> Loss:
        FORMS[function.__name__] = Form(function, kind, schedule, teacher)
        return function

    return register


def near_miss(reason: str) -> Callable[[Loss], Loss]:
    def register(function: Loss) -> Loss:
        NEAR_MISSES[function.__name__] = NearMiss(function, reason)
        return function

    return register


def _rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1])


# ------------------------------------------------------------------------------------------ soft targets


@form("cross_entropy", teacher="probabilities")
def soft_targets(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), _rows(q))


@form("cross_entropy", teacher="probabilities")
def soft_targets_sum(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w) / 0.7), _rows(q), reduction="sum")


@form("cross_entropy", "backward", "probabilities")
def soft_targets_per_row(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w)), _rows(q), reduction="none")


@form("cross_entropy", teacher="probabilities")
def soft_targets_smoothed(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), _rows(q), label_smoothing=0.1)


@form("cross_entropy", teacher="probabilities")
def classes_second(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w).transpose(1, 2), q.transpose(1, 2), reduction="none")
    return (losses * mask).sum() / mask.sum()


@form("forward_kl", teacher="probabilities")
def weight_first(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p = F.log_softmax(w @ _rows(x).t(), dim=0)
    return F.kl_div(log_p, _rows(q).t(), reduction="sum")


@form("cross_entropy", teacher="probabilities")
def one_row(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x[0, 0], w, b), q[0, 0])


@form("cross_entropy", teacher="probabilities")
def timm_soft_target(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return torch.sum(-_rows(q) * F.log_softmax(_rows(F.linear(x, w, b)), dim=-1), dim=-1).mean()


@form("cross_entropy", "backward", "probabilities")
def minus_sum_of_products(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return -(q * torch.log_softmax(F.linear(x, w, b), -1)).sum(-1)


@form("cross_entropy", "backward", "probabilities")
def kept_dimension(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return -(F.linear(x, w).log_softmax(-1) * (q * 0.5)).sum(-1, keepdim=True) * 3


@form("cross_entropy", teacher="probabilities")
def cross_entropy_with_a_teacher(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    with torch.no_grad():
        target = F.softmax(F.linear(y, u), dim=-1)
    return F.cross_entropy(_rows(F.linear(x, w)), _rows(target))


# ------------------------------------------------------------------------------------------ forward KL


@form("forward_kl")
def kl_div_batchmean(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    temperature = 2.0
    student, teacher = _rows(F.linear(x, w, b)) / temperature, _rows(F.linear(y, u)) / temperature
    loss = nn.KLDivLoss(reduction="batchmean")
    result: Tensor = loss(F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1)) * temperature**2
    return result


@form("forward_kl")
def kl_div_batchmean_of_sequences(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


@form("forward_kl")
def kl_div_mean_over_all(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), None, None, "mean")


@form("forward_kl", teacher="probabilities")
def kl_div_given(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(F.linear(x, w, b), -1), q, reduction="sum")


@form("forward_kl", teacher="logits")
def kl_div_given_logits(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    teacher = (q + 1.0) * 3
    return F.kl_div(F.log_softmax(F.linear(x, w, b) / 2, -1), F.softmax(teacher / 2, -1), reduction="sum") * 4


@form("forward_kl", teacher="log_probabilities")
def kl_div_given_logs(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    given = (q + 0.1).log() * 1.0
    return F.kl_div(F.log_softmax(F.linear(x, w, b), -1), given.abs().neg(), reduction="sum", log_target=True)


@form("forward_kl")
def kl_div_summed_and_masked(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), reduction="none").sum(-1)
    return (kl * mask).sum() / mask.sum()


@form("forward_kl")
def masked_before_the_sum(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), reduction="none")
    return (kl * mask.unsqueeze(-1)).sum(dim=(1, 2)).mean()


@form("forward_kl")
def masked_in_place(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), reduction="none")
    kl *= mask.unsqueeze(-1)
    return kl.sum()


@form("forward_kl")
def mean_of_elements(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), reduction="none")
    return kl.masked_fill(~mask[..., None], 0.0).mean()


@form("forward_kl", "backward")
def written_out(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, teacher = F.log_softmax(F.linear(x, w, b), -1), F.softmax(F.linear(y, u), -1)
    return (teacher * (teacher.log() - log_p)).sum(-1)


@form("forward_kl")
def written_out_with_exp(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(F.linear(x, w, b), -1), F.log_softmax(F.linear(y, u), -1)
    return -(log_q.exp() * (log_p - log_q)).sum(-1).mean()


@form("forward_kl")
def entropy_subtracted(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(F.linear(x, w, b), -1), F.log_softmax(F.linear(y, u), -1)
    return ((torch.exp(log_q) * log_q).sum(-1) - (torch.exp(log_q) * log_p).sum(-1)).sum()


@form("cross_entropy")
def own_probabilities_detached(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    z = F.linear(x, w, b)
    return -(z.softmax(-1).detach() * z.log_softmax(-1)).sum(-1).mean()


@form("forward_kl")
def teacher_detached(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    teacher = F.linear(y, u + 0 * w[:, : u.shape[1]]).detach()
    return F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(teacher, -1), reduction="sum")


@form("forward_kl")
def capped_both(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    student, teacher = torch.tanh(F.linear(x, w) / 3.0) * 3.0, torch.tanh(y @ u.t() / 5.0) * 5.0
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")


@form("forward_kl")
def squashed_both(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    student, teacher = 7.0 * torch.sigmoid((F.linear(x, w) + 1.0) / 3.0), (y @ u.t()).clamp(-2.0, 2.0)
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")


@form("forward_kl")
def shifted_both(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    student, teacher = F.linear(x, w)[:, :-1].contiguous(), F.linear(y, u)[:, :-1]
    log_p, log_q = F.log_softmax(_rows(student), -1), F.log_softmax(_rows(teacher), -1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


@form("forward_kl")
def cut_vocabularies(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    student, teacher = F.linear(x, w, b)[..., :30], F.linear(y, torch.cat([u, u]))[..., :30]
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")


@form("forward_kl")
def student_with_an_adapter(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    down, up = w[:3] * 0.5, w[:, :3] * 0.5
    student = F.linear(x, w, b) + F.linear(F.linear(x, down), up) * 0.7
    return F.kl_div(student.log_softmax(-1), F.linear(y, u).softmax(-1), reduction="sum")


@form("forward_kl", teacher="logits")
def teacher_seen_by_others(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    teacher = F.linear(y, u)
    loss = F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(teacher * 0.5, -1), reduction="sum")
    return loss + teacher.square().mean()


@form("forward_kl", "backward")
def checkpointed(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    def loss(x: Tensor, w: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax(F.linear(x, w), -1), F.softmax(F.linear(y, u), -1), reduction="sum")

    result: Tensor = checkpoint(loss, x, w, use_reentrant=False)
    return result


# ------------------------------------------------------------------------------------------ reverse KL


@form("reverse_kl")
def kl_div_swapped(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.log_softmax(F.linear(x, w, b), -1), F.log_softmax(F.linear(y, u), -1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@form("reverse_kl", "backward")
def reverse_written_out(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    p, log_p, log_q = F.softmax(z, -1), F.log_softmax(z, -1), F.log_softmax(F.linear(y, u), -1)
    return (p * (log_p - log_q)).sum(-1)


@form("reverse_kl", teacher="log_probabilities")
def reverse_given(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, given = F.log_softmax(F.linear(x, w, b), -1), (q + 0.01).sqrt()
    kl = (log_p.exp() * (log_p - given)).sum(-1)
    return (kl * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------ Jensen-Shannon


def _mixture_terms(student: Tensor, teacher: Tensor, share: float) -> Tensor:
    """trl's GKDTrainer.generalized_jsd_loss before its reduction."""
    log_p, log_q = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    beta = torch.tensor(share, dtype=log_p.dtype)
    stacked = torch.stack([log_p + torch.log(1 - beta), log_q + torch.log(beta)])
    mixture = torch.logsumexp(stacked, dim=0)
    of_teacher = F.kl_div(mixture, log_q, reduction="none", log_target=True)
    of_student = F.kl_div(mixture, log_p, reduction="none", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


@form("jsd")
def gkd(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    terms = _mixture_terms(F.linear(x, w) / 0.9, F.linear(y, u) / 0.9, 0.3)
    return terms.sum() / terms.size(0)


@form("jsd")
def gkd_masked(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    terms = _mixture_terms(F.linear(x, w) / 0.9, F.linear(y, u) / 0.9, 0.1)
    return terms[mask].sum() / mask.sum()


@form("jsd")
def gkd_mean(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return _mixture_terms(F.linear(x, w), F.linear(y, u), 0.5).mean()


@form("jsd")
def mixture_of_probabilities(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    p, teacher = F.linear(x, w, b).softmax(-1), F.linear(y, u).softmax(-1)
    log_m = (0.5 * (p + teacher)).log()
    total = F.kl_div(log_m, p, reduction="batchmean") + F.kl_div(log_m, teacher, reduction="batchmean")
    return 0.5 * total


@form("jsd", "backward")
def mixture_by_logaddexp(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
    of_teacher = (log_q.exp() * (log_q - log_m)).sum(-1)
    return (of_teacher + (log_p.exp() * (log_p - log_m)).sum(-1)) / 2


# ------------------------------------------------------------------------------------------ near misses


@near_miss("both distributions take part in differentiation")
def teacher_learns_too(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(-1), F.linear(x, w * 2).softmax(-1), reduction="sum")


@near_miss("more than two distributions")
def weights_detached(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    return (log_p.exp().detach() * (log_p - log_q)).sum(-1).mean()


@near_miss("is not the softmax of logits")
def targets_learn(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.linear(x, w)
    return F.cross_entropy(_rows(z), _rows(q * b.exp()))


@near_miss("must exist")
def logits_used_elsewhere(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    z = F.linear(x, w)
    return F.kl_div(z.log_softmax(-1), q, reduction="sum") + z.square().mean()


@near_miss("must exist")
def log_probabilities_used_elsewhere(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    log_p = F.linear(x, w).log_softmax(-1)
    return F.kl_div(log_p, q, reduction="sum") + log_p[..., 0].mean()


@near_miss("class weights")
def weighted_classes(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w)), _rows(q), weight=torch.linspace(0.5, 2.0, w.shape[0], dtype=x.dtype))


@near_miss("not summed over the classes")
def classes_masked(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    kl = F.kl_div(F.linear(x, w).log_softmax(-1), q, reduction="none")
    return (kl * torch.linspace(0.5, 2.0, w.shape[0], dtype=x.dtype)).sum()


@near_miss("not summed over the classes")
def one_class_kept(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(-1), q, reduction="none")[..., 0].sum()


@near_miss("none of the divergences")
def unequal_weights(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    return (log_q.exp() * (log_q - 0.5 * log_p)).sum()


@near_miss("none of the divergences")
def mixture_of_other_weights(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    p, teacher = F.linear(x, w, b).softmax(-1), F.linear(y, u).softmax(-1)
    log_m = (0.4 * p + 0.6 * teacher).log()
    return 0.5 * (F.kl_div(log_m, p, reduction="sum") + F.kl_div(log_m, teacher, reduction="sum"))


@near_miss("more than two distributions")
def mixture_detached(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    p, teacher = F.linear(x, w, b).softmax(-1), F.linear(y, u).softmax(-1)
    log_m = (0.5 * p + 0.5 * teacher).log().detach()
    return 0.5 * (F.kl_div(log_m, p, reduction="sum") + F.kl_div(log_m, teacher, reduction="sum"))


@near_miss("none of the divergences")
def both_directions(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    log_p, log_q = F.linear(x, w).log_softmax(-1), F.linear(y, u).log_softmax(-1)
    return (log_q.exp() * (log_q - log_p) + log_p.exp() * (log_p - log_q)).sum()


@near_miss("relu (relu) of the logits is not an operation")
def relu_before(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.relu(F.linear(x, w)).log_softmax(-1), q, reduction="sum")


@near_miss("not read as log-probabilities and a distribution")
def scaled_log_probabilities(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(-1) + 1.0, q, reduction="sum")


@near_miss("mul of the student's logits takes a tensor")
def learned_scale(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div((F.linear(x, w) * b[0].exp()).log_softmax(-1), q, reduction="sum")


@near_miss("set to -inf")
def dead_classes(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    z = F.linear(x, w).masked_fill(torch.arange(w.shape[0]) > 33, -float("inf"))
    return F.kl_div(F.linear(y, u).log_softmax(-1), z.softmax(-1), reduction="sum")


@near_miss("different shapes")
def one_target_for_all(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(-1), q[:1], reduction="sum")


@near_miss("writes into a tensor that the nodes of this site read")
def targets_overwritten(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        target = q.clone()
        terms = target * F.linear(x, w).log_softmax(-1)
        target.zero_()
        return -terms.sum(-1).mean()


@near_miss("writes into target, which the loss is made of")
def targets_scaled_and_overwritten(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    target = q * 0.5
    target[0] = 0.25
    return -(target * F.linear(x, w).log_softmax(-1)).sum(-1).mean()


@near_miss("writes into teacher, which the loss is made of")
def teacher_overwritten(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    teacher = F.linear(y, u).softmax(-1)
    teacher.view(-1).mul_(0.5)
    return F.kl_div(F.linear(x, w).log_softmax(-1), teacher, reduction="sum")


@near_miss("writes into log_p, which the loss is made of")
def log_probabilities_overwritten(
    x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor
) -> Tensor:
    with torch.no_grad():
        log_p = F.linear(x, w).log_softmax(-1)
        log_p.mul_(0.5)
        return -(q * log_p).sum(-1).mean()


@near_miss("takes dimension")
def softmax_over_rows(x: Tensor, w: Tensor, b: Tensor, y: Tensor, u: Tensor, q: Tensor, mask: Tensor) -> Tensor:
    return F.kl_div(F.linear(x, w).log_softmax(1), F.linear(y, u).softmax(1), reduction="sum")
