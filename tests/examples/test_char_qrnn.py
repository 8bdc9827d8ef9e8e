"""The character model learns, and what it writes one character at a time is what it would read at once."""

from __future__ import annotations

import pytest
import torch

from examples.char_qrnn import CharacterModel, main, text


# Inductor's compile workers and torch's own deprecations warn.
@pytest.mark.filterwarnings("ignore")
def test_the_loss_falls_within_a_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    losses = main(["--steps", "12", "--batch", "4", "--length", "64", "--write", "10"])
    assert losses[-1] < losses[0] - 0.5
    assert f"{len(text())} characters" in capsys.readouterr().out


def test_states_carry_on_where_the_text_before_ended() -> None:
    model = CharacterModel(11, width=8)
    tokens = torch.arange(9)[None]
    whole, _ = model.hidden(tokens, [None, None])
    _, states = model.hidden(tokens[:, :5], [None, None])
    rest, _ = model.hidden(tokens[:, 5:], states)
    torch.testing.assert_close(rest, whole[:, 5:])
