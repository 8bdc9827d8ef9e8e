"""Small random Hugging Face models, compiled as a step that returns the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.compiling import Rewritten
from tests.oracle import FEW, assert_as_accurate

VOCABULARY = 120
# torch and transformers warn about their own deprecations while Dynamo traces.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def causal(model: Any, config: Any, **changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return model(config(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **changes))


def gpt2() -> Any:
    dropout: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=1, n_head=2, **dropout)
    model = transformers.GPT2LMHeadModel(config)
    # Without it transformers warns in the middle of the step, which breaks the graph before the loss.
    model.loss_type = "ForCausalLM"
    return model


def encoder(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return {**sizes, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}


def t5() -> Any:
    sizes: dict[str, Any] = {
        "decoder_start_token_id": 0,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "dropout_rate": 0.0,
    }
    config = transformers.T5Config(vocab_size=VOCABULARY, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def clip() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: causal(transformers.LlamaForCausalLM, transformers.LlamaConfig),
    "llama-tied": lambda: causal(transformers.LlamaForCausalLM, transformers.LlamaConfig, tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma2": lambda: causal(transformers.Gemma2ForCausalLM, transformers.Gemma2Config, head_dim=16),
    "qwen2": lambda: causal(transformers.Qwen2ForCausalLM, transformers.Qwen2Config),
    "cohere": lambda: causal(transformers.CohereForCausalLM, transformers.CohereConfig),
    "granite": lambda: causal(transformers.GraniteForCausalLM, transformers.GraniteConfig, logits_scaling=8.0),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**encoder(vocab_size=VOCABULARY))),
    "t5": t5,
    "clip": clip,
    "vit": lambda: transformers.ViTForImageClassification(
        transformers.ViTConfig(**encoder(image_size=16, patch_size=8, num_labels=10))
    ),
}


def batch_for(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    if name == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        return {"pixel_values": pixels, "labels": torch.tensor([1, 3])}
    if name == "clip":
        pixels = torch.randn(5, 3, 16, 16, generator=generator).to(dtype)
        ids = torch.randint(2, VOCABULARY, (5, 12), generator=generator)
        return {"pixel_values": pixels, "input_ids": ids, "return_loss": True}
    ids = torch.randint(2, VOCABULARY, (2, 12), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model: Any, step: Callable[..., Any], batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = step(**batch)
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None and p.grad.norm() > 1e-6]


@pytest.mark.parametrize("name", MODELS)
def test_the_head_is_fused_and_exact(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    wide = copy.deepcopy(model).double()

    def step(**batch: Tensor) -> Any:
        return model(**batch).loss

    fast = Rewritten(step, then="aot_eager")
    mine = loss_and_gradients(model, fast, batch_for(name))
    eager = loss_and_gradients(model, step, batch_for(name))
    exact = loss_and_gradients(wide, lambda **batch: wide(**batch).loss, batch_for(name, torch.float64))
    assert fast.statuses == ["rewritten"], fast.sites
    assert len(fast.graphs) == 1
    assert_as_accurate(mine[0], eager[0], exact[0].double(), torch.float32, "loss")
    assert len(mine[1]) == len(exact[1])
    for index, (a, b, c) in enumerate(zip(mine[1], eager[1], exact[1], strict=True)):
        assert_as_accurate(a, b, c, torch.float32, f"gradient {index}", 2 * FEW)


def test_a_model_that_returns_its_logits_is_left_alone_and_told_the_remedy() -> None:
    model = MODELS["llama"]()
    fast = Rewritten(model)
    batch = batch_for("llama")
    made, eager = fast(**batch), model(**batch)
    torch.testing.assert_close(made.loss, eager.loss)
    torch.testing.assert_close(made.logits, eager.logits)
    assert fast.statuses == ["missed"]
    assert "compile a function that returns the loss" in fast.sites[0].reason


def test_a_graph_break_before_the_loss_is_said() -> None:
    model = MODELS["llama"]()

    def step(**batch: Tensor) -> Any:
        logits = model(input_ids=batch["input_ids"]).logits
        torch._dynamo.graph_break()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    fast = Rewritten(step)
    fast(**batch_for("llama"))
    assert fast.statuses == ["missed"]
    assert "graph break" in fast.sites[0].reason
