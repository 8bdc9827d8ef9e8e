"""The demo's GPT against the same function written by hand in float64."""

import math

import pytest
import torch
from torch import Tensor

from examples.gpt import GPT, GPTConfig

CONFIG = GPTConfig(vocabulary=50, context=12, width=16, layers=2, heads=2)


def make_model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).double()
    for parameter in model.parameters():  # away from initialisation, where attention is almost uniform
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt() * weight


def turn(x: Tensor) -> Tensor:
    """Rotary positions by complex multiplication, for one head [T, W]."""
    length, width = x.shape
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :])
    positions, index = torch.arange(length).double(), torch.arange(width // 2).double()
    angles = positions[:, None] * 10000.0 ** (-2 * index / width)
    turned = pairs * torch.exp(1j * angles)
    return torch.cat((turned.real, turned.imag), -1)


def loss_by_hand(model: GPT, tokens: Tensor, labels: Tensor) -> Tensor:
    """One sequence at a time, one head at a time."""
    config, parameter = model.config, dict(model.named_parameters(remove_duplicate=False))
    losses = []
    for row, label in zip(tokens, labels, strict=True):
        x = parameter["embedding.weight"][row]
        for number in range(config.layers):
            prefix = f"blocks.{number}."
            normal = rms_norm(x, parameter[prefix + "norm_attention.weight"])
            qkv = normal @ parameter[prefix + "attention.qkv.weight"].T
            q, k, v = qkv.chunk(3, dim=-1)
            heads = []
            for a, b, c in zip(
                q.chunk(config.heads, -1), k.chunk(config.heads, -1), v.chunk(config.heads, -1), strict=True
            ):
                scores = turn(a) @ turn(b).T / math.sqrt(config.width / config.heads)
                scores = scores.masked_fill(torch.ones_like(scores).triu(1) > 0, -math.inf)
                heads.append(scores.softmax(-1) @ c)
            x = x + torch.cat(heads, -1) @ parameter[prefix + "attention.proj.weight"].T
            up = rms_norm(x, parameter[prefix + "norm_mlp.weight"]) @ parameter[prefix + "up.weight"].T
            x = x + 0.5 * up * (1 + torch.erf(up / math.sqrt(2))) @ parameter[prefix + "down.weight"].T
        logits = rms_norm(x, parameter["norm.weight"]) @ parameter["head.weight"].T
        for position in range(len(row) - 1):
            if label[position + 1] >= 0:
                losses.append(logits[position].logsumexp(0) - logits[position, label[position + 1]])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tied", [True, False])
def test_loss_equals_the_one_written_by_hand(tied: bool) -> None:
    model = make_model(GPTConfig(vocabulary=50, context=12, width=16, layers=2, heads=2, tied=tied))
    tokens = torch.randint(0, 50, (3, 11))
    labels = tokens.clone()
    labels[1, 4:6] = -100
    expected = loss_by_hand(model, tokens, labels)
    # the tables of sines are made in float32, so agreement ends there
    torch.testing.assert_close(model.loss(tokens, labels), expected, rtol=1e-6, atol=0)
    single = model.loss(tokens, labels, reduction="none")
    assert single.shape == (3 * 10,)
    torch.testing.assert_close(single.sum() / (labels[:, 1:] >= 0).sum(), expected, rtol=1e-6, atol=0)


def test_a_token_does_not_see_later_ones() -> None:
    model = make_model()
    tokens = torch.randint(0, 50, (1, 12))
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 50
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = (GPT(GPTConfig(vocabulary=50, context=4, width=8, layers=1, heads=1, tied=t)) for t in (True, False))
    assert tied.head.weight is tied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 50 * 8


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width 20 with 8 heads.*try width 16"):
        GPTConfig(vocabulary=50, context=4, width=20, layers=1, heads=8)
