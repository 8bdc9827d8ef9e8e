"""Properties: a dict and the same TOML give equal configurations; sizes mean what they say."""

import json
import random
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from structfly.config import Budget, load_config

RULES = ("linear_cross_entropy", "low_rank")
STRUCTURES = ("low_rank", "monarch")
KNOWN: Any = {"known_rules": RULES, "known_structures": STRUCTURES}
UNITS = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}

sizes = st.builds("{}{}".format, st.integers(1, 10**12), st.sampled_from(sorted(UNITS)))
loss_memories = st.integers(1, 2**62) | sizes
rewrites = st.sampled_from(["auto", "always"])
switches = st.dictionaries(st.sampled_from(RULES), st.booleans())
patterns = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6)


def tables(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


structures = st.lists(st.sampled_from(STRUCTURES), unique=True)
overrides = st.dictionaries(
    patterns,
    tables(loss_memory=loss_memories, rewrite=rewrites, rules=switches, structures=structures),
    max_size=4,
)
ratios = st.floats(1e-3, 2.0)
budgets = tables(
    loss_memory=loss_memories,
    params=ratios | st.integers(1, 10**12),
    weight_bytes=ratios | sizes,
    time=ratios | st.builds("{}{}".format, st.integers(1, 10**6), st.sampled_from(["s", "ms", "us"])),
    loss=st.floats(0, 10) | st.integers(0, 10),
)
inductor = tables(
    **{
        "max_autotune": st.booleans(),
        "size-asserts": st.booleans(),
        "multi_kernel_hints": st.lists(st.integers()),
    },
    triton=tables(cudagraphs=st.booleans(), unique_kernel_names=st.booleans()),
)
all_options = tables(
    budget=budgets,
    structures=structures,
    timing_seconds=st.floats(0, 1e6) | st.integers(0, 100),
    rules=switches,
    rewrite=rewrites,
    strict=st.booleans(),
    mode=st.sampled_from(["default", "reduce-overhead", "max-autotune"]),
    inductor=inductor,
    overrides=overrides,
)


def toml(value: object) -> str:
    """The value as TOML, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{quoted(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return quoted(value) if isinstance(value, str) else json.dumps(value)


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


@given(options=all_options, shared=st.booleans())
def test_a_dict_and_the_same_toml_are_equal(options: dict[str, Any], shared: bool) -> None:
    lines = ["[tool.structfly]"] * shared + [f"{key} = {toml(value)}" for key, value in options.items()]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.toml")
        path.write_bytes("\n".join(lines).encode())
        assert load_config({"config": path}, **KNOWN) == load_config(
            options, known_rules=RULES, known_structures=STRUCTURES
        )


@given(below=all_options, above=all_options)
def test_options_hold_where_they_are_given_and_the_file_elsewhere(below: dict[str, Any], above: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "any.toml")
        path.write_bytes("\n".join(f"{key} = {toml(value)}" for key, value in below.items()).encode())
        both = load_config({"config": path, **above}, **KNOWN)
    file, options = (load_config(each, **KNOWN) for each in (below, above))
    for name in ("rewrite", "strict", "mode", "structures", "timing_seconds"):
        assert getattr(both, name) == getattr(options if name in above else file, name)
    for name in Budget.model_fields:
        given = name in above.get("budget", {})
        assert getattr(both.budget, name) == getattr((options if given else file).budget, name)
    assert both.rules == {**file.rules, **options.rules}
    assert both.inductor == {**file.inductor, **options.inductor}
    assert both.overrides == (*file.overrides, *options.overrides)


@given(
    number=st.decimals(min_value=1, max_value=10**9, places=3),
    unit=st.sampled_from(sorted(UNITS)),
    space=st.sampled_from(["", " "]),
    seed=st.randoms(use_true_random=False),
)
def test_sizes(number: object, unit: str, space: str, seed: random.Random) -> None:
    mixed = "".join(seed.choice([letter.lower(), letter.upper()]) for letter in unit)
    config = load_config({"budget": {"loss_memory": f"{number}{space}{mixed}"}})
    assert config.budget.loss_memory == Fraction(str(number)) * UNITS[unit] // 1


@given(count=st.integers(1, 2**50), unit=st.sampled_from(sorted(UNITS)))
def test_whole_sizes_round_trip(count: int, unit: str) -> None:
    config = load_config({"budget": {"loss_memory": f"{count}{unit}"}})
    assert config.budget.loss_memory == count * UNITS[unit]
    assert load_config({"budget": {"loss_memory": f"{config.budget.loss_memory} B"}}) == config
