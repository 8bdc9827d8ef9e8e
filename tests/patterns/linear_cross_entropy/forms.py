"""Forms that real code writes, each a function (x, w, b, ids, labels) of a scalar or per-token loss.

Shapes: x (B, T, H), w (V, H), b (V,), ids (B, T) in [0, V), labels (B, T) ids with some entries -100.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class Form(NamedTuple):
    """A spelling, and how many rewritten sites it makes with which schedule."""

    function: Loss
    schedules: tuple[str, ...] = ("forward",)


class NearMiss(NamedTuple):
    """Code that is almost a form, and what the report must say."""

    function: Loss
    reason: str


FORMS: dict[str, Form] = {}
NEAR_MISSES: dict[str, NearMiss] = {}


def form(*schedules: str) -> Callable[[Loss], Loss]:
    def register(function: Loss) -> Loss:
        FORMS[function.__name__] = Form(function, schedules or ("forward",))
        return function

    return register


def near_miss(reason: str) -> Callable[[Loss], Loss]:
    def register(function: Loss) -> Loss:
        NEAR_MISSES[function.__name__] = NearMiss(function, reason)
        return function

    return register


def _rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1])


# ------------------------------------------------------------------ (1) cross_entropy and the spellings of linear


@form()
def plain(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b).view(-1, w.shape[0]), labels.view(-1))


@form()
def two_dimensional(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x.flatten(0, 1), w), labels.flatten())


@form()
def matmul_transposed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(x @ w.t()), labels.view(-1))


@form()
def matmul_property(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(torch.matmul(x, w.T)), labels.view(-1))


@form()
def matmul_swapped(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(x.matmul(w.transpose(0, 1))), labels.view(-1))


@form()
def weight_stored_transposed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(x @ w.t().contiguous()), labels.view(-1))


@form()
def weight_first(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((w @ _rows(x).T).T + b, labels.view(-1))


@form("backward")
def weight_first_rows_in_parts(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    parts, target = (w @ _rows(x).T * 2.0).t().split(4), labels.view(-1).split(4)
    losses = [F.cross_entropy(z, t, reduction="sum") for z, t in zip(parts, target, strict=True)]
    return torch.stack(losses).sum() / 7


@form()
def weight_first_and_cut(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, classes = torch.einsum("vd,nd->vn", w, _rows(x)), w.shape[0] - 3
    return F.cross_entropy(z[:classes].T / (_rows(x)[:, :1] ** 2 + 1.0), labels.clamp_max(classes - 1).view(-1))


@form()
def einsum(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(torch.einsum("btd,vd->btv", x, w)), labels.view(-1))


@form()
def einsum_ellipsis(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(torch.einsum("vd,...d->...v", w, x)), labels.view(-1))


@form()
def addmm(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.addmm(b, x.reshape(-1, x.shape[-1]), w.t()), labels.view(-1))


@form()
def bias_added(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(x @ w.t() + b), labels.view(-1))


@form()
def two_biases(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b) + b * 2), labels.view(-1))


@form()
def low_rank_update(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    down, up = w[:3] * 0.5, w[:, :3] * 0.5
    return F.cross_entropy(_rows(F.linear(x, w, b) + F.linear(F.linear(x, down), up) * 0.7), labels.view(-1))


@form()
def summed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="sum")


@form("backward")
def per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none")


@form()
def class_dimension_one(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels)


@form("backward")
def class_dimension_one_per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b).permute(0, 2, 1), labels, reduction="none")


@form()
def other_ignore_index(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), ids.view(-1), ignore_index=0)


@form()
def smoothed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), label_smoothing=0.1)


@form()
def timm_label_smoothing(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    smoothing = 0.1
    log_p = F.log_softmax(_rows(F.linear(x, w, b)), dim=-1)
    nll = -log_p.gather(dim=-1, index=ids.view(-1).unsqueeze(1))
    loss = (1.0 - smoothing) * nll.squeeze(1) + smoothing * -log_p.mean(dim=-1)
    return loss.mean()


@form("backward")
def timm_label_smoothing_per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.linear(x, w).log_softmax(-1)
    return log_p.mean(-1, keepdim=True) * -0.25 + log_p.gather(-1, ids.unsqueeze(-1)) * -0.75


@form()
def class_weighted(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, w.shape[0], dtype=w.dtype)
    return F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), weight=weight)


@form()
def class_weighted_smoothed_sum(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, w.shape[0], dtype=w.dtype)
    return F.cross_entropy(_rows(F.linear(x, w)), labels.view(-1), weight, label_smoothing=0.2, reduction="sum")


@form()
def single_row(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x[0, 0], w, b), ids[0, 0])


@form()
def no_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x[:0], w, b)), labels[:0].view(-1))


@form()
def views_and_sums_that_nobody_takes(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    z.transpose(0, 1).contiguous().sum(-1)
    return F.cross_entropy(_rows(z), labels.view(-1))


@form()
def rows_by_index(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    last = torch.full((x.shape[0],), x.shape[1] - 1)
    return F.cross_entropy(F.linear(x, w, b)[torch.arange(x.shape[0]), last], ids[:, 0])


# ------------------------------------------------------------------------------ (2), (3) Hugging Face, torchtitan


@form()
def shifted_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w).float() if x.dtype != torch.float64 else F.linear(x, w)
    shifted = z[..., :-1, :].contiguous()
    return F.cross_entropy(shifted.view(-1, z.size(-1)), labels[..., 1:].contiguous().view(-1))


@form()
def shifted_labels_per_item(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    z = F.linear(x, w)[:, slice(0, None), :]
    z = z.float() if x.dtype != torch.float64 else z
    return F.cross_entropy(z.view(-1, w.shape[0]), labels, ignore_index=-100, reduction="sum") / 7


@form()
def flattened_then_float(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w).flatten(0, 1)
    z = z.float() if x.dtype != torch.float64 else z
    return F.cross_entropy(z, labels.flatten(0, 1), reduction="sum", ignore_index=-100) / 11


@form()
def soft_capped(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)
    z = torch.tanh(z / 3.0) * 3.0
    return F.cross_entropy(_rows(z), labels.view(-1))


@form()
def scaled_in_place(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    z /= 2.5
    return F.cross_entropy(_rows(z * 0.5), labels.view(-1))


@form()
def constant_times_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(-0.25 * F.linear(x, w, b)), labels.view(-1))


# ----------------------------------------------------------------------------- pointwise chains, learned parts in them


@form()
def learned_temperature(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w)) / (b[0].abs() + 1.0), labels.view(-1))


@form()
def logit_scale_of_clip(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    images, texts = x[0] / x[0].norm(dim=-1, keepdim=True), w / w.norm(dim=-1, keepdim=True)
    return F.cross_entropy(b[0].exp() * (images @ texts.t()), ids[0])


@form("backward")
def learned_scale_per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w) * b[:1]), labels.view(-1), reduction="none")


@form()
def sigmoid_cap_of_modded_nanogpt(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)
    return F.cross_entropy(_rows(23 * torch.sigmoid((z + 5) / 7.5)), labels.view(-1))


@form()
def sigmoid_cap_of_one_method_chain(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w)).mul(0.4).add(1).sigmoid().multiply(9.0).neg(), labels.view(-1))


@form()
def class_bias_after_cap(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(3.0 * torch.tanh(F.linear(x, w) / 3.0) + b), labels.view(-1), label_smoothing=0.1)


@form()
def class_bias_where_classes_come_first(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b).transpose(1, 2)
    return F.cross_entropy(z * b.unsqueeze(-1), labels)


@form()
def class_bias_before_the_cut(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    classes = w.shape[0] - 3
    z = (F.linear(x, w, b) * b)[..., :classes] - b[:classes]
    return F.cross_entropy(_rows(z), labels.clamp_max(classes - 1).view(-1))


@form()
def row_temperature(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    temperature = x.square().mean(-1, keepdim=True) + 1.0
    return F.cross_entropy(_rows(F.linear(x, w) / temperature), labels.view(-1))


@form()
def sequence_temperature_then_shift(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    temperature = (x[:, 0, :1] ** 2 + 1.0).unsqueeze(-1)
    z = (F.linear(x, w, b) / temperature)[:, :-1].transpose(0, 1)
    return F.cross_entropy(z.reshape(-1, w.shape[0]), labels[:, 1:].t().reshape(-1))


@form()
def row_temperature_after_the_views(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)[torch.tensor([2, 0])].permute(0, 2, 1)
    return F.cross_entropy(z * (x[:2, :, 0].unsqueeze(1) + 2.0), labels[torch.tensor([2, 0])])


@form("backward")
def row_temperature_of_split_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w)) * (x[..., :1] + 2.0).view(-1, 1)
    scale, pairs = b[1].exp(), zip(z.split(4), labels.view(-1).split(4), strict=True)
    return torch.stack([F.cross_entropy(part * scale, target, reduction="sum") for part, target in pairs]).sum()


@form()
def clamped(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b).clamp(-2, 1.5)), labels.view(-1))


@form()
def clamped_one_side_at_a_time(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = torch.clamp_min(torch.clip(F.linear(x, w), max=b[0] + 1.0), -1.5)
    return F.cross_entropy(_rows(z.clamp_(max=2.0)), labels.view(-1))


@form()
def reversed_operands(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(2.0 / (1.5 - torch.tanh(F.linear(x, w))).exp()), labels.view(-1))


@form()
def operands_that_return(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    scale, low = b[0].exp(), b < -1.0
    z = (F.linear(x, w) * scale + b).masked_fill_(low, 0.5) * b
    return F.cross_entropy(_rows((z - scale).where(low[None], b)), labels.view(-1))


@form("backward")
def checkpointed_with_a_temperature(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    def head(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return F.cross_entropy(_rows(torch.tanh(x @ w.T / scale) + shift), labels.view(-1))

    result: Tensor = checkpoint(head, x, x[..., :1] ** 2 + 1.0, b, use_reentrant=False)
    return result


@form()
def row_filled(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = torch.where((ids > 9).unsqueeze(-1), F.linear(x, w, b), b[3])
    return F.cross_entropy(_rows(z), labels.view(-1))


@form()
def filled_with_zero(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b).masked_fill(torch.arange(w.shape[0]) > 9, 0.0)
    return F.cross_entropy(_rows(z), labels.view(-1))


@form()
def filled_with_the_lowest_and_smoothed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b).masked_fill(torch.arange(w.shape[0]) > 33, torch.finfo(x.dtype).min / 64)
    return F.cross_entropy(_rows(z), ids.view(-1) % 30, label_smoothing=0.1)


@form()
def mask_then_scaled_by_a_negative_number(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = torch.where(torch.arange(w.shape[0]) < 30, -F.linear(x, w, b), torch.tensor(float("inf")))
    return F.cross_entropy(_rows(z * -0.5), ids.view(-1) % 30)


@form()
def masked_then_written(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b) * 1.5
    z[..., w.shape[0] - 3 :] = -4.0
    return F.cross_entropy(_rows(torch.tanh(z)), labels.view(-1))


@form()
def integers_among_the_operands(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b) * (ids.unsqueeze(-1) % 3) + torch.arange(w.shape[0]).lt(9)
    return F.cross_entropy(_rows(z), labels.view(-1))


# ------------------------------------------------------------------------------------ (4), (5) log-probabilities


@form()
def log_softmax_nll(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(F.linear(x, w, b), dim=-1).view(-1, w.shape[0]), labels.view(-1))


@form("backward")
def gathered(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.linear(x, w, b).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


@form()
def gathered_mean(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    logp = torch.gather(torch.log_softmax(F.linear(x, w, b), -1), 2, ids.unsqueeze(2)).squeeze(2)
    return -logp.mean()


@form("backward")
def unrolled_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    logps = []
    for row, index in zip(F.linear(x, w, b), ids, strict=True):
        logps.append(F.log_softmax(row, dim=-1).gather(-1, index.unsqueeze(-1)).squeeze(-1))
    return torch.stack(logps)


# ------------------------------------------------------------------------------------- (6) gather less logsumexp


@form("backward")
def gather_less_logsumexp(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b) / 1.5
    return z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - z.logsumexp(-1)


@form()
def logsumexp_less_gather(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    losses = torch.logsumexp(z, dim=1, keepdim=True) - torch.gather(z, 1, ids.view(-1, 1))
    return losses.mean()


@form()
def weighted_gather_less_logsumexp(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, mask = F.linear(x, w, b), ids > 3
    log_p = torch.gather(z, 2, ids[..., None]).squeeze(2) - torch.logsumexp(z, (2,))
    return -(log_p * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------- (7) weighted sums of tokens


@form()
def masked_mean(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    mask = (ids % 3 > 0).to(x.dtype)
    losses = F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none").view(ids.shape)
    return (losses * mask).sum() / mask.sum()


@form()
def mean_of_sequence_means(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    mask = ids % 3 > 0
    losses = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels, reduction="none")
    return ((mask * losses).sum(dim=-1) / (mask.sum(-1) + 1)).mean()


@form()
def weighted_log_probabilities(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    advantage = torch.linspace(-1.0, 1.0, ids.numel(), dtype=x.dtype).view(ids.shape)
    logp = F.linear(x, w).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return -(logp * advantage).masked_fill(ids == 0, 0.0).sum()


@form()
def where_kept(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none")
    return torch.where(ids.view(-1) > 1, losses, 0.0).sum() * 0.125


@form()
def plain_mean_of_tokens(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none").mean()


# ------------------------------------------------------------------------ (12), (14), (15) several losses, chunks


@form("forward", "forward")
def two_losses_one_weight(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    first = F.cross_entropy(_rows(F.linear(x, w)), labels.view(-1))
    return first + 0.3 * F.cross_entropy(_rows(F.linear(x * 2, w)), labels.roll(1, 1).view(-1))


@form("backward")
def split_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, total = _rows(F.linear(x, w, b)), torch.zeros((), dtype=x.dtype)
    for part, target in zip(z.split(4), labels.view(-1).split(4), strict=True):
        total = total + F.cross_entropy(part, target, reduction="sum")
    return total / 11


@form("backward")
def chunk_means(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, weight = _rows(F.linear(x, w, b)), torch.linspace(0.5, 2.0, w.shape[0], dtype=w.dtype)
    pairs = zip(z.chunk(3), labels.view(-1).chunk(3), strict=True)
    return torch.stack([F.cross_entropy(part, target, weight=weight) for part, target in pairs]).mean()


@form("backward")
def first_row_and_the_others(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    first = F.cross_entropy(z[0], ids[0], reduction="sum")
    return first + F.cross_entropy(_rows(z[1:]), labels[1:].reshape(-1), ignore_index=-100)


@form("backward")
def selected_and_narrowed_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, others = F.linear(x, w, b).transpose(0, 1), ids.shape[1] - 1
    last = F.cross_entropy(z.select(0, -1), ids[:, -1], reduction="none")
    return F.cross_entropy(_rows(z.narrow(0, 0, others)), ids.t()[:others].reshape(-1)) + last.square().mean()


@form("forward", "forward", "forward")
def split_hidden_states(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for part, target in zip(x.flatten(0, 1).chunk(3), labels.view(-1).chunk(3), strict=True):
        total = total + F.cross_entropy(F.linear(part, w, b), target, reduction="sum")
    return total / 11


@form()
def torch_linear_cross_entropy(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    fused = getattr(F, "linear_cross_entropy", None)  # torch 2.13
    if fused is None:
        return F.cross_entropy(F.linear(_rows(x), w), labels.view(-1))
    result: Tensor = fused(_rows(x), w, labels.view(-1))
    return result


# ------------------------------------------------------------------------------------------ padded vocabularies


@form()
def cut_vocabulary(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    classes = w.shape[0] - 3
    return F.cross_entropy(_rows(F.linear(x, w, b)[..., :classes]), labels.clamp_max(classes - 1).view(-1))


@form()
def cut_vocabulary_from_the_end(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)[:, :, :-3] + b[:-3]
    return F.cross_entropy(_rows(z), labels.clamp_max(w.shape[0] - 4).view(-1))


@form()
def masked_by_write(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    z[..., w.shape[0] - 3 :] = -float("inf")
    return F.cross_entropy(_rows(z), labels.clamp_max(w.shape[0] - 4).view(-1))


@form()
def masked_by_where(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    live = torch.arange(w.shape[0]) < w.shape[0] - 3
    z = torch.where(live, F.linear(x, w, b) * 2, -float("inf"))
    return F.cross_entropy(_rows(z), labels.clamp_max(w.shape[0] - 4).view(-1))


@form()
def masked_by_fill(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    dead = (torch.arange(w.shape[0]) >= w.shape[0] - 3)[None, None]
    z = F.linear(x, w, b).masked_fill(dead, -float("inf"))
    return F.cross_entropy(_rows(z), labels.clamp_max(w.shape[0] - 4).view(-1))


@form()
def masked_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        z[..., w.shape[0] - 3 :] = -float("inf")
    return F.cross_entropy(_rows(z), labels.clamp_max(w.shape[0] - 4).view(-1))


# ------------------------------------------------------------------------------------------- writes that do not count


@form()
def hidden_states_made_in_place(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    hidden = x * 1
    hidden += 1.0
    loss = F.cross_entropy(_rows(F.linear(hidden * 2, w, b)), labels.view(-1))
    with torch.no_grad():
        labels = labels * 1
        labels.zero_()
    return loss + labels.sum()


# ----------------------------------------------------------------- (11) further consumers of the same logits: values


def _log_p(z: Tensor, ids: Tensor) -> Tensor:
    return z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def _entropy_by_entr(z: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(F.softmax(z, dim=-1)).sum(-1)
    return entropy


class _Distribution(NamedTuple):
    """torch.distributions.Categorical with types."""

    logits: Tensor

    def log_prob(self, ids: Tensor) -> Tensor:
        value: Tensor = torch.distributions.Categorical(logits=self.logits, validate_args=False).log_prob(ids)
        return value

    def entropy(self) -> Tensor:
        value: Tensor = torch.distributions.Categorical(logits=self.logits, validate_args=False).entropy()
        return value


@form()
def accuracy(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    hits = (z.argmax(-1) == labels.view(-1)).sum()
    return F.cross_entropy(z, labels.view(-1)) * (1 + hits)


@form()
def accuracy_of_the_largest(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        _, best = z.softmax(-1).max(dim=-1, keepdim=True)
        hits = (best.squeeze(-1) == ids).to(x.dtype).mean()
    return F.cross_entropy(z.transpose(1, 2), labels) + hits


@form()
def detached_entropy(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)[:, :-1]
    entropy = _Distribution(z.detach()).entropy()
    return F.cross_entropy(_rows(z), ids[:, 1:].reshape(-1)) * entropy.mean()


@form()
def entropy_that_is_only_logged(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b) / 0.7
    entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)
    return F.cross_entropy(_rows(z), labels.view(-1)) + entropy.detach().mean()


@form()
def second_loss_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    with torch.no_grad():
        other = F.cross_entropy(z, labels.view(-1)) + _log_p(z, ids.view(-1)).sum()
    return F.cross_entropy(z, ids.view(-1), label_smoothing=0.1) * other


@form()
def filled_with_the_lowest_and_chosen(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b).masked_fill(torch.arange(w.shape[0]) > 33, torch.finfo(x.dtype).min)
    chosen = z.gather(-1, ids.unsqueeze(-1) % 30)
    return F.cross_entropy(_rows(z), ids.view(-1) % 30) + chosen.mean()


@form()
def learned_scale_and_shift_with_accuracy_and_entropy(
    x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor
) -> Tensor:
    z = F.linear(x, w) * b[0].exp() / (x[..., :1].square() + 1.0)
    z = torch.tanh(z + torch.sigmoid(b))
    hits = (z.argmax(-1) == ids).sum()
    return F.cross_entropy(_rows(z), labels.view(-1)) * (1 + hits) + _Distribution(z.detach()).entropy().mean()


# ------------------------------------------------------------ (8), (11) one scalar of several statistics, row by row


def _advantages(ids: Tensor, x: Tensor) -> Tensor:
    return torch.linspace(-1.0, 1.5, ids.shape[0], dtype=x.dtype).unsqueeze(1)


@form()
def z_loss(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z, labels.view(-1)) + 1e-2 * z.logsumexp(-1).pow(2).mean()


@form()
def z_loss_from_one_logsumexp(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    lse = z.logsumexp(-1)
    return (lse - z.gather(-1, ids.unsqueeze(-1)).squeeze(-1)).sum() + 1e-2 * lse.square().sum()


@form()
def z_loss_of_live_rows_weighted(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, t = _rows(F.linear(x, w, b)), labels.view(-1)
    weight = torch.linspace(0.5, 2.0, w.shape[0], dtype=w.dtype)
    live = t != -100
    auxiliary = torch.where(live, torch.logsumexp(z, 1) ** 2, 0.0).sum() / live.sum()
    return F.cross_entropy(z, t, weight=weight, label_smoothing=0.1) + 0.01 * auxiliary


@form()
def z_loss_of_scaled_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w) * torch.sigmoid(b[:1]) + b)
    return F.cross_entropy(z, labels.view(-1)) + 1e-2 * z.logsumexp(-1).pow(2).mean()


@form()
def focal(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none")
    return ((1 - torch.exp(-losses)) ** 2 * losses).mean()


@form()
def dynamic_fine_tuning(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    return (torch.exp(log_p).detach() * -log_p).mean()


@form()
def dynamic_fine_tuning_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    with torch.no_grad():
        weight = torch.exp(log_p) * 2
    return -(weight * log_p).mean()


@form()
def sums_over_sequences_first(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    squares = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels, reduction="none").square()
    return (squares.sum(0) / (ids[0] % 3 + 1)).mean() + (squares.unsqueeze(-1).mean(1) * ids[:, :1]).sum()


@form()
def policy_gradient_with_entropy_bonus(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    distribution = _Distribution(F.linear(x, w, b))
    gain = distribution.log_prob(ids) * _advantages(ids, x)
    return -gain.mean() - 0.01 * distribution.entropy().mean()


@form()
def ppo(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, mask = F.linear(x, w, b) / 0.9, (labels != -100).to(x.dtype)
    old, advantages = torch.full(ids.shape, -3.5, dtype=x.dtype), _advantages(ids, x)
    ratio = torch.exp(_log_p(z, ids) - old)
    first, second = -advantages * ratio, -advantages * torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
    losses = torch.max(first, second)
    clipped = ((second > first).to(x.dtype) * mask).sum() / mask.sum()
    return (losses * mask).sum() / mask.sum() * (1 + clipped.detach())


@form()
def ppo_with_dual_clip_and_entropy(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, mask = F.linear(x, w, b), labels != -100
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (log_p.gather(-1, ids[..., None]).squeeze(-1) + 3.0).clamp(min=-20.0, max=20.0).exp()
    advantages = _advantages(ids, x)
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    losses = torch.where(advantages < 0, torch.min(losses, -advantages * 3.0), losses)
    return ((losses - 0.01 * entropy) * mask).sum() / mask.sum()


@form()
def on_policy_grpo(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p, mask = _log_p(F.linear(x, w, b), ids), ids > 2
    losses = -torch.exp(log_p - log_p.detach()) * _advantages(ids, x)
    return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


@form()
def grpo_with_reference(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p, mask = _log_p(F.linear(x, w, b), ids), (ids > 2).to(x.dtype)
    reference = torch.full(ids.shape, -3.0, dtype=x.dtype)
    divergence = torch.exp(reference - log_p) - (reference - log_p) - 1
    ratio = torch.exp(log_p - log_p.detach())
    advantages = _advantages(ids, x)
    losses = -torch.min(ratio * advantages, torch.clamp(ratio, 0.8, 1.28) * advantages) + 0.04 * divergence
    loss = ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    return loss * (1 + ((divergence * mask).sum() / mask.sum()).detach())


@form()
def grpo_normalised_by_length(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    ratio = torch.exp(log_p - log_p.detach())
    losses = -(ratio * _advantages(ids, x)).sum(dim=1, keepdim=True) / (ids.shape[1] + ids[:, :1] % 2)
    return losses.squeeze(1).sum() / ids.shape[0] + (x * x).mean()


@form()
def several_losses_and_something_else(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, later = _rows(F.linear(x, w, b)), labels.roll(1)
    first = F.cross_entropy(z, labels.view(-1)) - x.square().mean() / 3
    return (first * 2 + F.cross_entropy(z, later.view(-1), reduction="sum")) / 7 - z.logsumexp(-1).mean() + b.sum()


@form()
def losses_written_in_place(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels, reduction="none").square()
    losses *= ids > 3
    return losses.sum()


@form()
def correct_rows_count_less(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    wrong = (z.argmax(-1) != ids).to(x.dtype) + 0.5
    return -(_log_p(z, ids) * wrong).mean()


@form()
def preference_of_two_tokens(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(F.linear(x, w, b), -1)
    better, worse = (torch.gather(log_p, 2, t.unsqueeze(2)).squeeze(2) for t in (ids, ids.flip(1)))
    return -F.logsigmoid(0.5 * (better - worse)).mean()


@form()
def log_probabilities_of_the_program_are_logged(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    ratio = torch.exp(log_p + 3.0)
    loss = -(ratio * _advantages(ids, x)).mean()
    with torch.no_grad():
        drift = (log_p + 3.0).abs().mean() + (ratio > 1.2).to(x.dtype).mean()
    return loss * drift


@form()
def stacked_logsumexps(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)[:, :-1] / 0.8
    chosen = torch.gather(z, dim=-1, index=ids[:, 1:, None]).squeeze(-1)
    log_p = chosen - torch.stack([torch.logsumexp(rows, dim=-1) for rows in z])
    return -(torch.exp(log_p - log_p.detach()) * _advantages(ids, x)).mean()


@form()
def logged_after_the_scalar_was_used(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    loss = _log_p(z, ids).square().sum() / 7
    return loss * (1 + _log_p(z, ids.roll(1, 1)).detach().mean())


@form()
def dpo_of_one_pair(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = (_log_p(F.linear(x, w, b), ids) * (ids > 2)).sum(-1)
    margin = log_p[0] - log_p[1] - 0.3
    return -F.logsigmoid(0.1 * margin).mean()


def _of_pairs(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of better sequences, then as many worse ones."""
    return torch.cat([x, torch.tanh(x.flip(0))]), torch.cat([labels, labels.flip(1)])


