"""Configurations that are accepted, and what they come to."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch._inductor
from pydantic import ValidationError

from structfly.config import Budget, Config, load_config

RULES = ("linear_cross_entropy", "low_rank")
STRUCTURES = ("low_rank", "monarch")


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (None, {}),
        ({}, {}),
        ({"budget": {}}, {}),
        ({"budget": {"loss_memory": 1}}, {"budget": {"loss_memory": 1}}),
        ({"budget": {"loss_memory": "64KiB"}}, {"budget": {"loss_memory": 65536}}),
        ({"budget": {"loss_memory": None}}, {}),
        ({"budget": {"params": 0.5, "time": "2ms"}}, {"budget": {"params": 0.5, "time": "2000.000us"}}),
        ({"budget": {"weight_bytes": "1KiB", "loss": 1}}, {"budget": {"weight_bytes": 1024, "loss": 1.0}}),
        ({"plan": "a/plan.json"}, {"plan": Path("a/plan.json")}),
        (
            {"plan": Path("plan.json"), "budget": {"loss_memory": 1}},
            {"plan": Path("plan.json"), "budget": {"loss_memory": 1}},
        ),
        ({"plan": None}, {}),
        ({"structures": ["monarch"]}, {"structures": ("monarch",)}),
        ({"structures": []}, {"structures": ()}),
        ({"overrides": {"a": {"structures": []}}}, {"overrides": [("a", {"structures": ()})]}),
        ({"timing_seconds": 0}, {"timing_seconds": 0.0}),
        ({"rules": {"low_rank": False}}, {"rules": {"low_rank": False}}),
        ({"rewrite": "always"}, {"rewrite": "always"}),
        ({"strict": True}, {"strict": True}),
        ({"mode": "reduce-overhead"}, {"mode": "reduce-overhead"}),
        ({"mode": None}, {}),
        ({"inductor": {"max_autotune": True}}, {"inductor": {"max_autotune": True}}),
        ({"inductor": {"max-autotune": True}}, {"inductor": {"max_autotune": True}}),
        ({"inductor": {"triton.cudagraphs": True}}, {"inductor": {"triton.cudagraphs": True}}),
        ({"inductor": {"triton": {"cudagraphs": True}}}, {"inductor": {"triton.cudagraphs": True}}),
        ({"inductor": {"triton": {}}}, {}),
        (
            {"inductor": {"pre_grad_fusion_options": {"batch_linear": {"size": 4}}}},
            {"inductor": {"pre_grad_fusion_options": {"batch_linear": {"size": 4}}}},
        ),
        ({"overrides": {}}, {}),
        (
            {"overrides": {"b": {}, "a*": {"rewrite": "auto"}}},
            {"overrides": [("b", {}), ("a*", {"rewrite": "auto"})]},
        ),
        (
            {"overrides": {"a": {"loss_memory": "1KB", "rules": {"low_rank": True}}}},
            {"overrides": [("a", {"loss_memory": 1000, "rules": {"low_rank": True}})]},
        ),
        (
            MappingProxyType({"budget": MappingProxyType({"loss_memory": 2})}),
            {"budget": {"loss_memory": 2}},
        ),
        (
            {"overrides": MappingProxyType({"a": MappingProxyType({"rules": MappingProxyType({"low_rank": True})})})},
            {"overrides": [("a", {"rules": {"low_rank": True}})]},
        ),
    ],
)
def test_accepted(options: Mapping[str, object] | None, changed: dict[str, Any]) -> None:
    unset: dict[str, Any] = {
        "budget": dict.fromkeys(Budget.model_fields),
        "plan": None,
        "structures": None,
        "timing_seconds": 10.0,
        "rules": {},
        "rewrite": "auto",
        "strict": False,
        "mode": None,
        "inductor": {},
        "overrides": [],
    }
    expected = unset | changed
    if "budget" in changed:
        expected["budget"] = unset["budget"] | changed["budget"]
    assert load_config(options, known_rules=RULES, known_structures=STRUCTURES).model_dump() == expected


@pytest.mark.parametrize("mode", sorted(torch._inductor.list_mode_options()))
def test_a_mode_stands_for_torchs_own_options(mode: str) -> None:
    expected = torch._inductor.list_mode_options(mode)
    assert load_config({"mode": mode}).inductor_options() == expected
    assert load_config(None, mode).inductor_options() == expected
    assert load_config({"mode": mode}, mode) == load_config(None, mode)


def test_the_inductor_table_wins_over_the_mode() -> None:
    config = load_config({"inductor": {"triton.cudagraphs": False, "size_asserts": False}}, "reduce-overhead")
    assert config.inductor_options() == {"triton.cudagraphs": False, "size_asserts": False}


def test_objects_reach_inductor_as_they_are() -> None:
    def own_pass(graph: object) -> None: ...

    config = load_config({"inductor": {"post_grad_custom_post_pass": own_pass}})
    assert config.inductor_options()["post_grad_custom_post_pass"] is own_pass


def test_every_field_is_described() -> None:
    assert all(field.description for field in Config.model_fields.values())


# Assignments that a type checker would refuse too, hence as text.
@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("config.strict = True", ValidationError),
        ("config.budget.loss_memory = 1", ValidationError),
        ("config.rules['low_rank'] = False", TypeError),
        ("config.inductor['max_autotune'] = True", TypeError),
        ("config.overrides[0] = ()", TypeError),
        ("config.overrides[0][1].rewrite = 'auto'", ValidationError),
        ("config.for_site('a').rewrite = 'auto'", AttributeError),
    ],
)
def test_immutable(statement: str, error: type[Exception]) -> None:
    config = load_config({"overrides": {"a": {}}})
    with pytest.raises(error):
        exec(statement, {"config": config})


def test_later_changes_to_what_was_given_or_taken_do_not_show() -> None:
    sizes = [1]
    rules = {"low_rank": False}
    config = load_config({"rules": rules, "inductor": {"multi_kernel_hints": sizes}}, known_rules=RULES)
    rules["low_rank"] = True
    sizes.append(2)
    taken = config.inductor_options()["multi_kernel_hints"]
    assert isinstance(taken, list)
    taken.append(3)
    assert config.rules == {"low_rank": False}
    assert config.inductor_options() == {"multi_kernel_hints": [1]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": {}, "b": {}}, {"b": {}, "a": {}}),
        ({"a": {}}, {"a": {"rewrite": "auto"}}),
        ({"a": {}}, {"a": {"loss_memory": None}}),
        ({"a": {"rewrite": "auto"}}, {"a": {"rewrite": "always"}}),
    ],
)
def test_configurations_that_act_differently_are_not_equal(one: object, other: object) -> None:
    assert load_config({"overrides": one}) != load_config({"overrides": other})
    assert load_config({"overrides": one}) == load_config({"overrides": one})


def test_importing_it_does_not_import_inductor() -> None:
    code = "import sys, structfly.config; print('torch._inductor' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
