"""Time of structfly's own pass, without Dynamo and Inductor, on the training graph of a Llama of 1.2e9 parameters.

The graph is captured once and the pass timed on fresh copies of it.  The parameters are never touched: they take
address space and no memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, fx
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import recording
from benchmarks.recording import Row
from structfly import compat, measure
from structfly.backend import read_config, rewrite

WARMUPS = 2


def make_model(layers: int) -> LlamaForCausalLM:
    """Llama-3.2-1B's sizes with 16 layers: hidden 2048, feed-forward 8192, vocabulary 128,256, tied head, bfloat16."""
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=2048,
        intermediate_size=8192,
        vocab_size=128_256,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")  # allocated and not written: the system hands out no pages for it
    model.tie_weights()
    return model


def capture(model: LlamaForCausalLM, batch: int, length: int) -> fx.GraphModule:
    """Dynamo's graph of ``step(tokens, labels) -> loss``; nothing is computed."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return lambda *inputs: (torch.zeros(()),)

    def step(tokens: Tensor, labels: Tensor) -> Any:
        return model(input_ids=tokens, labels=labels, use_cache=False).loss

    tokens, labels = (torch.zeros(batch, length, dtype=torch.int64) for _ in range(2))
    torch.compile(step, backend=keep, fullgraph=True)(tokens, labels)
    (graph,) = graphs
    return graph


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph in nodes of its own; modules and example values are shared."""
    graph = fx.Graph()
    result = graph.graph_copy(gm.graph, {})
    graph.output(result)
    copy = compat.graph_module(gm, graph)
    copy.meta.update(gm.meta)
    return copy


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--options", type=json.loads, default={"rewrite": "always"}, help="structfly's options, as JSON"
    )
    parser.add_argument("--output", type=Path, help="write this path with .csv and .json added")
    chosen = parser.parse_args(arguments)

    model = make_model(chosen.layers)
    gm = capture(model, chosen.batch, chosen.length)
    config = read_config(chosen.options)
    statuses = Counter(site.status for site in rewrite(copy_of(gm), config).sites)
    copies = iter([copy_of(gm) for _ in range(WARMUPS + chosen.repeats)])
    timing = measure.median_time(lambda: rewrite(next(copies), config), "cpu", repeats=chosen.repeats, warmups=WARMUPS)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = ", ".join(f"{number} {status}" for status, number in statuses.items())
    mode = f"Llama, {parameters / 1e9:.2f}e9 parameters, {len(gm.graph.nodes)} nodes, sites: {found or 'none'}"
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{mode}: {timing.median * 1e3:.1f} ms ({timing.p20 * 1e3:.1f} to {timing.p80 * 1e3:.1f})")
    environment = measure.environment()
    console.print(" | ".join(f"{key} {value}" for key, value in environment.items()), soft_wrap=True)
    if chosen.output:
        command = recording.command_line("benchmarks.pass_time", arguments or sys.argv[1:])
        rows = [Row.of_timing(timing, kernel="rewriting_pass", provider="structfly", mode=mode)]
        for path in recording.write(chosen.output, rows, environment=environment, command=command):
            console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