def _sequence_log_p(x: Tensor, w: Tensor, b: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the log-probabilities of each sequence's next tokens, as TRL has them, and how many they are."""
    labels = labels[:, 1:].clone()
    mask = labels != -100
    labels[labels == -100] = 0
    logits = F.linear(x, w, b)[:, :-1]
    log_p = torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2)
    return (log_p * mask).sum(-1), mask.sum(-1)


@form()
def dpo(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = _of_pairs(x, labels)
    better, worse = _sequence_log_p(x, w, b, labels)[0].chunk(2)
    reference_better, reference_worse = ids[:, 0] * -0.3, ids[:, 1] * -0.4
    return -F.logsigmoid(0.1 * ((better - worse) - (reference_better - reference_worse))).mean()


@form()
def dpo_with_logged_rewards(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = _of_pairs(x, labels)
    logits = F.linear(x, w, b)
    losses = F.cross_entropy(_rows(logits), labels.view(-1), reduction="none").view(labels.shape)
    log_p = -losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
    better, worse = log_p[: len(ids)], log_p[len(ids) :]
    rewards = (0.1 * (better - worse)).detach()
    loss = -(F.logsigmoid(better - worse) * 0.9 + F.logsigmoid(worse - better) * 0.1).mean()
    return loss * (1 + rewards.mean())


@form()
def ipo_of_alternating_sequences(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = _of_pairs(x, labels)
    log_p, count = _sequence_log_p(x, w, b, labels)
    average = log_p / count
    return ((average[::2] - average[1::2] - 0.2) ** 2).mean()


@form()
def simpo_of_stacked_pairs(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = _of_pairs(x, labels)
    log_p, count = _sequence_log_p(x, w, b, labels)
    better, worse = (log_p / count).view(-1, 2).unbind(1)
    return F.softplus(-2.0 * (better - worse - 0.5)).sum() / len(ids)


@form()
def orpo_with_the_better_ones_loss(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    x, labels = _of_pairs(x, labels)
    log_p, count = _sequence_log_p(x, w, b, labels)
    (better, worse), n = (log_p / count).split(len(ids)), len(ids)
    odds = (better - worse) - (torch.log1p(-torch.exp(better)) - torch.log1p(-torch.exp(worse)))
    return -log_p[:n].sum() / count[:n].sum() - 0.1 * F.logsigmoid(odds).mean()


@form()
def kto(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    rewards = _sequence_log_p(x, w, b, labels)[0] + 0.5 * ids[:, 0]
    desirable, divergence = ids[:, 1] > 15, 0.2
    margins = torch.where(desirable, rewards - divergence, divergence - rewards)
    return (1 - torch.sigmoid(0.1 * margins)).mean()


@form()
def gspo(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p, mask = _log_p(F.linear(x, w, b), ids), (ids > 2).to(x.dtype)
    old = log_p.detach() * 0.9 - 0.1
    log_ratio = ((log_p - old) * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)
    ratio = torch.exp(log_ratio.unsqueeze(-1))
    advantages = _advantages(ids, x)[:, :1]
    losses = -torch.min(ratio * advantages, torch.clamp(ratio, 0.97, 1.04) * advantages)
    return ((losses * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


@form()
def gspo_per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p, mask = _log_p(F.linear(x, w, b), ids), (ids > 2).to(x.dtype)
    log_ratio = ((log_p + 3.0) * mask).mean(-1, keepdim=True)
    ratio = torch.exp(log_p - log_p.detach() + log_ratio.detach())
    return -(torch.min(ratio * _advantages(ids, x), ratio.clamp(0.8, 1.2)) * mask).sum() / mask.sum()


@form()
def normalised_in_each_sequence(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), ids, reduction="none")
    return (losses / losses.mean(1, keepdim=True)).square().sum()


@form()
def sums_of_columns(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    temperature = x[..., :1].square() + 1.0
    z = F.linear(x, w, b) / temperature
    return _log_p(z, ids).sum(0).exp().sqrt().sum() + z.logsumexp(-1).detach().mean()


@form("backward")
def sequences_of_chosen_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids).sum(-1)
    return -F.logsigmoid(log_p[ids[:, 0] % 3] - log_p).mean()


@form("backward")
def unequal_parts(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids).sum(-1)
    return -F.logsigmoid(log_p[:2].sum() - log_p[2:].sum())


@form("backward")
def products_of_all_pairs(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids).sum(-1)
    return -F.logsigmoid(log_p.unsqueeze(0) - log_p.unsqueeze(1)).mean()


@form("backward")
def windows_of_tokens(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    return (log_p[:, :-2] + log_p[:, 2:]).exp().sum()


@form("backward", "backward")
def dpo_of_two_batches(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    better = _log_p(F.linear(x, w, b), ids).sum(-1)
    worse = _log_p(F.linear(x * 0.5, w, b), ids.roll(1, 1)).sum(-1)
    return -F.logsigmoid(0.1 * (better - worse)).mean()


@form("backward")
def normalised_by_its_own_mean(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(_rows(F.linear(x, w, b)), labels.view(-1), reduction="none")
    return (losses / losses.mean()).square().sum()


@form("forward")
def log_of_the_mean(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return (F.cross_entropy(_rows(F.linear(x, w, b)), ids.view(-1), reduction="none") ** 2).mean().log()


@form("backward")
def a_learned_weight_of_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return (_log_p(F.linear(x, w), ids) ** 2 * b[: ids.shape[1]]).mean()


@form("backward")
def shifted_after_the_gather(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = _log_p(F.linear(x, w, b), ids)
    return (log_p[:, 1:] ** 2).mean() + (log_p[:, :-1] * 2).mean()


@form("forward", "forward")
def multi_token_prediction(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x[:, :-1], w, b))
    total = F.cross_entropy(z, labels[:, 1:].reshape(-1)) + 1e-3 * z.logsumexp(-1).square().mean()
    second = torch.tanh(x[:, :-2] + x[:, 1:-1])
    return total + 0.3 * F.cross_entropy(_rows(F.linear(second, w, b)), labels[:, 2:].reshape(-1))


# --------------------------------------------------------------------------------- statistics of rows that are returned


@form("backward")
def two_targets(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, later = _rows(F.linear(x, w, b)), labels.roll(1)
    losses = F.cross_entropy(z, ids.view(-1), reduction="none").view(ids.shape)
    return (F.cross_entropy(z, labels.view(-1)) + F.cross_entropy(z, later.view(-1), reduction="sum")) * losses


@form("backward")
def log_probabilities_of_two_tokens(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(F.linear(x, w, b), -1)
    first, second = (torch.gather(log_p, 2, t.unsqueeze(2)) for t in (ids, ids.flip(1)))
    return torch.sigmoid(first - 2 * second)


@form("backward")
def entropy_per_token(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    log_p = F.log_softmax(z, dim=-1)
    return -(log_p.exp() * log_p).sum(-1)


@form("backward")
def entropy_and_log_probability_at_learned_temperatures(
    x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor
) -> Tensor:
    z = (F.linear(x, w) / (x[..., :1].square() + 1.0) + b).clamp(-2.0, 2.5)
    return _Distribution(z).entropy() * 0.1 - _log_p(z, ids)


@form("backward")
def entropy_from_logsumexp(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    return torch.logsumexp(z, dim=-1) - torch.sum(torch.softmax(z, dim=-1) * z, dim=-1)


@form("backward")
def entropy_by_entr(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return _entropy_by_entr(F.linear(x, w, b)).unsqueeze(-1)


@form("backward")
def entropy_and_log_probability_of_a_distribution(
    x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor
) -> Tensor:
    distribution = _Distribution(F.linear(x, w, b))
    return distribution.log_prob(ids) + 0.1 * distribution.entropy()


@form("backward")
def weighted_with_entropy_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        entropy = _entropy_by_entr(z)
    return _log_p(z, ids) * entropy


@form("backward")
def expected_logit(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    return z.gather(-1, ids.unsqueeze(-1)) - (-z * z.softmax(-1)).sum(-1, True)


@form("backward")
def entropy_of_capped_logits_first_in_time(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = torch.tanh(F.linear(x, w, b).transpose(0, 1) / 2.0) * 2.0
    entropy = (-z.log_softmax(2) * z.softmax(2)).sum(2)
    return entropy.t() * _log_p(z, ids.t()).t()


@form("backward")
def gather_less_logsumexp_broadcast(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return (z.gather(1, ids.view(-1, 1)) - z.logsumexp(1)).square()


# -------------------------------------------------------------------------------------------------- checkpointing


@form("backward")
def checkpointed(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    def head(x: Tensor, w: Tensor) -> Tensor:
        return F.cross_entropy(_rows(x @ w.T), labels.view(-1))

    result: Tensor = checkpoint(head, x, w, use_reentrant=False)
    return result


# ---------------------------------------------------------------------------------------------------- near misses


@near_miss("must exist")
def logits_used_elsewhere(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z, labels.view(-1)) + z.square().mean()


@near_miss("writes into a tensor that the nodes of this site read")
def hidden_states_overwritten(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = x * 1
        z = _rows(F.linear(hidden, w, b))
        hidden.view(-1)[:3] = 7.0
        return F.cross_entropy(z, labels.view(-1))


@near_miss("writes into a tensor that the nodes of this site read")
def weight_overwritten_through_out(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        weight = w * 1
        z = _rows(F.linear(x, weight, b))
        torch.mul(w, 2.0, out=weight)
        return F.cross_entropy(z, labels.view(-1))


@near_miss("writes into a tensor that the nodes of this site read")
def mask_overwritten(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        mask = (ids > 3).to(x.dtype)
        losses = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels, reduction="none") * mask
        mask.zero_()
        return losses.sum()


@near_miss("writes into a tensor that the nodes of this site read")
def hidden_states_overwritten_in_a_checkpoint(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = x * 1
        z = _rows(F.linear(hidden, w, b))
        total: Tensor = checkpoint(lambda h: h.mul_(2.0).sum(), hidden, use_reentrant=False)
        return F.cross_entropy(z, labels.view(-1)) + 0.0 * total


@near_miss("writes into mask, which stays in the graph")
def losses_written_into_the_mask(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        mask = (ids > 3).to(x.dtype)
        losses = F.cross_entropy(F.linear(x, w, b).transpose(1, 2), labels, reduction="none")
        return mask.mul_(losses).sum() + mask.max()


@near_miss("stops the gradient")
def linear_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.linear(x, w)
    return F.cross_entropy(_rows(z + b), labels.view(-1))


@near_miss("without gradient, another with")
def one_part_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, target = _rows(F.linear(x, w, b)), ids.view(-1)
    with torch.no_grad():
        first = F.cross_entropy(z[:6], target[:6])
    return first + F.cross_entropy(z[6:], target[6:])


@near_miss("come into this graph as its input")
def no_linear(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.view(-1, x.shape[-1]), ids.view(-1) % x.shape[-1]) + 0 * w.sum()


@near_miss("relu (relu) of the logits is not an operation")
def relu_before(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.relu(_rows(F.linear(x, w, b))), labels.view(-1))


@near_miss("must exist")
def smoothing_that_does_not_add_up(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(_rows(F.linear(x, w, b)), dim=-1)
    nll = -log_p.gather(dim=-1, index=ids.view(-1).unsqueeze(1)).squeeze(1)
    return (nll + 0.1 * -log_p.mean(dim=-1)).mean()


@near_miss("must exist")
def mean_of_log_probabilities_used_elsewhere(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(_rows(F.linear(x, w, b)), dim=-1)
    smooth = -log_p.mean(dim=-1)
    nll = -log_p.gather(dim=-1, index=ids.view(-1).unsqueeze(1)).squeeze(1)
    return (0.9 * nll + 0.1 * smooth).mean() + smooth.square().mean()


@near_miss("mixes the class dimension")
def classes_regrouped(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w[:12]).reshape(-1, 3), ids.view(-1).repeat_interleave(4) % 3) + 0 * b.sum()


@near_miss("dimension")
def classes_not_last(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, w, b), ids[:, :1].expand(-1, w.shape[0]) % x.shape[1])


@near_miss("other than a leading slice")
def classes_cut_at_the_front(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w, b)[..., 2:]), ids.view(-1) % (w.shape[0] - 2))


@near_miss("writes into the logits")
def written_in_place(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    z.mul_(0.5)
    return F.cross_entropy(_rows(z), labels.view(-1))


@near_miss("overlap or leave rows out")
def overlapping_parts(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z[:6], ids.view(-1)[:6]) + F.cross_entropy(z[4:], ids.view(-1)[4:])


@near_miss("leave rows out")
def rows_left_out(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z[:4], ids.view(-1)[:4]) + F.cross_entropy(z[4:8], ids.view(-1)[4:8])


@near_miss("scale or mask them differently")
def entropy_at_another_temperature(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    return F.cross_entropy(_rows(z), labels.view(-1)) - _entropy_by_entr(z / 2).mean()


@near_miss("take different rows")
def accuracy_of_other_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    hits = (z.argmax(-1)[:, 1:] == ids[:, 1:]).sum()
    return F.cross_entropy(_rows(z[:, :-1]), ids[:, 1:].reshape(-1)) * (1 + hits)


@near_miss("more than one with class weights")
def two_smoothed_losses(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    first = F.cross_entropy(z, labels.view(-1), label_smoothing=0.1)
    return first + F.cross_entropy(z, labels.view(-1), label_smoothing=0.2)


@near_miss("is made after another value of these logits was used")
def targets_from_the_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z, torch.where(z.argmax(-1) > 9, ids.view(-1), 0))


@near_miss("is made after another value of these logits was used")
def scale_made_beside_the_accuracy(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w)
    with torch.no_grad():
        scale = b[0].exp()
        hits = ((z * scale).argmax(-1) == ids).sum()
    return F.cross_entropy(_rows(z * scale), labels.view(-1)) * (1 + hits)


@near_miss("used elsewhere too, by max")
def largest_logit(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z, labels.view(-1)) + z.max(-1).values.sum()


@near_miss("used elsewhere too, by softmax")
def confidence(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z, labels.view(-1)) + z.softmax(-1).amax(-1).mean() + z.logsumexp(-1).mean()


@near_miss("scale or mask them differently")
def gather_and_logsumexp_of_different_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    return (z.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - (z * 2).logsumexp(-1)).sum()


@near_miss("must exist")
def logsumexp_over_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w[: x.shape[1]])
    return (z.gather(2, ids[..., None] % x.shape[1]).squeeze(2) - z.logsumexp(1)).sum()


@near_miss("writes into the logits")
def masked_between_gather_and_logsumexp(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z = F.linear(x, w, b)
        lse = z.logsumexp(-1)
        z[..., 30:] = -float("inf")
        return (lse - z.gather(-1, (ids % 30).unsqueeze(-1)).squeeze(-1)).sum()


@near_miss("changes log-probabilities")
def scaled_log_probabilities(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(_rows(F.linear(x, w, b)), -1) * 0.5, labels.view(-1))


@near_miss("cut after the log_softmax")
def classes_cut_after_log_softmax(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    log_p = F.log_softmax(_rows(F.linear(x, w, b)), -1)[:, : w.shape[0] - 3]
    return F.nll_loss(log_p, ids.view(-1).clamp_max(w.shape[0] - 4))


@near_miss("redundant")
def log_softmax_twice(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.log_softmax(_rows(F.linear(x, w, b)), -1), labels.view(-1))


@near_miss("over the classes")
def log_softmax_over_rows(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(F.log_softmax(_rows(F.linear(x, w, b)), 0), labels.view(-1))


# --------------------------------------------------------------------------------- near misses of pointwise chains


@near_miss("a number for each row and class")
def temperature_of_each_logit(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    temperature = 1.0 + (ids.unsqueeze(-1) + torch.arange(w.shape[0])) % 5
    return F.cross_entropy(_rows(F.linear(x, w) / temperature), labels.view(-1))


@near_miss("a flag for each row and class")
def mask_of_each_logit(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    own = torch.arange(w.shape[0]) == ids.unsqueeze(-1)
    return F.cross_entropy(_rows(F.linear(x, w, b).masked_fill(own, 0.5)), labels.view(-1))


@near_miss("must exist")
def temperature_computed_from_the_logits(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    return F.cross_entropy(_rows(z / z.detach().max()), labels.view(-1))


@near_miss("a number for each row and class")
def logits_squared(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = _rows(F.linear(x, w, b))
    return F.cross_entropy(z * z, labels.view(-1))


@near_miss("with alpha is not read")
def class_bias_times_alpha(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.add(_rows(F.linear(x, w)), b, alpha=2.0), labels.view(-1))


@near_miss("with rounding_mode is not read")
def divided_and_rounded(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.div(_rows(F.linear(x, w)), 0.1, rounding_mode="floor") + b, labels.view(-1))


@near_miss("of two bounds a tensor is one")
def clamped_between_tensors(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_rows(F.linear(x, w)).clamp(-b.abs(), b.abs()), labels.view(-1))


@near_miss("maximum (maximum) of the logits is not an operation")
def maximum_of_two(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.maximum(_rows(F.linear(x, w)), b), labels.view(-1))


@near_miss("meets a tensor with a number for each of its rows")
def row_temperatures_of_parts(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, temperature = _rows(F.linear(x, w, b)), x[0, :3, :1] + 3.0
    parts = [z[start : start + 3] * temperature for start in range(0, 15, 3)]
    losses = [F.cross_entropy(part, target) for part, target in zip(parts, ids.view(-1).split(3), strict=True)]
    return torch.stack(losses).sum()


@near_miss("scaled or masked differently")
def parts_of_different_temperature(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z, target = _rows(F.linear(x, w)), ids.view(-1)
    return F.cross_entropy(z[:6] * b[0], target[:6]) + F.cross_entropy(z[6:] * b[1], target[6:])


@near_miss("unseen by differentiation")
def scaled_in_place_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        z = z.mul_(0.5)
    return F.cross_entropy(_rows(z), labels.view(-1))


@near_miss("unseen by differentiation")
def written_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        z[..., 30:] = 0.5
    return F.cross_entropy(_rows(z), labels.view(-1))


@near_miss("stops the gradient")
def capped_without_gradient(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x, w, b)
    with torch.no_grad():
        z = torch.sigmoid(z)
    return F.cross_entropy(_rows(z + b), labels.view(-1))


@near_miss("writes into a tensor that the nodes of this site read")
def temperature_overwritten(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        temperature = x[..., :1] * 1 + 3.0
        z = F.linear(x, w, b) / temperature
        temperature[0] = 1.0
        return F.cross_entropy(_rows(z), labels.view(-1))


@near_miss("to (to_1) of the logits is not an operation")
def rounded_to_integers(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return F.cross_entropy(_rows(F.linear(x, w, b)).to(torch.int32).to(x.dtype), labels.view(-1))


@near_miss("divides by 0")
def divided_by_zero(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(torch.tanh(_rows(F.linear(x, w, b)) / 0.0), labels.view(-1))


@near_miss("broadcasts the logits to another shape")
def logits_broadcast(x: Tensor, w: Tensor, b: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    z = F.linear(x[0], w, b)[None].masked_fill(ids[:2, :1, None] > 4, 1.0)
    return F.cross_entropy(_rows(z), ids[:2].reshape(-1))
